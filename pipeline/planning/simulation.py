"""A training step of the real model without its numbers: its FLOPs, and its memory moment by moment.

The model's own code runs, forward and backward, with states on torch's meta device, which have a shape and no data.
Texts and masks are real (the model looks into them), pixels are not. So whatever the model does is counted as it
does it: shared passes, rows left out, activation checkpointing. What is not counted is workspace within an operator.

Shape legend: B samples of a worker, T text tokens, F frames.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from model import GLSCLConfig, GLSCLForPreTraining, backward_in_parts, draw_masks
from model.gather import simulated_workers

META = torch.device("meta")
_FEW = 8  # tokens of a short text

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
#: Operators that look into the numbers of their index, on meta too: it must be real.
_LOOK_INTO = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
    torch.ops.aten._unsafe_index_put.default,
}

#: torch counts its fused attention on CUDA only; elsewhere it is the same products.
FUSED_ATTENTION_FLOPS = {
    _FUSED: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    _FUSED_BACKWARD: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
        grad, query, key, value
    ),
}


@dataclass(frozen=True)
class Shape:
    """A worker's contrastive batch: ``parts`` of ``samples`` samples each, computed one after the other.

    Args:
        tokens: of the longest caption, ``<s>`` and ``</s>`` included.
        group: consecutive samples of a group (wrong images of ITM, negatives of MLTC).
    """

    samples: int
    frames: int
    resolution: int
    tokens: int
    group: int
    parts: int = 1


@dataclass
class SimulatedStep:
    """What one forward and backward take.

    Attributes:
        moments: (activations, gradients of parameters) in bytes, each time that more was in use than the moment
            before; the moment of the peak depends on where the gradients go.
    """

    moments: list[tuple[int, int]] = field(default_factory=list)

    def peak(self, gradients: float = 1.0) -> float:
        """Most bytes at once, where so large a share of each finished gradient stays in memory."""
        return max((activations + gradients * kept for activations, kept in self.moments), default=0)


def meta_model(config: GLSCLConfig, *, checkpointing: bool = False) -> GLSCLForPreTraining:
    """The model as the training builds it, without the memory of its parameters."""
    with META:
        model = GLSCLForPreTraining(config)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # Positions and token types: they are looked into, and what they say changes no shape.
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    if checkpointing:
        model.activation_checkpointing_enable()
    return model.train()


def simulate(
    model: GLSCLForPreTraining,
    shape: Shape,
    objectives: Mapping[str, float],
    *,
    workers: int = 1,
    device: str = "cuda",
    autocast: bool = False,
) -> SimulatedStep:
    """One worker's forward and backward of a contrastive batch.

    Args:
        model: of :func:`meta_model`.
        workers: that share the contrastive batch; what is gathered from them is held.
        device: ``cuda`` or ``cpu``, whose fused attention is used where it can be.
        objectives: weights, as the model takes them.
        autocast: products in bf16, as of ``train.precision: bf16-autocast``.
    """
    inputs = [inputs_of(model.config, shape, seed=number) for number in range(shape.parts)]
    watch = _MemoryWatch(model)  # alone: torch's counter of FLOPs keeps tensors alive
    lower = _autocast() if autocast else nullcontext()
    with lower, _attention_of(device), simulated_workers(workers), watch.gradients(), watch:
        if shape.parts == 1:
            output = model(**inputs[0], objectives=objectives, group_size=shape.group)
            output.loss.backward()
            del output
        else:
            backward_in_parts(
                model,
                lambda loss: loss.backward(),
                inputs,
                config=model.config,
                objectives=objectives,
                group_size=shape.group,
                reseed=lambda number: None,
            )
    model.zero_grad(set_to_none=True)
    return SimulatedStep(watch.moments)


class StepFlops:
    """FLOPs that a worker's forward and backward need, counted once for each kind of batch (a second or less).

    The backward needs twice what the forward does (measured: within 3 %). Between two lengths of text they are
    interpolated.
    """

    def __init__(self, config: GLSCLConfig, workers: int) -> None:
        self._model, self._workers = meta_model(config), workers
        self._counted: dict[tuple[Shape, frozenset[str]], float] = {}

    def of(self, shape: Shape, objectives: Mapping[str, float]) -> float:
        """FLOPs of one contrastive batch without recomputation."""
        longest = max(shape.tokens, self._model.config.max_text_length)
        short, long = (self._count(replace(shape, tokens=tokens), objectives) for tokens in (_FEW, longest))
        return short + (long - short) * (shape.tokens - _FEW) / (longest - _FEW)

    def _count(self, shape: Shape, objectives: Mapping[str, float]) -> float:
        key = (shape, frozenset(objectives))
        if key not in self._counted:
            counter = FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION_FLOPS)
            with torch.no_grad(), _attention_of("cuda"), simulated_workers(self._workers), counter, _OnMeta():
                self._model(
                    **inputs_of(self._model.config, shape, 0), objectives=objectives, group_size=shape.group
                )
            self._counted[key] = 3.0 * shape.parts * counter.get_total_flops()
        return self._counted[key]


def inputs_of(config: GLSCLConfig, shape: Shape, seed: int, device: torch.device = META) -> dict[str, Any]:
    """One part of a batch, pixels on ``device``, as the model takes it but for objectives and group size.

    Texts of ``tokens`` one-token words, all of that length, with masks as a training draws them."""
    samples, tokens = shape.samples, shape.tokens
    generator = torch.Generator().manual_seed(seed)
    first, last = config.unk_token_id + 1, config.mask_token_id
    ids = torch.randint(first, last, (samples, tokens), generator=generator)
    ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
    words = torch.arange(-1, tokens - 1).expand(samples, tokens).clone()
    words[:, -1] = -1
    attention = torch.ones(samples, tokens, dtype=torch.int64)
    valid = torch.ones(samples, dtype=torch.bool)
    seeds = [seed * samples + row for row in range(samples)]
    patches = (shape.resolution // config.patch_size) ** 2
    pixels = (samples, shape.frames, 3, shape.resolution, shape.resolution)
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "pixel_values": torch.zeros(pixels, dtype=torch.uint8, device=device),
        "masks": draw_masks(config, ids, attention, words, valid, seeds, shape.group, patches),
        "valid": valid,
    }


def _all_meta(args: Any, kwargs: Any) -> Any:
    """An operator's arguments; where some are on meta, all of them."""
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in leaves):
        return args, kwargs
    return tree_map_only(
        Tensor, lambda t: t if t.is_meta else torch.empty_like(t, device=META), (args, kwargs)
    )


