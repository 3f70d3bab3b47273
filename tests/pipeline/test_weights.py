"""A run begins with the weights that its job names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import GLSCLForPreTraining
from pipeline.config import ModelBlock
from pipeline.training.config import TrainBlock
from pipeline.training.engine import build_model, model_config
from pipeline.training.weights import load_weights
from sharding.errors import UserError
from sharding.storage import Storage, open_storage
from tests.fixtures.jobs import MODEL
from tests.fixtures.s3 import S3Server
from tests.model.importers.sources import noise, openai_clip


@pytest.fixture
def model() -> GLSCLForPreTraining:
    train = TrainBlock(stages=[{"name": "s", "steps": 1, "mixture": {"x": 1}}])  # type: ignore[list-item]
    return build_model(ModelBlock.model_validate(MODEL), train, seed=1)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    config = model_config(ModelBlock.model_validate(MODEL))
    path = tmp_path / "files" / "clip.safetensors"
    path.parent.mkdir()
    state = noise(openai_clip(config, blocks=2, grid=4), torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _class_token(model: GLSCLForPreTraining) -> torch.Tensor:
    return model.glscl.vision_encoder.class_embedding.detach().clone()


def test_weights_are_found_by_path_url_or_beside_the_data(
    model: GLSCLForPreTraining, clip: Path, tmp_path: Path
) -> None:
    storage = open_storage(tmp_path)
    before = _class_token(model)
    seen = []
    for source in (str(clip), clip.as_uri(), "files/clip.safetensors", "clip.safetensors"):
        with torch.no_grad():
            model.glscl.vision_encoder.class_embedding.copy_(before)
        place = open_storage(clip.parent) if source == clip.name else storage
        load_weights(model, [source], place, tmp_path / "scratch", tell=False)
        seen.append(_class_token(model))
    assert not torch.equal(seen[0], before)
    assert all(torch.equal(values, seen[0]) for values in seen)


@pytest.mark.server
def test_weights_come_from_s3_too(
    model: GLSCLForPreTraining, clip: Path, tmp_path: Path, s3_server: S3Server
) -> None:
    url = s3_server.fresh("weights")
    storage = Storage(s3_server.config(url))
    storage.upload(clip, "clip.safetensors")
    before = _class_token(model)
    scratch = tmp_path / "scratch"
    load_weights(model, [f"{url}/clip.safetensors"], storage, scratch, tell=False)
    assert not torch.equal(_class_token(model), before)
    assert not scratch.exists()


def test_missing_and_strange_weights_are_told_in_a_line(model: GLSCLForPreTraining, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(UserError, match=r"^model\.weights: .*nowhere\.safetensors"):
        load_weights(model, ["nowhere.safetensors"], storage, tmp_path / "scratch", tell=False)
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(UserError, match=r"^model\.weights: .*notes\.txt"):
        load_weights(model, ["notes.txt"], storage, tmp_path / "scratch", tell=False)
