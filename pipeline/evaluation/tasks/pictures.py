"""The images that annotations name: their addresses, and reading them one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sharding.errors import BadData, UserError

if TYPE_CHECKING:
    import numpy as np

    from sharding.storage import Storage

# No image of a data set is as large; what is must not fill the memory before its header can be read.
_MAX_BYTES = 256 << 20


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
            BadData: ``missing-image``, ``too-large`` (bytes), or ``bad-address``.
        """
        folder = self._folder(image)
        try:
            data = folder.read_bytes(image.path, length=_MAX_BYTES + 1)
        except FileNotFoundError:
            raise BadData("missing-image", f"there is no {folder.url_of(image.path)}") from None
        except UserError as error:
            raise BadData("bad-address", str(error)) from None
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
