"""Preparing JPEG shards from urls: images/s of ``sharding.prepare``, of img2dataset, and of a bare loop.

    python -m benchmarks.preparing --rounds 3                    # 5,000 JPEGs of 288 pixels, stored at 256
    python -m benchmarks.preparing --images 1000 --peer-venv /tmp/img2dataset    # keeps the peer's environment

All get the same JPEGs (``benchmarks/pictures.py``), two processes on the same two cores, and store JPEGs of 256
pixels (shorter side) at quality 95 and 4:2:0, img2dataset's default. Round after round they take turns.

- *glscl*: ``sharding.prepare`` of a table of urls, in a new Ray each round, which is started before the clock; what
  its workers load is in the time.
- *img2dataset*: its command line, in a virtual environment that this script makes (which needs pip's package index).
- *bare*: two processes that read files and decode, resize and encode them with the fastest there is for each
  (libjpeg-turbo, torch's resizing of uint8); nothing fetched, checked or written.

Both jobs fetch from one static server on loopback (a process of its own, asyncio, bodies in memory); the CPU it takes
is printed beside the job's. *whole* is the job from its call to its end; *steady* leaves the start out: images
between the first and the last round of shards done, over the time (and, of ours, the CPU) between them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import interpolate

from benchmarks.pictures import pictures
from cluster.config import ClusterConfig
from cluster.session import session
from sharding.config import ImageConfig, PrepareConfig
from sharding.prepare import Progress, prepare
from sharding.sources.config import FetchConfig, TableSource
from sharding.storage import open_storage

PEER = "img2dataset==1.47.0"
STORED = 256
SOURCE = 288
QUALITY = 95
PROCESSES = 2


@dataclass(frozen=True)
class Run:
    """Images a second of the whole job and without its start; seconds of CPU an image, of the job, without its start
    (None: not known) and of the server.
    """

    whole: float
    steady: float
    cpu: float
    steady_cpu: float | None
    server: float | None


def main() -> None:
    """Make the corpus and the peer's environment, measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--shard", type=int, default=1000, help="samples a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-venv", type=Path, help="folder of the peer's virtual environment; kept")
    arguments = parser.parse_args()
    runs: dict[str, list[Run]] = {"glscl": [], "img2dataset": [], "bare": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glscl-preparing-")))
        peer = (arguments.peer_venv or folder / "peer").absolute()
        make_peer(peer)
        files = write_corpus(folder / "raw", arguments.images)
        server = stack.enter_context(serving(files))
        table = write_table(folder / "urls.parquet", files, server.port)
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name; its workers would stand back
        for number in range(arguments.rounds):
            out = folder / f"round-{number}"
            # A new one each time: workers that are kept would have their modules and decoding processes already.
            with session(ClusterConfig(num_cpus=PROCESSES, object_store_mb=256), workers=PROCESSES):
                runs["glscl"].append(prepare_ours(table, out / "glscl", arguments.shard, server))
            runs["img2dataset"].append(prepare_peer(peer, table, out / "peer", arguments.shard, server))
            runs["bare"].append(bare(files))
            shutil.rmtree(out)
        print_table(arguments.images, runs)


# ---------------------------------------------------------------- what all get


def write_corpus(folder: Path, count: int) -> list[Path]:
    """The JPEGs as files."""
    folder.mkdir()
    paths = []
    for number, (data, _) in enumerate(pictures(count, (SOURCE, SOURCE))):
        paths.append(folder / f"{number:06d}.jpg")
        paths[-1].write_bytes(data)
    return paths


def write_table(path: Path, files: list[Path], port: int) -> Path:
    """A Parquet table of urls and captions, as both jobs take it."""
    urls = [f"http://127.0.0.1:{port}/{file.name}" for file in files]
    captions = [f"picture {number} of the benchmark" for number in range(len(files))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


@dataclass(frozen=True)
class Server:
    """A running static server."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of CPU it has taken so far."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextmanager
def serving(files: list[Path]) -> Iterator[Server]:
    """A static server of these files by their names, on loopback, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(files, theirs), daemon=True)
    process.start()
    try:
        yield Server(ours.recv(), psutil.Process(process.pid))
    finally:
        process.terminate()
        process.join()


def _serve(files: list[Path], announce: Connection) -> None:
    bodies = {f"/{file.name}".encode(): file.read_bytes() for file in files}
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Static(bodies), sock=listener)
        announce.send(listener.getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class _Static(asyncio.Protocol):
    """HTTP/1.1 GET of bodies in memory, connections kept while the client wants them."""

    def __init__(self, bodies: dict[bytes, bytes]) -> None:
        self._bodies, self._received = bodies, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            body = self._bodies.get(head.split(b" ", 2)[1])
            status = b"404 Not Found" if body is None else b"200 OK"
            body = body or b""
            closes = b"connection: close" in head.lower()
            self._transport.write(
                b"HTTP/1.1 %b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\nConnection: %b\r\n\r\n%b"
                % (status, len(body), b"close" if closes else b"keep-alive", body)
            )
            if closes:
                self._transport.close()


def job_cpu(but: Server) -> float:
    """CPU seconds of this process and all below it, ended ones too, without the server's."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        if process.pid != but.process.pid:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:  # ended meanwhile: it is in its parent's count
                continue
            total += times.user + times.system + times.children_user + times.children_system
    return total


# ---------------------------------------------------------------- contestants


def prepare_ours(table: Path, out: Path, shard: int, server: Server) -> Run:
    """``sharding.prepare``; Ray is there."""
    config = PrepareConfig(
        source=TableSource(kind="table", path=str(table), url_column="url", caption_column="caption"),
        modality="image",
        image=ImageConfig(resize=STORED, format="jpg", quality=QUALITY, subsampling=420),
        fetch=FetchConfig(threads=16, allow_private=True),
        samples_per_shard=shard,
    )
    marks: list[tuple[float, int]] = []
    cpu_marks: list[tuple[float, int]] = []

    def mark(read: int) -> None:
        marks.append((time.perf_counter(), read))
        cpu_marks.append((job_cpu(server), read))

    def progress(state: Progress) -> None:
        if state.phase == "encode":
            mark(state.counts.read)

    cpu, served, started = job_cpu(server), server.cpu(), time.perf_counter()
    dataset = prepare("images", config, open_storage(out), in_flight=PROCESSES, progress=progress)
    seconds = time.perf_counter() - started
    kept, read = dataset.manifest.counts.kept, dataset.manifest.counts.read
    assert kept == read, dataset.manifest.counts
    mark(read)  # the exchange of duplicates and the last shard committed
    cpu, served = job_cpu(server) - cpu, server.cpu() - served
    return Run(kept / seconds, steady(marks), cpu / kept, 1 / steady(cpu_marks), served / kept)


def make_peer(folder: Path) -> None:
    """A virtual environment with img2dataset, if it is not there."""
    if not (folder / "bin" / "img2dataset").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", PEER], check=True)


def prepare_peer(peer: Path, table: Path, out: Path, shard: int, server: Server) -> Run:
    """img2dataset's command."""
    out.parent.mkdir(exist_ok=True)
    command = [
        str(peer / "bin" / "img2dataset"),
        *("--url_list", str(table)),
        *("--input_format", "parquet"),
        *("--url_col", "url"),
        *("--caption_col", "caption"),
        *("--output_format", "webdataset"),
        *("--output_folder", str(out)),
        *("--processes_count", str(PROCESSES)),
        *("--thread_count", "16"),
        *("--image_size", str(STORED)),
        *("--resize_mode", "keep_ratio"),
        *("--encode_quality", str(QUALITY)),
        *("--number_sample_per_shard", str(shard)),
    ]
    cpu, served, started = job_cpu(server), server.cpu(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    records = [json.loads(path.read_text()) for path in sorted(out.glob("*_stats.json"))]
    images = sum(record["successes"] for record in records)
    assert images == sum(record["count"] for record in records), records
    marks = sorted((record["end_time"], record["successes"]) for record in records)
    done = 0
    totals = [(end, done := done + successes) for end, successes in marks]
    cpu, served = job_cpu(server) - cpu, server.cpu() - served
    return Run(images / seconds, steady(totals), cpu / images, None, served / images)


def steady(marks: list[tuple[float, int]]) -> float:
    """Images a second (of time or CPU) between the first round of shards done (one a process) and the last; nan if
    there are too few.
    """
    first, last = marks[min(PROCESSES, len(marks)) - 1], marks[-1]
    return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else float("nan")


def bare(files: list[Path]) -> Run:
    """Two processes of decode, resize, encode; only the slower one's time without its start counts."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES) as pool:
        took = pool.map(_bare, [files[number::PROCESSES] for number in range(PROCESSES)], chunksize=1)
    rate = len(files) / max(seconds for seconds, _ in took)
    cpu = sum(cpu for _, cpu in took) / len(files)
    return Run(rate, rate, cpu, cpu, None)


def _bare(files: list[Path]) -> tuple[float, float]:
    """Seconds, and seconds of CPU."""
    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    for file in files:
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(file.read_bytes()))
        scale = STORED / min(pixels.shape[:2])
        size = [round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)]
        resized = interpolate(pixels[None].permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True)
        rgb = resized[0].permute(1, 2, 0).contiguous().numpy()
        simplejpeg.encode_jpeg(rgb, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
    return time.perf_counter() - started, time.process_time() - cpu


def print_table(images: int, runs: dict[str, list[Run]]) -> None:
    """Medians, and ours over each: medians of the rounds' ratios."""
    table = Table(title=f"{images} JPEGs of {SOURCE} pixels, stored at {STORED}, {PROCESSES} processes")
    columns = (
        *("contestant", "whole, images/s", "glscl / this", "steady, images/s", "glscl / this"),
        *("CPU ms an image", "this / glscl", "steady, CPU ms", "this / glscl", "server's"),
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for name, own in runs.items():
        pairs = list(zip(runs["glscl"], own, strict=True))
        server = [run.server for run in own if run.server is not None]
        table.add_row(
            name,
            f"{statistics.median(run.whole for run in own):.0f}",
            f"{statistics.median(ours.whole / this.whole for ours, this in pairs):.2f}",
            f"{statistics.median(run.steady for run in own):.0f}",
            f"{statistics.median(ours.steady / this.steady for ours, this in pairs):.2f}",
            f"{1e3 * statistics.median(run.cpu for run in own):.2f}",
            f"{statistics.median(this.cpu / ours.cpu for ours, this in pairs):.2f}",
            *_steady_cpu(pairs),
            f"{1e3 * statistics.median(server):.2f}" if server else "-",
        )
    Console(width=130).print(table)


def _steady_cpu(pairs: list[tuple[Run, Run]]) -> tuple[str, str]:
    known = [
        (ours.steady_cpu, this.steady_cpu)
        for ours, this in pairs
        if ours.steady_cpu is not None and this.steady_cpu is not None
    ]
    if not known:
        return "-", "-"
    ratio = statistics.median(this / ours for ours, this in known)
    return f"{1e3 * statistics.median(this for _, this in known):.2f}", f"{ratio:.2f}"


if __name__ == "__main__":
    main()
