"""What the evaluations say, for people: tables for a terminal and for logs, and a page for a browser.

    outcomes -> history -> terminal    lines of text
                        -> page        one HTML file: charts, tables, and examples with their pictures
    live: the page of a run, written again as outcomes come

Only ``headlines`` knows kinds of tasks by name; of an unknown kind everything is shown all the same.
"""

from pipeline.evaluation.report.live import LiveReport
from pipeline.evaluation.report.page import html_report
from pipeline.evaluation.report.terminal import print_report, text_report

__all__ = ["LiveReport", "html_report", "print_report", "text_report"]
