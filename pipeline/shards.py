"""``glscl shards``: looking at datasets of shards, checking them, dropping samples, merging, indexing.

Each verb parses its arguments and hands over to ``sharding``; ``pipeline.shards_view`` prints. With ``--json`` standard
output is one JSON value, and progress goes to standard error.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from pipeline.progress import show_progress
from sharding.errors import UserError
from sharding.storage import Storage, StorageConfig, open_storage

if TYPE_CHECKING:
    from sharding.overlay import Retracted

shards = typer.Typer(
    name="shards",
    help="List, inspect, verify, measure, retract from, merge and index datasets of shards.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

DatasetUrl = Annotated[
    str,
    typer.Argument(
        help="A dataset's folder: a path, `file://` or `s3://`.", metavar="URL", show_default=False
    ),
]
Endpoint = Annotated[
    str | None,
    typer.Option(
        help="S3 endpoint; default: AWS_ENDPOINT_URL, then AWS. Keys: the AWS_* variables.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Jobs = Annotated[int, typer.Option(min=1, help="Shards worked on at a time.")]

_CORES = os.cpu_count() or 1


@shards.command("ls")
def list_datasets(
    url: Annotated[
        str,
        typer.Argument(
            help="A job's storage, or any folder above datasets.", metavar="URL", show_default=False
        ),
    ],
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """List the datasets under a storage.

    Example: `glscl shards ls s3://bucket/birds`
    """
    from pipeline import shards_view
    from sharding.manifest import MANIFEST_PATH, load_manifest

    storage = _open(url, endpoint_url)
    storage.check(write=False)
    found = []
    for folder in ("datasets", ""):  # where jobs keep them; else anywhere below
        files = storage.list(folder)
        found = [file.path for file in files if file.path.rpartition("/")[2] == MANIFEST_PATH]
        if found:
            break
    rows = []
    for path in found:
        dataset = storage.at(path.rpartition("/")[0])
        try:
            rows.append(shards_view.summary(dataset, load_manifest(dataset)))
        except UserError as error:
            rows.append({"url": dataset.url, "error": str(error)})
    if as_json:
        _print_json(rows)
    else:
        shards_view.print_datasets(rows, storage.url, _console())


@shards.command()
def inspect(
    url: DatasetUrl,
    shard: Annotated[
        int | None, typer.Option(min=0, help="Show a sample of this shard.", show_default=False)
    ] = None,
    row: Annotated[int, typer.Option(min=0, help="Which sample of the shard.")] = 0,
    key: Annotated[
        str | None, typer.Option(help="Show the sample with this key.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the sample's media to this file.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Show what a dataset is, or one sample of it with its captions.

    Example: `glscl shards inspect s3://bucket/datasets/birds-0123 --key 000004-000017 --out bird.webp`
    """
    from pipeline import shards_view
    from sharding.manifest import load_manifest

    dataset = _open(url, endpoint_url)
    manifest = load_manifest(dataset)
    if shard is None and key is None:
        if out is not None:
            raise UserError("--out needs a sample: name it by --key, or --shard and --row")
        value = shards_view.summary(dataset, manifest) | shards_view.details(manifest)
        if as_json:
            _print_json(value)
        else:
            shards_view.print_dataset(value, _console())
        return
    if shard is not None and key is not None:
        raise UserError("give either --key or --shard")
    sample, media = shards_view.read_sample(dataset, manifest, shard, row, key)
    if out is not None:
        if media is None:
            raise UserError(f"--out {out}: the sample is retracted, or cannot be read: {sample['problem']}")
        _write(out, media)
    if as_json:
        _print_json(sample)
    else:
        shards_view.print_sample(sample, _console(), out)


