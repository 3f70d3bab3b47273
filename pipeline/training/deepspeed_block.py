"""The ``deepspeed`` block of a recipe: DeepSpeed's own configuration, as its users know it.

Any key of it passes through. A key that DeepSpeed does not know is refused with the nearest that it does; one that is
decided elsewhere, or that would break what this job promises, by name and with the reason. The tables below are those
of the installed DeepSpeed: a test asks it which keys it reads. Values are checked by DeepSpeed's own models, which are
imported only where the block holds more than ``zero_optimization.stage``: importing DeepSpeed takes seconds.
"""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Iterable, Mapping
from typing import Any

from sharding.errors import UserError

#: Keys that a recipe decides elsewhere, and where.
OWNED = {
    "train_batch_size": ("global_batch",),
    "train_micro_batch_size_per_gpu": ("global_batch", "accumulation", "workers"),
    "gradient_accumulation_steps": ("accumulation",),
    "gradient_clipping": ("clipping",),
    "optimizer": ("learning_rate", "betas", "eps", "weight_decay"),
    "scheduler": ("schedule",),
    "bfloat16": ("precision",),
    "compile": ("compile",),
    "activation_checkpointing": ("activation_checkpointing",),
    "fp16.enabled": ("precision",),
    "bf16.enabled": ("precision",),
    "torch_autocast.enabled": ("precision",),
    "torch_autocast.dtype": ("precision",),
    "checkpoint": (),
    "datastates_ckpt": (),
    "zero_optimization.elastic_checkpoint": (),
    "zero_optimization.load_from_fp32_weights": (),
}

_ONE_MODEL = "GLSCL is not cut up between workers: each computes its own samples through the whole model"
_ORDER = "the order of data is that of the shards and lanes, which glscl verify-epoch proves"
_MASTER = "checkpoints hold the weights and the optimizer's state in fp32"
_AVERAGE = (
    "gradients are summed over accumulation and averaged over workers in one way, which the losses count on"
)
_ADAMW = "the optimizer is torch's AdamW; DeepSpeed's own would be compiled at first use"

#: Keys that would break what a job promises, and why.
REFUSED = {
    "pipeline": _ONE_MODEL,
    "tensor_parallel": _ONE_MODEL,
    "expert_parallel": _ONE_MODEL,
    "use_data_before_expert_parallelism": _ONE_MODEL,
    "seq_parallel_communication_data_type": _ONE_MODEL,
    "hybrid_engine": "it is for generating text during training, which GLSCL does not",
    "weight_quantization": "it is for inference; an evaluation would measure another model than is trained",
    "data_efficiency": _ORDER,
    "dataloader_drop_last": _ORDER,
    "autotuning": "it changes the batch, which the contrastive loss depends on",
    "managed_gradient_accumulation": _AVERAGE,
    "gradient_allreduce_op": _AVERAGE,
    "comet.api_key": "the configuration is recorded; give it as cluster.environment.env_vars.COMET_API_KEY",
    "fp16.fp16_master_weights_and_grads": _MASTER,
    "bf16.bf16_master_weights_and_grads": _MASTER,
    "bf16.bf16_optimizer_states": _MASTER,
    "zero_optimization.legacy_stage1": "DeepSpeed has not had it since 0.5.9",
    "zero_optimization.zenflow": "its updates lag behind their gradients: a run could not go on bit for bit",
    "zero_optimization.offload_optimizer.super_offload": _ADAMW,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": _ADAMW,
}

#: Keys of which one value alone would break it, and why.
REFUSED_VALUES: dict[str, tuple[Any, str]] = {
    "zero_force_ds_cpu_optimizer": (True, _ADAMW),
    "zero_optimization.ignore_unused_parameters": (
        False,
        "parameters come and go with the stages' objectives",
    ),
    "zero_optimization.compute_grad_norm": (False, "train/gradient_norm and clipping need it"),
}

