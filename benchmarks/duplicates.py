"""Finding duplicates over a whole corpus: seconds and memory of the exchange's own steps, and what hashes tell.

    python -m benchmarks.duplicates                           # a million samples, two processes
    python -m benchmarks.duplicates --samples 4000000 --distance 2 4 8

The steps of ``sharding/exchange.py`` run as they do in a preparation, in processes in place of Ray's tasks, over
synthetic staged indexes in a temporary folder. Of the hashes a tenth are equal to an earlier one, a tenth lie within
4 bits of one, and the others are random; "skewed" has them around few centres, as a corpus of product photos on white.
``MiB`` is the most that one task of the step held above what its process held before (Linux).

The second table is about the hash itself, on the bundled emoji: bits in which the hashes of a picture and its changed
copy differ, and of two different emoji.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.console import Console
from rich.table import Table

from sharding.exchange import ROWS, Exchange, dropped_rows, steps
from sharding.filters.config import CorpusFilter, DuplicatesFilter, NearDuplicatesFilter
from sharding.fingerprint import fingerprint
from sharding.index import INDEX_SCHEMA, write_index
from sharding.storage import Storage, open_storage

PER_SHARD = 10_000
CORPUS = Path(__file__).parents[1] / "pipeline/demo/corpus/images"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--distance", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=ROWS, help="keys that one task compares at once")
    options = parser.parse_args()
    console = Console(width=120)
    _corpus_table(options, console)
    _hash_table(console)


def _corpus_table(options: argparse.Namespace, console: Console) -> None:
    table = Table(
        title=f"{options.samples:,} samples, {options.processes} processes, {options.rows:,} keys a task at most",
        title_justify="left",
    )
    for column in ("hashes", "filter", "step", "tasks", "s", "MiB", "bytes/sample", "dropped"):
        table.add_column(column, justify="left" if column in ("hashes", "filter", "step") else "right")
    filters: list[CorpusFilter] = [DuplicatesFilter(kind="duplicates")]
    filters += [NearDuplicatesFilter(kind="near_duplicates", distance=bits) for bits in options.distance]
    for kind in ("random", "skewed"):
        with tempfile.TemporaryDirectory(prefix="glscl-duplicates-") as folder:
            storage = open_storage(folder)
            tasks = _stage(storage, options.samples, kind)
            for block in filters:
                name = block.kind + (f" {block.distance}" if isinstance(block, NearDuplicatesFilter) else "")
                exchange = Exchange(
                    storage, f"work-{name}", (block,), tasks, options.samples, index_path, options.rows
                )
                measured = [
                    _measure(exchange, step, count, options.processes) for step, count in steps(exchange)
                ]
                dropped = sum(len(dropped_rows(exchange, task)) for task in range(tasks))
                for one in measured:
                    if one.tasks:
                        table.add_row(kind, name, *one.cells(options.samples), "")
                total = sum(one.seconds for one in measured)
                most = max(one.held for one in measured)
                table.add_row(
                    kind, name, "[bold]all", "", f"[bold]{total:.1f}", f"[bold]{most / 2**20:.0f}",
                    f"[bold]{most / options.samples:.0f}", f"{dropped:,}", end_section=True,
                )  # fmt: skip
    console.print(table)


@dataclass(frozen=True)
class Measured:
    """A step: its tasks, seconds from the first to the last, and bytes held at most by one process."""

    name: str
    tasks: int
    seconds: float
    held: int

    def cells(self, samples: int) -> tuple[str, ...]:
        return (
            self.name, f"{self.tasks}", f"{self.seconds:.1f}", f"{self.held / 2**20:.0f}", f"{self.held / samples:.0f}"
        )  # fmt: skip


def _measure(
    exchange: Exchange, step: Callable[[Exchange, int], None], count: int, processes: int
) -> Measured:
    held = 0
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(pool.map(_warm, range(4 * processes)))  # started and imported before the clock
        started = time.perf_counter()
        for peak in pool.map(_run, [exchange] * count, [step] * count, range(count)):
            held = max(held, peak)
        seconds = time.perf_counter() - started
    return Measured(step.__name__, count, seconds, held)


def _warm(_: int) -> None:
    time.sleep(0.2)


def _run(exchange: Exchange, step: Callable[[Exchange, int], None], number: int) -> int:
    """The most bytes this process held during the task above what it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    step(exchange, number)
    return _memory("VmHWM") - before


