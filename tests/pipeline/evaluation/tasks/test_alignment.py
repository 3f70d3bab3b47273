"""ALIGN-BENCH: scores are those of the paper's words taken literally, on both layouts of the annotations."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as transforms
from PIL import Image

from model import GLSCLForPreTraining, WordMaps
from pipeline.evaluation.result import TaskResult
from pipeline.evaluation.tasks.alignment import task as alignment
from pipeline.evaluation.tasks.alignment.config import AlignmentTask
from pipeline.evaluation.tasks.alignment.data import AlignmentData, AnnotatedImage, Phrase
from pipeline.evaluation.tasks.alignment.scores import region, score_image, share, words_of
from pipeline.evaluation.tasks.pictures import ImageAddress, ImageReader
from sharding.errors import BadData, BadDataLimit, UserError
from sharding.storage import Storage, open_storage
from tests.pipeline.evaluation.tasks.small import context_of, picture, tiny_model

WIDTH, HEIGHT = 60, 40
CAPTIONS = [
    'A red-hot fox, and the "blue" owl.',
    "two cats on a mat; a mat.",
    "the whale swims by the Owl and the whale",
    "unhappily, an ant's photograph",
]
PHRASES = [["red-hot fox", "blue"], ["cats", "a mat"], ["whale", "owl"], ["unhappily", "ant's photograph"]]


def mask_of(box: tuple[int, int, int, int], generator: np.random.Generator) -> np.ndarray:
    x1, y1, x2, y2 = box
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y1:y2, x1:x2] = generator.random((y2 - y1, x2 - x1)) > 0.3
    return mask


def regions(count: int = 12) -> list[dict[str, list[tuple[tuple[int, int, int, int], np.ndarray]]]]:
    """For each image, for each phrase its boxes and masks; some boxes are background."""
    generator = np.random.default_rng(2)
    found = []
    for number in range(count):
        image = {}
        for text in PHRASES[number % 4]:
            boxes = []
            for _ in range(int(generator.integers(1, 3))):
                x1, y1 = int(generator.integers(0, 40)), int(generator.integers(0, 25))
                boxes.append(
                    (x1, y1, x1 + int(generator.integers(5, 20)), y1 + int(generator.integers(5, 15)))
                )
            if number % 3 == 0 and text == PHRASES[number % 4][0]:
                boxes[0] = (0, 1, WIDTH, HEIGHT)
            image[text] = [(box, mask_of(box, generator)) for box in boxes]
        found.append(image)
    return found


def write_published(storage: Storage) -> None:
    for number, image in enumerate(regions()):
        storage.write_bytes(f"bench/images/{number:03d}.jpg", picture(number, "JPEG", (WIDTH, HEIGHT)))
        annotation = {
            text: [{"bbox_mask": np.array(box, float) + 0.3, "pixel_mask": mask} for box, mask in parts]
            for text, parts in image.items()
        }
        value = {"caption": CAPTIONS[number % 4], "annotation": annotation}
        storage.write_bytes(f"bench/pkls/{number:03d}.pkl", pickle.dumps(value))


def write_one_file(storage: Storage, *, by_path: bool = False) -> None:
    items = []
    for number, image in enumerate(regions()):
        caption = CAPTIONS[number % 4]
        storage.write_bytes(f"scenes/i/{number}.png", picture(number, "PNG", (WIDTH, HEIGHT)))
        phrases = []
        for text, parts in image.items():
            start = caption.lower().index(text)
            everything = np.zeros((HEIGHT, WIDTH), np.uint8)
            for _, mask in parts:
                everything |= mask.astype(np.uint8)
            phrases.append(
                {
                    "phrase": text,
                    "span": [start, start + len(text)],
                    "boxes": [list(box) for box, _ in parts],
                    "mask": everything,
                }
            )
        items.append({"image": f"i/{number}.png", "caption": caption, "phrases": phrases})
    value: Any = {item["image"]: item for item in items} if by_path else items
    storage.write_bytes("scenes/scenes.pkl", pickle.dumps(value))


PUBLISHED = {"annotations": "bench/pkls", "images": "bench/images"}
ONE_FILE = {"annotations": "scenes/scenes.pkl", "images": "scenes"}


def task_of(**options: Any) -> AlignmentTask:
    return AlignmentTask(**{"name": "align", **PUBLISHED, **options})


@pytest.fixture
def here(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


@pytest.fixture(scope="module")
def model() -> GLSCLForPreTraining:
    """Its attention is uneven, as a trained model's is."""
    model = tiny_model(GLSCLForPreTraining, vision_layers=2)
    with torch.no_grad():
        model.glscl.fusion.text_stream.cross_attention[-1].query.weight.mul_(40)
    return model


