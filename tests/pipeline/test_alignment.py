"""``glscl align``: the right patch glows in the right panel, words stay inside theirs, and mistakes are named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from model import GLSCLConfig, GLSCLForPreTraining, GLSCLProcessor, WordMaps
from pipeline.alignment import picture
from pipeline.alignment.lettering import fitted, lettering, wrapped
from pipeline.alignment.picture import colours, draw_alignment, draw_region
from pipeline.cli import main
from tests.pipeline.trained_run import make_trained_run

CORPUS = Path(__file__).resolve().parents[2] / "pipeline/demo/corpus"
OWL, CLIP = CORPUS / "images/1f989.webp", CORPUS / "clips/1f9a0.mp4"
Align = Callable[..., tuple[int, str, str]]


def _maps(words: list[str], frames: int | None = None, hot: tuple[int, ...] = (1, 2)) -> WordMaps:
    """On 4 x 4 patches: even words and the caption flat, odd ones with all their attention on ``hot``."""
    shape = (4, 4) if frames is None else (frames, 4, 4)
    peak = torch.zeros(shape)
    peak[hot] = 1
    flat = torch.full(shape, 0.5)
    spans = tuple((0, len(word)) for word in words)
    maps = torch.stack([peak if number % 2 else flat for number in range(len(words))])
    return WordMaps(tuple(words), spans, maps, flat, "")


def _panel(drawn: Image.Image, number: int, columns: int, frames: int = 1, frame: int = 0) -> np.ndarray:
    """Pixels of a panel's frame in a picture whose title has one line."""
    row, column = divmod(number, columns)
    left = picture._MARGIN + column * (picture._PANEL + picture._GAP)
    top = picture._MARGIN + picture._LINE + picture._GAP + picture._HEAD + frame * (picture._PANEL + 2)
    top += row * (picture._HEAD + frames * (picture._PANEL + 2) - 2 + picture._GAP)
    pixels = np.asarray(drawn)[top : top + picture._PANEL, left : left + picture._PANEL]
    return pixels.astype(np.int64)


