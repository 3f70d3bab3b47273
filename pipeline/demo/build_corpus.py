"""Builds the bundled demo corpus from public packages, and fetches the full-size corpora into any storage.

    python -m pipeline.demo.build_corpus bundle
    python -m pipeline.demo.build_corpus fetch emoji-clips s3://bucket/emoji-clips

`bundle` rewrites `pipeline/demo/corpus/`: the same bytes as committed, given the same library versions.
`fetch` writes media and a captions file in JSON lines; started again, it goes on where it was.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.demo import emoji, emoji_media, objects, packages
from pipeline.demo.packages import NpmPackage
from sharding.errors import StorageFault, UserError
from sharding.seeds import derive_seed
from sharding.storage import Storage, open_storage

CORPUS = Path(__file__).parent / "corpus"
WORDS = NpmPackage("emojibase-data", "17.0.0")
STILLS = NpmPackage("@lobehub/fluent-emoji-3d", "1.1.0")
ANIMATIONS = [NpmPackage(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0") for number in (1, 2, 3, 4)]
BUNDLED_ANIMATIONS = ANIMATIONS[3]
STAMPS = "tuxpaint-stamps-default"

SEED = 2026
HELD_OUT_STILLS, HELD_OUT_CLIPS = 250, 30
STILL_SIDE, STILL_QUALITY = 112, 65
CLIP_SIDE, CLIP_FPS, CLIP_CRF = 128, 12, 28
FULL_CLIP_SIDE, FULL_CLIP_FPS, FULL_CLIP_CRF = 256, 24, 23

_PICTURES = r"package/assets/[^/]+\.webp"
_STAMP_FOLDER = "usr/share/tuxpaint/stamps/"
_SECONDS_BETWEEN_LINES = 5.0

T = TypeVar("T")


def _track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Passes the items on: with a progress bar on a terminal, else with a line every few seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            yield from progress.track(items, total=total, description=what)
        return
    begin = said = time.monotonic()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            print(
                f"{what}: {done}/{total}, {done / (now - begin):.1f} per second", file=sys.stderr, flush=True
            )
    print(f"{what}: {done}/{total} in {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)


def _read_words(folder: Path | None) -> dict[str, emoji.Emoji]:
    with packages.npm_tarball(WORDS, folder) as tarball:
        data = packages.npm_json(tarball, "package/en/data.json")
        messages = packages.npm_json(tarball, "package/en/messages.json")
    return emoji.read_table(data, messages)


@contextmanager
def _pictures(package: NpmPackage, folder: Path | None) -> Iterator[Iterator[tuple[str, bytes]]]:
    """(file stem, content) of each picture of a package, one in memory at a time."""
    with packages.npm_tarball(package, folder) as tarball:
        total = len(packages.npm_names(tarball, _PICTURES))
        members = packages.npm_members(tarball, _PICTURES)
        tracked = _track(members, total, package.name)
        yield ((PurePosixPath(name).stem.lower(), data) for name, data in tracked)


def _word(words: dict[str, emoji.Emoji], stem: str) -> emoji.Emoji:
    try:
        return words[emoji.normal_code(stem)]
    except KeyError:
        raise UserError(f"{WORDS.specification} has no label for the picture {stem!r}") from None


def _json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    ordered = sorted(rows, key=lambda row: row["path"])
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered).encode()


def _replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()


def bundle(corpus: Path, folder: Path | None) -> None:
    """Rewrites `corpus`: all stills with alpha, the base emoji that move (one package), their captions."""
    words = _read_words(folder)
    stills: dict[str, bytes] = {}
    signatures = {}
    with _pictures(STILLS, folder) as pictures:
        for stem, data in pictures:
            word = _word(words, stem)
            stills[stem] = emoji_media.shrink(data, STILL_SIDE, STILL_QUALITY)
            if word.code == word.base and word.code not in signatures:
                with emoji_media.open_picture(data) as image:
                    signatures[word.code] = emoji_media.signature(image)
    clips: dict[str, bytes] = {}
    with _pictures(BUNDLED_ANIMATIONS, folder) as pictures:
        for stem, data in pictures:
            word = _word(words, stem)
            if word.code != word.base:
                continue
            frames = emoji_media.animation_frames(data, CLIP_SIDE, CLIP_FPS)
            if emoji_media.moves(frames):
                clips[stem] = emoji_media.encode_clip(frames, CLIP_FPS, CLIP_CRF)

    held_out = emoji.draw_held_out(
        signatures,
        (_word(words, stem).base for stem in clips),
        emoji_media.lookalikes(signatures),
        stills=HELD_OUT_STILLS,
        clips=HELD_OUT_CLIPS,
        seed=SEED,
    )
    images = emoji.image_items({stem: _word(words, stem) for stem in stills}, held_out)
    moving = emoji.clip_items({stem: _word(words, stem) for stem in clips}, held_out)
    _replace_folder(corpus / "images", {f"{stem}.webp": data for stem, data in stills.items()})
    _replace_folder(corpus / "clips", {f"{stem}.mp4": data for stem, data in clips.items()})
    (corpus / "images.jsonl").write_bytes(_json_lines(item.as_dict() for item in images))
    table = objects.object_rows({stem: _word(words, stem) for stem in stills})
    (corpus / "objects.jsonl").write_bytes(_json_lines(table))
    (corpus / "clips.jsonl").write_bytes(_json_lines(item.as_dict() for item in moving))
    size = sum(path.stat().st_size for path in corpus.rglob("*") if path.is_file())
    print(f"{len(stills)} stills, {len(clips)} clips, {size / 1e6:.2f} MB in {corpus}")


def _bundled_held_out() -> set[str]:
    """The held-out bases of the bundled corpus: the full-size corpora are split in the same way."""
    lines = (CORPUS / "images.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["base"] for row in rows if row["split"] != "train"}


class _Target:
    """The storage that a corpus is fetched into: files that are there already are not made again."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        storage.check(write=True)
        self._storage = storage
        self._there = {file.path for file in storage.list(prefix) if file.size > 0}
        self.counts: Counter[str] = Counter()

    def has(self, path: str) -> bool:
        if path in self._there:
            self.counts["there already"] += 1
            return True
        return False

    def write(self, path: str, data: bytes) -> None:
        self._storage.write_bytes(path, data)
        self.counts["written"] += 1

    def close(self, table: str, rows: Iterable[dict[str, Any]]) -> None:
        """Writes the captions last: a table that exists names only files that exist."""
        self._storage.write_bytes(table, _json_lines(rows))
        counted = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        print(f"{self._storage.url_of(table)}: {counted}")