def evaluate(model: GLSCLForPreTraining, storage: Storage, **options: Any) -> TaskResult:
    return alignment.evaluate(context_of(model, storage), task_of(**options))


#: Words of each caption and, of each phrase, the numbers of its words; from reading them.
WORDS = [
    ["A", "red-hot", "fox", "and", "the", "blue", "owl"],
    ["two", "cats", "on", "a", "mat", "a", "mat"],
    ["the", "whale", "swims", "by", "the", "Owl", "and", "the", "whale"],
    ["unhappily", "an", "ant's", "photograph"],
]
OF_PHRASES = [[[1, 2], [5]], [[1], [3, 4]], [[1], [5]], [[0], [2, 3]]]
_MARKS = set("-,.;\"'")


@torch.no_grad()
def literal_scores(model: GLSCLForPreTraining, storage: Storage) -> dict[str, list[float]]:
    """GLSCL's description of the benchmark (section 7 of its reading here), one image at a time.

    The attention is what the model shows of itself (``output_attentions``), the resizing torchvision's; words are
    put together from the tokenizer's pieces.
    """
    context, reader = context_of(model, storage), ImageReader(storage)
    scores: dict[str, list[float]] = {
        f"{way}_{kind}": [] for way in ("global", "local") for kind in ("box", "pixel")
    }
    for number, image in enumerate(regions()):
        caption = CAPTIONS[number % 4]
        pixels = reader.pixels(ImageAddress("bench/images", f"{number:03d}.jpg"))
        square = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
        inputs = context.processor(images=square, text=caption)
        attention = model.glscl(**inputs, output_attentions=True).text_cross_attentions[-1][
            0
        ]  # [H, T, 1 + P]
        maps = attention[:, :, 1:].amax(dim=0).unflatten(-1, (4, 4)).double()
        pieces = context.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        of_words: list[list[int]] = []
        for token, piece in enumerate(pieces):
            if piece in ("<s>", "</s>"):
                continue
            if piece.startswith("Ġ") or token == 1:
                of_words.append([])
            if piece.strip("Ġ") not in _MARKS:
                of_words[-1].append(token)
        assert len(of_words) == len(WORDS[number % 4])

        def score(of_map: torch.Tensor, where: np.ndarray) -> float:
            coarse = transforms.resize(
                torch.from_numpy(where).double()[None],
                [4, 4],
                transforms.InterpolationMode.BICUBIC,
                antialias=False,
            )[0]
            return float((of_map * coarse).sum() / of_map.sum())

        whole_box, whole_pixel = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
        own: dict[str, list[float]] = {"box": [], "pixel": []}
        for (_, parts), words in zip(image.items(), OF_PHRASES[number % 4], strict=True):
            of_phrase = sum(maps[token] for word in words for token in of_words[word])
            box_region, pixel_region = np.zeros((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)
            for (x1, y1, x2, y2), mask in parts:
                box_region[y1:y2, x1:x2] = True
                pixel_region |= mask
                if (x2 - x1) * (y2 - y1) <= 0.9 * WIDTH * HEIGHT:
                    whole_box[y1:y2, x1:x2] = True
                    whole_pixel |= mask
            own["box"].append(score(of_phrase, box_region))  # type: ignore[arg-type]
            own["pixel"].append(score(of_phrase, pixel_region))  # type: ignore[arg-type]
        scores["global_box"].append(score(maps[0], whole_box))
        scores["global_pixel"].append(score(maps[0], whole_pixel))
        for kind, values in own.items():
            scores[f"local_{kind}"].append(float(np.mean(values)))
    return scores


def test_scores_are_those_of_a_literal_transcription(model: GLSCLForPreTraining, here: Storage) -> None:
    write_published(here)
    expected = literal_scores(model, here)
    found = evaluate(model, here)
    values = {name: one.values for family in found.families for name, one in family.metrics.items()}
    assert values.keys() == expected.keys()
    for name, one in expected.items():
        assert values[name] == pytest.approx(one, rel=3e-5), name
        assert found.metrics[name] == pytest.approx(np.mean(one), rel=3e-5)
        # The attention is no constant, so the numbers could not come from the regions alone.
        assert abs(found.metrics[name] - found.facts[f"chance_{name}"]) > 1e-3
    assert found.facts["images"] == 12
    assert found.facts["phrases"] == 24
    assert found.facts["phrases_not_found"] == found.facts["skipped"] == 0
    assert [family.keys[0] for family in found.families] == ["000", "000"]


@pytest.mark.parametrize("by_path", [False, True])
def test_one_pickle_of_all_images_gives_the_same_scores(
    model: GLSCLForPreTraining, here: Storage, by_path: bool
) -> None:
    write_one_file(here, by_path=by_path)
    for number in range(12):
        data = here.read_bytes(f"scenes/i/{number}.png")
        here.write_bytes(f"bench/images/{number:03d}.jpg", data)  # named so, a PNG all the same
    expected = literal_scores(model, here)
    found = evaluate(model, here, **ONE_FILE)
    values = {name: one.values for family in found.families for name, one in family.metrics.items()}
    for name in ("local_box", "local_pixel", "global_box"):
        assert values[name] == pytest.approx(expected[name], rel=3e-5), name
    # One mask for several boxes: what of it is within the boxes that are no background.
    for number in (1, 2, 4, 5, 7, 8, 10, 11):
        assert values["global_pixel"][number] == pytest.approx(expected["global_pixel"][number], rel=3e-5)
    assert found.families[0].keys[0] == "i/0.png"


def test_the_batch_size_changes_nothing_to_the_last_digit(model: GLSCLForPreTraining, here: Storage) -> None:
    write_published(here)
    runs = [evaluate(model, here, batch_size=size) for size in (1, 5, 64)]
    assert runs[0].metrics == runs[1].metrics == runs[2].metrics
    assert runs[0].examples == runs[1].examples == runs[2].examples


def test_annotations_are_read_from_any_storage(storage: Storage) -> None:
    write_published(storage)
    task = task_of(annotations=f"{storage.url}/bench/pkls", images=f"{storage.url}/bench/images", limit=3)
    data = AlignmentData(storage, task)
    images = list(data)
    assert len(data) == len(images) == 3
    assert images[1].image.path == "001.jpg"
    first = task_of().data_digest(storage, {})
    assert task.data_digest(storage, {}) == first
    storage.delete("bench/pkls/003.pkl")
    assert task_of().data_digest(storage, {}) != first


def hand_maps(words: list[str], maps: torch.Tensor, text_class: torch.Tensor) -> WordMaps:
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return WordMaps(tuple(words), tuple(spans), maps, text_class, "")


def box(*corners: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = corners
    return x1, y1, x2, y2


def test_attention_by_hand() -> None:
    # Regions that are whole patches of 2 x 2: at its centre a patch is in or out, as far as a cubic sees neighbours.
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3, 1  # "fox": three quarters at the upper left
    maps[1] = 1  # "owl": everywhere
    left, all_of_it = np.zeros((400, 400), bool), np.ones((400, 400), bool)
    left[:200, :200] = True
    fox = Phrase("fox", None, (box(0, 0, 200, 200),), (left,))
    owl = Phrase("owl", None, (box(0, 0, 400, 400),), (all_of_it,))
    annotated = AnnotatedImage("x", ImageAddress("i", "x"), "fox owl", (fox, owl))
    found = score_image(annotated, hand_maps(["fox", "owl"], maps, torch.ones(4, 4)), 400, 400)
    assert found.phrases[0].box.value == pytest.approx(0.75, abs=1e-6)
    assert found.phrases[0].box.uniform == pytest.approx(0.25, abs=1e-6)
    assert found.phrases[1].pixel.value == pytest.approx(1.0, abs=1e-6)
    # "owl" is background for the whole caption.
    assert found.box.value == pytest.approx(0.25, abs=1e-6)
    assert found.pixel.value == pytest.approx(0.25, abs=1e-6)


def test_attention_that_is_no_number_scores_nothing() -> None:
    assert share(torch.full((2, 2), float("nan")), np.ones((4, 4), bool)).value == 0.0


def test_a_box_of_more_than_nine_tenths_is_background() -> None:
    mask = np.ones((10, 10), bool)
    for corners, kept in ((box(0, 0, 10, 9), True), (box(0, 0, 10, 10), False)):
        boxes, pixels = region(Phrase("x", None, (corners,), (mask,)), 10, 10, without_background=True)
        assert (bool(boxes.any()), bool(pixels.any())) == (kept, kept)
        boxes, pixels = region(Phrase("x", None, (corners,), (mask,)), 10, 10)
        assert (bool(boxes.any()), bool(pixels.any())) == (True, True)


def test_of_one_mask_for_all_boxes_what_is_in_none_but_background_is_left_out() -> None:
    mask = np.ones((10, 10), bool)
    phrase = Phrase("x", None, (box(0, 0, 10, 10), box(2, 3, 5, 9)), (mask,))
    boxes, pixels = region(phrase, 10, 10, without_background=True)
    expected = np.zeros((10, 10), bool)
    expected[3:9, 2:5] = True
    assert np.array_equal(boxes, expected)
    assert np.array_equal(pixels, expected)
    assert region(phrase, 10, 10)[1].all()


def test_boxes_end_at_the_images_edge() -> None:
    boxes, _ = region(Phrase("x", None, (box(-3, 8, 4, 99),), (np.ones((10, 10)),)), 10, 10)
    expected = np.zeros((10, 10), bool)
    expected[8:, :4] = True
    assert np.array_equal(boxes, expected)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("red fox", [1, 2]),
        ("Red  FOX", [1, 2]),
        ("fox and", [2, 3]),
        ("the red", []),
        ("fo", []),
        ("fox!", [2]),
        ("fox and a", [2, 3, 4]),
        ("?", []),
    ],
)
def test_a_phrase_is_found_by_its_words(phrase: str, expected: list[int]) -> None:
    maps = hand_maps(["a", "red", "fox", "and", "a", "fox"], torch.ones(6, 2, 2), torch.ones(2, 2))
    assert words_of(Phrase(phrase, None, (), ()), maps) == expected


