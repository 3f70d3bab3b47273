"""The losses that compare with the whole contrastive batch, cut off from the model that made the features.

ITC, MGSC and the text half of MLTC read a few vectors of each sample and compare them with those of all workers.
Here these vectors are gathered in one object, so that their losses can be computed with the model's graph
behind them, or without it (:mod:`model.cached`).

Shape legend: n samples and k completed text tokens of this worker, F frames, D width, E projection width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.profiler import record_function

from model.configuration import GLSCLConfig
from model.objectives import GlobalCounts, global_info_nce, token_completion_loss


@dataclass(frozen=True)
class ContrastiveFeatures:
    """What the contrastive losses read, not yet normalised; None where no wanted objective reads it.

    Args:
        text, vision: [n, 1, E] ITC projections.
        temperature: [1] of ITC.
        global_text, global_vision: [n, 1, D] and [n, F, D] completed class tokens (MGSC).
        global_text_target, global_vision_target: what they are to match, detached.
        local_text: [k, D] completed text tokens (MLTC).
        local_text_target: what they are to match, detached.
    """

    text: Tensor | None = None
    vision: Tensor | None = None
    temperature: Tensor | None = None
    global_text: Tensor | None = None
    global_vision: Tensor | None = None
    global_text_target: Tensor | None = None
    global_vision_target: Tensor | None = None
    local_text: Tensor | None = None
    local_text_target: Tensor | None = None

    def detached(self) -> ContrastiveFeatures:
        """The same values without a graph."""
        return self._map(lambda name, tensor: tensor.detach())

    def watched(self) -> ContrastiveFeatures:
        """The same values as leaves that collect a gradient (the targets do not)."""
        return self._map(
            lambda name, tensor: tensor.detach().requires_grad_(not name.endswith("_target")),
        )

    def gradients(self) -> ContrastiveFeatures:
        """The gradients collected by leaves of :meth:`watched`; None for targets."""
        return ContrastiveFeatures(
            **{field.name: getattr(getattr(self, field.name), "grad", None) for field in fields(self)}
        )

    def split(self, samples: Sequence[int], tokens: Sequence[int]) -> list[ContrastiveFeatures]:
        """Cut into parts of so many samples and completed tokens.

        Gradients: that of the one temperature, which every part used, stays with the first part.
        """
        parts = [ContrastiveFeatures()] * len(samples)
        for field in fields(self):
            whole = getattr(self, field.name)
            if whole is None:
                continue
            if field.name == "temperature":
                pieces = [whole, *[torch.zeros_like(whole)] * (len(samples) - 1)]
            else:
                pieces = list(whole.split(list(tokens if field.name.startswith("local") else samples)))
            parts = [replace(part, **{field.name: piece}) for part, piece in zip(parts, pieces, strict=True)]
        return parts

    @staticmethod
    def joined(parts: Sequence[ContrastiveFeatures]) -> ContrastiveFeatures:
        """The features of one worker from those of its parts, in order."""

        def join(name: str, _: Tensor) -> Tensor:
            pieces = [getattr(part, name) for part in parts]
            return pieces[0] if name == "temperature" else torch.cat(pieces)

        return parts[0]._map(join)

    def dot(self, gradients: ContrastiveFeatures) -> Tensor:
        """Sum of features times ``gradients``: its gradient is what ``gradients`` stand for."""
        products = [
            (getattr(self, field.name) * gradient).sum()
            for field in fields(self)
            if (gradient := getattr(gradients, field.name)) is not None
        ]
        return torch.stack(products).sum() if products else torch.zeros(())

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> ContrastiveFeatures:
        present = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return ContrastiveFeatures(**{name: function(name, tensor) for name, tensor in present.items()})


def contrastive_terms(
    config: GLSCLConfig, features: ContrastiveFeatures, valid: Tensor, counts: GlobalCounts
) -> dict[str, Tensor]:
    """Scaled terms (see :mod:`model.objectives`) of ITC, of MGSC, and of MLTC its text half; collective.

    Args:
        valid: [n] bool, of this worker.
        counts: of all workers.
    """
    terms = {}
    rest = (valid, counts.valid, counts.samples, config.reference_gather)
    if features.text is not None:
        assert features.vision is not None
        assert features.temperature is not None
        with record_function("objective itc"):
            terms["itc"] = global_info_nce(features.text, features.vision, features.temperature, *rest)
    if features.global_text is not None:
        assert features.global_vision is not None
        assert features.global_text_target is not None
        assert features.global_vision_target is not None
        temperature = config.completion_temperature
        with record_function("objective mgsc"):
            terms["mgsc"] = global_info_nce(
                features.global_vision, features.global_vision_target, temperature, *rest
            ) + global_info_nce(features.global_text, features.global_text_target, temperature, *rest)
    if features.local_text is not None:
        assert features.local_text_target is not None
        with record_function("objective mltc"):
            terms["mltc"] = token_completion_loss(
                features.local_text,
                features.local_text_target,
                config.completion_temperature,
                counts,
                config.reference_gather,
            )
    return terms
