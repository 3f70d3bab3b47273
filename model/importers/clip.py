"""CLIP's vision transformer under the names of OpenAI, timm and transformers, for the vision encoder.

All three hold the same numbers in the same layout; only names differ. The activation is not among the
weights: the encoder computes QuickGELU, as OpenAI's models do. CLIP models trained with plain GELU (most of
OpenCLIP's) load without complaint and are then not quite what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.importers.plan import (
    Adapted,
    Blueprint,
    Frame,
    Misfit,
    Recipe,
    count_blocks,
    flat,
    module_recipes,
)

_TEXT_TOWER = "CLIP's text tower, in whose place RoBERTa stands"
_PROJECTION = "CLIP's projection into its joint space, which the vision encoder ends before"


@dataclass(frozen=True)
class _Naming:
    """One source's names.

    ``{}`` stands for the word weight or bias. ``block`` holds, by our module, the modules of block N that its
    rows come from, below ``blocks`` + N. ``unused`` gives reasons by regular expression.
    """

    patch: str
    class_token: str
    position: str
    ln_pre: str
    ln_post: str
    blocks: str
    block: Mapping[str, tuple[str, ...]]
    unused: Mapping[str, str]


_OPENAI = _Naming(
    patch="visual.conv1.weight",
    class_token="visual.class_embedding",
    position="visual.positional_embedding",
    ln_pre="visual.ln_pre.{}",
    ln_post="visual.ln_post.{}",
    blocks="visual.transformer.resblocks.",
    block={
        "ln_1": ("ln_1.{}",),
        "qkv": ("attn.in_proj_{}",),
        "out_proj": ("attn.out_proj.{}",),
        "ln_2": ("ln_2.{}",),
        "fc": ("mlp.c_fc.{}",),
        "proj": ("mlp.c_proj.{}",),
    },
    unused={
        r"visual\.proj": _PROJECTION,
        r"transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*|text_projection": _TEXT_TOWER,
        r"logit_scale|logit_bias": "CLIP's temperature; the one here is learned anew",
        r"input_resolution|context_length|vocab_size": "a number that describes the model",
    },
)
_TIMM = _Naming(
    patch="patch_embed.proj.weight",
    class_token="cls_token",
    position="pos_embed",
    ln_pre="norm_pre.{}",
    ln_post="norm.{}",
    blocks="blocks.",
    block={
        "ln_1": ("norm1.{}",),
        "qkv": ("attn.qkv.{}",),
        "out_proj": ("attn.proj.{}",),
        "ln_2": ("norm2.{}",),
        "fc": ("mlp.fc1.{}",),
        "proj": ("mlp.fc2.{}",),
    },
    unused={r"head\..*": "a classifier, or CLIP's projection in its place"},
)
_HF = _Naming(
    patch="embeddings.patch_embedding.weight",
    class_token="embeddings.class_embedding",
    position="embeddings.position_embedding.weight",
    ln_pre="pre_layrnorm.{}",
    ln_post="post_layernorm.{}",
    blocks="encoder.layers.",
    block={
        "ln_1": ("layer_norm1.{}",),
        "qkv": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
        "out_proj": ("self_attn.out_proj.{}",),
        "ln_2": ("layer_norm2.{}",),
        "fc": ("mlp.fc1.{}",),
        "proj": ("mlp.fc2.{}",),
    },
    unused={
        r"(vision_model\.)?embeddings\.position_ids": "a buffer that counts positions",
        r"visual_projection\.weight": _PROJECTION,
        r"text_model\..*|text_projection\.weight": _TEXT_TOWER,
        r"logit_scale": "CLIP's temperature; the one here is learned anew",
    },
)


def openai_clip(frame: Frame) -> Blueprint:
    """OpenAI's CLIP with a vision transformer (also OpenCLIP's, where its names are the same)."""
    return _alone(frame, _OPENAI)


def timm_clip(frame: Frame) -> Blueprint:
    """timm's ``vit_*_clip_*`` models."""
    return _alone(frame, _TIMM)


