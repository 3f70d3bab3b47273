"""The batches of the pre-training: how samples of shards become tensors in the loader processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from model import GLSCLConfig, GLSCLProcessor, PretrainingMasks, draw_masks
from pipeline.training.augmentation import Augmentation
from pipeline.training.config import Stage, TrainBlock
from pipeline.training.loading import Slot, StageSampler, TrainingBatch, batch_loader, pixel_memory
from pipeline.training.transport import SharedPixels, stack_pixels
from sharding.decoding import decode_image
from sharding.errors import BadData
from sharding.media import decode_video
from sharding.reader import RawSample, ShardReader
from sharding.seeds import derive_seed, generator


@dataclass(frozen=True)
class Sample:
    """A decoded sample; an unreadable one keeps its slot with ``valid`` False and the ``cause``."""

    slot: Slot
    key: str
    pixels: torch.Tensor  # uint8 [F, 3, H, W], channels last in memory
    caption: str
    seed: int
    valid: bool
    cause: str | None = None


@dataclass
class Batch(TrainingBatch):
    """One worker's part of a contrastive batch: B samples, T text tokens, F frames."""

    input_ids: torch.Tensor  # int64 [B, T]
    attention_mask: torch.Tensor  # int64 [B, T]
    pixel_values: torch.Tensor  # uint8 [B, F, 3, H, W], channels last in memory
    masks: PretrainingMasks
    group_size: int

    def to(self, device: torch.device) -> Self:
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            masks=self.masks.to(device),
            valid=self.valid.to(device, non_blocking=True),
        )

    def model_inputs(self) -> dict[str, Any]:
        """What :class:`model.GLSCLForPreTraining` takes, but for the objectives' weights."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values,
            "masks": self.masks,
            "valid": self.valid,
            "group_size": self.group_size,
        }

    def parts(self, number: int) -> list[dict[str, Any]]:
        """:meth:`model_inputs` of so many consecutive parts, each text trimmed to the longest of its part."""
        size = len(self.keys) // number
        cuts = []
        for start in range(0, len(self.keys), size):
            rows = slice(start, start + size)
            longest = int(self.attention_mask[rows].sum(dim=1).max())
            cuts.append(
                {
                    "input_ids": self.input_ids[rows, :longest],
                    "attention_mask": self.attention_mask[rows, :longest],
                    "pixel_values": self.pixel_values[rows],
                    "masks": self.masks.part(start, start + size).trimmed(longest),
                    "valid": self.valid[rows],
                }
            )
        return cuts

    def pin_memory(self) -> Self:
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
            pixel_values=self.pixel_values.pin_memory(),
            masks=self.masks.pin_memory(),
            valid=self.valid.pin_memory(),
        )


class StageDataset(Dataset[Sample]):
    """Samples by slot: read, decode, augment. Lives in the loader processes; holds no state between samples."""

    def __init__(self, readers: dict[str, ShardReader], stage: Stage, *, image_size: int, seed: int) -> None:
        self._readers, self._stage, self._seed = readers, stage, seed
        self._size = stage.resolution or image_size
        self._augmentation = Augmentation(stage.augmentation, self._size)

    @property
    def largest_pixels(self) -> int:
        """Bytes of the pixels of the largest sample."""
        images_only = all(reader.manifest.modality == "image" for reader in self._readers.values())
        return (1 if images_only else self._stage.frames) * 3 * self._size**2

    def __getitem__(self, slot: Slot) -> Sample:
        return self.__getitems__([slot])[0]

    def __getitems__(self, slots: Sequence[Slot]) -> list[Sample]:
        """The samples of a batch (torch's DataLoader calls this): decoded as they come, returned in order."""
        samples = [self._masked(slot, "", None) if slot.row < 0 else None for slot in slots]
        numbers: dict[str, list[int]] = {}
        for number, slot in enumerate(slots):
            if slot.row >= 0:
                numbers.setdefault(slot.dataset, []).append(number)
        for name, wanted in numbers.items():
            places = [(slots[number].shard, slots[number].row) for number in wanted]
            for i, raw in self._readers[name].read_many(places):
                samples[wanted[i]] = self._sample(slots[wanted[i]], raw)
        return [sample for sample in samples if sample is not None]

    def _sample(self, slot: Slot, raw: RawSample | BadData) -> Sample:
        if isinstance(raw, BadData):
            return self._masked(slot, f"shard {slot.shard}, row {slot.row}", raw.cause)
        try:
            return self._decoded(slot, raw)
        except BadData as error:
            return self._masked(slot, raw.key, error.cause)

    def _decoded(self, slot: Slot, raw: RawSample) -> Sample:
        seed = derive_seed(self._seed, "sample", self._stage.name, slot.epoch, raw.key)
        draws = generator(seed)
        caption = raw.captions[int(draws.integers(len(raw.captions)))]
        if self._readers[slot.dataset].manifest.modality == "image":
            frames = decode_image(raw.media, self._augmentation.detail)[None]
        else:
            positions = draws.random(self._stage.frames).tolist()
            frames = decode_video(raw.media, self._stage.frames, positions)
        pixels = self._augmentation(frames, draws)
        return Sample(slot, raw.key, pixels, caption, seed, valid=True)

    def _masked(self, slot: Slot, key: str, cause: str | None) -> Sample:
        frames = 1 if self._readers[slot.dataset].manifest.modality == "image" else self._stage.frames
        pixels = torch.zeros(frames, self._size, self._size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        return Sample(slot, key, pixels, "", seed=0, valid=False, cause=cause)


class Collator:
    """Samples -> :class:`Batch`: text tokenised and trimmed to the longest, masks drawn per sample."""

    def __init__(
        self, config: GLSCLConfig, tokenizer: str, group_size: int, memory: SharedPixels | None
    ) -> None:
        self._config, self._group_size, self._memory = config, group_size, memory
        self._processor = GLSCLProcessor.from_config(config, tokenizer=tokenizer)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        pixels = stack_pixels([sample.pixels for sample in samples], self._memory)
        valid = torch.tensor([sample.valid for sample in samples])
        text = self._processor.tokenize([sample.caption for sample in samples])
        masks = draw_masks(
            self._config,
            text["input_ids"],
            text["attention_mask"],
            text["word_ids"],
            valid,
            [derive_seed(sample.seed, "masks") for sample in samples],
            self._group_size,
            (pixels.shape[-2] // self._config.patch_size) * (pixels.shape[-1] // self._config.patch_size),
        )
        return Batch(
            input_ids=text["input_ids"],
            attention_mask=text["attention_mask"],
            pixel_values=pixels,
            masks=masks,
            valid=valid,
            keys=[sample.key for sample in samples],
            slots=[sample.slot for sample in samples],
            causes=[sample.cause for sample in samples],
            group_size=self._group_size,
        )


def stage_loader(
    stage: Stage,
    train: TrainBlock,
    readers: dict[str, ShardReader],
    config: GLSCLConfig,
    *,
    tokenizer: str,
    seed: int,
    start_step: int = 0,
    worker: int = 0,
    workers: int = 1,
    around: Callable[[StageSampler], Sampler[list[Slot]]] | None = None,
) -> DataLoader[Any]:
    """The batches of one worker for the rest of a stage, in order, ``train.accumulation_of(stage)`` a step.

    ``around`` may wrap the sampler, e.g. to fetch what its batches need.
    """
    datasets = {name: reader.manifest for name, reader in readers.items()}
    sampler = StageSampler(
        stage, train, datasets, seed=seed, start_step=start_step, worker=worker, workers=workers
    )
    dataset = StageDataset(readers, stage, image_size=config.image_size, seed=seed)
    memory = pixel_memory(train.loader_processes, dataset.largest_pixels * sampler.batch_size)
    collate = Collator(config, tokenizer, sampler.group_size, memory)
    return batch_loader(
        dataset, around(sampler) if around is not None else sampler, collate, train.loader_processes
    )
