"""Rows of datasets that Hugging Face ``datasets`` opens.

``datasets`` maps Arrow files into memory: a listing reads captions and the lengths of media, and a task the
media of its own rows, by number. Nothing is decoded by ``datasets``, and no code that comes with a dataset is
run: its version 5 has no loading scripts any more, and builders other than those below are refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sharding.errors import BadData, StorageFault, UserError
from sharding.names import Skipped, escape_name
from sharding.sources.addresses import remote_url
from sharding.sources.base import Hasher, Input, feed, reading, texts_of
from sharding.sources.config import HuggingFaceSource
from sharding.sources.grouping import group_key, grouped
from sharding.sources.rows import cells_of
from sharding.storage import open_storage

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = frozenset({"arrow", "csv", "imagefolder", "json", "parquet", "videofolder", "webdataset"})
_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes
_ROWS_AT_ONCE = 256

_opening = threading.Lock()


class HuggingFaceListing:
    """All rows of one split, in its order."""

    def __init__(self, config: HuggingFaceSource) -> None:
        self._config = config
        self.skipped = Skipped()  # datasets lists the files

    @property
    def base(self) -> str:
        """The folder's url, or ``hf://datasets/NAME@COMMIT``."""
        if self._config.path is not None:
            return self._config.path
        return f"hf://datasets/{self._config.hub}@{self._config.revision}"

    def inputs(self, hasher: Hasher) -> Iterator[Input]:
        """See ``Source``. Captions, and urls or names and sizes of media, identify the listing."""
        column = self._config.group_by
        for group in ([row] for _, row in self._rows()) if column is None else grouped(self._rows(), column):
            for name, size, item in self._merged(group):
                feed(hasher, name, size, item.captions, item.not_text, item.problem)
                yield item

    def _rows(self) -> Iterator[tuple[Any, list[Any]]]:
        """(what it is grouped by, [number, name, size, captions, captions that are no text, what its media are, why it
        is bad]) of each row. What media are matters where rows are brought together, and is None elsewhere.
        """
        config = self._config
        media = config.media_column or config.url_column
        texts = list(dict.fromkeys(config.caption_columns))
        columns = list(dict.fromkeys(filter(None, [media, *texts, config.group_by])))
        number = 0
        for batch in open_dataset(config).select_columns(columns).with_format("arrow").iter(_ROWS_AT_ONCE):
            cells = zip(*(cells_of(batch[column]) for column in texts), strict=True)
            found = _urls(batch[media]) if config.url_column else _names_and_sizes(config, batch[media])
            keys = cells_of(batch[config.group_by]) if config.group_by else itertools.repeat(None, len(batch))
            contents = (
                _contents(batch[media])
                if config.group_by and config.media_column
                else itertools.repeat(None, len(batch))
            )
            for (name, size), row, cell_of_key, content in zip(found, cells, keys, contents, strict=True):
                captions: list[str] = []
                not_text = 0
                for cell in row:
                    texts_of_cell, others = texts_of(cell)
                    captions += texts_of_cell
                    not_text += others
                key, reason = (
                    group_key(cell_of_key, config.group_by, media) if config.group_by else (None, "")
                )
                yield key, [number, name, size, captions, not_text, content, reason]
                number += 1

    def _merged(self, group: list[list[Any]]) -> Iterator[tuple[str | None, int | None, Input]]:
        """(name, size, input) of the rows of one sample, and of those among them that have no such media."""
        first: Input | None = None
        heads: tuple[Any, Any] = None, None
        place, same_as = 0, None
        others = []
        for number, name, size, captions, not_text, content, reason in group:
            item = self._input(number, name, size, captions, not_text)
            if first is not None and (content != same_as or item.media != first.media):
                reason = f"it has other media than row {place}, though {self._config.group_by!r} is the same"
            if item.problem is None and reason:
                item = Input(address=f"{self._config.split}/{number}", problem="bad-row", reason=reason)
            if item.problem is not None:
                others.append((name, size, item))
            elif first is None:
                first, heads, place, same_as = item, (name, size), number, content
            else:
                captions = first.captions + captions
                first = replace(first, captions=captions, not_text=first.not_text + not_text)
        if first is not None:
            yield *heads, first
        yield from others

    def _input(
        self, number: int, name: str | None, size: int | None, captions: list[str], not_text: int
    ) -> Input:
        place = f"{self._config.split}/{number}"
        if self._config.url_column is None:
            if name is None and size is None:
                return Input(address=place, problem="media-missing")
            return Input(address=place, captions=captions, not_text=not_text, size=size, row=number)
        address = (name or "").strip()
        if texts_of(address)[1]:
            return Input(address=place, problem="bad-address")
        try:
            return Input.at(remote_url(address), captions=captions, not_text=not_text)
        except BadData as fault:
            return Input(address=place, problem=fault.cause, reason=fault.detail)


class MediaRows:
    """The media of rows, by number; the dataset is opened once in a process."""

    def __init__(self, config: HuggingFaceSource) -> None:
        self._config = config

    def read(self, row: int, limit: int) -> bytes:
        """The undecoded media of one row.

        Raises:
            BadData: ``missing-file``, ``bad-address`` (a path outside the dataset), ``too-many-bytes``.
        """
        with _opening:  # of many threads one opens it
            rows = _media_rows(self._config.model_dump_json())
        cell = rows[row][self._config.media_column]
        data, path = (cell, None) if isinstance(cell, bytes) else (cell["bytes"], cell["path"])
        place = f"{self._config.split}/{row}"
        if data is None and path is None:
            raise BadData("media-missing", place)
        if data is None:
            data = self._file(place, path, limit)
        if len(data) > limit:
            raise BadData("too-many-bytes", f"{place}: more than {limit}")
        return bytes(data)

    def _file(self, place: str, path: Any, limit: int) -> bytes:
        file = _own_file(self._config, path)
        if file is None:
            raise BadData(
                "bad-address", f"{place} names {escape_name(str(path))}, which is outside the dataset"
            )
        name = f"{place}: {escape_name(str(path))}"
        try:
            with reading(name):
                return open_storage(file.parent).read_bytes(file.name, 0, limit + 1)
        except FileNotFoundError:
            raise BadData("missing-file", name) from None


