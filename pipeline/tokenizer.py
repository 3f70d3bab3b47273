"""Whether a job's tokenizer is there and fits its model, before anything is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sharding.errors import UserError

if TYPE_CHECKING:
    from pipeline.config import JobConfig


def check_tokenizer(job: JobConfig, *, fetch: bool) -> None:
    """Load ``model.tokenizer`` as the workers will.

    Args:
        fetch: also one that may have to be fetched from Hugging Face's hub; else only what is on this machine.

    Raises:
        UserError: it cannot be loaded, or its vocabulary is not the model's.
    """
    from model import GLSCLConfig, GLSCLProcessor, TokenizerError

    name = job.model.tokenizer
    if not fetch and name != "builtin" and not Path(name).exists() and not name.startswith(("/", ".", "~")):
        return
    try:
        GLSCLProcessor.from_config(GLSCLConfig.preset(job.model.preset, **job.model.overrides), name)
    except TokenizerError as error:
        raise UserError(f"model.tokenizer: {error}") from None
