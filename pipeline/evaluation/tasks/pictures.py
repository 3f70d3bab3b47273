"""The images that annotations name: their addresses, reading them ahead, and counting those that cannot be read."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from sharding.errors import BadData, BadDataLimit, UserError
from sharding.sources.base import reading

if TYPE_CHECKING:
    import numpy as np

    from sharding.storage import Storage

log = logging.getLogger("pipeline.evaluation")

Item = TypeVar("Item")
Fitted = TypeVar("Fitted")

# No image of a data set is as large; what is must not fill the memory before its header can be read.
_MAX_BYTES = 256 << 20
# Enough to hide a storage's latency; decoding in them takes the cores that a pass leaves idle.
_READERS = 4
# Images of the last items that are still at hand: the questions about an image follow each other.
_KEPT = 32


class ImageAddress(NamedTuple):
    """Where an image lies: ``folder`` as the task's block names it, ``path`` below it."""

    folder: str
    path: str


class ImageReader:
    """Reads images of any number of folders.

    Args:
        storage: the job's; folders are resolved against it. May be pickled to loader processes.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._folders: dict[str, Storage] = {}

    def url_of(self, image: ImageAddress) -> str:
        """For people."""
        return self._folder(image).url_of(image.path)

    def read(self, image: ImageAddress) -> bytes:
        """The file as it is.

        Raises:
            BadData: ``missing-image``, ``too-large`` (bytes), ``bad-address``, or why the store does not give this
                one: ``archived``, ``access-denied``, ``unreadable-file``, ...
            UserError: what concerns all images: wrong credentials.
        """
        folder = self._folder(image)
        try:
            url = folder.url_of(image.path)
        except UserError as error:  # it leads out of the folder
            raise BadData("bad-address", str(error)) from None
        try:
            with reading(url):
                data = folder.read_bytes(image.path, length=_MAX_BYTES + 1)
        except FileNotFoundError:
            raise BadData("missing-image", f"there is no {url}") from None
        if len(data) > _MAX_BYTES:
            raise BadData("too-large", f"{folder.url_of(image.path)} has more than {_MAX_BYTES >> 20} MiB")
        return data

    def pixels(self, image: ImageAddress) -> np.ndarray:
        """uint8 [height, width, 3].

        Raises:
            BadData: as :meth:`read`; ``decode-failed`` or ``too-many-pixels``, naming the image.
        """
        from sharding.decoding import decode_image

        data = self.read(image)
        try:
            return decode_image(data)
        except BadData as error:
            raise BadData(error.cause, f"{self.url_of(image)}: {error.detail}") from None

    def _folder(self, image: ImageAddress) -> Storage:
        if image.folder not in self._folders:
            self._folders[image.folder] = self._storage.resolve(image.folder)
        return self._folders[image.folder]


class Skipped:
    """Counts what cannot be read, by cause, and ends an evaluation that has too much of it.

    Args:
        task: its name, for messages.
        total: items that are to be read.
        limit: share of them that may be unreadable.
    """

    def __init__(self, task: str, total: int, limit: float) -> None:
        self._task, self._total, self._limit = task, total, limit
        self._causes: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self._causes.values())

    def note(self, error: BadData) -> None:
        """One more.

        Raises:
            BadDataLimit: that is too many.
        """
        self._causes[error.cause] += 1
        log.warning("evaluation %s passes over a sample: %s", self._task, error)
        if self.count > self._limit * self._total:
            causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(self._causes.items()))
            raise BadDataLimit(
                f"evaluation {self._task!r}: more than {self._limit:.1%} of {self._total} samples cannot be read "
                f"({causes}), the last: {error.detail}"
            )


class ReadAhead(Generic[Item, Fitted]):
    """The images of items in the order of the items, read and fitted by threads in advance.

    Args:
        fit: from an image's address to what the model takes; run in threads; raises BadData.
        addresses: the images of an item.
        ahead: items that are read in advance, one at least.
        skipped: where items with an image that cannot be read are counted.
    """

    def __init__(
        self,
        fit: Callable[[ImageAddress], Fitted],
        addresses: Callable[[Item], Sequence[ImageAddress]],
        ahead: int,
        skipped: Skipped,
    ) -> None:
        self._fit, self._addresses = fit, addresses
        self._ahead, self._skipped = ahead, skipped
        self._images: OrderedDict[ImageAddress, Future[Fitted]] = OrderedDict()

    def over(self, items: Iterable[Item]) -> Iterator[tuple[Item, list[Fitted]]]:
        """Each item whose images can be read, with them.

        Raises:
            BadDataLimit: see :class:`Skipped`.
        """
        waiting: deque[tuple[Item, list[Future[Fitted]]]] = deque()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="images") as pool:
            try:
                for item in items:
                    waiting.append((item, [self._image(pool, address) for address in self._addresses(item)]))
                    if len(waiting) > self._ahead:
                        yield from self._ready(*waiting.popleft())
                while waiting:
                    yield from self._ready(*waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _image(self, pool: ThreadPoolExecutor, address: ImageAddress) -> Future[Fitted]:
        if address not in self._images:
            self._images[address] = pool.submit(self._fit, address)
            if len(self._images) > self._ahead + _KEPT:
                self._images.popitem(last=False)
        self._images.move_to_end(address)
        return self._images[address]

    def _ready(self, item: Item, images: list[Future[Fitted]]) -> Iterator[tuple[Item, list[Fitted]]]:
        try:
            fitted = [image.result() for image in images]
        except BadData as error:
            self._skipped.note(error)
            return
        yield item, fitted