def hf_clip(frame: Frame) -> Blueprint:
    """transformers' ``CLIPModel`` and ``CLIPVisionModel``, with or without ``vision_model.`` before the names."""
    prefix = "vision_model." if f"vision_model.{_HF.patch}" in frame.names else ""
    return _alone(frame, _HF, prefix)


def released_vision(frame: Frame, prefix: str) -> Blueprint:
    """The vision encoder in a released checkpoint: OpenAI's names after ``prefix``, no block too many."""
    return _vision(frame, _OPENAI, prefix, may_drop=False)


def _alone(frame: Frame, naming: _Naming, prefix: str = "") -> Blueprint:
    plan = _vision(frame, naming, prefix, may_drop=True)
    plan.ignore(frame.names, naming.unused)
    return plan


def _vision(frame: Frame, naming: _Naming, prefix: str, may_drop: bool) -> Blueprint:
    """Recipes for the vision encoder from names after ``prefix``.

    With ``may_drop`` the blocks beyond ``config.vision_layers`` are left out (the released code runs 11 of
    CLIP's 12).
    """
    config, ours = frame.config, f"{frame.root}vision_encoder"
    plan = Blueprint()
    plan.recipes = {
        f"{ours}.patch_embedding.weight": Recipe((prefix + naming.patch,), _patches(config.patch_size)),
        f"{ours}.class_embedding": Recipe((prefix + naming.class_token,), flat),
        f"{ours}.position_embedding": Recipe(
            (prefix + naming.position,), positions(config.image_size // config.patch_size)
        ),
        **module_recipes(f"{ours}.ln_pre", prefix + naming.ln_pre),
        **module_recipes(f"{ours}.ln_post", prefix + naming.ln_post),
    }
    blocks = prefix + naming.blocks
    have, want = count_blocks(frame.names, blocks), config.vision_layers
    if have < want or (have > want and not may_drop):
        plan.problems.append(f"{blocks}N: {have} blocks in the file, but vision_layers is {want}")
    for number in range(min(have, want)):
        for module, theirs in naming.block.items():
            names = (f"{blocks}{number}.{name}" for name in theirs)
            plan.recipes |= module_recipes(f"{ours}.blocks.{number}.{module}", *names)
    surplus = tuple(f"{blocks}{number}." for number in range(want, have))
    for name in frame.names:
        if surplus and name.startswith(surplus):
            plan.ignored[name] = f"beyond the first {want} of {have} blocks (vision_layers is {want})"
    return plan


def _patches(side: int) -> Callable[[Tensor], Tensor]:
    """Builder: a convolution's kernel [D, 3, side, side] as the linear map [D, 3 * side * side]."""

    def build(kernel: Tensor) -> Tensor:
        if kernel.ndim != 4:
            raise Misfit(f"{list(kernel.shape)} is no kernel of a patch embedding")
        if kernel.shape[2:] != (side, side):
            height, width = kernel.shape[2:]
            raise Misfit(f"patches of {height} x {width} pixels, but patch_size is {side}")
        return kernel.flatten(1)

    return build


def positions(side: int) -> Callable[[Tensor], Tensor | Adapted]:
    """Builder: class token and square grid [1 + P, D] onto ``side`` x ``side`` patches, bicubic.

    The same interpolation as the encoder's own for images of another size than it was trained at.
    """

    def build(table: Tensor) -> Tensor | Adapted:
        table = table[0] if table.ndim == 3 and len(table) == 1 else table
        if table.ndim != 2:
            raise Misfit(f"{list(table.shape)} is no table of positions")
        grid = math.isqrt(max(len(table) - 1, 0))
        if grid < 1 or grid * grid + 1 != len(table):
            raise Misfit(f"{len(table)} positions are no class token and square grid")
        if grid == side:
            return table
        square = table[1:].T.reshape(1, -1, grid, grid)
        square = square if square.dtype == torch.float64 else square.float()
        resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
        patches = resized[0].flatten(1).T
        how = f"{grid} x {grid} -> {side} x {side} patches (bicubic)"
        return Adapted(torch.cat([table[:1].to(patches.dtype), patches]), how)

    return build
