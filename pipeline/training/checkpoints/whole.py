"""A checkpoint's pieces put together: whole parameters and moments, as plain safetensors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.training.checkpoints.fragments import WEIGHT, Pieces, Stretch
from pipeline.training.checkpoints.record import Checkpoint, fetch_files, files_below
from sharding.storage import Storage

_MOMENTS = ("exp_avg", "exp_avg_sq")


def write_whole(run: Storage, checkpoint: Checkpoint, out: Path) -> list[Path]:
    """Write ``weights.safetensors`` (fp32, as the optimizer keeps them), a file for each moment, ``state.json``.

    Tensors have the names and shapes of the model's parameters. Holds one kind of all parameters in memory.

    Raises:
        BadData: the checkpoint is not what was committed.
    """
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="glscl-whole-") as folder:
        names = [*files_below(checkpoint, "state"), "model/model.safetensors"]
        fetch_files(run, checkpoint, names, Path(folder))
        paths = [Path(folder, name) for name in names]
        with Pieces(paths[:-1]) as pieces, safe_open(paths[-1], framework="pt") as model:
            shapes = {name: model.get_slice(name).get_shape() for name in model.keys()}  # noqa: SIM118
            written = []
            for kind in (WEIGHT, *_MOMENTS):
                tensors = {
                    name: pieces.read(Stretch(name, 0, count), kind).reshape(shapes[name])
                    for name, count in pieces.parameters().items()
                }
                written.append(out / ("weights.safetensors" if kind == WEIGHT else f"{kind}.safetensors"))
                save_file(tensors, written[-1], metadata={"step": str(checkpoint.step)})
            updates = {
                name: pieces.updates(Stretch(name, 0, count)) for name, count in pieces.parameters().items()
            }
    state = {"step": checkpoint.step, "digest": checkpoint.digest, "updates": updates}
    written.append(out / "state.json")
    written[-1].write_text(json.dumps(state, indent=2), encoding="utf-8")
    return written
