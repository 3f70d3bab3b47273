"""How long a training waits for data that lie 50 ms and 100 MB/s away: ``python -m benchmarks.prefetch``.

A dataset of pictures lies in a real S3 server (SeaweedFS, on this machine) behind a proxy that answers each request
after ``--latency`` and sends no more than ``--bandwidth`` over all connections. A consumer that takes ``--step``
seconds a batch (it sleeps: the accelerator computes) reads it through the training's own loader, in the modes:

* range, one by one: a request a sample, one after the other in each loader process (what ``read`` does);
* range: a batch's requests at once (what a training without ``cache_mb`` does);
* cache, fetched when missed: the sample that needs a shard waits until the cache has it whole;
* cache, prefetched (what ``cache_mb`` does), with the cache empty at first, and then once more with all of it there.

"waits" is the share of the time that the consumer stood still, after the first ``--warm-up`` batches; "first" is
the time to the first batch.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from model import GLSCLConfig
from pipeline.training.batches import Sample, Slot, StageDataset, StageSampler, stage_loader
from pipeline.training.config import StageBlock, TrainBlock
from pipeline.training.prefetch import PrefetchedSampler, in_flight, open_cache
from sharding.cache import ShardCache
from sharding.manifest import Counts, Manifest
from sharding.media import Encoded, MediaInfo
from sharding.reader import ShardReader
from sharding.storage import Storage
from sharding.writer import ShardWriter, publish
from tests.fixtures.s3 import running_s3_server


class Throttle:
    """A TCP proxy: each request's answer comes ``latency`` seconds later, all answers share ``bandwidth`` bytes/s."""

    def __init__(self, target: tuple[str, int], latency: float, bandwidth: float) -> None:
        self._target, self._latency, self._bandwidth = target, latency, bandwidth
        self._lock, self._free_at = threading.Lock(), 0.0
        self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answers, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        # A request of a read is one packet; its delay is the whole round trip's.
        self._pass_on(client, server, delay=self._latency)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        self._pass_on(server, client, delay=0.0)

    def _pass_on(self, source: socket.socket, target: socket.socket, delay: float) -> None:
        try:
            while data := source.recv(1 << 18):
                if delay:
                    time.sleep(delay)
                else:
                    self._wait_for_turn(len(data))
                target.sendall(data)
        except OSError:
            pass  # one of the two has left
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait_for_turn(self, size: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size / self._bandwidth
            self.sent += size
            wait = self._free_at - now
        time.sleep(max(0.0, wait))


def write_dataset(storage: Storage, shards: int, samples: int, pixels: int) -> Manifest:
    """Pictures that do not compress well, at about 0.5 byte a pixel; few different ones, since nobody looks."""
    pictures = [_picture(seed, pixels) for seed in range(32)]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(shards):
            path = Path(folder) / "shard.tar"
            with ShardWriter(path) as writer:
                for row in range(samples):
                    media = Encoded(pictures[(shard + row) % 32], "jpg", MediaInfo(pixels, pixels, 1, 0.0))
                    writer.add(
                        f"{shard:06d}-{row:06d}", media, ["a picture of noise"], f"{shard:064d}", "made"
                    )
            records.append(publish(writer, storage, f"{shard:06d}"))
    count = shards * samples
    manifest = Manifest(
        name="noise",
        modality="image",
        configuration={},
        configuration_digest="0" * 64,
        source={"url": "made"},
        shards=records,
        counts=Counts(read=count, kept=count),
    )
    storage.write_json("manifest.json", manifest.model_dump(mode="json"))
    return manifest


def _picture(seed: int, pixels: int) -> bytes:
    noise = np.random.Generator(np.random.Philox(key=seed)).integers(
        0, 256, (pixels // 4, pixels // 4, 3), np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((pixels, pixels), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class OneByOne(StageDataset):
    """Reads a sample after the other, as before batches were read at once."""

    def __getitems__(self, slots: Any) -> list[Sample]:
        return [sample for slot in slots for sample in super(OneByOne, self).__getitems__([slot])]


def consume(loader: Any, step_s: float, warm_up: int) -> tuple[float, float, int]:
    """Seconds to the first batch, share of the time waited after the warm-up, unreadable samples."""
    batches: Iterator[Any] = iter(loader)
    began = time.monotonic()
    waited = total = first = 0.0
    bad = number = 0
    while True:
        asked = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            break
        got = time.monotonic()
        first = first or got - began
        bad += batch.bad.total()
        time.sleep(step_s)
        if number >= warm_up:
            waited += got - asked
            total += time.monotonic() - asked
        number += 1
    return first, waited / total, bad


def measure(arguments: argparse.Namespace) -> Table:
    """All modes, a row each."""
    table = Table("mode", "first (s)", "waits", "MB over the line", "MB of samples", title=_title(arguments))
    scratch = Path(tempfile.mkdtemp(prefix="prefetch-"))
    with running_s3_server() as server:
        direct = server.storage("noise")
        manifest = write_dataset(direct, arguments.shards, arguments.samples, arguments.pixels)
        host, port = server.endpoint_url.removeprefix("http://").split(":")
        with closing(Throttle((host, int(port)), arguments.latency, arguments.bandwidth * 1e6)) as line:
            remote = Storage(server.config(direct.url, endpoint_url=line.url))
            for mode in (
                "range, one by one",
                "range",
                "cache, fetched when missed",
                "cache, cold",
                "cache, warm",
            ):
                before = line.sent
                with_cache = mode.startswith("cache")
                if mode != "cache, warm":
                    shutil.rmtree(scratch / "shards", ignore_errors=True)
                train, stage = _job(arguments, manifest, with_cache)
                cache = open_cache(scratch / "shards", train, {"noise": manifest}, 1)
                first, waits, bad = consume(
                    _loader(mode, train, stage, remote, manifest, cache), arguments.step, arguments.warm_up
                )
                assert not bad, f"{bad} samples could not be read"
                share = stage.steps * train.global_batch / manifest.samples
                table.add_row(
                    mode, f"{first:.1f}", f"{waits:.1%}", f"{(line.sent - before) / 1e6:.0f}",
                    f"{share * sum(shard.bytes for shard in manifest.shards) / 1e6:.0f}",
                )  # fmt: skip
    shutil.rmtree(scratch, ignore_errors=True)
    return table


def _title(arguments: argparse.Namespace) -> str:
    return (
        f"{arguments.latency * 1000:.0f} ms, {arguments.bandwidth:g} MB/s; a step of {arguments.batch} samples every "
        f"{arguments.step:g} s, {arguments.processes} loader processes"
    )


def _job(
    arguments: argparse.Namespace, manifest: Manifest, with_cache: bool
) -> tuple[TrainBlock, StageBlock]:
    whole = sum(shard.bytes + shard.index_bytes for shard in manifest.shards) // 2**20 + 1
    block = {
        "global_batch": arguments.batch,
        "lanes": arguments.lanes,
        "shuffle_window": arguments.window,
        "loader_processes": arguments.processes,
        "cache_mb": whole if with_cache else 0,
        "stages": [{"name": "all", "steps": arguments.steps, "mixture": {"noise": 1.0}}],
    }
    train = TrainBlock.model_validate(block)
    return train, train.stages[0]


def _loader(
    mode: str,
    train: TrainBlock,
    stage: StageBlock,
    remote: Storage,
    manifest: Manifest,
    cache: ShardCache | None,
) -> Any:
    on_miss = mode == "cache, fetched when missed"
    readers = {"noise": ShardReader(remote, manifest, cache, fetches=on_miss)}

    def around(sampler: StageSampler) -> torch.utils.data.Sampler[list[Slot]]:
        if cache is None or on_miss:
            return sampler
        return PrefetchedSampler(sampler, readers, byte_limit=cache.byte_limit, behind=in_flight(train))

    config = GLSCLConfig.preset("tiny")
    loader = stage_loader(stage, train, readers, config, tokenizer="builtin", seed=1, around=around)
    if mode == "range, one by one":
        dataset = OneByOne(readers, stage, image_size=config.image_size, seed=1)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=loader.batch_sampler,
            num_workers=train.loader_processes,
            collate_fn=loader.collate_fn,
            multiprocessing_context="forkserver",
            prefetch_factor=4,
        )
    return loader


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency", type=float, default=0.05, help="s a request")
    parser.add_argument("--bandwidth", type=float, default=100.0, help="MB/s over all connections")
    parser.add_argument("--step", type=float, default=0.4, help="s that the consumer takes a batch")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--warm-up", type=int, default=20, help="batches left out of the share")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--samples", type=int, default=400, help="of a shard")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2, help="loader processes")
    Console(width=110).print(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
