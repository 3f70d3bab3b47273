"""ZeRO 3 from the first tensor on: a worker never holds the whole model, not even while it is made.

Under DeepSpeed's ``zero.Init`` each module's parameters are cut up between the workers as soon as its ``__init__``
returns. What gives them values afterwards has to put them together again, a module at a time: :func:`draw_weights` the
draws of the beginning, ``weights.load_weights`` the files a job begins with. Both go the same way without ZeRO 3, so
that a run begins with the same weights, bit for bit, at any stage and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from sharding.seeds import derive_seed


@contextmanager
def making_a_model(config: Mapping[str, Any] | None) -> Iterator[None]:
    """For the time a model is constructed: nothing is drawn, and with ``config`` parameters are partitioned at once.

    Args:
        config: of DeepSpeed; needs its process group. None: parameters stay whole, without values yet.
    """
    with no_init_weights():
        if config is None:
            yield
            return
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=dict(config)):
            yield


def is_partitioned(model: nn.Module) -> bool:
    """Whether the model was made under ZeRO 3's partitioning."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """``parameters`` with all their values, to be changed by every worker alike or by worker 0. Collective.

    A no-op for those that are not partitioned. Values are handed over in fp32, whatever the parameters' type, and
    worker 0's are kept.
    """
    parts = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0):
        gathered = [parameter.data for parameter in parts]
        for parameter in parts:
            parameter.data = parameter.data.float()
        yield
        for parameter, data in zip(parts, gathered, strict=True):
            data.copy_(parameter.data)
            parameter.data = data


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter the value it begins with, module by module, drawn from ``seed`` and the module's name."""
    with torch.no_grad():
        for name, module, owner in _owned("", model, model):
            with whole(list(module.parameters(recurse=False))):
                torch.manual_seed(derive_seed(seed, "initialisation", name))
                owner._init_weights(module)


def _owned(
    prefix: str, module: nn.Module, owner: PreTrainedModel
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Each module with its name and the model whose way of initialising it is: the innermost it belongs to."""
    for name, child in module.named_children():
        inner = child if isinstance(child, PreTrainedModel) else owner
        yield from _owned(f"{prefix}.{name}" if prefix else name, child, inner)
    yield prefix, module, owner
