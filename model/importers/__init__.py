"""Pre-trained weights for GLSCL models: CLIP, RoBERTa and the authors' released checkpoints.

>>> model = GLSCLForPreTraining(GLSCLConfig.preset("base"))
>>> print(import_weights(model, Path("ViT-B-16.pt")))
>>> print(import_weights(model, Path("roberta-base")))

Nothing in a file is ever run, and a model is changed as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from model.glscl import GLSCLModel, GLSCLPreTrainedModel
from model.importers.clip import hf_clip, openai_clip, timm_clip
from model.importers.errors import WeightImportError
from model.importers.files import read_weights, weights_among
from model.importers.plan import Blueprint, Frame, ImportReport, Plan, draw_plan
from model.importers.released import released_checkpoint
from model.importers.roberta import hf_roberta, hf_roberta_with_head

__all__ = ["ImportReport", "Plan", "WeightImportError", "WeightKind", "import_weights", "plan_import"]

WeightKind = Literal["auto", "openai_clip", "timm_clip", "hf_clip", "roberta", "glscl"]

_FAMILIES: dict[str, Callable[[Frame], Blueprint]] = {
    "openai_clip": openai_clip,
    "timm_clip": timm_clip,
    "hf_clip": hf_clip,
    "roberta": hf_roberta,
    "glscl": released_checkpoint,
}
#: A name that only this kind has. Asked in order: a released checkpoint has the others' names in it.
_SIGNS = (
    ("text_transformer.embeddings.word_embeddings.weight", "glscl"),
    ("visual.conv1.weight", "openai_clip"),
    ("patch_embed.proj.weight", "timm_clip"),
    ("vision_model.embeddings.patch_embedding.weight", "hf_clip"),
    ("embeddings.patch_embedding.weight", "hf_clip"),
    ("roberta.embeddings.word_embeddings.weight", "roberta"),
    ("embeddings.word_embeddings.weight", "roberta"),
)


def import_weights(
    model: GLSCLPreTrainedModel,
    source: Path | str | Mapping[str, Tensor],
    *,
    kind: WeightKind = "auto",
    strict: bool = True,
    language_head: bool = False,
) -> ImportReport:
    """Load pre-trained weights into the part of ``model`` that they are for.

    Position embeddings are interpolated to ``config.image_size``; CLIP blocks beyond ``config.vision_layers``
    and text positions beyond ``config.max_position_embeddings`` are left out. All of it is in the report.

    Args:
        model: a bare backbone or one with heads, on any device, not sharded (ZeRO 3): see :func:`plan_import`.
        source: a safetensors file (or the index of its shards), a torch file (``torch.save``, Lightning,
            TorchScript), a folder with one of these, or a state dict.
        kind: ``openai_clip``, ``timm_clip`` and ``hf_clip`` fill the vision encoder, ``roberta`` the text
            encoder, ``glscl`` (the authors' checkpoints) everything; ``auto`` tells by the names. The
            vision encoder computes QuickGELU: CLIP weights trained with plain GELU load, but lose by it.
        strict: raise on missing and unexpected names; otherwise they are only reported. What does not fit
            always raises.
        language_head: with ``roberta``, load its masked-language head too.

    Raises:
        WeightImportError: unreadable, of no known kind, or it does not fit; the model is unchanged.
        ValueError: an unknown ``kind``, or ``language_head`` with weights that have none.
    """
    plan = plan_import(model, source, kind=kind, strict=strict, language_head=language_head)
    plan.apply(model)
    return plan.report


def plan_import(
    model: GLSCLPreTrainedModel,
    source: Path | str | Mapping[str, Tensor],
    *,
    kind: WeightKind = "auto",
    strict: bool = True,
    language_head: bool = False,
) -> Plan:
    """What :func:`import_weights` would do, all of it checked and nothing done; ``model`` may be partitioned (ZeRO 3).

    Raises:
        WeightImportError, ValueError: as :func:`import_weights`.
    """
    if kind not in get_args(WeightKind):
        raise ValueError(f"kind {kind!r} is unknown: choose one of {', '.join(get_args(WeightKind))}")
    if isinstance(source, Mapping):
        where, weights = "the mapping", weights_among(source, "the mapping")
    else:
        where, weights = str(source), read_weights(Path(source))
    chosen = _kind_of(weights.tensors, where) if kind == "auto" else kind
    if language_head and chosen != "roberta":
        raise ValueError(f"language_head=True is for roberta weights; {where} holds {chosen} weights")
    family = hf_roberta_with_head if language_head else _FAMILIES[chosen]
    frame = Frame(
        config=model.config,
        root="" if isinstance(model, GLSCLModel) else f"{model.base_model_prefix}.",
        parameters=tuple(name for name, _ in model.named_parameters()),
        names=frozenset(weights.tensors),
    )
    return draw_plan(model, family(frame), weights, chosen, where, strict)


def _kind_of(names: Iterable[str], where: str) -> str:
    held = set(names)
    for sign, kind in _SIGNS:
        if sign in held:
            return kind
    if any(name.startswith(("glscl.", "vision_encoder.", "text_encoder.")) for name in held):
        raise WeightImportError(f"{where} was saved by a model of this package: load it with from_pretrained")
    shown = ", ".join(sorted(held)[:5])
    raise WeightImportError(
        f"{where} is of no known kind ({', '.join(_FAMILIES)}): its {len(held)} names begin with {shown}"
    )
