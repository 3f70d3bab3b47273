"""Examples of a task in its official format, as the training loop takes them: in order, by slots, image by image.

Nothing is packed into shards: annotations are read once into a table (some hundred bytes an example, cheap to send
to loader processes), images one by one where the annotations say. A *shard* is a stretch of the table's rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from model import GLSCLProcessor
from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader
from pipeline.training.augmentation import Augmentation
from pipeline.training.config import Stage
from pipeline.training.loading import Slot, TrainingBatch
from pipeline.training.transport import SharedPixels, stack_pixels
from sharding.decoding import decode_image
from sharding.errors import BadData
from sharding.seeds import derive_seed, generator

_SHARD = 1000  # rows
_READERS = 4  # images on their way at once, for each loader process

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("text", pa.string()),
        ("images", pa.list_(pa.struct([("folder", pa.int32()), ("path", pa.string())]))),
        ("labels", pa.list_(pa.struct([("label", pa.int32()), ("score", pa.float64())]))),
    ]
)


@dataclass(frozen=True)
class Example:
    """A text about one image or more, and what is right.

    Attributes:
        key: unique.
        images: in order; as many for each example.
        labels: number of each label that is right at all, and how much so, 0 to 1.
    """

    key: str
    text: str
    images: Sequence[ImageAddress]
    labels: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class _Rows:
    samples: int


class ExampleTable:
    """Examples in the order of their files; ``pipeline.training.data_order.Ordered``. Picklable."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._folders: list[str] = []
        self._table = pa.Table.from_batches(self._batches(examples), schema=_SCHEMA).combine_chunks()

    def _batches(self, examples: Iterable[Example]) -> Iterator[pa.RecordBatch]:
        numbers: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        for example in examples:
            images = [
                {"folder": numbers.setdefault(image.folder, len(numbers)), "path": image.path}
                for image in example.images
            ]
            labels = [{"label": label, "score": score} for label, score in example.labels]
            rows.append({"key": example.key, "text": example.text, "images": images, "labels": labels})
            if len(rows) == _SHARD:
                yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)
                rows = []
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)
        self._folders = list(numbers)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def shards(self) -> list[_Rows]:
        """Stretches of the table."""
        return [_Rows(min(_SHARD, len(self) - first)) for first in range(0, len(self), _SHARD)]

    @cached_property
    def shards_digest(self) -> str:
        """sha256 of all examples in their order."""
        digest = hashlib.sha256(json.dumps(self._folders).encode())
        for batch in self._table.to_batches(max_chunksize=_SHARD):
            digest.update(json.dumps(batch.to_pylist(), ensure_ascii=False).encode())
        return digest.hexdigest()

    def scores(self, labels: int) -> npt.NDArray[np.float64]:
        """How right each of the ``labels`` is, summed over the examples: [labels]."""
        pairs = self._table["labels"].combine_chunks().flatten()
        numbers, scores = pairs.field("label").to_numpy(), pairs.field("score").to_numpy()
        return np.bincount(numbers, scores, minlength=labels).astype(np.float64)

    def example(self, shard: int, row: int) -> Example:
        """The example of a slot."""
        found = self._table.slice(shard * _SHARD + row, 1).to_pylist()[0]
        return Example(
            found["key"],
            found["text"],
            [ImageAddress(self._folders[image["folder"]], image["path"]) for image in found["images"]],
            [(label["label"], label["score"]) for label in found["labels"]],
        )


@dataclass(frozen=True)
class Sample:
    """An example ready for a batch; one whose images cannot be read keeps its slot with the ``cause``."""

    slot: Slot
    key: str
    pixels: torch.Tensor  # uint8 [F, 3, S, S], channels last in memory; F images, or frames
    texts: Sequence[str]  # one, or as many candidates for each sample
    labels: Sequence[tuple[int, float]]
    valid: bool
    cause: str | None = None


