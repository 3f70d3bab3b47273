"""The pictures (or clips) and captions of a data set: read, embedded, and encoded again when their turn comes.

Pictures are encoded in blocks of the data set's order, captions in blocks of theirs by length, so that little of a
block is padding. Both orders are properties of the data, see :mod:`pipeline.evaluation.blocks`.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.evaluation.blocks import ROWS, filled, in_blocks
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.states import TextStates
from sharding.decoding import decode_image
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.media import decode_video

if TYPE_CHECKING:
    from sharding.reader import RawSample

log = logging.getLogger("pipeline.evaluation")

_TOKENISED = 1024  # captions at once
_THUMBNAIL = 160  # pixels of the longer side


class Group(NamedTuple):
    """Pictures whose states are at hand: their numbers, and [V, D] (CPU) of each."""

    images: range
    states: list[Tensor]


class Gallery:
    """After :meth:`embed`: I pictures and N captions of a data set.

    Attributes:
        keys: of the pictures.
        captions: their captions, one picture after the other.
        owner: [N] int64, the picture of each caption.
        image_embeddings, text_embeddings: [I, E] and [N, E], fp32, of unit length, on the CPU.
        texts: states of the captions.
        skipped: unreadable samples by cause.
    """

    def __init__(self, context: TaskContext, task: RetrievalTask) -> None:
        assert context.reader is not None
        self.task = task
        self._model, self._processor, self._reader = context.model, context.processor, context.reader
        self._device = next(self._model.parameters()).device
        self._video = self._reader.manifest.modality == "video"
        self._frames = task.frames if self._video else 1
        self._budget = task.cache_mb * 2**20 if task.rerank else 0
        self._where: list[tuple[int, int]] = []  # (shard, row) of each picture
        self._owner: list[int] = []
        self._group_blocks = 1
        self._first_group: list[Tensor] = []  # states that wait for their pairs since they were embedded
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.skipped: Counter[str] = Counter()

    def embed(self) -> None:
        """Read and encode everything once.

        Raises:
            BadDataLimit: more than ``bad_limit`` of the samples cannot be read.
            UserError: fewer than two can.
        """
        vectors = []
        for number, pixels in enumerate(in_blocks(self._readable())):
            states, embedding = self._encode_pictures(pixels)
            vectors.append(embedding)
            if number == 0:  # a quarter of the cache is for pictures
                self._group_blocks = max(1, self._budget // 4 // (ROWS * states[0].nbytes))
            if self.task.rerank and number < self._group_blocks:
                self._first_group += states
        if len(self._where) < 2 or not self.captions:
            raise UserError(
                f"evaluation task {self.task.name!r} needs at least two samples; {self._reader.dataset.url} "
                f"has {len(self._where)} that can be used"
            )
        self.owner = torch.tensor(self._owner)
        self.image_embeddings = torch.cat(vectors)
        self._embed_captions()

    def groups(self) -> Iterator[Group]:
        """All pictures with their states, in their order, as many at a time as a quarter of the cache holds."""
        size = self._group_blocks * ROWS
        for start in range(0, len(self._where), size):
            images = range(start, min(start + size, len(self._where)))
            if start == 0:
                group, self._first_group = Group(images, self._first_group), []
            else:
                states: list[Tensor] = []
                for block in in_blocks(images):
                    states += self._encode_pictures([self._pixels_of(image) for image in block])[0]
                group = Group(images, states)
            yield group

    def match(self, image: Tensor, texts: Tensor) -> Tensor:
        """Log-odds [n] (CPU, fp32) that a picture of states [V, D] matches captions; ``texts`` [n], n <= ROWS, are
        their places by length, rising, and their states are at hand.

        The pass has a multiple of 8 rows.
        """
        states, mask = filled(*self.texts.gather(texts), rows=-(-len(texts) // 8) * 8)
        logits = self._model.match(
            states.to(self._device),
            mask.to(self._device),
            image[None].to(self._device),
            self._frames,
            torch.zeros(len(states), dtype=torch.long, device=self._device),
        )[: len(texts)]
        return (logits[:, 1] - logits[:, 0]).float().cpu()

    def thumbnail(self, image: int) -> bytes:
        """A small JPEG of a picture; of a clip its middle frame."""
        sample = self._reader.read(*self._where[image])
        if self._video:
            frames = decode_video(sample.media, self.task.frames)
            picture = Image.fromarray(frames[len(frames) // 2])
        else:
            picture = Image.fromarray(np.asarray(decode_image(sample.media)))
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        target = io.BytesIO()
        picture.save(target, "JPEG", quality=80)
        return target.getvalue()

    def _readable(self) -> Iterator[Tensor]:
        """Pixels [F, 3, S, S] of each sample that can be read, in the order of the data set; notes its captions."""
        wanted = min(len(self._reader), self.task.limit or len(self._reader))
        records = enumerate(self._reader.manifest.shards)
        places = [(shard, row) for shard, record in records for row in range(record.samples)][:wanted]
        for batch in in_blocks(places, self.task.batch_size):
            read: dict[int, tuple[RawSample, Tensor] | BadData] = {}
            for number, sample in self._reader.read_many(batch):
                try:
                    if isinstance(sample, BadData):
                        raise sample
                    read[number] = sample, self._pixels(sample)
                except BadData as error:
                    read[number] = error
            for number, place in enumerate(batch):
                found = read.pop(number)
                if isinstance(found, BadData):
                    self._pass_over(found, wanted)
                    continue
                sample, pixels = found
                self._owner.extend([len(self._where)] * len(sample.captions))
                self.captions.extend(sample.captions)
                self._where.append(place)
                self.keys.append(sample.key)
                yield pixels

    def _pass_over(self, error: BadData, total: int) -> None:
        if error.cause == "dropped":  # on purpose, by the manifest
            return
        self.skipped[error.cause] += 1
        log.warning("evaluation %s passes over a sample: %s", self.task.name, error)
        if sum(self.skipped.values()) > self.task.bad_limit * total:
            causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(self.skipped.items()))
            raise BadDataLimit(
                f"evaluation {self.task.name!r}: more than {self.task.bad_limit:.1%} of {total} samples of "
                f"{self._reader.dataset.url} cannot be read ({causes})"
            )

    def _pixels(self, sample: RawSample) -> Tensor:
        if self._video:
            return self._processor.video(decode_video(sample.media, self.task.frames))
        return self._processor.video(np.asarray(decode_image(sample.media))[None])

    def _pixels_of(self, image: int) -> Tensor:
        return self._pixels(self._reader.read(*self._where[image]))

    def _encode_pictures(self, pixels: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """States [V, D] of each and embeddings [n, E] of a block, on the CPU."""
        (block,) = filled(torch.stack(pixels))
        features = self._model.encode_vision(block.to(self._device))
        states = features.states.cpu()
        # Copies, so that none keeps the whole block in memory.
        kept = [states[row].clone() for row in range(len(pixels))] if self.task.rerank else [states[0]]
        return kept, features.embedding[: len(pixels)].float().cpu()

    def _embed_captions(self) -> None:
        ids, lengths = self._tokenised()
        self.texts = TextStates(ids, lengths, self._encode_texts, self._budget // 2, self._budget // 4)
        vectors = torch.cat(list(self.texts.first_pass()))
        self.text_embeddings = torch.empty_like(vectors)
        self.text_embeddings[self.texts.order] = vectors

    def _tokenised(self) -> tuple[Tensor, Tensor]:
        """Token ids [N, T] of all captions, padded, and how many are theirs [N]."""
        parts = [self._processor.tokenize(block) for block in in_blocks(self.captions, _TOKENISED)]
        longest = max(part["input_ids"].shape[1] for part in parts)
        ids = torch.full((len(self.captions), longest), self._model.config.pad_token_id)
        for number, part in enumerate(parts):
            rows = ids[number * _TOKENISED : (number + 1) * _TOKENISED]
            rows[:, : part["input_ids"].shape[1]] = part["input_ids"]
        return ids, torch.cat([part["attention_mask"].sum(1) for part in parts])

    def _encode_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        features = self._model.encode_text(ids.to(self._device), mask.to(self._device))
        return features.states.cpu(), features.embedding.float().cpu()