@pytest.mark.parametrize(
    ("span", "expected"), [((2, 9), [1, 2]), ((0, 1), [0]), ((6, 7), [2]), ((5, 6), []), ((7, 11), [2, 3])]
)
def test_a_phrase_is_found_by_its_span(span: tuple[int, int], expected: list[int]) -> None:
    maps = hand_maps(["a", "red", "fox", "and"], torch.ones(4, 2, 2), torch.ones(2, 2))
    assert words_of(Phrase("whatever", span, (), ()), maps) == expected


def test_phrases_and_images_that_cannot_be_scored_are_counted(
    model: GLSCLForPreTraining, here: Storage
) -> None:
    write_published(here)
    mask = np.ones((HEIGHT, WIDTH), bool)

    def rewrite(number: int, caption: str, phrase: str, mask: np.ndarray = mask) -> None:
        part = {"bbox_mask": (0, 0, 9, 9), "pixel_mask": mask}
        value = {"caption": caption, "annotation": {phrase: [part]}}
        here.write_bytes(f"bench/pkls/{number:03d}.pkl", pickle.dumps(value))

    rewrite(0, "a fox", "an owl")  # no such words
    rewrite(1, "cat " * 60 + "owl", "owl")  # beyond what the model reads
    rewrite(2, "?!", "fox")
    rewrite(3, "a fox", "fox", mask[:, :-1])
    here.delete("bench/images/004.jpg")
    found = evaluate(model, here, bad_limit=0.3)
    assert found.facts["skipped"] == 3
    assert found.facts["phrases_not_found"] == 2
    whole, parts = found.families
    assert whole.keys == ["000", "001", *(f"{number:03d}" for number in range(5, 12))]
    assert parts.keys == whole.keys[2:]
    with pytest.raises(BadDataLimit, match="missing-image"):
        evaluate(model, here, bad_limit=0.0)
    with pytest.raises(BadDataLimit, match=r"mask-size: 1, missing-image: 1, no-words: 1"):
        evaluate(model, here, bad_limit=0.2)
    for number in range(12):
        rewrite(number, "?!", "fox")
    with pytest.raises(UserError, match="none of the images of bench/images can be used"):
        evaluate(model, here, bad_limit=1)


