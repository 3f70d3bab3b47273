"""Metrics from worker 0 to MLflow: in the background, in batches, each step once, none lost without a word.

    log() -> memory -> log_batch -> MLflow
               |
               +-> segments in the run's storage (server away: at checkpoints, when memory is full, at the
               end)

Segments are older than memory and go first once the server answers, by their steps, also in a later life of the
process.
What the server has already (by the last step of each metric) is not sent again; a batch whose answer was
lost is sent again with the same time stamps, which MLflow's store recognises.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.connection import connect, is_permanent, one_line
from pipeline.tracking.runs import find_run
from pipeline.tracking.system import memory_metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from sharding.storage import Storage

log = logging.getLogger("pipeline.tracking")

_BATCH = 1000  # MLflow's limit of metrics in one request
_LONGEST_PAUSE_S = 15.0  # between two attempts while the server is away
_NAME = re.compile(r"[^\w\-. :/]")


class _Row(NamedTuple):
    step: int
    timestamp: int  # milliseconds
    metrics: dict[str, float]


class MetricLogger:
    """Sends the metrics of one run; made by worker 0 alone, one at a time per run.

    A metric is logged at ascending steps, once each: a value at a step that the server has already is
    passed over, which is what makes a restart from an older checkpoint leave no duplicates.

    Args:
        config: where; its ``uri`` must be absolute (:meth:`TrackingConfig.resolved`).
        run_key: see :func:`pipeline.tracking.runs.open_run`; finds the run while its id is not known yet.
        run_id: the id when the driver knew it.
        spool: folder of the run's storage for what could not be delivered. Without it, the oldest values
            are dropped (and counted) when memory is full.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_key: str,
        *,
        run_id: str | None = None,
        spool: Storage | None = None,
    ) -> None:
        self._config, self._key, self._run_id, self._spool = config, run_key, run_id, spool
        self._rows: deque[_Row] = deque()
        self._points = 0
        self._dropped = 0
        self._spilling: set[int] = set()  # ids of the rows that are being written to a segment
        self._slipped = 0  # values of those that memory had no room for meanwhile
        self._newest_step = -1
        self._segments: list[str] = []  # undelivered, oldest first; all of them older than memory
        self._listed = False  # whether the segments of earlier lives are among them
        self._kept = 0  # values in segments of this life
        self._last: dict[str, int] = {}
        self._client: MlflowClient | None = None
        self._away = False  # the last attempt failed
        self._warned = False
        self._measured = 0.0
        self._lock = threading.Lock()
        self._sending = threading.Lock()  # held by whoever delivers or spills
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes metrics of a step. Returns at once and without an error, whatever the server does."""
        row = _Row(int(step), time.time_ns() // 1_000_000, {k: float(v) for k, v in metrics.items()})
        with self._lock:
            self._rows.append(row)
            self._points += len(row.metrics)
            self._newest_step = max(self._newest_step, row.step)
            while self._points > self._config.buffered:
                oldest = self._rows.popleft()
                self._points -= len(oldest.metrics)
                if id(oldest) in self._spilling:
                    self._slipped += len(oldest.metrics)
                else:
                    self._dropped += len(oldest.metrics)
        if self._points > self._config.buffered // 2:
            self._wake.set()

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was logged is with the server, or else is written to the spool.

        To be called before a checkpoint is committed: steps before a checkpoint are never computed again,
        so their metrics must outlive the process. Does not wait while the server is known to be away.

        Returns:
            whether the server has everything. Never raises.
        """
        return self._settle(timeout_s, insist=False)

    def close(self, timeout_s: float = 10.0) -> int:
        """Delivers what is left within the time limit, keeps the rest in the spool, and says so.

        Returns:
            the number of values of this process that the server did not get. Never raises.
        """
        self._settle(timeout_s, insist=True)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=1.0)
        with self._lock:
            kept, lost = self._kept, self._dropped + self._points
        if kept and self._spool is not None:
            log.warning(
                "MLflow at %s did not take %d metric values; they are kept in %s "
                "and are sent when the run is started again",
                self._config.address,
                kept,
                self._spool.url,
            )
        if lost:
            log.warning("%d metric values could neither be sent to MLflow nor kept", lost)
        return kept + lost

    def _settle(self, timeout_s: float, insist: bool) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._idle:
            while self._unsettled() and time.monotonic() < deadline:
                if self._away and not insist:
                    break
                self._wake.set()
                self._idle.wait(min(0.5, max(0.0, deadline - time.monotonic())))
            delivered = not self._unsettled()
        if not delivered:
            self._spill()
        return delivered

    def _unsettled(self) -> bool:
        return bool(self._rows or self._segments) or (self._spool is not None and not self._listed)

    # The thread.

    def _run(self) -> None:
        pause = self._config.flush_s
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._measure()
                self._deliver()
                self._away, pause = False, self._config.flush_s
                if self._warned:
                    log.warning(
                        "MLflow at %s answers again; buffered metrics were sent", self._config.address
                    )
                    self._warned = False
            except Exception as error:  # noqa: BLE001 - must not end a training; it is reported
                self._away, pause = True, min(2 * pause, _LONGEST_PAUSE_S)
                if not self._warned:
                    log.warning(
                        "MLflow at %s cannot be used (%s); metrics are buffered, the training goes on",
                        self._config.address,
                        one_line(error),
                    )
                    self._warned = True
                if self._points > self._config.buffered // 2:
                    self._spill()
            with self._idle:
                self._idle.notify_all()
            if self._stop.is_set():
                return

    def _deliver(self) -> None:
        with self._sending:
            client = self._connected()
            while True:
                with self._lock:
                    # Looked at again before each batch: a spill during a slow request makes a segment, and
                    # that is older than what is in memory by now.
                    segment = self._segments[0] if self._segments else None
                    rows = [] if segment else self._next_rows()
                if segment is not None:
                    self._send(client, self._read_segment(segment))
                    assert self._spool is not None
                    self._spool.delete(segment)
                    with self._lock:
                        self._segments.remove(segment)
                        if not self._segments:
                            self._kept = 0
                elif rows:
                    self._send(client, rows)
                    self._forget(rows)
                else:
                    return

    def _next_rows(self) -> list[_Row]:
        rows: list[_Row] = []
        points = 0
        for row in self._rows:
            if rows and points + len(row.metrics) > _BATCH:
                break
            rows.append(row)
            points += len(row.metrics)
        return rows

    def _forget(self, rows: list[_Row]) -> None:
        """Takes rows from memory, if they are still there: log() and _spill() may have taken them
        meanwhile.
        """
        with self._lock:
            for row in rows:
                if self._rows and self._rows[0] is row:
                    self._rows.popleft()
                    self._points -= len(row.metrics)

    def _connected(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        client = connect(self._config)
        if self._run_id is None:
            self._run_id = find_run(client, self._config, self._key)
            if self._run_id is None:
                raise LookupError("the driver has not been able to make the run yet")
        # `latest` of a metric is the one at the highest step: what must not be sent again.
        for metric in client.get_run(self._run_id).to_proto().data.metrics:
            self._last[metric.key] = max(metric.step, self._last.get(metric.key, metric.step))
        if not self._listed and self._spool is not None:
            found = {file.path for file in self._spool.list() if file.path.endswith(".jsonl")}
            with self._lock:
                self._segments = sorted(found | set(self._segments))
        self._listed = True
        self._client = client
        return client

    def _send(self, client: MlflowClient, rows: list[_Row]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, row.timestamp, row.step)
            for row in rows
            for name, value in ((_NAME.sub("_", key)[:250], value) for key, value in row.metrics.items())
            if row.step > self._last.get(name, -1)
        ]
        for start in range(0, len(metrics), _BATCH):
            part = metrics[start : start + _BATCH]
            try:
                client.log_batch(self._run_id, metrics=part)
            except Exception as error:
                if not is_permanent(error):
                    raise
                if not self._dropped:  # the number of all of them is told at the end
                    log.warning("MLflow refused %d metric values: %s", len(part), one_line(error))
                self._dropped += len(part)
        for metric in metrics:
            self._last[metric.key] = max(metric.step, self._last.get(metric.key, -1))

    def _measure(self) -> None:
        now = time.monotonic()
        with self._lock:
            step = self._newest_step
        if now - self._measured < self._config.system_s or step < 0:
            return
        self._measured = now
        self.log(step, memory_metrics())

    # The spool.

    def _spill(self) -> None:
        """Moves what is in memory to a segment in storage; it is sent from there later."""
        if self._spool is None:
            return
        # The sender may hold its lock through a request that hangs; then rows it is just sending are kept
        # too, which costs a second sending (recognised by the store), not a loss.
        held = self._sending.acquire(timeout=1.0)
        try:
            with self._lock:
                rows = list(self._rows)
                self._spilling, self._slipped = {id(row) for row in rows}, 0
            if not rows:
                return
            # Sorted by name, as they are sent: by the clock, which may be set back, a later step could come first, and
            # those before it would then be passed over.
            steps = [row.step for row in rows]
            name = f"{min(steps):012d}-{max(steps):012d}-{uuid.uuid4().hex[:8]}.jsonl"
            text = "".join(json.dumps(row) + "\n" for row in rows)
            try:
                self._spool.write_bytes(name, text.encode())
            except Exception as error:  # noqa: BLE001 - rows stay in memory; a training must not end for this
                log.warning("metrics could not be kept in %s: %s", self._spool.url, one_line(error))
                with self._lock:
                    self._dropped += self._slipped
                return
            with self._lock:
                self._segments = sorted([*self._segments, name])
                self._kept += sum(len(row.metrics) for row in rows)
            self._forget(rows)
        finally:
            with self._lock:
                self._spilling = set()
            if held:
                self._sending.release()

    def _read_segment(self, name: str) -> list[_Row]:
        assert self._spool is not None
        try:
            lines = self._spool.read_bytes(name).decode().splitlines()
            return [_Row(step, timestamp, metrics) for step, timestamp, metrics in map(json.loads, lines)]
        except FileNotFoundError:  # sent by another life of this process
            return []
        except ValueError as error:
            log.warning(
                "metrics in %s cannot be read and are passed over: %s", self._spool.url_of(name), error
            )
            return []
