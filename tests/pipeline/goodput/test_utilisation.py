"""MFU: counted FLOPs over the measured peak, which is measured when nothing else starts on the cores any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cluster.workers import WorkerContext
from pipeline.goodput import utilisation
from pipeline.goodput.records import AttemptRecorder
from pipeline.goodput.utilisation import Utilisation


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_peak_is_measured_once_and_not_before_there_is_a_batch(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
        measured.append(precision)
        return 50.0, "measured"

    monkeypatch.setattr(utilisation, "peak_of", peak_of)
    context = WorkerContext(rank, 2, rank, 2, 0, torch.device("cpu"))
    with AttemptRecorder(None, 2) as recorder:
        used = Utilisation(lambda stage, batch: 10.0, "fp32", context, recorder)
        assert measured == []
        for _ in range(2):  # every worker measures, the first alone counts: 2 parts by 2 workers
            used.add("stage", "batch")
        assert measured == ["fp32"]
        assert used.of_step(seconds=4.0) == ({"speed/mfu": 40.0 / (4.0 * 50.0)} if rank == 0 else {})
        assert used.of_step(seconds=4.0) == {}
