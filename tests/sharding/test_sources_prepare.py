"""Promises of whole preparations from each kind of source that is not a folder: real Ray, real stores."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from sharding.errors import BadDataLimit
from sharding.index import read_index
from sharding.prepare import PrepareConfig, prepare
from sharding.storage import open_storage
from tests.fixtures.web import Answer, redirect


def _jpg(number):
    pixels = np.random.default_rng(number).integers(0, 255, (40, 44, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def _config(source, **changes):
    values = {"source": source, "modality": "image", "samples_per_shard": 4, "fetch": {"allow_private": True}}
    return PrepareConfig.model_validate(values | changes)


def _captions(storage, prepared):
    """source -> captions of all samples that were stored."""
    found = {}
    for shard in prepared.manifest.shards:
        dataset = storage.at(prepared.path)
        sources = dict(
            zip(
                *[
                    read_index(dataset.read_bytes(shard.index)).column(name).to_pylist()
                    for name in ("key", "source")
                ],
                strict=True,
            )
        )
        with tarfile.open(fileobj=io.BytesIO(dataset.read_bytes(shard.tar))) as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                if extension == "json":
                    found[sources[key]] = json.load(tar.extractfile(member))["captions"]
    return found


def test_urls_end_as_samples_and_opting_out_is_no_bad_data(tmp_path, web, ray_session):
    rows = []
    for number in range(10):
        web.answers[f"/{number}.jpg"] = Answer(_jpg(number))
        rows.append({"url": f"{web.url}/{number}.jpg?token=s3cret", "caption": f"picture {number}"})
        web.answers[f"/{number}.jpg?token=s3cret"] = web.answers[f"/{number}.jpg"]
    for number in range(4, 9):
        web.answers[f"/{number}.jpg?token=s3cret"] = Answer(headers=[("X-Robots-Tag", "noai")])
    web.answers["/9.jpg?token=s3cret"] = redirect("/9.jpg")
    table = tmp_path / "urls.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "table", "path": str(table), "url_column": "url", "caption_column": "caption"}
    storage = open_storage(tmp_path / "out")
    # Half of them opt out, which the bad_limit of a tenth does not mind.
    prepared = prepare("urls", _config(source), storage, in_flight=2)
    assert prepared.manifest.counts.dropped == {"opted-out": 5}
    assert _captions(storage, prepared) == {
        f"{web.url}/{number}.jpg": [f"picture {number}"] for number in (0, 1, 2, 3, 9)
    }
    # Nothing that stays holds the secret of an address.
    assert not [file.path for file in storage.list() if b"s3cret" in storage.read_bytes(file.path)]
    assert not list(storage.at(prepared.path).list("work"))
    with pytest.raises(BadDataLimit, match=r"private-address \d+\).*fetch\.allow_private: true allows it"):
        prepare("urls", _config(source, fetch={"opt_out": []}), storage, in_flight=2)


@pytest.mark.server
def test_tars_on_s3_are_resharded_with_every_caption(tmp_path, s3_server, ray_session):
    storage = s3_server.storage("corpus")
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for suffix in ("jpg", "txt", "json"):  # all pictures first: a key's members are far apart
            for number in range(6):
                data = {
                    "jpg": _jpg(number),
                    "txt": f"picture {number}\nseen again {number}\n".encode(),
                    "json": json.dumps({"caption": f"third {number}"}).encode(),
                }[suffix]
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    storage.write_bytes("raw/000.tar", sink.getvalue())
    config = _config({"kind": "webdataset", "path": f"{storage.url}/raw/{{000..000}}.tar"})
    prepared = prepare("tars", config, storage, in_flight=2)
    assert _captions(storage, prepared) == {
        f"000.tar/{number:03d}.jpg": [f"third {number}", f"picture {number}", f"seen again {number}"]
        for number in range(6)
    }


def test_rows_of_a_saved_dataset_end_as_samples(tmp_path, ray_session):
    rows = {
        "image": [{"bytes": _jpg(n), "path": None} for n in range(6)],
        "text": [f"c {n}" for n in range(6)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = {
        "kind": "huggingface",
        "path": str(tmp_path / "saved"),
        "media_column": "image",
        "caption_column": "text",
    }
    storage = open_storage(tmp_path / "out")
    prepared = prepare("rows", _config(source), storage, in_flight=2)
    assert _captions(storage, prepared) == {f"train/{n}": [f"c {n}"] for n in range(6)}
    assert prepared.manifest.source["url"] == (tmp_path / "saved").as_uri()
