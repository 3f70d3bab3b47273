"""Promises of datasets of clips: a still image is none, whatever its suffix, and leaving it out is no bad data."""

import io
import tarfile

import av
import pytest
from PIL import Image

from sharding.errors import BadData
from sharding.filters.config import chosen
from sharding.foreign import index_shards
from sharding.media.config import ImageConfig, VideoConfig
from sharding.media.single_frame import refuse_still
from sharding.media.video import probe_video
from sharding.media.worker import MediaDecoder
from sharding.storage import open_storage
from tests.fixtures.corpora import CORPUS, corpus_rows
from tests.sharding.listings import listed, source

CLIPS = MediaDecoder(None, VideoConfig().model_dump(mode="json"))
FRAMES = MediaDecoder(
    ImageConfig.model_validate({"frames": {"every_s": 1, "max": 2}}).model_dump(mode="json"), None
)


def picture(kind, frames=1, **options):
    sink = io.BytesIO()
    images = [Image.new("RGB", (48, 32), (80 * number, 60, 200)) for number in range(frames)]
    many = {"save_all": True, "append_images": images[1:], "duration": 100} if frames > 1 else {}
    images[0].save(sink, kind, **many, **options)
    return sink.getvalue()


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("decoder", [CLIPS, FRAMES])
@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG", "JPEG", "BMP", "TIFF", "AVIF", "ICO"])
def test_an_image_of_one_frame_is_no_clip(kind, decoder):
    data = picture(kind)
    for call in (decoder.header, lambda data: list(decoder.parts(data))):
        with pytest.raises(BadData) as caught:
            call(data)
        assert caught.value.cause == "still-image"
        assert kind in caught.value.detail
    assert chosen("still-image")


def count_frames(clip):
    with av.open(io.BytesIO(clip)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("kind", ["WEBP", "GIF"])
def test_animations_are_clips(kind):
    data = picture(kind, frames=3)
    ((facts, stored),) = CLIPS.parts(data)
    assert "cause" not in facts
    assert count_frames(stored) == 3
    assert CLIPS.header(data)["width"] == 48
    assert len(list(FRAMES.parts(data))) > 0


def test_other_animations_are_no_stills_either():
    with pytest.raises(BadData) as caught:
        CLIPS.header(picture("PNG", frames=3))
    assert caught.value.cause == "decode-failed"
    assert CLIPS.header(picture("AVIF", frames=3))["width"] == 48  # the container is mp4's


def test_damaged_heads_are_bad_data():
    for data in (
        b"GIF89a",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffacTL",
        b"BM",
        b"\0\0\0\x20ftyp",
    ):
        with pytest.raises(BadData):
            CLIPS.header(data)


def test_a_still_in_another_programs_tar_is_left_out_and_counts_in_no_limit(tmp_path):
    clip = (CORPUS / corpus_rows("clips.jsonl", limit=1)[0]["path"]).read_bytes()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        still = picture("WEBP")
        members = {"a.webp": clip, "b.webp": still, "c.gif": picture("GIF"), "d.mp4": clip, "d.webp": still}
        for name, data in members.items():
            add(tar, name, data)
            if name != "d.mp4":
                add(tar, f"{name[0]}.txt", b"a caption")
    manifest = index_shards(open_storage(tmp_path), "video", bad_limit=0)
    assert (manifest.counts.kept, manifest.counts.dropped) == (2, {"still-image": 2})
    inputs, _ = listed(source(tmp_path, kind="webdataset", modality="video"))
    assert [item.address for item in inputs] == ["0.tar/a.webp", "0.tar/b.webp", "0.tar/c.gif", "0.tar/d.mp4"]


def test_the_canvas_of_an_animation_is_judged_before_it_is_allocated():
    huge = (
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00"
        + b",\x00\x00\x00\x00\x01\x00\x01\x00\x80"
        + bytes(6)
        + b"\x02\x02D\x01\x00;"
    )
    with pytest.raises(BadData) as caught:
        refuse_still(huge, 1_000_000)
    assert caught.value.cause == "too-many-pixels"


def test_an_animated_webp_that_is_cut_is_broken_and_no_still():
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in (0, 90, 200)]
    sink = io.BytesIO()
    frames[0].save(sink, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    whole = sink.getvalue()
    refuse_still(whole)
    second = whole.index(b"ANMF", whole.index(b"ANMF") + 4)
    refuse_still(whole[:second])
    with pytest.raises(BadData, match="decode-failed"):
        probe_video(whole[: second - 4])
