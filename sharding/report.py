"""The closing table of a preparation: what was read, kept and dropped, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sharding.filters.config import OTHER_CAPTION, chosen
from sharding.manifest import Manifest

if TYPE_CHECKING:
    from rich.table import Table


def closing_table(manifests: Iterable[Manifest]) -> Table:
    """One row a dataset; bad data and what the filters chose to drop are told apart, each by cause.

    Files passed over are no inputs, and so not among those read.
    """
    from rich.table import Table

    table = Table(title="datasets", title_style="bold", title_justify="left")
    table.add_column("name", no_wrap=True)
    for column in ("read", "kept", "shards", "MiB"):
        table.add_column(column, justify="right")
    table.add_column("digest")
    manifests = list(manifests)
    causes = {
        "filtered": [{c: n for c, n in m.counts.dropped.items() if chosen(c)} for m in manifests],
        "bad": [{c: n for c, n in m.counts.dropped.items() if not chosen(c)} for m in manifests],
        "captions left out": [m.counts.captions_dropped for m in manifests],
        "files passed over": [m.skipped for m in manifests],
    }
    shown = {what: counts for what, counts in causes.items() if any(counts)}
    for what in shown:
        table.add_column(what)
    for row, manifest in enumerate(manifests):
        table.add_row(
            manifest.name,
            f"{manifest.counts.read:,}",
            f"{manifest.counts.kept:,}",
            f"{len(manifest.shards):,}",
            f"{sum(shard.bytes for shard in manifest.shards) / 2**20:,.1f}",
            manifest.digest[:12],
            *(_by_cause(counts[row]) for counts in shown.values()),
        )
    table.caption = "\n".join(filter(None, map(_hint, manifests))) or None
    table.caption_justify = "left"
    return table


def _hint(manifest: Manifest) -> str:
    """What to do about rows that were dropped for their media though they had captions of their own."""
    number = manifest.counts.dropped.get(OTHER_CAPTION, 0)
    if not number:
        return ""
    dropped = "1 sample was" if number == 1 else f"{number:,} samples were"
    text = f"{manifest.name}: {dropped} dropped as copies of earlier media, though with other captions"
    if manifest.configuration.get("source", {}).get("kind") in ("table", "huggingface"):
        text += (
            " (rows that name the same media: source.group_by makes one sample of them, with all captions)"
        )
    return text


def _by_cause(numbers: Mapping[str, int]) -> str:
    """``"too-small 12"`` a line, the most frequent first."""
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"{cause} {number:,}" for cause, number in ordered)
