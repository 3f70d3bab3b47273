"""The manifest of a dataset: what its shards are, what was read, kept and dropped, and what made it.

A dataset is a folder of the job's storage::

    plan.json            how the input was cut into tasks, written before any work starts
    work/                lists of inputs, one a task, and staged shards; gone when the dataset is whole
    000000.tar           a plain WebDataset shard
    000000.parquet       its index (sharding/index.py)
    commits/000000.json  the commit record of a task: the shard exists when this does
    report.html          what was kept and dropped, for people (sharding/report_page.py)
    manifest.json        written last: the dataset exists when this does

Dropping samples later never rewrites a tar: ``dropped_keys`` is an overlay over the shards.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sharding.errors import UserError

if TYPE_CHECKING:
    from sharding.storage import Storage

MANIFEST_PATH = "manifest.json"
REPORT_PATH = "report.html"

Modality = Literal["image", "video"]


def canonical_digest(value: Any) -> str:
    """sha256 (64 hex digits) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ShardRecord(BaseModel):
    """One shard: ``NAME.tar`` with ``samples`` samples, and its index ``NAME.parquet``. Sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    index_bytes: int = Field(gt=0)
    index_sha256: str

    @property
    def tar(self) -> str:
        """Path of the tar relative to the dataset."""
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        """Path of the Parquet index relative to the dataset."""
        return f"{self.name}.parquet"


class Counts(BaseModel):
    """What happened to the samples: ``read == kept + sum(dropped.values())``.

    ``inputs`` counts what was read from the source; ``read`` what that gave, which is more where a video gives
    several clips or frames (an input that could not be used at all counts as one).
    ``dropped`` counts samples by cause; ``captions_dropped`` the single captions that were left out of
    samples which were kept for the sake of their other captions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: int = 0
    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    captions_dropped: dict[str, int] = Field(default_factory=dict)

    def plus(self, other: Counts) -> Counts:
        """The counts of both parts together, causes in alphabetical order."""
        return Counts(
            inputs=self.inputs + other.inputs,
            read=self.read + other.read,
            kept=self.kept + other.kept,
            dropped=_added(self.dropped, other.dropped),
            captions_dropped=_added(self.captions_dropped, other.captions_dropped),
        )


def _added(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {cause: left.get(cause, 0) + right.get(cause, 0) for cause in sorted({*left, *right})}


class Manifest(BaseModel):
    """The whole dataset. ``source`` holds the url, the number of inputs and the digest of their listing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["glscl-dataset"] = "glscl-dataset"
    version: Literal[1] = 1
    name: str
    modality: Modality
    configuration: dict[str, Any]
    configuration_digest: str
    source: dict[str, Any]
    shards: list[ShardRecord]
    counts: Counts
    dropped_keys: list[str] = Field(default_factory=list)

    @functools.cached_property
    def shards_digest(self) -> str:
        """sha256 (64 hex digits) of what the shards hold, hence of every byte of them, without the overlay.

        Not of how they were made or where from: the same corpus in another place, prepared the same way, has
        the same. The order of a training's samples follows it, so that a retraction leaves all others in their
        places, and a run goes on.
        """
        return canonical_digest(
            self.model_dump(mode="json", include={"format", "version", "modality", "shards"})
        )

    @functools.cached_property
    def digest(self) -> str:
        """sha256 (64 hex digits) that names the dataset: its shards, and what was retracted from them."""
        return canonical_digest({"shards": self.shards_digest, "dropped_keys": self.dropped_keys})

    def __reduce__(self) -> tuple[Any, ...]:
        # Loader processes get it pickled: as JSON several times faster than record by record.
        return Manifest.model_validate_json, (self.model_dump_json(),)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The manifest with other values; what was computed of the former ones does not go with it."""
        copied = super().model_copy(update=update, deep=deep)
        for computed in ("shards_digest", "digest", "samples"):
            copied.__dict__.pop(computed, None)
        return copied

    @functools.cached_property
    def samples(self) -> int:
        """Samples in the shards (those of the ``dropped_keys`` overlay included: they keep their slots)."""
        return sum(shard.samples for shard in self.shards)


def load_manifest(dataset: Storage) -> Manifest:
    """The manifest of the dataset in this folder.

    Raises:
        UserError: there is none, or it is not one this version can read; the message names the url.
    """
    url = dataset.url_of(MANIFEST_PATH)
    try:
        data = dataset.read_bytes(MANIFEST_PATH)
    except FileNotFoundError:
        raise UserError(
            f"no dataset at {dataset.url}: it has no {MANIFEST_PATH} (was `glscl prepare` finished?)"
        ) from None
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        first = next((one for one in error.errors() if one["loc"] == ("version",)), error.errors()[0])
    if first["type"] == "json_invalid":
        raise UserError(f"{url} is not valid JSON ({first['msg']}): prepare the dataset again")
    if first["type"] == "literal_error" and first["loc"] == ("version",):
        raise UserError(f"{url} has version {first['input']!r}; this program reads version 1")
    field = ".".join(str(part) for part in first["loc"]) or "the whole file"
    raise UserError(f"{url} is not a dataset manifest: {field}: {first['msg']}")
