"""The report shows every checkpoint, number, failure and example, on a terminal, in a log and as a page."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report import html_report, print_report, text_report
from pipeline.evaluation.report.examples import fair_shares
from pipeline.evaluation.report.headlines import KINDS
from pipeline.evaluation.result import Example
from tests.pipeline.report_run import STEPS, emoji, examples, jpeg, named, outcome, retrieval, whole_run

EVIL = "</b><script>alert(1)</script><img src='http://evil' onerror=\"x()\"/> & \u202e\x00"
Element = ElementTree.Element


def body_of(page: str) -> Element:
    """The page's body; parsed as XML, so it is well-formed too."""
    return ElementTree.fromstring(page[page.index("<body>") : page.index("</html>")])


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def section(root: Element, task: str) -> Element:
    return next(one for one in root.iter("section") if text_of(one[0]).split()[0] == task)


def table_rows(table: Element) -> list[list[str]]:
    return [[text_of(cell) for cell in row] for row in table.findall("tbody/tr")]


def numbers(cell: str) -> list[float]:
    """A value and, where there are any, the bounds of its interval."""
    return [float(number.replace(",", "")) for number in re.findall(r"-?[\d.,]*\d", cell)]


def expected(one: Outcome, metric: str, factor: float) -> list[float]:
    return [factor * value for value in (one.metrics[metric], *one.intervals.get(metric, ()))]


# Text.


def test_text_has_a_line_for_each_evaluation_by_task_and_step_with_half_intervals_and_chance() -> None:
    lines = text_report(
        [retrieval(step, "images", step / 1000, 250, 0.04) for step in (400, 100)]
    ).splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines]
    assert rows[2] == ["task", "step", "stage", "R@1", "R@10", "ITM R@1", "R@1", "R@10", "ITM R@1"]
    assert rows[3][:5] == ["images", "100", "0", "3.3 ±4.2", "10.0 ±4.5"]
    assert rows[4][:5] == ["images", "400", "1", "13.3 ±4.5", "40.0 ±4.5"]
    assert rows[5] == ["images", "chance", "0.4", "4.0", "0.4", "0.4", "4.0", "0.4"]
    assert lines[1].index("text → vision") < lines[1].index("vision → text")
    assert len({len(line) for line in lines[3:6]}) == 1  # columns are aligned at their right ends
    assert text_report([]) == "no evaluations\n"


def test_text_shows_all_kinds_unknown_ones_too_within_100_columns_and_each_cause() -> None:
    lines = text_report(whole_run()).splitlines()
    for task in ("images", "clips", "emoji-classes", "scenes-align", "words", "scenes-vqa", "scenes-nlvr2"):
        assert any(line.startswith(task) for line in lines), task
    assert any("letters right" in line for line in lines)
    failed = [line for line in lines if "failed: " in line]
    assert len(failed) == 2
    assert all("image-missing: <img src=x> of test1-12-0" in line for line in failed)
    assert max(len(line) for line in lines if line not in failed) <= 100


def test_a_terminal_gets_the_same_lines_in_colour() -> None:
    written = {}
    for terminal in (True, False):
        stream = io.StringIO()
        print_report(whole_run(), Console(file=stream, force_terminal=terminal, width=100))
        written[terminal] = stream.getvalue()
    assert written[False] == text_report(whole_run())
    assert re.sub(r"\x1b\[[\d;]*m", "", written[True]) == written[False]
    assert "\x1b[31m" in written[True]  # failures are red


# Numbers of the page.


@pytest.fixture(scope="module")
def page() -> str:
    return html_report(whole_run(), "demo", examples=examples)


def test_every_headline_of_every_checkpoint_stands_in_its_tasks_table(page: str) -> None:
    root = body_of(page)
    outcomes = [one for one in whole_run() if one.cause is None]
    checked = 0
    for one in outcomes:
        known = [headline.metric for headline in KINDS[one.kind].headlines] if one.kind in KINDS else None
        metrics = [name for name in known or one.intervals if name in one.metrics]
        factor = 100 if known else 1
        table = next(section(root, one.task).iter("table"))
        (row,) = [row for row in table_rows(table) if row[0] == str(one.step)]
        assert row[2] == one.checkpoint["digest"][:8]
        for cell, metric in zip(row[3:], metrics, strict=True):
            assert numbers(cell) == pytest.approx(
                expected(one, metric, factor), abs=0.0501 if known else 6e-5
            )
            checked += 1
    assert checked > 100


