"""Checkpoints in the run's storage: written in full, committed last, verified before use.

Layout, below the run's folder::

    checkpoints/step-00000100/
        model/config.json, model/model.safetensors     weights alone (fp32): evaluation, export
        deepspeed/*.pt                                 what DeepSpeed needs to go on (all workers' parts)
        commit.json                                    size and sha256 of each file, step, world size, what the
                                                       run was trained on so far (see ``consumption``), ...

A checkpoint exists when its commit record does; a folder without one is the remains of a killed write and is
overwritten. Learning rate, data order, masks, dropout are functions of (seed, step), so that the step is all
there is to restore besides weights and optimizer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sharding.errors import BadData, UserError
from sharding.storage import Storage

if TYPE_CHECKING:
    from cluster.workers import WorkerContext

logger = logging.getLogger(__name__)

FORMAT = "glscl-checkpoint"
FOLDER = "checkpoints"


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


def list_checkpoints(run: Storage) -> list[Checkpoint]:
    """The committed checkpoints of a run by step; a commit record that does not verify is passed over, loudly."""
    found = []
    for file in run.list(FOLDER):
        parts = file.path.split("/")
        if len(parts) == 3 and parts[2] == "commit.json":
            checkpoint = _read_commit(run, f"{parts[0]}/{parts[1]}")
            if checkpoint is not None:
                found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _read_commit(run: Storage, path: str) -> Checkpoint | None:
    url = run.url_of(f"{path}/commit.json")
    try:
        commit = run.read_json(f"{path}/commit.json")
        record, digest = commit["record"], commit["digest"]
        if _digest(record) != digest or record["format"] != FORMAT:
            raise BadData("commit-mismatch", f"{url} does not match its own digest")
        return Checkpoint(record["step"], record["stage"], path, digest, record)
    except FileNotFoundError:
        return None  # retention deleted it between the listing and the reading
    except UserError:
        raise  # a ValueError too: the storage refuses
    except (BadData, ValueError, KeyError, TypeError) as error:
        logger.error("checkpoint passed over: %s is damaged (%s)", url, error)
        return None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fetch_files(run: Storage, checkpoint: Checkpoint, prefix: str, folder: Path) -> Path:
    """Download and verify the files below ``prefix`` ("model", "deepspeed") into ``folder``; returns ``folder/prefix``.

    Raises:
        BadData: a file's size or sha256 is not the committed one, or it is missing.
    """
    for name, expected in checkpoint.files.items():
        if not name.startswith(f"{prefix}/"):
            continue
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            run.download(
                f"{checkpoint.path}/{name}", destination, size=expected["size"], sha256=expected["sha256"]
            )
        except FileNotFoundError as error:
            raise BadData("missing-file", f"checkpoint of step {checkpoint.step}: {error}") from None
    return folder / prefix


def fetch_model(run: Storage, checkpoint: Checkpoint, folder: Path) -> Path:
    """Verified download of the weights, ready for ``GLSCLForPreTraining.from_pretrained``."""
    return fetch_files(run, checkpoint, "model", folder)


def delete_checkpoint(run: Storage, checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, its commit record first: what is half deleted must not look whole."""
    run.delete(f"{checkpoint.path}/commit.json")
    run.delete(checkpoint.path, recursive=True)


def save_checkpoint(
    engine: Any,
    run: Storage,
    context: WorkerContext,
    scratch: Path,
    *,
    step: int,
    stage: int,
    details: dict[str, Any],
) -> Checkpoint:
    """Write and commit a checkpoint. Collective: every worker calls it at the same step.

    ``details`` goes into the record (data digests, seed, MLflow run, ...). Each node's first worker uploads what
    its node wrote; worker 0 commits once all parts are in storage.
    """
    path = f"{FOLDER}/step-{step:08d}"
    folder = scratch / f"node-{context.node_rank}" / f"step-{step:08d}"
    if context.local_rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if context.rank == 0:
        run.delete(path, recursive=True)  # the remains of a write that was killed before its commit
    dist.barrier()  # nobody writes into a folder that another still clears

    engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
    _save_weights(engine, folder / "model", write=context.rank == 0)
    dist.barrier()  # a node's first worker uploads the files of all workers of the node

    files: dict[str, dict[str, Any]] = {}
    if context.local_rank == 0:
        for source in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = source.relative_to(folder).as_posix()
            uploaded = run.upload(source, f"{path}/{name}")
            files[name] = {"size": uploaded.size, "sha256": uploaded.sha256}
        shutil.rmtree(folder, ignore_errors=True)
    parts: list[Any] = [None] * context.world_size
    dist.all_gather_object(parts, (context.node_rank, files))
    record = {
        "format": FORMAT,
        "version": 1,
        "step": step,
        "stage": stage,
        "world_size": context.world_size,
        "nodes": len({node for node, _ in parts}),
        "files": {name: entry for _, part in parts for name, entry in part.items()},
        **details,
    }
    checkpoint = Checkpoint(step, stage, path, _digest(record), record)
    if context.rank == 0:
        run.write_json(f"{path}/commit.json", {"record": record, "digest": checkpoint.digest})
    dist.barrier()  # no worker takes the checkpoint for done before its record is there
    return checkpoint


