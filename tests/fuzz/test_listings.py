"""Tables, annotation files and tars with damaged bytes: every row is kept or dropped by cause, and nothing is added.

Whole preparations, with the tasks in this process. A fault of the whole file is a ``UserError`` that names it; anything
else that is raised is a bug.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.evaluation.tasks.nlvr2.data import NLVR2Data, load_statements
from pipeline.evaluation.tasks.vqa.data import VQAData, load_questions
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.foreign import index_shards
from sharding.storage import open_storage
from tests.fixtures.fuzz import Fuzz, read_or_refuse
from tests.fuzz import media_seeds
from tests.fuzz.mutations import mutated_bytes, mutated_json, to_json, to_json_lines
from tests.sharding.preparation import Prepared, prepare_files

_PNG = media_seeds.images()[4]
_FILES = {f"{number}.png": _PNG for number in range(6)}
_ROWS = [{"file": f"{number}.png", "caption": f"caption number {number}"} for number in range(6)]
_TABLE = {"kind": "table", "path_column": "file", "caption_column": "caption"}
# Nothing of this machine may be in a dataset of a folder: these are beside it.
_OUTSIDE = {"outside.png": _PNG}


def _prepared(files: Mapping[str, bytes], source: Mapping[str, Any], name: str) -> Prepared | None:
    """None where the whole file is refused; then the error names it."""
    return read_or_refuse(lambda: prepare_files({**files, **_OUTSIDE}, source), UserError, name)


def _csv(rows: Sequence[Mapping[str, Any]], separator: str) -> bytes:
    lines = [separator.join(("file", "caption"))]
    lines += [separator.join(map(str, row.values())) for row in rows]
    return "\n".join(lines).encode() + b"\n"


def _parquet(rows: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def test_every_line_of_json_is_kept_or_counted(fuzz: Fuzz):
    def check(data: bytes) -> None:
        found = _prepared(
            {**_FILES, "pairs.jsonl": data}, {**_TABLE, "path": "{folder}/pairs.jsonl"}, "pairs.jsonl"
        )
        if found is not None:
            # Lines end at \n alone, and a line of white space is none.
            assert found.counts.inputs == sum(bool(line.strip()) for line in data.split(b"\n"))

    fuzz("jsonl", mutated_json([_ROWS], to_json_lines), check, 60)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_every_line_of_a_table_in_text_is_kept_or_counted(fuzz: Fuzz, suffix: str):
    name = f"pairs.{suffix}"

    def check(data: bytes) -> None:
        found = _prepared({**_FILES, name: data}, {**_TABLE, "path": "{folder}/" + name}, name)
        if found is not None and suffix == "tsv":
            lines = [line for line in data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n") if line]
            assert found.counts.inputs == len(lines) - 1

    quoted = b'file,caption\n0.png,"a, b"\n1.png,"two\nlines"\n2.png,"a ""word"""\n3.png,x\n'
    seeds = (
        [_csv(_ROWS, "\t"), quoted.replace(b",", b"\t")] if suffix == "tsv" else [_csv(_ROWS, ","), quoted]
    )
    fuzz(suffix, mutated_bytes(seeds, [b'"', b'""', b',"', b'",', b"\t", b"\r\n"]), check, 60)


def test_every_row_of_parquet_is_kept_or_counted(fuzz: Fuzz):
    def check(data: bytes) -> None:
        name = "pairs.parquet"
        found = _prepared({**_FILES, name: data}, {**_TABLE, "path": "{folder}/" + name}, name)
        if found is not None:
            assert found.counts.inputs == pq.ParquetFile(io.BytesIO(data)).metadata.num_rows

    lists = [{**row, "caption": [row["caption"], "another"]} for row in _ROWS]
    seeds = [
        _parquet(_ROWS, compression="zstd"),
        _parquet(_ROWS, compression="none", use_dictionary=False, row_group_size=2),
        _parquet(lists, compression="snappy", write_page_checksum=True),
    ]
    fuzz("parquet", mutated_bytes(seeds), check, 100)