def test_all_metrics_of_the_checkpoints_are_there_to_four_digits(page: str) -> None:
    root = body_of(page)
    for one in whole_run():
        if one.cause is not None:
            continue
        table = next(section(root, one.task).iter("details")).find("div/table")
        assert table is not None
        column = [text_of(cell) for cell in table.findall("thead/tr/th")].index(str(one.step))
        rows = {row[0]: row[column] for row in table_rows(table)}
        for metric in one.metrics:
            assert numbers(rows[metric]) == pytest.approx(expected(one, metric, 1), abs=6e-5, rel=1e-3)


def test_the_table_of_checkpoints_has_a_row_each_and_the_best_in_bold(page: str) -> None:
    table = next(
        next(one for one in body_of(page).iter("section") if one.get("id") == "checkpoints").iter("table")
    )
    rows = table_rows(table)
    assert [row[0] for row in rows] == [str(step) for step in STEPS]
    names = [next(iter(cell.itertext())) for cell in table.findall("thead/tr/th")]
    assert [row[names.index("scenes-nlvr2")] for row in rows][1:3] == ["failed", "failed"]
    assert [row[names.index("scenes-vqa")] for row in rows][:4] == ["–"] * 4
    for place in range(3, len(names)):
        bold = [row.find(f"td[{place + 1}]/b") is not None for row in table.findall("tbody/tr")]
        assert bold == [False] * 4 + [True]  # every task was best at the last step
    assert "text → vision R@1" in text_of(table.findall("thead/tr/th")[names.index("images")])


def test_of_ranks_the_lowest_is_the_best() -> None:
    found = [
        dataclasses.replace(
            outcome(step, "odd", "odd", {"median_rank": rank}), intervals={"median_rank": (1.0, 99.0)}
        )
        for step, rank in ((1, 9.0), (2, 4.0), (3, 7.0))
    ]
    bold = [text_of(one) for one in section(body_of(html_report(found, "x")), "odd").iter("b")]
    assert bold == ["4"]


# Charts.


def value_at(chart: Element, y: float) -> float:
    """What lies at a height, by the labels of the axis."""
    grid = [float(str(line.get("y1"))) for line in chart.findall("line") if line.get("class") == "grid"]
    labels = [float(str(text.text).rstrip(" %")) for text in chart.findall("text")[: len(grid)]]
    slope = (labels[-1] - labels[0]) / (grid[-1] - grid[0])
    return labels[0] + slope * (y - grid[0])


def figure(page: str, task: str) -> Element:
    return next(one for one in body_of(page).iter("figure") if text_of(one).startswith(f"{task} "))


@pytest.mark.parametrize(("task", "factor", "tolerance"), [("images", 100, 0.2), ("words", 1, 0.004)])
def test_a_curve_runs_through_its_values_within_its_band_and_above_its_chance(
    page: str, task: str, factor: float, tolerance: float
) -> None:
    chart = next(figure(page, task).iter("svg"))
    names = ["t2i_R1", "t2i_R10"] if task == "images" else ["letters_right", "words_right"]
    found = [one for one in whole_run() if one.task == task]
    for name, curve in zip(names, chart.findall("polyline"), strict=False):
        points = [tuple(map(float, point.split(","))) for point in str(curve.get("points")).split()]
        assert [value_at(chart, y) for _, y in points] == pytest.approx(
            [factor * one.metrics[name] for one in found], abs=tolerance
        )
        steps = np.array([one.step for one in found])
        places = np.array([x for x, _ in points])
        assert np.ptp((places - places[0]) - (steps - steps[0]) * (places[-1] - places[0]) / 360) < 0.2
    bands = [path for path in chart.findall("path") if path.get("opacity")]
    assert len(bands) == len(chart.findall("polyline"))
    corners = [tuple(map(float, corner.split())) for corner in str(bands[0].get("d")).strip("MZ").split("L")]
    bounds = [factor * one.intervals[names[0]][1] for one in found]
    bounds += [factor * one.intervals[names[0]][0] for one in reversed(found)]
    assert [value_at(chart, y) for _, y in corners] == pytest.approx(bounds, abs=tolerance)
    if task == "images":
        dashed = [line for line in chart.findall("line") if line.get("stroke-dasharray")]
        assert [value_at(chart, float(str(line.get("y1")))) for line in dashed] == pytest.approx(
            [0.4, 4], abs=0.2
        )


def test_a_task_has_a_chart_for_each_group_of_its_headlines_with_a_label_that_says_the_last_values(
    page: str,
) -> None:
    for task, titles in (
        ("images", ["text → vision", "vision → text"]),
        ("scenes-align", ["global", "local"]),
    ):
        found = figure(page, task)
        assert [text_of(title) for title in found.iter("h4")] == titles
        drawings = [svg for svg in found.iter("svg") if svg.get("role") == "img"]
        assert all("R@10" in str(svg.get("aria-label")) for svg in drawings) or task != "images"
        assert all(re.search(r"last: \S+.* \d+\.\d", str(svg.get("aria-label"))) for svg in drawings)