class ExampleDataset(Dataset[Sample]):
    """Samples by slot: images read, decoded, augmented, each with draws of its own. Lives in the loader processes.

    Args:
        stage: says the side of the images in pixels, and their augmentation.
        images: of each example.
        seed: of the run.
    """

    def __init__(
        self, table: ExampleTable, reader: ImageReader, stage: Stage, *, images: int, seed: int
    ) -> None:
        assert stage.resolution is not None
        self._table, self._reader, self._stage = table, reader, stage
        self._size, self._images, self._seed = stage.resolution, images, seed
        self._augmentation = Augmentation(stage.augmentation, self._size)

    @property
    def largest_pixels(self) -> int:
        """Bytes of the pixels of a sample."""
        return self._images * 3 * self._size**2

    def __getitem__(self, slot: Slot) -> Sample:
        return self.__getitems__([slot])[0]

    def __getitems__(self, slots: Sequence[Slot]) -> list[Sample]:
        """The samples of a batch (torch's DataLoader calls this); their images are read by threads in advance."""
        examples = [self._table.example(slot.shard, slot.row) if slot.row >= 0 else None for slot in slots]
        with ThreadPoolExecutor(_READERS, thread_name_prefix="images") as pool:
            # Not decoded there: augmentation draws from a generator that all threads of a process share.
            return [
                self._sample(slot, example, images)
                for slot, example, images in zip(slots, examples, pool.map(self._read, examples), strict=True)
            ]

    def _read(self, example: Example | None) -> list[bytes] | BadData:
        try:
            return [self._reader.read(image) for image in example.images] if example is not None else []
        except BadData as error:
            return error

    def _sample(self, slot: Slot, example: Example | None, images: list[bytes] | BadData) -> Sample:
        if example is None:
            return self._empty(slot, "", None)
        if isinstance(images, BadData):
            return self._empty(slot, example.key, images.cause)
        seed = derive_seed(self._seed, "sample", self._stage.name, slot.epoch, example.key)
        try:
            pixels = torch.cat([self._pixels(image, seed, place) for place, image in enumerate(images)])
        except BadData as error:
            return self._empty(slot, example.key, error.cause)
        return Sample(slot, example.key, pixels, [example.text], example.labels, valid=True)

    def _pixels(self, image: bytes, seed: int, place: int) -> torch.Tensor:
        picture = decode_image(image, self._augmentation.detail)
        return self._augmentation(picture[None], generator(derive_seed(seed, "image", place)))

    def _empty(self, slot: Slot, key: str, cause: str | None) -> Sample:
        return Sample(slot, key, blank(self._images, self._size), [""], [], valid=False, cause=cause)


def blank(frames: int, size: int) -> torch.Tensor:
    """Pixels of a slot that holds no sample: uint8 [F, 3, S, S], channels last in memory."""
    return torch.zeros(frames, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


@dataclass
class FineTuningBatch(TrainingBatch):
    """B samples, T text tokens, N candidate texts, F frames or images, A labels.

    Attributes:
        input_ids, attention_mask: int64 [B, T], of candidates [B, N, T].
        pixel_values: uint8 [B, F, 3, S, S], channels last in memory.
        labels: float32 [B, A], how right each label is; None where the texts say it (candidates).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor
    labels: torch.Tensor | None

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Self:
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
            pixel_values=self.pixel_values.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
            valid=self.valid.pin_memory(),
        )


class Collator:
    """Samples -> :class:`FineTuningBatch`: texts tokenised and trimmed to the longest, labels spread out.

    Args:
        labels: A; 0: none.
    """

    def __init__(self, processor: GLSCLProcessor, labels: int, memory: SharedPixels | None) -> None:
        self._processor, self._labels, self._memory = processor, labels, memory

    def __call__(self, samples: Sequence[Sample]) -> FineTuningBatch:
        several = len(samples[0].texts) > 1
        text = self._processor(text=[list(one.texts) if several else one.texts[0] for one in samples])
        labels = None
        if self._labels:
            labels = torch.zeros(len(samples), self._labels)
            for number, sample in enumerate(samples):
                for label, score in sample.labels:
                    labels[number, label] = score
        return FineTuningBatch(
            valid=torch.tensor([sample.valid for sample in samples]),
            keys=[sample.key for sample in samples],
            slots=[sample.slot for sample in samples],
            causes=[sample.cause for sample in samples],
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pixel_values=stack_pixels([sample.pixels for sample in samples], self._memory),
            labels=labels,
        )
