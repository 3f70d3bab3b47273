"""Reading shards: samples/s of the training's own loader, of ``webdataset`` on the same shards, and of a bare loop.

    python -m benchmarks.reading                                  # everything; the corpus goes to a temporary folder
    python -m benchmarks.reading --folder shards --only images    # keeps the corpus, and takes it if it is there

The corpus is prepared once by ``sharding.prepare``: JPEGs of 288 to 400 pixels (``benchmarks/pictures.py``) and the
demo's clips. All contestants of a table are started, then take turns for a few seconds, round after round; the
figures are medians over the rounds, and the ratios are what to quote. Where other work shares the machine, the CPU
that a sample took (all processes of a contestant, the consumer too) says more than the rate does. Two processes
decode, and everything lies in the page cache.

- *glscl*: ``stage_loader`` as the training has it: samples in their order, verified, decoded, augmented, captions
  tokenised, masks drawn, batches in the consumer's hands; *pixels only*: without captions and masks.
- *webdataset*: ``WebLoader(WebDataset(...))``, shards shuffled, then samples; no captions, no masks. ``pil`` and
  ``torchrgb8`` as its users write it, with torchvision's transforms; *our decoder*: with our decoder and our
  resizing in place of its own.
- *bare*: bytes in memory, the same decoder and resizing, no reading, no batches, nothing handed over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
import webdataset
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.pictures import EMOJI, pictures
from cluster.config import ClusterConfig
from cluster.session import session
from model import GLSCLConfig
from pipeline.training.augmentation import Augmentation
from pipeline.training.batches import Sample, stage_loader
from pipeline.training.config import AugmentationBlock, StageBlock, TrainBlock
from pipeline.training.transport import SharedPixels, stack_pixels
from sharding.config import ImageConfig, PrepareConfig, VideoConfig
from sharding.decoding import decode_image
from sharding.manifest import load_manifest
from sharding.order import batch_slots, epoch_order, steps_per_epoch
from sharding.prepare import prepare
from sharding.reader import ShardReader
from sharding.sources.config import FolderSource, TableSource
from sharding.storage import open_storage

SIZE = 224
BATCH = 64
CLIP_BATCH = 16
FRAMES = 4
PROCESSES = 2
CROP = 0.5
SEED = 1
_IN_FLIGHT = 2 * PROCESSES * 4 + 2  # batches that may lie ready when a contestant's turn begins


def main() -> None:
    """Prepare the corpus, measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="for the corpus; kept")
    parser.add_argument("--images", type=int, default=4000, help="of the corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="a contestant's turn")
    parser.add_argument(
        "--only", nargs="*", choices=list(TABLES), default=list(TABLES), help="tables to measure"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning, module="webdataset")
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = arguments.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="glscl-reading-"))
        )
        readers = open_corpus(folder.absolute(), arguments.images)
        for name in arguments.only:
            title, contestants = TABLES[name](readers)
            print_table(title, take_turns(contestants, arguments.rounds, arguments.seconds))


# ---------------------------------------------------------------- the corpus


def open_corpus(folder: Path, images: int) -> dict[str, ShardReader]:
    """Readers of the datasets ``images`` and ``clips`` below ``folder``, prepared there if they are not there yet."""
    known = folder / "datasets.json"
    storage = open_storage(folder)
    if not known.exists():
        raw = folder / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for number, (data, caption) in enumerate(pictures(images, (288, 400))):
            (raw / f"{number:06d}.jpg").write_bytes(data)
            (raw / f"{number:06d}.txt").write_text(caption)
        configs = {
            "images": PrepareConfig(
                source=FolderSource(kind="folder", path=str(raw)),
                modality="image",
                image=ImageConfig(format="jpg", quality=90),
                samples_per_shard=500,
            ),
            "clips": PrepareConfig(
                source=TableSource(
                    kind="table",
                    path=str(EMOJI.parent / "clips.jsonl"),
                    path_column="path",
                    caption_column="captions",
                ),
                modality="video",
                video=VideoConfig(),
                samples_per_shard=50,
            ),
        }
        with session(ClusterConfig(num_cpus=2, object_store_mb=256), workers=1):
            paths = {
                name: prepare(name, config, storage, in_flight=2).path for name, config in configs.items()
            }
        shutil.rmtree(raw)
        known.write_text(json.dumps(paths))
    paths = json.loads(known.read_text())
    return {
        name: ShardReader(storage.at(path), load_manifest(storage.at(path))) for name, path in paths.items()
    }