@contextmanager
def _attention_of(device: str) -> Iterator[None]:
    """Attention on meta as the device would compute it: fused, or (by torch's rules) with its weights.

    A mode of torch's would not do: it is left for the recomputation of activation checkpointing.
    """
    plain = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.is_meta:
            if _is_fused(device, query, key, value, kwargs.get("dropout_p", 0.0)):
                fused: Tensor = _FUSED(query, key, value)[0]
                return fused
            if kwargs.get("attn_mask") is not None:
                kwargs["attn_mask"] = torch.empty_like(kwargs["attn_mask"], device=META)
        return plain(query, key, value, *args, **kwargs)

    with patch.object(F, "scaled_dot_product_attention", attention):
        yield


@contextmanager
def _autocast() -> Iterator[None]:
    """As CUDA's autocast to bf16, which torch does not have on meta: products in bf16, LayerNorm in fp32."""
    linear, norm, product = F.linear, F.layer_norm, torch.bmm
    cast: dict[int, Tensor] = {}  # weights are cast once

    def low(tensor: Tensor) -> Tensor:
        if not tensor.is_meta or tensor.dtype != torch.float32:
            return tensor
        if not tensor.is_leaf:
            return tensor.to(torch.bfloat16)
        return cast.setdefault(id(tensor), tensor.to(torch.bfloat16))

    def low_linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(low(states), low(weight), None if bias is None else low(bias))

    def full_norm(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return norm(states.float() if states.is_meta else states, *args, **kwargs)

    def low_product(left: Tensor, right: Tensor) -> Tensor:
        return product(low(left), low(right))

    with (
        patch.object(F, "linear", low_linear),
        patch.object(F, "layer_norm", full_norm),
        patch.object(torch, "bmm", low_product),
    ):
        yield


def _is_fused(device: str, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    widths = {tensor.shape[-1] for tensor in (query, key, value)}
    if device == "cpu":  # use_flash_attention_cpp in ATen/native/transformers/sdp_utils_cpp.cpp
        return dropout == 0 and len(widths) == 1
    alignment = 8 if query.dtype.itemsize == 2 else 4  # use_mem_efficient_attention in cuda/sdp_utils.cpp
    return all(width % alignment == 0 for width in widths)


class _OnMeta(TorchDispatchMode):
    """Lets what is on meta meet what is real, as if both were on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # "is there no padding at all?": there is, in any real batch
        if func not in _LOOK_INTO:
            args, kwargs = _all_meta(args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _MemoryWatch(_OnMeta):
    """Bytes of meta storages alive, moment by moment, those of the parameters' gradients apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.moments: list[tuple[int, int]] = []
        self._model = model
        # By storage, of those alive. A view of a parameter is none of the step's.
        self._sizes = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
        self._gradients: set[int] = set()
        self._alive = self._kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._see(tensor)
        return result

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Tell finished gradients of parameters from everything else, for the time of the block."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(self._finished)
            for parameter in self._model.parameters()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._alive += storage.nbytes()
        weakref.finalize(storage, self._free, key)
        self._note()

    def _finished(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self._sizes and key not in self._gradients:
            self._gradients.add(key)
            self._kept += self._sizes[key]
            self._alive -= self._sizes[key]
            self._note()

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._gradients:
            self._gradients.remove(key)
            self._kept -= size
        else:
            self._alive -= size

    def _note(self) -> None:
        self.moments.append((self._alive, self._kept))
