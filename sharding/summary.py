"""What the closing report of a preparation shows, gathered by tasks so that the driver holds one bounded summary.

::

    commits, indexes, contact sheets --summarise (a group of tasks)--> work/report/00000.json --plus--> Summary
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sharding.contact import ContactSheet
from sharding.statistics import Statistics, index_statistics

if TYPE_CHECKING:
    from sharding.stages import Work

#: Tasks that are summarised together.
GROUP = 256
_READERS = 8
_EXAMPLES = 3


@dataclass(frozen=True)
class Summary:
    """Statistics of the kept samples, pictures, and a few dropped inputs of each cause in words."""

    statistics: Statistics = field(default_factory=Statistics)
    sheet: ContactSheet = field(default_factory=ContactSheet)
    examples: Mapping[str, list[str]] = field(default_factory=dict)

    def plus(self, other: Summary) -> Summary:
        """Of both, ``other`` being later in input order."""
        causes = sorted({*self.examples, *other.examples})
        both = {cause: [*self.examples.get(cause, []), *other.examples.get(cause, [])] for cause in causes}
        return Summary(
            statistics=self.statistics.plus(other.statistics),
            sheet=self.sheet.plus(other.sheet),
            examples={cause: texts[:_EXAMPLES] for cause, texts in both.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value; ``from_json`` makes the same summary of it."""
        return {
            "statistics": self.statistics.to_json(),
            "sheet": self.sheet.to_json(),
            "examples": dict(self.examples),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        return cls(
            Statistics.from_json(value["statistics"]),
            ContactSheet.from_json(value["sheet"]),
            value["examples"],
        )


def groups(tasks: int) -> int:
    """Calls of ``summarise`` that cover so many tasks."""
    return -(-tasks // GROUP)


def summary_path(group: int) -> str:
    return f"work/report/{group:05d}.json"


def summarise(work: Work, group: int) -> None:
    """Write the summary of the tasks ``group * GROUP`` and so on, all of which are committed."""
    path = summary_path(group)
    if work.dataset.exists(path):
        return
    tasks = range(group * GROUP, min((group + 1) * GROUP, work.plan.tasks))
    total = Summary()
    with ThreadPoolExecutor(_READERS) as pool:
        for one in pool.map(lambda task: _of_task(work, task), tasks):
            total = total.plus(one)
    work.dataset.write_json(path, total.to_json())


def _of_task(work: Work, task: int) -> Summary:
    from sharding.index import read_index
    from sharding.stages import committed_record, contact_path

    record = committed_record(work, task)
    statistics = Statistics()
    if record.shard is not None:
        index = read_index(work.dataset.read_bytes(record.shard.index))
        statistics = index_statistics(index, record.shard)
    sheet = ContactSheet.load(work.dataset, contact_path(task, committed=True))
    return Summary(statistics, sheet, record.examples)


def load_summary(work: Work) -> Summary:
    """The summary of the whole dataset, when all groups are summarised."""
    total = Summary()
    for group in range(groups(work.plan.tasks)):
        total = total.plus(Summary.from_json(work.dataset.read_json(summary_path(group))))
    return total
