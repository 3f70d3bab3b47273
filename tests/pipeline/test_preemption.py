"""Workers leave together, at a step's end, once their checkpoint is committed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from cluster.notice import Leaving, Notice, Reason
from cluster.workers import WorkerContext
from pipeline.training.checkpoints.writer import CheckpointWriter
from pipeline.training.preemption import Preemption


class Writer:
    """Stands for the checkpoint under way: notes that it was waited for."""

    waited = 0

    def wait(self) -> None:
        self.waited += 1


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def context(notice: Notice) -> WorkerContext:
    return WorkerContext(0, 1, 0, 1, 0, torch.device("cpu"), notice)


def test_nobody_leaves_before_it_was_agreed_on_and_the_checkpoint_was_waited_for(alone: None) -> None:
    notice, writer = Notice(), Writer()
    preemption = Preemption(context(notice))
    assert notice.attended, "from now on SIGTERM is a notice"
    assert not preemption.agree()
    notice.tell(Reason.MACHINE)  # while something else is done: a checkpoint is written, the loader starts
    preemption.leave(cast(Any, writer))
    assert writer.waited == 0
    assert preemption.agree()
    with pytest.raises(Leaving) as caught:
        preemption.leave(cast(CheckpointWriter, writer))
    assert (caught.value.reason, writer.waited) == (Reason.MACHINE, 1)


def test_the_drivers_end_counts_for_more_than_a_machines_whichever_comes_first(alone: None) -> None:
    for order in ((Reason.MACHINE, Reason.DRIVER), (Reason.DRIVER, Reason.MACHINE)):
        notice = Notice()
        preemption = Preemption(context(notice))
        for reason in order:
            notice.tell(reason)
        preemption.agree()
        assert preemption.agreed is Reason.DRIVER


def test_a_drained_node_is_a_reason_too(alone: None) -> None:
    preemption = Preemption(context(Notice(drained=lambda: True)))
    preemption.agree()
    assert preemption.agreed is Reason.MACHINE
