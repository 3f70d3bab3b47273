"""A pass has the same shape whatever the batch size, and so the same numbers to the last digit."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from pipeline.evaluation.blocks import ROWS, filled, in_blocks

COUNT = 2 * ROWS + 5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as an evaluation has
    yield
    torch.set_num_threads(threads)


@functools.cache
def make_model() -> tuple[GLSCLForPreTraining, GLSCLProcessor]:
    config = GLSCLConfig.preset("tiny", vision_layers=1, text_layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GLSCLForPreTraining(config).eval(), GLSCLProcessor.from_config(config)


def text(number: int) -> str:
    return "a red apple " + "beside a small dog " * (number * 7 % 5)


def picture(number: int) -> Tensor:
    pixels = np.random.default_rng(number).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8)
    return torch.from_numpy(pixels)


def scores(block: list[int]) -> Tensor:
    """Similarity and matching logits [N, 3] of text n and picture n, in one pass."""
    model, processor = make_model()
    tokens = processor.tokenize([text(number) for number in block])
    pixels = torch.stack([picture(number) for number in block])
    ids, mask, pixels = filled(tokens["input_ids"], tokens["attention_mask"], pixels)
    with torch.inference_mode():
        one, other = model.encode_text(ids, mask), model.encode_vision(pixels)
        itm = model.match(one.states, mask, other.states, 1)
        return torch.cat([(one.embedding * other.embedding).sum(1, keepdim=True), itm], 1)[: len(block)]


def share(arguments: tuple[int, int]) -> list[tuple[int, list[list[float]]]]:
    """The scores of every ``workers``-th block, from ``worker`` on, with the block's number."""
    worker, workers = arguments
    torch.set_num_threads(1)
    mine = list(enumerate(in_blocks(range(COUNT))))[worker::workers]
    return [(number, scores(block).tolist()) for number, block in mine]


def test_the_last_block_has_what_is_left_and_nothing_is_taken_early() -> None:
    taken: list[int] = []
    items = (taken.append(number) or number for number in range(7))
    iterator = in_blocks(items, 3)
    assert next(iterator) == [0, 1, 2]
    assert taken == [0, 1, 2]
    assert list(iterator) == [[3, 4, 5], [6]]
    assert list(in_blocks([])) == []


def test_a_block_is_filled_with_its_first_row_in_memory_of_its_own() -> None:
    rows = torch.arange(12.0).view(6, 2)
    (whole,) = filled(rows[1:4], rows=5)
    assert whole.tolist() == [[2, 3], [4, 5], [6, 7], [2, 3], [2, 3]]
    (full,) = filled(rows, rows=6)
    assert torch.equal(full, rows)
    assert full.data_ptr() != rows.data_ptr()
    with pytest.raises(AssertionError):
        filled(rows, rows=5)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_do_not_depend_on_how_full_the_block_is_and_what_fills_it(rows: int) -> None:
    block = list(range(rows))
    longest = max(len(text(number)) for number in block)
    others = [number for number in range(100, 400) if len(text(number)) <= longest]
    assert torch.equal(scores(block + others[: ROWS - rows])[:rows], scores(block))


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_are_equal_to_the_last_digit_whatever_the_batch_size(batch_size: int) -> None:
    expected = torch.cat([scores(block) for block in in_blocks(range(COUNT))])
    read = (number for batch in in_blocks(range(COUNT), batch_size) for number in batch)
    assert torch.equal(torch.cat([scores(block) for block in in_blocks(read)]), expected)
    assert len(expected) == COUNT
    assert len(expected.unique(dim=0)) == COUNT


@pytest.mark.slow
def test_scores_are_equal_to_the_last_digit_when_processes_share_the_blocks() -> None:
    alone = [rows for _, rows in share((0, 1))]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        shared = sorted(block for part in pool.map(share, [(0, 2), (1, 2)]) for block in part)
    assert [rows for _, rows in shared] == alone