_COCO = {
    "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
    "annotations": [{"image_id": number // 2, "caption": f"caption {number}"} for number in range(6)],
}
_KARPATHY = {
    "images": [
        {
            "filepath": "",
            "filename": f"{number}.png",
            "split": "train",
            "sentences": [{"raw": f"caption {number}"}],
        }
        for number in range(3)
    ]
}


@pytest.mark.parametrize("kind", ["coco", "karpathy"])
def test_every_image_of_an_annotation_file_is_kept_or_counted(fuzz: Fuzz, kind: str):
    tree: dict[str, Any] = _COCO if kind == "coco" else _KARPATHY
    source = {"kind": kind, "path": "{folder}/list.json", "images": "{folder}"}

    def check(data: bytes) -> None:
        found = _prepared({**_FILES, "list.json": data}, source, "list.json")
        if found is not None:
            assert found.counts.inputs >= len(json.loads(data.decode("utf-8", "surrogateescape"))["images"])

    fuzz(kind, mutated_json([tree]), check, 60)


_LISTS: dict[str, tuple[bytes, dict[str, str]]] = {
    "msrvtt": (b"key,vid_key,video_id,sentence\nret0,msr0,video0,a man sings\nret1,msr1,video1,a cat\n", {}),
    "lsmdc": (b"f_00.01-00.02\t1\t2\t3\t4\ta man\nf_00.03-00.04\t1\t2\t3\t4\tSOMEONE goes\n", {}),
}


@pytest.mark.parametrize("kind", _LISTS)
def test_every_clip_of_a_list_is_kept_or_counted(fuzz: Fuzz, kind: str):
    data, _ = _LISTS[kind]
    source = {"kind": kind, "path": "{folder}/list.csv", "videos": "{folder}"}
    clip = media_seeds.clips()[0]
    files = {"video0.mp4": clip, "f_00.01-00.02.avi": media_seeds.clips()[4]}

    def check(data: bytes) -> None:
        read_or_refuse(
            lambda: prepare_files({**files, "list.csv": data}, source, "video"), UserError, "list.csv"
        )

    fuzz(kind, mutated_bytes([data], [b'"', b"\t", b"../", b"/etc/passwd"]), check, 40)


def _tar(members: Sequence[tuple[str, bytes]], form: int) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def _tars() -> list[bytes]:
    plain = [(f"{n}.{kind}", data) for n in range(3) for kind, data in (("png", _PNG), ("txt", b"a caption"))]
    described = [
        (f"{n:09d}.{kind}", data)
        for n in range(3)
        for kind, data in (("png", _PNG), ("json", to_json({"caption": f"caption {n}", "url": "http://x/y"})))
    ]
    long = [(f"{'folder/' * 20}{name}", data) for name, data in plain]
    return [
        _tar(plain, tarfile.USTAR_FORMAT),
        _tar(described, tarfile.GNU_FORMAT),
        _tar(long, tarfile.PAX_FORMAT),
    ]


@pytest.mark.parametrize("truncated", ["error", "count"])
def test_every_sample_of_a_tar_is_kept_or_counted(fuzz: Fuzz, truncated: str):
    source = {"kind": "webdataset", "path": "{folder}/shard.tar", "truncated": truncated}

    def check(data: bytes) -> None:
        _prepared({"shard.tar": data}, source, "shard.tar")

    fuzz("tars", mutated_bytes(_tars(), [b"ustar\x0000", b"./", b"0000000\x00"]), check, 60)


def test_a_damaged_tar_is_indexed_with_counts_or_refused(fuzz: Fuzz, tmp_path):

    number = iter(range(10**9))

    def check(data: bytes) -> None:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        (folder / "shard.tar").write_bytes(data)
        storage = open_storage(folder)
        manifest = read_or_refuse(
            lambda: index_shards(storage, "image", caption_field="caption", bad_limit=1.0, jobs=1),
            (UserError, BadData, BadDataLimit),
            str(folder),
        )
        if manifest is None:
            return
        counts = manifest.counts
        assert counts.read == counts.kept + sum(counts.dropped.values())
        assert counts.kept == manifest.samples

    fuzz("indexed_tars", mutated_bytes(_tars(), [b"ustar\x0000", b"./", b"0000000\x00"]), check, 80)


@pytest.mark.parametrize(("suffix", "seeds"), [(".txt", [b"a caption\nanother\n"]), (".json", None)])
def test_a_damaged_caption_file_costs_its_sample_alone(fuzz: Fuzz, suffix: str, seeds: list[bytes] | None):
    trees: list[Any] = [{"caption": "a caption"}, {"captions": ["one", "two"]}]
    strategy = mutated_bytes(seeds) if seeds else mutated_json(trees)
    control = seeds[0] if seeds else to_json(trees[0])

    def check(data: bytes) -> None:
        files = {"a.png": _PNG, f"a{suffix}": data, "b.png": media_seeds.images()[3], f"b{suffix}": control}
        found = prepare_files(files, {"kind": "folder", "path": "{folder}", "captions": suffix})
        assert found.counts.inputs == 2
        assert "b.png" in [sample.source for sample in found.samples]

    fuzz(f"sidecar{suffix}", strategy, check, 40)


def _rows_of_annotations() -> dict[str, tuple[Any, Callable[[Any], bytes]]]:
    questions = [{"question_id": n, "image_id": n, "question": "what is it?"} for n in range(3)]
    annotations = [
        {
            "question_id": n,
            "answers": [{"answer": "cat"}] * 10,
            "multiple_choice_answer": "cat",
            "answer_type": "other",
        }
        for n in range(3)
    ]
    statements = [
        {"identifier": f"dev-{n}-0-0", "sentence": "there are two dogs", "label": "True"} for n in range(3)
    ]
    return {
        "vqa_questions": ({"questions": questions, "data_subtype": "val2014"}, to_json),
        "vqa_annotations": ({"annotations": annotations}, to_json),
        "nlvr2": (statements, to_json_lines),
    }


@pytest.mark.parametrize("name", _rows_of_annotations())
def test_damaged_annotations_of_an_evaluation_are_refused_by_name(fuzz: Fuzz, name: str, tmp_path):

    storage = open_storage(tmp_path)
    for known, (tree, write) in _rows_of_annotations().items():
        storage.write_bytes(f"{known}.json", write(tree))
    vqa = VQAData(questions="vqa_questions.json", annotations="vqa_annotations.json", images="images")
    nlvr2 = NLVR2Data(statements="nlvr2.json", images="images")

    def check(data: bytes) -> None:
        storage.write_bytes(f"{name}.json", data)
        read: Callable[[], Sequence[Any]] = partial(load_statements, storage, nlvr2)
        if name != "nlvr2":
            read = partial(load_questions, storage, vqa)
        # A damaged identifier may make the other file wrong.
        found = read_or_refuse(read, UserError, f"{name}.json", "vqa_questions.json", "vqa_annotations.json")
        assert found is None or found

    tree, write = _rows_of_annotations()[name]
    fuzz(name, mutated_json([tree], write), check, 100)
