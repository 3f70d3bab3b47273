"""The manifest of a dataset: what its shards are, what was read, kept and dropped, and what made it.

A dataset is a folder of the job's storage::

    plan.json            how the input was cut into tasks, written before any work starts
    work/                lists of inputs, one a task, and staged shards; gone when the dataset is whole
    000000.tar           a plain WebDataset shard
    000000.parquet       its index (sharding/index.py)
    commits/000000.json  the commit record of a task: the shard exists when this does
    report.html          what was kept and dropped, for people (sharding/report_page.py)
    manifest.json        written last: the dataset exists when this does; never changed afterwards
    overlay/000001.json  first retraction (sharding/overlay.py): which samples are dropped since, and why

Dropping samples later never rewrites a tar, nor the manifest: the newest file in ``overlay/`` lies over it, and
``load_manifest`` gives both as one. The files before it are the history.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sharding.errors import UserError
from sharding.names import unescape_name

if TYPE_CHECKING:
    from sharding.storage import Storage

MANIFEST_PATH = "manifest.json"
REPORT_PATH = "report.html"
OVERLAY_FOLDER = "overlay"

Modality = Literal["image", "video"]


def canonical_digest(value: Any) -> str:
    """sha256 (64 hex digits) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _below_the_dataset(path: str) -> str:
    """A manifest may come from anywhere: no path in it leads out of its folder."""
    name = unescape_name(path)
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError("must be a path below the dataset's folder")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError("must be the name of a file: it holds half of a surrogate pair") from None
    return path


PathInDataset = Annotated[str, AfterValidator(_below_the_dataset)]


class ShardRecord(BaseModel):
    """One shard: ``NAME.tar`` with ``samples`` samples, and its index. Sizes in bytes.

    ``name`` is for people and paths of ours: as ``sharding.names.escape_name`` writes it, where a tar of another
    program's has a name that is not UTF-8.

    ``caption_field``: None where this program wrote the tar. In a tar of another program's
    (``sharding.foreign``) the field of a sample's JSON that holds its captions; it may hold samples and members
    that the index does not name, and its index lies apart, since NAME.parquet may be the other program's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PathInDataset
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0)
    sha256: str
    index_bytes: int = Field(gt=0)
    index_sha256: str
    caption_field: str | None = None

    @property
    def tar(self) -> str:
        """Path of the tar relative to the dataset."""
        return f"{unescape_name(self.name)}.tar"

    @property
    def index(self) -> str:
        """Path of the Parquet index relative to the dataset."""
        return f"{self.name}.parquet" if self.caption_field is None else f"index/{self.name}.parquet"


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


class DroppedRows(BaseModel):
    """A Parquet file of dropped samples: ``path`` relative to the dataset, size in bytes, ``samples`` rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: PathInDataset
    bytes: int = Field(gt=0)
    sha256: str
    samples: int = Field(gt=0)


class Retraction(BaseModel):
    """One change of the overlay: ``samples`` more dropped (fewer, where it undid one), why and by what rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    reason: str
    rule: str


class OverlayRevision(BaseModel):
    """A file ``overlay/NNNNNN.json``: all that is dropped since the manifest was written, and the history.

    ``base`` is the digest of the manifest it lies over. Few keys stand in it; many are in a file of rows, and then
    ``dropped_keys`` is empty. One of the two holds everything: no older file is needed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["glscl-overlay"] = "glscl-overlay"
    version: Literal[1] = 1
    base: str
    dropped_keys: list[str] = Field(default_factory=list)
    dropped_rows: DroppedRows | None = None
    history: list[Retraction]


