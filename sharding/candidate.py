"""One input on its way into a shard: captions, filters, encoding. Pure: bytes in, samples or a cause out.

Captions and filters are asked here; whatever touches the bytes of media happens in the decoding process
(``sharding.guard``).
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.filters.build import build_filters
from sharding.guard import Guard, Job, Part, shared_guard
from sharding.media.info import Encoded, MediaInfo
from sharding.sources.base import Input
from sharding.sources.fetch import Fetched
from sharding.sources.folder import parse_sidecar

# Inputs at the decoding process at once: enough that it never waits for this one, few enough to hold in memory with
# what is made of them.
_IN_FLIGHT = 6
_IN_FLIGHT_OF_PARTS = 1
_BYTES_IN_FLIGHT = 64 * 2**20


@dataclass(frozen=True)
class Candidate:
    """A sample that passed the filters of single inputs.

    Args:
        sha256: of the input's bytes; where an input gives several samples, of that and the part, so that equal
            parts of equal files are equal, and the parts of one file are not.
        captions_dropped: the input's captions that are left out, by cause.
        part: which clip or frame of its input it is, counted from 0; ``None`` where an input gives one sample.
    """

    media: Encoded
    captions: list[str]
    sha256: str
    source: str
    captions_dropped: dict[str, int] = field(default_factory=dict)
    part: int | None = None


@dataclass(frozen=True)
class Examined:
    """What one input gives: samples, and why its other parts, if any, were dropped."""

    candidates: list[Candidate]
    faults: list[BadData] = field(default_factory=list)

    @property
    def dropped(self) -> Counter[str]:
        """Parts by the cause of their dropping."""
        return Counter(fault.cause for fault in self.faults)


@dataclass(frozen=True)
class _Pending:
    """An input whose captions passed, at the decoding process."""

    job: Job
    captions: list[str]
    captions_dropped: dict[str, int]
    sha256: str
    source: str
    size: int


class Examiner:
    """Makes candidates by one dataset's configuration. The decoding process is kept for the next examiner."""

    def __init__(self, config: PrepareConfig) -> None:
        self._filters = build_filters(config.filters)
        self._in_parts = config.gives_parts
        # An image's header says nothing that its decoding does not say too.
        self._asks_headers = bool(self._filters.header) or config.input_modality == "video"
        self._in_flight = _IN_FLIGHT_OF_PARTS if config.gives_parts else _IN_FLIGHT
        self._guard: Guard = shared_guard(
            "sharding.media.worker:MediaDecoder",
            {
                "image": config.picture.model_dump(mode="json") if config.modality == "image" else None,
                "video": config.clip.model_dump(mode="json") if config.modality == "video" else None,
            },
            timeout_s=config.decode_timeout,
            memory_mb=config.decode_memory_mb,
        )

    @property
    def decoding_process(self) -> int | None:
        """Its id, while there is one."""
        return self._guard.pid

    def examine(self, fetched: Fetched) -> Examined:
        """What a fetched input gives. The cheap questions come first: captions, header, pixels.

        Raises:
            BadData: the whole input is broken or filtered out; the cause says why.
        """
        ((_, examined),) = self.examine_all([fetched])
        if isinstance(examined, BadData):
            raise examined
        return examined

    def examine_all(self, inputs: Iterable[Fetched]) -> Iterator[tuple[Input, Examined | BadData]]:
        """``examine`` for many inputs, in their order; a few are decoded ahead while this one is used.

        At most 6 inputs are at the decoding process beside the one that is waited for (one, where an input gives
        several samples), and no more than 64 MiB of them (but one, if it is larger).
        """
        pending: deque[tuple[Input, _Pending | BadData]] = deque()
        size = 0
        try:
            for fetched in inputs:
                item = self._begin(fetched)
                size += _size(item)
                pending.append((fetched.input, item))
                while len(pending) > self._in_flight or (size > _BYTES_IN_FLIGHT and len(pending) > 1):
                    size -= _size(pending[0][1])
                    yield self._end(*pending.popleft())
            while pending:
                yield self._end(*pending.popleft())
        finally:
            if (
                self._guard.busy
            ):  # an error, or a caller that stopped: what is on its way is not wanted any more
                self._guard.close()

    def _begin(self, fetched: Fetched) -> _Pending | BadData:
        """Ask for what needs no pixels, and send the input to the decoding process."""
        try:
            if fetched.fault is not None:
                raise fetched.fault
            if not fetched.media:
                raise BadData("decode-failed", "the file is empty")
            captions, dropped = self._captions(fetched)
        except BadData as fault:
            return fault
        job = self._guard.submit(fetched.media, self._header_passes if self._asks_headers else None)
        digest = hashlib.sha256(fetched.media).hexdigest()
        return _Pending(job, captions, dropped, digest, fetched.input.address, len(fetched.media))

    def _header_passes(self, facts: dict[str, Any]) -> None:
        self._filters.check_header(MediaInfo.of(facts))

    def _end(self, item: Input, pending: _Pending | BadData) -> tuple[Input, Examined | BadData]:
        """Wait for the decoding process, and ask the filters of what is stored."""
        if isinstance(pending, BadData):
            return item, pending
        try:
            return item, self._examined(pending, self._guard.result(pending.job))
        except BadData as fault:
            return item, fault

    def _examined(self, pending: _Pending, parts: list[Part]) -> Examined:
        candidates: list[Candidate] = []
        faults: list[BadData] = []
        for number, (facts, data) in enumerate(parts):
            try:
                candidates.append(self._candidate(pending, number, facts, data))
            except BadData as fault:
                if not self._in_parts:
                    raise
                faults.append(fault)
        return Examined(candidates, faults)

    def _candidate(self, pending: _Pending, number: int, facts: dict[str, Any], data: bytes) -> Candidate:
        if "cause" in facts:
            raise BadData(str(facts["cause"]), str(facts["detail"]))
        media = Encoded.of(facts, data)
        self._filters.check_stored(media, pending.captions)
        digest, part = pending.sha256, None
        if self._in_parts:
            digest, part = hashlib.sha256(f"{digest} {number}".encode()).hexdigest(), number
        return Candidate(media, pending.captions, digest, pending.source, pending.captions_dropped, part)

    def _captions(self, fetched: Fetched) -> tuple[list[str], dict[str, int]]:
        texts, not_text = fetched.input.captions, fetched.input.not_text
        if fetched.sidecar is not None and fetched.input.sidecar is not None:
            texts, not_text = parse_sidecar(fetched.sidecar, fetched.input.sidecar.path)
        dropped = Counter({"caption-not-text": not_text} if not_text else {})
        kept: list[str] = []
        captions = [" ".join(text.split()) for text in texts]
        self._filters.check_texts(captions)
        for caption in captions:
            cause = self._filters.objection(caption)
            if cause is not None:
                dropped[cause] += 1
            elif caption not in kept:
                kept.append(caption)
        if not kept:
            cause = next(iter(dropped), "caption-empty")
            where = f" ({fetched.input.reason})" if fetched.input.reason else ""
            raise BadData(cause, f"none of {len(texts) + not_text} captions can be used{where}")
        return kept, dict(sorted(dropped.items()))


def _size(item: _Pending | BadData) -> int:
    return item.size if isinstance(item, _Pending) else 0
