"""Promises of the closing report: it stands alone, runs nothing, is bounded, and depends on the data alone."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sharding.contact import DROPPED, KEPT, Collector, ContactSheet, make_thumbnail
from sharding.errors import BadData
from sharding.manifest import Counts, Manifest
from sharding.media import Encoded, MediaInfo
from sharding.report_page import report_page
from sharding.sources import Input
from sharding.sources.fetch import Fetched
from sharding.statistics import Distribution, Statistics
from sharding.summary import Summary

EVIL = "<script>alert('1')</script><img src=http://evil.example/x onerror=alert(2)> \"quoted\" \x1b[31m \u202egnp"


def _noise(seed: int, side: int = 300) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG", quality=95)
    return sink.getvalue()


def _collector(task: int, rows: range, media: bytes, tasks: int = 1, text: str = "a caption") -> Collector:
    """Every third input of a task is dropped, by one of two causes."""
    collector = Collector(f"{task:06d}", "image", "image", tasks)
    inputs = [Fetched(Input(f"{text} {row}.jpg", [f"{text} {row}"]), media) for row in rows]
    for row, fetched in enumerate(collector.watch(inputs)):
        if row % 3 == 0:
            fault = BadData("aspect" if row % 2 else "decode-failed", text)
            collector.drop(row, fetched.input.address, fault)
        else:
            encoded = Encoded(media, "jpg", MediaInfo(300, 300))
            collector.keep(
                row, f"{task:06d}-{row:06d}", encoded, fetched.input.captions, fetched.input.address
            )
    return collector


def _manifest(text: str = "pairs", dropped: dict[str, int] | None = None) -> Manifest:
    dropped = dropped if dropped is not None else {"aspect": 200, "decode-failed": 3}
    return Manifest(
        name=text, modality="image", configuration={"filters": [{"words": [text]}]}, configuration_digest="0" * 64,
        source={"url": f"file:///{text}", "inputs": 1000, "digest": "1" * 64}, shards=[],
        counts=Counts(read=1000, kept=1000 - sum(dropped.values()), dropped=dropped, captions_dropped={text: 3}),
    )  # fmt: skip


class _Elements(HTMLParser):
    """The names and attributes of all elements, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_of_the_corpus_is_shown_and_never_interpreted():
    sheet = _collector(0, range(30), _noise(0), text=EVIL).sheet()
    statistics = Statistics(
        samples=1, extensions={EVIL: 1}, distributions={"width": Distribution.of(np.ones(3))}
    )
    summary = Summary(statistics, sheet, {EVIL: [EVIL]})
    page = report_page(_manifest(EVIL, {EVIL: 5, "aspect": 2, "decode-failed": 4}), summary)
    elements = _Elements(page)
    assert "script" not in elements.tags
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    sources = [value for name, value in elements.attributes if name in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "alert('1')" in elements.text
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_needs_no_other_file_and_forbids_itself_to_load_one():
    page = report_page(_manifest(), Summary(sheet=_collector(0, range(9), _noise(0)).sheet()))
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[a-z]|url\(|@import|<link|<iframe""", page)


def test_the_page_is_bounded_whatever_the_corpus():
    causes = {f"cause-{number:03d}": 1000 - number for number in range(60)}
    collector = Collector("000000", "image", "image", 1)
    heavy = _noise(1, 128)
    for number in range(KEPT):
        encoded = Encoded(heavy, "jpg", MediaInfo(300, 300))
        collector.keep(number, f"k{number}", encoded, ["x" * 10_000], "y" * 10_000)
    fetched = [Fetched(Input("a", ["c" * 10_000]), heavy)] * len(causes)
    for row, _ in enumerate(collector.watch(fetched)):
        for _ in range(DROPPED + 1):
            collector.drop(row, "z" * 10_000, BadData(f"cause-{row:03d}", "d" * 10_000))
    spread = {"width": Distribution.of(np.random.default_rng(0).lognormal(0, 30, 10_000))}
    summary = Summary(
        Statistics(distributions=spread), collector.sheet(), dict.fromkeys(causes, ["e" * 9999] * 9)
    )
    page = report_page(_manifest(dropped=causes), summary).encode()
    assert 500_000 < len(page) < 2_000_000


def test_the_sheet_is_the_same_however_the_inputs_are_cut_and_merged():
    media = _noise(2, 40)
    sheets = [_collector(task, range(40), media, tasks=12).sheet() for task in range(12)]
    forwards, backwards, nested = ContactSheet(), ContactSheet(), ContactSheet()
    for sheet in sheets:
        forwards = forwards.plus(sheet)
    for sheet in reversed(sheets):
        backwards = backwards.plus(sheet)
    for start in range(0, 12, 4):
        part = ContactSheet()
        for sheet in sheets[start : start + 4]:
            part = part.plus(sheet)
        nested = nested.plus(part)
    assert forwards == backwards == nested
    assert len(forwards.kept) == KEPT
    assert {cause: len(found) for cause, found in forwards.dropped.items()} == dict.fromkeys(
        ("aspect", "decode-failed"), DROPPED
    )
    assert len({picture.key for picture in forwards.kept}) == KEPT
    assert ContactSheet.from_json(forwards.to_json()) == forwards


def test_samples_that_turn_out_to_be_copies_move_to_the_dropped():
    sheet = _collector(0, range(30), _noise(3, 40)).sheet()
    key = sheet.kept[4].key
    moved = sheet.without({key: "duplicate", "another": "near-duplicate"})
    assert [picture.key for picture in moved.dropped["duplicate"]] == [key]
    assert len(moved.kept) == len(sheet.kept) - 1
    assert "near-duplicate" not in moved.dropped


@pytest.mark.parametrize("data", [b"", b"no picture", _noise(4)[:2000]])
def test_what_cannot_be_decoded_has_no_thumbnail(data):
    assert make_thumbnail(data, "image") == b""
    assert make_thumbnail(data, "video") == b""


def test_large_media_are_not_held_but_shown(monkeypatch):
    monkeypatch.setattr("sharding.contact._HELD_BYTES", 10)
    large = _collector(0, range(30), _noise(5, 60)).sheet()
    monkeypatch.setattr("sharding.contact._HELD_BYTES", 1 << 20)
    assert large == _collector(0, range(30), _noise(5, 60)).sheet()
    with Image.open(io.BytesIO(large.kept[0].thumbnail)) as image:
        assert image.size == (60, 60)


def test_a_page_of_no_samples_is_a_page():
    assert "Nothing was dropped." in report_page(_manifest(dropped={}), Summary())
