"""Promises of COCO's captions and Karpathy's splits."""

import json

import pytest

from sharding.errors import UnreadableObject, UserError
from sharding.sources import Input
from sharding.sources import caption_files as module
from sharding.sources.addresses import BelowBase
from sharding.storage import open_storage
from tests.sharding.listings import configured, fetched, listed, source

COCO = {
    "info": {"year": 2017},
    "licenses": [],
    "images": [
        {"id": 9, "file_name": "000000000009.jpg", "coco_url": "http://h/9.jpg", "height": 480, "width": 640},
        {"id": 5, "file_name": "000000000005.jpg", "coco_url": "http://h/5.jpg"},
        {"id": 7, "file_name": "000000000007.jpg"},
        {"id": 5, "file_name": "twice.jpg"},
        {"id": 8, "file_name": None},
        "no image",
    ],
    "annotations": [
        {"id": 1, "image_id": 5, "caption": "a dog"},
        {"id": 2, "image_id": 9, "caption": "a cat"},
        {"id": 3, "image_id": 5, "caption": "the dog\n"},
        {"id": 4, "image_id": 5, "caption": 7},
        {"id": 5, "image_id": 1234, "caption": "of no image"},
        {"id": 6, "caption": "of no image either"},
    ],
}

KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_1.jpg",
            "split": "test",
            "sentences": [{"raw": "A man.", "tokens": ["a", "man"]}, {"raw": "A person."}, {"tokens": []}],
        },
        {"filename": "36979.jpg", "split": "train", "sentences": [{"raw": "x"}]},
        {"filename": "no-sentences.jpg", "split": "train"},
        {"filepath": "train2014", "filename": "b.jpg", "split": "restval", "sentences": [{"raw": "y"}]},
        {"split": "val", "sentences": [{"raw": "no name"}]},
    ],
}


def _coco(tmp_path, value=COCO, **options):
    path = tmp_path / "captions train.json"
    path.write_text(json.dumps(value))
    return source(path, kind="coco", **({"images": str(tmp_path / "train2017")} | options))


def test_coco_images_come_once_each_with_all_their_captions(tmp_path):
    opened = _coco(tmp_path)
    inputs, _ = listed(opened)
    assert opened.base == (tmp_path / "train2017").as_uri()
    assert inputs[:3] == [
        Input.at(BelowBase("000000000009.jpg"), captions=["a cat"]),
        Input.at(BelowBase("000000000005.jpg"), captions=["a dog", "the dog\n"], not_text=1),
        Input.at(BelowBase("000000000007.jpg"), captions=[]),
    ]
    # Nothing is passed over: what does not fit together is listed as bad.
    assert [item.problem for item in inputs[3:]] == [
        "bad-row",
        "bad-address",
        "bad-row",
        "bad-row",
        "bad-row",
    ]
    assert inputs[-1].address.endswith("image 1234")


@pytest.mark.parametrize("name", ["/etc/hostname", "file:///etc/hostname", "http://h/a.jpg", " "])
def test_a_caption_file_names_no_file_outside_its_images(tmp_path, name):
    coco = {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]}
    assert listed(_coco(tmp_path, coco))[0][0].problem == "bad-address"
    (tmp_path / "d.json").write_text(
        json.dumps({"images": [{"filename": name, "split": "test", "sentences": [{"raw": "x"}]}]})
    )
    (item,) = listed(source(tmp_path / "d.json", kind="karpathy", images=str(tmp_path)))[0]
    assert item.problem == "bad-address"


def test_coco_images_may_be_fetched_from_their_urls(tmp_path):
    inputs, _ = listed(_coco(tmp_path, images=None, url_field="coco_url"))
    assert [item.address for item in inputs[:2]] == ["http://h/9.jpg", "http://h/5.jpg"]
    assert inputs[2].problem == "bad-address"


def test_karpathy_splits_are_chosen_by_name(tmp_path):
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps(KARPATHY))
    options = {"kind": "karpathy", "images": str(tmp_path)}
    assert listed(source(path, **options, split="test"))[0] == [
        Input.at(BelowBase("val2014/COCO_val2014_1.jpg"), captions=["A man.", "A person."], not_text=1)
    ]
    both, _ = listed(source(path, **options, split=["train", "restval"]))
    assert [(item.address, item.problem) for item in both] == [
        ("36979.jpg", None),
        ("dataset_coco.json:images[2]", "bad-row"),
        ("train2014/b.jpg", None),
    ]
    everything, _ = listed(source(path, **options))
    assert len(everything) == 5
    assert everything[4].problem == "bad-address"
    with pytest.raises(UserError, match="no split 'dev'; it has restval, test, train, val"):
        listed(source(path, **options, split="dev"))


