"""Opening sources as the preparation does, for the tests."""

import hashlib
from pathlib import Path
from typing import Any

from sharding.config import PrepareConfig
from sharding.sources import Input, Source, open_fetcher, open_source
from sharding.sources.fetch import Fetched
from sharding.storage import Storage, open_storage


def configured(modality: str = "image", fetch: dict[str, Any] | None = None, **source: Any) -> PrepareConfig:
    """The configuration of a dataset with this source."""
    return PrepareConfig.model_validate({"source": source, "modality": modality, "fetch": fetch or {}})


def source(path: Path, storage: Storage | None = None, modality: str = "image", **options: Any) -> Source:
    """The source at a path."""
    config = configured(modality, path=str(path), **options)
    return open_source(config, storage or open_storage(path if path.is_dir() else path.parent))


def listed(source: Source) -> tuple[list[Input], str]:
    """All inputs and the digest of the listing."""
    hasher = hashlib.sha256()
    return list(source.inputs(hasher)), hasher.hexdigest()


def fetched(config: PrepareConfig, storage: Storage) -> list[Fetched]:
    """All inputs of the configured source, read as a task reads them."""
    opened = open_source(config, storage)
    inputs, _ = listed(opened)
    return list(open_fetcher(config, storage, opened.base).fetch_all(inputs))
