"""A few queries to look at, with what they found first."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from pipeline.evaluation.result import Example
from pipeline.evaluation.tasks.retrieval.gallery import Gallery
from pipeline.evaluation.tasks.retrieval.ranking import Found
from sharding.seeds import derive_seed, generator

_SHOWN = 3  # of the right and of the wrong, each way
#: Candidates that are shown of each query.
FIRST = 5


def examples(
    gallery: Gallery, to_images: Found, to_texts: Found, seed: int, *, by_matching: bool
) -> list[Example]:
    """Queries each way, right and wrong: the first of an order that is drawn by the run's seed.

    So the same queries come up for all checkpoints, as long as they are right, or wrong, for all of them.

    Args:
        by_matching: the scores are log-odds of the matching head, not cosines.
    """
    score = _probability if by_matching else _cosine
    chosen = [_caption(gallery, to_images, query, score) for query in _drawn(to_images.ranks, seed, "t2i")]
    return chosen + [
        _picture(gallery, to_texts, query, score) for query in _drawn(to_texts.ranks, seed, "i2t")
    ]


def _drawn(ranks: Tensor, seed: int, direction: str) -> list[int]:
    order = generator(derive_seed(seed, "evaluation.examples", direction)).permutation(len(ranks)).tolist()
    right = [query for query in order if ranks[query] == 1][:_SHOWN]
    return right + [query for query in order if ranks[query] != 1][:_SHOWN]


def _caption(gallery: Gallery, found: Found, query: int, score: Callable[[float], str]) -> Example:
    true, rank, first = int(gallery.owner[query]), int(found.ranks[query]), _first(found, query)
    shown = [(place, image, score(value)) for place, (image, value) in enumerate(first, 1)]
    if all(image != true for image, _ in first):
        shown.append((rank, true, ""))
    # No keys beside the pictures: they are paths as often as not, and longer than a thumbnail is wide.
    pictures = [
        (gallery.thumbnail(image), " ".join([f"{place}.", *["true"] * (image == true), value]).rstrip())
        for place, image, value in shown
    ]
    lines = [("rank of the true picture", str(rank)), ("its key", gallery.keys[true])]
    return Example(f"“{gallery.captions[query]}”", rank == 1, pictures, lines)


def _picture(gallery: Gallery, found: Found, query: int, score: Callable[[float], str]) -> Example:
    rank, key, first = int(found.ranks[query]), gallery.keys[query], _first(found, query)
    lines = [
        (
            f"{place}.{' true' if gallery.owner[text] == query else ''}",
            f"{gallery.captions[text]} ({score(value)})",
        )
        for place, (text, value) in enumerate(first, 1)
    ]
    if all(gallery.owner[text] != query for text, _ in first):
        own = (gallery.owner == query).nonzero()[:, 0].tolist()
        lines.append((f"{rank}. true", " | ".join(gallery.captions[text] for text in own)))
    return Example(
        f"captions of {key}",
        rank == 1,
        [(gallery.thumbnail(query), key)],
        [*lines, ("rank of its best caption", str(rank))],
    )


def _first(found: Found, query: int) -> list[tuple[int, float]]:
    return list(
        zip(found.shortlist[query, :FIRST].tolist(), found.scores[query, :FIRST].tolist(), strict=True)
    )


def _probability(log_odds: float) -> str:
    return (
        f"matches with {1 / (1 + math.exp(-log_odds)):.3f}"
        if abs(log_odds) < 500
        else f"log-odds {log_odds:.0f}"
    )


def _cosine(value: float) -> str:
    return f"cosine {value:.3f}"