def test_a_value_that_is_no_number_leaves_the_curve_and_is_shown_as_such() -> None:
    found = [retrieval(step, "images", 0.3, 250, 0.1) for step in STEPS[:3]]
    found[1] = dataclasses.replace(
        found[1], metrics={**found[1].metrics, "t2i_R1": math.nan}, intervals={"t2i_R1": (math.nan, math.nan)}
    )
    root = body_of(html_report(found, "x"))
    curve = next(root.iter("polyline"))
    assert len(str(curve.get("points")).split()) == 2
    assert "nan" not in str(curve.get("points"))
    assert table_rows(next(section(root, "images").iter("table")))[1][3].startswith("nan")


# What is not numbers.


def test_failures_stand_at_the_top_with_their_cause_once_for_all_steps(page: str) -> None:
    sections = list(body_of(page).iter("section"))
    assert sections[0].get("id") == "failures"
    (item,) = sections[0].iter("li")
    assert text_of(item).startswith("scenes-nlvr2 steps 240, 360, given up after 3 attempts")
    assert "image-missing: <img src=x> of test1-12-0" in text_of(item)
    rows = table_rows(next(section(body_of(page), "scenes-nlvr2").iter("table")))
    assert [row[3].startswith("failed: image-missing") for row in rows] == [False, True, True, False, False]


def test_examples_of_the_newest_and_the_best_checkpoint_are_shown_wrong_ones_first() -> None:
    found = [
        named(step, "classes", "classification", value) for step, value in ((1, 0.2), (2, 0.9), (3, 0.5))
    ]
    asked = []

    def at(one: Outcome) -> Sequence[Example]:
        asked.append(one.step)
        picture = jpeg(emoji(one.step)[0])
        said = [(f"answer at {one.step}", "two")]
        return [
            Example(f"question {n} at {one.step}", bool(n), [(picture, "a picture")], said) for n in (1, 0)
        ]

    shown = section(body_of(html_report(found, "x", examples=at)), "classes")
    assert sorted(asked) == [2, 3]
    cards = list(shown.iter("article"))
    assert [text_of(next(card.iter("h5"))) for card in cards] == [
        "✗ wrongquestion 0 at 3",
        "✓ rightquestion 1 at 3",
        "✗ wrongquestion 0 at 2",
        "✓ rightquestion 1 at 2",
    ]
    assert all(
        str(next(card.iter("img")).get("src")).startswith("data:image/jpeg;base64,/9j/") for card in cards
    )
    assert "answer at 3 two" in " ".join(cards[0].itertext())
    assert text_of(next(one for one in shown.iter("summary") if "Examples" in text_of(one))).endswith(
        "step 2, the best by top 1"
    )


def test_text_of_others_is_escaped_and_can_run_or_load_nothing() -> None:
    picture = jpeg(emoji(1)[0])
    bad = Example(EVIL, True, [(picture, EVIL)], [(EVIL, EVIL)])
    found = [
        dataclasses.replace(
            retrieval(100, EVIL, 0.3, 250, 0.1),
            dataset={"name": EVIL, "digest": EVIL},
            checkpoint={"path": EVIL, "digest": EVIL, "step": 100, "stage": EVIL},
            version=EVIL,
        ),
        outcome(100, EVIL + "2", EVIL, {EVIL: 0.5}),
        outcome(200, EVIL + "2", EVIL, cause=EVIL),
    ]
    links = {EVIL: EVIL, "page": "https://mlflow.example/#/run?a=1&b='2'", "code": "javascript:alert(1)"}
    page = html_report(found, EVIL, examples=lambda one: [bad], links=links)
    root = body_of(page)
    allowed = (
        "body main h1 h2 h3 h4 h5 p nav section div span dl dt dd a b i br bdi code ul li table thead tbody tfoot tr "
        "th td details summary article figure figcaption img svg line path polyline text title"
    )
    assert {element.tag for element in root.iter()} <= {*allowed.split()}
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    assert all(str(image.get("src")).startswith("data:image/") for image in root.iter("img"))
    assert [a.get("href") for a in root.iter("a") if not str(a.get("href")).startswith("#")] == [
        "https://mlflow.example/#/run?a=1&b='2'"
    ]
    assert "\u202e" not in page
    assert "\x00" not in page
    assert page.count("alert(1)") > 10  # it is shown