def test_a_mask_of_another_size_names_both() -> None:
    phrase = Phrase("fox", None, (box(0, 0, 2, 2),), (np.ones((4, 5)),))
    annotated = AnnotatedImage("k", ImageAddress("i", "x"), "fox", (phrase,))
    with pytest.raises(BadData, match=r"k, 'fox': a mask of 5 x 4 for an image of 4 x 5"):
        score_image(annotated, hand_maps(["fox"], torch.ones(1, 2, 2), torch.ones(2, 2)), 5, 4)


GOOD = {
    "image": "x.png",
    "caption": "a fox",
    "phrases": [{"phrase": "fox", "span": [2, 5], "boxes": [[0, 0, 1, 1]], "mask": np.ones((2, 2))}],
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "phrases": [{**GOOD["phrases"][0], **changes}]}  # type: ignore[dict-item, index]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "a.pkl has no images"),
        (3, "a.pkl must hold a list of images, or a dict, not int"),
        ([GOOD, 3], "a.pkl, item 1 has no 'image'"),
        ([{**GOOD, "image": 3}], "item 0, 'image' must be text, and not empty"),
        ([{**GOOD, "caption": " "}], "item 0, 'caption' must be text, and not empty"),
        ({"x.png": {"phrases": []}}, "a.pkl, 'x.png' has no 'caption'"),
        ({3: GOOD}, "a.pkl: a key must be text"),
        ([{"image": "x", "caption": "x"}], "item 0 has no 'phrases'"),
        ([{**GOOD, "phrases": []}], "item 0 must be a list that is not empty, not list"),
        ([changed(span=[3, 3])], "phrase 0, 'span' is not .first, end. within the caption's 5 characters"),
        ([changed(span=[2, 6])], "phrase 0, 'span' is not"),
        ([changed(span=[0, 1.0])], "phrase 0, 'span' is not"),
        ([changed(boxes=[])], "'boxes' must be a list that is not empty"),
        ([changed(boxes=[[1, 2, 3]])], "phrase 0: a box must be four numbers"),
        ([changed(boxes=[[1, 2, 3, float("nan")]])], "phrase 0: a box must be four numbers"),
        ([changed(boxes=[1])], "phrase 0: a box must be a list"),
        ([changed(mask=np.ones((2, 2, 1)))], "phrase 0: a mask must be an array"),
        ([changed(mask=[[1]])], "phrase 0: a mask must be an array"),
        ([changed(phrase="")], "'phrase' must be text"),
        ([changed(boxes=[[0, 0, 1, 1]] * 2001)], "item 0 has more than 2000 boxes"),
        ([{**GOOD, "annotation": [1]}], "item 0, 'annotation' is no dict but list"),
        ([{**GOOD, "annotation": {"fox": []}}], "item 0, 'fox' must be a list that is not empty"),
        ([{**GOOD, "annotation": {"fox": [{"bbox_mask": [0, 0, 1, 1]}]}}], "'fox' has no 'pixel_mask'"),
    ],
)
def test_annotations_of_another_form_are_named(here: Storage, value: Any, said: str) -> None:
    here.write_bytes("a.pkl", pickle.dumps(value))
    here.write_bytes("images/x.png", picture(0))
    with pytest.raises(UserError, match=said):
        AlignmentData(here, task_of(annotations="a.pkl", images="images"))


