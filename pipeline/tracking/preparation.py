"""A preparation in MLflow: one run from its first task to the finished dataset, over kills and restarts.

The run is named ``prepare NAME``. While tasks finish it shows, over the number of finished tasks: what was read, kept
and dropped (by cause), the rate and the bytes written; at the end the dataset's digest and its report. Its key is
kept in the dataset's work folder, which the finished dataset does not have: a dataset that is prepared already makes
no run, one that is prepared anew makes a new one.
"""

from __future__ import annotations

import threading
import time
import uuid
from types import TracebackType

from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.logger import MetricLogger
from pipeline.tracking.runs import RunHandle, environment_tags, flatten_params
from pipeline.tracking.tracker import Tracker
from sharding.manifest import REPORT_PATH, Counts
from sharding.prepare import Preparation, PreparedDataset, Progress
from sharding.storage import Storage

_RECORD = "work/tracking.json"
_INTERVAL_S = 2.0
_PATIENCE_S = 10.0


class PreparationTracker:
    """Tells MLflow how a preparation goes. Nothing here waits for MLflow before the end, nor fails without it::

        with PreparationTracker(config, in_flight=8) as tracker:
            prepared = prepare(..., on_start=tracker.start, progress=tracker.update)
            tracker.finish(prepared, storage.at(prepared.path))

    Args:
        config: where; ``uri`` absolute (:meth:`TrackingConfig.resolved`).
        in_flight: tasks at a time, to be shown.
    """

    def __init__(self, config: TrackingConfig, *, in_flight: int) -> None:
        self._config, self._in_flight = config, in_flight
        self._tracker: Tracker | None = None
        self._logger: MetricLogger | None = None
        self._opened = threading.Event()
        self._tasks = 0
        self._step = 0
        self._logged = 0.0

    def __enter__(self) -> PreparationTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end("FINISHED")
        else:
            self._end("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def start(self, preparation: Preparation) -> None:
        """Open the run, or the one that an earlier life of this preparation opened. Returns at once."""
        self._tasks = preparation.tasks
        source = {name: str(value) for name, value in preparation.source.items()}
        self._tracker = Tracker(
            self._config,
            name=f"prepare {preparation.name}",
            key=_key(preparation.dataset, preparation.name),
            params=flatten_params(
                {
                    "configuration_digest": preparation.configuration_digest,
                    "source": source,
                    "tasks": str(preparation.tasks),
                    "in_flight": str(self._in_flight),
                    "configuration": preparation.configuration,
                }
            ),
            tags={**environment_tags(), "dataset.url": preparation.dataset.url, "kind": "prepare"},
            wait_s=0,
            on_open=self._open,
        )

    def _open(self, run: RunHandle) -> None:
        # Not before there is a run: two threads would make an SQLite store at once.
        self._logger = MetricLogger(self._config, run.key, run_id=run.run_id)
        self._opened.set()

    def update(self, progress: Progress) -> None:
        """Log where the preparation stands, at most every two seconds and at the end of a phase."""
        last = progress.done == progress.total
        if progress.phase not in ("encode", "write") or not self._opened.is_set():
            return
        if not last and time.monotonic() - self._logged < _INTERVAL_S:
            return
        self._logged = time.monotonic()
        self._step = progress.done + (self._tasks if progress.phase == "write" else 0)
        values = {"inputs_per_s": progress.rate, "bytes_written": float(progress.bytes)}
        prefix = "" if progress.phase == "encode" else "write/"
        self._log(self._step, values | _numbers(progress.counts), prefix)

    def finish(self, prepared: PreparedDataset, dataset: Storage) -> None:
        """Hand over what the finished ``dataset`` is: final counts, digest and report. Nothing if it was there."""
        if self._tracker is None:
            return
        manifest = prepared.manifest
        self._opened.wait(_PATIENCE_S)
        size = sum(shard.bytes + shard.index_bytes for shard in manifest.shards)
        final = {
            **_numbers(manifest.counts),
            "bytes_written": float(size),
            "shards": float(len(manifest.shards)),
        }
        self._log(2 * self._tasks + 1, final, "")
        report = dataset.read_bytes(REPORT_PATH).decode()
        self._tracker.dataset(report, {"dataset.digest": manifest.digest, "dataset.url": dataset.url})

    def _log(self, step: int, values: dict[str, float], prefix: str) -> None:
        if self._logger is not None:
            self._logger.log(step, {f"{prefix}{name}": value for name, value in values.items()})

    def _end(self, status: str) -> None:
        if self._tracker is None:
            return
        if self._logger is not None:
            self._logger.close(_PATIENCE_S)
        self._tracker.finish(status, _PATIENCE_S)


def _numbers(counts: Counts) -> dict[str, float]:
    causes = {f"dropped/{cause}": float(number) for cause, number in counts.dropped.items()}
    dropped = float(sum(counts.dropped.values()))
    return {"inputs": float(counts.read), "kept": float(counts.kept), "dropped": dropped, **causes}


def _key(dataset: Storage, name: str) -> str:
    """What names the run: made at the first start, and found again by all that follow until the dataset is done."""
    key = f"prepare-{name}-{uuid.uuid4().hex[:12]}"
    while not dataset.create_exclusive(_RECORD, f'{{"key": "{key}"}}\n'.encode()):
        try:
            return str(dataset.read_json(_RECORD)["key"])
        except FileNotFoundError:  # another driver has just finished the dataset
            continue
    return key