class Manifest(BaseModel):
    """The whole dataset. ``source`` holds the url, the number of inputs, the digest of their listing, and what the
    listing passed over.

    What is dropped is either in ``dropped_keys`` or in the file ``dropped_rows``; ask ``sharding.overlay.Dropped``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["glscl-dataset"] = "glscl-dataset"
    version: Literal[2] = 2  # of the indexes too
    name: str
    modality: Modality
    configuration: dict[str, Any]
    configuration_digest: str
    source: dict[str, Any]
    shards: list[ShardRecord]
    counts: Counts
    dropped_keys: list[str] = Field(default_factory=list)
    dropped_rows: DroppedRows | None = None
    retractions: list[Retraction] = Field(default_factory=list)

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
        """sha256 (64 hex digits) that names the dataset: its shards, and what was retracted from them.

        Undoing a retraction gives the former digest again.
        """
        rows = self.dropped_rows.sha256 if self.dropped_rows else None
        return canonical_digest(
            {"shards": self.shards_digest, "dropped_keys": self.dropped_keys, "dropped_rows": rows}
        )

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
        """Samples in the shards (dropped ones included: they keep their slots)."""
        return sum(shard.samples for shard in self.shards)

    @property
    def skipped(self) -> dict[str, int]:
        """Files of the source that are no inputs, by reason (``sharding.names``), the most frequent first."""
        found = self.source.get("skipped", {})
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    @property
    def dropped(self) -> int:
        """Samples dropped by the overlay."""
        return len(self.dropped_keys) + (self.dropped_rows.samples if self.dropped_rows else 0)

    @property
    def revision(self) -> int:
        """How many times the overlay was changed."""
        return len(self.retractions)


def overlay_path(revision: int) -> str:
    """Where the overlay's file of this number (from 1) lies in a dataset."""
    return f"{OVERLAY_FOLDER}/{revision:06d}.json"


def load_manifest(dataset: Storage, revision: int | None = None) -> Manifest:
    """The manifest of the dataset in this folder, with its newest overlay.

    Args:
        revision: that of the overlay instead of the newest; 0: as the dataset was made.

    Raises:
        UserError: there is none, or it is not one this version can read; the message names the url.
    """
    manifest = _load(dataset, MANIFEST_PATH, Manifest)
    if revision is None:
        names = (file.path.rpartition("/")[2] for file in dataset.list(OVERLAY_FOLDER))
        revision = max((int(name[:-5]) for name in names if _is_revision(name)), default=0)
    if revision == 0:
        return manifest
    url = dataset.url_of(overlay_path(revision))
    overlay = _load(dataset, overlay_path(revision), OverlayRevision)
    if overlay.base != manifest.digest or len(overlay.history) != revision:
        raise UserError(
            f"{url} belongs to another dataset or another state of it, not to its {MANIFEST_PATH}"
        )
    return manifest.model_copy(
        update={
            "dropped_keys": overlay.dropped_keys,
            "dropped_rows": overlay.dropped_rows,
            "retractions": overlay.history,
        }
    )


def find_manifest(dataset: Storage, digest: str) -> Manifest | None:
    """The manifest as it was when its digest was this one, whatever was retracted since; None if it never was.

    Raises:
        UserError: as ``load_manifest``.
    """
    newest = load_manifest(dataset)
    if newest.digest == digest:
        return newest
    older = (load_manifest(dataset, revision) for revision in reversed(range(newest.revision)))
    return next((manifest for manifest in older if manifest.digest == digest), None)


def _is_revision(name: str) -> bool:
    number, dot, suffix = name.partition(".")
    return number.isascii() and number.isdigit() and (dot, suffix) == (".", "json")


_Model = TypeVar("_Model", Manifest, OverlayRevision)


def _load(dataset: Storage, path: str, model: type[_Model]) -> _Model:
    url = dataset.url_of(path)
    try:
        data = dataset.read_bytes(path)
    except FileNotFoundError:
        raise UserError(
            f"no dataset at {dataset.url}: it has no {path} (was `glscl prepare` finished?)"
        ) from None
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = next((one for one in error.errors() if one["loc"] == ("version",)), error.errors()[0])
    if first["type"] == "json_invalid":
        raise UserError(f"{url} is not valid JSON ({first['msg']}): prepare the dataset again")
    if first["type"] == "literal_error" and first["loc"] == ("version",):
        version = model.model_fields["version"].default
        raise UserError(
            f"{url} has version {first['input']!r}; this program reads version {version}: prepare the dataset "
            f"again (or index it again, once {MANIFEST_PATH} is removed, where its tars are another program's)"
        )
    field = ".".join(str(part) for part in first["loc"]) or "the whole file"
    what = "a dataset manifest" if model is Manifest else "an overlay of a dataset"
    raise UserError(f"{url} is not {what}: {field}: {first['msg']}")
