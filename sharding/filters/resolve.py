"""What a configuration's filters refer to, read once before any work starts, so that it names the dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharding.errors import UserError
from sharding.filters.config import BlockedWordsFilter, FilterConfig, ScoreFilter

if TYPE_CHECKING:
    from sharding.config import PrepareConfig
    from sharding.scoring import Scorers
    from sharding.storage import Storage

_MAX_LIST_BYTES = 2**20


def resolved(config: PrepareConfig, storage: Storage, scorers: Scorers) -> PrepareConfig:
    """The configuration with word lists in place of their files, and digests in place of models' addresses.

    Args:
        storage: lends its S3 options.

    Raises:
        UserError: a list is missing, empty, too large or not UTF-8; a scorer is missing or has other weights.
    """
    filters = [_resolved(block, storage, scorers) for block in config.filters]
    return config.model_copy(update={"filters": filters})


def _resolved(block: FilterConfig, storage: Storage, scorers: Scorers) -> FilterConfig:
    if isinstance(block, BlockedWordsFilter) and block.path is not None:
        return block.model_copy(update={"words": _words(block.path, storage), "path": None})
    if isinstance(block, ScoreFilter):
        from sharding.scoring import with_weights

        return with_weights(block, scorers)
    return block


def _words(url: str, storage: Storage) -> list[str]:
    local = storage.resolve(url).local_path("")
    folder, name = (str(local.parent), local.name) if local is not None else url.rsplit("/", 1)
    try:
        data = storage.resolve(folder).read_bytes(name, length=_MAX_LIST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"filters: the list of blocked words {url} does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(
            f"filters: the list of blocked words {url} cannot be read: {error.strerror}"
        ) from None
    if len(data) > _MAX_LIST_BYTES:
        raise UserError(
            f"filters: the list of blocked words {url} is larger than {_MAX_LIST_BYTES >> 20} MiB"
        )
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"filters: the list of blocked words {url} is not UTF-8: {error.reason}") from None
    words = sorted({line for line in lines if line and not line.startswith("#")})
    if not words:
        raise UserError(f"filters: the list of blocked words {url} has no entry")
    return words