@shards.command()
def verify(
    url: DatasetUrl,
    jobs: Jobs = _CORES,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image too, and 16 frames of every clip.")
    ] = False,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Read every byte of a dataset again; each fault with its shard, key and byte. Exit code 1 if there is one.

    Example: `glscl shards verify s3://bucket/datasets/birds-0123 --jobs 8`
    """
    from pipeline import shards_view
    from sharding.manifest import load_manifest
    from sharding.verify import ShardReport
    from sharding.verify import verify as verify_dataset

    dataset = _open(url, endpoint_url)
    manifest = load_manifest(dataset)
    started, read, done, bad = time.monotonic(), 0, 0, 0
    with show_progress(Console(stderr=True), "verifying", len(manifest.shards)) as task:

        def show(report: ShardReport) -> None:
            nonlocal read, done, bad
            done, read, bad = done + 1, read + report.bytes, bad + len(report.faults) + report.more
            rate = read / 1e6 / max(time.monotonic() - started, 1e-9)
            task.update(done, f"{rate:,.0f} MB/s  {bad} faults" if bad else f"{rate:,.0f} MB/s")

        found = verify_dataset(dataset, manifest, jobs=jobs, decode=decode, progress=show)
    if as_json:
        _print_json(shards_view.verification(found))
    else:
        shards_view.print_verification(found, dataset.url, time.monotonic() - started, _console())
    if not found.sound:
        raise typer.Exit(1)


@shards.command()
def stats(url: DatasetUrl, as_json: AsJson = False, endpoint_url: Endpoint = None) -> None:
    """Show how sizes, lengths and scores of a dataset's samples spread, from the indexes alone.

    Example: `glscl shards stats s3://bucket/datasets/birds-0123`
    """
    from pipeline import shards_view
    from sharding.manifest import load_manifest
    from sharding.statistics import dataset_statistics

    dataset = _open(url, endpoint_url)
    found = dataset_statistics(dataset, load_manifest(dataset))
    if as_json:
        _print_json(shards_view.statistics(found))
    else:
        shards_view.print_statistics(found, _console())


@shards.command()
def retract(
    url: DatasetUrl,
    key: Annotated[list[str], typer.Option(help="A key to drop. May be repeated.", show_default=False)] = [],  # noqa: B006 - typer copies it
    keys_file: Annotated[
        Path | None, typer.Option(help="A file with a key on each line.", show_default=False)
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help="Drop what fits this rule over the columns of the index, e.g. "
            "`\"width < 200 or source contains 'example.org'\"`.",
            show_default=False,
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; it is kept with the dataset.", show_default=False)] = "",
    undo: Annotated[
        bool, typer.Option("--undo", help="Undo the newest retraction that is not undone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be dropped.")] = False,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Pass over keys that the dataset does not have.")
    ] = False,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Drop samples from a dataset, by key or by rule, without rewriting its shards.

    What is dropped is never read again, by any program that reads through the manifest; the tars keep it. The
    dataset has another digest then, but the order of its samples stays: a dropped sample leaves its slot empty, and a
    training under way leaves it out from its next start on. `--undo` brings it back, and the former digest with it.

    Example: `glscl shards retract s3://bucket/datasets/birds-0123 --where "score < 0.2" --reason "unlike its caption"`
    """
    from pipeline import shards_view
    from sharding import overlay
    from sharding.rules import parse_rule

    ways = [bool(key) or keys_file is not None, where is not None, undo]
    if sum(ways) != 1:
        raise UserError("say what to retract: --key and --keys-file, or --where, or --undo")
    if not reason.strip() and not dry_run:
        raise UserError("--reason: say why, in a few words; it is kept with the dataset")
    dataset = _open(url, endpoint_url)
    result: Retracted
    if undo:
        result = overlay.undo(dataset, reason=reason, dry_run=dry_run)
    elif where is not None:
        rule = parse_rule(where)
        result = overlay.retract_where(dataset, rule, rule=where, reason=reason, dry_run=dry_run)
    else:
        keys = [*key, *(_read_keys(keys_file) if keys_file is not None else [])]
        result = overlay.retract_keys(
            dataset, keys, reason=reason, dry_run=dry_run, ignore_unknown=ignore_unknown
        )
    if as_json:
        _print_json(shards_view.retraction(result, dry_run=dry_run, undo=undo))
    else:
        shards_view.print_retraction(result, _console(), dry_run=dry_run, undo=undo)


