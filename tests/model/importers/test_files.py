"""Weight files: every format gives the same tensors, and none of them can run anything."""

from __future__ import annotations

import argparse
import json
import os
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model import WeightImportError, import_weights
from model.importers.files import read_weights
from tests.model.importers import sources
from tests.model.small import small_config, small_model


def _clip() -> dict[str, Tensor]:
    return sources.noise(sources.openai_clip(small_config(), blocks=2, grid=4), torch.float16)


def _same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    equal = (got[n].dtype == want[n].dtype and torch.equal(got[n], want[n]) for n in want)
    return set(got) == set(want) and all(equal)


class _Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _save_script(state: dict[str, Tensor], path: Path, traced: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = sources.tree(state)
        script = torch.jit.trace(module, torch.zeros(1)) if traced else torch.jit.script(module)
        torch.jit.save(script, path)


@pytest.mark.parametrize("traced", [True, False])
def test_a_torchscript_archive_gives_its_parameters_without_its_code(tmp_path: Path, traced: bool) -> None:
    """OpenAI publishes CLIP as TorchScript; the archive's code could do anything."""
    state = _clip()
    numbers = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(7)}
    _save_script(state | numbers, tmp_path / "ViT.pt", traced)
    with zipfile.ZipFile(tmp_path / "ViT.pt") as archive:
        code = [name for name in archive.namelist() if "/code/" in name]
    assert code
    with zipfile.ZipFile(tmp_path / "ViT.pt") as old, zipfile.ZipFile(tmp_path / "broken.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"not Python" if name in code else old.read(name))
    for name in ("ViT.pt", "broken.pt"):
        assert _same(read_weights(tmp_path / name).tensors, state | numbers)
    from_file, from_mapping = small_model(small_config()), small_model(small_config())
    report = import_weights(from_file, tmp_path / "ViT.pt")
    import_weights(from_mapping, state)
    assert report.kind == "openai_clip"
    assert report.ignored["context_length"] == "a number that describes the model"
    pairs = zip(from_file.parameters(), from_mapping.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_saved_tensors_come_back_bit_equal_with_views_and_parameters(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    whole = (4 * torch.randn(6, 4)).to(dtype)
    state = OrderedDict(whole=whole, turned=whole.T, part=whole[2:4, 1:], one=whole[0, 0], none=whole[:0])
    if dtype.is_floating_point:
        state["parameter"] = nn.Parameter(whole)
    torch.save(state, tmp_path / "weights.pt")
    assert _same(read_weights(tmp_path / "weights.pt").tensors, state)


def test_every_format_gives_the_same_tensors(tmp_path: Path) -> None:
    state = _clip()
    save_file(state, tmp_path / "one.safetensors")
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(nn.ParameterDict({"a": torch.ones(1)}).state_dict(), tmp_path / "dict.bin")
    half = len(state) // 2
    shards = {
        f"part-{i}.safetensors": dict(list(state.items())[i * half : (i + 1) * half + i]) for i in (0, 1)
    }
    (tmp_path / "shards").mkdir()
    for shard, part in shards.items():
        save_file(part, tmp_path / "shards" / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    for folder, name, origin in (
        ("a", "model.safetensors", "one.safetensors"),
        ("b", "pytorch_model.bin", "old.pt"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes((tmp_path / origin).read_bytes())
    for place in (
        "one.safetensors",
        "new.pt",
        "old.pt",
        "shards",
        "shards/model.safetensors.index.json",
        "a",
        "b",
    ):
        assert _same(read_weights(tmp_path / place).tensors, state), place
    assert list(read_weights(tmp_path / "dict.bin").tensors) == ["a"]


@pytest.mark.parametrize("section", ["state_dict", "model"])
def test_a_training_checkpoint_gives_its_weights_and_runs_nothing(tmp_path: Path, section: str) -> None:
    """What Lightning saves: optimizer states, hyper-parameters of any class, callbacks by class."""
    state, trap = _clip(), tmp_path / "sprung"
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        section: state,
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": argparse.Namespace(
            lr=1e-5, where=Path("x"), names={"a", "b"}, fixed=frozenset("ab")
        ),
        "callbacks": {_Trap: {"best": torch.tensor(1.0)}, "trap": _Trap(trap)},
    }
    for protocol in (2, 4):
        torch.save(checkpoint, tmp_path / "last.ckpt", pickle_protocol=protocol)
        assert _same(read_weights(tmp_path / "last.ckpt").tensors, state)
    assert not trap.exists()
    # The trap is a real one.
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert trap.exists()


def test_an_object_among_the_weights_is_named_and_not_made(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({**_clip(), "visual.extra": _Trap(trap)}, tmp_path / "weights.pt")
    report = import_weights(small_model(small_config()), tmp_path / "weights.pt")
    made_by = f"{os.mkdir.__module__}.mkdir"
    assert report.ignored["visual.extra"] == f"no tensor but {made_by}"
    state = _clip()
    del state["visual.ln_pre.weight"]
    torch.save({**state, "visual.ln_pre.weight": _Trap(trap)}, tmp_path / "weights.pt")
    with pytest.raises(WeightImportError) as caught:
        import_weights(small_model(small_config()), tmp_path / "weights.pt")
    assert caught.value.missing == ("visual.ln_pre.weight",)
    assert not trap.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(WeightImportError, match=r"object of torch.nn.modules.linear.Linear.*state_dict\(\)"):
        read_weights(tmp_path / "module.pt")


def test_the_old_torch_format_with_objects_is_refused_unopened(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    checkpoint = {"state_dict": _clip(), "trap": _Trap(trap)}
    torch.save(checkpoint, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightImportError, match=r"holds more than weights.*save its state_dict\(\)"):
        read_weights(tmp_path / "old.ckpt")
    assert not trap.exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "bad.safetensors").write_text("hello")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "text.pt": "neither a safetensors file nor one that torch wrote",
        "bad.safetensors": "is damaged",
        "other.zip": "none that torch wrote",
        "list.pt": "holds list where a mapping of names to tensors is due",
        "empty.pt": "has no tensor among epoch",
        "folder": "has none of model.safetensors",
        "absent.pt": "there is no file",
    }.items():
        with pytest.raises(WeightImportError, match=message):
            read_weights(tmp_path / name)


def _rewritten(source: Path, target: Path, change: dict[str, bytes | None]) -> None:
    """The archive with members replaced (or left out, None) by the end of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = next((v for end, v in change.items() if name.endswith(end)), old.read(name))
            if data is not None:
                new.writestr(name, data)


@pytest.mark.parametrize("bomb", ["data.pkl", "data/0"])
def test_an_archive_that_would_unfold_is_refused(tmp_path: Path, bomb: str) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as old,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new,
    ):
        for entry in old.infolist():
            way = zipfile.ZIP_DEFLATED if entry.filename.endswith(f"/{bomb}") else zipfile.ZIP_STORED
            new.writestr(entry.filename, old.read(entry), compress_type=way)
    with pytest.raises(WeightImportError, match=f"bomb.pt: .*/{bomb} is compressed"):
        read_weights(tmp_path / "bomb.pt")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(6.0)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    changes: dict[str, dict[str, bytes | None]] = {
        "too few bytes": {"/data/0": b"\0" * 20},
        "too many bytes": {"/data/0": b"\0" * 28},
        "no storage": {"/data/0": None},
        "reaches beyond": {"data.pkl": pickled.replace(b"K\x06\x85", b"K\x07\x85")},
        "cut short": {"data.pkl": pickled[:40]},
        "unknown opcode": {"data.pkl": b"\x80\x02\x82\x01."},
        "empty stack": {"data.pkl": b"\x80\x02R."},
    }
    for what, change in changes.items():
        _rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", change)
        with pytest.raises(WeightImportError, match="is damaged"):
            pytest.fail(f"{what}: {read_weights(tmp_path / 'bad.pt')}")
    _rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", {"byteorder": b"big"})
    with pytest.raises(WeightImportError, match="big-endian"):
        read_weights(tmp_path / "bad.pt")


def test_a_pickle_with_any_byte_changed_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    content = {"state_dict": OrderedDict(a=torch.arange(6.0), b=torch.ones(2, 3).T), "names": {"x", (1, 2.5)}}
    torch.save(content, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in range(len(pickled)):
        byte = int(torch.randint(0, 256, (), generator=generator))
        changed = pickled[:place] + bytes([byte]) + pickled[place + 1 :]
        _rewritten(tmp_path / "good.pt", tmp_path / "bad.pt", {"data.pkl": changed})
        try:
            read_weights(tmp_path / "bad.pt")
        except WeightImportError:
            refused += 1
    assert refused > len(pickled) / 10


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"a": "../up.safetensors"}, "only safetensors beside it are read"),
        ({"a": "x.bin"}, "only safetensors beside it are read"),
        ({"a": "absent.safetensors"}, "which is not beside it"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "missing: b"),
    ],
)
def test_an_index_is_followed_to_shards_beside_it_only(
    tmp_path: Path, table: dict[str, str], message: str
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(WeightImportError, match=message):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightImportError, match="no index of shards"):
        read_weights(tmp_path)
