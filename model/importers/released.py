"""The authors' released GLSCL and SCL checkpoints, for images and for videos.

They hold the whole model. A video model adds the first frame's temporal embedding to a single frame too,
where the encoder here adds none; that embedding therefore becomes part of the position embedding and is
subtracted from all temporal ones. Every frame gets the same sum as before, so the numbers stay, and an image
still does not depend on the temporal embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.importers.clip import positions, released_vision
from model.importers.plan import (
    Adapted,
    Blueprint,
    Frame,
    Misfit,
    Recipe,
    count_blocks,
    flat,
    module_recipes,
    rows_at_most,
)
from model.importers.roberta import text

_TEXT = "text_transformer."
_VISION = "vision_transformer."
_TEMPORAL = f"{_VISION}visual.temporal_embed"
_MASK_TOKEN = f"{_VISION}visual.visual_mask_token"
_UNUSED = {
    r"vision_transformer\.(decoder_.*|mask_token)": "a masked autoencoder's decoder, left over",
    r"vision_transformer\.visual\.proj": "CLIP's projection into its joint space",
}
#: Module of a fusion layer by released module; ``{}`` is the word weight or bias.
_SELF_ATTENTION = {
    "query": ("attention.self.query.{}",),
    "key_value": ("attention.self.key.{}", "attention.self.value.{}"),
    "output": ("attention.output.dense.{}",),
    "norm": ("attention.output.LayerNorm.{}",),
}
_CROSS_ATTENTION = {
    "query": ("crossattention.self.query.{}",),
    "key_value": ("crossattention.self.key.{}", "crossattention.self.value.{}"),
    "output": ("crossattention.output.dense.{}",),
    "norm": ("crossattention.output.LayerNorm.{}",),
    "intermediate": ("intermediate.dense.{}",),
    "feed_forward": ("output.dense.{}",),
    "feed_forward_norm": ("output.LayerNorm.{}",),
}


@dataclass(frozen=True)
class Head:
    """A released head.

    Args:
        name: first part of its released names.
        modules: modules of ours (weight and bias) by released module.
        tensors: single parameters of ours by released name.
        fine_tuned: only checkpoints fine-tuned on its task have it; with any other it begins as ``begins`` says,
            or keeps its first weights.
        begins: by parameter of ours, how it is made of the rest of a checkpoint that lacks this head.
        superseded_by: a head that judges in its place: a checkpoint and a model that have that one can do
            without this one.
    """

    name: str
    modules: Mapping[str, str]
    tensors: Mapping[str, str] = field(default_factory=dict)
    fine_tuned: bool = False
    begins: Mapping[str, Recipe] = field(default_factory=dict)
    superseded_by: str | None = None


def _matching_row(values: Tensor) -> Tensor | Adapted:
    """Row 1, "matches", of the ITM head's weight [2, 2D] or bias [2]."""
    if not values.ndim or len(values) != 2:
        raise Misfit(f"{list(values.shape)} has not the two rows of an ITM head")
    return Adapted(values[1:], "begins as row 1 of the ITM head")


#: Every head that a released checkpoint may have.
HEADS: tuple[Head, ...] = (
    Head(
        "mlm_score",
        {
            "mlm_score.transform.dense": "language_head.dense",
            "mlm_score.transform.LayerNorm": "language_head.norm",
        },
        {
            "mlm_score.decoder.weight": "language_head.decoder.weight",
            "mlm_score.bias": "language_head.decoder.bias",
        },
    ),
    Head("itm_score", {"itm_score.fc": "matching_head.classifier"}, superseded_by="rank_output"),
    Head("cl_temp", {}, {"cl_temp": "temperature.value"}),
    Head(
        "vision_proj",
        {
            "vision_proj.0": "vision_projection.dense",
            "vision_proj.1": "vision_projection.norm",
            "vision_proj.3": "vision_projection.out",
        },
    ),
    Head(
        "language_proj",
        {
            "language_proj.0": "text_projection.dense",
            "language_proj.1": "text_projection.norm",
            "language_proj.3": "text_projection.out",
        },
    ),
    # These have their released names here too.
    Head(
        "vqa_classifier", {f"vqa_classifier.{n}": f"vqa_classifier.{n}" for n in (0, 1, 3)}, fine_tuned=True
    ),
    Head(
        "nlvr2_classifier",
        {f"nlvr2_classifier.{n}": f"nlvr2_classifier.{n}" for n in (0, 1, 3)},
        fine_tuned=True,
    ),
    Head(
        "rank_output",
        {"rank_output": "rank_output"},
        fine_tuned=True,
        begins={
            f"rank_output.{part}": Recipe((f"itm_score.fc.{part}",), _matching_row)
            for part in ("weight", "bias")
        },
    ),
)


def released_checkpoint(frame: Frame) -> Blueprint:
    """A whole released model."""
    root = frame.root
    plan = text(frame, _TEXT)
    plan.take_in(released_vision(frame, _VISION))
    plan.take_in(_video(frame))
    plan.recipes |= {
        **module_recipes(f"{root}text_transform", "cross_modal_text_transform.{}"),
        **module_recipes(f"{root}vision_transform", "cross_modal_image_transform.{}"),
        **module_recipes(f"{root}text_pooler.dense", "cross_modal_text_pooler.dense.{}"),
        **module_recipes(f"{root}vision_pooler.dense", "cross_modal_image_pooler.dense.{}"),
        f"{root}token_type_embedding.weight": Recipe(("token_type_embeddings.weight",), _token_types),
    }
    plan.take_in(_fusion(frame, "cross_modal_text_layers.", f"{root}fusion.text_stream"))
    plan.take_in(_fusion(frame, "cross_modal_image_layers.", f"{root}fusion.vision_stream"))
    for head in HEADS:
        plan.take_in(_head(frame, head))
    plan.ignore(frame.names, _UNUSED)
    return plan


