"""Where the time of preparing one JPEG goes, what the decoding process and profiles cost, and how close resizing is.

::

    python -m benchmarks.media [--size 288] [--resize 256] [--rounds 5]

CPU milliseconds for an image (the least of the rounds), on one picture with detail at every scale, as photographs
have it. "bare" is decoding by libjpeg-turbo, bicubic resizing by torch, and encoding by libjpeg-turbo, and nothing
else; "to planes" resizes to what JPEG stores, as preparing does. PSNR is against a floating-point Lanczos reference
over the decoded pixels.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import psutil
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn.functional import interpolate

from sharding.candidate import Examiner
from sharding.config import PrepareConfig
from sharding.media.config import ImageConfig
from sharding.media.images import decode_image, encode_image, probe_image, shrunk
from sharding.media.resizing import resized_pixels, resized_planes
from sharding.sources import Input
from sharding.sources.fetch import Fetched

_IMAGES = 100


def picture(width: int, height: int) -> Image.Image:
    """RGB noise whose amplitude falls with the frequency."""
    spectrum = np.fft.rfft2(np.random.Generator(np.random.Philox(key=0)).normal(size=(3, height, width)))
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    texture = np.fft.irfft2(spectrum / radius, s=(height, width)).transpose(1, 2, 0)
    return Image.fromarray(np.clip(128 + 40 * texture / texture.std(), 0, 255).astype(np.uint8))


def lanczos(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: antialiased Lanczos weights of each target pixel."""
    scale = source / target
    x = (np.arange(source) + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def area(source: int, target: int) -> np.ndarray:
    """float64 [target, source]: OpenCV's INTER_AREA."""
    edges = np.arange(target + 1)[:, None] * source / target
    left, right = np.maximum(edges[:-1], np.arange(source)), np.minimum(edges[1:], np.arange(source) + 1)
    return np.maximum(0, right - left) * target / source


def applied(kernel: Callable[[int, int], np.ndarray], image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float64 [H, W, 3]: an image resized to ``size`` (width, height) by the weights that ``kernel`` gives."""
    rows = np.tensordot(kernel(image.shape[0], size[1]), image, 1)
    return np.tensordot(kernel(image.shape[1], size[0]), rows, (1, 1)).swapaxes(0, 1)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB, of 8-bit values."""
    return float(10 * np.log10(255**2 / np.mean((one - other) ** 2)))


def cpu_ms(call: Callable[[], object], rounds: int) -> float:
    """CPU milliseconds of one call."""
    call()
    least = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(_IMAGES):
            call()
        least = min(least, time.process_time() - started)
    return least / _IMAGES * 1000


def resized_by_torch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] to (width, height)."""
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small = interpolate(batch, size=size[::-1], mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def guarded_ms(data: bytes, config: ImageConfig, rounds: int) -> tuple[float, float]:
    """CPU milliseconds an image of the task's process and of the decoding process."""
    source = {"kind": "table", "path": "/x/t.csv", "path_column": "p", "caption_column": "c"}
    examiner = Examiner(
        PrepareConfig.model_validate({"source": source, "modality": "image", "image": config.model_dump()})
    )
    fetched = Fetched(Input(address="a.jpg", captions=["a caption"]), media=data)
    examiner.examine(fetched)
    child = psutil.Process(examiner.decoding_process)
    least = (float("inf"), float("inf"))
    for _ in range(rounds):
        started, before = time.process_time(), sum(child.cpu_times()[:2])
        for _, examined in examiner.examine_all(fetched for _ in range(4 * _IMAGES)):
            assert not isinstance(examined, Exception)
        spent = (time.process_time() - started, sum(child.cpu_times()[:2]) - before)
        least = min(least, spent, key=sum)
    return least[0] / 4 / _IMAGES * 1000, least[1] / 4 / _IMAGES * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=288, help="shorter side of the source, pixels")
    parser.add_argument("--resize", type=int, default=256, help="shorter side of what is stored")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = (options.size * 3 // 2, options.size)
    photo = picture(*size)
    sink, profiled = io.BytesIO(), io.BytesIO()
    photo.save(sink, "JPEG", quality=90)
    photo.save(profiled, "JPEG", quality=90, icc_profile=wide_gamut())
    data = sink.getvalue()
    config = ImageConfig(resize=options.resize, format="jpg")
    target = shrunk(*size, options.resize)
    decoded = simplejpeg.decode_jpeg(data)
    small, by_pil = resized_by_torch(decoded, target), Image.fromarray(decoded)
    planes = resized_planes(decoded, target, config.chroma)

    def bare() -> bytes:
        pixels = resized_by_torch(simplejpeg.decode_jpeg(data), target)
        return simplejpeg.encode_jpeg(pixels, config.quality, "RGB", config.chroma)

    def measure(call: Callable[[], object]) -> float:
        return cpu_ms(call, options.rounds)

    task, child = guarded_ms(data, config, options.rounds)
    rows = {
        "decode": measure(lambda: simplejpeg.decode_jpeg(data)),
        "resize, by torch": measure(lambda: resized_by_torch(decoded, target)),
        "resize": measure(lambda: resized_pixels(decoded, target)),
        "resize, to planes": measure(lambda: resized_planes(decoded, target, config.chroma)),
        "resize, by PIL": measure(lambda: by_pil.resize(target, Image.Resampling.BICUBIC)),
        "encode": measure(lambda: simplejpeg.encode_jpeg(small, config.quality, "RGB", config.chroma)),
        "encode planes": measure(lambda: simplejpeg.encode_jpeg_yuv_planes(*planes, quality=config.quality)),
        "bare": measure(bare),
        "encode_image": measure(lambda: encode_image(data, config)),
        "the same, with a profile": measure(lambda: encode_image(profiled.getvalue(), config)),
        "probe_image": measure(lambda: probe_image(data)),
        "examiner: decoding process": child,
        "examiner: task": task,
    }
    table = Table(title=f"{size[0]}x{size[1]} -> {target[0]}x{target[1]}, JPEG", title_justify="left")
    for column in ("", "ms", "of bare"):
        table.add_column(column, justify="left" if not column else "right")
    for name, milliseconds in rows.items():
        table.add_row(name, f"{milliseconds:.3f}", f"{milliseconds / rows['bare']:.0%}")
    console = Console()
    console.print(table)
    reference = np.clip(applied(lanczos, decode_image(data).astype(np.float64), target), 0, 255)
    lossless = ImageConfig(resize=options.resize, format="png")
    ours = psnr(decode_image(encode_image(data, lossless).data).astype(np.float64), reference)
    other = psnr(np.rint(applied(area, decoded.astype(np.float64), target)), reference)
    pil = np.asarray(by_pil.resize(target, Image.Resampling.BICUBIC), dtype=np.float64)
    console.print(
        f"PSNR against the reference: {ours:.1f} dB; PIL: {psnr(pil, reference):.1f} dB; "
        f"torch: {psnr(small, reference):.1f} dB; INTER_AREA: {other:.1f} dB"
    )
    as_jpeg = {
        "planes": encode_image(data, config).data,
        "torch's pixels": simplejpeg.encode_jpeg(small, config.quality, "RGB", config.chroma),
    }
    for name, encoded in as_jpeg.items():
        stored = simplejpeg.decode_jpeg(encoded)
        console.print(f"as JPEG of {name}: {psnr(stored, reference):.2f} dB in {len(encoded):,} bytes")


def wide_gamut() -> bytes:
    """A display profile whose primaries are those of Display P3 (gamma 2.2)."""
    xyz = {
        b"rXYZ": (0.5151, 0.2412, -0.0011),
        b"gXYZ": (0.2920, 0.6922, 0.0419),
        b"bXYZ": (0.1571, 0.0666, 0.7841),
    }
    tags = {b"wtpt": (0.9642, 1.0, 0.8249), **xyz}
    values = {
        name: b"XYZ \0\0\0\0" + b"".join(round(v * 65536).to_bytes(4, "big", signed=True) for v in value)
        for name, value in tags.items()
    }
    curve = b"curv\0\0\0\0\0\0\0\x01" + round(2.2 * 256).to_bytes(2, "big") + bytes(2)
    values |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    place, directory = 128 + 4 + 12 * len(values), b""
    for name, value in values.items():
        directory += name + place.to_bytes(4, "big") + len(value).to_bytes(4, "big")
        place += len(value)
    head = place.to_bytes(4, "big") + b"lcms\x02\x40\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    white = values[b"wtpt"][8:]
    head = head + white + bytes(128 - len(head) - len(white))
    return head + len(values).to_bytes(4, "big") + directory + b"".join(values.values())


if __name__ == "__main__":
    main()
