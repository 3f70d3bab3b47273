"""``glscl verify-epoch``: proves, after the fact, what a run was trained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.changes import trained_datasets
from pipeline.export.source import find_run
from pipeline.progress import show_progress
from pipeline.training.checkpoints import list_checkpoints
from pipeline.training.proof import EpochProof, Proof, prove
from sharding.manifest import load_manifest


def verify_epoch(address: str, console: Console, *, epoch: int | None = None, as_json: bool = False) -> bool:
    """Prove the run at ``address``, or one of its checkpoints, and print the outcome; whether the proof holds.

    Raises:
        UserError: there is no run, checkpoint or ledger, or its datasets are gone or others.
    """
    source = find_run(address)
    chosen = source.candidates[0]
    older = [one for one in list_checkpoints(source.run)[::-1] if one.step < chosen.step]
    # The newest configuration tells of all steps: what was trained cannot be changed (pipeline.changes).
    trained = sorted(trained_datasets(source.record["configuration"]["train"], chosen.step))
    manifests = {
        name: load_manifest(source.root.resolve(source.record["datasets"][name])) for name in trained
    }
    with show_progress(Console(stderr=True), "verifying", chosen.step) as task:
        proof = prove(
            source.run,
            [chosen, *older],
            source.record["configuration"],
            manifests,
            epoch=epoch,
            progress=lambda step: task.update(step, ""),
        )
    if as_json:
        print(json.dumps(proof_as_json(proof), indent=2, sort_keys=True))
    else:
        print_proof(proof, console)
    return proof.holds


def proof_as_json(proof: Proof) -> dict[str, Any]:
    """The outcome as plain data."""
    return {
        "checkpoint": {"step": proof.checkpoint.step, "digest": proof.checkpoint.digest},
        "holds": proof.holds,
        "steps": proof.steps,
        "proven": proof.proven,
        "parts": proof.parts,
        "gaps": [asdict(gap) for gap in proof.gaps],
        "mismatches": [asdict(mismatch) for mismatch in proof.mismatches],
        "epochs": [
            {name: value for name, value in asdict(epoch).items() if name not in ("total", "planned")}
            | {"masked": dict(epoch.masked), "finished": epoch.finished}
            for epoch in proof.epochs
        ],
    }


def print_proof(proof: Proof, console: Console) -> None:
    """A row for each epoch of each dataset, then what is proven, and the first of what is not."""
    table = Table(title="what the run was trained on", title_justify="left")
    for name in ("dataset", "epoch"):
        table.add_column(name)
    table.add_column("stages", overflow="fold")
    for name in ("steps", "samples", "trained once"):
        table.add_column(name, justify="right")
    table.add_column("masked", overflow="fold")
    table.add_column("retracted", justify="right")
    table.add_column("")
    for epoch in proof.epochs:
        table.add_row(
            epoch.dataset,
            str(epoch.epoch),
            ", ".join(epoch.stages),
            str(epoch.steps),
            str(epoch.samples),
            str(epoch.trained),
            ", ".join(f"{cause} {count}" for cause, count in sorted(epoch.masked.items())) or "0",
            str(epoch.retracted),
            _state(epoch),
        )
    console.print(table)
    vouched = (
        f"vouched for by the checkpoint of step {proof.checkpoint.step} ({proof.checkpoint.digest[:12]})"
    )
    lines = [f"{proof.proven} of {proof.steps} steps proven; {proof.parts} parts of the ledger, {vouched}"]
    if proof.mismatches:
        first = min(proof.mismatches, key=lambda one: (one.step is None, one.step or 0))
        where = f"epoch {first.epoch} of '{first.dataset}'"
        place = where if first.step is None else f"step {first.step} ({where})"
        lines.append(f"first mismatch: {place}: {first.reason}")
    for gap in proof.gaps:
        lines.append(f"steps {gap.first} to {gap.last} cannot be proven: {gap.reason}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _state(epoch: EpochProof) -> str:
    if epoch.complete:
        return "complete"
    if epoch.proven < epoch.steps:
        return "not proven"
    return "not complete" if epoch.finished else "in progress"
