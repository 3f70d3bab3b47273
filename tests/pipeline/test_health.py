"""A run that goes wrong says where and stops on every worker."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from pipeline.errors import NonFiniteLoss
from pipeline.training.health import BadSampleGuard, check_finite
from sharding.errors import BadDataLimit

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_finite_losses_pass(alone: None) -> None:
    check_finite({"itc": torch.tensor(1.0)}, ["a"], step=3)


def _second_worker_sees_nan(rank: int, rendezvous: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    losses = {"itc": torch.tensor(1.0), "mlm": torch.tensor(float("nan") if rank == 1 else 2.0)}
    try:
        check_finite(losses, [f"key-{rank}"], step=7)
    except NonFiniteLoss as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_a_nan_on_one_worker_stops_all_and_names_step_objective_and_every_sample(tmp_path: Path) -> None:
    arguments = (f"file://{tmp_path}/rendezvous", str(tmp_path))
    multiprocessing.spawn(_second_worker_sees_nan, args=arguments, nprocs=2)
    for rank in range(2):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert "step 7" in message
        assert "mlm" in message
        assert "itc" not in message
        assert "key-0" in message
        assert "key-1" in message


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
