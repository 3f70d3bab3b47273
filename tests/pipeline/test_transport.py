"""Promises about the memory that batches travel in: right pixels, used again, never while somebody holds them."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.training.transport import SharedPixels, send_batches_through_slots, stack_pixels

SHAPE = (2, 3, 16, 20)  # of a sample
BATCH = 4
SLOTS = 3


class Numbered(Dataset[torch.Tensor]):
    """Sample i is filled with i (modulo 251), channels last in memory."""

    def __getitem__(self, index: int) -> torch.Tensor:
        frames, channels, height, width = SHAPE
        return torch.full((frames, height, width, channels), index % 251, dtype=torch.uint8).permute(
            0, 3, 1, 2
        )


class Collate:
    def __init__(self, memory: SharedPixels | None) -> None:
        self.memory = memory

    def __call__(self, samples: list[torch.Tensor]) -> dict[str, Any]:
        pixels = stack_pixels(samples, self.memory)
        slot = None if self.memory is None else self.memory.slot_of(pixels)
        return {
            "pixels": pixels,
            "slot": slot,
            "numbers": pixels[:, 0, 0, 0, 0].long(),
            "large": torch.ones(300_000),
        }


def _begin(_: int) -> None:
    torch.set_num_threads(1)
    send_batches_through_slots()


def _loader(size: int = BATCH * int(np.prod(SHAPE))) -> DataLoader[Any]:
    return DataLoader(
        Numbered(),
        batch_sampler=[list(range(start, start + BATCH)) for start in range(0, 40 * BATCH, BATCH)],
        num_workers=2,
        collate_fn=Collate(SharedPixels(2, SLOTS, size)),
        multiprocessing_context="forkserver",
        prefetch_factor=1,
        worker_init_fn=_begin,
    )


def _check(batch: dict[str, Any], number: int) -> None:
    expected = torch.arange(number * BATCH, (number + 1) * BATCH) % 251
    assert batch["pixels"].shape == (BATCH, *SHAPE)
    assert torch.equal(
        batch["pixels"], expected.to(torch.uint8)[:, None, None, None, None].expand(BATCH, *SHAPE)
    )
    assert torch.equal(batch["numbers"], expected)
    assert batch["large"].sum() == 300_000


@pytest.fixture(scope="module")
def loader() -> DataLoader[Any]:
    return _loader()


def test_batches_arrive_in_slots_that_are_used_over_and_over(loader: DataLoader[Any]) -> None:
    slots = []
    for number, batch in enumerate(loader):
        _check(batch, number)
        slots.append(batch["slot"])
    assert len(slots) == 40
    assert None not in slots
    assert set(slots) <= set(range(2 * SLOTS))


def test_batches_that_are_kept_stay_as_they_are_and_the_rest_gets_other_memory(
    loader: DataLoader[Any],
) -> None:
    kept = list(loader)
    for number, batch in enumerate(kept):
        _check(batch, number)
    slots = [batch["slot"] for batch in kept if batch["slot"] is not None]
    assert len(slots) == len(set(slots)) == 2 * SLOTS


def test_a_slot_is_held_by_the_last_view_of_its_pixels(loader: DataLoader[Any]) -> None:
    views = []
    for number, batch in enumerate(loader):
        if number < 2:
            views.append(batch["pixels"][1:, :, 0])
        slot = batch["slot"]
        assert number < 2 or slot not in [0, SLOTS]
    assert [view[0, 0, 0, 0].item() for view in views] == [1, BATCH + 1]
    del views, batch
    gc.collect()
    assert not loader.collate_fn.memory._taken.any()


def test_a_batch_too_large_for_a_slot_gets_other_memory() -> None:
    for number, batch in enumerate(_loader(size=1)):
        assert batch["slot"] is None
        _check(batch, number)
        if number == 3:
            break


def test_without_loader_processes_pixels_are_stacked_as_ever() -> None:
    memory = SharedPixels(1, 1, 1 << 20)
    samples = [Numbered()[i] for i in range(BATCH)]
    for pixels in (stack_pixels(samples, None), stack_pixels(samples, memory)):
        assert torch.equal(pixels, torch.stack(samples))
        assert memory.slot_of(pixels) is None


def test_pixels_can_be_written_to_where_they_arrive(loader: DataLoader[Any]) -> None:
    for batch in loader:
        batch["pixels"].add_(1)
        batch["numbers"].add_(1)
        break
    assert batch["pixels"].max() == BATCH
