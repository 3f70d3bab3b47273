"""Weight files and pickles of annotations with damaged bytes: read as data, refused by name, never run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from model.importers.errors import WeightImportError
from model.importers.files import read_weights
from pipeline.evaluation.tasks.alignment.pickles import read_plain_pickle
from sharding.errors import UserError
from tests.fixtures.fuzz import Fuzz, read_or_refuse
from tests.fuzz.mutations import mutated_bytes

# Names that a pickle would import to do harm, and opcodes that would call them.
_PICKLE_TOKENS = [
    b"cos\nsystem\n",
    b"c__builtin__\neval\n",
    b"R.",
    b"(dp0\n",
    b"\x80\x02",
    b"\x8e" + b"\xff" * 8,
    b"b",
    b"e",
]


def _weights() -> dict[str, list[bytes]]:
    state = {
        "layer.weight": torch.arange(12.0).reshape(3, 4),
        "layer.bias": torch.ones(3, dtype=torch.bfloat16),
    }

    def saved(content: Any, **options: Any) -> bytes:
        sink = io.BytesIO()
        torch.save(content, sink, **options)
        return sink.getvalue()

    return {
        "safetensors": [save(state)],
        "pt": [
            saved(state),
            saved({"state_dict": state, "epoch": 3}),
            saved({"a": state["layer.weight"].t()}),
        ],
        "bin": [saved(state, _use_new_zipfile_serialization=False)],
    }


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_a_damaged_weight_file_is_read_or_refused_by_name(fuzz: Fuzz, suffix: str, tmp_path: Path):
    path = tmp_path / f"weights.{suffix}"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        weights = read_or_refuse(lambda: read_weights(path), WeightImportError, str(path))
        if weights is None:
            return
        for tensor in weights.tensors.values():
            assert tensor.numel() * tensor.element_size() <= 64 * len(data), "a file grew in memory"

    fuzz(f"weights_{suffix}", mutated_bytes(_weights()[suffix], _PICKLE_TOKENS), check, 120)


def test_a_damaged_pickle_of_annotations_is_read_as_data_or_refused_by_name(fuzz: Fuzz):
    value = {
        "caption": "two cats",
        "annotation": {"cats": [{"bbox_mask": (1, 2, 3, 4), "pixel_mask": np.eye(4, dtype=np.uint8)}]},
    }
    seeds = [pickle.dumps(value, protocol) for protocol in range(2, 6)]

    def check(data: bytes) -> None:
        url = "file:///annotations.pkl"
        read_or_refuse(lambda: read_plain_pickle(data, url), UserError, url)

    fuzz("pickles", mutated_bytes(seeds, _PICKLE_TOKENS), check, 300)
