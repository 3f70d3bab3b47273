"""What ``glscl shards`` prints: plain data first (as ``--json`` has it), then tables of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.table import Table

from sharding.errors import BadData, UserError
from sharding.index import load_index
from sharding.manifest import Manifest
from sharding.overlay import Retracted
from sharding.reader import ShardReader
from sharding.statistics import ROW_HEAD, Distribution, Statistics, bin_edges
from sharding.storage import Storage
from sharding.verify import Verification

_SHOWN_KEYS = 20
_SPARKS, _BLOCKS = 20, " ▁▂▃▄▅▆▇█"
_SHOWN_FAULTS = 1000


def summary(dataset: Storage, manifest: Manifest) -> dict[str, Any]:
    """A dataset in a few numbers; ``bytes`` of its tars."""
    return {
        "name": manifest.name,
        "url": dataset.url,
        "modality": manifest.modality,
        "samples": manifest.samples,
        "dropped": manifest.dropped,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "digest": manifest.digest,
        "made_from": made_from(manifest),
    }


def made_from(manifest: Manifest) -> str:
    """Where a dataset's samples come from, in words."""
    if merged := manifest.source.get("merged"):
        return "merge of " + ", ".join(source["name"] for source in merged)
    kind = manifest.configuration.get("source", {}).get("kind", "")
    return f"{kind} {manifest.source.get('url', '')}".strip()


def details(manifest: Manifest) -> dict[str, Any]:
    """What was read and dropped on the way, and what was retracted since."""
    return {
        "counts": manifest.counts.model_dump(mode="json"),
        "configuration": manifest.configuration,
        "source": manifest.source,
        "skipped": manifest.skipped,
        "retractions": [entry.model_dump(mode="json") for entry in manifest.retractions],
        "largest_shard": max((shard.bytes for shard in manifest.shards), default=0),
    }


