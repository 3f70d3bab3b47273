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

from pipeline.evaluation.attention import attention_examples
from pipeline.evaluation.result import Family, TaskResult
from pipeline.evaluation.tasks.base import TaskContext
from pipeline.evaluation.tasks.retrieval.config import RetrievalTask
from pipeline.evaluation.tasks.retrieval.examples import FIRST, examples
from pipeline.evaluation.tasks.retrieval.gallery import Gallery
from pipeline.evaluation.tasks.retrieval.pairs import Pairs
from pipeline.evaluation.tasks.retrieval.ranking import (
    ITC_TIE,
    ITM_TIE,
    RECALLS,
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
        the matching head has ordered the shortlist, or all; ``t2i_chance_R1``... and ``i2t_chance_R1``... of random
        ranks; ``candidates_images``, ``candidates_texts``, and ``skipped`` (unreadable samples).

    Raises:
        BadDataLimit: more than ``task.bad_limit`` of the samples cannot be read.
        UserError: fewer than two samples.
    """
    assert context.reader is not None
    with torch.inference_mode():
        gallery = Gallery(context, task)
        gallery.embed()
        to_images, to_texts = by_similarity(gallery)
        by_text, by_image = recall(to_images.ranks, "t2i"), recall(to_texts.ranks, "i2t")
        judged = 0
        if task.rerank:
            pairs = pairs_to_judge(gallery, to_images, to_texts)
            judged = len(pairs)
            log.info("evaluation %s: the matching head judges %d pairs", task.name, judged)
            scores = pairs.score(gallery)
            to_images, to_texts = by_matching(gallery, pairs, scores, to_images, to_texts)
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
            **{f"t2i_chance_R{k}": chance(torch.ones(len(owners)), len(gallery.keys), k) for k in RECALLS},
            **{f"i2t_chance_R{k}": chance(captions, len(owners), k) for k in RECALLS},
            "candidates_images": float(len(gallery.keys)),
            "candidates_texts": float(len(owners)),
            "skipped": float(sum(gallery.skipped.values())),
        },
        examples=[
            *examples(gallery, to_images, to_texts, context.seed, by_matching=bool(task.rerank)),
            *attention_examples(
                context.model,
                context.processor,
                context.reader,
                context.seed,
                frames=task.frames,
                limit=task.limit,
            ),
        ],
        details={"pairs_judged": judged},
    )


def _names(gallery: Gallery, captions: Tensor) -> list[str]:
    """``KEY#0``, ``KEY#1``... of each picture's captions, of which it has so many."""
    return [
        f"{key}#{n}" for key, count in zip(gallery.keys, captions.tolist(), strict=True) for n in range(count)
    ]


def by_similarity(gallery: Gallery) -> tuple[Found, Found]:
    """Captions asking for pictures and pictures asking for captions, by ITC, on an embedded gallery."""
    images, texts, owner = gallery.image_embeddings, gallery.text_embeddings, gallery.owner
    numbers = torch.arange(len(images))
    listed = FIRST if gallery.task.rerank == "all" else max(FIRST, gallery.task.rerank)
    return (
        search(lambda part: texts[part] @ images.T, owner, numbers, listed, ITC_TIE),
        search(lambda part: images[part] @ texts.T, numbers, owner, listed, ITC_TIE),
    )


def pairs_to_judge(gallery: Gallery, to_images: Found, to_texts: Found) -> Pairs:
    """Those that ``rerank`` asks for, of what was found by similarity."""
    order, k = gallery.texts.order, gallery.task.rerank
    if k == "all":
        return Pairs.every(order, len(gallery.keys))
    return Pairs.listed(order, to_images.first(k), to_texts.first(k))


def by_matching(
    gallery: Gallery, pairs: Pairs, scores: Tensor, to_images: Found, to_texts: Found
) -> tuple[Found, Found]:
    """What was found by similarity in the order of the matching head, of the ``scores`` [P] of all ``pairs``."""
    owner, k = gallery.owner, gallery.task.rerank
    images, texts = torch.arange(len(gallery.keys)), torch.arange(len(owner))
    if k == "all":
        return (
            search(lambda part: pairs.pick(scores, images, texts[part, None]), owner, images, FIRST, ITM_TIE),
            search(lambda part: pairs.pick(scores, images[part, None], texts), images, owner, FIRST, ITM_TIE),
        )
    to_images, to_texts = to_images.first(k), to_texts.first(k)
    of_texts = pairs.pick(scores, to_images.shortlist, texts[:, None])
    of_images = pairs.pick(scores, images[:, None], to_texts.shortlist)
    return (
        reranked(to_images, of_texts, owner, images, ITM_TIE),
        reranked(to_texts, of_images, images, owner, ITM_TIE),
    )