def test_the_attended_patch_glows_in_its_words_panel_and_no_other() -> None:
    black = np.zeros((1, 50, 50, 3), dtype=np.uint8)
    drawn = draw_alignment(black, _maps(["flat", "hot"]), "flat hot")
    glow = _panel(drawn, 3, columns=3).sum(axis=2)
    row, column = np.unravel_index(glow.argmax(), glow.shape)
    assert (row * 4 // picture._PANEL, column * 4 // picture._PANEL) == (1, 2)
    assert glow[150:].max() < glow.max() / 2
    for number in (1, 2):
        assert len(np.unique(_panel(drawn, number, columns=3).reshape(-1, 3), axis=0)) == 1


def test_a_clips_frames_lie_below_each_other() -> None:
    black = np.zeros((3, 50, 50, 3), dtype=np.uint8)
    drawn = draw_alignment(black, _maps(["flat", "hot"], frames=3, hot=(2, 0, 3)), "flat hot")
    brightest = [_panel(drawn, 3, 4, frames=3, frame=frame).sum(axis=2) for frame in range(3)]
    assert brightest[2].max() > 2 * max(brightest[0].max(), brightest[1].max())
    row, column = np.unravel_index(brightest[2].argmax(), brightest[2].shape)
    assert (row * 4 // picture._PANEL, column * 4 // picture._PANEL) == (0, 3)


def test_a_region_is_outlined_over_its_map_in_the_pictures_own_shape() -> None:
    region = np.zeros((60, 120), dtype=bool)
    region[15:45, 60:90] = True
    values = np.zeros((4, 4))
    values[1, 2] = 1
    drawn = draw_region(np.zeros((64, 64, 3), dtype=np.uint8), values, region)
    assert drawn.size == (200, 100)
    pixels = np.asarray(drawn).astype(np.int64)
    frame = np.array([0xD9, 0x77, 0x06])
    lined = (pixels == frame).all(axis=2)
    rows, columns = np.nonzero(lined)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 74, 100, 149)
    assert not lined[30:70, 105:145].any()
    glow = np.where(lined, 0, pixels.sum(axis=2))
    row, column = np.unravel_index(glow.argmax(), glow.shape)
    assert (row * 4 // 100, column * 4 // 200) == (1, 2)


def test_maps_lie_over_the_part_of_the_picture_that_the_model_sees() -> None:
    wide = np.zeros((1, 100, 300, 3), dtype=np.uint8)
    wide[:, :, 100:200] = 255  # the centre crop
    drawn = draw_alignment(wide, _maps(["flat"]), "flat")
    assert len(np.unique(_panel(drawn, 1, columns=3).reshape(-1, 3), axis=0)) == 1
    original = _panel(drawn, 0, columns=3)
    assert original[100, 100].tolist() == [255, 255, 255]
    assert original[100, 20].tolist() == [0, 0, 0]
    assert original[20, 100].tolist() == [
        0xF3,
        0xF4,
        0xF6,
    ]  # nothing: the panel is square, the picture is not


def test_the_colour_map_grows_evenly_lighter() -> None:
    scale = colours(np.linspace(0, 1, 33))
    lightness = scale @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert scale[0].tolist() == [68, 1, 84]
    assert scale[-1].tolist() == [253, 231, 37]


LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"


@pytest.mark.parametrize(
    "words", [["one"], ["猫" * 30, LONG, "ثعلب"], [f"word{n}" for n in range(30)], [LONG] * 5]
)
def test_nothing_is_written_beyond_the_panels(words: list[str]) -> None:
    frames = np.full((1, 60, 60, 3), 128, dtype=np.uint8)
    drawn = draw_alignment(frames, _maps(words), " ".join(words) + " " + LONG * 4)
    pixels = np.asarray(drawn)
    assert (pixels[:, : picture._MARGIN] == 255).all()
    assert (pixels[:, -picture._MARGIN :] == 255).all()
    assert 0.3 < drawn.width / drawn.height < 3


@pytest.mark.parametrize("text", ["fox", LONG, "猫" * 40, "\U0010fffe" * 9, "mixed 猫 words " * 9, "i" * 500])
def test_a_line_never_exceeds_its_width(text: str) -> None:
    assert 0 < fitted(text, 120, 19, 11).width <= 120
    rows = wrapped(text, 150, 22, lines=3)
    assert 1 <= len(rows) <= 3
    assert all(0 < row.width <= 150 for row in rows)


def test_a_line_that_fits_is_written_whole_and_one_that_does_not_shrinks_before_it_is_cut() -> None:
    def text(line: str, width: int) -> str:
        return "".join(run for run, _ in fitted(line, width, 19, 11).runs)

    needed = lettering("a longer word", 19).width
    assert text("a longer word", round(needed) + 1) == "a longer word"
    assert text("a longer word", round(needed * 0.8)) == "a longer word"
    assert text("a longer word", round(needed * 0.4)).endswith("…")


def test_letters_that_no_font_has_are_written_as_code_points() -> None:
    (run, _), *more = lettering("a\U0010fffeb \U0010fffe", 19).runs
    assert not more
    assert run == "a U+10FFFEb U+10FFFE"


def test_every_letter_of_a_word_is_seen() -> None:
    """What is drawn for each is something, and not the font's sign for what it lacks."""
    for word in ("naïve", "лиса", "żółw"):
        for run, font in lettering(word, 19).runs:
            for letter in run:
                shapes = []
                for sign in (letter, "\U0010ffff", " "):
                    canvas = Image.new("L", (60, 60))
                    ImageDraw.Draw(canvas).text((10, 10), sign, fill=255, font=font)
                    shapes.append(canvas.tobytes())
                assert len(set(shapes)) == 3, (word, letter)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = GLSCLConfig.preset(
        "tiny",
        image_size=32,
        hidden_size=24,
        intermediate_size=32,
        vision_layers=1,
        text_layers=1,
        fusion_layers=1,
    )
    GLSCLForPreTraining(config).save_pretrained(folder)
    GLSCLProcessor.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def align(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Align:
    """Runs ``glscl align`` in this process, with ``model_folder`` and ``tmp_path/out.png`` unless told."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        given = [str(argument) for argument in arguments]
        for option, value in (("--model", model_folder), ("--out", tmp_path / "out.png")):
            if option not in given:
                given += [option, str(value)]
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["glscl", "align", *given])
        with pytest.raises(SystemExit) as caught:
            main()
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (OWL, [], "3 words over 4 x 4 patches"),
        (OWL, ["--resolution", "48"], "3 words over 6 x 6 patches"),
        (CLIP, ["--frames", "2"], "3 words over 4 x 4 patches"),
        (OWL.as_uri(), [], "3 words over 4 x 4 patches"),
    ],
)
def test_an_image_or_a_clip_becomes_a_picture(
    align: Align, tmp_path: Path, source: str | Path, options: list[str], said: str
) -> None:
    code, output, error = align(source, "brown owl, eyes", *options)
    assert (code, error) == (0, "")
    assert said in output
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG"
        colours_of_maps = np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours_of_maps) > 100


def test_a_still_webp_and_a_moving_gif_are_told_apart(align: Align, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], duration=200)
    frames[0].save(tmp_path / "still.gif")
    heights = []
    for name in ("moving.gif", "still.gif"):
        assert align(tmp_path / name, "red", "--frames", "3")[0] == 0
        heights.append(Image.open(tmp_path / "out.png").height)
    assert heights[0] == heights[1] + 2 * (picture._PANEL + 2)


def test_a_checkpoint_serves_as_model(align: Align, tmp_path: Path) -> None:
    run = make_trained_run(tmp_path)
    checkpoint = run.checkpoint(4, tmp_path / "scratch")
    for address in (run.run.url, run.run.url_of(checkpoint.path)):
        assert align(OWL, "an owl", "--model", address)[0] == 0
        assert (tmp_path / "out.png").stat().st_size > 1000
        (tmp_path / "out.png").unlink()


def test_a_caption_over_the_limit_is_cut_and_said_to_be(align: Align) -> None:
    code, output, _ = align(OWL, "owl " * 80)
    assert code == 0
    assert "the model reads 50 tokens; not read: " in output
    assert output.endswith(" owl owl owl\n")


def test_mistakes_end_with_one_clear_line_and_no_picture(align: Align, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.webp").write_bytes(OWL.read_bytes()[:300])
    (tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[:300])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    for arguments, message in (
        ((tmp_path / "none.jpg", "a"), "none.jpg: there is no such file"),
        ((tmp_path, "a"), "Is a directory"),
        ((tmp_path / "text.jpg", "a"), "text.jpg is no image or clip that can be read"),
        ((tmp_path / "cut.webp", "a"), "cut.webp is no image or clip that can be read"),
        ((tmp_path / "cut.mp4", "a"), "cut.mp4 is no image or clip that can be read"),
        ((OWL, ""), "the caption '' has no word"),
        ((OWL, " ?! "), "has no word"),
        (
            (OWL, "a", "--resolution", "30"),
            "--resolution 30: must be a multiple of the model's patch size, 8",
        ),
        ((CLIP, "a", "--frames", "9"), "--frames 9: the model takes 8 at most"),
        ((OWL, "a", "--out", tmp_path / "out.jpg"), "is a PNG file"),
        ((OWL, "a", "--out", tmp_path / "text.jpg/out.png"), "--out"),
        ((OWL, "a", "--model", tmp_path / "nowhere"), "nowhere does not exist"),
        ((OWL, "a", "--model", tmp_path / "other"), "model_type 'bert'"),
        ((OWL, "a", "--model", tmp_path / "list"), "model_type None"),
    ):
        code, _, error = align(*arguments)
        assert (code, len(error.splitlines())) == (2, 1), (arguments, error)
        assert message in error
    assert not (tmp_path / "out.png").exists()


def test_a_model_folder_that_is_not_whole_is_refused(
    align: Align, model_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    state = load_file(broken / "model.safetensors")
    del state["glscl.text_pooler.dense.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, error = align(OWL, "owl", "--model", broken)
    assert code == 2
    assert "lacks 1 of the model's parameters, text_pooler.dense.weight the first" in error
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    code, _, error = align(OWL, "owl", "--model", broken)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "does not load as a model" in error
    (broken / "model.safetensors").unlink()
    code, _, error = align(OWL, "owl", "--model", broken)
    assert (code, len(error.splitlines())) == (2, 1)
    assert "does not load as a model" in error
