"""NLVR2 as it is published: JSON lines, and a folder of images named by the statements' identifiers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pipeline.evaluation.tasks.annotations import digest_of, read_lines, text_of
from pipeline.evaluation.tasks.pictures import ImageAddress
from sharding.errors import UserError
from sharding.given_path import GivenPath

if TYPE_CHECKING:
    from sharding.storage import Storage

_LABELS = {"true": True, "false": False}


class NLVR2Data(BaseModel):
    """One split of NLVR2. Addresses are urls or paths; relative ones are below the job's storage.

    Attributes:
        statements: ``train.json``, ``dev.json`` or ``test1.json``, an object a line.
        images: folder of the split's images: ``{split}-{set}-{pair}-img0.png`` and ``-img1.png``; below
            ``{directory}/`` where a statement has that key, as in the training split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statements: GivenPath
    images: GivenPath

    def digest(self, storage: Storage, field: str) -> str:
        """sha256 of the statements and of the images' names and sizes.

        Args:
            storage: the job's.
            field: where this block stands, for errors.

        Raises:
            UserError: see :func:`pipeline.evaluation.tasks.annotations.digest_of`.
        """
        return digest_of(storage, {f"{field}.statements": self.statements}, {f"{field}.images": self.images})


@dataclass(frozen=True, slots=True)
class Statement:
    """A sentence about a pair of images.

    Args:
        identifier: ``split-set-pair-sentence``, unique in a split.
        sentence: the text.
        left, right: the images.
        label: whether it is true; None where the file does not say.
    """

    identifier: str
    sentence: str
    left: ImageAddress
    right: ImageAddress
    label: bool | None

    @property
    def sentence_key(self) -> str:
        """What the up to four pairs that were shown with the same sentence have in common."""
        split, group, _, sentence = self.identifier.split("-")
        return f"{split}-{group}-{sentence}"

    @property
    def set_key(self) -> str:
        """The set of eight images that the pair is from: its statements are about the same images."""
        return "-".join(self.identifier.split("-")[:2])


def load_statements(storage: Storage, data: NLVR2Data, field: str = "data") -> list[Statement]:
    """All statements of a split, in the order of the file.

    Args:
        storage: the job's.
        data: the split.
        field: where ``data`` stands in the task's block, for errors.

    Raises:
        UserError: no such file, a line that is not as published (by its number), an identifier twice.
    """
    seen: set[str] = set()

    def convert(row: dict[str, Any]) -> Statement:
        statement = _statement(row, data.images)
        if statement.identifier in seen:
            raise ValueError(f"identifier {statement.identifier!r} stands there twice")
        seen.add(statement.identifier)
        return statement

    statements = read_lines(storage, data.statements, f"{field}.statements", convert)
    if not statements:
        raise UserError(f"{field}.statements: {data.statements} has no statements")
    return statements


def _statement(row: dict[str, Any], images: str) -> Statement:
    identifier = text_of(row, "identifier")
    parts = identifier.split("-")
    if len(parts) != 4 or not all(parts) or "/" in identifier:
        raise ValueError(f"identifier {identifier!r} is not split-set-pair-sentence")
    pair = "-".join(parts[:3])
    directory = row.get("directory")
    if directory is not None and (not isinstance(directory, int | str) or isinstance(directory, bool)):
        raise ValueError(f"'directory' is neither a number nor text but {type(directory).__name__}")
    if isinstance(directory, str):
        directory = text_of(row, "directory")
    prefix = "" if directory is None else f"{directory}/"
    left, right = (ImageAddress(images, f"{prefix}{pair}-img{side}.png") for side in range(2))
    return Statement(identifier, text_of(row, "sentence"), left, right, _label(row))


def _label(row: dict[str, Any]) -> bool | None:
    label = row.get("label")
    if label is None or isinstance(label, bool):
        return label
    if not isinstance(label, str) or label.lower() not in _LABELS:
        raise ValueError(f"'label' is neither True nor False but {str(label)[:60]!r}")
    return _LABELS[label.lower()]
