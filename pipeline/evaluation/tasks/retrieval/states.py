"""States of captions before fusion, without their padding, as far as memory for them goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluation.blocks import ROWS, filled


@dataclass(frozen=True)
class Fusion:
    """Captions that are fused with one picture in one pass.

    Args:
        image: the picture.
        pairs: which of all pairs these are.
        texts: [n] int64, places of the captions by length, rising; n <= ROWS.
    """

    image: int
    pairs: slice
    texts: Tensor


class TextStates:
    """N captions in the order of their length: place p of that order is caption ``order[p]``.

    The first of them are kept when they are first encoded, up to ``keep`` bytes; of the others those that are
    needed next are encoded again, up to ``load`` bytes at once (one pass's at least). A caption is always encoded
    in the same block. ``lengths`` [N] are the tokens of each, rising.

    Args:
        ids: [N, T] token ids, padded.
        lengths: [N] tokens of each caption.
        encode: gives states [B, t, D] and embeddings [B, E] (CPU) of token ids and mask [B, t].
    """

    def __init__(
        self,
        ids: Tensor,
        lengths: Tensor,
        encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        keep: int,
        load: int,
    ) -> None:
        self.order = torch.sort(lengths, stable=True).indices
        self._ids, self.lengths, self._encode = ids[self.order], lengths[self.order], encode
        self._keep_bytes, self._load_bytes = keep, load
        self._kept = 0  # captions
        self._capacity = 0  # tokens of captions that are loaded
        self._states = torch.empty(0, 0)  # [tokens, D]: of the kept, then of the loaded
        self._start = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)[:-1]])

    def first_pass(self) -> Iterator[Tensor]:
        """Embeddings [n, E] of each block, in the order of their length; keeps what is to be kept."""
        for start in range(0, len(self._ids), ROWS):
            states, embedding = self._encode_block(start)
            if start == 0:
                self._make_room(states)
            if start < self._kept:
                self._put(states, torch.arange(start, min(start + ROWS, self._kept)), start)
            yield embedding[: min(ROWS, len(self._ids) - start)]

    def loads(self, fusions: list[Fusion]) -> Iterator[list[Fusion]]:
        """The fusions in an order, and in lists, that let all captions of a list be at hand while it is out."""
        if self._kept == len(self._ids):
            yield fusions
            return
        loaded = torch.zeros(len(self._ids), dtype=torch.bool)
        tokens = 0
        ready: list[Fusion] = []
        for fusion in sorted(fusions, key=lambda one: (int(one.texts[-1]), one.image)):
            new = fusion.texts[fusion.texts >= self._kept]
            new = new[~loaded[new]]
            if ready and tokens + int(self.lengths[new].sum()) > self._capacity:
                yield self._loaded(ready, loaded)
                loaded.zero_()
                tokens, ready = 0, []
                new = fusion.texts[fusion.texts >= self._kept]
            loaded[new] = True
            tokens += int(self.lengths[new].sum())
            ready.append(fusion)
        if ready:
            yield self._loaded(ready, loaded)

    def gather(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """States [n, t, D] and mask [n, t] of captions that are at hand, padded to the longest of them."""
        lengths = self.lengths[places]
        column = torch.arange(int(lengths.max()))
        mask = column < lengths[:, None]
        tokens = torch.where(mask, self._start[places, None] + column, 0)  # any state will do for padding
        return self._states[tokens], mask

    def _make_room(self, states: Tensor) -> None:
        """Decide how much is kept, from the states of a first block."""
        width = states.shape[-1] * states.element_size()
        fitting = int((self.lengths.cumsum(0) * width <= self._keep_bytes).sum())
        self._kept = len(self._ids) if fitting == len(self._ids) else fitting // ROWS * ROWS
        total = int(self.lengths.sum())
        kept = int(self.lengths[: self._kept].sum())
        if self._keep_bytes:
            one_pass = int(self.lengths[-ROWS:].sum())
            self._capacity = min(max(self._load_bytes // width, one_pass), total - kept)
        self._states = states.new_empty(kept + self._capacity, states.shape[-1])

    def _loaded(self, ready: list[Fusion], wanted: Tensor) -> list[Fusion]:
        places = wanted.nonzero()[:, 0]
        begin = int(self.lengths[: self._kept].sum())
        self._start[places] = begin + self.lengths[places].cumsum(0) - self.lengths[places]
        for block in places.div(ROWS, rounding_mode="floor").unique().tolist():
            states, _ = self._encode_block(block * ROWS)
            self._put(states, places[places.div(ROWS, rounding_mode="floor") == block], block * ROWS)
        return ready

    def _put(self, states: Tensor, places: Tensor, first: int) -> None:
        """Copy the rows of some captions from the states [B, t, D] of the block that begins with ``first``."""
        for place in places.tolist():
            start, length = int(self._start[place]), int(self.lengths[place])
            self._states[start : start + length] = states[place - first, :length]

    def _encode_block(self, start: int) -> tuple[Tensor, Tensor]:
        lengths = self.lengths[start : start + ROWS]
        ids = self._ids[start : start + ROWS, : int(lengths.max())]
        return self._encode(*filled(ids, torch.arange(ids.shape[1]) < lengths[:, None]))
