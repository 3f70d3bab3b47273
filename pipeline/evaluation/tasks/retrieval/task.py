"""Zero-shot retrieval between captions and pictures (or clips), GLSCL's section 6.

    1. every sample is read once: an ITC embedding for each picture and each caption (kept, fp32)
    2. cosine similarities in blocks of rows; ranks of the right candidates, and each query's shortlist
    3. the matching head scores the shortlisted pairs (or all), picture by picture; encoder states wait in a bounded
       cache or are encoded again (the picture is read again for it)

Memory: embeddings (E floats a caption and a picture), the shortlists and a score for each pair, ``cache_mb`` of
states, one pass, one block of similarities, ``batch_size`` decoded samples. Every pass has a shape that the data
alone decide (:mod:`pipeline.evaluation.blocks`): ``batch_size`` and ``cache_mb`` change no digit of the results.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from pipeline.evaluation.result import Family, TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.examples import FIRST, examples
from pipeline.evaluation.tasks.retrieval.gallery import Gallery
from pipeline.evaluation.tasks.retrieval.pairs import Pairs
from pipeline.evaluation.tasks.retrieval.ranking import (
    ITC_TIE,
    ITM_TIE,
    Found,
    chance,
    recall,
    reranked,
    search,
)

log = logging.getLogger("pipeline.evaluation")


def evaluate(context: TaskContext, task: RetrievalTask) -> TaskResult:
    """Recall both ways.

    Args:
        context: its reader is of the held-out pairs; the manifest says whether they are images or videos.
        task: see :class:`RetrievalTask`.

    Returns:
        families ``t2i`` (an item is a caption) and ``i2t`` (a picture), with
        ``t2i_R1``, ``_R5``, ``_R10`` (captions asking for pictures; shares of 1), ``t2i_median_rank``, the
        same with ``i2t_`` (pictures asking for captions); with ``t2i_rerank_`` and ``i2t_rerank_`` after
        the matching head has ordered the shortlist, or all; ``t2i_chance_R10`` and ``i2t_chance_R10`` of random
        ranks; ``candidates_images``, ``candidates_texts``, and ``skipped`` (unreadable samples).

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the samples cannot be read.
        UserError: fewer than two samples.
    """
    with torch.inference_mode():
        gallery = Gallery(context, task)
        gallery.embed()
        to_images, to_texts = _by_similarity(gallery)
        by_text, by_image = recall(to_images.ranks, "t2i"), recall(to_texts.ranks, "i2t")
        if task.rerank:
            to_images, to_texts = _by_matching(gallery, to_images, to_texts)
            by_text |= recall(to_images.ranks, "t2i_rerank")
            by_image |= recall(to_texts.ranks, "i2t_rerank")
    owners = [gallery.keys[image] for image in gallery.owner.tolist()]
    captions = torch.bincount(gallery.owner, minlength=len(gallery.keys))
    return TaskResult(
        families=[
            Family("t2i", _names(gallery, captions), by_text, owners),
            Family("i2t", gallery.keys, by_image),
        ],
        facts={
            "t2i_chance_R10": chance(torch.ones(len(owners)), len(gallery.keys)),
            "i2t_chance_R10": chance(captions, len(owners)),
            "candidates_images": float(len(gallery.keys)),
            "candidates_texts": float(len(owners)),
            "skipped": float(sum(gallery.skipped.values())),
        },
        examples=examples(gallery, to_images, to_texts, context.seed, by_matching=bool(task.rerank)),
    )


def _names(gallery: Gallery, captions: Tensor) -> list[str]:
    """``KEY#0``, ``KEY#1``... of each picture's captions, of which it has so many."""
    return [
        f"{key}#{n}" for key, count in zip(gallery.keys, captions.tolist(), strict=True) for n in range(count)
    ]


def _by_similarity(gallery: Gallery) -> tuple[Found, Found]:
    """Captions asking for pictures and pictures asking for captions, by ITC."""
    images, texts, owner = gallery.image_embeddings, gallery.text_embeddings, gallery.owner
    numbers = torch.arange(len(images))
    listed = FIRST if gallery.task.rerank == "all" else max(FIRST, gallery.task.rerank)
    return (
        search(lambda part: texts[part] @ images.T, owner, numbers, listed, ITC_TIE),
        search(lambda part: images[part] @ texts.T, numbers, owner, listed, ITC_TIE),
    )


def _by_matching(gallery: Gallery, to_images: Found, to_texts: Found) -> tuple[Found, Found]:
    """The same by the matching head: the shortlists, or everything."""
    owner, numbers, captions = (
        gallery.owner,
        torch.arange(len(gallery.keys)),
        torch.arange(len(gallery.owner)),
    )
    order = gallery.texts.order
    if gallery.task.rerank == "all":
        pairs = Pairs.every(order, len(numbers))
        log.info("evaluation %s: all %d pairs are fused", gallery.task.name, len(pairs))
        scores = pairs.score(gallery)
        return (
            search(
                lambda part: pairs.pick(scores, numbers, captions[part, None]), owner, numbers, FIRST, ITM_TIE
            ),
            search(
                lambda part: pairs.pick(scores, numbers[part, None], captions), numbers, owner, FIRST, ITM_TIE
            ),
        )
    k = gallery.task.rerank
    to_images, to_texts = (
        found._replace(shortlist=found.shortlist[:, :k], scores=found.scores[:, :k])
        for found in (to_images, to_texts)
    )
    pairs = Pairs.listed(order, to_images, to_texts)
    log.info("evaluation %s: %d pairs are fused", gallery.task.name, len(pairs))
    scores = pairs.score(gallery)
    return (
        reranked(
            to_images, pairs.pick(scores, to_images.shortlist, captions[:, None]), owner, numbers, ITM_TIE
        ),
        reranked(to_texts, pairs.pick(scores, numbers[:, None], to_texts.shortlist), numbers, owner, ITM_TIE),
    )
