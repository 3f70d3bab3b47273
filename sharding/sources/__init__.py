"""Where samples come from: one small class for each kind."""

from sharding.config import FolderSource, PrepareConfig
from sharding.sources.base import Input, Source
from sharding.sources.folder import FolderListing
from sharding.sources.table import TableListing
from sharding.storage import Storage

__all__ = ["Input", "Source", "open_source"]


def open_source(config: PrepareConfig, storage: Storage) -> Source:
    """The configured source; ``storage`` lends its S3 options, not its place."""
    if isinstance(config.source, FolderSource):
        return FolderListing(config.source, config.input_modality, storage)
    return TableListing(config.source, storage)
