"""Which evaluations are done, in the run's storage, so that nothing is evaluated twice or forgotten over
any crash.

One evaluation is (checkpoint digest, task, task version); its files::

    evaluations/<digest[:16]>/<task>-v<version>.claim-<n>.json    attempt n was begun
                              <task>-v<version>.failure-<n>.json  attempt n failed, with the cause
                              <task>-v<version>.failed.json       given up
                              <task>-v<version>/attempt-<n>/      items.parquet, examples.json, files/: what attempt n
                                                                  found, written before
                              <task>-v<version>.json              done: the numbers, and the sha256 of those files.
                                                                  Written once, never changed.

A claim without an end belongs to a process that is gone: the evaluation is open again. States are read from
names alone. The files of an attempt that never got as far as the numbers are named by no record, and deleted when
another one does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipeline.evaluation.attachments import (
    EXAMPLES,
    FILES,
    ITEMS,
    examples_from_json,
    examples_to_json,
    items_from_parquet,
    items_to_parquet,
)
from pipeline.evaluation.result import Example, Family, TaskResult, lower_is_better
from pipeline.tracking import CheckpointEntry, EvaluationEntry
from sharding.errors import BadData, StorageFault, UserError

if TYPE_CHECKING:
    from pipeline.training.checkpoints import Checkpoint
    from sharding.storage import Storage

log = logging.getLogger("pipeline.evaluation")

_T = TypeVar("_T")

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
    """A finished evaluation: ``metrics``, or the ``cause`` for which it was given up.

    Args:
        checkpoint: path, digest, step, stage.
        dataset: name, digest.
        started, finished: seconds since the epoch.
        kind: of the task.
        settings: of the task, as far as they decide the numbers.
        seed: of the run; all draws of the evaluation and of the intervals follow from it.
        intervals: 95 % interval (low, high) of each metric that is measured on items.
        details: what the task had worth recording.
        files: size and sha256 of each file beside the outcome, by name (see :class:`Ledger`).
    """

    checkpoint: dict[str, Any]
    task: str
    version: str
    dataset: dict[str, str]
    started: float
    finished: float
    attempt: int
    kind: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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
            intervals=self.intervals,
            params={
                "kind": self.kind,
                "version": self.version,
                "data_digest": self.dataset["digest"],
                "seed": self.seed,
                "attempt": self.attempt,
                **{f"settings.{name}": value for name, value in self.settings.items()},
                **{f"details.{name}": value for name, value in self.details.items()},
            },
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

    def finish(self, outcome: Outcome, result: TaskResult | None = None) -> Outcome:
        """Writes the numbers unless they are there already; returns those that are there now.

        Args:
            result: whose items, examples and files are written first; None: the numbers are all there is.
        """
        if result is not None:
            outcome = replace(outcome, files=self._write_files(outcome, result))
        kept = outcome
        if not self._run.create_exclusive(f"{outcome.key.path}.json", _to_bytes(outcome)):
            kept = self._read(f"{outcome.key.path}.json")
        # Of attempts that were killed, or slower than the one that counts.
        lost = {*range(1, outcome.attempt + 1)} - {kept.attempt}
        try:
            for attempt in sorted(lost):
                self._run.delete(_attempt_folder(outcome.key, attempt), recursive=True)
        except StorageFault as error:
            log.warning("files of lost attempts at %s stay behind: %s", outcome.key.path, error)
        return kept

    def _write_files(self, outcome: Outcome, result: TaskResult) -> dict[str, dict[str, Any]]:
        contents = {ITEMS: items_to_parquet(result.families), EXAMPLES: examples_to_json(result.examples)}
        contents |= {f"{FILES}/{name}": data for name, data in result.files.items()}
        folder = _attempt_folder(outcome.key, outcome.attempt)
        for name, data in contents.items():
            self._run.write_bytes(f"{folder}/{name}", data)
        return {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        }

    def items(self, outcome: Outcome) -> list[Family]:
        """The scored items of a finished evaluation; none of one that failed.

        Raises:
            BadData: the file is not what was written.
        """
        if ITEMS not in outcome.files:
            return []
        return self._parsed(outcome, ITEMS, items_from_parquet)

    def examples(self, outcome: Outcome) -> list[Example]:
        """What there is to look at; none of an evaluation that failed.

        Raises:
            BadData: the file is not what was written.
        """
        if EXAMPLES not in outcome.files:
            return []
        return self._parsed(outcome, EXAMPLES, examples_from_json)

    def file(self, outcome: Outcome, name: str) -> bytes:
        """A file beside the outcome, one of ``outcome.files``: a task's own is ``files/<its name>``.

        Raises:
            BadData: it is missing, or not what was written.
        """
        path = self.file_path(outcome, name)
        try:
            data = self._run.read_bytes(path)
        except FileNotFoundError as error:
            raise BadData("missing-file", str(error)) from None
        if hashlib.sha256(data).hexdigest() != outcome.files[name]["sha256"]:
            raise BadData("sha256-mismatch", f"{self._run.url_of(path)} is not what the evaluation wrote")
        return data

    def file_path(self, outcome: Outcome, name: str) -> str:
        """Where :meth:`file` is, below the run."""
        return f"{_attempt_folder(outcome.key, outcome.attempt)}/{name}"

    def _parsed(self, outcome: Outcome, name: str, parse: Callable[[bytes], _T]) -> _T:
        try:
            return parse(self.file(outcome, name))
        except UserError:
            raise  # the storage refuses
        except ValueError as error:
            raise BadData(
                "damaged-record", f"{self._run.url_of(self.file_path(outcome, name))}: {error}"
            ) from None

    def reopen(self, key: EvaluationKey) -> None:
        """Opens again what was given up; its attempts count from none."""
        folder = f"{FOLDER}/{key.digest}"
        for file in list(self._run.list(folder)):
            if file.path.startswith((f"{key.path}.failure-", f"{key.path}.failed.")):
                self._run.delete(file.path)
        self._outcomes.pop(f"{key.path}.failed.json", None)

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
                self._outcomes[path] = _from_record(self._run.read_json(path))
            except UserError:
                raise  # the storage refuses
            except (ValueError, TypeError, KeyError, AttributeError):
                detail = (
                    f"{self._run.url_of(path)} cannot be read; delete it to evaluate the checkpoint again"
                )
                raise BadData("damaged-record", detail) from None
        return self._outcomes[path]


def _attempt_folder(key: EvaluationKey, attempt: int) -> str:
    return f"{key.path}/attempt-{attempt}"


def _from_record(record: Any) -> Outcome:
    pairs = {name: (float(low), float(high)) for name, (low, high) in record["intervals"].items()}
    return Outcome(**{**record, "intervals": pairs})


def _to_bytes(outcome: Outcome) -> bytes:
    return (json.dumps(asdict(outcome), sort_keys=True, indent=1) + "\n").encode()


def beats(outcome: Outcome, best: Outcome | None, name: str) -> bool:
    """Whether an outcome is the better one by a metric, or as good and earlier; not a number is never the best."""
    value = outcome.metrics[name]
    if value != value:
        return False
    if best is None:
        return True
    other = best.metrics[name]
    if value == other:
        return outcome.step < best.step
    return value < other if lower_is_better(name) else value > other


def best_outcome(outcomes: Iterable[Outcome], metric: str) -> Outcome | None:
    """The one with the best ``TASK/METRIC``: the highest (the lowest of a rank); the earlier step of
    equals.
    """
    task, _, name = metric.partition("/")
    best: Outcome | None = None
    for outcome in outcomes:
        if outcome.task == task and name in outcome.metrics and beats(outcome, best, name):
            best = outcome
    return best
