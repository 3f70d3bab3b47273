"""The words of the demo corpus: codes, captions and the held-out split of the emoji.

Labels, tags, groups and skin tones: npm `emojibase-data` 17.0.0, `en/data.json` and `en/messages.json`.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sharding.seeds import derive_seed

Split = Literal["train", "held-out", "held-out-variant"]

_TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}
_VARIATION_SELECTOR = "fe0f"
_BLACK_FLAG, _END_OF_TAGS = "1f3f4", "e007f"


@dataclass(frozen=True)
class Emoji:
    """One emoji of the table; `base` is the code of the emoji that it is a skin tone of, or its own."""

    code: str
    base: str
    label: str
    tags: tuple[str, ...]
    group: str
    kind: str
    skin_tone: str | None


@dataclass(frozen=True)
class Item:
    """One line of images.jsonl or clips.jsonl; `path` is relative to the file's own folder."""

    path: str
    captions: list[str]
    base: str
    group: str
    skin_tone: str | None
    split: Split

    def as_dict(self) -> dict[str, Any]:
        """The line's fields; ``caption`` repeats the first, for tables read with one caption each."""
        fields = asdict(self)
        return {"path": fields.pop("path"), "caption": self.captions[0], **fields}


def normal_code(stem: str) -> str:
    """One spelling for the code points of an emoji: the packages differ in case, padding, joiners and FE0F.

    >>> normal_code("0023-FE0F-20E3"), normal_code("23-fe0f-20e3")
    ('0023-20e3', '0023-20e3')
    """
    points = [point.zfill(4) for point in stem.lower().replace("_", "-").split("-")]
    points = [point for point in points if point != _VARIATION_SELECTOR]
    if points[0] == _BLACK_FLAG and points[1:] and points[1].startswith("e00") and points[-1] != _END_OF_TAGS:
        points.append(_END_OF_TAGS)  # the picture packages leave out the tag that ends the flag of a region
    return "-".join(points)


def _phrase(label: str) -> str:
    """The label as one would say it: "waving hand: light skin tone" -> "waving hand with light skin tone"."""
    head, colon, rest = label.partition(": ")
    if not colon:
        return label
    if head == "flag":
        return f"flag of {rest}"
    if head == "keycap":
        return f"keycap {rest}"
    parts = rest.split(", ")
    if all(part.endswith((" skin tone", " hair", "beard", "bald")) for part in parts):
        return f"{head} with {' and '.join(parts)}"
    return label


def read_table(data: Iterable[Mapping[str, Any]], messages: Mapping[str, Any]) -> dict[str, Emoji]:
    """The emoji by normal code, from emojibase's `data.json` and `messages.json`."""
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    kinds = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    table: dict[str, Emoji] = {}
    for entry in data:
        base = normal_code(entry["hexcode"])
        group = groups.get(entry.get("group"), "other")
        kind = kinds.get(entry.get("subgroup"), group)
        for form in (entry, *entry.get("skins", ())):
            tone = form.get("tone", [])
            tones = [_TONES[number] for number in (tone if isinstance(tone, list) else [tone])]
            code = normal_code(form["hexcode"])
            table[code] = Emoji(
                code=code,
                base=base,
                label=_phrase(form["label"]),
                tags=tuple(tag for tag in entry.get("tags", ()) if tag != entry["label"]),
                group=group,
                kind=kind,
                skin_tone=" and ".join(tones) or None,
            )
    return table


def _hints(emoji: Emoji) -> str:
    """The tags as text; the kind of the emoji where it has no tags."""
    return ", ".join(emoji.tags or (emoji.kind,))


def image_captions(emoji: Emoji) -> list[str]:
    """What a still shows. The first caption says most (label and tags): retrieval uses it as the query."""
    tone = (f"{emoji.skin_tone} skin tone",) if emoji.skin_tone else ()
    return [
        f"{emoji.label}: {_hints(emoji)}",
        emoji.label,
        f"{emoji.label} ({emoji.kind})",
        ", ".join((_hints(emoji), *tone)),
    ]


def clip_captions(emoji: Emoji) -> list[str]:
    """What a clip shows; again the first says most."""
    return [
        f"an animation of {emoji.label}: {_hints(emoji)}",
        f"an animation of {emoji.label}",
        f"{emoji.label} moving",
        f"a short clip of {emoji.label} ({emoji.kind})",
    ]


def _draw(bases: Iterable[str], count: int, seed: int) -> set[str]:
    """The `count` bases with the smallest seeded numbers; a number depends on no other base."""
    return set(sorted(bases, key=lambda base: (derive_seed(seed, "demo.held-out", base), base))[:count])


def draw_held_out(
    still_bases: Iterable[str],
    clip_bases: Iterable[str],
    ambiguous: Iterable[str],
    *,
    stills: int,
    clips: int,
    seed: int,
) -> set[str]:
    """The base emoji to hold out among stills and clips alike.

    `clips` of them move; the other `stills - clips` have no clip: each base is on one side everywhere.
    `ambiguous` bases (whose picture another base shares) are never drawn: nothing could tell them apart.
    """
    moving = set(clip_bases)
    clear = set(still_bases) - set(ambiguous)
    held_out = _draw(clear & moving, clips, seed)
    return held_out | _draw(clear - moving, stills - len(held_out), seed)


def split_files(files: Mapping[str, Emoji], held_out: Container[str]) -> dict[str, Split]:
    """The side of each file (stem -> emoji): "held-out" has one file for each base that is held out.

    Their other files (skin tones, second spellings of a code) are "held-out-variant": never trained on.
    """
    sides: dict[str, Split] = {}
    taken: set[str] = set()
    for stem, emoji in sorted(files.items()):
        if emoji.base not in held_out:
            sides[stem] = "train"
        elif emoji.code == emoji.base and emoji.base not in taken:
            sides[stem] = "held-out"
            taken.add(emoji.base)
        else:
            sides[stem] = "held-out-variant"
    return sides


def _items(
    files: Mapping[str, Emoji],
    held_out: Container[str],
    folder: str,
    extension: str,
    captions: Callable[[Emoji], list[str]],
) -> list[Item]:
    return [
        Item(
            path=f"{folder}/{stem}{extension}",
            captions=captions(files[stem]),
            base=files[stem].base,
            group=files[stem].group,
            skin_tone=files[stem].skin_tone,
            split=side,
        )
        for stem, side in split_files(files, held_out).items()
    ]


def image_items(files: Mapping[str, Emoji], held_out: Container[str]) -> list[Item]:
    """The lines of images.jsonl for the stills of these file stems."""
    return _items(files, held_out, "images", ".webp", image_captions)


def clip_items(files: Mapping[str, Emoji], held_out: Container[str]) -> list[Item]:
    """The lines of clips.jsonl for the clips of these file stems."""
    return _items(files, held_out, "clips", ".mp4", clip_captions)
