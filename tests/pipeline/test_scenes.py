"""Promises of `glscl scenes`: official formats, true contents, equal bytes, and a record only of what is whole."""

from __future__ import annotations

import csv
import io
import json
import pickle
import pickletools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline import cli
from pipeline.scenes import sets as module
from pipeline.scenes.command import RECORD, splits_of, write_scenes
from pipeline.scenes.request import Request
from pipeline.scenes.sets.vqa import normal_form
from pipeline.scenes.sink import Sink
from sharding.errors import StorageFault, UserError
from sharding.media import decode_image, decode_video
from sharding.sources import open_source
from sharding.storage import Storage, open_storage
from tests.fixtures.corpora import CORPUS
from tests.sharding.listings import configured, listed
from tests.sharding.scenes import write_objects

_RULES = {"vocabulary": 24, "width": 96, "height": 96, "frames": 4}
_SPLITS = {"train": 9, "test": 5}


def _request(**changes: Any) -> Request:
    values = {"objects": (CORPUS / "objects.jsonl").as_uri(), "splits": _SPLITS, "rules": _RULES}
    return Request.model_validate(values | changes)


def _written(folder: Path, **changes: Any) -> dict[str, Any]:
    return write_scenes(open_storage(folder), _request(**changes), Console(file=io.StringIO(), width=100))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "out"
    _written(folder)
    return folder


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _pixels(path: Path) -> np.ndarray:
    return decode_image(path.read_bytes())


def test_retrieval_is_read_as_karpathys_files_are_with_five_captions_an_image(sets: Path) -> None:
    folder = sets / "retrieval"
    content = _json(folder / "dataset_scenes.json")
    images = content["images"]
    assert Counter(image["split"] for image in images) == {"train": 9, "test": 5}
    assert [image["imgid"] for image in images] == list(range(14))
    sentences = [sentence for image in images for sentence in image["sentences"]]
    assert [sentence["sentid"] for sentence in sentences] == list(range(5 * 14))
    assert [number for image in images for number in image["sentids"]] == list(range(5 * 14))
    for image in images:
        assert _pixels(folder / "images" / image["filename"]).shape == (96, 96, 3)
        for sentence in image["sentences"]:
            assert sentence["imgid"] == image["imgid"]
            assert " ".join(sentence["tokens"]) == sentence["raw"].lower().replace(",", "").rstrip(".")
    first = [image["sentences"][0]["raw"] for image in images]
    assert len(set(first)) == 14  # a caption fits one image only
    source = configured(
        kind="karpathy", path=str(folder / "dataset_scenes.json"), images=str(folder / "images"), split="test"
    )
    inputs, _ = listed(open_source(source, open_storage(sets)))
    assert [item.captions[0] for item in inputs] == first[9:]


