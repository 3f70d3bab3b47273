"""Which samples make up which batch, and how they become tensors in the loader processes.

Everything is a function of (the data's digests, run seed, stage, step): the loader's state is the step. Which
samples a global batch holds is told by ``data_order``. A global batch of G samples is A contrastive batches of
C = G/A; each of the L lanes gives C/L consecutive samples (a *group*) to a contrastive batch, and each worker
holds a contiguous slice of the lanes::

    global batch   lane 0: a0 a0 a1 a1   lane 1: a0 a0 a1 a1   ...      A = 2, C/L = 2
    worker 0, accumulation step 0:  lane 0's a0 a0 | lane 1's a0 a0 | ...   each | a group
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from model import GLSCLConfig, GLSCLProcessor, PretrainingMasks, draw_masks
from pipeline.config import StageBlock, TrainBlock
from pipeline.training.augmentation import Augmentation
from pipeline.training.consumption import RETRACTED
from pipeline.training.data_order import DataOrder
from pipeline.training.transport import SharedPixels, send_batches_through_slots, stack_pixels
from sharding.decoding import decode_image
from sharding.errors import BadData
from sharding.media import decode_video
from sharding.reader import RawSample, ShardReader
from sharding.seeds import derive_seed, generator

#: Batches that each loader process works on ahead of the training.
PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class Slot:
    """A place in a batch: where its sample lies, or ``row`` -1 for the empty slots at an epoch's end."""

    dataset: str
    shard: int
    row: int
    epoch: int


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
class Batch:
    """One worker's part of a contrastive batch: B samples, T text tokens, F frames."""

    input_ids: torch.Tensor  # int64 [B, T]
    attention_mask: torch.Tensor  # int64 [B, T]
    pixel_values: torch.Tensor  # uint8 [B, F, 3, H, W], channels last in memory
    masks: PretrainingMasks
    valid: torch.Tensor  # bool [B]
    keys: list[str]
    slots: list[Slot]  # where each sample lies
    causes: list[str | None]  # why a sample is not valid; None for those that are, and for empty slots
    group_size: int

    @property
    def bad(self) -> Counter[str]:
        """Unreadable samples by cause; neither empty slots nor retracted samples are bad."""
        return Counter(cause for cause in self.causes if cause not in (None, RETRACTED))

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
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

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that :meth:`to` overlaps with computing (the DataLoader calls this)."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.pin_memory(),
            attention_mask=self.attention_mask.pin_memory(),
            pixel_values=self.pixel_values.pin_memory(),
            masks=self.masks.pin_memory(),
            valid=self.valid.pin_memory(),
        )


class StageSampler(Sampler[list[Slot]]):
    """The slots of one worker's batches, from ``start_step`` to the stage's end, ``accumulation`` lists a step."""

    def __init__(
        self,
        stage: StageBlock,
        train: TrainBlock,
        readers: dict[str, ShardReader],
        *,
        seed: int,
        start_step: int,
        worker: int,
        workers: int,
    ) -> None:
        self._stage, self._train, self._start_step = stage, train, start_step
        self._worker, self._workers = worker, workers
        self._order = DataOrder(train, {name: reader.manifest for name, reader in readers.items()}, seed)

    @property
    def group_size(self) -> int:
        """Samples that one lane gives to one contrastive batch."""
        global_batch = self._stage.global_batch or self._train.global_batch
        return global_batch // (self._train.lanes * self._train.accumulation)

    @property
    def batch_size(self) -> int:
        """Samples of one worker in one contrastive batch."""
        global_batch = self._stage.global_batch or self._train.global_batch
        return global_batch // (self._train.accumulation * self._workers)

    def __len__(self) -> int:
        return (self._stage.steps - self._start_step) * self._train.accumulation

    def __iter__(self) -> Iterator[list[Slot]]:
        for step in self._order.stage(self._stage, self._start_step):
            slots = self._order.slots(step, self._worker, self._workers)
            lanes = self._train.lanes // self._workers
            by_batch = slots.reshape(lanes, self._train.accumulation, self.group_size, 2).swapaxes(0, 1)
            for part in by_batch:
                yield [
                    Slot(step.dataset, shard, row, step.epoch) for shard, row in part.reshape(-1, 2).tolist()
                ]


class StageDataset(Dataset[Sample]):
    """Samples by slot: read, decode, augment. Lives in the loader processes; holds no state between samples."""

    def __init__(
        self, readers: dict[str, ShardReader], stage: StageBlock, *, image_size: int, seed: int
    ) -> None:
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
    stage: StageBlock,
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
    """The batches of one worker for the rest of a stage, in order, ``train.accumulation`` a step.

    ``around`` may wrap the sampler, e.g. to fetch what its batches need.
    """
    sampler = StageSampler(
        stage, train, readers, seed=seed, start_step=start_step, worker=worker, workers=workers
    )
    dataset = StageDataset(readers, stage, image_size=config.image_size, seed=seed)
    memory = None
    if train.loader_processes:
        slots = PREFETCHED_BATCHES + 2  # the batch at hand and the one before it
        size = dataset.largest_pixels * sampler.batch_size
        memory = SharedPixels(train.loader_processes, slots, size)
    return DataLoader(
        dataset,
        batch_sampler=around(sampler) if around is not None else sampler,
        num_workers=train.loader_processes,
        collate_fn=Collator(config, tokenizer, sampler.group_size, memory),
        # s3fs and gloo threads do not survive a fork; the server process forks before either exists.
        multiprocessing_context="forkserver" if train.loader_processes else None,
        prefetch_factor=PREFETCHED_BATCHES if train.loader_processes else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_loader_process,
    )


def _begin_loader_process(_: int) -> None:
    # Loader processes share the cores with the training; more threads each only contend.
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    send_batches_through_slots()
