"""Where samples come from: one small class for each kind.

Light to import: a kind's own module, and the libraries it needs, come with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharding.sources.base import Input, Source

if TYPE_CHECKING:
    from sharding.config import PrepareConfig
    from sharding.sources.fetch import Fetcher
    from sharding.storage import Storage

__all__ = ["Input", "Source", "open_fetcher", "open_source"]


def open_source(config: PrepareConfig, storage: Storage) -> Source:
    """The configured source; ``storage`` lends its S3 options, not its place."""
    from sharding.sources.caption_files import CocoListing, KarpathyListing
    from sharding.sources.folder import FolderListing
    from sharding.sources.huggingface import HuggingFaceListing
    from sharding.sources.scenes import ScenesListing
    from sharding.sources.table import TableListing
    from sharding.sources.tars import WebDatasetListing
    from sharding.sources.video_lists import LsmdcListing, MsrVttListing

    source = config.source
    match source.kind:
        case "folder":
            return FolderListing(source, config.input_modality, storage)
        case "table":
            return TableListing(source, storage)
        case "coco":
            return CocoListing(source, storage)
        case "karpathy":
            return KarpathyListing(source, storage)
        case "msrvtt":
            return MsrVttListing(source, storage)
        case "lsmdc":
            return LsmdcListing(source, storage)
        case "webdataset":
            return WebDatasetListing(source, config.input_modality, storage)
        case "huggingface":
            return HuggingFaceListing(source)
        case "scenes":
            return ScenesListing(source, config.input_modality, storage)


def open_fetcher(config: PrepareConfig, storage: Storage, base: str) -> Fetcher:
    """What reads the media that the configured source listed.

    Args:
        storage: lends its S3 options.
        base: the source's ``base`` when it was listed.
    """
    from sharding.sources.fetch import Fetcher

    return Fetcher(storage, base, config.source, config.fetch, int(config.max_source_mb * 2**20))