def test_videos_come_with_msr_vtts_lists(sets: Path) -> None:
    folder = sets / "video"
    content = _json(folder / "MSRVTT_data.json")
    assert Counter(video["split"] for video in content["videos"]) == {"train": 9, "test": 5}
    captions: dict[str, list[str]] = {}
    for sentence in content["sentences"]:
        captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    assert {len(texts) for texts in captions.values()} == {5}
    with (folder / "MSRVTT_JSFUSION_test.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == ["key", "vid_key", "video_id", "sentence"]
        test = list(reader)
    videos = {video["video_id"]: video for video in content["videos"]}
    assert [row["video_id"] for row in test] == [name for name, v in videos.items() if v["split"] == "test"]
    assert len({row["sentence"] for row in test}) == 5
    for row in test:
        assert row["sentence"] == captions[row["video_id"]][0]
    train = (folder / "MSRVTT_train.9k.csv").read_text().split()
    assert train == ["video_id", *(name for name, v in videos.items() if v["split"] == "train")]
    for name in videos:
        clip = decode_video((folder / "videos" / f"{name}.mp4").read_bytes(), 4)
        assert clip.shape == (4, 96, 96, 3)


def test_vqa_has_questions_annotations_and_images_of_one_another(sets: Path) -> None:
    folder = sets / "vqa"
    for split, count in (("train2014", 9), ("test2015", 5)):
        asked = _json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json")
        told = _json(folder / f"v2_mscoco_{split}_annotations.json")
        assert asked["data_subtype"] == told["data_subtype"] == split
        assert (asked["task_type"], asked["data_type"]) == ("Open-Ended", "mscoco")
        questions = {question["question_id"]: question for question in asked["questions"]}
        assert len(questions) == len(asked["questions"])
        assert [note["question_id"] for note in told["annotations"]] == list(questions)
        images = {question["image_id"] for question in asked["questions"]}
        assert len(images) == count
        for image in images:
            assert _pixels(folder / split / f"COCO_{split}_{image:012d}.jpg").shape == (96, 96, 3)
        for note in told["annotations"]:
            answers = [answer["answer"] for answer in note["answers"]]
            assert [answer["answer_id"] for answer in note["answers"]] == list(range(1, 11))
            assert answers.count(note["multiple_choice_answer"]) >= 7
            assert all(answer == answer.lower() and "-" not in answer for answer in answers)
            assert note["image_id"] == questions[note["question_id"]]["image_id"]
            kinds = {"yes/no": r"yes|no", "number": r"\d+", "other": r"[a-zñ ]+"}
            assert re.fullmatch(kinds[note["answer_type"]], note["multiple_choice_answer"])
    train, test = (
        _json(folder / f"v2_OpenEnded_mscoco_{split}_questions.json") for split in ("train2014", "test2015")
    )
    ids = [{question["image_id"] for question in one["questions"]} for one in (train, test)]
    assert not ids[0] & ids[1]


def test_answers_have_the_normal_form_of_the_evaluator() -> None:
    """It takes marks from what a model says, and leaves annotators alone that all say the same."""
    assert [normal_form(answer) for answer in ("T-shirt", "jack-o-lantern", "3")] == [
        "t shirt",
        "jack o lantern",
        "3",
    ]


def test_nlvr2_says_each_sentence_of_two_pairs_true_of_one(sets: Path) -> None:
    folder = sets / "nlvr2"
    for split, count in (("train", 10), ("test1", 6)):  # an odd number asked for is made even
        rows = [json.loads(line) for line in (folder / f"{split}.json").read_text("utf-8").splitlines()]
        assert len(rows) == count
        assert Counter(row["label"] for row in rows) == {"True": count // 2, "False": count // 2}
        sentences: dict[str, set[str]] = {}
        for row in rows:
            name, group, pair, sentence = row["identifier"].split("-")
            assert (name, sentence) == (split, "0")
            sentences.setdefault(group, set()).add(row["sentence"])
            for side in (0, 1):
                image = folder / split / f"{name}-{group}-{pair}-img{side}.png"
                assert _pixels(image).shape == (96, 96, 3)
        assert all(len(texts) == 1 for texts in sentences.values())
        assert len(sentences) == count // 2


def test_classification_has_a_folder_for_each_class(tmp_path: Path) -> None:
    _written(tmp_path / "a", splits={"test": 60}, tasks=("classification",))
    folder = tmp_path / "a" / "classification" / "test"
    classes = {path.name: len(list(path.iterdir())) for path in folder.iterdir()}
    assert len(classes) == 24
    assert set(classes.values()) == {2, 3}
    assert all(" " not in name for name in classes)
    with pytest.raises(UserError, match="classification needs two images"):
        _written(tmp_path / "b", splits={"test": 1}, tasks=("classification",))


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        assert module in ("numpy", "numpy._core.multiarray", "numpy._core.numeric"), (module, name)
        return super().find_class(module, name)


def test_alignment_is_a_pickle_of_plain_values_whose_regions_fit_captions_and_pictures(sets: Path) -> None:
    data = (sets / "alignment" / "test.pkl").read_bytes()
    assert next(pickletools.genops(data))[1] == 4
    rows = _Plain(io.BytesIO(data)).load()
    assert len(rows) == 5
    for row in rows:
        assert set(row) == {"image", "caption", "phrases"}
        image = _pixels(sets / "alignment" / "test" / "images" / row["image"]).astype(int)
        one = (sets / "alignment" / "test" / "pkls" / row["image"]).with_suffix(".pkl")
        published = _Plain(io.BytesIO(one.read_bytes())).load()
        assert published["caption"] == row["caption"]
        assert list(published["annotation"]) == [phrase["phrase"] for phrase in row["phrases"]]
        covered = np.zeros((96, 96), int)
        for phrase in row["phrases"]:
            start, end = phrase["span"]
            assert row["caption"][start:end] == phrase["phrase"]
            mask = phrase["mask"]
            assert (mask.dtype, mask.shape, int(mask.max())) == (np.uint8, (96, 96), 1)
            regions = published["annotation"][phrase["phrase"]]
            assert [list(region["bbox_mask"]) for region in regions] == phrase["boxes"]
            np.testing.assert_array_equal(sum(region["pixel_mask"] for region in regions), mask)
            boxed = np.zeros_like(mask)
            for box in phrase["boxes"]:
                assert all(isinstance(side, float) for side in box)
                x1, y1, x2, y2 = map(int, box)
                assert 0 <= x1 < x2 <= 96
                assert 0 <= y1 < y2 <= 96
                boxed[y1:y2, x1:x2] = 1
            assert not (mask > boxed).any()
            covered += boxed
        # Boxes hold all that is not background: outside of them neighbours are alike.
        assert covered.max() == 1
        outside = covered == 0
        assert np.abs(np.diff(image, axis=1)).max(-1)[outside[:, 1:] & outside[:, :-1]].mean() < 12


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_request_gives_the_same_bytes_and_is_not_made_twice(sets: Path, tmp_path: Path) -> None:
    record = _written(tmp_path / "again")
    assert _tree(tmp_path / "again") == _tree(sets)
    assert record == _json(sets / RECORD)
    assert record["files"] == len(_tree(sets)) - 1
    times = {path: path.stat().st_mtime_ns for path in sets.rglob("*")}
    assert _written(sets) == record
    assert {path: path.stat().st_mtime_ns for path in sets.rglob("*")} == times


def test_an_interrupted_run_leaves_no_record_and_the_next_one_finishes_it(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def broken(self: Sink, path: str, data: bytes) -> None:
        written.append(path)
        if len(written) > 40:
            raise StorageFault("the disk is gone")
        whole(self, path, data)

    whole = Sink.write
    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write", broken)
        with pytest.raises(StorageFault, match="the disk is gone"):
            _written(tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()
    assert (tmp_path / "out" / "retrieval" / "images").exists()
    with pytest.raises(UserError, match="holds part of other scenes"):
        _written(tmp_path / "out", rules={**_RULES, "seed": 8})
    _written(tmp_path / "out")
    assert _tree(tmp_path / "out") == _tree(sets)


def test_objects_and_sets_lie_in_any_storage(storage: Storage, tmp_path: Path) -> None:
    local = write_objects(tmp_path / "objects")
    for path in local.parent.iterdir():
        storage.at("objects").write_bytes(path.name, path.read_bytes())
    changes = {"rules": {"width": 64, "height": 64, "held_out": 0.2, "frames": 2}, "splits": {"test": 2}}
    far = _request(objects=storage.url_of("objects/objects.jsonl"), **changes)
    console = Console(file=io.StringIO(), width=100)
    record = write_scenes(storage.at("sets"), far, console)
    near = _written(tmp_path / "near", objects=local.as_uri(), **changes)
    assert record == near
    assert record["files"] == sum(1 for _ in storage.at("sets").list()) - 1
    assert write_scenes(storage.at("sets"), far, console) == record


def test_a_fault_of_the_storage_in_a_writing_thread_is_raised(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    (tmp_path / "taken").write_bytes(b"a file where a folder is needed")
    with pytest.raises((UserError, OSError)), Sink(storage) as sink:
        sink.write("taken/x.jpg", b"data")


def test_what_is_in_the_folder_is_never_mixed_with_scenes(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scenes\.json is of other scenes"):
        _written(sets, rules={**_RULES, "seed": 1})
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"vqa/mine\.txt is in the way"):
        _written(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "vqa"]


def test_more_different_scenes_than_there_are_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SEEN_IN_A_ROW", 5)
    rules = {**_RULES, "vocabulary": 4, "most_kinds": 1, "most_alike": 1, "recolored": 0, "held_out": 0.1}
    with pytest.raises(UserError, match="of split train that were asked for are different"):
        _written(tmp_path, splits={"train": 400}, tasks=("retrieval",), rules=rules)


def test_counts_of_splits_are_read_and_bad_ones_refused() -> None:
    assert splits_of(["test", "train=7"], 3) == {"train": 7, "test": 3}
    for texts, said in [
        (["dev"], "none of train, val, test"),
        (["train=x"], "'x' is no count"),
        (["train=0"], "at least 1"),
        (["val", "val=2"], "twice"),
    ]:
        with pytest.raises(UserError, match=said):
            splits_of(texts, 3)


def _glscl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the command."""
    monkeypatch.setattr("sys.argv", ["glscl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_line_writes_the_bundled_objects_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--count", "2", "--split", "test", "--task", "nlvr2"]
    rules = ["--rule", "vocabulary=24", "--rule", "width=64", "--rule", "height=64"]
    assert _glscl(monkeypatch, "scenes", str(out), *options, *rules) == 0
    said = capsys.readouterr().out
    assert "nlvr2: 2/2 (100%)" in said
    assert "5 files" in said
    assert sorted(path.name for path in out.iterdir()) == ["nlvr2", RECORD]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rule", "foo=1"], "error: rules.foo: Extra inputs are not permitted"),
        (["--rule", "width=8"], "error: rules.width: Input should be greater than or equal to 64"),
        (["--rule", "split=train"], "error: --rule split: use --split"),
        (["--task", "captioning"], "error: --task captioning: is none of retrieval"),
        (["--split", "dev"], "error: --split dev: is none of train, val, test"),
        (["--objects", "/none.jsonl"], "error: no such table of objects: file:///none.jsonl"),
    ],
)
def test_a_wrong_option_is_one_line(
    more: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _glscl(monkeypatch, "scenes", str(tmp_path / "out"), *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert not (tmp_path / "out").exists()