def media_of(reader: ShardReader) -> list[bytes]:
    """All of a dataset's media, in memory."""
    shards = reader.manifest.shards
    return [
        reader.read(shard, row).media for shard in range(len(shards)) for row in range(shards[shard].samples)
    ]


def tars_of(reader: ShardReader) -> list[str]:
    """The paths of a dataset's shards."""
    return [str(reader.dataset.local_path(shard.tar)) for shard in reader.manifest.shards]


# ---------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Turn:
    """Samples a second, and seconds of CPU that a sample took in all processes of the contestant together."""

    rate: float
    cpu: float


class Contestant(ABC):
    """Something that gives samples until it is closed; ``processes`` are those it started."""

    processes: Sequence[psutil.Process] = ()

    def turn(self, seconds: float) -> Turn:
        """Go on for so long, then wait until its processes are at rest."""
        self.prepare()
        cpu, started = self._cpu(), time.perf_counter()
        samples = self.take(seconds)
        turn = Turn(samples / (time.perf_counter() - started), (self._cpu() - cpu) / samples)
        while True:
            before = self._cpu()
            time.sleep(0.2)
            if self._cpu() - before < 0.02:
                return turn

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self.processes]
        return time.process_time() + sum(each.user + each.system for each in times)

    def prepare(self) -> None:  # noqa: B027  (most have nothing to do)
        """Throw away what was made before the turn."""

    @abstractmethod
    def take(self, seconds: float) -> int:
        """Go on for so long; number of samples."""

    def close(self) -> None:  # noqa: B027  (some have none)
        """End its processes."""


class Loader(Contestant):
    """Batches of a loader with processes of its own."""

    def __init__(self, batches: Iterator[torch.Tensor]) -> None:
        before = set(psutil.Process().children(recursive=True))
        self._batches = batches
        touch(next(batches))
        started = set(psutil.Process().children(recursive=True)) - before
        self.processes = [process for process in started if process.cpu_times().user > 0.5]

    def prepare(self) -> None:
        for _ in range(_IN_FLIGHT):
            touch(next(self._batches))

    def take(self, seconds: float) -> int:
        samples, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            samples += touch(next(self._batches))
        return samples

    def close(self) -> None:
        del self._batches


def touch(pixels: torch.Tensor) -> int:
    """Read from each page of the pixels, as whoever trains on them will; their number."""
    pixels[..., ::4, 0].sum()
    return len(pixels)


