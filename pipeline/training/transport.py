"""The way of batches from the loader processes to the training.

torch puts each tensor of a batch into new shared memory: the pages of a batch's pixels are made, zeroed and torn
down again for every batch, which takes longer than copying them many times over, and each small tensor takes a
descriptor and a handshake. Here pixels go into memory that is used over and over, small tensors with the message.

::

    loader process 0   slot 0  slot 1  ...  slot 5      a slot is taken by its loader process
    loader process 1   slot 6  slot 7  ...  slot 11     and given back when the last tensor over it is gone
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import get_worker_info

_SMALL_BYTES = 1 << 20
_PAGE = mmap.PAGESIZE


class SharedPixels:
    """Slots of memory for the pixels of batches, shared by the training process and its loader processes.

    A loader process that finds no slot of its own free (a consumer that keeps many batches) makes ordinary memory
    instead: nobody ever waits for one. The memory has no name, so that nothing of it outlives the processes, is
    not bounded by /dev/shm, and a page of it is only there once it has been written to.

    Args:
        processes: how many loader processes.
        slots: of each of them: batches on their way and in use.
        size: bytes of the largest batch's pixels.
    """

    def __init__(self, processes: int, slots: int, size: int) -> None:
        self._name = secrets.token_hex(8)
        self._processes, self._slots, self._size = processes, slots, -(-size // _PAGE) * _PAGE
        self._descriptor = os.memfd_create("glscl-pixels", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, self._flags_offset + processes * slots)
        self._attach()

    @property
    def _flags_offset(self) -> int:
        return self._processes * self._slots * self._size

    def _attach(self) -> None:
        self._memory = mmap.mmap(self._descriptor, self._flags_offset + self._processes * self._slots)
        weakref.finalize(self, os.close, self._descriptor)
        # One byte a slot, 1 while it is taken. Only its loader process sets it and only the training clears it,
        # and a byte is written whole: no lock is needed.
        self._taken = np.frombuffer(self._memory, np.uint8, offset=self._flags_offset)
        self._start = self._taken.__array_interface__["data"][0] - self._flags_offset
        _POOLS[self._name] = self

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_name", "_processes", "_slots", "_size")}
        return own | {"descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptor = state.pop("descriptor").detach()
        self.__dict__.update(state)
        self._attach()

    def taken(self, shape: Sequence[int]) -> Tensor | None:
        """uint8 of this shape over a free slot of this loader process; None if there is none, or it is none."""
        slot = self._take(math.prod(shape))
        return None if slot is None else torch.from_numpy(self._array(slot, shape))

    def _take(self, size: int) -> int | None:
        worker = get_worker_info()
        if worker is None or size > self._size:
            return None
        first = worker.id * self._slots
        free = np.flatnonzero(self._taken[first : first + self._slots] == 0)
        if not len(free):
            return None
        slot = first + int(free[0])
        self._taken[slot] = 1
        return slot

    def _array(self, slot: int, shape: Sequence[int]) -> np.ndarray:
        count = math.prod(shape)
        return np.frombuffer(self._memory, np.uint8, count, slot * self._size).reshape(shape)

    def slot_of(self, tensor: Tensor) -> int | None:
        """The slot that the tensor begins in; None if it lies elsewhere."""
        place = tensor.data_ptr() - self._start
        return place // self._size if 0 <= place < self._flags_offset else None

    def received(self, slot: int, shape: Sequence[int]) -> Tensor:
        """uint8 of this (contiguous) shape over a slot, which is free again when the tensor and its views are."""
        array = self._array(slot, shape)
        tensor = torch.from_numpy(array)  # holds the array as long as any tensor shares its memory
        weakref.finalize(array, self._free, slot).atexit = False
        return tensor

    def _free(self, slot: int) -> None:
        self._taken[slot] = 0


def stack_pixels(pixels: Sequence[Tensor], memory: SharedPixels | None) -> Tensor:
    """Samples' pixels uint8 [F, 3, H, W], channels last in memory, as one [B, F, 3, H, W], in a slot if one is free."""
    interleaved = [each.permute(0, 2, 3, 1) for each in pixels]
    out = None if memory is None else memory.taken((len(pixels), *interleaved[0].shape))
    return torch.stack(interleaved, out=out).permute(0, 1, 4, 2, 3)


_POOLS: weakref.WeakValueDictionary[str, SharedPixels] = weakref.WeakValueDictionary()


def send_batches_through_slots() -> None:
    """To be called in a loader process: how it pickles tensors from now on."""
    ForkingPickler.register(Tensor, _reduce)


def _reduce(tensor: Tensor) -> Any:
    for pool in _POOLS.values():
        slot = pool.slot_of(tensor)
        if slot is not None:
            interleaved = tensor.permute(0, 1, 3, 4, 2)
            assert interleaved.is_contiguous()
            return _received, (pool._name, slot, tuple(interleaved.shape))
    if tensor.nbytes <= _SMALL_BYTES:
        return torch.from_numpy, (tensor.numpy(),)
    return reduce_tensor(tensor)


def _received(name: str, slot: int, shape: tuple[int, ...]) -> Tensor:
    return _POOLS[name].received(slot, shape).permute(0, 1, 4, 2, 3)
