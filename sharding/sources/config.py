"""What a user writes about where samples come from and how they are fetched: ``source`` and ``fetch``.

Light to import (no Arrow, no Ray, no datasets), since the command line validates a job before it starts
anything.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sharding.given_path import GivenPath, GivenPaths
from sharding.scenes.config import SceneRules
from sharding.storage import normalise_url
from sharding.tarnames import TEXT_EXTENSIONS

Scalar = str | int | float | bool

_COMMIT = re.compile(r"[0-9a-f]{40}")
# RFC 9110's token and what may follow it in a User-Agent: no line ends, nothing outside printable ASCII.
_AGENT = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(/[!-~]+)?")


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Located(_Block):
    path: GivenPath = Field(
        description="folder, file, file:// or s3:// url; a relative path is that of the command"
    )

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return normalise_url(path)


class FolderSource(_Located):
    """A folder (or S3 prefix) of media, each with its captions in a file of the same name beside it.

    ``.txt``: one caption a line. ``.json``: ``{"caption": text}`` or ``{"captions": [texts]}``.
    """

    kind: Literal["folder"]
    captions: str = Field(default=".txt", description=".txt or .json; a file's own suffix may be in any case")

    @field_validator("captions")
    @classmethod
    def _known(cls, suffix: str) -> str:
        if suffix.lower() not in (".txt", ".json"):
            raise ValueError("must be .txt or .json")
        return suffix


class TableSource(_Located):
    """A table, or a folder of tables of one kind: ``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv``; a row is a
    sample.

    ``path_column`` holds paths below the table's folder or urls, and in a table on this machine also absolute paths;
    ``url_column`` only urls (s3://, http://, https://). A caption cell is a text or a list of texts. Where a table has
    a row for each caption, ``group_by`` brings the rows of a sample together, wherever they stand.
    """

    kind: Literal["table"]
    path_column: str | None = None
    url_column: str | None = None
    caption_column: str | list[str]
    columns: list[str] | None = Field(
        default=None, description=".csv and .tsv without a header line: the names of its columns, in order"
    )
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict, description="column: value, or list of values; rows with others are left out"
    )
    group_by: str | None = Field(
        default=None,
        description="a column: rows that are equal in it are one sample, with the captions of all of them; "
        "usually that of the media, or an id of them",
    )

    @property
    def media_column(self) -> str:
        return self.path_column or self.url_column or ""

    @property
    def caption_columns(self) -> list[str]:
        return _listed(self.caption_column)

    @model_validator(mode="after")
    def _one_address(self) -> TableSource:
        if (self.path_column is None) == (self.url_column is None):
            raise ValueError("give either path_column or url_column")
        if not self.caption_columns:
            raise ValueError("caption_column names no column")
        if self.columns is not None and len(set(self.columns)) < len(self.columns):
            raise ValueError("columns names one column twice")
        return self


class CocoSource(_Located):
    """Captions in COCO's own JSON (``captions_train2017.json``): ``path`` is the file. An image is a sample,
    with all its captions.
    """

    kind: Literal["coco"]
    images: GivenPath | None = Field(default=None, description="folder or S3 prefix that file_name is below")
    url_field: Literal["coco_url", "flickr_url"] | None = Field(
        default=None, description="fetch the images from these urls instead"
    )

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, images: str | None) -> str | None:
        return None if images is None else normalise_url(images)

    @model_validator(mode="after")
    def _one_address(self) -> CocoSource:
        if (self.images is None) == (self.url_field is None):
            raise ValueError("give either images or url_field")
        return self


class KarpathySource(_Located):
    """Karpathy's splits of COCO, Flickr30k and Flickr8k (``dataset_coco.json``): ``path`` is the file."""

    kind: Literal["karpathy"]
    images: GivenPath = Field(description="folder or S3 prefix that filepath/filename is below")
    split: str | list[str] | None = Field(
        default=None, description="train, restval, val, test, or several; default: all"
    )

    @field_validator("images")
    @classmethod
    def _absolute_images(cls, images: str) -> str:
        return normalise_url(images)

    @property
    def splits(self) -> list[str] | None:
        return None if self.split is None else _listed(self.split)


class MsrVttSource(_Located):
    """Clips of MSR-VTT: ``path`` is a list of them, ``MSRVTT_JSFUSION_test.csv`` (1k-A's thousand, a sentence each)
    or ``MSRVTT_train.9k.csv``, which has no sentences of its own.
    """

    kind: Literal["msrvtt"]
    videos: GivenPath = Field(description="folder or S3 prefix of VIDEO_ID.mp4")
    annotations: GivenPath | None = Field(
        default=None, description="MSRVTT_data.json, of which all sentences of a clip are taken instead"
    )

    @field_validator("videos", "annotations")
    @classmethod
    def _absolute_others(cls, path: str | None) -> str | None:
        return None if path is None else normalise_url(path)


class LsmdcSource(_Located):
    """Clips of LSMDC: ``path`` is a list of them, e.g. ``LSMDC16_challenge_1000_publictect.csv``."""

    kind: Literal["lsmdc"]
    videos: GivenPath = Field(
        description="folder or S3 prefix of CLIP.avi, or of a folder for each film with its clips"
    )

    @field_validator("videos")
    @classmethod
    def _absolute_videos(cls, videos: str) -> str:
        return normalise_url(videos)


class WebDatasetSource(_Block):
    """Tars as the WebDataset library writes them: members of equal name up to the first dot are a sample.

    Captions: the lines of all text members (``KEY.txt``, ``KEY.0.txt``) and, of ``KEY.json``,
    ``caption_field`` (default ``captions``, else ``caption``); what says the same twice counts once.
    """

    kind: Literal["webdataset"]
    path: GivenPaths = Field(
        description="a .tar, a folder or prefix of them, a brace pattern (s3://b/{00..99}.tar), or a list"
    )
    media: list[str] | None = Field(
        default=None,
        min_length=1,
        description="extensions of the media member, best first, for keys with several (jpg, seg.png); "
        "default: the only member with a known one",
    )
    text: list[str] = Field(
        default=list(TEXT_EXTENSIONS),
        description="last parts of the extensions of text members",
    )
    caption_field: str | None = Field(default=None, description="of KEY.json: its name, a.b for one inside")
    truncated: Literal["error", "count"] = Field(
        default="error",
        description="a tar that ends early: error, or keep what is whole and count one bad input",
    )

    @property
    def paths(self) -> list[str]:
        return _listed(self.path)

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | list[str]) -> str | list[str]:
        if not path:
            raise ValueError("path names no tar")
        return _absolute_pattern(path) if isinstance(path, str) else [_absolute_pattern(one) for one in path]

    @field_validator("media", "text")
    @classmethod
    def _without_dots(cls, extensions: list[str] | None) -> list[str] | None:
        return None if extensions is None else [extension.lstrip(".").lower() for extension in extensions]


