"""Pictures and clips of the demo corpus: small stills with alpha, H.264 clips on white, who looks alike."""

import io
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from PIL import Image

_SIGNATURE_SIDE = 32
# Mean absolute difference of two 32 px signatures, 0..255. Below it are pairs such as "farmer" and
# "man farmer", which are one drawing; above it come faces that differ in the mouth.
_LOOKS_THE_SAME = 2.0
_STANDS_STILL = 0.5
_LONGEST_SIDE = 4096


def open_picture(data: bytes) -> Image.Image:
    """An image whose header promises a sane size (nothing is decoded yet). ValueError when it does not."""
    image = Image.open(io.BytesIO(data))
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(
            f"a picture of {image.width}x{image.height} pixels: no side may be over {_LONGEST_SIDE}"
        )
    return image


def shrink(data: bytes, side: int, quality: int) -> bytes:
    """A WebP with alpha whose longer side is `side` pixels, from an image of any format."""
    with open_picture(data) as source:
        # Premultiplied: otherwise the colour under transparent pixels bleeds into the edges of the cut-out.
        image = source.convert("RGBA").convert("RGBa")
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    out = io.BytesIO()
    small.save(out, "WEBP", quality=quality, alpha_quality=quality, method=6)
    return out.getvalue()


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, its alpha composited on white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def signature(image: Image.Image) -> np.ndarray:
    """float32 [32*32*3], 0..255: the picture on white, small enough to compare with thousands of others."""
    small = on_white(image).resize((_SIGNATURE_SIDE, _SIGNATURE_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)


def lookalikes(signatures: Mapping[str, np.ndarray]) -> set[str]:
    """The names whose signature is (nearly) that of another name."""
    names = sorted(signatures)
    matrix = np.stack([signatures[name] for name in names])
    found: set[str] = set()
    for row, name in enumerate(names[:-1]):
        distance = np.abs(matrix[row + 1 :] - matrix[row]).mean(axis=1)
        same = np.flatnonzero(distance < _LOOKS_THE_SAME)
        if same.size:
            found.add(name)
            found.update(names[row + 1 + int(other)] for other in same)
    return found


def animation_frames(data: bytes, side: int, fps: int) -> list[np.ndarray]:
    """The frames of an animated WebP at a fixed rate, on white: uint8 [side, side, 3]. One frame: a still."""
    frames: list[np.ndarray] = []
    ends: list[float] = []
    now = 0.0
    with open_picture(data) as animation:
        for index in range(getattr(animation, "n_frames", 1)):
            animation.seek(index)
            frame = on_white(animation).resize((side, side), Image.Resampling.LANCZOS)
            frames.append(np.asarray(frame))
            now += (animation.info.get("duration") or 1000 / 24) / 1000
            ends.append(now)
    if len(frames) == 1:
        return frames
    times = (np.arange(max(2, round(now * fps))) + 0.5) / fps
    shown = np.minimum(np.searchsorted(ends, times), len(frames) - 1)
    return [frames[int(index)] for index in shown]


def moves(frames: list[np.ndarray]) -> bool:
    """Whether some frame clearly differs from the first: over 1,200 of the "animated" files are stills."""
    first = frames[0].astype(np.float32)
    return any(float(np.abs(frame - first).mean()) > _STANDS_STILL for frame in frames[1:])


def encode_clip(frames: list[np.ndarray], fps: int, crf: int) -> bytes:
    """An MP4 (H.264, yuv420p, a key frame each second); same bytes for the same frames and libraries."""
    import av

    height, width = frames[0].shape[:2]
    out = io.BytesIO()
    # bitexact: without it the file carries the muxer's version and the time of writing.
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "slow", "g": str(fps), "threads": "1"}
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()
