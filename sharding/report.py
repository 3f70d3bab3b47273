"""The closing table of a preparation: what was read, kept and dropped, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sharding.filters import CHOSEN
from sharding.manifest import Manifest

if TYPE_CHECKING:
    from rich.table import Table


def closing_table(manifests: Iterable[Manifest]) -> Table:
    """One row a dataset; bad data and what the filters chose to drop are told apart, each by cause."""
    from rich.table import Table

    table = Table(title="datasets", title_style="bold", title_justify="left")
    table.add_column("name")
    for column in ("read", "kept", "shards", "MiB"):
        table.add_column(column, justify="right")
    for column in ("filtered", "bad", "captions left out", "digest"):
        table.add_column(column)
    for manifest in manifests:
        dropped = manifest.counts.dropped
        table.add_row(
            manifest.name,
            f"{manifest.counts.read:,}",
            f"{manifest.counts.kept:,}",
            f"{len(manifest.shards):,}",
            f"{sum(shard.bytes for shard in manifest.shards) / 2**20:,.1f}",
            _by_cause({cause: number for cause, number in dropped.items() if cause in CHOSEN}),
            _by_cause({cause: number for cause, number in dropped.items() if cause not in CHOSEN}),
            _by_cause(manifest.counts.captions_dropped),
            manifest.digest[:12],
        )
    return table


def _by_cause(numbers: Mapping[str, int]) -> str:
    """``"too-small 12"`` a line, the most frequent first."""
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"{cause} {number:,}" for cause, number in ordered)
