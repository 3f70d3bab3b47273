"""Optimizer parameter groups of the paper's recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

_FUSION = (
    "fusion.",
    "text_transform.",
    "vision_transform.",
    "text_pooler.",
    "vision_pooler.",
)
_HEADS = ("matching_head.", "language_head.", "rank_output.", "vqa_classifier.", "nlvr2_classifier.")


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    fusion_multiplier: float = 5.0,
    head_multiplier: float = 5.0,
) -> list[dict[str, Any]]:
    """Split the parameters of a GLSCL model by learning rate and weight decay.

    Encoders, token types, ITC projections and temperature run at ``base_lr``; the fusion layers with their
    poolers and the two projections into the fusion space at ``fusion_multiplier`` times that; the MLM, ITM and
    task heads at ``head_multiplier`` times. Biases, every LayerNorm (CLIP's included) and the temperature are not
    decayed.

    Returns:
        groups with keys ``params``, ``lr``, ``weight_decay``, ``name`` (``encoders``, ``fusion`` or
        ``heads``, plus ``/decay`` or ``/no_decay``); each trainable parameter is in exactly one, none is
        empty.
    """
    norms = {
        id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()
    }
    rates = {"encoders": base_lr, "fusion": base_lr * fusion_multiplier, "heads": base_lr * head_multiplier}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {(k, d): [] for k in rates for d in (True, False)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.removeprefix("glscl.").startswith(_FUSION)
        kind = "fusion" if in_backbone else "heads" if name.startswith(_HEADS) else "encoders"
        decayed = not (name.endswith(".bias") or id(parameter) in norms or name == "temperature.value")
        members[kind, decayed].append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[kind],
            "weight_decay": weight_decay if decayed else 0.0,
            "name": f"{kind}/{'decay' if decayed else 'no_decay'}",
        }
        for (kind, decayed), parameters in members.items()
        if parameters
    ]
