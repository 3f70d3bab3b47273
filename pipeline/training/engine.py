"""From the job's configuration to a DeepSpeed engine around GLSCL."""

from __future__ import annotations

from typing import Any

import torch

from cluster.engine import prepare_deepspeed
from cluster.workers import WorkerContext
from model import GLSCLConfig, GLSCLForPreTraining, GLSCLPreTrainedModel
from pipeline.config import ModelBlock
from pipeline.training.config import Course, Recipe, Stage, TrainBlock
from pipeline.training.partitioned import draw_weights, making_a_model


def model_config(block: ModelBlock) -> GLSCLConfig:
    """The model's configuration: the preset with the job's overrides."""
    return GLSCLConfig.preset(block.preset, **block.overrides)


def build_model(
    block: ModelBlock, train: TrainBlock, seed: int, device: torch.device | None = None
) -> GLSCLForPreTraining:
    """GLSCL with weights drawn from the run's seed: the same on every worker.

    Args:
        device: the worker's. Given, ZeRO 3 partitions the model while it is made (collective); None: it stays whole.
    """
    partitioned = train.zero_stage == 3 and device is not None
    if device is not None:
        prepare_deepspeed(device)
    with making_a_model(deepspeed_config(train) if partitioned else None):
        model = GLSCLForPreTraining(model_config(block))
    draw_weights(model, seed)
    if train.activation_checkpointing:
        model.activation_checkpointing_enable()
    if train.compile:
        model.compile_blocks()
    model.train()
    return model


def deepspeed_config(train: Course) -> dict[str, Any]:
    """The ``deepspeed`` block, completed by what is decided elsewhere (see ``deepspeed_block``)."""
    first = train.stages[0]
    backwards = train.backwards(first)
    config: dict[str, Any] = {
        **train.deepspeed,
        "train_micro_batch_size_per_gpu": train.batch_of(first) // (backwards * train.workers),
        "gradient_accumulation_steps": backwards,
        "gradient_clipping": train.clipping or 0.0,
    }
    config.setdefault("steps_per_print", 2**31)  # the job reports by itself
    if train.precision == "bf16-autocast":
        own = train.deepspeed.get("torch_autocast", {})
        config["torch_autocast"] = {**own, "enabled": True, "dtype": "bfloat16"}
    elif train.precision != "fp32":
        config[train.precision] = {**train.deepspeed.get(train.precision, {}), "enabled": True}
    if train.zero_stage:
        # An offloaded optimizer is torch's AdamW too: DeepSpeed's own is compiled at first use.
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def build_engine(
    model: GLSCLPreTrainedModel, train: Course, context: WorkerContext
) -> tuple[Any, list[float]]:
    """DeepSpeed engine with AdamW over the model's parameter groups; returns it and the groups' peak rates."""
    prepare_deepspeed(context.device)
    import deepspeed

    groups = model.parameter_groups(
        train.learning_rate,
        train.weight_decay,
        fusion_multiplier=train.fusion_multiplier,
        head_multiplier=train.head_multiplier,
    )
    peaks = [float(group["lr"]) for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=train.betas, eps=train.eps)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(train))
    return engine, peaks


def begin_stage(engine: Any, train: Course, stage: Stage) -> None:
    """Tell the engine how many backward passes make a step from here on, and that none of them is done yet.

    Only between steps: a gradient that is half collected would be counted wrong.
    """
    backwards = train.backwards(stage)
    engine.set_train_micro_batch_size(train.batch_of(stage) // (backwards * train.workers))
    engine.set_train_batch_size(train.batch_of(stage))
    engine.micro_steps = 0  # the boundary is where this count, from 1, is a multiple of the passes
    if train.zero_stage:
        engine.optimizer.gradient_accumulation_steps = backwards  # its copy: whether it sums before the norm


def optimizer_step(engine: Any, train: Recipe) -> None:
    """The engine's own step, which acts on the last accumulation part only; then gradients that must not stay."""
    updates = engine.is_gradient_accumulation_boundary()
    engine.step()
    if train.zero_stage and updates:
        # A parameter that the next step leaves out (another modality, fewer objectives) would be updated with
        # its old gradient once more: stage 3 keeps them in this buffer, an offloaded optimizer in those.
        if train.zero_stage == 3:
            engine.optimizer.grad_partitions_flat_buffer.zero_()
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            for partition in getattr(engine.optimizer, name, []):
                if partition.grad is not None:
                    partition.grad.zero_()


def gradient_norm(engine: Any) -> float:
    """Norm of the whole gradient before clipping, as DeepSpeed measured it in the last step.

    NaN where DeepSpeed does not say (ZeRO 0 in fp32 without clipping).
    """
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def loss_scale(engine: Any) -> float:
    """Factor on the loss before the backward, which keeps small gradients above fp16's smallest number (bf16: 1).

    NaN in fp32.
    """
    if not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        return float("nan")
    scale = getattr(engine.optimizer, "loss_scale", None)
    return float("nan") if scale is None else float(scale)
