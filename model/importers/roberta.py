"""RoBERTa under transformers' names, for the text encoder."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from model.importers.errors import WeightImportError
from model.importers.plan import (
    Blueprint,
    Frame,
    Misfit,
    Recipe,
    count_blocks,
    module_recipes,
    rows_at_most,
    same,
)

_EMBEDDINGS = "embeddings.word_embeddings.weight"
_UNUSED = {
    r"embeddings\.position_ids|embeddings\.token_type_ids": "a buffer that the model makes itself",
    r"pooler\.dense\.(weight|bias)": "RoBERTa's pooler, which nothing here reads",
}


def hf_roberta(frame: Frame) -> Blueprint:
    """``RobertaModel`` or ``RobertaForMaskedLM``; its masked-language head is left out.

    The released code trains that head from scratch.
    """
    plan = text(frame, _prefix(frame))
    why = "RoBERTa's masked-language head; the one here begins anew (language_head=True loads it)"
    plan.ignore(frame.names, {r"lm_head\..*": why})
    return plan


def hf_roberta_with_head(frame: Frame) -> Blueprint:
    """``RobertaForMaskedLM`` with its masked-language head.

    Raises:
        WeightImportError: the model has no such head.
    """
    if "language_head.dense.weight" not in frame.parameters:
        raise WeightImportError("language_head=True, but the model has no masked-language head")
    prefix = _prefix(frame)
    plan = text(frame, prefix)
    # Files that keep tied tensors once have the decoder's weight under the embedding's name only.
    own = "lm_head.decoder.weight"
    decoder = own if own in frame.names else prefix + _EMBEDDINGS
    plan.recipes |= {
        **module_recipes("language_head.dense", "lm_head.dense.{}"),
        **module_recipes("language_head.norm", "lm_head.layer_norm.{}"),
        "language_head.decoder.weight": Recipe((decoder,), _words(frame.config.vocab_size)),
        "language_head.decoder.bias": Recipe(("lm_head.bias",), _words(frame.config.vocab_size)),
    }
    plan.ignore(frame.names, {r"lm_head\.decoder\.bias": "repeats lm_head.bias"})
    return plan


def text(frame: Frame, prefix: str) -> Blueprint:
    """Recipes for the text encoder from RoBERTa's names after ``prefix``."""
    config, ours = frame.config, f"{frame.root}text_encoder.roberta."
    layers = "encoder.layer."
    have, want = count_blocks(frame.names, prefix + layers), config.text_layers
    plan = Blueprint()
    if have != want:
        plan.problems.append(f"{prefix}{layers}N: {have} layers in the file, but text_layers is {want}")
        plan.ignore(frame.names, {rf"{re.escape(prefix + layers)}.*": "a layer"})
    builders: dict[str, Callable[..., object]] = {
        _EMBEDDINGS: _words(config.vocab_size),
        "embeddings.position_embeddings.weight": rows_at_most(
            config.max_position_embeddings, "max_position_embeddings"
        ),
    }
    for parameter in frame.parameters:
        name = parameter.removeprefix(ours)
        if name == parameter or (have != want and name.startswith(layers)):
            continue
        plan.recipes[parameter] = Recipe((prefix + name,), builders.get(name, same))  # type: ignore[arg-type]
    plan.ignore(frame.names, {re.escape(prefix) + f"({pattern})": why for pattern, why in _UNUSED.items()})
    return plan


def _prefix(frame: Frame) -> str:
    return "roberta." if f"roberta.{_EMBEDDINGS}" in frame.names else ""


def _words(vocab_size: int) -> Callable[[Tensor], Tensor]:
    """Builder: one row a token of the vocabulary, no more and no fewer."""

    def build(table: Tensor) -> Tensor:
        if not table.ndim or len(table) != vocab_size:
            have = len(table) if table.ndim else 0
            raise Misfit(f"a vocabulary of {have} tokens, but vocab_size is {vocab_size}")
        return table

    return build
