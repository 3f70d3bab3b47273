"""Zero-shot retrieval between captions and pictures (or clips), GLSCL's section 6.

    1. every sample is read once, in batches: an ITC embedding for each picture and each caption (kept, fp32)
    2. cosine similarities in blocks of rows; ranks of the right candidates, and each query's shortlist
    3. the matching head scores the shortlisted pairs, in batches; encoder states come from a bounded cache
       or are encoded again (the picture is read again for it)

Memory: embeddings (E floats a caption and a picture), the shortlists, ``cache_mb`` of states, one batch,
one block of similarities. No randomness; the batch size changes results only by rounding.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.result import Family, TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.ranking import (
    ITC_TIE,
    ITM_TIE,
    chance,
    ranks_of,
    recall,
    reranked,
    shortlist,
)
from sharding.decoding import decode_image
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.media import decode_video

if TYPE_CHECKING:
    from sharding.reader import RawSample

log = logging.getLogger("pipeline.evaluation")

_SCORES = 8_000_000  # similarities in one block: 32 MB


def evaluate(context: TaskContext, task: RetrievalTask) -> TaskResult:
    """Recall both ways.

    Args:
        context: its reader is of the held-out pairs; the manifest says whether they are images or videos.
        task: see :class:`RetrievalTask`.

    Returns:
        families ``t2i`` (an item is a caption) and ``i2t`` (a picture), with
        ``t2i_R1``, ``_R5``, ``_R10`` (captions asking for pictures; shares of 1), ``t2i_median_rank``, the
        same with ``i2t_`` (pictures asking for captions); with ``t2i_rerank_`` and ``i2t_rerank_`` after
        the matching head has re-ranked the shortlist; ``t2i_chance_R10`` and ``i2t_chance_R10`` of random
        ranks; ``candidates_images``, ``candidates_texts``, and ``skipped`` (unreadable samples).

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the samples cannot be read.
        UserError: fewer than two samples.
    """
    with torch.inference_mode():
        gallery = _Gallery(context, task)
        gallery.embed()
        owner = torch.tensor(gallery.owner)
        images, texts = gallery.image_embeddings, gallery.text_embeddings
        numbers = torch.arange(len(images))
        to_images = _search(texts, images, owner, numbers, task.rerank)
        to_texts = _search(images, texts, numbers, owner, task.rerank)
        by_text, by_image = recall(to_images.ranks, "t2i"), recall(to_texts.ranks, "i2t")
        if task.rerank:
            pairs = _score_pairs(gallery, to_images.shortlist, to_texts.shortlist)
            by_text |= recall(_rerank(to_images, pairs.to_images, owner, numbers), "t2i_rerank")
            by_image |= recall(_rerank(to_texts, pairs.to_texts, numbers, owner), "i2t_rerank")
    captions = torch.bincount(owner, minlength=len(images))
    owners = [gallery.keys[image] for image in gallery.owner]
    first = torch.cat([torch.zeros(1, dtype=torch.long), captions.cumsum(0)]).tolist()
    names = [
        f"{key}#{number - first[image]}"
        for number, (key, image) in enumerate(zip(owners, gallery.owner, strict=True))
    ]
    return TaskResult(
        families=[Family("t2i", names, by_text, owners), Family("i2t", gallery.keys, by_image)],
        facts={
            "t2i_chance_R10": chance(torch.ones(len(texts)), len(images)),
            "i2t_chance_R10": chance(captions, len(texts)),
            "candidates_images": float(len(images)),
            "candidates_texts": float(len(texts)),
            "skipped": float(sum(gallery.skipped.values())),
        },
    )


class _Found(NamedTuple):
    ranks: Tensor  # [Q] int64
    shortlist: Tensor  # [Q, K] int64, candidates; K may be 0


def _search(queries: Tensor, candidates: Tensor, query_image: Tensor, image: Tensor, k: int) -> _Found:
    """Ranks and shortlists by cosine; a candidate is right when its ``image`` [C] is the ``query_image``
    [Q].
    """
    block = max(1, _SCORES // len(candidates))
    ranks, lists = [], []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ candidates.T
        positive = query_image[start : start + block, None] == image[None, :]
        ranks.append(ranks_of(scores, positive, ITC_TIE))
        lists.append(shortlist(scores, positive, k, ITC_TIE))
    return _Found(torch.cat(ranks), torch.cat(lists))


def _rerank(found: _Found, scores: Tensor, query_image: Tensor, image: Tensor) -> Tensor:
    positive = image[found.shortlist] == query_image[:, None]
    return reranked(found.ranks, scores, positive, ITM_TIE)


class _PairScores(NamedTuple):
    to_images: Tensor  # [texts, K]
    to_texts: Tensor  # [images, K]


def _score_pairs(gallery: _Gallery, images_of_text: Tensor, texts_of_image: Tensor) -> _PairScores:
    """Log-odds of the matching head for the pairs of both shortlists; a pair in both is computed once."""
    texts, size = len(images_of_text), gallery.task.batch_size
    by_text = images_of_text * texts + torch.arange(texts)[:, None]
    by_image = torch.arange(len(texts_of_image))[:, None] * texts + texts_of_image
    pairs = torch.unique(torch.cat([by_text.flatten(), by_image.flatten()]))
    image, text = pairs // texts, pairs % texts
    # Tile by tile: the states of one block of images and one of captions at a time.
    tile = (image // size) * (texts // size + 1) + text // size
    order = torch.sort(tile, stable=True).indices
    scores = torch.empty(len(pairs))
    for part in torch.split(order, torch.unique_consecutive(tile[order], return_counts=True)[1].tolist()):
        image_block, text_block = int(image[part[0]]) // size, int(text[part[0]]) // size
        for batch in torch.split(part, size):
            scores[batch] = gallery.match(
                image_block, image[batch] - image_block * size, text_block, text[batch] - text_block * size
            )
    return _PairScores(
        scores[torch.searchsorted(pairs, by_text)], scores[torch.searchsorted(pairs, by_image)]
    )


class _States(NamedTuple):
    """Encoder states of a block on the CPU; ``mask`` [B, T] of captions, None for pictures."""

    states: Tensor
    mask: Tensor | None

    @property
    def bytes(self) -> int:
        return self.states.nbytes + (0 if self.mask is None else self.mask.nbytes)


@dataclass
class _StateCache:
    """Blocks of states, least recently used out first, within a limit of bytes."""

    limit: int
    _blocks: OrderedDict[tuple[str, int], _States] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def get(self, kind: str, block: int, encode: Callable[[], _States]) -> _States:
        key = (kind, block)
        if key not in self._blocks:
            self.put(kind, block, states := encode())
            return states
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def put(self, kind: str, block: int, states: _States) -> None:
        self._blocks[kind, block] = states
        self._bytes += states.bytes
        while self._bytes > self.limit and len(self._blocks) > 2:  # a block of pictures and one of captions
            self._bytes -= self._blocks.popitem(last=False)[1].bytes


class _Gallery:
    """The pictures and captions of a data set, encoded in blocks of ``task.batch_size``."""

    def __init__(self, context: TaskContext, task: RetrievalTask) -> None:
        assert context.reader is not None
        self.task = task
        self._model, self._processor, self._reader = context.model, context.processor, context.reader
        self._device = next(self._model.parameters()).device
        self._video = self._reader.manifest.modality == "video"
        self._frames = task.frames if self._video else 1
        self._cache = _StateCache(task.cache_mb * 2**20)
        self._where: list[tuple[int, int]] = []  # (shard, row) of each picture
        self._captions: list[str] = []
        self.keys: list[str] = []  # of each picture
        self.owner: list[int] = []  # the picture of each caption
        self.skipped: Counter[str] = Counter()
        self.image_embeddings = torch.empty(0)
        self.text_embeddings = torch.empty(0)

    def embed(self) -> None:
        """Reads everything once."""
        size = self.task.batch_size
        vectors: list[Tensor] = []
        pixels: list[Tensor] = []
        for picture in self._readable():
            pixels.append(picture)
            if len(pixels) == size:
                vectors.append(self._embed_pictures(len(vectors), pixels))
                pixels = []
        if pixels:
            vectors.append(self._embed_pictures(len(vectors), pixels))
        if len(self._where) < 2 or not self._captions:
            raise UserError(
                f"evaluation task {self.task.name!r} needs at least two samples; {self._reader.dataset.url} "
                f"has {len(self._where)} that can be used"
            )
        self.image_embeddings = torch.cat(vectors)
        blocks = range((len(self._captions) + size - 1) // size)
        self.text_embeddings = torch.cat([self._encode_captions(block, keep=True)[1] for block in blocks])

    def match(self, image_block: int, images: Tensor, text_block: int, texts: Tensor) -> Tensor:
        """Log-odds [N] (CPU, fp32) that picture ``images[n]`` and caption ``texts[n]``, counted in their
        blocks, match.
        """
        vision = self._cache.get("image", image_block, lambda: self._encode_again(image_block))
        text = self._cache.get("text", text_block, lambda: self._encode_captions(text_block, keep=False)[0])
        assert text.mask is not None
        logits = self._model.match(
            text.states[texts].to(self._device),
            text.mask[texts].to(self._device),
            vision.states[images].to(self._device),
            self._frames,
        )
        return (logits[:, 1] - logits[:, 0]).float().cpu()

    def _readable(self) -> Iterator[Tensor]:
        """Pixels [F, 3, S, S] of each sample that can be read, in the order of the data set; notes its
        captions.
        """
        wanted = min(len(self._reader), self.task.limit or len(self._reader))
        seen = 0
        for shard, record in enumerate(self._reader.manifest.shards):
            for row in range(record.samples):
                if seen == wanted:
                    return
                seen += 1
                try:
                    sample = self._reader.read(shard, row)
                    pixels = self._pixels(sample)
                except BadData as error:
                    self._pass_over(error, wanted)
                    continue
                self.owner.extend([len(self._where)] * len(sample.captions))
                self._captions.extend(sample.captions)
                self._where.append((shard, row))
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

    def _embed_pictures(self, block: int, pixels: list[Tensor]) -> Tensor:
        states, embedding = self._encode_pictures(pixels)
        if self.task.rerank:
            self._cache.put("image", block, states)
        return embedding

    def _encode_pictures(self, pixels: list[Tensor]) -> tuple[_States, Tensor]:
        features = self._model.encode_vision(torch.stack(pixels).to(self._device))
        return _States(features.states.cpu(), None), features.embedding.float().cpu()

    def _encode_again(self, block: int) -> _States:
        size = self.task.batch_size
        places = self._where[block * size : (block + 1) * size]
        return self._encode_pictures([self._pixels(self._reader.read(*place)) for place in places])[0]

    def _encode_captions(self, block: int, *, keep: bool) -> tuple[_States, Tensor]:
        size = self.task.batch_size
        tokens = self._processor.tokenize(self._captions[block * size : (block + 1) * size])
        features = self._model.encode_text(
            tokens["input_ids"].to(self._device), tokens["attention_mask"].to(self._device)
        )
        states = _States(features.states.cpu(), tokens["attention_mask"])
        if keep and self.task.rerank:
            self._cache.put("text", block, states)
        return states, features.embedding.float().cpu()
