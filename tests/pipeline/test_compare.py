"""Two checkpoints are compared on the same items, or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.evaluation.ledger import Ledger, Outcome
from pipeline.evaluation.result import Family, Measured, TaskResult
from pipeline.evaluation.statistics import bootstrap_intervals
from sharding.storage import Storage, open_storage

Glscl = Callable[..., tuple[int, str, str]]
ITEMS = 200


@pytest.fixture
def glscl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Glscl:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["glscl", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def make_run(folder: Path, name: str) -> Storage:
    run = open_storage(folder).at(f"runs/{name}")
    run.write_json("run.json", {"format": "glscl-run"})
    return run


def evaluated(run: Storage, step: int, share: float, task: str = "images", **options: Any) -> Outcome:
    """An evaluation in which so many of the items are right: of two shares, the lower one's are among the others."""
    right = (np.arange(ITEMS) < round(share * ITEMS)).astype(float)
    ranks = np.where(right == 1, 1.0, 100.0 + np.arange(ITEMS))
    metrics = {"R1": Measured(right), "median_rank": Measured(ranks, "median")}
    found = TaskResult([Family("t2i", [f"item-{n:04d}" for n in range(ITEMS)], metrics)], {"chance": 0.005})
    values: dict[str, Any] = {
        "checkpoint": {
            "path": f"checkpoints/step-{step:08d}",
            "digest": f"{step:02d}{run.url[-1].encode().hex()}" * 16,
            "step": step,
            "stage": 0,
        },
        "task": task,
        "version": "1-0123abcd",
        "dataset": {"name": "held-out", "digest": "cd" * 32},
        "started": 1.0,
        "finished": 2.0,
        "attempt": 1,
        "kind": "retrieval",
        "settings": {"limit": None, "resolution": 224},
        "seed": 7,
        "metrics": found.metrics,
        "intervals": bootstrap_intervals(found.families, seed=7, task=task),
        **options,
    }
    return Ledger(run).finish(Outcome(**values), found)


def verdicts(output: str) -> dict[str, dict[str, Any]]:
    (task,) = json.loads(output)["tasks"]
    return {line["metric"]: line for line in task["metrics"]}


def test_two_checkpoints_of_a_run_differ_by_what_their_items_say(tmp_path: Path, glscl: Glscl) -> None:
    run = make_run(tmp_path, "one")
    for step, share in ((10, 0.4), (20, 0.695), (30, 0.7)):
        evaluated(run, step, share)
    old, new = run.url_of("checkpoints/step-00000010"), run.url
    code, output, _ = glscl("compare", old, new, "--json")
    assert code == 0
    lines = verdicts(output)
    assert (lines["R1"]["a"], lines["R1"]["b"], lines["R1"]["items"]) == (0.4, 0.7, ITEMS)
    assert lines["R1"]["verdict"] == lines["median_rank"]["verdict"] == "better"
    assert lines["median_rank"]["difference"] < 0
    low, high = lines["R1"]["interval"]
    error = np.sqrt(0.3 * 0.7 / ITEMS)
    assert (low, high) == pytest.approx((0.3 - 1.96 * error, 0.3 + 1.96 * error), abs=0.02)
    assert verdicts(glscl("compare", new, old, "--json")[1])["R1"]["verdict"] == "worse"
    near = run.url_of("checkpoints/step-00000020")
    assert verdicts(glscl("compare", near, new, "--json")[1])["R1"]["verdict"] == "no difference shown"
    assert glscl("compare", old, new, "--json")[1] == output  # to the last digit
    table = glscl("compare", old, new)[1]
    assert "one, step 10" in table
    assert "better" in table
    assert "+0.3" in table


def test_runs_are_compared_by_their_newest_or_their_best(tmp_path: Path, glscl: Glscl) -> None:
    one, two = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    for run, shares in ((one, (0.6, 0.3)), (two, (0.35, 0.65))):
        for step, share in zip((10, 20), shares, strict=True):
            evaluated(run, step, share)
    newest = json.loads(glscl("compare", one.url, two.url, "--json")[1])
    assert (newest["a"]["step"], newest["b"]["step"]) == (20, 20)
    assert newest["tasks"][0]["metrics"][0]["difference"] == pytest.approx(0.35)
    best = json.loads(glscl("compare", one.url, two.url, "--json", "--best", "images/R1")[1])
    assert (best["a"]["step"], best["b"]["step"]) == (10, 20)
    assert best["a"]["run"] == one.url


def test_the_same_version_is_compared_where_both_have_it_and_else_the_settings_are_named(
    tmp_path: Path, glscl: Glscl
) -> None:
    one, two = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    evaluated(one, 10, 0.3)
    large = {"limit": None, "resolution": 384}
    evaluated(one, 10, 0.6, version="1-ffffffff", finished=3.0, settings=large)
    evaluated(two, 10, 0.3)
    assert verdicts(glscl("compare", one.url, two.url, "--json")[1])["R1"]["difference"] == 0
    evaluated(two, 20, 0.6, version="1-eeeeeeee", finished=4.0, settings=large | {"resolution": 448})
    assert "differs in resolution: A 384, B 448" in glscl("compare", one.url, two.url)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset": {"name": "other", "digest": "ef" * 32}},
            "measured on different data, held-out (cdcdcdcdcdcd)",
        ),
        ({"version": "2-0123abcd"}, "measured in different ways"),
        ({"kind": "vqa"}, "measured in different ways"),
        ({"version": "1-eeeeeeee", "settings": {"limit": 100}}, "limit is None and 100"),
    ],
)
def test_what_was_not_measured_alike_is_refused_in_one_line(
    tmp_path: Path, glscl: Glscl, options: dict[str, Any], message: str
) -> None:
    one, two = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    evaluated(one, 10, 0.3)
    evaluated(two, 10, 0.3, **options)
    code, output, error = glscl("compare", one.url, two.url)
    assert (code, output, len(error.splitlines())) == (2, "", 1)
    assert message in error
    # Another task is compared all the same.
    evaluated(one, 10, 0.3, task="clips")
    evaluated(two, 10, 0.4, task="clips")
    assert glscl("compare", one.url, two.url, "--task", "clips")[0] == 0


def test_what_is_not_there_is_named(tmp_path: Path, glscl: Glscl) -> None:
    one, two = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    evaluated(one, 10, 0.3)
    for arguments, message in (
        ((one.url, two.url), "b has none (glscl evaluate)"),
        ((one.url, tmp_path / "nowhere"), "nowhere"),
        ((one.url, one.url, "--task", "imagse"), "has no finished evaluation by imagse"),
        ((one.url_of("checkpoints/step-00000050"), one.url), "images at step 10"),
        ((one.url, one.url, "--best", "images/R2"), "did you mean 'images/R1'"),
        ((one.url_of("checkpoints/step-00000010"),) * 2 + ("--best", "images/R1"), "are single ones"),
    ):
        code, _, error = glscl("compare", *arguments)
        assert (code, len(error.splitlines())) == (2, 1)
        assert message in error
    evaluated(two, 10, 0.3, task="clips")
    assert "no task in common" in glscl("compare", one.url, two.url)[2]


def test_damaged_items_are_told_and_nothing_is_compared(tmp_path: Path, glscl: Glscl) -> None:
    run = make_run(tmp_path, "a")
    outcome = evaluated(run, 10, 0.3)
    path = Ledger(run).file_path(outcome, "items.parquet")
    run.write_bytes(path, run.read_bytes(path)[:-1])
    code, output, error = glscl("compare", run.url, run.url)
    assert (code, output) == (1, "")
    assert "items.parquet is not what the evaluation wrote" in error
