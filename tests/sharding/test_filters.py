"""Promises of the filters: each drops what it names, under its own cause."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sharding.candidate import Examiner
from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.filters import CHOSEN
from sharding.filters.duplicates import digest_words, later_copies
from sharding.sources import Input
from sharding.sources.fetch import Fetched


def _config(**changes) -> PrepareConfig:
    values = {
        "source": {"kind": "table", "path": "/x/t.csv", "path_column": "p", "caption_column": "c"},
        "modality": "image",
    }
    return PrepareConfig.model_validate(values | changes)


def _png(width: int = 40, height: int = 30) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    return sink.getvalue()


def _examine(filters: dict, captions=("a caption",), media: bytes | None = None, not_text: int = 0):
    item = Input(address="a.png", captions=list(captions), not_text=not_text)
    fetched = Fetched(item, media=_png() if media is None else media)
    (candidate,) = Examiner(_config(filters=filters)).examine(fetched).candidates
    return candidate


def _cause(*arguments, **options) -> str:
    with pytest.raises(BadData) as caught:
        _examine(*arguments, **options)
    return caught.value.cause


@pytest.mark.parametrize(
    ("filters", "captions", "cause"),
    [
        ({}, [], "caption-empty"),
        ({}, ["", " \n\t"], "caption-empty"),
        ({}, ["\u200b\u0000"], "caption-empty"),
        ({"min_characters": 5}, ["four"], "caption-too-short"),
        ({"max_characters": 3}, ["four"], "caption-too-long"),
        ({"min_words": 3}, ["two words"], "caption-too-short"),
        ({"max_words": 1}, ["two words"], "caption-too-long"),
    ],
)
def test_captions_are_dropped_by_cause(filters, captions, cause):
    assert _cause(filters, captions) == cause


def test_captions_that_are_no_text_are_told_apart_from_empty_ones():
    assert _cause({}, [], not_text=2) == "caption-not-text"


def test_a_sample_lives_on_by_its_good_captions_and_the_others_are_counted():
    candidate = _examine(
        {"min_words": 2}, ["one", "  two\n words ", "two words", "", "three more words"], not_text=1
    )
    assert candidate.captions == ["two words", "three more words"]
    assert candidate.captions_dropped == {"caption-empty": 1, "caption-not-text": 1, "caption-too-short": 1}


@pytest.mark.parametrize(
    ("filters", "size", "cause"),
    [({"min_size": 31}, (40, 30), "too-small"), ({"max_aspect": 1.3}, (40, 30), "aspect")],
)
def test_media_are_dropped_by_cause(filters, size, cause):
    assert _cause(filters, media=_png(*size)) == cause
    assert cause in CHOSEN


def test_what_is_exactly_at_the_limit_stays():
    assert _examine({"min_size": 30, "max_aspect": 4 / 3, "min_characters": 9, "max_words": 2}).captions


def test_broken_and_empty_files_are_bad_data_rather_than_filtered():
    for media in (b"", b"not an image", _png()[:60]):
        cause = _cause({}, media=media)
        assert cause == "decode-failed"
        assert cause not in CHOSEN


def test_of_equal_digests_the_first_in_input_order_stays():
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in "abcabba"]
    assert later_copies(digest_words(digests)).tolist() == [False, False, False, True, True, True, True]
    assert later_copies(np.empty((0, 2), np.uint64)).tolist() == []


def test_later_copies_agrees_with_a_set_on_many_digests():
    numbers = np.random.default_rng(0).integers(0, 300, 1000)
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    seen: set[str] = set()
    expected = [digest in seen or seen.add(digest) is not None for digest in digests]
    assert later_copies(digest_words(digests)).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": {"format": "jpg", "alpha": "keep"}}, "alpha"),
        ({"video": {"resize": 64}}, "video does not belong"),
        ({"modality": "video", "filters": {"min_frames": 10}, "video": {"max_frames": 5}}, "longer clips"),
        ({"filters": {"min_sizes": 3}}, "min_sizes"),
        (
            {"source": {"kind": "table", "path": "/x.csv", "caption_column": "c"}},
            "either path_column or url_column",
        ),
        ({"source": {"kind": "ftp", "path": "/x"}}, "kind"),
        ({"bad_limit": 1.5}, "bad_limit"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        _config(**changes)


def test_the_configuration_digest_covers_what_changes_the_dataset_and_nothing_else():
    plain = _config().digest
    assert _config(fetch={"threads": 2}, bad_limit=0.5, task_retries=0).digest == plain
    assert _config(image={"quality": 85}).digest == plain
    assert _config(image={"quality": 84}).digest != plain
    assert _config(samples_per_shard=7).digest != plain
    assert _config(filters={"duplicates": "keep"}).digest != plain