class Bare(Contestant):
    """Two processes, each with half of the media in memory."""

    def __init__(self, media: Sequence[bytes], work: Callable[[bytes], Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipes, self._processes = [], []
        for number in range(PROCESSES):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_bare, args=(theirs, media[number::PROCESSES], work), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self.processes = [psutil.Process(process.pid) for process in self._processes]

    def take(self, seconds: float) -> int:
        for pipe in self._pipes:
            pipe.send(seconds)
        return sum(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


def _bare(pipe: Any, media: Sequence[bytes], work: Callable[[bytes], Any]) -> None:
    torch.set_num_threads(1)
    items = itertools.cycle(media)
    while (seconds := pipe.recv()) is not None:
        samples, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            work(next(items))
            samples += 1
        pipe.send(samples)


class InProcess(Contestant):
    """Samples of an endless iterator in this process."""

    def __init__(self, samples: Iterator[Any]) -> None:
        self._samples = samples

    def take(self, seconds: float) -> int:
        samples, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(64):
                next(self._samples)
            samples += 64
        return samples


def take_turns(
    contestants: dict[str, Callable[[], Contestant]], rounds: int, seconds: float
) -> dict[str, list[Turn]]:
    """Start all, let them take turns (a first round is not counted), end all. The turns of each."""
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        running = {}
        for name, start in contestants.items():
            running[name] = start()
            stack.callback(running[name].close)
        for round_ in range(rounds + 1):
            for name, contestant in running.items():
                turn = contestant.turn(seconds)
                if round_:
                    turns[name].append(turn)
    return turns


# ---------------------------------------------------------------- what they do with a sample


def glscl_batches(
    reader: ShardReader, augmentation: AugmentationBlock, batch: int, *, pixels_only: bool = False
) -> Iterator[torch.Tensor]:
    """Pixels of the training's batches; ``pixels_only``: of batches that hold nothing else."""
    stage = StageBlock(
        name="reading",
        steps=100_000,
        mixture={"data": 1.0},
        resolution=SIZE,
        frames=FRAMES,
        augmentation=augmentation,
    )
    train = TrainBlock.model_validate(
        {
            "workers": 1,
            "global_batch": batch,
            "lanes": 4,
            "loader_processes": PROCESSES,
            "learning_rate": 1e-4,
            "stages": [stage],
        }
    )
    config = GLSCLConfig.preset("base", image_size=SIZE)
    loader = stage_loader(stage, train, {"data": reader}, config, tokenizer="builtin", seed=SEED)
    if pixels_only:
        loader = DataLoader(
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            num_workers=PROCESSES,
            collate_fn=StackPixels(SharedPixels(PROCESSES, 6, batch * 3 * SIZE**2)),
            multiprocessing_context="forkserver",
            prefetch_factor=4,
            worker_init_fn=loader.worker_init_fn,
        )
    for made in loader:
        yield made if pixels_only else made.pixel_values


class StackPixels:
    """A collator that leaves captions and masks out, as webdataset's pipeline here does."""

    def __init__(self, memory: SharedPixels) -> None:
        self._memory = memory

    def __call__(self, samples: Sequence[Sample]) -> torch.Tensor:
        return stack_pixels([sample.pixels for sample in samples], self._memory)


def webdataset_batches(
    reader: ShardReader, decoder: Any, transform: Callable[[Any], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Pixels of webdataset's batches, epoch after epoch."""
    dataset = (
        webdataset.WebDataset(tars_of(reader), shardshuffle=100, seed=SEED)
        .shuffle(1000)
        .decode(decoder)
        .to_tuple("jpg", "txt")
        .map_tuple(transform, _same)
        .batched(BATCH, partial=False)
    )
    loader = webdataset.WebLoader(
        dataset.repeat(),
        batch_size=None,
        num_workers=PROCESSES,
        prefetch_factor=4,
        multiprocessing_context="forkserver",
        worker_init_fn=_one_thread,
    )
    for pixels, _ in loader:
        yield pixels


def _same(value: Any) -> Any:
    return value


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


class Decode:
    """Our decoder and our resizing, on bytes in memory; also a decoder for webdataset."""

    def __init__(self, augmentation: AugmentationBlock) -> None:
        self._augmentation = Augmentation(augmentation, SIZE)
        self._draws = np.random.Generator(np.random.Philox(key=SEED))

    def __call__(self, data: bytes) -> torch.Tensor:
        return self._augmentation(decode_image(data, self._augmentation.detail)[None], self._draws)[0]


class Handler:
    """``Decode`` as webdataset wants its decoders."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode

    def __call__(self, key: str, data: bytes) -> torch.Tensor | None:
        return self._decode(data) if key.endswith(".jpg") else None


class DecodeClip:
    """A clip as one writes it with PyAV: decoded from its beginning, four frames kept."""

    def __init__(self) -> None:
        self._augmentation = Augmentation(AugmentationBlock(), SIZE)
        self._draws = np.random.Generator(np.random.Philox(key=SEED))

    def __call__(self, data: bytes) -> torch.Tensor:
        with av.open(BytesIO(data), mode="r", format="mp4") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            places = (np.arange(FRAMES) + self._draws.random(FRAMES)) / FRAMES
            wanted = np.minimum((places * stream.frames).astype(int), stream.frames - 1).tolist()
            kept = []
            for number, frame in enumerate(container.decode(stream)):
                kept += [frame.to_ndarray(format="rgb24")] * wanted.count(number)
                if len(kept) == FRAMES:
                    break
        return self._augmentation(np.stack(kept), self._draws)


def torchvision_transform(augmentation: AugmentationBlock) -> v2.Transform:
    """The same work as its users write it; pixels stay uint8 as ours do."""
    if augmentation.crop < 1.0:
        crop: list[v2.Transform] = [v2.RandomResizedCrop(SIZE, scale=(augmentation.crop, 1.0))]
    else:
        crop = [v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)]
    return v2.Compose([*crop, v2.ToImage()])


def rows_in_order(reader: ShardReader) -> Iterator[Any]:
    """All samples, shard by shard, epoch after epoch."""
    while True:
        for shard, record in enumerate(reader.manifest.shards):
            for row in range(record.samples):
                yield reader.read(shard, row)


def rows_shuffled(reader: ShardReader) -> Iterator[Any]:
    """All samples in the order of the training."""
    counts = reader.shard_samples
    for epoch in itertools.count():
        order = epoch_order(reader.manifest.digest, SEED, epoch, counts, 4, 16_384)
        for step in range(steps_per_epoch(order.samples, 4, BATCH)):
            for shard, row in batch_slots(order, step, BATCH).tolist():
                if row >= 0:
                    yield reader.read(shard, row)


def tar_walk(reader: ShardReader, shuffled: bool) -> Iterator[Any]:
    """webdataset's samples, not decoded: bytes of all members of a key."""
    while True:
        dataset = webdataset.WebDataset(tars_of(reader), shardshuffle=100 if shuffled else False, seed=SEED)
        yield from dataset.shuffle(1000) if shuffled else dataset


# ---------------------------------------------------------------- tables

Contest = tuple[str, dict[str, Callable[[], Contestant]]]


def images_table(readers: dict[str, ShardReader]) -> Contest:
    """Shorter side to 224, centre crop."""
    reader, plain = readers["images"], AugmentationBlock()
    return f"images, resized to {SIZE} and cropped, {PROCESSES} processes", {
        "glscl": lambda: Loader(glscl_batches(reader, plain, BATCH)),
        "glscl, pixels only": lambda: Loader(glscl_batches(reader, plain, BATCH, pixels_only=True)),
        "webdataset, pil": lambda: Loader(webdataset_batches(reader, "pil", torchvision_transform(plain))),
        "webdataset, torchrgb8": lambda: Loader(
            webdataset_batches(reader, "torchrgb8", torchvision_transform(plain))
        ),
        "webdataset, our decoder": lambda: Loader(webdataset_batches(reader, Handler(Decode(plain)), _same)),
        "bare": lambda: Bare(media_of(reader), Decode(plain)),
    }


def crops_table(readers: dict[str, ShardReader]) -> Contest:
    """Random resized crops."""
    reader, crop = readers["images"], AugmentationBlock(crop=CROP)
    return f"images, random resized crop to {SIZE} (scale {CROP} to 1), {PROCESSES} processes", {
        "glscl": lambda: Loader(glscl_batches(reader, crop, BATCH)),
        "glscl, pixels only": lambda: Loader(glscl_batches(reader, crop, BATCH, pixels_only=True)),
        "webdataset, pil": lambda: Loader(webdataset_batches(reader, "pil", torchvision_transform(crop))),
        "webdataset, our decoder": lambda: Loader(webdataset_batches(reader, Handler(Decode(crop)), _same)),
        "bare": lambda: Bare(media_of(reader), Decode(crop)),
    }


def clips_table(readers: dict[str, ShardReader]) -> Contest:
    """Four frames of a clip."""
    reader = readers["clips"]
    return f"clips, {FRAMES} frames resized to {SIZE}, {PROCESSES} processes", {
        "glscl": lambda: Loader(glscl_batches(reader, AugmentationBlock(), CLIP_BATCH)),
        "bare": lambda: Bare(media_of(reader), DecodeClip()),
    }


def raw_table(readers: dict[str, ShardReader]) -> Contest:
    """Nothing decoded, shard by shard."""
    reader = readers["images"]
    return "images, not decoded, in order, one process", {
        "glscl": lambda: InProcess(rows_in_order(reader)),
        "webdataset": lambda: InProcess(tar_walk(reader, shuffled=False)),
    }


def raw_shuffled_table(readers: dict[str, ShardReader]) -> Contest:
    """Nothing decoded, shuffled by each in its way."""
    reader = readers["images"]
    return "images, not decoded, shuffled, one process", {
        "glscl": lambda: InProcess(rows_shuffled(reader)),
        "webdataset": lambda: InProcess(tar_walk(reader, shuffled=True)),
    }


TABLES: dict[str, Callable[[dict[str, ShardReader]], Contest]] = {
    "images": images_table,
    "crops": crops_table,
    "clips": clips_table,
    "raw": raw_table,
    "raw-shuffled": raw_shuffled_table,
}


def print_table(title: str, turns: dict[str, list[Turn]]) -> None:
    """Medians over the rounds; ratios are medians of the rounds' ratios."""
    table = Table(title=title)
    columns = (
        "contestant",
        "samples/s",
        "lowest - highest",
        "glscl / this",
        "CPU us a sample",
        "this / glscl",
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for name, own in turns.items():
        rates, both = [turn.rate for turn in own], list(zip(turns["glscl"], own, strict=True))
        table.add_row(
            name,
            f"{statistics.median(rates):.0f}",
            f"{min(rates):.0f} - {max(rates):.0f}",
            f"{statistics.median(ours.rate / this.rate for ours, this in both):.2f}",
            f"{1e6 * statistics.median(turn.cpu for turn in own):.0f}",
            f"{statistics.median(this.cpu / ours.cpu for ours, this in both):.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