@shards.command()
def merge(
    urls: Annotated[
        list[str], typer.Argument(help="Two datasets or more.", metavar="URL URL...", show_default=False)
    ],
    into: Annotated[
        str, typer.Option(help="The storage; the result is its `datasets/NAME-DIGEST`.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="Name of the result.", show_default=False)],
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep one of samples that were made from equal bytes.")
    ] = False,
    jobs: Jobs = _CORES,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Make one dataset of several of the same modality: the plain union, each shard copied and verified.

    Keys that would meet are prefixed. The same command again goes on where it stopped. To mix datasets by weights,
    leave them apart and name them in a stage's `mixture`.

    Example: `glscl shards merge s3://b/datasets/birds-01 s3://b/datasets/bees-23 --into s3://b --name animals`
    """
    from pipeline import shards_view
    from sharding.merge import merge as merge_datasets
    from sharding.prepare import check_name

    check_name(name)
    storage = _open(into, endpoint_url)
    datasets = [_open(url, endpoint_url) for url in urls]
    started, moved = time.monotonic(), 0
    with show_progress(Console(stderr=True), "merging") as task:

        def show(done: int, total: int, record: Any) -> None:
            nonlocal moved
            moved += record.bytes
            task.update(done, f"{moved / 1e6 / max(time.monotonic() - started, 1e-9):,.0f} MB/s", total=total)

        merged = merge_datasets(
            datasets, storage, name, drop_duplicates=drop_duplicates, jobs=jobs, progress=show
        )
    value = shards_view.summary(storage.at(merged.path), merged.manifest)
    value |= {"merged": merged.manifest.source["merged"], "duplicates": merged.duplicates}
    if as_json:
        _print_json(value)
    else:
        shards_view.print_merged(value, _console())


@shards.command()
def index(
    url: Annotated[
        str,
        typer.Argument(help="A folder of WebDataset tars.", metavar="URL", show_default=False),
    ],
    modality: Annotated[str, typer.Option(help="`image` or `video`.")] = "image",
    caption_field: Annotated[
        str, typer.Option(help="Field of the JSON members: a text or a list; else the text member is used.")
    ] = "caption",
    name: Annotated[
        str, typer.Option(help="Name of the dataset; default: the folder's.", show_default=False)
    ] = "",
    bad_limit: Annotated[
        float, typer.Option(min=0, max=1, help="Share of samples that may be unusable.")
    ] = 0.1,
    jobs: Jobs = _CORES,
    as_json: AsJson = False,
    endpoint_url: Endpoint = None,
) -> None:
    """Make tars of another program (webdataset, img2dataset) a dataset: an index for each, and a manifest.

    Every tar is read once, none is written. A job names the result by `{prepared: URL, modality: image}`.

    Example: `glscl shards index s3://bucket/laion --modality image --caption-field caption`
    """
    from pipeline import shards_view
    from sharding.foreign import ForeignRecord, index_shards

    if modality not in ("image", "video"):
        raise UserError(f"--modality: got {modality}; must be image or video")
    dataset = _open(url, endpoint_url)
    dataset.check(write=False)
    started, read = time.monotonic(), 0
    with show_progress(Console(stderr=True), "indexing") as task:

        def show(done: int, total: int, record: ForeignRecord) -> None:
            nonlocal read
            read += record.tar_bytes
            task.update(done, f"{read / 1e6 / max(time.monotonic() - started, 1e-9):,.0f} MB/s", total=total)

        manifest = index_shards(
            dataset,
            modality,  # type: ignore[arg-type]  # checked above
            name=name,
            caption_field=caption_field,
            bad_limit=bad_limit,
            jobs=jobs,
            progress=show,
        )
    value = shards_view.summary(dataset, manifest) | shards_view.details(manifest)
    if as_json:
        _print_json(value)
    else:
        shards_view.print_dataset(value, _console())


def _open(url: str, endpoint_url: str | None) -> Storage:
    if endpoint_url is None:
        return open_storage(url)
    try:
        return open_storage(StorageConfig(url=url, endpoint_url=endpoint_url))
    except ValidationError as error:
        raise UserError(f"--endpoint-url: {error.errors()[0]['msg']}") from None


def _read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--keys-file {path}: cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _write(path: Path, data: bytes) -> None:
    from sharding.storage_file import write_file

    try:
        write_file(path, [data])
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror or error}") from None


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _console() -> Console:
    from pipeline.cli import console

    return console()
