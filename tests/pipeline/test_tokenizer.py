"""A tokenizer that does not fit the model, or is not there, is told before anything is prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.config import parse_job
from pipeline.job import run_job
from pipeline.tokenizer import check_tokenizer
from sharding.errors import UserError
from tests.fixtures.jobs import tiny_job

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    def call(tokenizer: str, **overrides: Any) -> str:
        tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
        tree["model"] = {
            "preset": "tiny",
            "tokenizer": tokenizer,
            "overrides": {**tree["model"]["overrides"], **overrides},
        }
        with pytest.raises(UserError) as caught:
            check_tokenizer(parse_job(tree, "job.yaml"), fetch=False)
        told = str(caught.value)
        assert told.startswith("model.tokenizer: ")
        assert len(told.splitlines()) == 1
        return told

    return call


def write_tokenizer(folder: Path, first: str = "<s>") -> str:
    names = ["<s>", "<pad>", "</s>", "<unk>", *"abcdef", "<mask>"]
    words = [first, *(name for name in names if name != first)]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, mask_token="<mask>", **specials).save_pretrained(folder)
    return str(folder)


def test_one_of_another_vocabulary_is_refused(tmp_path: Path, refused: Refused) -> None:
    fits, other = write_tokenizer(tmp_path / "fits"), write_tokenizer(tmp_path / "other", "<pad>")
    assert "has 11 tokens, but the model's vocab_size is 8192" in refused(fits)
    assert "has bos_token_id 1, but the model's is 0" in refused(other, vocab_size=11)
    tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
    tree["model"] = {"preset": "tiny", "tokenizer": fits, "overrides": {"vocab_size": 11}}
    check_tokenizer(parse_job(tree, "job.yaml"), fetch=False)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"model": {"type": "BPE"}}', "\0\1"])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, refused: Refused, content: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(content)
    assert f"no tokenizer under the folder '{tmp_path}'" in refused(str(tmp_path))


def test_a_folder_that_is_not_there_is_refused_and_a_name_is_not_asked_for(
    tmp_path: Path, refused: Refused
) -> None:
    for name in (f"{tmp_path}/none", "./none", "../none", "~/none"):
        assert "there is no such folder" in refused(name)
    tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
    tree["model"] = {"preset": "tiny", "tokenizer": "somebody/something"}
    check_tokenizer(parse_job(tree, "job.yaml"), fetch=False)


def test_the_shipped_one_has_as_many_tokens_as_it_has(refused: Refused) -> None:
    assert "at least 261 are needed" in refused("builtin", vocab_size=200)
    assert "has 50265 tokens, but the model's vocab_size is 60000" in refused("builtin", vocab_size=60_000)


def test_a_run_ends_before_anything_is_prepared(tmp_path: Path) -> None:
    tree = tiny_job(tmp_path / "raw", tmp_path / "storage")
    tree["model"] = {"preset": "tiny", "tokenizer": str(tmp_path / "none")}
    nothing: Any = None
    with pytest.raises(UserError, match=r"^model\.tokenizer: "):
        run_job(parse_job(tree, "job.yaml"), nothing)
    assert not (tmp_path / "storage").exists()