def _memory(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(kind))) * 1024


def index_path(task: int) -> str:
    return f"staged/{task:06d}.parquet"


def _stage(storage: Storage, samples: int, kind: str) -> int:
    """Staged indexes of ``samples`` samples; returns how many."""
    hashes = _hashes(samples, kind)
    tasks = -(-samples // PER_SHARD)
    for task in range(tasks):
        part = hashes[task * PER_SHARD : (task + 1) * PER_SHARD]
        rows = len(part)
        raw = np.random.default_rng(task).bytes(32 * rows)
        digests = [raw[32 * row : 32 * row + 32].hex() for row in range(rows)]
        columns: dict[str, object] = {
            name: [0] * rows for name in INDEX_SCHEMA.names if INDEX_SCHEMA.field(name).type != pa.string()
        }
        columns |= {
            "key": [f"{task:06d}-{row:06d}" for row in range(rows)],
            "extension": ["jpg"] * rows,
            "sha256": digests,
            "pixels": [digest[:32] for digest in digests],
            "source": [f"pictures/{task:06d}/{row:06d}.jpg" for row in range(rows)],
            "phash": part,
        }
        table = pa.table(
            {name: pa.array(columns[name], INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names}
        )
        storage.write_bytes(index_path(task), write_index(table))
    return tasks


def _hashes(samples: int, kind: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    if kind == "skewed":
        centres = generator.integers(0, 2**64, max(1, samples // 1000), np.uint64)
        return _flipped(generator, centres[generator.integers(0, len(centres), samples)], 10)
    hashes = generator.integers(0, 2**64, samples, np.uint64)
    for share, flips in ((0.1, 0), (0.1, 4)):
        later = np.flatnonzero(generator.random(samples) < share)[1:]
        earlier = (generator.random(len(later)) * later).astype(np.int64)
        hashes[later] = _flipped(generator, hashes[earlier], flips)
    return hashes


def _flipped(generator: np.random.Generator, hashes: np.ndarray, flips: int) -> np.ndarray:
    for _ in range(flips):
        hashes = hashes ^ (np.uint64(1) << generator.integers(0, 64, len(hashes), np.uint64))
    return hashes


def _hash_table(console: Console, count: int = 600) -> None:
    table = Table(title=f"perceptual hash, {count} emoji: differing bits of 64", title_justify="left")
    for column in ("pair", "mean", "within 2", "within 4", "within 8", "within 10"):
        table.add_column(column, justify="left" if column == "pair" else "right")
    paths = sorted(CORPUS.glob("*.webp"))
    paths = [paths[number] for number in np.random.default_rng(0).permutation(len(paths))[:count]]
    pictures = [_on_white(path) for path in paths]
    hashes = np.array([fingerprint([picture]).phash for picture in pictures], np.uint64)
    found: dict[str, list[int]] = {}
    for picture, own in zip(pictures, hashes.tolist(), strict=True):
        for name, changed in _changes(picture):
            found.setdefault(name, []).append((own ^ fingerprint([changed]).phash).bit_count())
    upper = np.triu_indices(count, 1)
    found["two different emoji"] = np.bitwise_count(hashes[:, None] ^ hashes)[upper].tolist()
    for name, bits in found.items():
        shares = [f"{np.mean(np.array(bits) <= limit):.2%}" for limit in (2, 4, 8, 10)]
        table.add_row(name, f"{np.mean(bits):.1f}", *shares)
    console.print(table)


def _on_white(path: Path) -> Image.Image:
    drawn = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def _changes(picture: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    width, height = picture.size
    yield "half the size", picture.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    yield "1.5 x the size", picture.resize((width * 3 // 2, height * 3 // 2), Image.Resampling.BICUBIC)
    for kind, quality in (("JPEG", 50), ("WEBP", 30)):
        sink = io.BytesIO()
        picture.save(sink, kind, quality=quality)
        yield f"{kind}, quality {quality}", Image.open(sink).convert("RGB")
    yield "15 % brighter", picture.point(lambda value: min(255, round(value * 1.15)))
    for share in (0.02, 0.05):
        x, y = round(width * share), round(height * share)
        yield f"{share:.0%} cut off each side", picture.crop((x, y, width - x, height - y))


if __name__ == "__main__":
    main()
