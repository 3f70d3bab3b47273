"""Promises of the filters: each drops what it names, under its own cause, and a choice is not bad data."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import textwrap
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from sharding.candidate import Examiner
from sharding.config import PrepareConfig
from sharding.errors import BadData, UserError
from sharding.filters.build import build_filters
from sharding.filters.config import FilterConfig, chosen
from sharding.filters.duplicates import digest_words, later_copies
from sharding.filters.resolve import resolved
from sharding.filters.words import BlockedWords, count_words, words
from sharding.media import Encoded, MediaInfo
from sharding.sources import Input
from sharding.sources.fetch import Fetched
from sharding.storage import open_storage


def _config(**changes) -> PrepareConfig:
    values = {
        "source": {"kind": "table", "path": "/x/t.csv", "path_column": "p", "caption_column": "c"},
        "modality": "image",
    }
    return PrepareConfig.model_validate(values | changes)


def _png(width: int = 40, height: int = 30) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    return sink.getvalue()


def _animation(kind: str, frames: int) -> bytes:
    sink = io.BytesIO()
    pictures = [Image.new("RGB", (20, 20), (90 * number, 0, 0)) for number in range(frames)]
    pictures[0].save(sink, kind, save_all=True, append_images=pictures[1:])
    return sink.getvalue()


def _examine(*filters: dict, captions=("a caption",), media: bytes | None = None, not_text: int = 0):
    item = Input(address="a.png", captions=list(captions), not_text=not_text)
    fetched = Fetched(item, media=_png() if media is None else media)
    (candidate,) = Examiner(_config(filters=list(filters))).examine(fetched).candidates
    return candidate


def _cause(*filters: dict, **options) -> str:
    with pytest.raises(BadData) as caught:
        _examine(*filters, **options)
    return caught.value.cause


def _caption(**limits) -> dict:
    return {"kind": "caption", **limits}


@pytest.mark.parametrize(
    ("block", "caption", "cause"),
    [
        (_caption(min_characters=5), "four", "caption-too-short"),
        (_caption(max_characters=3), "four", "caption-too-long"),
        (_caption(min_words=3), "two words", "caption-too-short"),
        (_caption(max_words=1), "two words", "caption-too-long"),
        (_caption(min_letters=0.6), "IMG 0042 x", "caption-characters"),
        (_caption(max_non_ascii=0.2), "ein Häßchen ößä", "caption-characters"),
        (_caption(max_repeated_characters=0.3), "wow !!!!!!", "caption-repetitive"),
        (_caption(max_repeated_words=0.5), "buy Buy BUY now", None),
        (_caption(max_repeated_words=0.4), "buy Buy BUY now", "caption-repetitive"),
        (_caption(min_letters=0.9), "Ein süßes 狗", None),
        ({"kind": "language", "keep": ["en"]}, "ein kleiner Hund läuft über die grüne Wiese", "language"),
        ({"kind": "language", "keep": ["en", "de"]}, "ein kleiner Hund läuft über die Wiese", None),
        ({"kind": "language", "keep": ["en"], "min_probability": 0.999}, "a red car", "language"),
        ({"kind": "blocked_words", "words": ["Stock Photo"]}, "a STOCK photo of", "blocked-words"),
    ],
)
def test_captions_are_dropped_by_cause_and_that_is_a_choice(block, caption, cause):
    if cause is None:
        assert _examine(block, captions=[caption]).captions == [caption]
    else:
        assert _cause(block, captions=[caption]) == cause
        assert chosen(cause)


@pytest.mark.parametrize("captions", [[], ["", " \n\t"], ["\u200b\u0000"]])
def test_an_empty_caption_never_passes_whatever_the_filters(captions):
    assert _cause(captions=captions) == "caption-empty"
    assert not chosen("caption-empty")


def test_captions_that_are_no_text_are_told_apart_from_empty_ones():
    assert _cause(captions=[], not_text=2) == "caption-not-text"


def test_a_sample_lives_on_by_its_good_captions_and_the_others_are_counted():
    candidate = _examine(
        _caption(min_words=2),
        captions=["one", "  two\n words ", "two words", "", "three more words"],
        not_text=1,
    )
    assert candidate.captions == ["two words", "three more words"]
    assert candidate.captions_dropped == {"caption-empty": 1, "caption-not-text": 1, "caption-too-short": 1}


def test_language_probabilities_are_normalised():
    for minimum, passes in ((0.0, True), (0.5, True), (1.0, False)):
        block = {"kind": "language", "keep": ["en"], "min_probability": minimum}
        captions = ["the quick brown fox jumps over the lazy dog"]
        if passes:
            assert _examine(block, captions=captions).captions == captions
        else:
            assert _cause(block, captions=captions) == "language"


@pytest.mark.parametrize(
    ("entry", "caption", "hit"),
    [
        ("cat", "the CAT sat", True),
        ("cat", "a category", False),
        ("straße", "in der STRASSE", True),
        ("ﬁne", "a fine day", True),  # the ligature
        ("caf\u00e9", "Cafe\u0301 noir", True),  # composed and decomposed
        ("two words", "two  words".replace("  ", " "), True),
        ("two words", "two other words", False),
        ("c++", "learn c++ today", True),
        ("c++", "vitamin c today", False),
        ("bad", "b\u200bad", True),  # a zero-width space hides nothing
        ("狗", "一只狗在跑", True),
        ("ก", "กี่", False),  # in scripts without spaces too
        ("น้ำ", "เล่นน้ำที่", True),
        ("ガラス", "ｶﾞﾗｽの窓", True),  # half width
        ("का", "काम", False),  # a mark belongs to its word
    ],
)
def test_blocked_words_are_whole_words_in_any_case_and_form(entry, caption, hit):
    assert (BlockedWords([entry]).objection(caption) == "blocked-words") is hit


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("a dog runs", 3),
        ("狗在跑", 3),
        ("猫が窓のそばで眠っている", 12),
        ("สุนัขวิ่ง", 5),  # vowels and tones above and below are marks
        ("ຫມາກິນ", 5),
        ("ឆ្កែរត់", 4),
        ("ခွေးပြေး။", 2),
        ("강아지가 잔디밭에서 뛴다", 3),  # Korean has spaces
        ("我有2只iPhone手机", 7),
        ("ｶﾞﾗｽの窓", 5),
        ("ｈｅｌｌｏ　ｗｏｒｌｄ", 2),
        ("「猫」です。", 3),
        ("猫 🐶 dog-friendly -- 々", 5),
        ("๒๕๖๓ ปี", 2),  # a number is one
        ("𠮷野家", 3),  # beyond the basic plane
        ("काम करो", 2),
        ("naïve cafe\u0301", 2),
        ("。", 1),
        ("", 0),
    ],
)
def test_words_are_counted_by_their_script(caption, found):
    assert count_words(caption) == len(words(caption)) == found


@pytest.mark.parametrize(
    ("block", "caption", "cause"),
    [
        (_caption(min_words=4), "狗在跑", "caption-too-short"),
        (_caption(min_words=3), "狗在跑", None),
        (_caption(max_words=60), "狗" * 600, "caption-too-long"),
        (_caption(max_repeated_words=0.4), "买买买它", "caption-repetitive"),
        (_caption(max_repeated_words=0.5), "买买买它", None),
        (_caption(max_repeated_words=0.4), "buy ＢＵＹ buy 它", None),
        (_caption(min_letters=0.9), "ခွေးပြေး", None),  # mostly marks
        (_caption(min_letters=0.9), "कुत्ता दौड़ता है", None),
        (_caption(min_letters=0.9), "狗狗。。", "caption-characters"),
    ],
)
def test_limits_on_words_hold_in_scripts_without_spaces(block, caption, cause):
    objections = [
        rule.objection(caption) for rule in build_filters(_config(filters=[block]).filters).captions
    ]
    assert next((found for found in objections if found), None) == cause


def test_a_blocked_word_drops_its_caption_or_the_sample_as_configured():
    block = {"kind": "blocked_words", "words": ["secret"]}
    captions = ["a plain caption", "a secret one"]
    assert _examine(block, captions=captions).captions == ["a plain caption"]
    assert _cause(block | {"what": "sample"}, captions=captions) == "blocked-words"
    # Also by a caption that another filter leaves out.
    blocks_in_order = [_caption(max_words=3), block | {"what": "sample"}]
    assert _cause(*blocks_in_order, captions=["fine", "a secret in many words"]) == "blocked-words"


def test_a_list_of_blocked_words_is_part_of_the_digest_and_its_place_is_not(tmp_path):
    storage = open_storage(tmp_path)
    digests = {}
    for name, text in (
        ("a ä.txt", "# list\nfoo\n\nbar baz\n"),
        ("b.txt", "bar baz\nfoo"),
        ("c.txt", "foo\n"),
    ):
        (tmp_path / name).write_text(text)
        config = _config(filters=[{"kind": "blocked_words", "path": str(tmp_path / name)}])
        found = resolved(config, storage, {})
        assert found.filters[0].path is None
        digests[name] = found.digest
    assert digests["a ä.txt"] == digests["b.txt"] != digests["c.txt"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), (b"# nothing\n", "no entry"), (b"\xff\xfe\xff", "not UTF-8")],
)
def test_a_list_of_blocked_words_that_cannot_be_used_is_a_user_error(tmp_path, content, says):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    config = _config(filters=[{"kind": "blocked_words", "path": str(path)}])
    with pytest.raises(UserError, match=rf"words\.txt .*{says}"):
        resolved(config, open_storage(tmp_path), {})


@pytest.mark.parametrize(
    ("block", "size", "cause"),
    [
        ({"kind": "size", "min": 31}, (40, 30), "too-small"),
        ({"kind": "size", "max": 39}, (40, 30), "too-large"),
        ({"kind": "aspect", "max": 1.3}, (40, 30), "aspect"),
        ({"kind": "pixels", "max": 1199}, (40, 30), "too-many-pixels"),
        ({"kind": "pixels", "min": 1201}, (40, 30), "too-few-pixels"),
    ],
)
def test_images_are_dropped_by_their_header(block, size, cause):
    assert _cause(block, media=_png(*size)) == cause
    assert chosen(cause)


def test_a_header_is_judged_before_its_pixels_are_decoded():
    assert _cause({"kind": "size", "min": 100}, media=_png()[:60]) == "too-small"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_images_are_kept_dropped_or_alone_kept(kind):
    moving, still = _animation(kind, 3), _animation(kind, 1)
    drop, only = {"kind": "animated"}, {"kind": "animated", "images": "only"}
    assert _examine(media=moving).captions
    assert _cause(drop, media=moving) == "animated"
    assert _examine(drop, media=still).captions
    assert _cause(only, media=still) == "not-animated"
    assert _examine(only, media=moving).captions


def test_the_pages_of_a_tiff_are_no_animation():
    assert _examine({"kind": "animated"}, media=_animation("TIFF", 3)).captions


@pytest.mark.parametrize(
    ("block", "frames", "seconds", "cause"),
    [
        ({"kind": "duration", "min": 2.1}, 16, 2.0, "clip-too-short"),
        ({"kind": "duration", "max": 1.9}, 16, 2.0, "clip-too-long"),
        ({"kind": "frames", "min": 17}, 16, 2.0, "too-few-frames"),
        ({"kind": "frames", "max": 15}, 16, 2.0, "too-many-frames"),
        ({"kind": "fps", "min": 8.1}, 16, 2.0, "fps-too-low"),
        ({"kind": "fps", "max": 7.9}, 16, 2.0, "fps-too-high"),
        ({"kind": "fps", "min": 8, "max": 8}, 16, 2.0001, None),
    ],
)
def test_clips_are_dropped_by_what_is_stored_of_them(block, frames, seconds, cause):
    config = _config(modality="video", filters=[block], video={"clip_s": 9, "max_frames": 99})
    media = Encoded(b"", "mp4", MediaInfo(8, 8, frames, seconds))
    filters = build_filters(config.filters)
    if cause is None:
        filters.check_stored(media, ["x"])
        return
    with pytest.raises(BadData) as caught:
        filters.check_stored(media, ["x"])
    assert caught.value.cause == cause
    assert chosen(cause)


def test_what_is_exactly_at_the_limit_stays():
    assert _examine(
        {"kind": "size", "min": 30, "max": 40},
        {"kind": "aspect", "max": 4 / 3},
        {"kind": "pixels", "min": 1200, "max": 1200},
        _caption(min_characters=9, max_characters=9, max_words=2, min_letters=1, max_non_ascii=0),
    ).captions


def test_of_several_filters_the_first_in_the_list_names_the_cause():
    small, narrow = {"kind": "size", "min": 100}, {"kind": "aspect", "max": 1.1}
    assert (_cause(small, narrow), _cause(narrow, small)) == ("too-small", "aspect")


def test_broken_and_empty_files_are_bad_data_rather_than_filtered():
    for media in (b"", b"not an image", _png()[:60]):
        cause = _cause(media=media)
        assert cause == "decode-failed"
        assert not chosen(cause)


def test_every_cause_of_every_filter_is_a_choice():
    kinds = get_args(get_args(FilterConfig)[0])
    assert len(kinds) == 14
    for kind in kinds:
        assert all(chosen(cause) for cause in kind.causes), kind
    assert not chosen("missing-file")


CUSTOM = """
    class NotShouting:
        level = "caption"
        def __init__(self, share=0.5):
            self.share = share
        def keeps(self, caption):
            return sum(map(str.isupper, caption)) <= self.share * len(caption)

    class Landscape:
        level = "header"
        def keeps(self, info):
            return info.width > info.height

    class Small_Enough:
        level = "stored"
        def __init__(self, limit):
            self.limit = limit
        def keeps(self, media, captions):
            return len(media.data) <= self.limit and captions != ["x"]

    class NoLevel:
        def keeps(self, caption):
            return True

    not_a_class = 3
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A working directory with the module ``shop_filters``, as a user would have it."""
    (tmp_path / "shop_filters.py").write_text(textwrap.dedent(CUSTOM))
    (tmp_path / "broken_filters.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("shop_filters", None)


def test_a_class_of_the_users_decides_at_its_level(custom):
    shouting = {"kind": "custom", "filter": "shop_filters.NotShouting", "arguments": {"share": 0.2}}
    assert _cause(shouting, captions=["BUY now"]) == "custom-not-shouting"
    assert _cause(shouting | {"name": "loud"}, captions=["BUY now"]) == "custom-loud"
    assert _examine(shouting, captions=["buy now"]).captions
    landscape = {"kind": "custom", "filter": "shop_filters.Landscape"}
    assert _cause(landscape, media=_png(30, 40)) == "custom-landscape"
    assert _examine(landscape).captions
    small = {"kind": "custom", "filter": "shop_filters.Small_Enough", "arguments": {"limit": 10}}
    assert _cause(small) == "custom-small-enough"
    assert chosen("custom-small-enough")
    assert _cause(small | {"arguments": {"limit": 10**6}}, captions=["x"]) == "custom-small-enough"


def test_the_users_class_and_its_arguments_are_in_the_digest(custom):
    def digest(**changes) -> str:
        block = {"kind": "custom", "filter": "shop_filters.NotShouting"} | changes
        return _config(filters=[block]).digest

    plain = digest()
    assert digest() == plain
    assert plain not in (digest(arguments={"share": 0.1}), digest(name="loud"))
    assert digest(filter="shop_filters.Landscape") != plain


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"filter": "nowhere_filters.X"}, "nowhere_filters.X cannot be imported: ModuleNotFoundError"),
        ({"filter": "broken_filters.X"}, "nowhere_to_be_found"),
        ({"filter": "shop_filters.Missing"}, "shop_filters has no class Missing"),
        ({"filter": "shop_filters.not_a_class"}, "has no class not_a_class"),
        ({"filter": "shop_filters.NoLevel"}, "level = caption | header | stored"),
        ({"filter": "shop_filters.NotShouting", "arguments": {"shere": 1}}, "does not take these arguments"),
        ({"filter": "os"}, "pattern"),
    ],
)
def test_a_class_that_cannot_filter_is_refused_at_validation(custom, block, says):
    with pytest.raises(ValidationError, match=says.replace("|", r"\|")):
        _config(filters=[{"kind": "custom"} | block])


def test_of_equal_digests_the_first_in_input_order_stays():
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in "abcabba"]
    assert later_copies(digest_words(digests)).tolist() == [False, False, False, True, True, True, True]
    assert later_copies(np.empty((0, 2), np.uint64)).tolist() == []


def test_later_copies_agrees_with_a_set_on_many_digests():
    numbers = np.random.default_rng(0).integers(0, 300, 1000)
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    seen: set[str] = set()
    expected = [digest in seen or seen.add(digest) is not None for digest in digests]
    assert later_copies(digest_words(digests)).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image": {"format": "jpg", "alpha": "keep"}}, "alpha"),
        ({"video": {"resize": 64}}, "video does not belong"),
        (
            {
                "modality": "video",
                "filters": [{"kind": "frames", "min": 10}],
                "video": {"max_frames": 5},
            },
            "longer clips",
        ),
        (
            {
                "modality": "video",
                "filters": [{"kind": "duration", "min": 10}],
                "video": {"clip_s": 5},
            },
            "longer clips",
        ),
        ({"filters": [{"kind": "fps", "min": 10}]}, "fps does not belong"),
        ({"modality": "video", "filters": [{"kind": "animated"}]}, "animated does not belong"),
        ({"filters": {"min_size": 3}}, "list"),
        ({"filters": [{"kind": "sizes"}]}, "sizes"),
        ({"filters": [{"min": 3}]}, "kind"),
        ({"filters": [{"kind": "size"}]}, "at least one of min, max"),
        ({"filters": [{"kind": "size", "min": 9, "max": 8}]}, "nothing would pass"),
        ({"filters": [{"kind": "caption"}]}, "at least one of min_characters"),
        ({"filters": [{"kind": "language", "keep": ["xq"]}]}, "no language xq; there are .*en"),
        ({"filters": [{"kind": "blocked_words"}]}, "either words or path"),
        ({"filters": [{"kind": "blocked_words", "words": [" "]}]}, "empty entry"),
        ({"filters": [{"kind": "near_duplicates", "distance": 17}]}, "distance"),
        ({"filters": [{"kind": "duplicates"}, {"kind": "duplicates"}]}, "twice"),
        ({"filters": [{"kind": "score"}, {"kind": "score"}]}, "one score only"),
        (
            {"source": {"kind": "table", "path": "/x.csv", "caption_column": "c"}},
            "either path_column or url_column",
        ),
        ({"source": {"kind": "ftp", "path": "/x"}}, "kind"),
        ({"bad_limit": 1.5}, "bad_limit"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        _config(**changes)


def test_without_a_word_about_filters_exact_duplicates_are_dropped():
    assert [block.kind for block in _config().filters] == ["duplicates"]
    assert _config(filters=[]).corpus_filters == []


def test_the_configuration_digest_covers_what_changes_the_dataset_and_nothing_else():
    plain = _config().digest
    assert _config(fetch={"threads": 2}, bad_limit=0.5, task_retries=0).digest == plain
    assert _config(image={"quality": 85}).digest == plain
    assert _config(image={"quality": 84}).digest != plain
    assert _config(samples_per_shard=7).digest != plain
    assert _config(filters=[{"kind": "duplicates", "by": "bytes"}]).digest == plain
    assert _config(filters=[]).digest != plain


def test_the_blocks_are_light_to_import():
    heavy = "{'pyarrow', 'ray', 'torch', 'PIL', 'numpy', 'py3langid'}"
    code = f"import sys, sharding.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
