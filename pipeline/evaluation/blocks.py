"""Passes of fixed shapes: the numbers of an evaluation do not depend on its batch size, or on who computes them.

A matrix product over 5 rows may add up in another order than one over 64, and attention over a text that is padded
to 50 tokens in another order than over one padded to 12. So the shapes of every pass are a property of the data::

    data, in its own order   0 1 2 ... 31 | 32 33 ... 63 | 64 65        those that can be read
    blocks                   |     0      |      1       |  2, filled up to 32 rows by repeating its first

``batch_size`` only says how many samples are read, and held, at once; a process that takes some of the blocks gets
for them what one process gets for all. A task writes::

    samples = (sample for batch in in_blocks(places, task.batch_size) for sample in read(batch))
    for block in in_blocks(samples):
        tokens = processor.tokenize([sample.text for sample in block])  # padded to the longest of the block
        ids, mask, pixels = filled(tokens["input_ids"], tokens["attention_mask"], torch.stack(...))
        logits = model(ids, mask, pixels).logits[: len(block)]

The promise holds on one kind of processor and for one number of threads (an evaluation on the CPU has one).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

#: Rows of a pass. Other rows are other last digits: raise ``VERSION`` of the tasks when it changes.
ROWS = 32


def in_blocks(items: Iterable[T], rows: int = ROWS) -> Iterator[list[T]]:
    """The items in blocks of ``rows``, taken as they are needed; the last has what is left."""
    iterator = iter(items)
    while block := list(itertools.islice(iterator, rows)):
        yield block


def filled(*inputs: Tensor, rows: int = ROWS) -> tuple[Tensor, ...]:
    """Each input [N, ...], 1 <= N <= ``rows``, as [``rows``, ...]: its first row is repeated to fill it up.

    The first row, as it is valid input of any model; what comes out for it is thrown away. Always a copy: products
    may add up in another order over memory that begins elsewhere in a cache line, as that of a slice does.
    """
    assert all(1 <= len(one) <= rows for one in inputs)
    return tuple(torch.cat([one, one[:1].expand(rows - len(one), *one.shape[1:])]) for one in inputs)