def _own_file(config: HuggingFaceSource, path: Any) -> Path | None:
    """The file that a row names, where it is one of the dataset's own: in its folder, or where ``datasets`` and the
    hub keep what they fetched of it. Anyone may have written the row: it must not name other files of this machine.
    """
    from datasets import config as library
    from huggingface_hub import constants as hub

    if not isinstance(path, str) or "\0" in path:
        return None
    roots = [Path(library.HF_DATASETS_CACHE)]
    if config.path is not None:
        roots.append(_folder(config.path))
    if config.hub is not None:
        roots.append(Path(hub.HF_HUB_CACHE) / f"datasets--{config.hub.replace('/', '--')}")
    try:
        file = Path(path).resolve()
        return file if any(file.is_relative_to(root.resolve()) for root in roots) else None
    except (OSError, ValueError, RuntimeError):  # too long, or links in a circle
        return None


@functools.lru_cache(maxsize=4)
def _media_rows(configuration: str) -> Dataset:
    config = HuggingFaceSource.model_validate_json(configuration)
    return open_dataset(config).select_columns([config.media_column])


def open_dataset(config: HuggingFaceSource) -> Dataset:
    """The split, with its media column undecoded.

    Raises:
        UserError: there is no such dataset, split or column, or its kind is none that runs no code.
        StorageFault: the hub cannot be reached.
    """
    import datasets

    try:
        rows = _load(config)
    except ConnectionError as error:
        raise StorageFault(f"{config.hub or config.path}: {_line(error)}") from None
    except (datasets.exceptions.DatasetsError, FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f"cannot open {config.hub or config.path}: {_line(error)}") from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{config.hub or config.path} comes with code, which is not run: {_line(error)}"
        ) from None
    _check_columns(rows, config)
    feature = rows.features.get(config.media_column)
    if isinstance(feature, datasets.Image | datasets.Video):
        rows = rows.cast_column(config.media_column, type(feature)(decode=False))
    return rows


def _load(config: HuggingFaceSource) -> Dataset:
    import datasets

    folder = None if config.path is None else _folder(config.path)
    if folder is not None and any((folder / name).is_file() for name in _SAVED):
        try:
            found = datasets.load_from_disk(str(folder))
        except IndexError:  # what the library makes of no data files
            raise ValueError("it has no rows") from None
        if isinstance(found, datasets.Dataset):
            return found
        if config.split not in found:
            raise ValueError(f"no split {config.split!r}; it has {', '.join(found)}")
        return found[config.split]
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError("no such folder")
    if config.hub is not None and Path(config.hub).exists():
        # datasets would take it for what is asked for, at whatever state it is.
        raise ValueError(
            f"{Path(config.hub).absolute()} has the name of the hub's dataset: use source.path for it"
        )
    builder = datasets.load_dataset_builder(
        str(folder or config.hub), name=config.subset, revision=config.revision
    )
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _BUILDERS:
        raise ValueError(f"its files are of kind {kind}; supported are {', '.join(sorted(_BUILDERS))}")
    builder.download_and_prepare()
    return builder.as_dataset(split=config.split)


def _check_columns(rows: Dataset, config: HuggingFaceSource) -> None:
    import datasets

    for column in filter(
        None, (config.media_column, config.url_column, config.group_by, *config.caption_columns)
    ):
        if column not in rows.features:
            raise UserError(
                f"{config.hub or config.path} has no column {column!r}; it has {', '.join(sorted(rows.features))}"
            )
    if config.media_column is None:
        return
    feature = rows.features[config.media_column]
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if not binary and not isinstance(feature, datasets.Image | datasets.Video):
        raise UserError(
            f"column {config.media_column!r} of {config.hub or config.path} holds {feature}, not images, "
            "videos or binary: is it a url_column?"
        )


def _names_and_sizes(config: HuggingFaceSource, column: Any) -> Iterator[tuple[str | None, int | None]]:
    """(base name, bytes) of each cell; reads the lengths, not the media."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(column.type):
        yield from ((None, size) for size in pc.binary_length(column).to_pylist())
        return
    sizes = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
    for size, path in zip(sizes, cells_of(pc.struct_field(column, "path")), strict=True):
        path = path if isinstance(path, str) else None
        if size is None and path is not None:
            # The size of a file; a missing one, or one that is not the dataset's, is the task's to find.
            file = _own_file(config, path)
            with contextlib.suppress(OSError):
                size = file.stat().st_size if file is not None and file.is_file() else None
        yield None if path is None else Path(path).name, size


def _contents(column: Any) -> Iterator[str | None]:
    """What tells the media of the cells apart: a digest of the bytes; of a file its path."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(column.type):
        yield from map(_digest, column)
        return
    paths = cells_of(pc.struct_field(column, "path"))
    for data, path in zip(pc.struct_field(column, "bytes"), paths, strict=True):
        yield _digest(data) or (path if isinstance(path, str) else None)


def _digest(data: Any) -> str | None:
    buffer = data.as_buffer()
    return None if buffer is None else hashlib.sha256(buffer).hexdigest()


def _urls(column: Any) -> Iterator[tuple[str | None, None]]:
    for url in cells_of(column):
        yield url if isinstance(url, str) else None, None


def _folder(url: str) -> Path:
    return Path(unquote(urlsplit(url).path, errors="surrogateescape"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