def _save_weights(engine: Any, folder: Path, *, write: bool) -> None:
    """The whole model in fp32 as safetensors, written by worker 0; gathered from all workers under ZeRO 3."""
    import deepspeed

    parameters = list(engine.module.parameters())
    partitioned = engine.zero_optimization_partition_weights()
    with deepspeed.zero.GatheredParameters(parameters, enabled=partitioned):
        if write:
            state = {
                name: tensor.detach().float().cpu() if tensor.is_floating_point() else tensor.detach().cpu()
                for name, tensor in engine.module.state_dict().items()
            }
            engine.module.save_pretrained(folder, state_dict=state, safe_serialization=True)


def resume(
    engine: Any,
    run: Storage,
    context: WorkerContext,
    scratch: Path,
    *,
    expected: dict[str, Any],
    warn: Callable[[str], None],
    place: str = "train",
) -> Checkpoint | None:
    """Load the newest checkpoint that verifies into ``engine``; None when there is none. Collective.

    ``expected`` names the record's entries that must be equal (data digests, ZeRO stage, ...). ``warn`` is
    told, on worker 0, of each checkpoint that is passed over. ``place`` is where the recipe stands in the YAML.

    Raises:
        UserError: the run was made with other data, another ZeRO stage or another number of workers.
    """
    for candidate in _agreed_candidates(run, context):
        _refuse_mismatch(candidate, context, expected, run, place)
        folder = scratch / f"node-{context.node_rank}" / f"resume-{candidate.step:08d}"
        fault = ""
        if context.local_rank == 0:
            try:
                fetch_files(run, candidate, "deepspeed", folder)
            except BadData as error:
                fault = str(error)
        faults: list[Any] = [None] * context.world_size
        dist.all_gather_object(faults, fault)
        if any(faults):
            if context.rank == 0:
                causes = "; ".join(f for f in faults if f)
                warn(
                    f"checkpoint of step {candidate.step} is damaged and passed over for the one before: {causes}"
                )
            continue
        with _only_plain_tensors():
            loaded, _ = engine.load_checkpoint(str(folder), tag="deepspeed")
        if loaded is None:
            raise RuntimeError(f"DeepSpeed did not load {run.url_of(candidate.path)}")
        dist.barrier()  # the files are shared by the workers of a node
        if context.local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return candidate
    return None


def _agreed_candidates(run: Storage, context: WorkerContext) -> list[Checkpoint]:
    """The checkpoints worker 0 sees, newest first: every worker must try the same ones in the same order."""
    box: list[Any] = [list_checkpoints(run)[::-1] if context.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    candidates: list[Checkpoint] = box[0]
    return candidates


def _refuse_mismatch(
    checkpoint: Checkpoint,
    context: WorkerContext,
    expected: dict[str, Any],
    run: Storage,
    place: str = "train",
) -> None:
    url = run.url_of(checkpoint.path)
    if checkpoint.record["world_size"] != context.world_size:
        raise UserError(
            f"{url} was written by {checkpoint.record['world_size']} workers; set {place}.workers to "
            f"{checkpoint.record['world_size']} to go on with it (now {context.world_size})"
        )
    for key, value in expected.items():
        if checkpoint.record.get(key) != value:
            raise UserError(
                f"{url}: {key} was {checkpoint.record.get(key)!r}, now it is {value!r}; "
                "a run goes on with what it began with: give the job another name to start anew"
            )


@contextmanager
def _only_plain_tensors() -> Iterator[None]:
    """Make DeepSpeed's ``torch.load`` refuse everything but tensors, plain values and three classes of its own."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
