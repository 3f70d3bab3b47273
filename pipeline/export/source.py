"""From an address to a checkpoint, and to a model ready for use."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from pipeline.config import did_you_mean
from pipeline.evaluation.ledger import Ledger, Outcome, best_outcome
from pipeline.runs import RECORD, read_record
from sharding.errors import BadData, UserError
from sharding.storage import Storage, normalise_url, open_storage

if TYPE_CHECKING:
    from model import GLSCLForPreTraining, GLSCLModel, GLSCLProcessor
    from pipeline.training.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"(?P<run>.+?)(?:/checkpoints(?:/(?P<step>step-\d+(?:-[0-9a-f]+)?))?)?")


def split_address(address: str) -> tuple[str, str | None]:
    """The run's url, and the name of the checkpoint's folder (``step-00000100``) where one checkpoint is meant."""
    match = _ADDRESS.fullmatch(normalise_url(address))
    assert match is not None
    return match["run"], match["step"]


@dataclass(frozen=True)
class RunSource:
    """A run in its storage, and which of its checkpoints are meant.

    Args:
        root: the job's storage, in which ``record["datasets"]`` lie.
        run: the run's folder.
        record: what run.json holds.
        candidates: the checkpoint, or where the newest whole one is asked for all of them, newest first.
    """

    root: Storage
    run: Storage
    record: dict[str, Any]
    candidates: list[Checkpoint]

    @property
    def tokenizer(self) -> str:
        """The tokenizer the run was trained with, as the job named it."""
        return str(self.record["configuration"]["model"]["tokenizer"])

    def fetch(self, folder: Path) -> tuple[Checkpoint, Path]:
        """Verified weights of the first candidate that is whole, and the folder they are in, below ``folder``.

        Raises:
            UserError: no candidate is what was committed; names each.
        """
        from pipeline.training.checkpoints import fetch_model

        faults: list[str] = []
        for checkpoint in self.candidates:
            if faults:
                logger.warning("%s; taking the one before", faults[-1])
            try:
                return checkpoint, fetch_model(self.run, checkpoint, folder / f"{checkpoint.step}")
            except BadData as error:
                faults.append(f"{self.run.url_of(checkpoint.path)} is damaged: {error.detail}")
        raise UserError("\n".join(faults))


@dataclass(frozen=True)
class FineTuning:
    """A fine-tuned model of a run: which checkpoint it began with, and what its record says."""

    checkpoint: Checkpoint
    place: Storage
    record: dict[str, Any]

    def fetch(self, folder: Path) -> Path:
        """Its verified weights, in a folder below ``folder``.

        Raises:
            UserError: they are not what was committed.
        """
        from pipeline.fine_tuning.launch import fetch_fine_tuned

        try:
            fetch_fine_tuned(self.place, self.record, folder)
        except BadData as error:
            raise UserError(str(error)) from None
        return folder / "model"


def find_fine_tuning(source: RunSource, task: str) -> FineTuning:
    """The fine-tuning for ``task`` of the first candidate that has one.

    Raises:
        UserError: none has; names the tasks and steps that there are.
    """
    from pipeline.fine_tuning.launch import kept_fine_tunings

    try:
        everything = kept_fine_tunings(source.run)
    except BadData as error:
        raise UserError(str(error)) from None
    kept = [(place, record) for place, record in everything if record["task"] == task]
    for checkpoint in source.candidates:
        for place, record in kept:
            if record["checkpoint"]["digest"] == checkpoint.digest:
                return FineTuning(checkpoint, place, record)
    if kept:
        steps = sorted({record["checkpoint"]["step"] for _, record in kept})
        raise UserError(
            f"--task {task}: step {source.candidates[0].step} is not fine-tuned for it; of {source.run.url} the steps "
            f"{', '.join(map(str, steps))} are"
        )
    hint = did_you_mean(task, {record["task"] for _, record in everything}) if everything else ""
    raise UserError(f"--task {task}: {source.run.url} has no model fine-tuned for it{hint}")


def find_run(address: str, best: str | None = None) -> RunSource:
    """What lies at ``address``: a run, or one checkpoint of it (``RUN/checkpoints/step-00000100``).

    Args:
        address: a path, ``file://`` or ``s3://``.
        best: ``TASK/METRIC`` by which the ledger chooses among the run's checkpoints; default: the newest.

    Raises:
        UserError: nothing of the kind is there, or nothing was evaluated by ``best``.
    """
    from pipeline.training.checkpoints import list_checkpoints

    url, step = split_address(address)
    if best is not None and step:
        raise UserError(f"--best chooses among the checkpoints of a run, but {address} is a single one")
    run = open_storage(url)
    run.check(write=False)
    record = read_record(run)
    if record is None:
        raise UserError(
            f"{run.url} is no run: it has no {RECORD} (give RUN, or RUN/checkpoints/step-00000100 of it)"
        )
    checkpoints = list_checkpoints(run)[::-1]
    if not checkpoints:
        raise UserError(f"{run.url} holds no checkpoint yet")
    if step:
        wanted = [one for one in checkpoints if f"{one.path.rpartition('/')[2]}-".startswith(f"{step}-")]
        if not wanted:
            steps = ", ".join(str(one.step) for one in checkpoints[::-1])
            raise UserError(f"{run.url} has no whole checkpoint {step}; there are those of steps {steps}")
    else:
        wanted = checkpoints if best is None else [_best(Ledger(run).outcomes(), checkpoints, best, run)]
    root, _, _ = run.url.removesuffix("/").rpartition("/runs/")
    return RunSource(open_storage(root or run.url), run, record, wanted)


def _best(outcomes: list[Outcome], checkpoints: list[Checkpoint], metric: str, run: Storage) -> Checkpoint:
    """The best of those that are still there."""
    there = {checkpoint.digest: checkpoint for checkpoint in checkpoints}
    best = best_outcome((one for one in outcomes if one.checkpoint["digest"] in there), metric)
    if best is None:
        known = sorted({f"{one.task}/{name}" for one in outcomes for name in one.metrics})
        if not known:
            raise UserError(f"--best {metric}: no checkpoint of {run.url} is evaluated yet (glscl evaluate)")
        hint = did_you_mean(metric, known) or f"; there are {', '.join(known)}"
        raise UserError(f"--best {metric}: nothing was evaluated under this name{hint}")
    ever = best_outcome(outcomes, metric)
    if ever is not None and ever.step != best.step:
        logger.warning(
            "step %d was better by %s, but its checkpoint is deleted: step %d is the best of those kept",
            ever.step,
            metric,
            best.step,
        )
    return there[best.checkpoint["digest"]]


def processor_of(source: RunSource, weights: Path) -> GLSCLProcessor:
    """The processor for the model in the folder ``weights``, with the run's tokenizer.

    Raises:
        UserError: the tokenizer cannot be had here.
    """
    from model import GLSCLConfig, GLSCLProcessor, TokenizerError

    try:
        return GLSCLProcessor.from_config(GLSCLConfig.from_pretrained(weights), source.tokenizer)
    except TokenizerError as error:
        raise UserError(f"{source.run.url}: {error}") from None


@overload
def open_model(address: str, *, heads: Literal[False] = False) -> tuple[GLSCLModel, GLSCLProcessor]: ...
@overload
def open_model(address: str, *, heads: Literal[True]) -> tuple[GLSCLForPreTraining, GLSCLProcessor]: ...
def open_model(
    address: str, *, heads: bool = False
) -> tuple[GLSCLModel | GLSCLForPreTraining, GLSCLProcessor]:
    """The model, in evaluation mode, and the processor at ``address``: a run, a checkpoint or a model's folder.

    A model's folder is one of this machine that ``glscl export`` or ``save_pretrained`` wrote.

    Args:
        heads: the whole model as it was pre-trained, rather than the backbone alone.

    Raises:
        UserError: there is none; it does not load.
    """
    from model import GLSCLForPreTraining, GLSCLModel

    architecture = GLSCLForPreTraining if heads else GLSCLModel
    folder = open_storage(address).local_path("")
    if folder is not None and (folder / "config.json").is_file():
        return _saved_model(folder, architecture)
    source = find_run(address)
    with tempfile.TemporaryDirectory(prefix="glscl-model-") as scratch:
        _, weights = source.fetch(Path(scratch))
        return architecture.from_pretrained(weights).eval(), processor_of(source, weights)


def _saved_model(
    folder: Path, architecture: type[GLSCLModel] | type[GLSCLForPreTraining]
) -> tuple[GLSCLModel | GLSCLForPreTraining, GLSCLProcessor]:
    from safetensors import SafetensorError

    from model import GLSCLProcessor

    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings.get("model_type") if isinstance(settings, dict) else None
        if kind != "glscl":
            raise UserError(f"{folder} holds no GLSCL model: its config.json has model_type {kind!r}")
        # Only files of this folder, and of those none that could run anything.
        processor = GLSCLProcessor.from_pretrained(folder, local_files_only=True)
        model, info = architecture.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} does not load as a model: {reason}") from None
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{folder} lacks {len(missing)} of the model's parameters, {missing[0]} the first")
    return model.eval(), processor
