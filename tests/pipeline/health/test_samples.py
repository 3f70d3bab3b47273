"""Unreadable samples are counted; too many of them end the run."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.training.health.samples import BadSampleGuard
from sharding.errors import BadDataLimit

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_bad_sample_now_and_then_is_counted_by_cause(alone: None) -> None:
    guard = BadSampleGuard(limit=0.01, device=CPU)
    for _ in range(20):
        guard.update(100, Counter())
    guard.update(100, Counter({"checksum-mismatch": 2, "decode": 1}))
    assert guard.causes == {"checksum-mismatch": 2, "decode": 1}
    assert guard.seen == 2100


def test_more_bad_samples_than_the_limit_stop_the_run_with_the_causes(alone: None) -> None:
    guard = BadSampleGuard(limit=0.01, device=CPU)
    with pytest.raises(BadDataLimit, match="checksum-mismatch 11"):
        guard.update(64, Counter({"checksum-mismatch": 11}))