def test_the_page_refers_to_nothing_outside_and_forbids_itself_to(page: str) -> None:
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)
    root = body_of(page)
    assert {str(element.get("src"))[:5] for element in root.iter() if element.get("src")} == {"data:"}
    places = {element.get("id") for element in root.iter()}
    links = [str(a.get("href")) for a in root.iter("a")]
    assert len(links) == 3 + 7
    assert all(link.startswith("#") and link[1:] in places for link in links)


def test_pages_of_nothing_and_of_one_checkpoint() -> None:
    nothing = text_of(body_of(html_report([], "demo", unfinished=2)))
    assert "No evaluation has finished yet; 2 not finished yet" in nothing
    one = body_of(html_report([retrieval(100, "images", 0.3, 250, 0.1)], "demo"))
    chart = next(figure(html_report([retrieval(100, "images", 0.3, 250, 0.1)], "demo"), "images").iter("svg"))
    bars = [path for path in chart.findall("path") if path.get("opacity")]
    assert len(bars) == 3  # an interval without neighbours is a bar
    assert len(table_rows(next(section(one, "images").iter("table")))) == 1
    failed = body_of(html_report([outcome(100, "images", "retrieval", cause="it broke")], "demo"))
    assert not [one for one in failed.iter("section") if one.get("id") == "curves"]
    assert "it broke" in text_of(failed)


def test_a_known_kind_that_was_measured_on_nothing_shows_no_facts_as_its_numbers() -> None:
    unlabelled = outcome(100, "test-std", "vqa", facts={"questions": 40.0, "answers": 9.0})
    root = body_of(html_report([unlabelled], "demo"))
    assert [row[:2] for row in table_rows(next(section(root, "test-std").iter("table")))] == [["100", "0"]]
    assert not [one for one in root.iter("section") if one.get("id") == "curves"]
    assert "40 questions" in text_of(section(root, "test-std"))
    assert text_report([unlabelled]).splitlines()[2].split() == ["test-std", "100", "0"]


def test_two_versions_of_a_task_are_two_histories() -> None:
    old = dataclasses.replace(retrieval(100, "images", 0.3, 250, 0.1), version="1-00000000")
    root = body_of(html_report([old, retrieval(200, "images", 0.4, 250, 0.1)], "demo"))
    titles = [text_of(one[0]) for one in root.iter("section")]
    assert titles[-2:] == ["images v1-00000000 retrieval", "images v1-0123abcd retrieval"]


# Size.


def noise(side: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=side)).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_a_page_of_many_checkpoints_and_too_many_pictures_stays_below_5_mb() -> None:
    many = [
        found
        for step in range(10, 3010, 10)
        for found in (
            *(retrieval(step, f"retrieval-{n}", 0.3, 250, 0.04) for n in range(4)),
            *(named(step, f"task-{n}", kind, 0.2) for n, kind in enumerate(KINDS) if kind != "retrieval"),
        )
    ]
    heavy = Example("heavy", True, [(jpeg(noise(200 + n), 400), f"picture {n}") for n in range(24)])
    greedy = html_report(many, "x", examples=lambda one: [heavy] * 40)
    assert len(greedy.encode()) < 5_000_000
    pictures = [len(list(section(body_of(greedy), f"retrieval-{n}").iter("img"))) for n in range(4)]
    assert min(pictures) == max(pictures) > 3  # each task has its share
    assert "pictures left out" in greedy
    rows = table_rows(next(section(body_of(greedy), "retrieval-0").iter("table")))
    assert [row[0] for row in rows] == [
        "10",
        *(f"{step:,}" for step in range(2010, 3010, 10)),
    ]  # all are as good


def test_a_picture_that_is_none_or_far_too_large_is_left_out() -> None:
    large = io.BytesIO()
    Image.fromarray(noise(500)).save(large, "PNG")
    assert len(large.getvalue()) > 300_000
    bad = [b"<svg onload='x()'/>", b"\xff\xd8\xff no picture", large.getvalue()]
    example = Example("bad", None, [(data, "caption") for data in bad])
    root = body_of(html_report([retrieval(1, "images", 0.3, 250, 0.1)], "x", examples=lambda one: [example]))
    assert not list(root.iter("img"))
    assert [text_of(one) for one in root.iter("p") if one.get("class") == "none"] == ["3 pictures left out"]


def test_shares_are_fair() -> None:
    assert fair_shares([10, 1000, 500], 300) == [10, 145, 145]
    assert fair_shares([10, 20], 300) == [10, 20]
    assert fair_shares([], 300) == []
