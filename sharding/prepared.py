"""A dataset that is there already, named in a job's file in place of a source.

``birds: {prepared: s3://bucket/folder, modality: image}`` is a dataset that ``glscl prepare`` or ``glscl shards merge``
made, of this job or another, or a folder of another program's WebDataset tars, which is then indexed
(``sharding.foreign``). Light to import.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sharding.errors import UserError
from sharding.given_path import GivenPath
from sharding.manifest import Manifest, Modality
from sharding.storage import Storage, normalise_url


class PreparedConfig(BaseModel):
    """Shards that exist. Nothing is written to their folder but, where they have none, an index and a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepared: GivenPath = Field(
        description="folder, file:// or s3:// url of a dataset or of a folder of WebDataset tars; the S3 options are "
        "those of the storage"
    )
    modality: Modality
    caption_field: str = Field(
        default="caption",
        min_length=1,
        description="of the JSON in another program's tars; else their text is used",
    )
    bad_limit: float = Field(
        default=0.1, ge=0, le=1, description="share of another program's samples that may be unusable"
    )

    @field_validator("prepared")
    @classmethod
    def _absolute(cls, url: str) -> str:
        return normalise_url(url)


def open_prepared(
    name: str,
    config: PreparedConfig,
    storage: Storage,
    *,
    jobs: int,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """The manifest of existing shards; another program's are indexed first.

    Args:
        storage: the job's, whose S3 options serve.
        jobs: tars indexed at a time.
        progress: called with (number done, number of tars) while indexing.

    Raises:
        UserError: there is no dataset and no tar, or it is of another modality.
        BadData, BadDataLimit: as ``sharding.foreign.index_shards``.
    """
    from sharding.foreign import index_shards

    dataset = storage.resolve(config.prepared)
    manifest = index_shards(
        dataset,
        config.modality,
        name=name,
        caption_field=config.caption_field,
        bad_limit=config.bad_limit,
        jobs=jobs,
        progress=None if progress is None else lambda done, total, _: progress(done, total),
    )
    if manifest.modality != config.modality:
        raise UserError(
            f"datasets.{name}.modality: got {config.modality}, but {dataset.url} is of modality {manifest.modality}"
        )
    return manifest
