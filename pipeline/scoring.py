"""The scorer that this project brings: the image-text (or clip-text) similarity of a GLSCL model.

    filters:
      - {kind: score, model: runs/align/checkpoints/step-00000360, min: 0.2}

The score is the cosine of the two ITC embeddings, -1 to 1, of the best of a sample's captions. ``model`` is a
folder that ``glscl export`` wrote (at a path that all machines see) or the address of a checkpoint; of a run, the
newest checkpoint there is when preparing starts, so that a later one makes another dataset.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sharding.errors import UserError
from sharding.filters.config import ScoreFilter
from sharding.manifest import canonical_digest
from sharding.storage import open_storage

if TYPE_CHECKING:
    from torch import Tensor

    from model import GLSCLForPreTraining, GLSCLProcessor
    from sharding.config import PrepareConfig
    from sharding.scoring import ScoredSample, Scorer, ScorerFactory

#: The scorer's name in a filter block.
ITC = "itc"

# Captions encoded at once, whatever the number of samples.
_CAPTIONS = 128


def scorers_of(config: PrepareConfig) -> dict[str, ScorerFactory]:
    """The scorers that a dataset's filters ask for: none, or the ITC similarity by the model they name.

    Raises:
        UserError: there is no such model, or it has no room for the clip's frames.
    """
    block = config.score_filter
    if block is None:
        return {}
    assert block.model is not None  # the job's configuration saw to it
    return {ITC: find_scorer(block.model, block.frames if config.modality == "video" else 1)}


def find_scorer(address: str, frames: int = 1) -> ItcScorerFactory:
    """The scorer by the model at ``address`` (see the module), pinned to the weights it has now.

    Raises:
        UserError: there is none; it takes fewer than ``frames`` frames.
    """
    from model import GLSCLConfig, GLSCLProcessor
    from pipeline.export.source import find_run, processor_of

    folder = open_storage(address).local_path("")
    if folder is not None and (folder / "config.json").is_file():
        files = _folder_digests(folder)
        try:
            room = GLSCLConfig.from_pretrained(folder).max_frames
            processor = GLSCLProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} does not load as a model: {str(error).splitlines()[0]}") from None
    else:
        source = find_run(address)
        checkpoint = source.candidates[0]
        address = source.run.url_of(checkpoint.path)
        files = {
            path.removeprefix("model/"): file["sha256"]
            for path, file in checkpoint.record["files"].items()
            if path.startswith("model/")
        }
        with tempfile.TemporaryDirectory(prefix="glscl-scorer-") as scratch:
            settings = source.run.read_bytes(f"{checkpoint.path}/model/config.json")
            (Path(scratch) / "config.json").write_bytes(settings)
            room = GLSCLConfig.from_pretrained(scratch).max_frames
            processor = processor_of(source, Path(scratch))
    if frames > room:
        raise UserError(f"filter score, frames: got {frames}; {address} takes {room} at most")
    return ItcScorerFactory(address, _digest(files, processor))


def _folder_digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _digest(files: Mapping[str, str], processor: GLSCLProcessor) -> str:
    """Of the weights, the model's configuration and the vocabulary: the same for a checkpoint and its export."""
    decisive = {
        name: sha for name, sha in files.items() if name == "config.json" or name.endswith(".safetensors")
    }
    return canonical_digest({"files": decisive, "vocabulary": processor.tokenizer.get_vocab()})


@dataclass(frozen=True)
class ItcScorerFactory:
    """Loads the model in a worker's process. ``weights``: the digest of what must be loaded."""

    address: str
    weights: str

    def __call__(self, block: ScoreFilter) -> Scorer:
        """
        Raises:
            UserError: the model cannot be read here, or is not the one that the dataset is named by.
        """
        from pipeline.export.source import open_model

        found = find_scorer(self.address)
        if found.weights != self.weights:
            raise UserError(
                f"{self.address} changed: its weights are {found.weights}, the dataset's {self.weights}"
            )
        model, processor = open_model(self.address, heads=True)
        return ItcScorer(model, processor, block.frames)


class ItcScorer:
    """Cosine of the ITC embeddings of a sample and the best of its captions."""

    def __init__(self, model: GLSCLForPreTraining, processor: GLSCLProcessor, frames: int) -> None:
        import torch

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._processor, self._frames = model.eval().to(self._device), processor, frames

    def score(self, samples: Sequence[ScoredSample]) -> list[float]:
        """One number in -1..1 for each sample.

        Raises:
            BadData: a sample's media do not decode.
        """
        import torch

        with torch.inference_mode():
            pixels = torch.stack([self._pixels(sample) for sample in samples])
            vision = self._model.encode_vision(pixels.to(self._device)).embedding.float()
            captions = [caption for sample in samples for caption in sample.captions]
            texts = torch.cat(list(self._encoded(captions)))
            counts = torch.tensor([len(sample.captions) for sample in samples], device=self._device)
            owner = torch.repeat_interleave(torch.arange(len(samples), device=self._device), counts)
            similarity = (vision[owner] * texts).sum(dim=-1)
            best = torch.full((len(samples),), -torch.inf, device=self._device)
            return best.scatter_reduce(0, owner, similarity, "amax").tolist()

    def _encoded(self, captions: list[str]) -> Iterator[Tensor]:
        for start in range(0, len(captions), _CAPTIONS):
            tokens = self._processor.tokenize(captions[start : start + _CAPTIONS])
            features = self._model.encode_text(
                tokens["input_ids"].to(self._device), tokens["attention_mask"].to(self._device)
            )
            yield features.embedding.float()

    def _pixels(self, sample: ScoredSample) -> Tensor:
        from sharding.media import decode_image, decode_video

        if sample.extension == "mp4":
            return self._processor.video(decode_video(sample.media, self._frames))
        return self._processor.video(decode_image(sample.media)[None])