def test_a_karpathy_image_keeps_all_its_sentences(tmp_path):
    """COCO's test split has a few images with more than five."""
    image = {"filepath": "val2014", "filename": "a.jpg", "imgid": 0, "split": "test", "sentids": [0]}
    sentences = [{"raw": f"Sentence {n} .", "tokens": [], "imgid": 0, "sentid": n} for n in range(7)]
    (tmp_path / "d.json").write_text(json.dumps({"images": [{**image, "sentences": sentences}]}))
    (item,) = listed(source(tmp_path / "d.json", kind="karpathy", images=str(tmp_path), split="test"))[0]
    assert item.captions == [f"Sentence {n} ." for n in range(7)]


def test_digests_follow_captions_and_names(tmp_path):
    changed = json.loads(json.dumps(COCO))
    changed["annotations"][0]["caption"] = "another dog"
    renamed = json.loads(json.dumps(COCO))
    renamed["images"][0]["file_name"] = "other.jpg"
    digests = {listed(_coco(tmp_path, value))[1] for value in (COCO, changed, renamed, COCO)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"images": []}', "has no list 'annotations'"),
        ('{"images": [], "annotations": []}', "empty corpus"),
    ],
)
def test_files_that_are_not_coco_are_user_errors(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message):
        listed(source(tmp_path / "c.json", kind="coco", images=str(tmp_path)))


def test_a_file_too_large_to_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_JSON", 10)
    with pytest.raises(UserError, match="make it a table of JSON lines"):
        listed(_coco(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        listed(source(tmp_path / "gone.json", kind="coco", images=str(tmp_path)))


@pytest.mark.parametrize(
    "options",
    [{}, {"images": "/x", "url_field": "coco_url"}, {"images": "/x", "split": "train"}],
)
def test_a_coco_block_that_is_not_whole_is_refused(options):
    with pytest.raises(ValueError, match="source"):
        configured(kind="coco", path="/x.json", **options)


def test_images_are_read_below_their_folder(tmp_path):
    (tmp_path / "img" / "val2014").mkdir(parents=True)
    (tmp_path / "img" / "val2014" / "COCO_val2014_1.jpg").write_bytes(b"pixels")
    (tmp_path / "d.json").write_text(json.dumps(KARPATHY))
    config = configured(
        kind="karpathy", path=str(tmp_path / "d.json"), images=str(tmp_path / "img"), split="test"
    )
    (got,) = fetched(config, open_storage(tmp_path / "elsewhere"))
    assert got.media == b"pixels"
    assert got.input.captions == ["A man.", "A person."]


def test_whatever_an_entry_holds_it_costs_that_entry(tmp_path):
    value = {
        "images": [
            {"id": 1, "file_name": "a.jpg"},
            {"id": True, "file_name": "b.jpg"},
            {"id": [], "file_name": "c.jpg"},
        ],
        "annotations": [
            {"image_id": 1, "caption": "good"},
            {"image_id": 1, "caption": "LATIN"},
            {"image_id": 1, "caption": "half \ud83d"},
            {"image_id": "\ud83d", "caption": "of no image"},
            {"image_id": "HUGE", "caption": "x"},
            {"image_id": {"a": 1}, "caption": "x"},
        ],
    }
    text = json.dumps(value).encode().replace(b'"HUGE"', b"9" * 9000).replace(b"LATIN", b"caf\xe9")
    (tmp_path / "c.json").write_bytes(text)
    inputs, _ = listed(source(tmp_path / "c.json", kind="coco", images=str(tmp_path)))
    assert [(item.address, item.problem, item.captions, item.not_text) for item in inputs] == [
        ("a.jpg", None, ["good"], 2),
        ("c.json:images[1]", "bad-row", [], 0),
        ("c.json:images[2]", "bad-row", [], 0),
        ("c.json:annotations[4]", "bad-row", [], 0),
        ("c.json:annotations[5]", "bad-row", [], 0),
        ("c.json:image \\ud83d", "bad-row", [], 0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"images": [\n{]', r"not JSON \(line 2\): "),
        ('{"images": []}'.encode("utf-16") + b"x", "not JSON: it is not UTF-8"),
        (b"", "is not JSON"),
    ],
)
def test_a_file_that_is_no_json_is_named_with_the_line(tmp_path, text, message):
    (tmp_path / "c.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"c\.json is .*{message}|c\.json {message}"):
        listed(source(tmp_path / "c.json", kind="coco", images=str(tmp_path)))


def test_a_file_that_the_storage_does_not_give_is_not_called_broken(tmp_path, monkeypatch):
    opened = _coco(tmp_path)

    def refused(storage, *arguments):
        raise UnreadableObject("it is archived", "archived")

    monkeypatch.setattr(type(open_storage(tmp_path)), "read_bytes", refused)
    with pytest.raises(UnreadableObject, match=r"^it is archived$"):
        listed(opened)