class HuggingFaceSource(_Block):
    """A dataset that Hugging Face ``datasets`` opens, of the hub or in a folder. No code of it is ever run.

    ``path``: a folder written by ``save_to_disk``, or of Parquet, JSON or CSV files, or an image or video
    folder, on a file system of every machine. ``hub``: a name on the hub at one commit (``revision``); each
    machine keeps a copy in its cache (``HF_HOME``); ``HF_TOKEN`` opens private ones.
    """

    kind: Literal["huggingface"]
    path: GivenPath | None = None
    hub: str | None = Field(
        default=None, pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$", description="name, or owner/name"
    )
    revision: str | None = Field(default=None, description="of hub: the 40 hex digits of a commit")
    subset: str | None = Field(default=None, description="where a dataset has several configurations")
    split: str = "train"
    media_column: str | None = Field(default=None, description="an Image or Video column")
    url_column: str | None = Field(default=None, description="a text column of urls")
    caption_column: str | list[str]
    group_by: str | None = Field(
        default=None,
        description="a column of texts or numbers: rows that are equal in it are one sample, with the captions of "
        "all of them",
    )

    @property
    def caption_columns(self) -> list[str]:
        return _listed(self.caption_column)

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        url = None if path is None else normalise_url(path)
        if url is not None and not url.startswith("file://"):
            raise ValueError("a folder on a file system of every machine, since datasets maps its files")
        return url

    @model_validator(mode="after")
    def _whole(self) -> HuggingFaceSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if (self.media_column is None) == (self.url_column is None):
            raise ValueError("give either media_column or url_column")
        if not self.caption_columns:
            raise ValueError("caption_column names no column")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision belongs to hub")
        if self.hub is not None and not _COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                "hub needs revision: the 40 hex digits of a commit, since branches and tags move"
            )
        return self


