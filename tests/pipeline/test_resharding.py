"""Any number of workers, at any ZeRO stage, goes on from what any other wrote, bit for bit."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.workers import WorkerContext
from pipeline.training.checkpoints import fetch_files, list_checkpoints
from pipeline.training.checkpoints.fragments import WEIGHT, Pieces, Stretch
from pipeline.training.checkpoints.record import files_below
from pipeline.training.checkpoints.resuming import resume
from pipeline.training.checkpoints.writer import CheckpointWriter
from pipeline.training.config import TrainBlock
from pipeline.training.engine import build_engine, optimizer_step
from sharding.storage import Storage, open_storage
from tests.fixtures.groups import run_processes
from tests.model.small import small_batch, small_config, small_model

pytestmark = pytest.mark.slow

_SAMPLES, _GROUP = 24, 2
_BEFORE, _AFTER = 2, 1
_KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")
# Who writes: (ZeRO stage, precision). bf16: the fp32 copy must be what is kept, not the rounded weights.
_WRITERS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]


def _readers(workers: int, stage: int, precision: str) -> list[int]:
    """ZeRO stages at which another number of workers reads what ``stage`` wrote; all pairs have their turn."""
    if precision == "bf16":
        return [4 - stage]
    return [(stage + workers) % 4, stage] if workers == 1 else [(stage + workers) % 4, (stage + 2) % 4]


def _engine(stage: int, precision: str, workers: int, rank: int) -> tuple[Any, TrainBlock, WorkerContext]:
    train = TrainBlock(
        workers=workers,
        global_batch=_SAMPLES,
        lanes=_SAMPLES // _GROUP,
        learning_rate=1e-3,
        clipping=1.0,
        precision=precision,
        deepspeed={"zero_optimization": {"stage": stage}},
        stages=[{"name": "s", "steps": 9, "mixture": {"x": 1}}],
    )
    context = WorkerContext(rank, workers, rank, workers, 0, torch.device("cpu"))
    engine, _ = build_engine(small_model(small_config(), torch.float32), train, context)
    return engine, train, context


def _train(engine: Any, train: TrainBlock, rank: int, steps: range) -> list[float]:
    size = _SAMPLES // train.workers
    weights = {str(name): weight for name, weight in train.stages[0].objectives.items()}
    losses = []
    for step in steps:
        batch = small_batch(small_config(), _SAMPLES, 1, group_size=_GROUP, seed=step)
        part = batch.part(size * rank, size * (rank + 1))
        output = engine(**part.inputs(), objectives=weights, group_size=_GROUP)
        engine.backward(output.loss)
        optimizer_step(engine, train)
        losses.append(float(output.loss))
    return losses


def _save(engine: Any, run: Storage, context: WorkerContext, scratch: Path, step: int) -> None:
    writer = CheckpointWriter(run, context, scratch)
    writer.save(engine, step=step, stage=0, details={}, before_commit=dict)
    writer.close()
    torch.distributed.barrier()


def _resumed(folder: Path, name: str, stage: int, precision: str, workers: int, rank: int) -> Any:
    engine, train, context = _engine(stage, precision, workers, rank)
    found = resume(engine, open_storage(folder / name), context, folder / "scratch", expected={}, warn=print)
    assert found is not None
    assert found.step == _BEFORE
    return engine, train, context


def _worker(rank: int, workers: int, port: int, folder: str, writing: bool) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo", verbose=False)
    root = Path(folder)
    found: dict[str, list[float]] = {}
    for stage, precision in _WRITERS:
        name = f"{stage}-{precision}"
        if writing:
            engine, train, context = _engine(stage, precision, workers, rank)
            _train(engine, train, rank, range(_BEFORE))
            _save(engine, open_storage(root / name), context, root / "scratch", _BEFORE)
            found[name] = _train(engine, train, rank, range(_BEFORE, _BEFORE + _AFTER))
            _save(engine, open_storage(root / f"{name}-on"), context, root / "scratch", _BEFORE + _AFTER)
        for reader in [stage] if writing else _readers(workers, stage, precision):
            engine, train, context = _resumed(root, name, reader, precision, workers, rank)
            label = f"{name}-by-{workers}-{reader}"
            _save(engine, open_storage(root / label), context, root / "scratch", _BEFORE)
            found[label] = _train(engine, train, rank, range(_BEFORE, _BEFORE + _AFTER))
            if writing:
                _save(engine, open_storage(root / f"{label}-on"), context, root / "scratch", _BEFORE + _AFTER)
    torch.save(found, root / f"losses-{workers}-{rank}.pt")


def _spawn(workers: int, folder: Path, *, writing: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    run_processes(_worker, workers, port, str(folder), writing, count=workers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two workers write at each ZeRO stage, go on, and go on again from what they wrote; then one, then three."""
    folder = tmp_path_factory.mktemp("runs")
    _spawn(2, folder, writing=True)
    _spawn(1, folder, writing=False)
    _spawn(3, folder, writing=False)
    return folder


def _state(run: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All parameters and moments of a run's newest checkpoint, whole."""
    storage = open_storage(run)
    checkpoint = list_checkpoints(storage)[-1]
    names = list(files_below(checkpoint, "state"))
    fetch_files(storage, checkpoint, names, scratch)
    with Pieces(scratch / name for name in names) as pieces:
        found = {}
        for parameter, count in pieces.parameters().items():
            stretch = Stretch(parameter, 0, count)
            found |= {f"{kind}/{parameter}": pieces.read(stretch, kind) for kind in _KINDS}
            found[f"updates/{parameter}"] = torch.tensor(pieces.updates(stretch))
        return found


def _assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(("stage", "precision"), _WRITERS)
def test_the_same_group_goes_on_bit_for_bit(runs: Path, tmp_path: Path, stage: int, precision: str) -> None:
    name = f"{stage}-{precision}"
    want = _state(runs / f"{name}-on", tmp_path / "want")
    assert len(want) == 4 * len(list(small_model(small_config()).parameters()))
    _assert_same(_state(runs / f"{name}-by-2-{stage}-on", tmp_path / "got"), want)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("stage", "precision"), _WRITERS)
def test_another_number_of_workers_at_another_stage_has_every_number_where_it_was(
    runs: Path, tmp_path: Path, stage: int, precision: str, workers: int
) -> None:
    want = _state(runs / f"{stage}-{precision}", tmp_path / "want")
    assert any(bool(value.abs().max() > 0) for name, value in want.items() if name.startswith("exp_avg_sq"))
    for reader in _readers(workers, stage, precision):
        label = f"{stage}-{precision}-by-{workers}-{reader}"
        _assert_same(_state(runs / label, tmp_path / label), want)


@pytest.mark.parametrize("workers", [1, 3])
def test_it_trains_on_as_the_group_that_wrote_it(runs: Path, workers: int) -> None:
    reference = _mean(runs, 2)
    found = _mean(runs, workers)
    for stage, precision in _WRITERS:
        for reader in _readers(workers, stage, precision):
            # Sums in another order; AdamW lifts the noise of vanishing gradients.
            tolerance = 2e-4 if precision == "fp32" else 2e-2
            got = found[f"{stage}-{precision}-by-{workers}-{reader}"]
            assert got == pytest.approx(reference[f"{stage}-{precision}"], rel=tolerance)


def _mean(runs: Path, workers: int) -> dict[str, list[float]]:
    parts = [torch.load(runs / f"losses-{workers}-{rank}.pt", weights_only=True) for rank in range(workers)]
    return {
        name: [sum(step) / workers for step in zip(*(part[name] for part in parts), strict=True)]
        for name in parts[0]
    }
