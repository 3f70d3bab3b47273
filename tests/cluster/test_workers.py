"""Worker groups over a real local Ray: collectives, deaths, mistakes, DeepSpeed."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.config import ClusterConfig, WorkerResources
from cluster.errors import ClusterError, WorkerGroupError, WorkersStopped
from cluster.notice import Leaving, Reason
from cluster.resources import for_fine_tuning
from cluster.workers import WorkerContext, run_workers

CONFIG = ClusterConfig()


class Mistake(ValueError):
    """Stands for a user's mistake that only a worker can notice."""


def _note(folder: Path, context: WorkerContext, text: object) -> None:
    """Leaves a file per call, so that a test can count how often which rank ran."""
    (folder / f"rank{context.rank}-{time.time_ns()}").write_text(str(text))


def _notes(folder: Path) -> list[str]:
    """All of them, in the order they were written."""
    written = sorted((folder / "notes").iterdir(), key=lambda path: path.name.rpartition("-")[2])
    return [f"{path.name.partition('-')[0]} {path.read_text()}" for path in written]


def _run(function: Any, folder: Path, max_failures: int = 2, config: ClusterConfig = CONFIG) -> list[str]:
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    run_workers(
        function,
        notes,
        workers=2,
        config=config,
        name="test",
        max_failures=max_failures,
        scratch=folder / f"scratch-{max_failures}",
    )
    return _notes(folder)


def _reduce_and_train(context: WorkerContext, folder: Path) -> None:
    import torch

    value = torch.tensor([float(context.rank + 1)])
    torch.distributed.all_reduce(value)
    losses, weights = _train_with_zero_1(context)
    _note(
        folder,
        context,
        f"{value.item()} of {context.world_size} on {context.device}, "
        f"learns {losses[-1] < losses[0]} to {weights:.6f}, {torch.get_num_threads()} threads",
    )


def _train_with_zero_1(context: WorkerContext) -> tuple[list[float], float]:
    """The losses of five steps, and the sum of the weights then."""
    import torch

    from cluster.engine import prepare_deepspeed

    prepare_deepspeed(context.device)
    import deepspeed

    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.05),
        config={"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}},
    )
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(context.rank))
    losses = []
    for _ in range(5):
        loss = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        torch.distributed.all_reduce(loss.detach())
        losses.append(loss.item())
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return losses, weights.sum().item()


@pytest.mark.slow
def test_two_workers_reduce_over_gloo_and_deepspeed_trains_them_under_zero_1(
    ray_session: None, tmp_path: Path
) -> None:
    config = ClusterConfig(worker=WorkerResources(threads=3))  # the default would be the cores, shared
    first, second = sorted(_run(_reduce_and_train, tmp_path, config=config))
    assert first.startswith("rank0 3.0 of 2 on cpu, learns True to ")
    assert first.endswith(", 3 threads")
    assert second == first.replace("rank0", "rank1")  # both hold the same weights


def _dies_twice(context: WorkerContext, folder: Path) -> None:
    """In its first life a loader process of worker 1 is killed, in the second worker 1 itself."""
    import psutil
    import torch

    life = len(list(folder.glob(f"rank{context.rank}-*"))) + 1
    _note(folder, context, "start")
    batches = iter(torch.utils.data.DataLoader(list(range(1000)), num_workers=1))
    next(batches)
    if context.rank == 1 and life == 1:
        for child in psutil.Process().children():
            child.kill()
    for _ in batches:
        pass
    torch.distributed.barrier()
    if context.rank == 1 and life == 2:
        time.sleep(2)  # a death while Ray still starts the group is another story: a failed start
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()
    _note(folder, context, "end")


@pytest.mark.slow
def test_after_kill_9_of_a_worker_or_its_loader_process_the_function_is_called_again_as_often_as_allowed(
    ray_session: None, tmp_path: Path
) -> None:
    with pytest.raises(WorkerGroupError, match="worker 1 died, and 1 earlier deaths") as caught:
        _run(_dies_twice, tmp_path, max_failures=1)
    assert caught.value.rank == 1
    assert "died unexpectedly" in str(caught.value)
    assert sorted(_notes(tmp_path)) == ["rank0 start", "rank0 start", "rank1 start", "rank1 start"]

    assert sorted(_run(_dies_twice, tmp_path, max_failures=0)) == [
        *("rank0 end", "rank0 start", "rank0 start", "rank0 start"),
        *("rank1 end", "rank1 start", "rank1 start", "rank1 start"),
    ]


def _one_mistake(context: WorkerContext, folder: Path) -> None:
    import torch

    _note(folder, context, "start")
    if context.rank == 0:
        raise Mistake("train.stages[0].steps: 3 is odd")
    torch.distributed.barrier()  # for ever: the other worker never comes


