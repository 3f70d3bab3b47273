"""Promises of fingerprints: equal pixels have equal digests, similar pictures near hashes, others distant ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sharding.fingerprint import Fingerprinter, fingerprint
from sharding.media import encode_image
from sharding.media.config import ImageConfig, VideoConfig
from sharding.media.transcode import transcode_video

CORPUS = Path(__file__).parents[2] / "pipeline/demo/corpus"


def _pictures(count: int) -> list[Image.Image]:
    """Emoji on white, as RGB."""
    pictures = []
    for path in sorted((CORPUS / "images").glob("1f4*.webp"))[:count]:
        drawn = Image.open(path).convert("RGBA")
        pictures.append(Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB"))
    assert len(pictures) == count
    return pictures


def _distance(left: Image.Image, right: Image.Image) -> int:
    return (fingerprint([left]).phash ^ fingerprint([right]).phash).bit_count()


def _again(picture: Image.Image, kind: str, quality: int) -> Image.Image:
    sink = io.BytesIO()
    picture.save(sink, kind, quality=quality)
    return Image.open(sink).convert("RGB")


def _png(picture: Image.Image, **options: int) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "PNG", **options)
    return sink.getvalue()


def test_a_recompressed_or_resized_picture_stays_near_and_another_is_far():
    pictures = _pictures(60)
    for picture in pictures:
        assert _distance(picture, _again(picture, "JPEG", 50)) <= 8
        assert _distance(picture, _again(picture, "WEBP", 50)) <= 8
        half = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)
        assert _distance(picture, half) <= 4
    pairs = [_distance(left, right) for left, right in zip(pictures, pictures[30:], strict=False)]
    assert np.median(pairs) > 20


def test_flat_pictures_have_one_hash_whatever_their_colour():
    assert {fingerprint([Image.new("RGB", (40, 30), (c, c, 9))]).phash for c in (0, 90, 255)} == {0}


def test_the_pixel_digest_tells_every_pixel_size_and_frame_apart():
    picture = np.zeros((6, 8, 3), np.uint8)
    changed = picture.copy()
    changed[5, 7, 2] = 1
    turned = picture.reshape(8, 6, 3)
    digests = [
        fingerprint(frames).pixels
        for frames in ([picture], [changed], [turned], [picture, picture], [picture, changed])
    ]
    assert len(set(digests)) == 5
    assert all(len(digest) == 32 for digest in digests)
    assert fingerprint([Image.fromarray(picture)]).pixels == digests[0]


def test_other_file_formats_of_the_same_pixels_are_the_same_picture():
    picture = _pictures(1)[0]
    files = []
    for kind in ("PNG", "BMP", "TIFF"):
        sink = io.BytesIO()
        picture.save(sink, kind)
        files.append(sink.getvalue())
    for kind in ("jpg", "webp", "png"):
        stored = [encode_image(data, ImageConfig(format=kind, quality=80)) for data in files]
        assert {one.fingerprint for one in stored} == {fingerprint([picture], stored[0].data)}
        other = encode_image(_png(_pictures(2)[1]), ImageConfig(format=kind, quality=80))
        assert other.fingerprint != stored[0].fingerprint


def test_files_that_are_stored_unchanged_are_known_by_their_pixels():
    picture = _pictures(1)[0]
    files = [_png(picture, compress_level=level) for level in (1, 9)]
    keep = ImageConfig(format="keep")
    stored = [encode_image(data, keep) for data in files]
    assert [one.data for one in stored] == files
    assert len(set(files)) == 2
    assert {one.fingerprint for one in stored} == {fingerprint([picture])}


def test_a_clip_is_known_again_in_another_compression_and_told_from_its_neighbours():
    clips = sorted((CORPUS / "clips").glob("1f9d1-*.mp4"))[:6]
    fine = [transcode_video(path.read_bytes(), VideoConfig(resize=64, crf=18)) for path in clips]
    coarse = [transcode_video(one.data, VideoConfig(resize=48, crf=30)) for one in fine]
    hashes = [[one.fingerprint.phash for one in ones if one.fingerprint] for ones in (fine, coarse)]
    distances = np.array([[(left ^ right).bit_count() for right in hashes[1]] for left in hashes[0]])
    assert (np.diagonal(distances) <= 8).all(), distances
    assert (distances.argmin(axis=1) == np.arange(6)).all(), distances
    assert len({one.fingerprint.pixels for one in fine if one.fingerprint}) == 6


def test_a_clip_that_is_stored_unchanged_has_a_fingerprint_too():
    stored = transcode_video(next((CORPUS / "clips").glob("*.mp4")).read_bytes(), VideoConfig(resize=48))
    again = transcode_video(stored.data, VideoConfig())
    assert again.data == stored.data
    assert again.fingerprint is not None
    assert again.fingerprint == transcode_video(stored.data, VideoConfig()).fingerprint


def test_a_fingerprint_of_no_frame_is_refused():
    with pytest.raises(ValueError, match="needs a frame"):
        Fingerprinter().result()
