"""Which evaluations are done, in the run's storage, so that nothing is evaluated twice or forgotten over
any crash.

One evaluation is (checkpoint digest, task, task version); its files::

    evaluations/<digest[:16]>/<task>-v<version>.claim-<n>.json    attempt n was begun
                              <task>-v<version>.failure-<n>.json  attempt n failed, with the cause
                              <task>-v<version>.failed.json       given up
                              <task>-v<version>.json              done: the numbers. Written once, never
                              changed.

A claim without an end belongs to a process that is gone: the evaluation is open again. States are read from
names alone.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.tracking import CheckpointEntry, EvaluationEntry
from sharding.errors import BadData, UserError

if TYPE_CHECKING:
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage

log = logging.getLogger("pipeline.evaluation")

FOLDER = "evaluations"
_NAME = re.compile(
    r"^(?P<task>[A-Za-z0-9_-]+)-v(?P<version>\d+-[0-9a-f]{8})"
    r"(?:\.(?P<kind>claim|failure)-(?P<attempt>\d+)|\.(?P<failed>failed))?\.json$"
)


class EvaluationKey(NamedTuple):
    """Names one evaluation; ``digest`` is the first 16 digits of the checkpoint's."""

    digest: str
    task: str
    version: str

    @property
    def path(self) -> str:
        """Path of the evaluation's files without their endings, below the run."""
        return f"{FOLDER}/{self.digest}/{self.task}-v{self.version}"


@dataclass
class EvaluationState:
    """What the names say: ``attempts`` were begun, ``failures`` of them failed."""

    attempts: int = 0
    failures: int = 0
    done: bool = False
    failed: bool = False

    @property
    def open(self) -> bool:
        """Whether it still has to be run."""
        return not (self.done or self.failed)


@dataclass(frozen=True)
class Outcome:
    """A finished evaluation: ``metrics``, or the ``cause`` for which it was given up. Times in seconds
    since the epoch.
    """

    checkpoint: dict[str, Any]  # path, digest, step, stage
    task: str
    version: str
    dataset: dict[str, str]  # name, digest
    started: float
    finished: float
    attempt: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    cause: str | None = None

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return int(self.checkpoint["step"])

    @property
    def key(self) -> EvaluationKey:
        """Where it is in the ledger."""
        return EvaluationKey(self.checkpoint["digest"][:16], self.task, self.version)

    def entry(self, run: Storage) -> EvaluationEntry:
        """As MLflow shows it."""
        checkpoint = CheckpointEntry(
            step=self.step,
            stage=int(self.checkpoint["stage"]),
            url=run.url_of(self.checkpoint["path"]),
            digest=self.checkpoint["digest"],
        )
        return EvaluationEntry(
            checkpoint=checkpoint,
            task=self.task,
            version=self.version,
            dataset=self.dataset["name"],
            dataset_digest=self.dataset["digest"],
            metrics=self.metrics,
            started=self.started,
            finished=self.finished,
            error=self.cause,
        )


def checkpoint_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an outcome keeps of its checkpoint, which retention may delete later."""
    return {
        "path": checkpoint.path,
        "digest": checkpoint.digest,
        "step": checkpoint.step,
        "stage": checkpoint.stage,
    }


class Ledger:
    """The evaluations of one run.

    Args:
        run: the run's folder in storage.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._outcomes: dict[str, Outcome] = {}

    def states(self) -> dict[EvaluationKey, EvaluationState]:
        """All evaluations that were ever begun; one listing of the storage."""
        found: dict[EvaluationKey, EvaluationState] = {}
        for file in self._run.list(FOLDER):
            _, digest, name = [*file.path.split("/"), "", ""][:3]
            match = _NAME.match(name)
            if match is None:
                continue
            key = EvaluationKey(digest, match["task"], match["version"])
            state = found.setdefault(key, EvaluationState())
            if match["failed"]:
                state.failed = True
            elif match["kind"] == "claim":
                state.attempts = max(state.attempts, int(match["attempt"]))
            elif match["kind"] == "failure":
                state.failures += 1
            else:
                state.done = True
        return found

    def claim(self, key: EvaluationKey, previous_attempts: int) -> int:
        """Notes that an attempt begins; returns its number, from 1."""
        attempt = previous_attempts + 1
        note = json.dumps({"begun": time.time()}).encode()
        while not self._run.create_exclusive(f"{key.path}.claim-{attempt}.json", note):
            attempt += 1  # another dispatcher works on this run; doing it twice is waste, not harm
        return attempt

    def fail(self, outcome: Outcome, *, give_up: bool) -> None:
        """Notes a failed attempt with its cause, and whether it was the last."""
        record = _to_bytes(outcome)
        self._run.write_bytes(f"{outcome.key.path}.failure-{outcome.attempt}.json", record)
        if give_up:
            self._run.write_bytes(f"{outcome.key.path}.failed.json", record)

    def finish(self, outcome: Outcome) -> Outcome:
        """Writes the numbers unless they are there already; returns those that are there now."""
        if self._run.create_exclusive(f"{outcome.key.path}.json", _to_bytes(outcome)):
            return outcome
        return self._read(f"{outcome.key.path}.json")

    def retry_failed(self) -> int:
        """Opens again what was given up; returns how many."""
        given_up = [key for key, state in self.states().items() if state.failed and not state.done]
        names = [file.path for file in self._run.list(FOLDER)]
        for key in given_up:
            for name in names:
                if name.startswith((f"{key.path}.failure-", f"{key.path}.failed.")):
                    self._run.delete(name)
            self._outcomes.pop(f"{key.path}.failed.json", None)
        return len(given_up)

    def outcome(self, key: EvaluationKey) -> Outcome:
        """Of an evaluation that is done or given up.

        Raises:
            BadData: its record is damaged.
        """
        try:
            return self._read(f"{key.path}.json")
        except FileNotFoundError:
            return self._read(f"{key.path}.failed.json")

    def outcomes(self) -> list[Outcome]:
        """All that are done or given up, by step and task; those of deleted checkpoints too."""
        finished = []
        for key, state in self.states().items():
            if not state.open:
                try:
                    finished.append(self.outcome(key))
                except BadData as error:
                    log.error("%s", error)
        return sorted(finished, key=lambda outcome: (outcome.step, outcome.task, outcome.version))

    def _read(self, path: str) -> Outcome:
        if path not in self._outcomes:  # they never change
            try:
                self._outcomes[path] = Outcome(**self._run.read_json(path))
            except UserError:
                raise  # the storage refuses
            except (ValueError, TypeError):
                detail = (
                    f"{self._run.url_of(path)} cannot be read; delete it to evaluate the checkpoint again"
                )
                raise BadData("damaged-record", detail) from None
        return self._outcomes[path]


def _to_bytes(outcome: Outcome) -> bytes:
    return (json.dumps(asdict(outcome), sort_keys=True, indent=1) + "\n").encode()


def best_outcome(outcomes: Iterable[Outcome], metric: str) -> Outcome | None:
    """The one with the best ``TASK/METRIC``: the highest (the lowest of a rank); the earlier step of
    equals.
    """
    task, _, name = metric.partition("/")
    sign = -1.0 if name.endswith("rank") else 1.0
    best: Outcome | None = None
    for outcome in sorted(outcomes, key=lambda o: o.step):
        if outcome.task == task and name in outcome.metrics:
            value = sign * outcome.metrics[name]
            if best is None or value > sign * best.metrics[name]:
                best = outcome
    return best
