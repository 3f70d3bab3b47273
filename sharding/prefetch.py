"""Shards on their way into the cache before anybody asks for them.

The order of samples is known in advance, so the shards of the batches to come are, too. A process of its own
fetches them, several at once, the most urgent first, and leases them until their batch is past; downloads then
cost neither the training nor the loader processes any time. Readers without ``fetches`` read by range what is not
there yet::

    plan, a set of shards a batch:  {4, 9} {4, 9} {4, 7} {4, 7} {2, 7} ...
    handed out                        ^ here                                        at most ``behind`` batches
    leased                          4 9 | fetched next: 7, then 2, ... up to the byte limit    back to here
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection

from sharding.cache import ShardCache
from sharding.errors import BadData, UserError
from sharding.forkserver import forkserver
from sharding.manifest import Manifest, ShardRecord
from sharding.storage import Storage

_log = logging.getLogger(__name__)

Need = tuple[str, int]  # name of a dataset, number of a shard in it

_AHEAD = 512  # batches of the plan that are looked into
_AT_ONCE = 64  # batches sent before the first is handed out; the rest follows in small pieces
_DOWNLOADS = 4
_AGAIN_S = 10.0  # until a shard that could not be fetched is tried again
_FATE_UNKNOWN = 255  # multiprocessing's exit code where the fork server went with the process


class Prefetcher:
    """Fetches the shards of a plan into the cache, in a process of its own that ends with this one.

    Nothing that goes wrong with a shard stops it: whoever reads the shard finds the same fault and names it.

    Args:
        cache: shared by the readers of this machine.
        datasets: folder and manifest of each dataset, by the names that the plan uses.
        plan: the shards of each batch, in order.
        byte_limit: of the shards of the plan that are in the cache at a time; several prefetchers of a machine
            share the cache's limit.
        behind: how many batches are being read at most while the next is handed out.
    """

    def __init__(
        self,
        cache: ShardCache,
        datasets: Mapping[str, tuple[Storage, Manifest]],
        plan: Iterator[frozenset[Need]],
        *,
        byte_limit: int,
        behind: int,
    ) -> None:
        self._plan = plan
        self._sent = self._handed_out = 0
        # Not a fork: the threads of a training, and s3fs's, do not survive one.
        context = forkserver()
        receiver, self._sender = context.Pipe(duplex=False)
        shards = {name: (storage, manifest.shards) for name, (storage, manifest) in datasets.items()}
        self._process = context.Process(
            target=_serve,
            args=(receiver, cache, shards, byte_limit, behind),
            name="prefetch",
            daemon=True,
        )
        self._process.start()
        receiver.close()
        self._look_ahead(_AT_ONCE)

    def advance(self) -> None:
        """Say that the next batch is handed out.

        Raises:
            RuntimeError: the process has died, by a bug or because it was killed; the message says which.
        """
        self._look_ahead(min(self._sent + 8, self._handed_out + _AHEAD))
        self._handed_out += 1
        self._send(None)

    def close(self) -> None:
        """End the process. What it leased may be evicted from now on."""
        self._sender.close()
        self._process.join(1)
        if self._process.is_alive():  # within a download, which leaves nothing behind
            self._process.kill()
            self._process.join()

    def _look_ahead(self, until: int) -> None:
        while self._sent < until:
            needs = next(self._plan, None)
            if needs is None:
                return
            self._send(needs)
            self._sent += 1

    def _send(self, message: frozenset[Need] | None) -> None:
        try:
            self._sender.send(message)
        except OSError:
            self._process.join(5)
            code = self._process.exitcode
            if code is not None and (code < 0 or code == _FATE_UNKNOWN):
                raise RuntimeError(f"the prefetching process was killed (exit code {code})") from None
            raise RuntimeError(f"the prefetching process failed (exit code {code}), see its output") from None


class _Fetcher:
    """The process's work: what is wanted, what is leased, and threads that turn the one into the other."""

    def __init__(
        self,
        cache: ShardCache,
        shards: dict[str, tuple[Storage, list[ShardRecord]]],
        byte_limit: int,
        behind: int,
    ) -> None:
        self._cache, self._shards = cache, shards
        self._byte_limit, self._behind = byte_limit, behind
        self._batches: deque[frozenset[Need]] = deque()  # planned and not yet past
        self._first = self._handed_out = 0  # number of the first of them; of batches handed out
        self._uses: Counter[Need] = Counter()  # planned batches of each shard
        self._leases: dict[Need, list[int]] = {}
        self._busy: set[Need] = set()
        self._not_before: dict[Need, float] = {}
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def plan(self, needs: frozenset[Need]) -> None:
        """One more batch."""
        with self._changed:
            self._batches.append(needs)
            self._uses.update(needs)
            self._changed.notify_all()

    def advance(self) -> None:
        """The next batch is handed out, and the one ``behind`` before it is past."""
        with self._changed:
            self._handed_out += 1
            while self._batches and self._first < self._handed_out - 1 - self._behind:
                self._first += 1
                for need in self._batches.popleft():
                    self._uses[need] -= 1
                    if not self._uses[need]:
                        del self._uses[need]
                        self._not_before.pop(need, None)
                        _close(self._leases.pop(need, []))
            self._changed.notify_all()

    def work(self) -> None:
        """Fetch for ever. A bug ends it, and is kept in ``error``."""
        try:
            while True:
                with self._changed:
                    while (need := self._most_urgent()) is None:
                        self._changed.wait(_AGAIN_S / 10)
                    self._busy.add(need)
                again_s = _AGAIN_S
                try:
                    leases = self._fetch(need)
                except (BadData, FileNotFoundError) as error:
                    _log.warning("not fetched ahead: %s", error)
                    leases, again_s = [], math.inf
                except (UserError, OSError) as error:  # the store, or the disk of the cache
                    _log.warning("not fetched ahead, tried again in %.0f s: %s", again_s, error)
                    leases = []
                with self._changed:
                    self._busy.discard(need)
                    if need not in self._uses:
                        _close(leases)  # too late
                    elif leases:
                        self._leases[need] = leases
                    else:
                        self._not_before[need] = time.monotonic() + again_s
        except BaseException as error:
            self.error = error
            raise

    def _most_urgent(self) -> Need | None:
        """The shard to be fetched next. Lets go of those that have no room before others are needed.

        A shard may be read now and once more at the end of the epoch, where a lane of it begins or ends: held until
        then it would take the room of what comes between.
        """
        room, now = self._byte_limit, time.monotonic()
        near: set[Need] = set()
        urgent: Need | None = None
        for need in self._by_next_use():
            room -= self._size(need)
            if room < 0:
                break
            near.add(need)
            is_had = need in self._leases or need in self._busy
            if urgent is None and not is_had and self._not_before.get(need, 0.0) <= now:
                urgent = need
        for need in self._leases.keys() - near:
            _close(self._leases.pop(need))
        return urgent

    def _by_next_use(self) -> Iterator[Need]:
        """The shards of the plan, those of the earliest batch first."""
        seen: set[Need] = set()
        for needs in self._batches:
            yield from sorted(needs - seen)
            seen |= needs

    def _size(self, need: Need) -> int:
        record = self._record(need)
        return record.bytes + record.index_bytes

    def _record(self, need: Need) -> ShardRecord:
        name, shard = need
        return self._shards[name][1][shard]

    def _fetch(self, need: Need) -> list[int]:
        """Leases of the shard's index and tar; none if the cache has no room for them now."""
        storage, record = self._shards[need[0]][0], self._record(need)
        with contextlib.ExitStack() as undo:
            leases: list[int] = []
            undo.callback(_close, leases)
            for path, size, sha256 in (
                (record.index, record.index_bytes, record.index_sha256),
                (record.tar, record.bytes, record.sha256),
            ):
                descriptor = self._cache.open(storage, path, size=size, sha256=sha256)
                if descriptor is None:
                    return []
                leases.append(descriptor)
            undo.pop_all()
        return leases


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _serve(
    receiver: Connection,
    cache: ShardCache,
    shards: dict[str, tuple[Storage, list[ShardRecord]]],
    byte_limit: int,
    behind: int,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its parent does, by the end of the pipe
    fetcher = _Fetcher(cache, shards, byte_limit, behind)
    for number in range(_DOWNLOADS):
        threading.Thread(target=fetcher.work, name=f"fetch-{number}", daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            message = receiver.recv()
            if message is None:
                fetcher.advance()
            else:
                fetcher.plan(message)
            if fetcher.error is not None:
                raise fetcher.error
