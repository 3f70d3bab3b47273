"""Promises of the preparation: the same bytes whatever happens on the way, and every input accounted for."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image
from rich.console import Console

from sharding import exchange, stages
from sharding.errors import BadDataLimit, UserError
from sharding.index import read_index
from sharding.manifest import load_manifest
from sharding.media import decode_video
from sharding.prepare import PrepareConfig, TaskFailed, prepare
from sharding.report import closing_table
from sharding.storage import Storage, open_storage

real_encode = stages.encode
real_gather = exchange.gather

DUPLICATES = (7, 23, 24)  # copies of picture 3, in three tasks


def _png(number: int, height: int = 40) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (height, 44, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """30 pictures: 3 copies, one too small, one broken, one without captions, one with empty ones."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:03d}.png").write_bytes(_png(3 if number in DUPLICATES else number))
        (folder / f"{number:03d}.txt").write_text(f"picture {number}\nseen again {number}\n")
    (folder / "002.png").write_bytes(_png(2, height=20))
    (folder / "010.png").write_bytes(b"no picture")
    (folder / "011.txt").unlink()
    (folder / "012.txt").write_text(" \n")
    return folder


def _config(corpus: Path | str, **changes) -> PrepareConfig:
    values = {
        "source": {"kind": "folder", "path": str(corpus)},
        "modality": "image",
        "samples_per_shard": 8,
        "image": {"resize": 24},
        "filters": [{"kind": "size", "min": 30}, {"kind": "duplicates"}],
    }
    return PrepareConfig.model_validate(values | changes)


def _files(storage: Storage, path: str) -> dict[str, str]:
    """sha256 of all files of a dataset."""
    dataset = storage.at(path)
    return {file.path: hashlib.sha256(dataset.read_bytes(file.path)).hexdigest() for file in dataset.list()}


def _keys(storage: Storage, path: str) -> list[str]:
    dataset = storage.at(path)
    tables = [read_index(dataset.read_bytes(shard.index)) for shard in load_manifest(dataset).shards]
    return [source for table in tables for source in table.column("source").to_pylist()]


