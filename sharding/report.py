"""The closing table of a preparation: what was read, kept and dropped, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sharding.filters import CHOSEN
from sharding.manifest import Manifest

if TYPE_CHECKING:
    from rich.table import Table


def closing_table(manifest: Manifest) -> Table:
    """One row a cause; bad data and what the filters chose to drop are told apart."""
    from rich.table import Table

    counts = manifest.counts
    size = sum(shard.bytes for shard in manifest.shards)
    table = Table(
        title=f"{manifest.name}: {manifest.samples:,} samples in {len(manifest.shards):,} shards",
        min_width=60,
        caption=f"{size / 2**20:,.1f} MiB, digest {manifest.digest[:12]}",
    )
    table.add_column("")
    table.add_column("why")
    table.add_column("samples", justify="right")
    table.add_column("share", justify="right")

    def row(what: str, why: str, number: int) -> None:
        table.add_row(what, why, f"{number:,}", f"{number / max(1, counts.read):.1%}")

    row("read", "", counts.read)
    for cause, number in sorted(counts.dropped.items(), key=lambda item: (-item[1], item[0])):
        row("filtered" if cause in CHOSEN else "bad", cause, number)
    row("kept", "", counts.kept)
    for cause, number in sorted(counts.captions_dropped.items(), key=lambda item: (-item[1], item[0])):
        table.add_row("captions left out", cause, f"{number:,}", "")
    return table
