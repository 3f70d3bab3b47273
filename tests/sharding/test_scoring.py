"""Promises of scoring: batches, one number a sample, no number that is none, and weights that name the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from sharding.config import PrepareConfig
from sharding.errors import UserError
from sharding.filters.config import ScoreFilter
from sharding.filters.resolve import resolved
from sharding.media import Encoded, MediaInfo
from sharding.scoring import ScoredSample, Scoring, with_weights
from sharding.storage import open_storage

BATCHES: list[int] = []


class _ByLength:
    def __init__(self, faults: str) -> None:
        self.faults = faults

    def score(self, samples: Sequence[ScoredSample]) -> list[float]:
        BATCHES.append(len(samples))
        scores = [len(max(sample.captions, key=len)) / 3 for sample in samples]
        if self.faults == "nan":
            scores[-1] = float("nan")
        return scores[:-1] if self.faults == "short" else scores


@dataclass(frozen=True)
class _Factory:
    weights: str = "w1"
    faults: str = ""

    def __call__(self, block: ScoreFilter) -> _ByLength:
        return _ByLength(self.faults)


def _items(count: int, size: int = 10) -> list[tuple[Encoded, list[str]]]:
    return [(Encoded(bytes(size), "jpg", MediaInfo(1, 1)), ["x" * n, "x"]) for n in range(count)]


def _score(block: ScoreFilter, factory: _Factory, items):
    return list(Scoring(block, factory).scored(items, lambda item: item))


def test_samples_are_scored_in_batches_and_come_back_in_order():
    BATCHES.clear()
    items = _items(70)
    scored = _score(ScoreFilter(kind="score", batch=32), _Factory(), items)
    assert BATCHES == [32, 32, 6]
    assert [item for item, _ in scored] == items
    assert scored[4][1] == 1.3333


def test_large_media_wait_in_smaller_batches():
    BATCHES.clear()
    _score(ScoreFilter(kind="score"), _Factory(), _items(5, size=30 * 2**20))
    assert BATCHES == [3, 2]


@pytest.mark.parametrize("faults", ["nan", "short"])
def test_a_score_that_is_no_number_is_a_bug_and_raised(faults):
    with pytest.raises(RuntimeError, match="one finite number each"):
        _score(ScoreFilter(kind="score"), _Factory(faults=faults), _items(3))


def test_scores_outside_the_limits_object_and_those_at_them_do_not():
    scoring = Scoring(ScoreFilter(kind="score", min=0.2, max=0.4), _Factory())
    causes = [scoring.objection(score) for score in (0.1999, 0.2, 0.4, 0.4001)]
    assert causes == ["score-too-low", None, None, "score-too-high"]
    assert Scoring(ScoreFilter(kind="score"), _Factory()).objection(-9.0) is None


def test_the_weights_name_the_dataset_and_the_address_does_not(tmp_path):
    def digest(model: str, weights: str) -> str:
        values = {
            "source": {"kind": "folder", "path": "/x"},
            "modality": "image",
            "filters": [{"kind": "score", "scorer": "s", "model": model}],
        }
        config = PrepareConfig.model_validate(values)
        return resolved(config, open_storage(tmp_path), {"s": _Factory(weights)}).digest

    assert digest("/a", "w1") == digest("/b", "w1") != digest("/a", "w2")


def test_a_scorer_that_is_not_there_or_has_other_weights_is_a_user_error():
    block = ScoreFilter(kind="score", scorer="itc", weights="w2")
    with pytest.raises(UserError, match="no scorer 'itc'; none is handed in"):
        with_weights(block, {})
    with pytest.raises(UserError, match="no scorer 'itc'; there are other"):
        with_weights(block, {"other": _Factory()})
    with pytest.raises(UserError, match="weights w1, not w2"):
        with_weights(block, {"itc": _Factory()})
