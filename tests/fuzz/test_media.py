"""Images and clips with damaged bytes: each costs itself alone, and what is kept decodes as it claims.

The decoder runs in its own process, as in a preparation: a crash there is an answer (``decode-crashed``), a Python
exception is not.
"""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sharding.candidate import Examined, Examiner
from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.media import decode_image
from sharding.sources import Input
from sharding.sources.fetch import Fetched
from tests.fixtures.fuzz import Fuzz
from tests.fuzz import media_seeds
from tests.fuzz.mutations import mutated_bytes

_CONTROL = media_seeds.images()[0]
_PNG_TOKENS = [b"IHDR", b"IDAT", b"tRNS", b"PLTE", b"iCCP", b"acTL", b"eXIf", b"\x00\x00\x00\x00IEND"]
_BOXES = [
    b"\x00\x00\x00\x08" + box
    for box in (b"ftyp", b"moov", b"elst", b"trak", b"stts", b"moof", b"uuid", b"styp")
]
_CLIP_S = 2.0


def _examiner(modality: str, **block: Any) -> Examiner:
    source = {"kind": "table", "path": "/x/t.csv", "path_column": "p", "caption_column": "c"}
    given = {
        "source": source,
        "modality": modality,
        "filters": [],
        "decode_timeout_s": 10,
        "decode_memory_mb": 1024,
    }
    return Examiner(PrepareConfig.model_validate(given | block))


def _fetched(data: bytes, name: str) -> Fetched:
    return Fetched(Input(address=name, captions=["a caption"]), media=data)


def _outcome(examiner: Examiner, data: bytes, control: bytes) -> Examined | BadData:
    """Of ``data``; ``control`` comes after it and must be kept whatever it was."""
    (_, outcome), (_, kept) = examiner.examine_all([_fetched(data, "mutated"), _fetched(control, "control")])
    assert isinstance(kept, Examined), f"a good file behind it is lost: {kept}"
    assert kept.candidates
    return outcome


def test_a_damaged_image_costs_itself_and_what_is_kept_of_it_decodes(fuzz: Fuzz):
    examiner = _examiner("image", image={"format": "png", "max_pixels": 1_000_000})

    def check(data: bytes) -> None:
        outcome = _outcome(examiner, data, _CONTROL)
        if isinstance(outcome, BadData):
            assert outcome.cause != "decode-timeout", outcome.detail
            return
        (candidate,) = outcome.candidates
        info = candidate.media.info
        with Image.open(io.BytesIO(candidate.media.data)) as stored:
            assert (stored.width, stored.height, stored.mode) == (info.width, info.height, "RGB")
            pixels = np.asarray(stored)
        # Training decodes what is stored, evaluations what users have: both see the same.
        np.testing.assert_array_equal(decode_image(candidate.media.data), pixels)
        np.testing.assert_array_equal(decode_image(data), pixels)

    fuzz("images", mutated_bytes(media_seeds.images(), _PNG_TOKENS), check, 120)


def test_a_damaged_image_in_an_evaluation_is_bad_data(fuzz: Fuzz):
    def check(data: bytes) -> None:
        try:
            pixels = decode_image(data, 1_000_000)
        except BadData:
            return
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3

    fuzz("decoded_images", mutated_bytes(media_seeds.images(), _PNG_TOKENS), check, 250)


def test_a_damaged_clip_costs_itself_and_what_is_kept_of_it_is_no_longer_than_a_clip_may_be(fuzz: Fuzz):
    examiner = _examiner("video", video={"clip_s": _CLIP_S, "max_pixels": 1_000_000})

    def check(data: bytes) -> None:
        outcome = _outcome(examiner, data, media_seeds.clips()[0])
        if isinstance(outcome, BadData):
            assert outcome.cause != "decode-timeout", outcome.detail
            return
        for candidate in outcome.candidates:
            info = candidate.media.info
            with av.open(io.BytesIO(candidate.media.data)) as container:
                times = [float(frame.time) for frame in container.decode(video=0)]
            assert len(times) == info.frames
            assert times == sorted(set(times))
            assert info.duration <= _CLIP_S + 1e-3
            assert times[-1] - times[0] < _CLIP_S

    fuzz("clips", mutated_bytes(media_seeds.clips(), _BOXES), check, 60)


def test_a_damaged_clip_gives_stills_or_a_cause(fuzz: Fuzz):
    frames = {"every_s": 0.3, "max": 4}
    examiner = _examiner("image", image={"format": "png", "frames": frames, "max_pixels": 1_000_000})

    def check(data: bytes) -> None:
        outcome = _outcome(examiner, data, media_seeds.clips()[0])
        if isinstance(outcome, BadData):
            assert outcome.cause != "decode-timeout", outcome.detail
            return
        assert 1 <= len(outcome.candidates) + len(outcome.faults) <= 4
        for candidate in outcome.candidates:
            assert decode_image(candidate.media.data).shape[:2] == (
                candidate.media.info.height,
                candidate.media.info.width,
            )

    fuzz("stills", mutated_bytes(media_seeds.clips(), _BOXES), check, 40)


@pytest.mark.parametrize("number", range(len(media_seeds.images())))
def test_the_images_that_are_damaged_are_kept_undamaged(number: int):
    outcome = _outcome(_examiner("image"), media_seeds.images()[number], _CONTROL)
    assert isinstance(outcome, Examined)


@pytest.mark.parametrize("number", range(len(media_seeds.clips())))
def test_the_clips_that_are_damaged_are_kept_undamaged(number: int):
    outcome = _outcome(_examiner("video"), media_seeds.clips()[number], media_seeds.clips()[0])
    assert isinstance(outcome, Examined)
    assert outcome.candidates[0].media.info.frames == 12
