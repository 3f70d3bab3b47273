"""Each step judged before its weights are: updated, skipped, rolled back, or the end of the run.

Losses of all workers meet once a step, so that every worker comes to the same verdict. What the verdicts depend on
is in each checkpoint's record: a run gone on from it decides as it would have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.errors import LossSpike, NonFiniteLoss, RolledBack
from pipeline.training.health.config import HealthBlock
from pipeline.training.health.events import Event, Kind
from pipeline.training.health.spikes import Spike, SpikeWindow
from pipeline.training.health.stragglers import Stragglers
from pipeline.training.health.updates import drop_update, make_update, settle_loss_scale
from pipeline.training.health.windows import LeftOut, Window

if TYPE_CHECKING:
    from cluster.workers import WorkerContext
    from pipeline.training.config import Recipe
    from pipeline.training.consumption import ConsumptionRecorder
    from pipeline.training.loading import TrainingBatch
    from sharding.storage import Storage

logger = logging.getLogger(__name__)

#: Under which the ledger masks the samples of a step that was left out after a rollback, or whose fp16 gradients
#: overflowed; those of other skipped steps are masked under the kind of their event.
ROLLED_BACK, LOSS_SCALING = "rolled-back", "loss-scaling"


class Monitor:
    """One worker's judge of steps.

    Args:
        run: the run's folder.
        consumption: told of steps that were not trained on.
        state: as :meth:`state` gave it for the checkpoint's record; None at the beginning.
        warn: tells the person at the driver; called on worker 0.
    """

    def __init__(
        self,
        config: HealthBlock,
        recipe: Recipe,
        engine: Any,
        context: WorkerContext,
        run: Storage,
        consumption: ConsumptionRecorder,
        state: Mapping[str, Any] | None,
        warn: Callable[[str], None],
    ) -> None:
        self._config, self._recipe, self._engine = config, recipe, engine
        self._context, self._run, self._consumption, self._warn = context, run, consumption, warn
        state = state or {"skipped": 0, "recent": [], "spikes": None}
        self._skipped = int(state["skipped"])
        self._recent: list[int] = list(state["recent"])  # skipped steps within the window
        self._spikes = SpikeWindow(config.spikes, state["spikes"])
        self._left_out = LeftOut(run, context)
        self._keys: list[str] = []
        self._dataset = ""
        self._stragglers = Stragglers(config, engine, context, self._tell)
        settle_loss_scale(engine)

    def state(self) -> dict[str, Any]:
        """For the record of a checkpoint, which is written while the training goes on: plain data, a copy."""
        return {"skipped": self._skipped, "recent": list(self._recent), "spikes": self._spikes.state()}

    def leaves_out(self, step: int) -> bool:
        """Whether nothing is to be computed in ``step`` (from 1): a rollback left it out."""
        return step in self._left_out

    def left_out(self, step: int) -> dict[str, float]:
        """To be called once the batches of such a step are noted; what is worth tracking."""
        self._consumption.leave_out(step, ROLLED_BACK)
        self._skipped += 1
        return {"health/skipped_steps": float(self._skipped)}

    def begin(self) -> None:
        """A step begins."""
        self._keys = []
        self._stragglers.begin()

    def saw(self, batch: TrainingBatch, waited: float) -> None:
        """Note a contrastive batch of the step at hand, and how many seconds it was waited for."""
        self._stragglers.waited(waited)
        self._keys += batch.keys
        self._dataset = batch.slots[0].dataset

    def finish(
        self, step: int, stage: str, losses: Mapping[str, float], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """The optimizer step of a whole global batch, made or not; returns what is worth tracking. Collective.

        Args:
            step: from 1.
            losses: of this worker by name, over the global batch.
            weights: of each in what is minimised.

        Raises:
            NonFiniteLoss, LossSpike: on every worker, when there were too many of them.
            RolledBack: on every worker; see ``windows``.
        """
        means, finite = self._of_all_workers(losses)
        keys = self._keys
        wrong = [name for name in means if not finite[name]]
        total = sum(weights[name] * means[name] for name in means)
        spike = None if wrong else self._spikes.judge(stage, self._dataset, total)
        if wrong:
            what = f"the loss of {', '.join(wrong)} is not finite"
            event = self._event("non-finite-loss", step, stage, means, keys)
            self._skip(event, what, objectives=wrong)
            drop_update(self._engine, self._recipe)
        elif spike is not None and self._config.spikes.action != "warn":
            event = self._event("loss-spike", step, stage, means, keys)
            if self._config.spikes.action == "rollback":
                self._roll_back(event, spike)
            self._skip(event, _in_words(spike), limit=spike.limit, median=spike.median)
            drop_update(self._engine, self._recipe)
        else:
            if spike is not None:
                event = self._event("loss-spike", step, stage, means, keys)
                self._keep(event, "told", limit=spike.limit, median=spike.median)
                self._tell(f"step {step}: {_in_words(spike)}; samples of the batch: {event.samples()}")
            self._update(step, stage, means, keys, total)
        return {"health/skipped_steps": float(self._skipped), **self._stragglers.metrics()}

    def _update(
        self, step: int, stage: str, means: Mapping[str, float], keys: list[str], total: float
    ) -> None:
        update = make_update(self._engine, self._recipe)
        if update == "made":
            self._spikes.add(self._dataset, total)
        elif update == "scaled-down":
            self._consumption.leave_out(step, LOSS_SCALING)
        else:
            event = self._event("non-finite-gradient", step, stage, means, keys)
            self._skip(event, "the gradient is not finite")

    def _of_all_workers(self, losses: Mapping[str, float]) -> tuple[dict[str, float], dict[str, bool]]:
        """The losses' means over the workers, and whether each is finite on all of them. Collective.

        The seconds that tell of stragglers travel along.
        """
        names = sorted(losses)
        mine = [*(losses[name] for name in names), *self._stragglers.own()]
        device = self._context.device
        rows = torch.empty(self._context.world_size, len(mine), dtype=torch.float64, device=device)
        row = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_gather(list(rows.unbind()), row)
        everywhere = rows.tolist()
        self._stragglers.update([found[len(names) :] for found in everywhere])
        columns = {name: [found[number] for found in everywhere] for number, name in enumerate(names)}
        means = {name: sum(column) / len(column) for name, column in columns.items()}
        return means, {name: all(map(math.isfinite, column)) for name, column in columns.items()}

    def _event(self, kind: Kind, step: int, stage: str, means: Mapping[str, float], keys: list[str]) -> Event:
        """With the samples of all workers. Collective."""
        parts: list[Any] = [None] * self._context.world_size
        dist.all_gather_object(parts, keys)
        losses = {name: loss if math.isfinite(loss) else None for name, loss in means.items()}
        everywhere = [key for part in parts for key in part]
        return Event(kind, step, stage, self._dataset, losses, everywhere)

    def _keep(self, event: Event, action: str, **more: Any) -> None:
        if self._context.rank == 0:
            event.write(self._run, action, **more)

    def _tell(self, message: str) -> None:
        if self._context.rank == 0:
            self._warn(message)

    def _skip(self, event: Event, what: str, **more: Any) -> None:
        """Count a step that is not made, and end the run where there were too many."""
        config, step = self._config, event.step
        self._skipped += 1
        self._recent = [one for one in self._recent if one > step - config.skip_window] + [step]
        in_a_row = _tail(self._recent)
        message = f"step {step}: {what}; samples of the batch: {event.samples()}"
        reason = ""
        if in_a_row > config.max_consecutive_skips:
            reason = f"{in_a_row} in a row, health.max_consecutive_skips is {config.max_consecutive_skips}"
        elif len(self._recent) > config.max_skipped_share * config.skip_window:
            reason = (
                f"{len(self._recent)} of the last {config.skip_window} steps, health.max_skipped_share is "
                f"{config.max_skipped_share:g}"
            )
        self._keep(event, "ended the run" if reason else "skipped", **more)
        if reason:
            kind = LossSpike if event.kind == "loss-spike" else NonFiniteLoss
            raise kind(message + f" (steps that went wrong: {reason})")
        self._consumption.leave_out(step, event.kind)
        self._tell(f"{message}; the step is skipped")

    def _roll_back(self, event: Event, spike: Spike) -> None:
        """Leave the batches up to the spike out and have all workers begin anew."""
        config, done = self._config.spikes, len(self._left_out.windows)
        message = f"step {event.step}: {_in_words(spike)}; samples of the batch: {event.samples()}"
        over = done >= config.max_rollbacks
        self._keep(event, "ended the run" if over else "rolled back", limit=spike.limit, median=spike.median)
        if over:
            raise LossSpike(
                f"{message} (the run went back {done} times, as often as health.spikes.max_rollbacks allows)"
            )
        window = Window(max(1, event.step - config.skip_before), event.step)
        self._left_out.add(window)
        text = (
            f"{message}; going back to the newest checkpoint, without steps {window.first} to {window.last}"
        )
        self._tell(text)
        raise RolledBack(text)


def _tail(steps: list[int]) -> int:
    """How many of ascending steps, from the last one back, follow each other."""
    return next(
        (back for back in range(1, len(steps)) if steps[-1 - back] != steps[-1] - back), max(1, len(steps))
    )


def _in_words(spike: Spike) -> str:
    return (
        f"the loss is {spike.loss:.4g}, above {spike.limit:.4g}; the median before it is {spike.median:.4g}"
    )
