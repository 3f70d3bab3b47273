"""Inflicting faults one after the other on one job, and what each has cost."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.faults import Fault
from tests.chaos.journal import Trained, gate_of, set_gate
from tests.chaos.scene import EVERY, Job

#: Steps for one fault: it falls into the first of them, the run goes on in the others.
WINDOW = EVERY + 4
_MISSED_S = 5.0  # at the gate without an upload: it had come and gone


@dataclass(frozen=True)
class Recovery:
    """What one fault has cost: steps done again, and the seconds from it to the ``first`` step after it."""

    fault: str
    first: int
    redone: int
    seconds: float


@dataclass
class Matrix:
    """The table that grows over a session."""

    tried: list[str] = field(default_factory=list)
    recovered: list[Recovery] = field(default_factory=list)
    rounds: int = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each fault, in the order in which they were first tried."""
        for name in dict.fromkeys(self.tried):
            known = [one for one in self.recovered if one.fault == name]
            row: dict[str, Any] = {"fault": name, "tried": self.tried.count(name), "recovered": len(known)}
            if known:
                seconds = [one.seconds for one in known]
                row |= {
                    "steps redone, at most": max(one.redone for one in known),
                    "seconds, median": round(statistics.median(seconds), 1),
                    "seconds, at most": round(max(seconds), 1),
                }
            yield row

    def markdown(self) -> str:
        """As a table."""
        head = ["fault", "tried", "recovered", "steps redone, at most", "seconds, median", "seconds, at most"]
        lines = [head, ["---", *["---:"] * 5]]
        lines += [[str(row.get(name, "")) for name in head] for row in self.rows()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, path: Path) -> None:
        """As markdown or, by its ending, as JSON with each single recovery."""
        if path.suffix == ".json":
            record = {"rounds": self.rounds, "recoveries": [asdict(one) for one in self.recovered]}
            path.write_text(json.dumps(record, indent=1) + "\n")
        else:
            path.write_text(self.markdown() + "\n")


def steps_for(faults: Sequence[Fault]) -> int:
    """How long a job must be for so many faults."""
    return WINDOW * (len(faults) + 2)


def disturb(job: Job, faults: Sequence[Fault], draw: Any, matrix: Matrix) -> None:
    """Run the job to its end, with one fault after the other on the way.

    Raises:
        AssertionError: the job does not recover, or too much is lost. (Whether it ends as an undisturbed one is
            for the caller to see: only then is a fault recovered from.)
    """
    job.start()
    for number, fault in enumerate(faults):
        moment = WINDOW * number + int(draw.integers(1, EVERY + 1))
        set_gate(job.journal_path, max(job.step, moment) + EVERY + 1)  # past the next checkpoint
        job.wait_until(lambda moment=moment: job.step >= moment)  # type: ignore[misc]
        if fault.during == "upload":
            _await_upload(job)
        elif fault.during == "evaluation":
            job.wait_until(job.evaluating)
        matrix.tried.append(fault.name)
        safe = 0 if fault.spoils else job.newest()
        began = time.time()
        fault.inflict(job, draw)
        set_gate(job.journal_path, job.step + EVERY + 1)  # past the batches that a killed loader left behind
        if fault.ends == "driver":
            job.start()
        recovery = _await_recovery(job, fault, began)
        assert recovery.redone <= fault.may_cost, recovery
        assert recovery.first > safe, f"what was committed is done again: {recovery}"
        matrix.recovered.append(recovery)
    set_gate(job.journal_path, None)
    assert job.command is not None
    job.command.succeed()


def _await_upload(job: Job) -> None:
    """Wait until a checkpoint is on its way. Where one was over before anyone looked, the next is let come."""
    waits_since = time.monotonic()

    def seen() -> bool:
        nonlocal waits_since
        if job.uploading():
            return True
        if job.step < gate_of(job.journal_path):
            waits_since = time.monotonic()
        elif time.monotonic() - waits_since > _MISSED_S:
            set_gate(job.journal_path, job.step + EVERY)
        return False

    job.wait_until(seen)


def _await_recovery(job: Job, fault: Fault, began: float) -> Recovery:
    """Wait for the first step after the fault: of new workers, where it ended the old ones."""
    before = next(one.process for one in reversed(job.journal) if one.time <= began)

    def first() -> Trained | None:
        return next((one for one in job.journal if _is_after(one)), None)

    def _is_after(one: Trained) -> bool:
        return one.time > began and (fault.ends == "nothing" or one.process != before)

    job.wait_until(lambda: first() is not None)
    journal, found = job.journal, first()
    assert found is not None
    reached = max(one.step for one in journal[: journal.index(found)])
    return Recovery(fault.name, found.step, max(0, reached + 1 - found.step), found.time - began)
