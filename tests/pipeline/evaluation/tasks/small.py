"""A tiny model of any class, and real pictures in any storage, for the tests of the tasks."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor
from model.glscl import GLSCLPreTrainedModel
from pipeline.evaluation.tasks.base import TaskContext
from sharding.storage import Storage

EMOJI = sorted((Path(__file__).resolve().parents[4] / "pipeline/demo/corpus/images").glob("1f4*.webp"))

_Model = TypeVar("_Model", bound=GLSCLPreTrainedModel)


def tiny_model(kind: type[_Model], **overrides: Any) -> _Model:
    """Weights that tell inputs apart: those of a fresh model hardly do."""
    values = {
        **{"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2},
        **{"intermediate_size": 48, "vision_layers": 1, "text_layers": 1, "fusion_layers": 2},
        **{"projection_size": 16, "vocab_size": 400},
    }
    torch.manual_seed(0)
    model = kind(GLSCLConfig.preset("tiny", **{**values, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def processor_of(model: GLSCLPreTrainedModel) -> GLSCLProcessor:
    return GLSCLProcessor.from_config(model.config)


def context_of(model: Any, storage: Storage, seed: int = 5) -> TaskContext:
    return TaskContext(model, processor_of(model), storage, None, seed)


def pretraining_context(storage: Storage) -> TaskContext:
    return context_of(tiny_model(GLSCLForPreTraining), storage)


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 33)) -> bytes:
    """An emoji on white, ``size`` (width, height)."""
    with Image.open(EMOJI[number % len(EMOJI)]) as emoji:
        ground = Image.new("RGBA", emoji.size, "white")
        ground.alpha_composite(emoji.convert("RGBA"))
    sink = io.BytesIO()
    ground.convert("RGB").resize(size).save(sink, kind)
    return sink.getvalue()


def write_lines(storage: Storage, path: str, rows: Sequence[object]) -> None:
    """JSON lines."""
    storage.write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