#: Keys that DeepSpeed had once and refuses now.
REMOVED = frozenset(
    {
        *(
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
        ),
        *("nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    }
)

#: Keys that pass. Those of blocks whose names DeepSpeed does not tell by a model are listed here.
PASSED: dict[str, frozenset[str] | None] = {
    "zero_optimization": None,
    "fp16": None,
    "bf16": None,
    "comms_logger": None,
    "tensorboard": None,
    "wandb": None,
    "csv_monitor": None,
    "comet": None,
    "timers": frozenset({"throughput"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "flops_profiler": frozenset(
        {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed"}
        | {"output_file"}
    ),
    "aio": frozenset(
        {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
    ),
    **dict.fromkeys(
        (
            *(
                "communication_data_type",
                "prescale_gradients",
                "gradient_predivide_factor",
                "disable_allgather",
            ),
            *(
                "steps_per_print",
                "wall_clock_breakdown",
                "memory_breakdown",
                "dump_state",
                "disable_python_gc",
            ),
            *("log_level", "vocabulary_size", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        )
    ),
}

#: What DeepSpeed takes as it stands, without a look at its type; the rest is checked by its own models.
_SWITCHES = frozenset(
    {
        *(
            "prescale_gradients",
            "disable_allgather",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
        ),
        *("disable_python_gc", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("flops_profiler.enabled", "flops_profiler.detailed", "timers.throughput.enabled"),
        *("timers.throughput.synchronized", "aio.single_submit", "aio.overlap_events", "aio.use_gds"),
    }
)
_WHOLE_NUMBERS = frozenset(
    {
        *(
            "steps_per_print",
            "vocabulary_size",
            "aio.block_size",
            "aio.queue_depth",
            "aio.intra_op_parallelism",
        ),
        *("flops_profiler.profile_step", "flops_profiler.module_depth", "flops_profiler.top_modules"),
    }
)
_NUMBERS = frozenset({"gradient_predivide_factor", "flops_profiler.recompute_fwd_factor"})
_TEXTS = frozenset(
    {
        *("communication_data_type", "log_level", "flops_profiler.output_file"),
        *("data_types.grad_accum_dtype", "data_types.param_dtype", "data_types.buffer_dtype"),
    }
)
_LISTS = frozenset({"torch_autocast.lower_precision_safe_modules"})

#: Blocks that act under one precision alone.
_PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "torch_autocast": "bf16-autocast"}


def with_whole_numbers(block: Any) -> Any:
    """The block with its whole numbers as such: ``5e8``, which YAML reads as a float, counts bytes and elements."""
    if isinstance(block, Mapping):
        return {name: with_whole_numbers(value) for name, value in block.items()}
    if isinstance(block, list | tuple):
        return [with_whole_numbers(value) for value in block]
    return int(block) if isinstance(block, float) and block.is_integer() else block


def check_block(block: Mapping[str, Any], precision: str, place: str) -> None:
    """Refuse what cannot be passed on to DeepSpeed.

    Args:
        block: the ``deepspeed`` block.
        precision: of the recipe.
        place: where the recipe stands in the YAML, for messages.

    Raises:
        ValueError: one line with the field, and what is right.
    """
    for name, value in _names(block):
        _check_name(name, value, f"{place}.deepspeed.{name}", place)
    for name, wanted in _PRECISIONS.items():
        if block.get(name) and precision != wanted:
            raise ValueError(
                f"{place}.deepspeed.{name}: has no effect with {place}.precision {precision}; it is for {wanted}"
            )
    zero = block.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"{place}.deepspeed.zero_optimization.stage: got {stage}; must be 0, 1, 2 or 3")
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if not isinstance(zero.get(name) or {}, Mapping):
            raise ValueError(
                f"{place}.deepspeed.zero_optimization.{name}: got {zero[name]!r}; must be a block of keys "
                "({device: cpu})"
            )
        if offload_device(block, name) != "none" and stage < least:
            raise ValueError(
                f"{place}.deepspeed.zero_optimization.{name} needs stage {least}{' or more' if least < 3 else ''}; "
                f"got stage {stage}"
            )
    plain = ("zero_optimization", "zero_optimization.stage")
    if any(
        name not in plain for name, value in _names(block) if value != {}
    ):  # else DeepSpeed is not imported
        _check_values(block, precision, place)


def check_offload(block: Mapping[str, Any], place: str) -> None:
    """On a worker, before anything is made: whether what is offloaded to NVMe can go there.

    Raises:
        UserError: DeepSpeed's ``async_io`` cannot be used here, or the folder is not one that can be written.
    """
    for name in ("offload_optimizer", "offload_param"):
        if offload_device(block, name) != "nvme":
            continue
        field = f"{place}.deepspeed.zero_optimization.{name}"
        path = block["zero_optimization"][name].get("nvme_path")
        if path is None:
            raise UserError(f"{field}: device nvme needs nvme_path, a folder on every worker's machine")
        if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
            raise UserError(
                f"{field}.nvme_path: {path} is no folder that can be written on {platform.node()}"
            )
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                f"{field}: device nvme needs DeepSpeed's async_io, which cannot be built on {platform.node()}: it "
                "needs libaio with its headers (libaio-dev), and a compiler; device cpu needs neither"
            )


def offload_device(block: Mapping[str, Any], name: str) -> str:
    """Where ``offload_optimizer`` or ``offload_param`` puts what it is named for: ``none``, ``cpu`` or ``nvme``."""
    offload = block.get("zero_optimization", {}).get(name) or {}
    return str(offload.get("device", "none"))


def _names(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted name, value) of all keys, those of blocks and those in them."""
    for key, item in value.items():
        yield f"{prefix}{key}", item
        if isinstance(item, Mapping):
            yield from _names(item, f"{prefix}{key}.")


def _check_name(name: str, value: Any, field: str, place: str) -> None:
    if name in OWNED:
        where = " and ".join(f"{place}.{owner}" for owner in OWNED[name]) or "the checkpoints block"
        raise ValueError(f"{field} is decided by {where}: set it there")
    if name in REFUSED:
        raise ValueError(f"{field} cannot be used: {REFUSED[name]}")
    if name in REFUSED_VALUES and value == REFUSED_VALUES[name][0]:
        raise ValueError(f"{field}: got {value}, which cannot be used: {REFUSED_VALUES[name][1]}")
    block, _, key = name.partition(".")
    if block in REMOVED:
        raise ValueError(f"{field}: DeepSpeed does not have it any more")
    if block not in PASSED:
        known = {*PASSED, *(one.partition(".")[0] for one in (*OWNED, *REFUSED))}
        raise ValueError(f"{field}: DeepSpeed knows no such key{_nearest(block, known)}")
    if not key and block in _BLOCKS and not isinstance(value, Mapping):
        raise ValueError(f"{field}: got {value!r}; must be a block of keys")
    _check_type(name, value, field)
    inner = PASSED[block]
    if key and inner is not None and key.partition(".")[0] not in inner:
        raise ValueError(f"{field}: DeepSpeed knows no such key{_nearest(key, inner)}")


def _check_type(name: str, value: Any, field: str) -> None:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    for names, fits, what in (
        (_SWITCHES, isinstance(value, bool), "true or false, without quotes"),
        (_WHOLE_NUMBERS, number and isinstance(value, int), "a whole number, without quotes"),
        (_NUMBERS, number, "a number, without quotes"),
        (_TEXTS, isinstance(value, str), "text"),
        (_LISTS, isinstance(value, list), "a list of texts"),
    ):
        if name in names and not fits:
            raise ValueError(f"{field}: got {value!r}; must be {what}")


_BLOCKS = frozenset(
    {name for name, inner in PASSED.items() if inner is not None}
    | {"zero_optimization", "fp16", "bf16", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet"}
)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _check_values(block: Mapping[str, Any], precision: str, place: str) -> None:
    """What DeepSpeed's own models say of the values."""
    from pydantic import ValidationError

    models = _models()
    for name, model in models.items():
        values = block.get(name)
        if values is None:
            continue
        if name in _PRECISIONS:
            values = {"enabled": precision == name, **values}
        field = f"{place}.deepspeed.{name}"
        try:
            taken = model(**values)
        except ValidationError as error:
            raise ValueError(_explain(error, field, model)) from None
        except (AssertionError, TypeError, AttributeError) as error:  # of its own validators
            raise ValueError(f"{field}: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
        _refuse_switches_as_numbers(values, taken, field)
    _check_whole(block, place)


def _refuse_switches_as_numbers(values: Mapping[str, Any], taken: Any, field: str) -> None:
    """``reduce_bucket_size: true`` would be a bucket of one element: pydantic takes true for 1."""
    aliases = {one.alias: name for name, one in type(taken).model_fields.items() if one.alias}
    for name, value in values.items():
        made = getattr(taken, aliases.get(name, name), None)
        if isinstance(value, bool) and not isinstance(made, bool) and isinstance(made, int | float):
            raise ValueError(f"{field}.{name}: got {str(value).lower()}; must be a number")
        if isinstance(value, Mapping) and hasattr(type(made), "model_fields"):
            _refuse_switches_as_numbers(value, made, f"{field}.{name}")


def _models() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # without it, a warning is printed that there is no GPU
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
        "comet": CometConfig,
    }


def _check_whole(block: Mapping[str, Any], place: str) -> None:
    """DeepSpeed reads the block as it will at the start; what its models do not cover shows here."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    others = {name: value for name, value in block.items() if name not in _PRECISIONS}
    try:
        DeepSpeedConfig({**others, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    except (DeepSpeedConfigError, ValueError, TypeError, AttributeError, AssertionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{place}.deepspeed: DeepSpeed refuses it: {told[:300]}") from None


def _explain(error: Any, field: str, model: Any) -> str:
    """The first fault of a block in the words of the job's own."""
    detail = error.errors(include_url=False)[0]
    location = [str(part) for part in detail["loc"]]
    where = ".".join([field, *location])
    if detail["type"] == "extra_forbidden":
        return f"{where}: DeepSpeed knows no such key{_nearest(location[-1], _fields(model, location[:-1]))}"
    message = str(detail["msg"]).replace("Input should be", "must be").removeprefix("Value error, ")
    return (
        f"{where}: got {detail['input']!r}; {message[:1].lower()}{message[1:]}"
        if location
        else (f"{where}: {message}")
    )


def _fields(model: Any, location: list[str]) -> set[str]:
    """Names by which a model, or the one in it at ``location``, takes its fields."""
    import typing

    for part in location:
        annotation = model.model_fields[part].annotation
        inner = [one for one in (*typing.get_args(annotation), annotation) if hasattr(one, "model_fields")]
        model = inner[0]
    return {name for key, one in model.model_fields.items() for name in (key, one.alias) if name}
