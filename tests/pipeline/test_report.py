"""The report shows every checkpoint and every failure, on a terminal, in a log and as a page."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

from rich.console import Console

from pipeline.evaluation.ledger import Outcome
from pipeline.evaluation.report import chance_multiple, html_report, print_report, text_report


def outcome(step: int, task: str, recall: float, cause: str | None = None) -> Outcome:
    metrics = {
        "t2i_R10": recall,
        "i2t_R10": recall * 0.9,
        "t2i_R1": recall / 4,
        "i2t_R1": recall / 8,
        "t2i_rerank_R1": recall / 2,
        "i2t_rerank_R1": recall / 4,
        "t2i_rerank_R10": recall * 1.2,
        "i2t_rerank_R10": recall * 1.1,
        "t2i_chance_R10": 0.04,
        "i2t_chance_R10": 0.04,
        "t2i_median_rank": 17.5,
        "candidates_images": 250.0,
        "candidates_texts": 250.0,
    }
    return Outcome(
        checkpoint={
            "path": f"checkpoints/step-{step:08d}",
            "digest": "ab" * 32,
            "step": step,
            "stage": step // 300,
        },
        task=task,
        version="1-0123abcd",
        dataset={"name": "held-out", "digest": "cd" * 32},
        started=1.0,
        finished=2.0,
        attempt=1,
        metrics={} if cause else metrics,
        cause=cause,
    )


OUTCOMES = [
    outcome(400, "images", 0.41),
    outcome(100, "images", 0.08),
    outcome(200, "images", 0.22),
    outcome(400, "clips", 0.0, cause="sha256-mismatch: <model> is not what was committed"),
]


def test_text_has_a_line_per_evaluation_in_the_order_of_steps_with_multiples_of_chance() -> None:
    lines = text_report(OUTCOMES).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["100", "200", "400", "400"]
    assert lines[2].split("  ")[-1].strip() == "250 / 250"
    assert "8.0 %" in lines[2]
    assert "2.0 / 1.8" in lines[2]
    assert "2.0 / 1.0 %" in lines[2]  # recall at 1
    assert "4.0 / 2.0 %" in lines[2]  # and re-ranked
    assert lines[4].endswith("failed: sha256-mismatch: <model> is not what was committed")
    assert text_report([]) == "no evaluations\n"
    assert chance_multiple(OUTCOMES[1], "t2i") == 2.0


def test_a_terminal_gets_a_table_and_a_log_gets_plain_lines() -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        print_report(OUTCOMES, Console(file=stream, force_terminal=terminal, width=140))
        text = stream.getvalue()
        assert "41.0 %" in text
        assert "is not what was committed" in text
        assert ("\x1b[" in text) is terminal


def test_the_page_is_self_contained_well_formed_and_escapes_what_it_shows() -> None:
    page = html_report(OUTCOMES, "run <one>")
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "&lt;one&gt;" in page
    assert "&lt;model&gt;" in page
    body = page[page.index("<body>") : page.index("</html>")].replace("&nbsp;", " ")
    root = ElementTree.fromstring(body)
    charts = root.findall(".//figure/svg")
    assert len(charts) == 1  # the other task has no numbers yet
    curve = charts[0].findall("polyline")[0]
    heights = [float(point.split(",")[1]) for point in str(curve.get("points")).split()]
    assert heights == sorted(heights, reverse=True)  # recall rises, the curve goes up
    assert html_report([], "nothing yet")
