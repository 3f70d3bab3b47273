"""Which pairs the matching head judges, and its judgement, in passes of one picture and up to 32 captions.

All captions that meet a picture stand together, by length, so that the picture is read into the first fusion layer
once for all of them and little of a pass is padding. The last layer runs for the class tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.evaluation.blocks import ROWS
from pipeline.evaluation.tasks.retrieval.gallery import Gallery
from pipeline.evaluation.tasks.retrieval.ranking import Found
from pipeline.evaluation.tasks.retrieval.states import Fusion


class Pairs:
    """Distinct pairs of I pictures and N captions, sorted by picture, then by the caption's place by length.

    Args:
        order: [N], the caption at each place.
        keys: sorted distinct ``picture * N + place``; None: every pair.
        images: I.
    """

    def __init__(self, order: Tensor, images: int, keys: Tensor | None) -> None:
        self._order, self._texts, self._keys = order, len(order), keys
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order))
        edges = torch.arange(images + 1) * self._texts
        self._first = (edges if keys is None else torch.searchsorted(keys, edges)).tolist()

    @classmethod
    def listed(cls, order: Tensor, to_images: Found, to_texts: Found) -> Pairs:
        """The pairs of both shortlists; one that is on both counts once."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        by_text = to_images.shortlist * len(order) + place[:, None]
        by_image = torch.arange(len(to_texts.shortlist))[:, None] * len(order) + place[to_texts.shortlist]
        keys = torch.unique(torch.cat([by_text.flatten(), by_image.flatten()]))
        return cls(order, len(to_texts.shortlist), keys)

    @classmethod
    def every(cls, order: Tensor, images: int) -> Pairs:
        """All there are."""
        return cls(order, images, None)

    def __len__(self) -> int:
        return self._first[-1]

    def score(self, gallery: Gallery) -> Tensor:
        """Log-odds of the matching head for each pair [P] (fp32)."""
        scores = torch.empty(len(self))
        for images, states in gallery.groups():
            fusions = [fusion for image in images for fusion in self._fusions(image)]
            for ready in gallery.texts.loads(fusions):
                for fusion in ready:
                    scores[fusion.pairs] = gallery.match(states[fusion.image - images.start], fusion.texts)
        return scores

    def pick(self, scores: Tensor, images: Tensor, texts: Tensor) -> Tensor:
        """The ``scores`` [P] of pairs of ``images`` and ``texts``, of any one shape, in that shape."""
        keys = images * self._texts + self._place[texts]
        return scores[keys if self._keys is None else torch.searchsorted(self._keys, keys)]

    def pair(self, number: int) -> tuple[int, int]:
        """The picture and the caption of a pair."""
        image, place = divmod(number if self._keys is None else int(self._keys[number]), self._texts)
        return image, int(self._order[place])

    def _fusions(self, image: int) -> Iterator[Fusion]:
        first, last = self._first[image], self._first[image + 1]
        for start in range(first, last, ROWS):
            pairs = slice(start, min(start + ROWS, last))
            keys = torch.arange(pairs.start, pairs.stop) if self._keys is None else self._keys[pairs]
            yield Fusion(image, pairs, keys - image * self._texts)
