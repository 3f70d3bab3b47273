"""The report of a run that goes on: written again when there is news, not too often, whole at the end."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.evaluation.ledger import Ledger
from pipeline.evaluation.report import LiveReport, text_report
from pipeline.evaluation.report import live as live_report
from pipeline.evaluation.report.live import PAGE
from pipeline.evaluation.result import Example, TaskResult
from pipeline.tracking import EvaluationEntry, RunHandle, Tracker
from sharding.errors import StorageFault
from sharding.storage import Storage, open_storage
from tests.pipeline.report_run import emoji, jpeg, named


class Told:
    """Stands for the tracker: notes what it is told."""

    def __init__(self) -> None:
        self.entries: list[EvaluationEntry] = []
        self.reports: list[tuple[str, str]] = []
        self.handle = RunHandle("key", "abc", "7", "http://mlflow:5000")

    def evaluation(self, entry: EvaluationEntry) -> None:
        self.entries.append(entry)

    def report(self, html: str, text: str) -> None:
        self.reports.append((html, text))


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage").at("runs/one")


def live(run: Storage, told: Told, **options: Any) -> LiveReport:
    return LiveReport(run, "one", cast("Tracker", told), **options)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_outcome_reaches_mlflow_with_the_address_of_the_page_and_the_page_while_the_run_goes_on(
    run: Storage,
) -> None:
    told = Told()
    report = live(run, told, least_s=0.05)
    report.start(lambda: 3)
    try:
        first = named(100, "classes", "classification", 0.4)
        report.add(first)
        wait_for(lambda: told.reports)
        page = run.read_bytes(PAGE).decode()
        assert "40.0" in page
        assert "3 not finished yet" in page
        assert "http://mlflow:5000/#/experiments/7/runs/abc" in page
        second = named(200, "classes", "classification", 0.5)
        report.add(second)
        wait_for(lambda: len(told.reports) > 1)
        assert "50.0" in run.read_bytes(PAGE).decode()
    finally:
        report.stop()
    assert told.entries[0].metrics == first.metrics
    assert told.entries[0].tags["report"] == report.address == run.url_of(PAGE)
    assert told.reports[-1][1] == text_report([first, second])


def test_pages_are_rare_and_the_last_one_is_whole(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_report, "_GATHER_S", 0.0)
    told = Told()
    report = live(run, told, least_s=1000.0)
    outcomes = [named(step, "classes", "classification", step / 1000) for step in range(100, 900, 100)]
    report.start(lambda: 0)
    report.add(outcomes[0])
    wait_for(lambda: told.reports)
    for one in outcomes[1:]:
        report.add(one)
    time.sleep(0.5)  # for the page that must not come
    report.stop()  # at once, although the next page would be due much later
    assert len(told.reports) == 1
    report.write()
    assert report.outcomes() == outcomes
    assert told.reports[-1][1] == text_report(outcomes)


def test_without_an_outcome_nothing_is_written(run: Storage) -> None:
    told = Told()
    report = live(run, told)
    report.write()
    assert not run.exists(PAGE)
    assert told.reports == []


def test_examples_come_from_the_ledger_and_damaged_ones_leave_the_rest(
    run: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, told = Ledger(run), Told()
    report = live(run, told)
    for task in ("good", "damaged"):
        example = Example(f"question of {task}", False, [(jpeg(emoji(1)[0]), "a picture")])
        found = replace(named(100, task, "classification", 0.4))
        result = TaskResult([], examples=[example], files={"server.json": b"[]"})
        report.add(ledger.finish(found, result))
        if task == "damaged":
            path = ledger.file_path(found, "examples.json")
            run.write_bytes(path, run.read_bytes(path) + b" ")
    report.write()
    report.write()
    page = run.read_bytes(PAGE).decode()
    assert "question of good" in page
    (address,) = re.findall(r"<code>([^<]*/good-[^<]*/server.json)</code>", page)
    assert run.read_bytes(address.removeprefix(run.url + "/")) == b"[]"
    assert "question of damaged" not in page
    assert page.count("<h2>damaged") == 1
    assert len([r for r in caplog.records if "lacks examples" in r.getMessage()]) == 1


def test_a_storage_that_is_away_delays_the_page_and_ends_nothing(
    run: Storage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, faults = Told(), SimpleNamespace(left=2)
    write = run.write_bytes

    def write_later(path: str, data: bytes) -> None:
        if faults.left:
            faults.left -= 1
            raise StorageFault("away")
        write(path, data)

    monkeypatch.setattr(run, "write_bytes", write_later)
    report = live(run, told, least_s=0.01)
    report.start(lambda: 0)
    report.add(named(100, "classes", "classification", 0.4))
    wait_for(lambda: told.reports)
    report.stop()
    assert caplog.text.count("could not be written") == 2
    assert run.exists(PAGE)
    faults.left = 1
    with pytest.raises(StorageFault):
        report.write()