def print_datasets(rows: list[dict[str, Any]], url: str, console: Console) -> None:
    """One line a dataset."""
    if not rows:
        console.print(f"no dataset under {url}", highlight=False, soft_wrap=True)
        return
    table = _table(console, "name", "modality", "samples", "dropped", "shards", "MiB", "digest", "made from")
    for row in rows:
        if "error" in row:
            continue
        table.add_row(
            row["name"],
            row["modality"],
            f"{row['samples']:,}",
            f"{row['dropped']:,}" if row["dropped"] else "",
            f"{row['shards']:,}",
            _mib(row["bytes"]),
            row["digest"][:12],
            row["made_from"],
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            _line(console, f"cannot be read: {row['error']}")


def print_dataset(value: dict[str, Any], console: Console) -> None:
    """A dataset's summary and details."""
    counts = value["counts"]
    live = value["samples"] - value["dropped"]
    grid = _grid()
    grid.add_row("dataset", value["name"])
    grid.add_row("url", value["url"])
    grid.add_row("modality", value["modality"])
    retracted = f" ({value['dropped']:,} of {value['samples']:,} retracted)" if value["dropped"] else ""
    grid.add_row("samples", f"{live:,}{retracted}")
    grid.add_row(
        "shards", f"{value['shards']:,}, {_mib(value['bytes'])} MiB (largest {_mib(value['largest_shard'])})"
    )
    grid.add_row("made from", value["made_from"])
    grid.add_row("read / kept", f"{counts['read']:,} / {counts['kept']:,}")
    for cause, number in sorted(counts["dropped"].items(), key=lambda item: (-item[1], item[0])):
        grid.add_row(f"  {cause}", f"{number:,}")
    if value["skipped"]:
        grid.add_row("passed over", f"{sum(value['skipped'].values()):,} (files that are no inputs)")
    for reason, number in value["skipped"].items():
        grid.add_row(f"  {reason}", f"{number:,}")
    grid.add_row("digest", value["digest"])
    for number, entry in enumerate(value["retractions"], 1):
        grid.add_row(
            f"change {number}", f"{entry['samples']:+,} dropped, by {entry['rule']!r}: {entry['reason']}"
        )
    console.print(grid, highlight=False, soft_wrap=True)


def read_sample(
    dataset: Storage, manifest: Manifest, shard: int | None, row: int, key: str | None
) -> tuple[dict[str, Any], bytes | None]:
    """A sample by shard and row, or by key: its row of the index, its captions, and its media (None: unreadable).

    Of a key that was left out when another program's tar was indexed: the key and the reason.

    Raises:
        UserError: there is no such sample.
    """
    if key is not None:
        found = _find(dataset, manifest, key)
        if found is None:
            return _left_out(dataset, manifest, key), None
        shard, row = found
    assert shard is not None
    if shard >= len(manifest.shards):
        raise UserError(f"--shard {shard}: the dataset has shards 0 to {len(manifest.shards) - 1}")
    record = manifest.shards[shard]
    if row >= record.samples:
        raise UserError(f"--row {row}: shard {shard} has samples 0 to {record.samples - 1}")
    fields = load_index(dataset, record).slice(row, 1).to_pylist()[0]
    value: dict[str, Any] = {"shard": shard, "row": row, "tar": dataset.url_of(record.tar), "index": fields}
    try:
        sample = ShardReader(dataset, manifest).read(shard, row)
    except BadData as error:
        return value | {"captions": [], "problem": str(error)}, None
    return value | {"captions": sample.captions}, sample.media


def _find(dataset: Storage, manifest: Manifest, key: str) -> tuple[int, int] | None:
    """Shard and row of a key, None where there is no such sample; shards first whose name it begins with."""
    order = sorted(
        range(len(manifest.shards)), key=lambda number: not key.startswith(manifest.shards[number].name)
    )
    for number in order:
        row = pc.index(load_index(dataset, manifest.shards[number])["key"], key).as_py()
        if row >= 0:
            return number, row
    return None


def _left_out(dataset: Storage, manifest: Manifest, key: str) -> dict[str, Any]:
    """What is known of a key that is in another program's tar and not in its index.

    Raises:
        UserError: nothing.
    """
    why = None
    if any(shard.caption_field is not None for shard in manifest.shards):
        from sharding.foreign import left_out  # loads the decoders of clips

        why = left_out(dataset, key)
    if why is None:
        raise UserError(f"{dataset.url} has no sample with the key {key}")
    problem = f"left out when its tar was indexed: {why}"
    return {"shard": None, "row": None, "index": {"key": key}, "captions": [], "problem": problem}


def print_sample(value: dict[str, Any], console: Console, out: Path | None) -> None:
    """A sample's captions and its row of the index."""
    grid = _grid()
    if "tar" in value:
        grid.add_row("shard, row", f"{value['shard']}, {value['row']}")
        grid.add_row("tar", value["tar"])
    for name, field in value["index"].items():
        if isinstance(field, int):
            grid.add_row(name, f"{field:016x}" if name.endswith("xxh3") else f"{field:,}")
        else:
            grid.add_row(name, str(field))
    for caption in value["captions"]:
        grid.add_row("caption", caption)
    if "problem" in value:
        grid.add_row("problem", value["problem"])
    if out is not None:
        grid.add_row("media", str(out))
    console.print(grid, highlight=False, markup=False, soft_wrap=True)


def statistics(found: Statistics) -> dict[str, Any]:
    """The statistics with the figures of ``--json``: of each distribution its bounds, mean, quantiles and bins."""
    value = found.to_json()
    for name, spread in found.distributions.items():
        figures = {f"p{share}": spread.quantile(share / 100) for share in (5, 25, 50, 75, 95)}
        bins = [
            [*bin_edges(number, linear=spread.linear), count] for number, count in sorted(spread.bins.items())
        ]
        value["distributions"][name] = {
            "count": spread.count,
            "smallest": spread.smallest,
            "largest": spread.largest,
            "mean": spread.mean,
            **figures,
            "bins": bins,
        }
    return value


def print_statistics(found: Statistics, console: Console) -> None:
    """Totals, a line a quantity with a small histogram, and the media's formats."""
    _line(
        console,
        f"{found.samples:,} samples, {found.captions:,} captions, {found.shards:,} shards of "
        f"{_mib(found.shard_bytes)} MiB, media of {_mib(found.media_bytes)} MiB",
    )
    formats = ", ".join(f"{name} {number:,}" for name, number in found.extensions.items())
    _line(console, f"media: {formats or 'none'}")
    if not found.samples:
        return
    table = _table(console, *ROW_HEAD, "spread, from the smallest to the largest")
    for column in table.columns[1 : len(ROW_HEAD)]:
        column.justify = "right"
    for row, spread in zip(found.rows(), found.distributions.values(), strict=True):
        table.add_row(*row, _sparkline(spread))
    console.print(table)


def _sparkline(spread: Distribution) -> str:
    """A histogram a line high: equal steps of the bins' numbers (of the logarithm, unless linear)."""
    numbers = sorted(spread.bins)
    # Zeros have a bin far below all others: they count as the lowest.
    low = next((number for number in numbers if bin_edges(number, linear=spread.linear)[1] != 0), numbers[0])
    high = max(low, numbers[-1])
    width = min(_SPARKS, high - low + 1)
    columns = [0] * width
    for number, count in spread.bins.items():
        columns[(max(number, low) - low) * width // (high - low + 1)] += count
    top = max(columns)
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // top)] for count in columns)


def verification(found: Verification) -> dict[str, Any]:
    """What ``verify`` found."""
    return {
        "sound": found.sound,
        "shards": found.shards,
        "samples": found.samples,
        "bytes": found.bytes,
        "faults": [
            {
                "cause": fault.cause,
                "file": fault.file,
                "key": fault.key,
                "offset": fault.offset,
                "detail": fault.detail,
            }
            for fault in found.faults
        ],
        "more_faults": found.more,
        "other_files": found.extra,
    }


def print_verification(found: Verification, url: str, seconds: float, console: Console) -> None:
    """One line a fault, then the verdict."""
    for fault in found.faults[:_SHOWN_FAULTS]:
        _line(console, str(fault))
    number = len(found.faults) + found.more
    unlisted = number - min(len(found.faults), _SHOWN_FAULTS)
    if unlisted:
        _line(console, f"... and {unlisted:,} more")
    if found.extra:
        shown = ", ".join(found.extra[:_SHOWN_KEYS]) + (", ..." if len(found.extra) > _SHOWN_KEYS else "")
        _line(console, f"files that are none of the dataset's: {shown}")
    rate = found.bytes / 1e6 / max(seconds, 1e-9)
    verdict = "sound" if found.sound else f"{number:,} {'fault' if number == 1 else 'faults'}"
    _line(
        console,
        f"{url}: {verdict}; {found.samples:,} samples in {found.shards:,} shards, {_mib(found.bytes)} MiB read "
        f"({rate:,.0f} MB/s)",
    )


def retraction(result: Retracted, *, dry_run: bool, undo: bool) -> dict[str, Any]:
    """What a retraction did, or would do."""
    return {
        "dry_run": dry_run,
        "undo": undo,
        "change": result.after.dropped - result.before.dropped if undo or not dry_run else len(result.rows),
        "already": 0 if undo else result.already,
        "unknown": result.unknown,
        "keys": result.rows["key"].to_pylist(),
        "digest_before": result.before.digest,
        "digest": None if dry_run and not undo else result.after.digest,
        "dropped": result.after.dropped,
        "samples": result.after.samples,
    }


def print_retraction(result: Retracted, console: Console, *, dry_run: bool, undo: bool) -> None:
    """How many samples go (or come back), a few of them, and the digests."""
    before, after = result.before, result.after
    if undo:
        number = before.dropped - after.dropped
        _line(console, f"{number:,} samples {'would be' if dry_run else 'are'} there again")
    else:
        number = len(result.rows)
        _line(console, f"{number:,} of {before.samples:,} samples {'would be' if dry_run else 'are'} dropped")
        for shard, key in zip(
            *(result.rows[c].to_pylist()[:_SHOWN_KEYS] for c in ("shard", "key")), strict=True
        ):
            _line(console, f"  {before.shards[shard].name}.tar  {key}")
        if number > _SHOWN_KEYS:
            _line(console, f"  ... and {number - _SHOWN_KEYS:,} more (--json lists all)")
        if result.already:
            _line(console, f"{result.already:,} more were dropped already")
        if result.unknown:
            _line(console, f"{len(result.unknown):,} keys are not in the dataset")
    if before.digest != after.digest:
        _line(console, f"digest {before.digest[:12]} -> {after.digest[:12]}")
    if not dry_run and before.digest != after.digest:
        _line(console, "a training under way reads what it read before until it is started again")


def print_merged(value: dict[str, Any], console: Console) -> None:
    """The result of a merge, and what became of its sources' keys."""
    table = _table(console, "source", "samples", "keys", "digest")
    for source in value["merged"]:
        prefix = f"prefixed {source['prefix']}" if source["prefix"] else "as they were"
        table.add_row(source["name"], f"{source['samples']:,}", prefix, source["digest"][:12])
    console.print(table)
    _line(
        console,
        f"{value['url']}: {value['samples']:,} samples in {value['shards']:,} shards, {_mib(value['bytes'])} MiB; "
        f"{value['dropped']:,} dropped, {value['duplicates']:,} of them as duplicates; digest {value['digest'][:12]}",
    )


def _table(console: Console, *columns: str) -> Table:
    """A table: drawn on a terminal, columns of text elsewhere. Columns of numbers are named so."""
    table = Table(box=box.ROUNDED if console.is_terminal else None, pad_edge=False, header_style="bold")
    numbers = {"samples", "dropped", "shards", "MiB"}
    for column in columns:
        table.add_column(
            column,
            justify="right" if column in numbers else "left",
            no_wrap=column in ("name", "digest"),
            overflow="fold",
        )
    return table


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