def _video(frame: Frame) -> Blueprint:
    """What image and video checkpoints do not share: temporal embedding and mask token."""
    plan, encoder, config = Blueprint(), f"{frame.root}vision_encoder", frame.config
    if _MASK_TOKEN in frame.names:
        plan.recipes[f"{encoder}.mask_token"] = Recipe((_MASK_TOKEN,), flat)
    else:
        plan.untouched[f"{encoder}.mask_token"] = "released video models have none"
    if _TEMPORAL in frame.names:
        plan.recipes[f"{encoder}.temporal_embedding"] = Recipe((_TEMPORAL,), _later_frames(config.max_frames))
        plan.recipes[f"{encoder}.position_embedding"] = Recipe(
            (f"{_VISION}visual.positional_embedding", _TEMPORAL),
            _with_first_frame(config.image_size // config.patch_size),
        )
    else:
        plan.untouched[f"{encoder}.temporal_embedding"] = "released image models have none"
    return plan


def _fusion(frame: Frame, theirs: str, ours: str) -> Blueprint:
    plan = Blueprint()
    have, want = count_blocks(frame.names, theirs), frame.config.fusion_layers
    if have != want:
        plan.problems.append(f"{theirs}N: {have} layers in the file, but fusion_layers is {want}")
        plan.ignore(frame.names, {re.escape(theirs) + ".*": "a layer"})
        return plan
    for number in range(want):
        for kind, modules in (("self_attention", _SELF_ATTENTION), ("cross_attention", _CROSS_ATTENTION)):
            for module, names in modules.items():
                sources = (f"{theirs}{number}.{name}" for name in names)
                plan.recipes |= module_recipes(f"{ours}.{kind}.{number}.{module}", *sources)
    return plan


def _head(frame: Frame, head: Head) -> Blueprint:
    plan = Blueprint()
    held = _names_of(frame, head.name)
    # The released temperature has no dimension, ours has one.
    recipes = {ours: Recipe((theirs,), torch.atleast_1d) for theirs, ours in head.tensors.items()}
    for theirs, ours in head.modules.items():
        recipes |= module_recipes(ours, theirs + ".{}")
    if not set(recipes) <= set(frame.parameters):
        plan.ignored = dict.fromkeys(held, f"a head that is not for this model ({head.name})")
    elif held:
        plan.recipes = recipes
    elif head.fine_tuned and head.begins and _can_make(frame, head.begins):
        plan.recipes = dict(head.begins)
    elif head.fine_tuned:
        plan.untouched = dict.fromkeys(recipes, f"only fine-tuned checkpoints have its weights ({head.name})")
    elif head.superseded_by and _does_without(frame, head.superseded_by):
        plan.untouched = dict.fromkeys(recipes, f"the file has {head.superseded_by} in place of {head.name}")
    else:
        plan.recipes = recipes
    return plan


def _names_of(frame: Frame, head: str) -> list[str]:
    return [name for name in frame.names if name.split(".")[0] == head]


def _can_make(frame: Frame, recipes: Mapping[str, Recipe]) -> bool:
    return all(name in frame.names for recipe in recipes.values() for name in recipe.sources)


def _does_without(frame: Frame, head: str) -> bool:
    """Whether both the file and the model have ``head``."""
    return bool(_names_of(frame, head)) and any(name.split(".")[0] == head for name in frame.parameters)


def _token_types(table: Tensor) -> Tensor | Adapted:
    """Two types become three: the second image of a pair begins as the first, as in the released code."""
    if table.ndim == 2 and len(table) == 2:
        return Adapted(torch.cat([table, table[1:]]), "type 2 (second image of a pair) repeats type 1")
    return table


def _frames(temporal: Tensor) -> Tensor:
    """[1, frames, D] -> [frames, D], in a type in which a difference is exact enough."""
    if temporal.ndim != 3 or len(temporal) != 1 or not temporal.shape[1]:
        raise Misfit(f"{list(temporal.shape)} is no temporal embedding [1, frames, D]")
    return temporal[0] if temporal.dtype == torch.float64 else temporal[0].float()


def _later_frames(max_frames: int) -> Callable[[Tensor], Adapted]:
    cut = rows_at_most(max_frames, "max_frames")

    def build(temporal: Tensor) -> Adapted:
        rows = _frames(temporal)
        kept = cut(rows)
        how = "the first frame's subtracted from all"
        if isinstance(kept, Adapted):
            return Adapted(kept.tensor - rows[0], f"{kept.how}; {how}")
        return Adapted(kept - rows[0], how)

    return build


def _with_first_frame(side: int) -> Callable[[Tensor, Tensor], Adapted]:
    resize = positions(side)

    def build(table: Tensor, temporal: Tensor) -> Adapted:
        first, resized = _frames(temporal)[0], resize(table)
        how = "the first frame's temporal embedding added"
        if isinstance(resized, Adapted):
            table, how = resized.tensor, f"{resized.how}; {how}"
        else:
            table = resized
        if first.shape != table.shape[1:]:
            raise Misfit(f"positions {list(table.shape)} and frames of {len(first)} differ in width")
        return Adapted(table + first, how)

    return build
