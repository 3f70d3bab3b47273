"""Which checkpoints a run has: commit records, verified downloads, deleting."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import BadData, UserError
from sharding.storage import Storage

logger = logging.getLogger(__name__)

FORMAT = "glscl-checkpoint"
VERSION = 2
FOLDER = "checkpoints"
COMMIT = "commit.json"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: ``path`` below the run's storage, ``record`` as in its commit.json."""

    step: int
    stage: int
    path: str
    digest: str
    record: dict[str, Any]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """``{relative path: {"size": bytes, "sha256": hex}}``."""
        files: dict[str, dict[str, Any]] = self.record["files"]
        return files

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(int(entry["size"]) for entry in self.files.values())


def list_checkpoints(run: Storage, known: dict[str, Checkpoint] | None = None) -> list[Checkpoint]:
    """The committed checkpoints of a run by step; a commit record that does not verify is passed over, loudly.

    A write that outlived its attempt may have committed a step that was then trained, and committed, again: both
    are good, and one of them, always the same, is listed.

    Args:
        known: of who lists again and again: the records of the last listing by path, brought up to date. A record is
            written once, to a folder of its own, and never changed: none is read twice.
    """
    known = {} if known is None else known
    found: dict[int, Checkpoint] = {}
    folders = _folders(run, committed=True)
    for path in [path for path in known if path not in folders]:
        known.pop(path, None)  # deleted; another thread may have seen it too
    for path in sorted(folders):
        checkpoint = known.get(path) or _read_commit(run, path)
        if checkpoint is not None:
            known[path] = checkpoint
            found.setdefault(checkpoint.step, checkpoint)
    return [found[step] for step in sorted(found)]


def remains(run: Storage, checkpoints: Collection[Checkpoint]) -> list[str]:
    """Folders that are no checkpoint and never will be: of writes that were killed, and of steps written twice.

    Args:
        checkpoints: those that are listed. A write under way is of a later step than all of them.
    """
    newest = max((checkpoint.step for checkpoint in checkpoints), default=-1)
    listed = {checkpoint.path for checkpoint in checkpoints}
    return sorted(path for path in _folders(run) if path not in listed and _step_of(path) <= newest)


def _folders(run: Storage, *, committed: bool = False) -> set[str]:
    """Folders below ``checkpoints``; ``committed``: only those with a commit record."""
    folders = set()
    for file in run.list(FOLDER):
        parts = file.path.split("/")
        if len(parts) >= 3 and (not committed or parts[2:] == [COMMIT]):
            folders.add(f"{parts[0]}/{parts[1]}")
    return folders


def _step_of(path: str) -> int:
    digits = path.rpartition("/")[2].split("-")[1:2]
    return int(digits[0]) if digits and digits[0].isdigit() else -1


def _read_commit(run: Storage, path: str) -> Checkpoint | None:
    url = run.url_of(f"{path}/{COMMIT}")
    try:
        commit = run.read_json(f"{path}/{COMMIT}")
        record, digest = commit["record"], commit["digest"]
        if record_digest(record) != digest or record["format"] != FORMAT:
            raise BadData("commit-mismatch", f"{url} does not match its own digest")
        if record["version"] != VERSION:
            raise BadData("unknown-version", f"{url} is of format version {record['version']}, not {VERSION}")
        return Checkpoint(record["step"], record["stage"], path, digest, record)
    except FileNotFoundError:
        return None  # retention deleted it between the listing and the reading
    except UserError:
        raise  # a ValueError too: the storage refuses
    except (BadData, ValueError, KeyError, TypeError) as error:
        logger.error("checkpoint passed over: %s is damaged (%s)", url, error)
        return None


def record_digest(record: dict[str, Any]) -> str:
    """sha256 of a commit record, which names the checkpoint."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def commit(run: Storage, path: str, record: dict[str, Any]) -> Checkpoint:
    """Write the commit record: from here on the checkpoint exists."""
    checkpoint = Checkpoint(record["step"], record["stage"], path, record_digest(record), record)
    run.write_json(f"{path}/{COMMIT}", {"record": record, "digest": checkpoint.digest})
    return checkpoint


def fetch_files(run: Storage, checkpoint: Checkpoint, names: Collection[str], folder: Path) -> None:
    """Download the files ``names`` into ``folder`` under the same names, verified.

    Raises:
        BadData: a file's size or sha256 is not the committed one, or it is missing.
    """
    for name in names:
        expected = checkpoint.files[name]
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            run.download(
                f"{checkpoint.path}/{name}", destination, size=expected["size"], sha256=expected["sha256"]
            )
        except FileNotFoundError as error:
            raise BadData("missing-file", f"checkpoint of step {checkpoint.step}: {error}") from None


def fetch_model(run: Storage, checkpoint: Checkpoint, folder: Path) -> Path:
    """Verified download of the weights, ready for ``GLSCLForPreTraining.from_pretrained``."""
    fetch_files(run, checkpoint, list(files_below(checkpoint, "model")), folder)
    return folder / "model"


def files_below(checkpoint: Checkpoint, prefix: str) -> Iterator[str]:
    """Names of the files below ``prefix`` ("model", "state")."""
    return (name for name in checkpoint.files if name.startswith(f"{prefix}/"))


def delete_checkpoint(run: Storage, checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, its commit record first: what is half deleted must not look whole."""
    run.delete(f"{checkpoint.path}/{COMMIT}")
    run.delete(checkpoint.path, recursive=True)
