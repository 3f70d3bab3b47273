"""The pieces of a DeepSpeed engine: which numbers this worker holds, read and written in place.

==========  ============================================================================================
ZeRO 0      every worker holds everything; of each parameter it *saves* its W-th part
ZeRO 1, 2   a worker holds a stretch of each group of parameters laid end to end, in fp32, with its moments
ZeRO 3      a worker holds the W-th part of each parameter, padded to equal length
==========  ============================================================================================

Parameters that are not trained have no pieces: they are what the model began with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipeline.training.checkpoints.fragments import WEIGHT, Pieces, Stretch

_COUNT = "step"  # AdamW's name of its number of updates


class Held(Protocol):
    """A stretch that this worker holds."""

    @property
    def stretch(self) -> Stretch: ...

    def values(self) -> dict[str, torch.Tensor]:
        """Its kinds (see ``fragments``), fp32 [length]: views where the engine keeps them so."""

    def fill(self, pieces: Pieces) -> None:
        """Overwrite it, moments included."""

    def updates(self) -> int:
        """How many updates the optimizer has counted."""


@dataclass
class _View:
    """A stretch within a flat tensor that torch's optimizer updates (ZeRO 0 to 2)."""

    stretch: Stretch
    flat: torch.Tensor  # fp32, the optimizer's parameter
    offset: int  # where the stretch begins in it
    state: dict[str, Any]  # of the optimizer, for ``flat``

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1).narrow(0, self.offset, self.stretch.length)

    def values(self) -> dict[str, torch.Tensor]:
        kinds = {WEIGHT: self.flat} | {
            kind: value
            for kind, value in self.state.items()
            if torch.is_tensor(value) and value.shape == self.flat.shape and kind != _COUNT
        }
        return {kind: self._cut(tensor) for kind, tensor in kinds.items()}

    def fill(self, pieces: Pieces) -> None:
        for kind, view in self.values().items():
            view.copy_(pieces.read(self.stretch, kind))
        _count_at_least(self.state, pieces.updates(self.stretch))

    def updates(self) -> int:
        return int(self.state[_COUNT])


@dataclass
class _Partition:
    """A worker's part of a parameter under ZeRO 3, through DeepSpeed's own access (it may be offloaded)."""

    stretch: Stretch
    parameter: torch.nn.Parameter
    padded: int  # length with padding
    kinds: tuple[str, ...]
    state: dict[str, Any]

    def values(self) -> dict[str, torch.Tensor]:
        return {kind: self._local(kind)[: self.stretch.length] for kind in self.kinds}

    def _local(self, kind: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        found = (
            safe_get_local_fp32_param(self.parameter)
            if kind == WEIGHT
            else safe_get_local_optimizer_state(self.parameter, kind)
        )
        local: torch.Tensor = found.detach().view(-1)
        return local

    def fill(self, pieces: Pieces) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        for kind in self.kinds:
            value = torch.zeros(self.padded)
            value[: self.stretch.length] = pieces.read(self.stretch, kind)
            if kind == WEIGHT:
                safe_set_local_fp32_param(self.parameter, value)
            else:
                safe_set_local_optimizer_state(self.parameter, value, kind)
        _count_at_least(self.state, pieces.updates(self.stretch))

    def updates(self) -> int:
        return int(self.state[_COUNT])


def _count_at_least(state: dict[str, Any], updates: int) -> None:
    """Parameters of one flat tensor share a count: the largest of theirs."""
    state[_COUNT].fill_(max(int(state[_COUNT]), updates))


def held(engine: Any, *, saving: bool) -> Iterator[Held]:
    """The stretches this worker holds; ``saving``: those it is to save, so that each number is saved once.

    Makes the optimizer's state where there is none yet, as its first update would.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _replicated(engine, saving)
    return _partitioned(engine) if stage == 3 else _flattened(engine)


def _named(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _adam_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    state = optimizer.state[parameter]
    if not state:
        state[_COUNT] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _replicated(engine: Any, saving: bool) -> Iterator[Held]:
    optimizer = engine.optimizer
    assert isinstance(optimizer, torch.optim.AdamW), f"ZeRO 0 with {type(optimizer).__name__}"
    rank, workers = (engine.global_rank, engine.world_size) if saving else (0, 1)
    for name, parameter in _named(engine):
        share = -(-parameter.numel() // workers)
        start = min(rank * share, parameter.numel())
        length = min(share, parameter.numel() - start)
        if length:
            state = _adam_state(optimizer, parameter)
            yield _View(Stretch(name, start, length), parameter, start, state)


def _flattened(engine: Any) -> Iterator[Held]:
    optimizer = engine.optimizer.optimizer  # torch's, over one flat fp32 partition a group
    for name, parameter in _named(engine):
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # wholly another worker's
        (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield _View(Stretch(name, lp.start, lp.numel), flat, hp.start, _adam_state(optimizer, flat))


def _partitioned(engine: Any) -> Iterator[Held]:
    zero = engine.optimizer
    for name, parameter in _named(engine):
        group, *_ = zero.grad_position[zero.get_param_id(parameter)]
        state = _adam_state(zero.optimizer, zero.fp32_partitioned_groups_flat[group])
        padded = parameter.ds_tensor.ds_numel
        start = engine.global_rank * padded
        length = min(padded, parameter.ds_numel - start)
        if length > 0:
            kinds = (WEIGHT, "exp_avg", "exp_avg_sq")
            yield _Partition(Stretch(name, start, length), parameter, padded, kinds, state)


class Restoring:
    """Around the filling of an engine's stretches: the parameters that compute follow when it ends. Collective."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._stage = engine, engine.zero_optimization_stage()

    def __enter__(self) -> None:
        if self._stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()


_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale(engine: Any) -> dict[str, float] | None:
    """The state of fp16's dynamic loss scale, the same on every worker; None without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not all(hasattr(scaler, name) for name in _SCALE):
        return None
    return {name: getattr(scaler, name) for name in _SCALE}


def restore_loss_scale(engine: Any, state: dict[str, float] | None) -> None:
    """The opposite of :func:`loss_scale`; an engine without a dynamic scale stays as it is."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if state is not None and loss_scale(engine) is not None:
        for name in _SCALE:
            setattr(scaler, name, state[name])


def whole_weights(engine: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32 on the CPU, where ``keep`` (else empty). Collective under ZeRO 3.

    Gathered module by module, so that no worker's device has to hold the whole model.
    """
    import deepspeed

    partitioned = engine.zero_optimization_partition_weights()
    state: dict[str, torch.Tensor] = {}
    for prefix, module in engine.module.named_modules():
        own = list(module.parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(own, enabled=partitioned and bool(own)):
            if keep:
                for name, tensor in _own_state(module).items():
                    value = tensor.detach()
                    wide = value.float() if value.is_floating_point() else value
                    state[f"{prefix}.{name}" if prefix else name] = wide.to("cpu", copy=True)
    if keep:
        assert state.keys() == engine.module.state_dict().keys()
    return state


def _own_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the module itself, without its children, has in the state dict."""
    own: dict[str, torch.Tensor] = {}
    module._save_to_state_dict(own, "", keep_vars=True)
    return own