def test_every_input_is_counted_and_the_first_of_equal_ones_stays(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    prepared = prepare("pairs", _config(corpus), storage, in_flight=3)
    counts = prepared.manifest.counts
    assert counts.dropped == {
        "caption-empty": 1, "caption-missing": 1, "decode-failed": 1, "duplicate-other-caption": 3,
        "too-small": 1,
    }  # fmt: skip
    assert (counts.read, counts.kept, prepared.manifest.samples) == (30, 23, 23)
    expected = [f"{n:03d}.png" for n in range(30) if n not in (*DUPLICATES, 2, 10, 11, 12)]
    assert _keys(storage, prepared.path) == expected
    assert load_manifest(storage.at(prepared.path)) == prepared.manifest
    assert not list(storage.at(prepared.path).list("work"))


def test_shards_are_plain_webdataset_with_all_captions(tmp_path, corpus, ray_session):
    prepared = prepare("pairs", _config(corpus), open_storage(tmp_path / "out"), in_flight=2)
    tars = [str(tmp_path / "out" / prepared.path / shard.tar) for shard in prepared.manifest.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 23
    assert samples[0]["webp"].shape == (24, 26, 3)
    assert samples[0]["txt"] == "picture 0"
    assert samples[0]["json"]["captions"] == ["picture 0", "seen again 0"]
    for shard, tar in zip(prepared.manifest.shards, tars, strict=True):
        data = Path(tar).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, corpus, ray_session):
    trees = []
    for in_flight in (1, 4):
        storage = open_storage(tmp_path / f"out{in_flight}")
        trees.append(_files(storage, prepare("pairs", _config(corpus), storage, in_flight=in_flight).path))
    assert trees[0] == trees[1]
    assert "manifest.json" in trees[0]


def test_a_prepared_dataset_is_returned_after_listing_its_source(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    first = prepare("pairs", _config(corpus), storage, in_flight=2)
    phases: list[str] = []
    again = prepare("pairs", _config(corpus), storage, in_flight=2, progress=lambda p: phases.append(p.phase))
    assert again == first
    assert set(phases) <= {"listing"}


def test_another_configuration_or_source_is_another_dataset(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    paths = {prepare("pairs", _config(corpus), storage, in_flight=2).path}
    paths.add(prepare("pairs", _config(corpus, image={"resize": 20}), storage, in_flight=2).path)
    (corpus / "099.png").write_bytes(_png(99))
    (corpus / "099.txt").write_text("late")
    last = prepare("pairs", _config(corpus), storage, in_flight=2)
    assert len(paths | {last.path}) == 3
    assert last.manifest.samples == 24
    assert all(path.startswith("datasets/pairs-") for path in paths)


def test_duplicates_are_kept_on_demand(tmp_path, corpus, ray_session):
    config = _config(corpus, filters=[{"kind": "size", "min": 30}])
    manifest = prepare("pairs", config, open_storage(tmp_path / "out"), in_flight=2).manifest
    assert manifest.samples == 26
    assert not any(cause.startswith("duplicate") for cause in manifest.counts.dropped)


EMOJI = Path(__file__).parents[2] / "pipeline/demo/corpus/images"


@pytest.mark.parametrize("samples_per_shard", [5, 100])
def test_copies_in_other_files_and_near_copies_are_found_over_the_whole_corpus(
    tmp_path, ray_session, samples_per_shard
):
    folder = tmp_path / "emoji"
    folder.mkdir()
    faces = sorted(EMOJI.glob("1f4*.webp"))[:6]
    for number, path in enumerate(faces):
        picture = Image.open(path).convert("RGB")
        picture.save(folder / f"{number:02d}.png")
        picture.save(folder / f"{10 + number}.bmp")  # the same pixels
        picture.save(folder / f"{20 + number}.jpg", quality=80)
        (folder / f"{30 + number}.png").write_bytes((folder / f"{number:02d}.png").read_bytes())
        for start in (0, 10, 20, 30):
            (folder / f"{start + number:02d}.txt").write_text("an emoji")
    config = _config(
        folder,
        samples_per_shard=samples_per_shard,
        filters=[
            {"kind": "duplicates"},
            {"kind": "duplicates", "by": "pixels"},
            {"kind": "near_duplicates", "distance": 8},
        ],
    )
    storage = open_storage(tmp_path / "out")
    prepared = prepare("emoji", config, storage, in_flight=3)
    assert prepared.manifest.counts.dropped == {"duplicate": 6, "duplicate-pixels": 6, "near-duplicate": 6}
    assert _keys(storage, prepared.path) == [f"{number:02d}.png" for number in range(6)]


class NoSevens:
    """A filter as a user would write one; tasks import it from the working directory."""

    level = "caption"

    def __init__(self, digit: str) -> None:
        self.digit = digit

    def keeps(self, caption: str) -> bool:
        return self.digit not in caption


def test_a_class_of_the_users_runs_in_the_tasks_and_its_drops_are_a_choice(tmp_path, corpus, ray_session):
    block = {
        "kind": "custom",
        "filter": "tests.sharding.test_prepare.NoSevens",
        "arguments": {"digit": "7"},
    }
    config = _config(corpus, filters=[block], bad_limit=0.1)
    manifest = prepare("pairs", config, open_storage(tmp_path / "out"), in_flight=2).manifest
    assert manifest.counts.dropped["custom-no-sevens"] == 3
    assert manifest.configuration["filters"][0]["arguments"] == {"digit": "7"}


def test_duplicates_within_a_single_task_are_dropped(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    prepared = prepare("pairs", _config(corpus, samples_per_shard=100), storage, in_flight=2)
    assert len(prepared.manifest.shards) == 1
    assert prepared.manifest.counts.dropped["duplicate-other-caption"] == 3


def test_a_task_all_of_whose_inputs_are_dropped_makes_no_shard(tmp_path, corpus, ray_session):
    prepared = prepare(
        "pairs", _config(corpus, samples_per_shard=1), open_storage(tmp_path / "out"), in_flight=4
    )
    names = [shard.name for shard in prepared.manifest.shards]
    assert len(names) == 23
    assert "000010" not in names
    assert "000007" not in names
    assert prepared.manifest.counts.read == 30


def test_progress_counts_up_to_the_whole(tmp_path, corpus, ray_session):
    seen = []
    prepared = prepare(
        "pairs", _config(corpus), open_storage(tmp_path / "out"), in_flight=2, progress=seen.append
    )
    for phase in ("encode", "write"):
        steps = [step for step in seen if step.phase == phase]
        assert [step.done for step in steps] == [1, 2, 3, 4]
        assert {step.total for step in steps} == {4}
        assert steps[-1].counts.read == 30
        assert steps[-1].rate > 0
    assert seen[-1].counts == prepared.manifest.counts


def test_the_closing_table_names_every_cause(tmp_path, corpus, ray_session):
    manifest = prepare("pairs", _config(corpus), open_storage(tmp_path / "out"), in_flight=2).manifest
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(closing_table([manifest]))
    text = console.export_text()
    for cause, number in manifest.counts.dropped.items():
        assert f"{cause} {number} " in text
    assert "pairs │   30 │   23 │      4 │" in text


def test_too_much_bad_data_aborts_and_a_mended_corpus_is_read_again(tmp_path, ray_session):
    rows = [{"file": f"{n}.png", "text": f"picture {n}"} for n in range(12)]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(_png(number))
    storage = open_storage(tmp_path / "out")
    source = {"kind": "table", "path": str(table), "path_column": "file", "caption_column": "text"}
    config = _config("", source=source, samples_per_shard=4, bad_limit=0.1)
    with pytest.raises(BadDataLimit, match=r"2 of 12 inputs .* bad_limit 0.1 \(missing-file 2\)") as caught:
        prepare("pairs", config, storage, in_flight=2)
    assert "10.png" in str(caught.value)
    lenient = prepare("lenient", config.model_copy(update={"bad_limit": 0.2}), storage, in_flight=2)
    assert lenient.manifest.counts.dropped == {"missing-file": 2}
    for number in (10, 11):
        (tmp_path / f"{number}.png").write_bytes(_png(number))
    assert prepare("pairs", config, storage, in_flight=2).manifest.samples == 12


def test_a_corpus_of_which_nothing_is_left_is_a_user_error(tmp_path, corpus, ray_session):
    config = _config(corpus, filters=[{"kind": "size", "min": 1000}])
    with pytest.raises(UserError, match=r"nothing is left of 30 inputs .*too-small 27"):
        prepare("pairs", config, open_storage(tmp_path / "out"), in_flight=2)


def test_missing_sources_and_bad_names_are_user_errors(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        prepare("pairs", _config(tmp_path / "nowhere"), storage, in_flight=2)
    with pytest.raises(UserError, match="dataset name"):
        prepare("../pairs", _config(corpus), storage, in_flight=2)


def _dies_once(work, task):
    marker = Path(urlsplit(work.plan.source.url).path).parent / "died"
    if task == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real_encode(work, task)


def _dies_always(work, task):
    if task == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return real_encode(work, task)


def _breaks_shards(work, group):
    found = real_gather(work, group)
    for name in ("000000.tar", "000001.tar"):
        data = work.dataset.read_bytes(f"work/staged/{name}")
        work.dataset.write_bytes(f"work/staged/{name}", data[:1000] + b"?" + data[1001:])
    work.dataset.delete("work/staged/000002.tar")
    return found


def _has_a_full_disk(work, task):
    """Files of this process may not grow beyond 4 KiB, as on a disk that is full."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if task == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        return real_encode(work, task)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def _is_refused(work, task):
    raise UserError("the key was refused by s3://bucket")


def _has_a_bug(work, task):
    raise KeyError("nonsense")


def test_a_task_whose_process_dies_is_done_again(tmp_path, corpus, ray_session, monkeypatch):
    reference = open_storage(tmp_path / "reference")
    expected = prepare("pairs", _config(corpus), reference, in_flight=2)
    monkeypatch.setattr(stages, "encode", _dies_once)
    storage = open_storage(tmp_path / "out")
    prepared = prepare("pairs", _config(corpus), storage, in_flight=2)
    assert _files(storage, prepared.path) == _files(reference, expected.path)


def test_a_task_whose_process_always_dies_is_named(tmp_path, corpus, ray_session, monkeypatch):
    monkeypatch.setattr(stages, "encode", _dies_always)
    with pytest.raises(TaskFailed, match=r"task 000001 .*process died in each of 2 tries"):
        prepare("pairs", _config(corpus, task_retries=1), open_storage(tmp_path / "out"), in_flight=2)


def test_a_full_disk_names_the_task_and_the_path_and_a_rerun_goes_on(
    tmp_path, corpus, ray_session, monkeypatch
):
    storage = open_storage(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "encode", _has_a_full_disk)
        with pytest.raises(
            TaskFailed, match=r"task 000002 .*: cannot write /.*glscl-prepare-.*: File too large"
        ):
            prepare("pairs", _config(corpus), storage, in_flight=1)
    phases = []
    prepared = prepare("pairs", _config(corpus), storage, in_flight=1, progress=phases.append)
    first = next(step for step in phases if step.phase == "encode")
    assert (first.done, first.found, first.found_inputs, first.rate) == (2, 2, 16, 0)
    reference = open_storage(tmp_path / "reference")
    expected = prepare("pairs", _config(corpus), reference, in_flight=1)
    assert _files(storage, prepared.path) == _files(reference, expected.path)


def test_a_damaged_record_is_named(tmp_path, corpus, ray_session, monkeypatch):
    storage = open_storage(tmp_path / "out")
    monkeypatch.setattr(exchange, "steps", lambda _: [(_has_a_bug, 1)])
    with pytest.raises(TaskFailed, match="nonsense"):
        prepare("pairs", _config(corpus), storage, in_flight=2)
    (dataset,) = (tmp_path / "out" / "datasets").iterdir()
    (dataset / "work" / "staged" / "000001.json").write_text('{"task": 1}')
    with pytest.raises(UserError, match=r"staged/000001\.json is no record of a task .*remove it"):
        prepare("pairs", _config(corpus), storage, in_flight=2)


def test_the_report_lies_beside_the_manifest_and_shows_kept_and_dropped(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    page = storage.at(prepare("pairs", _config(corpus), storage, in_flight=2).path).read_bytes("report.html")
    text = page.decode()
    # Kept, copies, the small one, the one with empty captions; the broken one and that without captions have none.
    assert text.count("data:image/jpeg;base64,") == 23 + 3 + 1 + 1
    for said in ("picture 29", "too-small", "010.png", "011.png", "captions a sample"):
        assert said in text
    assert text.count("<h3>") == 5


def test_a_run_that_changes_nothing_starts_no_task(tmp_path, corpus, ray_session):
    storage = open_storage(tmp_path / "out")
    started = []
    for _ in range(2):
        prepare("pairs", _config(corpus), storage, in_flight=2, on_start=started.append)
    assert [(one.name, one.tasks, one.source["inputs"]) for one in started] == [("pairs", 4, 30)]


def test_user_errors_in_tasks_stay_one_line_and_bugs_name_the_task(
    tmp_path, corpus, ray_session, monkeypatch
):
    storage = open_storage(tmp_path / "out")
    monkeypatch.setattr(stages, "encode", _is_refused)
    with pytest.raises(UserError) as caught:
        prepare("pairs", _config(corpus), storage, in_flight=2)
    assert str(caught.value) == "the key was refused by s3://bucket"
    monkeypatch.setattr(stages, "encode", _has_a_bug)
    with pytest.raises(TaskFailed, match=r"task 00000\d \(_has_a_bug\) .*nonsense"):
        prepare("pairs", _config(corpus), storage, in_flight=2)


def test_clips_and_animations_become_a_video_dataset(tmp_path, ray_session):
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, frames in enumerate((12, 20, 3)):
        pictures = [Image.new("RGB", (60, 48), (10 * n, 0, 60 * number)) for n in range(frames)]
        name = folder / f"{number}.{'gif' if number == 1 else 'webp'}"
        pictures[0].save(name, save_all=True, append_images=pictures[1:], duration=40)
        (folder / f"{number}.json").write_text(json.dumps({"captions": [f"clip {number}", "moving"]}))
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(200))
    (folder / "broken.json").write_text('{"caption": "x"}')
    config = PrepareConfig.model_validate(
        {
            "source": {"kind": "folder", "path": str(folder), "captions": ".json"},
            "modality": "video",
            "video": {"resize": 32, "max_frames": 16},
            "filters": [{"kind": "frames", "min": 8}, {"kind": "duplicates"}],
            "bad_limit": 0.5,
        }
    )
    storage = open_storage(tmp_path / "out")
    prepared = prepare("clips", config, storage, in_flight=1)
    assert prepared.manifest.counts.dropped == {"decode-failed": 1, "too-few-frames": 1}
    dataset = storage.at(prepared.path)
    rows = read_index(dataset.read_bytes("000000.parquet")).to_pylist()
    assert [(row["frames"], row["width"], row["height"]) for row in rows] == [(12, 40, 32), (16, 40, 32)]
    assert [round(row["duration"], 2) for row in rows] == [0.48, 0.64]
    media = dataset.read_bytes("000000.tar", rows[0]["media_offset"], rows[0]["media_size"])
    assert decode_video(media, 4).shape == (4, 32, 40, 3)


def test_a_staged_shard_that_broke_is_made_again(tmp_path, corpus, ray_session, monkeypatch):
    reference = open_storage(tmp_path / "reference")
    expected = prepare("pairs", _config(corpus), reference, in_flight=2)
    monkeypatch.setattr(exchange, "gather", _breaks_shards)
    storage = open_storage(tmp_path / "out")
    prepared = prepare("pairs", _config(corpus), storage, in_flight=2)
    assert _files(storage, prepared.path) == _files(reference, expected.path)


@pytest.mark.server
def test_s3_to_s3_makes_the_shards_that_a_folder_makes(tmp_path, corpus, ray_session, s3_server):
    local = open_storage(tmp_path / "out")
    expected = prepare("pairs", _config(corpus), local, in_flight=2)
    bucket = f"s3://{s3_server.bucket()}"
    raw = Storage(s3_server.config(f"{bucket}/raw"))
    for file in sorted(corpus.iterdir()):
        raw.write_bytes(f"pictures/{file.name}", file.read_bytes())
    storage = Storage(s3_server.config(f"{bucket}/job"))
    prepared = prepare("pairs", _config(f"{bucket}/raw/pictures"), storage, in_flight=2)
    assert prepared.manifest.shards == expected.manifest.shards
    assert prepared.manifest.digest == expected.manifest.digest
    assert prepared.manifest.counts == expected.manifest.counts
    stored = {
        name: digest for name, digest in _files(storage, prepared.path).items() if name.endswith(".tar")
    }
    assert stored == {n: d for n, d in _files(local, expected.path).items() if n.endswith(".tar")}
    assert s3_server.secret_key not in json.dumps(prepared.manifest.model_dump(mode="json"))


DRIVER = textwrap.dedent(
    """
    import os, sys
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from sharding.prepare import PrepareConfig, prepare
    from sharding.storage import open_storage
    config, out, scratch = sys.argv[1:]
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1",
             object_store_memory=100 * 2**20, _temp_dir=scratch, log_to_driver=False)
    prepare("pairs", PrepareConfig.model_validate_json(config), open_storage(out), in_flight=2)
    """
)


def _prepare_until(moment: str, dataset: Path, config: PrepareConfig, out: Path, scratch: Path) -> None:
    """Start a driver with a Ray of its own, and kill it once it has made four more files of ``moment``."""
    there = len(list(dataset.glob(moment)))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, config.model_dump_json(), str(out), str(scratch)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 600
        while len(list(dataset.glob(moment))) < there + 4:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        started = psutil.Process(driver.pid).children(recursive=True)
    finally:
        driver.kill()
        driver.wait()
    # Those that run tasks; Ray's agents take up to a minute to notice, and touch nothing.
    psutil.wait_procs([process for process in started if not _is_agent(process)], timeout=120)


def _is_agent(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return "Agent" in line or "agent" in line or "log_monitor" in line


@pytest.mark.slow
def test_a_run_killed_in_each_phase_and_done_again_ends_with_the_same_bytes(tmp_path, corpus, ray_session):
    config = _config(corpus, samples_per_shard=1)
    reference = open_storage(tmp_path / "reference")
    expected = prepare("pairs", config, reference, in_flight=4)
    out = tmp_path / "out"
    dataset = out / expected.path
    scratch = Path("/tmp") / f"glscl-kill-{os.getpid()}"
    for moment in ("work/staged/*.json", "commits/*.json"):
        _prepare_until(moment, dataset, config, out, scratch)
        assert not (dataset / "manifest.json").exists()
    storage = open_storage(out)
    prepared = prepare("pairs", config, storage, in_flight=3)
    shutil.rmtree(scratch, ignore_errors=True)
    assert prepared.manifest == expected.manifest
    assert _files(storage, prepared.path) == _files(reference, expected.path)
