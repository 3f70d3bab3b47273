"""The ``health`` block of the YAML: what a training does when something goes wrong."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.training.config import Block, Fraction

#: A collective gives up after so long (torch's default, which Ray keeps): everything must be told before.
COLLECTIVE_TIMEOUT_S = 1800


class SpikeBlock(Block):
    """When a step's total loss is a spike, and what is done: it is told (``warn``), the step is skipped (``skip``), or
    the run goes back to its newest checkpoint and leaves the batches around it out (``rollback``).
    """

    action: Literal["off", "warn", "skip", "rollback"] = "warn"
    sigmas: Annotated[float, Field(gt=0)] = Field(
        default=6.0, description="above the median of the window, in robust standard deviations"
    )
    window: Annotated[int, Field(ge=4)] = Field(
        default=128, description="earlier steps of the stage that a loss is compared with, by dataset"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=100, description="first steps of each stage, which are neither judged nor compared with"
    )
    least_rise: Fraction = Field(
        default=0.05,
        description="share of the median; what rises less is no spike, however small the scatter",
    )
    skip_before: Annotated[int, Field(ge=0)] = Field(
        default=8, description="rollback: so many steps before the spike are left out with it"
    )
    max_rollbacks: Annotated[int, Field(ge=1)] = Field(default=3, description="of a run; one more ends it")


class HealthBlock(Block):
    """Skipped steps, loss spikes, hangs and stragglers."""

    max_consecutive_skips: Annotated[int, Field(ge=0)] = Field(
        default=5, description="steps in a row without an update; one more ends the run (0: the first does)"
    )
    max_skipped_share: Fraction = Field(
        default=0.02, description="of the last skip_window steps; more ends the run"
    )
    skip_window: Annotated[int, Field(ge=1)] = 500
    spikes: SpikeBlock = SpikeBlock()
    hang_s: Annotated[float, Field(gt=0)] | None = Field(
        default=600.0, description="without progress in a step; null: no watchdog"
    )
    long_phase_s: Annotated[float, Field(gt=0, le=COLLECTIVE_TIMEOUT_S - 60)] = Field(
        default=1500.0,
        description="the same for what may take long: the start, the first step of a stage (compiling), a checkpoint",
    )
    on_hang: Literal["report", "restart"] = Field(
        default="restart",
        description="restart: the worker that hangs is killed; its death counts among train.max_failures",
    )
    straggler_ratio: Annotated[float, Field(gt=1)] = Field(
        default=1.5, description="to the median of all workers; whoever is mostly slower is named"
    )
    straggler_window: Annotated[int, Field(ge=1)] = Field(default=100, description="steps")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.spikes.action == "skip" and self.max_consecutive_skips == 0:
            raise ValueError(
                "health.max_consecutive_skips: 0 ends the run at the first skip; "
                "health.spikes.action skip needs 1 or more"
            )
        if self.hang_s is not None and self.hang_s > self.long_phase_s:
            raise ValueError(
                f"health.long_phase_s: got {self.long_phase_s:g}; must be at least health.hang_s {self.hang_s:g}"
            )
        return self
