"""Fine-tuning for retrieval: the true caption against random ones of other samples, and ITC beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from model import GLSCLForImageTextRetrieval
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.fine_tuning.config import DATA, RetrievalFineTuning
from pipeline.fine_tuning.examples import FineTuningBatch, Sample
from pipeline.fine_tuning.learner import Judged, Material
from pipeline.training.batches import StageDataset
from pipeline.training.config import Stage
from pipeline.training.loading import Slot
from sharding.errors import BadData, UserError
from sharding.manifest import Manifest, load_manifest
from sharding.reader import ShardReader
from sharding.seeds import derive_seed, generator
from sharding.storage import Storage

#: What is trained, and evaluated.
MODEL = GLSCLForImageTextRetrieval

_READ_AT_ONCE = 256  # samples
_PATIENCE = 100  # draws for each caption until one that reads as the true one is taken after all


def open_training(task: RetrievalTask, material: Material) -> RetrievalTraining:
    """The samples of the dataset ``fine_tune.dataset``, and the captions of all of them.

    Raises:
        UserError: no such dataset, one of the other modality, or too few samples for the negatives.
    """
    recipe = task.fine_tune
    assert recipe is not None
    dataset = material.datasets[recipe.dataset]
    manifest = load_manifest(dataset)
    if manifest.modality != recipe.modality:
        raise UserError(
            f"fine_tune.modality: got {recipe.modality}; the dataset '{recipe.dataset}' is of {manifest.modality}s"
        )
    reader = ShardReader(dataset, manifest)
    captions = Captions.of(reader, material.folder)
    if len(captions) <= recipe.negatives:
        raise UserError(
            f"fine_tune.negatives: got {recipe.negatives}; {dataset.url} has {len(captions)} samples that can "
            "be read: that many negatives need more"
        )
    return RetrievalTraining(reader, captions, recipe)


class Captions:
    """The captions of a dataset's samples that can be read, to draw wrong ones from.

    Attributes:
        shards, rows: int [n], where each sample lies.
        texts: Arrow list of texts [n].
    """

    def __init__(self, table: pa.Table) -> None:
        self.shards, self.rows = table["shard"].to_numpy(), table["row"].to_numpy()
        self.texts = table["captions"].combine_chunks()

    def __len__(self) -> int:
        return len(self.shards)

    @classmethod
    def of(cls, reader: ShardReader, folder: Storage) -> Captions:
        """Those of a dataset: read once, sample by sample, and kept in ``folder`` for the workers and restarts."""
        path = f"captions-{reader.manifest.digest[:16]}.parquet"
        try:
            data = folder.read_bytes(path)
        except FileNotFoundError:
            rows = sorted(_read_captions(reader))
            columns = {
                "shard": pa.array([shard for shard, _, _ in rows], pa.int32()),
                "row": pa.array([row for _, row, _ in rows], pa.int32()),
                "captions": pa.array([captions for _, _, captions in rows], pa.list_(pa.string())),
            }
            sink = io.BytesIO()
            pq.write_table(pa.table(columns), sink, compression="zstd")
            data = sink.getvalue()
            folder.write_bytes(path, data)
        return cls(pq.read_table(pa.BufferReader(data)))

    def wrong(self, slot: Slot, caption: str, count: int, draws: np.random.Generator) -> list[str]:
        """A caption each of ``count`` different samples, none of them the slot's; none reads as the true one, if
        there are enough others.
        """
        found: dict[int, str] = {}
        tries = 0
        while len(found) < count:
            tries += 1
            number = int(draws.integers(len(self)))
            texts = self.texts[number]
            text = str(texts[int(draws.integers(len(texts)))])
            own = self.shards[number] == slot.shard and self.rows[number] == slot.row
            if not own and number not in found and (text != caption or tries > _PATIENCE * count):
                found[number] = text
        return list(found.values())


def _read_captions(reader: ShardReader) -> Iterator[tuple[int, int, list[str]]]:
    places = [
        (shard, row) for shard, record in enumerate(reader.manifest.shards) for row in range(record.samples)
    ]
    for start in range(0, len(places), _READ_AT_ONCE):
        part = places[start : start + _READ_AT_ONCE]
        for number, sample in reader.read_many(part):
            if not isinstance(sample, BadData):
                yield *part[number], sample.captions


class CandidateDataset(Dataset[Sample]):
    """Pictures or clips with their candidates: a caption of their own, then ``negatives`` wrong ones."""

    def __init__(
        self, reader: ShardReader, captions: Captions, stage: Stage, *, negatives: int, seed: int
    ) -> None:
        assert stage.resolution is not None
        self._samples = StageDataset({DATA: reader}, stage, image_size=stage.resolution, seed=seed)
        self._captions, self._negatives = captions, negatives

    @property
    def largest_pixels(self) -> int:
        """Bytes of the pixels of the largest sample."""
        return self._samples.largest_pixels

    def __getitem__(self, slot: Slot) -> Sample:
        return self.__getitems__([slot])[0]

    def __getitems__(self, slots: Sequence[Slot]) -> list[Sample]:
        """The samples of a batch (torch's DataLoader calls this)."""
        found = []
        for one in self._samples.__getitems__(slots):
            texts = [""] * (1 + self._negatives)
            if one.valid:
                draws = generator(derive_seed(one.seed, "negatives"))
                wrong = self._captions.wrong(one.slot, one.caption, self._negatives, draws)
                texts = [one.caption, *wrong]
            found.append(Sample(one.slot, one.key, one.pixels, texts, [], one.valid, one.cause))
        return found


class RetrievalTraining:
    """See :class:`pipeline.fine_tuning.learner.TaskTraining`."""

    labels = 0

    def __init__(self, reader: ShardReader, captions: Captions, recipe: RetrievalFineTuning) -> None:
        self._reader, self._captions, self._recipe = reader, captions, recipe

    @property
    def data(self) -> Manifest:
        return self._reader.manifest

    @property
    def weights(self) -> dict[str, float]:
        return {"rank": 1.0, "itc": self._recipe.itc_weight}

    def load_model(self, folder: Path) -> GLSCLForImageTextRetrieval:
        model: GLSCLForImageTextRetrieval = MODEL.from_pretrained(folder)
        return model

    def dataset(self, stage: Stage, seed: int) -> CandidateDataset:
        return CandidateDataset(
            self._reader, self._captions, stage, negatives=self._recipe.negatives, seed=seed
        )

    def judge(self, engine: Any, batch: FineTuningBatch) -> Judged:
        output = engine(
            batch.input_ids,
            batch.attention_mask,
            batch.pixel_values,
            itc_weight=self._recipe.itc_weight,
            valid=batch.valid,
        )
        right: torch.Tensor = output.rank_logits.argmax(dim=1) == 0
        return Judged(output.loss, {"rank": output.rank_loss, "itc": output.itc_loss}, right)
