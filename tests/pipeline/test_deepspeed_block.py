"""DeepSpeed's configuration passes; what it does not know, or what would break a promise, is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import parse_job
from pipeline.training.config import Recipe, TrainBlock
from pipeline.training.deepspeed_block import OWNED, PASSED, REFUSED, REFUSED_VALUES, REMOVED, check_offload
from pipeline.training.engine import deepspeed_config
from sharding.errors import UserError
from tests.fixtures.jobs import tiny_job

ZERO = "train.deepspeed.zero_optimization"


def recipe(text: str, **options: Any) -> Recipe:
    return Recipe(deepspeed=yaml.safe_load(text), **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "zero_optimisation: {stage: 2}",
            "zero_optimisation: DeepSpeed knows no such key; did you mean 'zero_opt",
        ),
        (
            "zero_optimization: {stage: 2, overlap_com: true}",
            f"{ZERO}.overlap_com: .* did you mean 'overlap_comm'",
        ),
        (
            "zero_optimization: {stage: 2, offload_optimizer: {devic: cpu}}",
            "offload_optimizer.devic: .*'device'",
        ),
        (
            "zero_optimization: {stage: 2, overlap_comm: maybe}",
            "overlap_comm: got 'maybe'; must be a valid bool",
        ),
        (
            "zero_optimization: {stage: 2, reduce_bucket_size: 0}",
            "bucket_size: got 0; must be greater than 0",
        ),
        (
            "zero_optimization: {stage: 3, offload_param: {device: gpu}}",
            "got 'gpu'; must be 'none', 'cpu' or 'nvme",
        ),
        (
            "zero_optimization: {stage: 2, offload_param: {device: cpu}}",
            "offload_param needs stage 3; got stage 2",
        ),
        ("zero_optimization: {offload_optimizer: {device: cpu}}", "offload_optimizer needs stage 1 or more"),
        ("zero_optimization: true", f"{ZERO}: got True; must be a block of keys"),
        ("zero_optimization: {stage: 1, ignore_unused_parameters: false}", "parameters come and go"),
        (
            "zero_optimization: {stage: 1, zenflow: {topk_ratio: 0.1}}",
            "zenflow cannot be used: its updates lag",
        ),
        ("flops_profiler: {enable: true}", "flops_profiler.enable: .*did you mean 'enabled'"),
        ("communication_data_type: fp8", "DeepSpeed refuses it: Invalid communication_data_type"),
        ("fp16: {enabled: true}", r"fp16\.enabled is decided by train\.precision: set it there"),
        ("fp16: {hysteresis: 3}", r"fp16: has no effect with train\.precision fp32"),
        ("activation_checkpointing: {}", r"is decided by train\.activation_checkpointing"),
        ("data_efficiency: {enabled: true}", "data_efficiency cannot be used: the order of data"),
        ("pipeline: {stages: 2}", "pipeline cannot be used: GLSCL is not cut up"),
        ("hybrid_engine: {enabled: true}", "hybrid_engine cannot be used: it is for generating"),
        ("sparse_gradients: true", "sparse_gradients: DeepSpeed does not have it any more"),
        ("comet: {api_key: hunter2}", "the configuration is recorded"),
        ("zero_force_ds_cpu_optimizer: true", "the optimizer is torch's AdamW"),
        ("checkpoint: {load_universal: true}", "is decided by the checkpoints block"),
    ],
)
def test_what_cannot_pass_is_refused_with_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        recipe(text)
    assert "hunter2" not in str(caught.value.errors()[0]["msg"])  # type: ignore[attr-defined]


def test_every_key_that_the_installed_deepspeed_reads_is_in_the_tables() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    asked: set[str] = set()

    class Asked(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

        def __copy__(self) -> Asked:
            return Asked(self)

    DeepSpeedConfig(Asked(train_micro_batch_size_per_gpu=1))
    assert len(asked) > 50
    known = {*PASSED, *REMOVED, *(name for name in (*OWNED, *REFUSED) if "." not in name)}
    assert asked - known == set()
    assert known - asked == set()
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) == REMOVED


def test_the_keys_of_blocks_that_are_decided_or_refused_are_deepspeeds() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    checked = 0
    for name in (*OWNED, *REFUSED, *REFUSED_VALUES):
        block, _, key = name.partition(".")
        if block in models and "." not in key:
            assert key in models[block].model_fields, name
            checked += 1
    assert checked >= 10


def test_keys_of_a_precision_pass_and_the_precision_stays_the_recipes() -> None:
    stages = [{"name": "s", "steps": 1, "mixture": {"x": 1}}]

    def passed(precision: str, block: dict[str, Any]) -> dict[str, Any]:
        deepspeed = {"zero_optimization": {"stage": 1}, **block}
        train = TrainBlock.model_validate({"stages": stages, "precision": precision, "deepspeed": deepspeed})
        return deepspeed_config(train)

    scaling = {"initial_scale_power": 8, "loss_scale_window": 100, "hysteresis": 1, "min_loss_scale": 2}
    assert passed("fp16", {"fp16": scaling})["fp16"] == {**scaling, "enabled": True}
    assert passed("bf16", {"bf16": {"check_grad_overflow": False}})["bf16"]["check_grad_overflow"] is False
    modules = {"lower_precision_safe_modules": ["torch.nn.Linear"]}
    assert passed("bf16-autocast", {"torch_autocast": modules})["torch_autocast"] == {
        **{"enabled": True, "dtype": "bfloat16"},
        **modules,
    }
    with pytest.raises(ValueError, match=r"min_loss_scale must be > 0"):
        passed("fp16", {"fp16": {"min_loss_scale": 0}})


def test_fp16_is_refused_where_workers_have_no_gpu(tmp_path: Path) -> None:
    tree = tiny_job(tmp_path, tmp_path / "storage")
    tree["train"]["precision"] = "fp16"
    with pytest.raises(UserError, match=r"train\.precision: DeepSpeed does not train in fp16 on CPUs"):
        parse_job(tree, "job.yaml")
    tree["cluster"] = {"worker": {"gpus": 1}}
    assert parse_job(tree, "job.yaml").train.precision == "fp16"


def test_nvme_that_cannot_work_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops import op_builder

    def block(path: Path | None) -> dict[str, Any]:
        place = {} if path is None else {"nvme_path": str(path)}
        return {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", **place}}}

    check_offload({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "train")
    with pytest.raises(UserError, match=r"offload_param: device nvme needs nvme_path"):
        check_offload(block(None), "train")
    with pytest.raises(UserError, match=r"nowhere is no folder that can be written"):
        check_offload(block(tmp_path / "nowhere"), "train")
    monkeypatch.setattr(op_builder.AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    with pytest.raises(UserError, match=r"async_io, which cannot be built .*libaio"):
        check_offload(block(tmp_path), "train")
    monkeypatch.setattr(op_builder.AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    check_offload(block(tmp_path), "train")
