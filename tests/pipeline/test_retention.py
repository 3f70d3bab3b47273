"""Retention never deletes what a resume or an evaluation still needs."""

from pipeline.training.checkpoints import Checkpoint
from pipeline.training.config import CheckpointBlock
from pipeline.training.retention import expendable


def checkpoint(step: int, *, stage_end: bool = False) -> Checkpoint:
    return Checkpoint(step, 0, f"checkpoints/step-{step:08d}", f"digest-{step}", {"stage_end": stage_end})


def steps(found: list[Checkpoint]) -> list[int]:
    return [c.step for c in found]


def test_keeps_the_newest_the_multiples_the_best_the_pinned_and_the_ends_of_stages() -> None:
    all_of_them = [checkpoint(step, stage_end=step == 50) for step in range(10, 101, 10)]
    rules = CheckpointBlock(keep_last=2, keep_every=40)
    gone = expendable(all_of_them, rules, pinned={20}, best=30)
    assert steps(gone) == [
        10,
        60,
        70,
    ]  # kept: 20 pinned, 30 best, 40 and 80 multiples, 50 stage end, 90 and 100 newest


def test_without_further_rules_only_the_newest_stay_whatever_the_order_given() -> None:
    all_of_them = [checkpoint(step) for step in (30, 10, 20)]
    assert steps(expendable(all_of_them, CheckpointBlock(keep_last=1), pinned=(), best=None)) == [10, 20]


def test_a_pinned_checkpoint_goes_once_its_evaluations_are_done() -> None:
    all_of_them = [checkpoint(10), checkpoint(20)]
    rules = CheckpointBlock(keep_last=1)
    assert steps(expendable(all_of_them, rules, pinned={10}, best=None)) == []
    assert steps(expendable(all_of_them, rules, pinned=set(), best=None)) == [10]


def test_a_checkpoint_written_on_leaving_displaces_no_other_and_goes_once_there_is_a_newer_one() -> None:
    regular = [checkpoint(10), checkpoint(20)]
    left = Checkpoint(25, 0, "checkpoints/step-00000025", "digest-25", {"stage_end": False, "interim": True})
    rules = CheckpointBlock(keep_last=2)
    assert steps(expendable([*regular, left], rules, pinned=(), best=None)) == []
    assert steps(expendable([*regular, left, checkpoint(30)], rules, pinned=(), best=None)) == [10, 25]