@pytest.mark.slow
def test_a_mistake_in_one_worker_is_raised_once_while_the_other_waits(
    ray_session: None, tmp_path: Path
) -> None:
    with pytest.raises(Mistake, match=r"^train\.stages\[0\]\.steps: 3 is odd$") as caught:
        _run(_one_mistake, tmp_path)
    assert "_one_mistake" in str(caught.value.__cause__)  # the worker's traceback is not lost
    assert len(list((tmp_path / "notes").iterdir())) == 2  # each worker ran once


def _one_bug(context: WorkerContext, folder: Path) -> None:
    import torch

    _note(folder, context, "start")
    if context.rank == 1:
        raise KeyError("no such objective")
    torch.distributed.barrier()


@pytest.mark.slow
def test_a_bug_in_a_worker_ends_the_run_with_its_traceback(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(WorkerGroupError, match=r"worker 1 failed: KeyError: 'no such objective'") as caught:
        _run(_one_bug, tmp_path)
    assert 'raise KeyError("no such objective")' in str(caught.value)
    assert len(list((tmp_path / "notes").iterdir())) == 2


class _Evaluation:
    """Stands for the evaluation's actor, which starts a group of its own."""

    def fine_tune(self, folder: Path) -> None:
        import ray

        config = for_fine_tuning(CONFIG, ray.cluster_resources())
        run_workers(
            _waits,
            folder,
            workers=2,
            config=config,
            name="nested",
            max_failures=0,
            scratch=folder / "scratch",
        )


def _waits(context: WorkerContext, folder: Path) -> None:
    (folder / f"pid-{os.getpid()}").touch()
    time.sleep(600)


@pytest.mark.slow
def test_a_group_within_an_actor_runs_beside_a_training_that_holds_all_cpus_and_dies_with_the_actor(
    ray_session: None, tmp_path: Path
) -> None:
    import psutil
    import ray

    everything = int(ray.cluster_resources()["CPU"])
    training = ray.remote(_Evaluation).options(num_cpus=everything).remote()
    actor = ray.remote(_Evaluation).options(num_cpus=0, resources={"evaluation": 1}).remote()
    ended = actor.fine_tune.remote(tmp_path)
    try:
        deadline = time.monotonic() + 600  # only so that a hang ends
        while len(pids := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < 2:
            assert not ray.wait([ended], timeout=0.2)[0]
            assert time.monotonic() < deadline
        workers = [psutil.Process(pid) for pid in pids]
    finally:
        ray.kill(actor)
        ray.kill(training)
    assert psutil.wait_procs(workers, timeout=120)[1] == []


def test_workers_that_cannot_fit_are_refused(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"room for 4 of 9 workers of 1 CPU each; its nodes: 4 CPU"):
        run_workers(
            _reduce_and_train, tmp_path, workers=9, config=CONFIG, name="x", max_failures=0, scratch=tmp_path
        )


def _sleeps(context: WorkerContext, folder: Path) -> None:
    _note(folder, context, os.getpid())
    time.sleep(600)


@pytest.mark.slow
def test_workers_that_are_to_stop_are_gone_and_are_not_started_again(
    ray_session: None, tmp_path: Path
) -> None:
    notes, stop = tmp_path / "notes", threading.Event()
    notes.mkdir()

    def ask() -> None:
        while len(list(notes.iterdir())) < 2:
            time.sleep(0.1)
        stop.set()

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(WorkersStopped):
        run_workers(
            _sleeps,
            notes,
            workers=2,
            config=CONFIG,
            name="test",
            max_failures=2,
            scratch=tmp_path / "scratch",
            stop=stop,
        )
    pids = [int(path.read_text()) for path in notes.iterdir()]
    deadline = time.monotonic() + 120
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.1)
    assert len(list(notes.iterdir())) == 2


def _leaves_when_told(context: WorkerContext, folder: Path) -> None:
    """Steps of 50 ms; rank 1 is sent SIGTERM once, in the middle of one."""
    import torch

    context.notice.attend()
    first_time = len(list(folder.glob(f"rank{context.rank}-*"))) == 0
    for step in range(200):
        if first_time and context.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        reason = torch.tensor([int(context.notice.reason)])
        torch.distributed.all_reduce(reason, op=torch.distributed.ReduceOp.MAX)
        if int(reason):
            _note(folder, context, Reason(int(reason)).name)
            raise Leaving(Reason(int(reason)))
        if not first_time:
            break
    _note(folder, context, "end")


@pytest.mark.slow
def test_workers_that_leave_at_sigterm_are_started_again_and_no_death_is_counted(
    ray_session: None, tmp_path: Path
) -> None:
    notes = _run(_leaves_when_told, tmp_path, max_failures=0)
    assert sorted(notes) == ["rank0 MACHINE", "rank0 end", "rank1 MACHINE", "rank1 end"]
