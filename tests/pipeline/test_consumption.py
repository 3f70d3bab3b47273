"""The consumption ledger says what a run was trained on, and ``glscl verify-epoch`` finds whatever is not so."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

from cluster.workers import WorkerContext
from pipeline.cli import app
from pipeline.config import JobConfig, parse_job
from pipeline.runs import open_run_folder
from pipeline.training import data_order
from pipeline.training.batches import Slot, StageSampler
from pipeline.training.checkpoints import delete_checkpoint, list_checkpoints
from pipeline.training.consumption import (
    FOLDER,
    RETRACTED,
    ConsumptionRecorder,
    PartReference,
    SampleHash,
    read_ledger,
)
from pipeline.training.verify_epoch import verify_epoch
from sharding.errors import UserError
from sharding.manifest import Manifest
from sharding.storage import Storage, open_storage
from tests.fixtures.groups import run_processes
from tests.fixtures.jobs import tiny_job
from tests.pipeline.test_checkpoints import commit
from tests.pipeline.test_data_order import manifest_of

STEPS = 12
SHARDS = {"emoji": [16, 16, 8], "clips": [8, 8]}

Causes = Callable[[int, Slot], str | None]


def readable(step: int, slot: Slot) -> str | None:
    return None


def make_job(folder: Path, **train: Any) -> JobConfig:
    tree = tiny_job("/data/raw", folder / "storage")
    tree["train"] |= {"workers": 1} | train
    return parse_job(tree, "job.yaml")


def manifests() -> dict[str, Manifest]:
    made = {name: manifest_of(name, shards) for name, shards in SHARDS.items()}
    return {
        name: manifest.model_copy(
            update={"shards": [one.model_copy(update={"sha256": "0" * 64}) for one in manifest.shards]}
        )
        for name, manifest in made.items()
    }


@dataclass
class SimulatedRun:
    """A run whose workers do all but compute: same order, ledger and commit records as in the training."""

    job: JobConfig
    storage: Storage = field(init=False)
    run: Storage = field(init=False)
    manifests: dict[str, Manifest] = field(init=False)

    def __post_init__(self) -> None:
        self.storage, self.manifests = open_storage(self.job.storage), manifests()
        paths = {}
        for name, manifest in self.manifests.items():
            paths[name] = f"datasets/{name}-0123"
            self.storage.write_json(f"{paths[name]}/manifest.json", manifest.model_dump(mode="json"))
        self.run = open_run_folder(self.job, self.storage, paths).storage

    @property
    def address(self) -> str:
        return self.run.url

    @property
    def shards(self) -> dict[str, str]:
        return {name: manifest.shards_digest for name, manifest in self.manifests.items()}

    def steps(self, start: int, worker: int = 0, workers: int = 1) -> Iterator[tuple[int, list[Slot]]]:
        """(step from 1, slots) of each contrastive batch of a worker."""
        first = 0
        for stage in self.job.train.stages:
            begin = min(max(start - first, 0), stage.steps)
            sampler = StageSampler(
                stage,
                self.job.train,
                self.manifests,
                seed=self.job.seed,
                start_step=begin,
                worker=worker,
                workers=workers,
            )
            for number, slots in enumerate(sampler):
                yield first + begin + number // self.job.train.accumulation_of(stage) + 1, slots
            first += stage.steps

    def train(
        self, until: int = STEPS, *, causes: Causes = readable, killed_before_commit: int | None = None
    ) -> None:
        """Go on from the newest checkpoint to step ``until``, a checkpoint every 4 steps."""
        newest = (list_checkpoints(self.run) or [None])[-1]
        tip = PartReference(**newest.record["consumption"]) if newest else None
        recorder = ConsumptionRecorder(self.run, self.shards, tip)
        steps = list(self.steps(newest.step if newest else 0))
        for (step, slots), (following, _) in zip(steps, [*steps[1:], (0, [])], strict=True):
            recorder.add(step, batch_of(step, slots, causes))
            if step % 4 == 0 and following != step:
                reference = recorder.write(recorder.take(ALONE))
                if step == killed_before_commit:
                    return
                commit(self.run, step, **self.details(reference))
                if step == until:
                    return

    def details(self, reference: PartReference) -> dict[str, Any]:
        data = {name: manifest.digest for name, manifest in self.manifests.items()}
        return {"shards": self.shards, "data": data, "consumption": asdict(reference)}

    def tip(self, step: int = STEPS) -> PartReference:
        found = {one.step: one for one in list_checkpoints(self.run)}
        return PartReference(**found[step].record["consumption"])

    def parts(self) -> list[str]:
        return [file.path for file in self.run.list(FOLDER)]


ALONE = WorkerContext(
    rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, device=torch.device("cpu")
)


def batch_of(step: int, slots: list[Slot], causes: Causes) -> Any:
    """As much of a batch as the ledger looks at."""
    found = [None if slot.row < 0 else causes(step, slot) for slot in slots]
    valid = [slot.row >= 0 and cause is None for slot, cause in zip(slots, found, strict=True)]
    return SimpleNamespace(slots=slots, causes=found, valid=torch.tensor(valid))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path, alone: None) -> SimulatedRun:
    return SimulatedRun(make_job(tmp_path))


def outcome(address: str, *options: str) -> tuple[int, Any]:
    """Exit code of the command, and what it printed as JSON."""
    result = CliRunner().invoke(app, ["verify-epoch", address, "--json", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, json.loads(result.stdout)


def text(address: str) -> str:
    console = Console(width=200, file=io.StringIO())
    verify_epoch(address, console)
    return console.file.getvalue()


def test_a_run_is_proven_step_by_step_and_its_epochs_are_complete(run: SimulatedRun) -> None:
    run.train()
    code, found = outcome(run.address)
    assert code == 0
    assert found["holds"]
    assert (found["steps"], found["proven"], found["parts"]) == (STEPS, STEPS, 3)
    assert not found["gaps"]
    assert not found["mismatches"]
    finished = [epoch for epoch in found["epochs"] if epoch["finished"]]
    assert len(finished) >= 3
    for epoch in finished:
        assert epoch["complete"]
        assert epoch["trained"] == epoch["samples"] == sum(SHARDS[epoch["dataset"]])
    assert {stage for epoch in found["epochs"] for stage in epoch["stages"]} == {"images", "mixed"}
    shown = text(run.address)
    assert "12 of 12 steps proven; 3 parts of the ledger, vouched for by the checkpoint of step 12" in shown
    assert "complete" in shown


def test_a_run_in_progress_is_proven_up_to_its_last_checkpoint_or_the_one_asked_for(
    run: SimulatedRun,
) -> None:
    run.train(until=8)
    code, found = outcome(run.address)
    assert (code, found["proven"], found["checkpoint"]["step"]) == (0, 8, 8)
    code, found = outcome(f"{run.address}/checkpoints/step-00000004")
    assert (code, found["proven"], found["checkpoint"]["step"]) == (0, 4, 4)


def test_one_epoch_can_be_asked_for(run: SimulatedRun) -> None:
    run.train()
    code, found = outcome(run.address, "--epoch", "1")
    assert code == 0
    assert {epoch["epoch"] for epoch in found["epochs"]} == {1}
    assert found["proven"] == found["steps"] == sum(epoch["steps"] for epoch in found["epochs"]) < STEPS


def test_restarts_leave_the_ledger_of_an_undisturbed_run(run: SimulatedRun, tmp_path: Path) -> None:
    run.train(until=4)
    run.train(killed_before_commit=8)  # the part is there, the checkpoint is not
    assert len(run.parts()) == 2
    run.train(until=8)
    delete_checkpoint(
        run.run, list_checkpoints(run.run)[-1]
    )  # as one that was damaged: gone back to the one before
    run.train()
    undisturbed = SimulatedRun(make_job(tmp_path / "undisturbed"))
    undisturbed.train()
    assert run.tip() == undisturbed.tip()  # which holds the digest of every part before it
    assert run.parts() == undisturbed.parts()
    assert outcome(run.address)[0] == 0


def test_steps_done_again_with_another_outcome_do_not_touch_what_is_vouched_for(run: SimulatedRun) -> None:
    run.train(until=4)
    run.train(
        killed_before_commit=8, causes=lambda step, slot: "checksum-mismatch" if slot.row == 3 else None
    )
    run.train()
    assert len(run.parts()) == 4
    code, found = outcome(run.address)
    assert (code, found["parts"]) == (0, 3)
    assert all(not epoch["masked"] for epoch in found["epochs"])


def test_a_run_whose_stages_to_come_were_changed_is_proven_against_what_it_was_trained_by(
    run: SimulatedRun, tmp_path: Path
) -> None:
    run.train(until=8)
    tree = tiny_job("/data/raw", tmp_path / "storage")
    tree["train"]["workers"] = 1
    first, second = tree["train"]["stages"]
    other = second | {"name": "other", "mixture": {"clips": 1}, "global_batch": 8, "accumulation": 2}
    tree["train"]["stages"] = [
        first,
        other,
        second | {"steps": 8},
    ]  # before the one that was to come, which grows
    changed = SimulatedRun(parse_job(tree, "job.yaml"))
    changed.train(until=20)
    code, found = outcome(run.address)
    assert (code, found["steps"], found["proven"]) == (0, 20, 20)
    assert {stage for epoch in found["epochs"] for stage in epoch["stages"]} == {"images", "other", "mixed"}
    code, found = outcome(f"{run.address}/checkpoints/step-00000008")
    assert (code, found["proven"]) == (0, 8)
    # The check sees it where what was trained is no longer what the configuration says.
    record = changed.run.read_json("run.json")
    record["configuration"]["train"]["stages"][1]["mixture"] = {"emoji": 1}
    changed.run.write_json("run.json", record)
    code, found = outcome(run.address)
    assert code == 1
    assert found["mismatches"][0]["step"] == 9


def test_retention_does_not_lose_the_history(run: SimulatedRun) -> None:
    run.train()
    for checkpoint in list_checkpoints(run.run)[:-1]:
        delete_checkpoint(run.run, checkpoint)
    assert outcome(run.address)[1]["proven"] == STEPS


def test_masked_and_retracted_samples_are_told_apart_and_the_epoch_is_complete(run: SimulatedRun) -> None:
    def causes(step: int, slot: Slot) -> str | None:
        return {0: "checksum-mismatch", 1: RETRACTED}.get(slot.row) if slot.dataset == "emoji" else None

    run.train(causes=causes)
    code, found = outcome(run.address)
    assert code == 0
    whole = [epoch for epoch in found["epochs"] if epoch["complete"] and epoch["dataset"] == "emoji"]
    assert whole
    for epoch in whole:
        assert (epoch["trained"], epoch["masked"], epoch["retracted"]) == (34, {"checksum-mismatch": 3}, 3)
    assert "checksum-mismatch 3" in text(run.address)


class _Cheating(ConsumptionRecorder):
    """A worker that trains on other samples than it should have, at step 6."""

    change: Callable[[list[Slot]], list[Slot]]

    def add(self, step: int, batch: Any) -> None:
        if step == 6:
            batch = batch_of(step, type(self).change(list(batch.slots)), readable)
        super().add(step, batch)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda slots: [slots[1], *slots[1:]], "other samples were trained on"),
        (
            lambda slots: [Slot(slots[0].dataset, 0, 99, slots[0].epoch), *slots[1:]],
            "other samples were trained on",
        ),
        (lambda slots: slots[1:], "samples and"),
        (lambda slots: [*slots, slots[0]], "samples and"),
        (lambda slots: [Slot("clips", s.shard, s.row, s.epoch) for s in slots], "of 'clips' in the ledger"),
        (lambda slots: [Slot(s.dataset, s.shard, s.row, s.epoch + 1) for s in slots], "is of epoch"),
    ],
)
def test_a_step_that_was_trained_on_anything_else_is_named(
    run: SimulatedRun, monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Slot]], list[Slot]], says: str
) -> None:
    monkeypatch.setattr(_Cheating, "change", change, raising=False)
    monkeypatch.setattr(f"{__name__}.ConsumptionRecorder", _Cheating)
    run.train()
    code, found = outcome(run.address)
    assert code == 1
    assert [(one["step"], one["dataset"]) for one in found["mismatches"]] == [(6, "emoji")]
    assert says in found["mismatches"][0]["reason"]
    assert found["proven"] == STEPS - 1
    assert "first mismatch: step 6 (epoch 1 of 'emoji')" in text(run.address)


def test_a_sample_cannot_be_hidden_as_masked_where_it_does_not_belong(run: SimulatedRun) -> None:
    run.train(until=4)
    recorder = ConsumptionRecorder(run.run, run.shards, run.tip(4))
    for step, slots in run.steps(4):
        if step > 8:
            break
        batch = batch_of(step, slots, readable)
        if step == 5:
            everything = {Slot("emoji", 1, row, slots[0].epoch) for row in range(16)}
            batch.slots[0], batch.causes[0], batch.valid[0] = (
                min(everything - {*slots}, key=repr),
                "unreadable",
                False,
            )
        recorder.add(step, batch)
    commit(run.run, 8, **run.details(recorder.write(recorder.take(ALONE))))
    code, found = outcome(run.address)
    assert code == 1
    assert found["mismatches"][0]["step"] == 5
    assert "does not belong" in found["mismatches"][0]["reason"]


def test_an_order_that_forgets_a_sample_is_found_out_though_the_ledger_agrees_with_it(
    run: SimulatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = data_order.batch_slots

    def forgetful(*arguments: Any, **options: Any) -> np.ndarray:
        slots = true(*arguments, **options)
        slots[(slots == (2, 5)).all(axis=1)] = (2, 6)  # one twice, another never
        return slots

    monkeypatch.setattr(data_order, "batch_slots", forgetful)
    run.train()
    code, found = outcome(run.address)
    assert (code, found["proven"]) == (1, STEPS)
    assert found["mismatches"][0]["step"] is None
    assert "every sample of the dataset once" in found["mismatches"][0]["reason"]


@pytest.mark.parametrize("damage", ["lost", "flipped"])
def test_a_damaged_part_is_a_gap_and_older_checkpoints_vouch_for_what_lies_before(
    run: SimulatedRun, damage: str
) -> None:
    run.train()
    path = run.tip(8).path
    if damage == "lost":
        run.run.delete(path)
    else:
        data = bytearray(run.run.read_bytes(path))
        data[len(data) // 2] ^= 1
        run.run.write_bytes(path, bytes(data))
    code, found = outcome(run.address)
    assert code == 1
    assert [(gap["first"], gap["last"]) for gap in found["gaps"]] == [(5, 8)]
    assert found["proven"] == 8
    assert not found["mismatches"]
    assert "steps 5 to 8 cannot be proven" in text(run.address)
    delete_checkpoint(run.run, list_checkpoints(run.run)[0])
    assert [(gap["first"], gap["last"]) for gap in outcome(run.address)[1]["gaps"]] == [(1, 8)]


def test_other_data_than_was_trained_on_is_refused_and_a_retraction_is_not(run: SimulatedRun) -> None:
    run.train()
    path = "datasets/emoji-0123/manifest.json"
    manifest = run.manifests["emoji"]
    retracted = manifest.model_copy(update={"dropped_keys": ["000000-000001"]})
    run.storage.write_json(path, retracted.model_dump(mode="json"))
    assert outcome(run.address)[0] == 0
    changed = manifest.model_copy(update={"shards": manifest.shards[:2]})
    run.storage.write_json(path, changed.model_dump(mode="json"))
    with pytest.raises(UserError, match="other shards of 'emoji'"):
        verify_epoch(run.address, Console())
    run.storage.delete(path)
    with pytest.raises(UserError, match="no dataset at"):
        verify_epoch(run.address, Console())


def test_a_run_without_a_ledger_is_refused(run: SimulatedRun) -> None:
    commit(run.run, 4, shards=run.shards)
    with pytest.raises(UserError, match="without a consumption ledger"):
        verify_epoch(run.address, Console())


def test_verifying_needs_neither_ray_nor_deepspeed() -> None:
    code = "import sys, pipeline.training.verify_epoch as _; sys.exit(bool({'ray', 'deepspeed'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_accumulation_makes_the_same_ledger(run: SimulatedRun, tmp_path: Path) -> None:
    run.train()
    halved = SimulatedRun(make_job(tmp_path / "halved", accumulation=2))
    halved.train()
    assert halved.tip() == run.tip()


def test_the_hash_is_that_of_the_ids_whatever_their_order() -> None:
    one, other = SampleHash("0" * 64), SampleHash("1" * 64)
    slots = np.array([[0, 1], [3, 2], [10**6, 9]])
    assert one.total(slots) == one.total(slots[::-1])
    assert one.total(slots) == sum(one.total(slot[None]) for slot in slots) % 2**128
    assert one.total(slots) != other.total(slots)
    assert one.total(slots[:, ::-1]) != one.total(slots)
    assert one.total(np.zeros((0, 2), np.int64)) == 0
    assert (
        one.total(np.array([[1, 2]])) == 0xFC7E63DE9C4934265DDCC78A3F18E58F
    )  # BLAKE2b of 1, 2 as 64-bit numbers


def _one_of_two_workers(rank: int, rendezvous: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    context = WorkerContext(
        rank=rank, world_size=2, local_rank=rank, local_world_size=2, node_rank=0, device=torch.device("cpu")
    )
    run = SimulatedRun(make_job(Path(folder)))
    recorder = ConsumptionRecorder(run.run, run.shards, None)
    for step, slots in run.steps(0, rank, 2):
        recorder.add(step, batch_of(step, slots, _some_unreadable))
    Path(folder, f"{rank}.json").write_text(json.dumps(asdict(recorder.write(recorder.take(context)))))
    dist.destroy_process_group()


def _some_unreadable(step: int, slot: Slot) -> str | None:
    return "checksum-mismatch" if slot.row % 5 == 0 else None


@pytest.mark.slow
def test_two_workers_write_the_ledger_of_one(run: SimulatedRun, tmp_path: Path) -> None:
    recorder = ConsumptionRecorder(run.run, run.shards, None)
    for step, slots in run.steps(0):
        recorder.add(step, batch_of(step, slots, _some_unreadable))
    expected = recorder.write(recorder.take(ALONE))
    folder = tmp_path / "two"
    folder.mkdir()
    run_processes(_one_of_two_workers, f"file://{tmp_path}/two-meet", str(folder), count=2)
    for rank in range(2):
        assert PartReference(**json.loads((folder / f"{rank}.json").read_text())) == expected
    other = SimulatedRun(make_job(folder))
    assert list(read_ledger(other.run, [expected]).records()) == list(
        read_ledger(run.run, [expected]).records()
    )
