"""What went wrong in a step, kept with the run: a file for each, ``health/step-00000012-non-finite-loss.json``.

A step that is done again after a restart goes wrong again in the same way and writes the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.patience import patiently
from sharding.storage import Storage

Kind = Literal["non-finite-loss", "non-finite-gradient", "loss-spike"]
FOLDER = "health"
_SHOWN = 20  # keys in a message


@dataclass(frozen=True)
class Event:
    """A step's fault.

    Attributes:
        step: from 1, as in MLflow.
        losses: by objective, mean of the workers; JSON has no NaN: None where it is not finite.
        keys: of the samples of the global batch.
    """

    kind: Kind
    step: int
    stage: str
    dataset: str
    losses: Mapping[str, float | None]
    keys: Sequence[str]

    @property
    def path(self) -> str:
        """Relative to the run's folder."""
        return f"{FOLDER}/step-{self.step:08d}-{self.kind}.json"

    def write(self, run: Storage, action: str, **more: Any) -> None:
        """Keep it with the run: what was done (skipped, told, rolled back, ended the run), and what else to say."""
        record = {**vars(self), **more, "action": action}
        patiently(lambda: run.write_json(self.path, record), "the record of a faulty step")

    def samples(self) -> str:
        """The samples, as many as a message bears."""
        shown = [key for key in self.keys if key][:_SHOWN]
        rest = sum(map(bool, self.keys)) - len(shown)
        return ", ".join(shown) + (f" and {rest} more (all in {self.path})" if rest else "")