def test_an_image_with_several_captions_has_a_key_for_each(here: Storage) -> None:
    here.write_bytes("a.pkl", pickle.dumps([GOOD, GOOD, GOOD]))
    here.write_bytes("images/x.png", picture(0))
    data = AlignmentData(here, task_of(annotations="a.pkl", images="images", limit=2))
    assert [one.key for one in data] == ["x.png", "x.png#2"]


def test_missing_annotations_are_named(here: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    here.write_bytes("images/x.png", picture(0))
    here.write_bytes("empty/notes.txt", b"x")
    for address, said in (
        ("none.pkl", r"^annotations: there is no file .*/none\.pkl"),
        ("none", "/none does not exist"),
        ("empty", r"^annotations: there are no \.pkl files below .*/empty"),
    ):
        with pytest.raises(UserError, match=said):
            AlignmentData(here, task_of(annotations=address, images="images"))
    write_published(here)
    here.write_bytes("bench/pkls/001.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93.")
    with pytest.raises(UserError, match=r"/001\.pkl is refused: it holds os\.system"):
        list(AlignmentData(here, task_of()))
    monkeypatch.setattr("pipeline.evaluation.tasks.alignment.data._MOST_BYTES", 100)
    with pytest.raises(UserError, match=r"annotations: .*/000\.pkl has more than"):
        list(AlignmentData(here, task_of()))


def test_examples_are_maps_with_their_regions_outlined(model: GLSCLForPreTraining, here: Storage) -> None:
    write_published(here)
    found = evaluate(model, here)
    assert len(found.examples) == 12
    first = found.examples[0]
    assert first.right is None
    assert first.pictures[0][1].startswith("whole caption: box ")
    assert len(first.pictures) == 3
    with Image.open(io.BytesIO(first.pictures[0][0])) as drawn:
        assert drawn.format == "JPEG"
        assert drawn.width / drawn.height == pytest.approx(WIDTH / HEIGHT, rel=0.02)
    assert len(evaluate(model, here, limit=2).examples) == 2
