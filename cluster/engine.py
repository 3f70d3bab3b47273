"""DeepSpeed made ready in a worker, on machines with and without CUDA and with and without a compiler."""

from __future__ import annotations

import logging
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def prepare_deepspeed(device: torch.device) -> None:
    """Before ``deepspeed.initialize``: picks the accelerator and hands over the worker's process group.

    Within ``run_workers`` the group that Ray has made is used; in a process of its own (a script, a test) a
    group of one is made. Calling it again changes nothing.

    Raises:
        RuntimeError: DeepSpeed was imported before with the other kind of device.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    _leave_muon_out()
    import deepspeed
    import torch.distributed as dist

    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device.type:
        raise RuntimeError(
            f"DeepSpeed was imported before with accelerator {chosen!r}, the worker has {device}"
        )
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # init_distributed would compile this one: two minutes, and a compiler that not every machine has.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def _leave_muon_out() -> None:
    """Puts empty modules in the place of DeepSpeed's Muon, which nothing here trains with.

    ZeRO asks of every optimizer whether it is a Muon, and importing that readies torch's compiler: one and a half
    seconds of a core at each start of each worker.
    """

    def muon_update(*arguments: object, **options: object) -> None:
        raise AssertionError("no optimizer here is a Muon")

    for name in ("original_muon", "muon_optimizer"):
        module = ModuleType(f"deepspeed.runtime.zero.muon.{name}")
        vars(module).update(MuonWithAuxAdam=type("MuonWithAuxAdam", (), {}), muon_update=muon_update)
        sys.modules.setdefault(module.__name__, module)
