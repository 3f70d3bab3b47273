"""Checkpoints in the run's storage: written in the background, committed last, verified before use.

Layout, below the run's folder::

    checkpoints/step-00000100-5f3a9c1e/
        model/config.json, model/model.safetensors     weights alone (fp32): evaluation, export
        state/worker-00000.safetensors, ...            each worker's own pieces of weights (fp32) and optimizer state
        parts/worker-00000.json, ...                   what each worker has uploaded
        commit.json                                    size and sha256 of each file, step, world size, what the
                                                       run was trained on so far (see ``consumption``), ...

A checkpoint exists when its commit record does. A folder without one is a write under way, or the remains of one
that was killed; each write has a folder of its own, so that remains never mix with what is written later.

A piece names its parameter and where in it (flattened) it lies: any number of workers, at any ZeRO stage, finds in
the pieces what it needs, whoever wrote them. Nothing is pickled. Learning rate, data order, masks and dropout are
functions of (seed, step), so that the step is all there is to restore besides weights and optimizer.

==============  ====================================================================
``record``      which checkpoints there are; listing, fetching, deleting. Light
``fragments``   files of pieces
``state``       the pieces of a DeepSpeed engine
``writer``      snapshot, upload in the background, commit
``resuming``    the newest good one into an engine
==============  ====================================================================
"""

from pipeline.training.checkpoints.record import (
    FOLDER,
    FORMAT,
    VERSION,
    Checkpoint,
    delete_checkpoint,
    fetch_files,
    fetch_model,
    list_checkpoints,
    record_digest,
    remains,
)

__all__ = [
    "FOLDER",
    "FORMAT",
    "VERSION",
    "Checkpoint",
    "delete_checkpoint",
    "fetch_files",
    "fetch_model",
    "list_checkpoints",
    "record_digest",
    "remains",
]
