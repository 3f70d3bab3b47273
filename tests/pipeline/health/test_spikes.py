"""What is a spike: far above the steps before, robustly, by dataset, the same after a restart."""

from __future__ import annotations

import json

import numpy as np

from pipeline.training.health.config import SpikeBlock
from pipeline.training.health.spikes import SpikeWindow, limit_of

CONFIG = SpikeBlock(action="skip", window=32, warmup=10, least_rise=0.05)


def _losses(seed: int, number: int, level: float = 4.0, scatter: float = 0.1) -> list[float]:
    draws = np.random.default_rng(seed).normal(level, scatter, number)
    return [float(loss) for loss in draws]


def _fed(losses: list[float], window: SpikeWindow, dataset: str = "images") -> SpikeWindow:
    for loss in losses:
        if window.judge("first", dataset, loss) is None:
            window.add(dataset, loss)
    return window


def test_the_limit_is_the_median_and_six_deviations_and_spikes_among_them_hardly_move_it() -> None:
    losses = _losses(1, 400)
    limit, median = limit_of(losses, CONFIG)
    assert abs(median - 4.0) < 0.02
    assert abs(limit - 4.6) < 0.1
    assert abs(limit_of([*losses, *[1e6] * 20], CONFIG)[0] - limit) < 0.1


def test_steps_of_a_falling_loss_are_no_spikes_and_one_far_above_is() -> None:
    falling = [loss + 8.0 * 0.97**number for number, loss in enumerate(_losses(2, 200))]
    window = SpikeWindow(CONFIG, None)
    for loss in falling:
        assert window.judge("first", "images", loss) is None
        window.add("images", loss)
    assert window.judge("first", "images", 4.4) is None
    spike = window.judge("first", "images", 5.5)
    assert spike is not None
    assert spike.limit < 5.5


def test_however_small_the_scatter_a_rise_below_the_least_is_no_spike() -> None:
    window = _fed([2.0] * 50, SpikeWindow(CONFIG, None))
    assert window.judge("first", "images", 2.09) is None
    assert window.judge("first", "images", 2.11) is not None


def test_warm_up_and_a_new_stage_begin_with_an_empty_window_and_datasets_have_their_own() -> None:
    window = SpikeWindow(CONFIG, None)
    _fed([1e4] * CONFIG.warmup, window)
    assert window.state()["losses"] == {}
    _fed(_losses(3, CONFIG.window), window)
    assert window.judge("first", "clips", 40.0) is None
    assert window.judge("first", "images", 40.0) is not None
    assert window.judge("second", "images", 40.0) is None
    assert window.state() == {"stage": "second", "steps": 1, "losses": {}}


def test_a_window_gone_on_from_a_checkpoint_s_record_finds_the_same_limit() -> None:
    window = _fed(_losses(4, 100), SpikeWindow(CONFIG, None))
    again = SpikeWindow(CONFIG, json.loads(json.dumps(window.state())))
    assert again.judge("first", "images", 9.0) == window.judge("first", "images", 9.0) is not None
    assert again.state() == window.state()


def test_switched_off_it_keeps_and_finds_nothing() -> None:
    window = _fed(_losses(5, 100), SpikeWindow(SpikeBlock(action="off", warmup=0, window=4), None))
    assert window.judge("first", "images", 1e9) is None
    assert window.state()["losses"] == {}
