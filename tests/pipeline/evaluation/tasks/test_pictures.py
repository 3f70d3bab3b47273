"""Images come in the order of the items that ask for them; those that cannot be read are counted by cause."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader, ReadAhead, Skipped
from sharding.errors import BadData, BadDataLimit
from sharding.storage import Storage
from tests.pipeline.evaluation.tasks.small import picture


def test_images_are_read_from_any_folder_and_faults_have_their_cause(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes("images/a.png", picture(0))
    storage.write_bytes("images/broken.png", b"no picture")
    storage.write_bytes("other/b.png", picture(1))
    reader = ImageReader(storage)
    assert reader.pixels(ImageAddress("images", "a.png")).shape == (33, 40, 3)
    elsewhere = reader.pixels(ImageAddress(f"{storage.url}/other", "b.png"))
    assert not np.array_equal(elsewhere, reader.pixels(ImageAddress("images", "a.png")))
    for path, cause, said in (
        ("broken.png", "decode-failed", "images/broken.png"),
        ("none.png", "missing-image", "images/none.png"),
        ("../other/b.png", "bad-address", "'..'"),
    ):
        with pytest.raises(BadData, match=said) as caught:
            reader.pixels(ImageAddress("images", path))
        assert caught.value.cause == cause
    monkeypatch.setattr("pipeline.evaluation.tasks.pictures._MAX_BYTES", 100)
    with pytest.raises(BadData, match="too-large"):
        reader.pixels(ImageAddress("images", "a.png"))


def address(number: int) -> ImageAddress:
    return ImageAddress("images", str(number))


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_items_keep_their_order_and_an_image_of_several_is_read_once(ahead: int) -> None:
    read: Counter[str] = Counter()
    lock = threading.Lock()

    def fit(one: ImageAddress) -> str:
        with lock:
            read[one.path] += 1
        if one.path == "4":
            raise BadData("decode-failed", one.path)
        return f"pixels of {one.path}"

    skipped = Skipped("t", 40, 0.2)
    stream = ReadAhead[int, str](fit, lambda item: [address(item // 5), address(99)], ahead, skipped)
    found = list(stream.over(range(40)))
    assert found == [
        (item, [f"pixels of {item // 5}", "pixels of 99"]) for item in range(40) if item // 5 != 4
    ]
    assert skipped.count == 5
    assert set(read.values()) == {1}


def test_no_more_is_read_in_advance_than_asked_for() -> None:
    taken = []

    def items() -> object:
        for item in range(100):
            taken.append(item)
            yield item

    stream = ReadAhead[int, int](
        lambda one: int(one.path), lambda item: [address(item)], 7, Skipped("t", 100, 0)
    )
    first = next(stream.over(items()))  # type: ignore[arg-type]
    assert first == (0, [0])
    assert len(taken) == 8


def test_too_much_that_cannot_be_read_ends_with_the_counts() -> None:
    skipped = Skipped("held-out", 10, 0.2)
    skipped.note(BadData("missing-image", "there is no a.png"))
    skipped.note(BadData("decode-failed", "b.png"))
    with pytest.raises(BadDataLimit) as caught:
        skipped.note(BadData("missing-image", "there is no c.png"))
    assert str(caught.value) == (
        "evaluation 'held-out': more than 20.0% of 10 samples cannot be read (decode-failed: 1, missing-image: 2), "
        "the last: there is no c.png"
    )