def fetch_emoji(storage: Storage, folder: Path | None) -> None:
    """All 3,391 stills as they are in the package (256 px, with alpha)."""
    words, held_out = _read_words(folder), _bundled_held_out()
    target = _Target(storage, "images/")
    files = {}
    with _pictures(STILLS, folder) as pictures:
        for stem, data in pictures:
            files[stem] = _word(words, stem)
            if not target.has(f"images/{stem}.webp"):
                target.write(f"images/{stem}.webp", data)
    target.close("objects.jsonl", objects.object_rows(files))
    target.close("images.jsonl", (item.as_dict() for item in emoji.image_items(files, held_out)))


def fetch_emoji_clips(
    storage: Storage, folder: Path | None, animations: Sequence[NpmPackage] = ANIMATIONS
) -> None:
    """All animations that move, as H.264 clips on white (256 px, 24 frames per second)."""
    words, held_out = _read_words(folder), _bundled_held_out()
    target = _Target(storage, "clips/")
    files = {}
    for package in animations:
        with _pictures(package, folder) as pictures:
            for stem, data in pictures:
                word, path = _word(words, stem), f"clips/{stem}.mp4"
                if not target.has(path):
                    frames = emoji_media.animation_frames(data, FULL_CLIP_SIDE, FULL_CLIP_FPS)
                    if not emoji_media.moves(frames):
                        target.counts["stand still: left out"] += 1
                        continue
                    target.write(path, emoji_media.encode_clip(frames, FULL_CLIP_FPS, FULL_CLIP_CRF))
                files[stem] = word
    target.close("clips.jsonl", (item.as_dict() for item in emoji.clip_items(files, held_out)))


def _stamp_split(caption: str) -> emoji.Split:
    """One in ten captions is held out; stamps with the same caption stay together."""
    return "held-out" if derive_seed(SEED, "demo.stamps", caption.casefold()) % 10 == 0 else "train"


def fetch_stamps(storage: Storage, folder: Path | None) -> None:
    """The PNG stamps of Tux Paint (GPL-2) with the English caption of each; letters and SVG are left out."""
    target = _Target(storage, "stamps/")
    rows = []
    with packages.debian_package(STAMPS, folder) as package:
        captions: dict[str, str] = {}
        total = 0
        for name, text in packages.debian_members(package, rf"(\./)?{_STAMP_FOLDER}.*\.(txt|png|svg)"):
            if name.endswith(".txt"):
                captions[name.removesuffix(".txt")] = _first_line(text)
            else:
                total += 1
        pictures = packages.debian_members(package, rf"(\./)?{_STAMP_FOLDER}.*\.(png|svg)")
        for name, data in _track(pictures, total, STAMPS):
            path = "stamps/" + name[name.index(_STAMP_FOLDER) + len(_STAMP_FOLDER) :]
            caption = captions.get(name.rsplit(".", 1)[0], "")
            if "/symbols/alphabets/" in name:
                target.counts["letters: left out"] += 1
            elif name.endswith(".svg"):
                target.counts["svg: left out"] += 1
            elif not caption:
                target.counts["without a caption (mirror images): left out"] += 1
            else:
                group = PurePosixPath(path).parts[1]
                split = _stamp_split(caption)
                rows.append(
                    {"path": path, "caption": caption, "captions": [caption], "group": group, "split": split}
                )
                if not target.has(path):
                    target.write(path, data)
    target.close("stamps.jsonl", rows)


def _first_line(text: bytes) -> str:
    lines = text.decode("utf-8", errors="replace").lstrip("\ufeff").splitlines()
    return lines[0].strip() if lines else ""


CORPORA = {"emoji": fetch_emoji, "emoji-clips": fetch_emoji_clips, "stamps": fetch_stamps}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo.build_corpus", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="take the packages from this folder (`npm pack`, `apt-get download`), not the network",
    )
    verbs.add_parser("bundle", parents=[common], help="rebuild the corpus that is part of this repository")
    fetch = verbs.add_parser("fetch", parents=[common], help="write a full-size corpus into a storage")
    fetch.add_argument("corpus", choices=sorted(CORPORA))
    fetch.add_argument("storage", metavar="STORAGE_URL", help="a folder, file:///... or s3://bucket/prefix")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for what the user can put right, 1 for a storage that stays away."""
    chosen = _arguments().parse_args(arguments)
    try:
        if chosen.verb == "bundle":
            bundle(CORPUS, chosen.packages)
        else:
            CORPORA[chosen.corpus](open_storage(chosen.storage), chosen.packages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageFault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