class ScenesSource(SceneRules):
    """Made-up scenes of real cut-outs, with true captions: images, or clips where the source is of videos.

    ``objects``: a table of cut-outs (``sharding/scenes/objects.py`` says what is in it). Scenes are drawn and
    rendered in the tasks; scene ``n`` is the same in every dataset of equal rules, whatever ``count``.
    """

    kind: Literal["scenes"]
    objects: GivenPath = Field(description="a .jsonl file, file:// or s3:// url; see docs/scenes.md")
    count: int = Field(ge=1, description="scenes: the first so many of the split")

    @field_validator("objects")
    @classmethod
    def _absolute(cls, objects: str) -> str:
        return normalise_url(objects)

    @property
    def rules(self) -> SceneRules:
        """What the scenes are like, without where they come from and how many are taken."""
        return SceneRules(**{name: getattr(self, name) for name in SceneRules.model_fields})


SourceConfig = Annotated[
    FolderSource
    | TableSource
    | CocoSource
    | KarpathySource
    | MsrVttSource
    | LsmdcSource
    | WebDatasetSource
    | HuggingFaceSource
    | ScenesSource,
    Field(discriminator="kind"),
]


class FetchConfig(_Block):
    """How media are read.

    Most of it does not change what the dataset holds, and may change while it is made. ``opt_out`` and
    ``robots`` say which samples may be in it, so they are part of its digest.
    """

    threads: int = Field(default=16, ge=1, le=256, description="reads at once in one task")
    in_flight_mb: float = Field(
        default=256, gt=0, description="of media read ahead in one task; a larger file waits until it is next"
    )
    timeout_s: float = Field(
        default=20, gt=0, description="http(s): longest silence, and a third of the whole"
    )
    attempts: int = Field(
        default=2, ge=1, description="http(s): tries of one address; only transient faults are tried again"
    )
    redirects: int = Field(default=5, ge=0, description="http(s): followed at most")
    per_host: int = Field(default=8, ge=1, description="http(s): requests at once to one host, in one task")
    user_agent: str = Field(default="glscl-pipeline", description="http(s): name[/version] that hosts see")
    contact: str | None = Field(
        default=None, description="http(s): an address or url in the User-Agent for those who run the hosts"
    )
    opt_out: list[str] = Field(
        default=["noai", "noimageai", "noimageindex", "noindex"],
        description="http(s): directives of X-Robots-Tag by which a file is left out; [] ignores them",
    )
    robots: bool = Field(
        default=False, description="http(s): ask each host's robots.txt, one request more a host and process"
    )
    allow_private: bool = Field(
        default=False, description="http(s): also addresses of private networks and of this machine"
    )

    @field_validator("opt_out")
    @classmethod
    def _sorted(cls, directives: list[str]) -> list[str]:
        return sorted({directive.strip().lower() for directive in directives})

    @field_validator("user_agent")
    @classmethod
    def _token(cls, name: str) -> str:
        if not _AGENT.fullmatch(name):
            raise ValueError("must be name or name/version, without blanks")
        return name

    @field_validator("contact")
    @classmethod
    def _printable(cls, contact: str | None) -> str | None:
        if contact is not None and not re.fullmatch(r"[!-'*-~]+", contact):
            raise ValueError("must be a mail address or url, without blanks and brackets")
        return contact

    @property
    def agent(self) -> str:
        """The User-Agent header."""
        return f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent

    def identity(self) -> dict[str, Any]:
        """What of this decides which samples a dataset holds."""
        return self.model_dump(mode="json", include={"opt_out", "robots"})


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _absolute_pattern(path: str) -> str:
    """As ``normalise_url``; what follows the last folder before a brace is kept as it is written."""
    if "{" not in path:
        return normalise_url(path)
    folder, pattern = split_pattern(path)
    return f"{normalise_url(folder or '.')}/{pattern}"


def split_pattern(path: str) -> tuple[str, str]:
    """(folder, the rest with its braces) of a brace pattern; the folder holds no brace."""
    start = path.index("{")
    folder, slash, name = path[:start].rpartition("/")
    return (folder or slash), name + path[start:]
