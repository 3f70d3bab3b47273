"""Out of memory: the same configuration would run out again, so the run ends and the message says what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from pipeline.errors import OutOfMemory, too_many_files

if TYPE_CHECKING:
    from cluster.workers import WorkerContext
    from pipeline.training.config import Course

# What torch's allocators, cuBLAS and NCCL say, on the device, the host and in a loader process.
_DEVICE = re.compile(
    r"CUDA( error:)? out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY", re.I
)
_HOST = re.compile(
    r"can't allocate memory|not enough memory|Cannot allocate memory|std::bad_alloc|MemoryError|Unable to allocate",
    re.I,
)
_SHARED = re.compile(
    r"unable to (allocate|mmap|write).*shared memory|insufficient shared memory|/torch_\S+.*No space left",
    re.I,
)


@contextmanager
def explained(course: Course, context: WorkerContext) -> Iterator[None]:
    """Turns running out of memory, within the block, into a message with what to change and the sizes at hand.

    Raises:
        OutOfMemory: in place of what torch, numpy or a loader process raised.
        TooManyFiles: in place of the system's error.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
        if (explanation := too_many_files(error)) is not None:
            raise explanation from error
        where = where_short(error)
        if where is None:
            raise
        raise OutOfMemory(
            advice(course, f"worker {context.rank}", where, _said(error), context.device)
        ) from error


def where_short(error: BaseException) -> str | None:
    """Which memory an error says is short: "device", "host" or "shared"; None: it is about something else."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError) or _DEVICE.search(text):
        return "device"
    if _SHARED.search(text):
        return "shared"
    return "host" if isinstance(error, MemoryError) or _HOST.search(text) else None


def advice(course: Course, who: str, where: str, said: str, device: torch.device | None = None) -> str:
    """One line: who ran out of which memory, of how much, with which sizes, and what makes them smaller.

    Args:
        where: see :func:`where_short`.
        said: the allocator's own words.
        device: of the worker that speaks; None: another process speaks for it.
    """
    names = {"device": "GPU memory", "host": "memory", "shared": "shared memory (/dev/shm)"}
    changes = {
        "device": _of_training(course),
        "host": [
            f"fewer {course.PLACE}.loader_processes (now {course.loader_processes})",
            *_of_training(course),
        ],
        "shared": [
            f"fewer {course.PLACE}.loader_processes (now {course.loader_processes})",
            "a larger /dev/shm (a container's --shm-size)",
        ],
    }[where]
    if device is not None and device.type == "cpu" and where == "host":
        changes = [*changes[1:], changes[0]]  # without a GPU all of the training's tensors lie there
    total = f" of {_total(where, device)}" if device is not None else ""
    return f"{who} ran out of {names[where]}{total}, with {_sizes(course)}: {said}; what helps: {'; '.join(changes)}"


def _said(error: BaseException) -> str:
    """The line of a message that names the allocation (a loader process's error brings a whole traceback)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if any(one.search(line) for one in (_DEVICE, _HOST, _SHARED))]
    said = (telling or lines or [type(error).__name__])[-1]
    return said if len(said) <= 300 else said[:297] + "..."


def _total(where: str, device: torch.device | None) -> str:
    if where == "device" and device is not None and device.type == "cuda":
        return f"{torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB"
    if where == "shared":
        return f"{psutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB"
    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


def _share(course: Course) -> int:
    """Samples that a worker has at once in the largest stage, all parts together."""
    contrastive = (course.batch_of(stage) // course.accumulation_of(stage) for stage in course.stages)
    return max(contrastive) // course.workers


def _sizes(course: Course) -> str:
    share, parts = _share(course), course.parts(course.stages[0])
    at_once = (
        f"{share} samples a worker" if parts == 1 else f"{share // parts} of {share} samples a worker at once"
    )
    largest = max(course.stages, key=lambda stage: (stage.resolution or 0, stage.frames))
    sizes = [at_once, f"resolution {largest.resolution or 'of the model'}", f"{largest.frames} frames a clip"]
    return ", ".join([*sizes, f"ZeRO stage {course.zero_stage}", f"precision {course.precision}"])


def _of_training(course: Course) -> list[str]:
    """What makes a worker's tensors smaller, the cheapest first."""
    place, changes = course.PLACE, []
    if not course.activation_checkpointing:
        changes.append(f"{place}.activation_checkpointing: true")
    if "micro_batch" in type(course).model_fields:
        now = _share(course) // course.parts(course.stages[0])
        if now > 1:
            changes.append(f"{place}.micro_batch below {now} (same batch, in more parts)")
    if course.precision == "fp32":
        changes.append(f"{place}.precision: bf16-autocast")
    if course.zero_stage < 3:
        changes.append(
            f"{place}.deepspeed.zero_optimization.stage above {course.zero_stage} (with several workers)"
        )
    if "offload_optimizer" not in course.deepspeed.get("zero_optimization", {}):
        changes.append(f"{place}.deepspeed.zero_optimization.offload_optimizer: {{device: cpu}}")
    changes.append("more workers, a smaller global_batch, or a smaller resolution of the stage")
    return changes
