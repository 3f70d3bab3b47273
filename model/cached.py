"""Cached contrastive batches: the gradient of a batch that does not fit into memory at once.

A contrastive loss compares every sample with every other, so a batch cannot simply be cut. But its gradient
can: by the chain rule all that the model behind a feature has to know of the other samples is the loss's
gradient by that feature::

    1. every part of the worker's batch, without a graph  ->  features          (a few vectors a sample)
    2. loss over the features of all parts and workers     ->  its gradient by each feature
    3. every part again, with a graph: backward of  sum(features * gradient) + the losses of the part alone

Step 3 repeats the part's masks and dropout exactly, so the result is the gradient of the undivided batch, for
ITC, MGSC and MLTC together; it costs one more forward pass. (The idea: Gao et al., arXiv 2101.06983.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model.configuration import GLSCLConfig
from model.contrast import ContrastiveFeatures, contrastive_terms
from model.objectives import exchange_counts
from model.pretraining import (
    GLSCLPreTrainingOutput,
    StepPart,
    added,
    report,
    select_tokens,
    weighted_sum,
)


def backward_in_parts(
    forward: Callable[..., GLSCLPreTrainingOutput],
    backward: Callable[[Tensor], None],
    parts: Sequence[Mapping[str, Any]],
    *,
    config: GLSCLConfig,
    objectives: Mapping[str, float],
    group_size: int,
    reseed: Callable[[int], None],
) -> GLSCLPreTrainingOutput:
    """Forward and backward of a worker's batch, one part in memory at a time. Collective.

    Args:
        forward: a :class:`GLSCLForPreTraining`, or the engine around it.
        backward: called with the scalar of each part, in order. The gradients of all parts *added up* are
            those of the undivided batch; an engine that averages over them must be handed as many times more.
        parts: keyword arguments of ``forward`` but for the three below: consecutive samples, whole groups.
            Each worker has the same number of parts, of the same sizes.
        config, objectives, group_size: as for one undivided forward.
        reseed: called with a part's number before it is computed, twice: it must bring dropout's random
            generator into the same state both times.

    Returns:
        ``losses`` and ``metrics`` of the undivided batch, ``loss`` detached.
    """
    valid = torch.cat([part["valid"] for part in parts])
    chosen = [
        select_tokens(config, part["masks"], part["valid"], part["pixel_values"].shape[1], objectives.keys())
        for part in parts
    ]
    predicted, completed = zip(*(tokens.numbers() for tokens in chosen), strict=True)
    counts = exchange_counts(valid, torch.stack(predicted).sum(), torch.stack(completed).sum())

    def run(number: int, gradients: ContrastiveFeatures | None) -> GLSCLPreTrainingOutput:
        reseed(number)
        return forward(
            **parts[number],
            objectives=objectives,
            group_size=group_size,
            part=StepPart(counts, gradients),
        )

    collected = []
    with torch.no_grad():
        for number in range(len(parts)):
            partial = run(number, None).partial
            assert partial is not None
            assert partial.features is not None
            collected.append(partial.features)
    features = ContrastiveFeatures.joined(collected).watched()
    contrast = contrastive_terms(config, features, valid, counts)
    zero = torch.zeros((), device=valid.device)
    if contrast:
        weighted_sum(objectives, contrast, zero).backward()
    gradients = features.gradients().split(
        [len(part["valid"]) for part in parts], [int(number) for number in completed]
    )

    terms = {name: term.detach() for name, term in contrast.items()}
    right: dict[str, Tensor] = {}
    for number in range(len(parts)):
        output = run(number, gradients[number])
        assert output.partial is not None
        assert output.partial.terms is not None
        assert output.partial.right is not None
        assert output.loss is not None
        backward(output.loss)
        terms = added(terms, output.partial.terms)
        right = added(right, output.partial.right)
    losses, metrics = report(objectives, terms, right, counts, features.temperature)
    return GLSCLPreTrainingOutput(loss=weighted_sum(objectives, terms, zero), losses=losses, metrics=metrics)
