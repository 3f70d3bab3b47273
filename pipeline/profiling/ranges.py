"""Ranges of the profile: what they are called, and where the model and the engine begin and end them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import record_function

#: Depth of each range, in the order of a step. The model makes ``objective ...`` and ``fusion of ...``.
DEPTHS = {
    "step": 0,
    "data": 1,
    "forward and backward": 1,
    "forward": 2,
    "image encoder": 3,
    "text encoder": 3,
    "fusion": 3,
    "fusion of": 4,
    "objective": 3,
    "backward": 2,
    "optimizer": 1,
}


def kind_of(name: str) -> str | None:
    """The entry of ``DEPTHS`` that a range belongs to; None: it is none of ours."""
    if name in DEPTHS:
        return name
    return next((kind for kind in ("fusion of", "objective") if name.startswith(f"{kind} ")), None)


def mark(engine: Any) -> None:
    """Make ranges of the engine's forward and backward and of the encoders. For the rest of its life."""
    backbone = engine.module.glscl
    modules = {
        "forward": engine.module,
        "image encoder": backbone.vision_encoder,
        "text encoder": backbone.text_encoder,
        "fusion": backbone.fusion,
    }
    for name, module in modules.items():
        _mark_forward(module, name)
    engine.backward = _marked(engine.backward, "backward")


def _mark_forward(module: nn.Module, name: str) -> None:
    running: list[record_function] = []

    def before(*_: Any) -> None:
        running.append(record_function(name))
        running[-1].__enter__()

    def after(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def _marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return marked
