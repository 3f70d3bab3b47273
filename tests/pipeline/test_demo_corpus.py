"""The bundled demo corpus is whole, honest about its split, and what the committed script makes."""

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.demo import build_corpus, emoji, emoji_media, objects, packages
from pipeline.demo.packages import PackageError
from sharding.storage import open_storage
from tests.fixtures.corpora import CORPUS, corpus_rows

IMAGES = corpus_rows("images.jsonl")
CLIPS = corpus_rows("clips.jsonl")


def _frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_corpus_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) <= 12_000_000


def test_every_file_is_named_by_exactly_one_line() -> None:
    assert len(IMAGES) == 3391
    assert len(CLIPS) == 148
    for folder, rows in (("images", IMAGES), ("clips", CLIPS)):
        files = sorted(f"{folder}/{path.name}" for path in (CORPUS / folder).iterdir())
        assert [row["path"] for row in rows] == files


def test_every_still_decodes_and_keeps_its_alpha() -> None:
    cut_outs = 0
    for row in IMAGES:
        with Image.open(CORPUS / row["path"]) as image:
            assert image.format == "WEBP"
            assert max(image.size) == build_corpus.STILL_SIDE
            assert image.mode == "RGBA"
            image.load()
            cut_outs += image.getchannel("A").getextrema() == (0, 255)
    assert cut_outs > 0.99 * len(IMAGES)


def test_every_clip_decodes_and_really_moves() -> None:
    for row in CLIPS:
        frames = _frames((CORPUS / row["path"]).read_bytes())
        assert frames.shape[1:] == (build_corpus.CLIP_SIDE, build_corpus.CLIP_SIDE, 3)
        assert len(frames) >= 4, row["path"]
        assert emoji_media.moves(list(frames)), row["path"]


def test_the_bundled_objects_are_those_of_the_list_and_each_has_its_still() -> None:
    files = {}
    for row in IMAGES:
        stem = Path(row["path"]).stem
        files[stem] = emoji.Emoji(
            code=emoji.normal_code(stem),
            base=row["base"],
            label=row["captions"][1],
            tags=(),
            group=row["group"],
            kind="",
            skin_tone=row["skin_tone"],
        )
    rows = [json.loads(line) for line in (CORPUS / "objects.jsonl").read_text("utf-8").splitlines()]
    assert sorted(objects.object_rows(files), key=lambda row: row["path"]) == rows
    assert len(rows) == len({row["name"] for row in rows}) == len({row["path"] for row in rows}) == 460
    assert {row["path"] for row in rows} <= {row["path"] for row in IMAGES}


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A red fire truck.", "fire truck"),
        ("An owl.", "owl"),
        ("A plumber’s wrench.", "plumber’s wrench"),
        ("Fire! Fire! Fire!", None),
        ("A sliced lime.", None),
        ("A flower.", None),
        ("The full moon.", None),
        ("A toy that is far too long.", None),
    ],
)
def test_a_stamp_is_an_object_where_its_caption_names_one_thing(caption: str, name: str | None) -> None:
    stamp = {"path": "stamps/town/x.png", "caption": caption, "group": "town"}
    names = [row["name"] for row in objects.stamp_rows([stamp])]
    assert names == ([] if name is None else [name])
    assert objects.stamp_rows([{**stamp, "path": "stamps/symbols/x.png"}]) == []


def test_captions_are_text_that_says_the_skin_tone() -> None:
    for row in IMAGES + CLIPS:
        assert len(row["captions"]) >= 3
        assert all(
            isinstance(caption, str) and caption.strip() == caption != "" for caption in row["captions"]
        )
        assert all(caption.isprintable() and len(caption) < 250 for caption in row["captions"])
        for tone in (row["skin_tone"] or "").split(" and "):
            assert tone in row["captions"][0]


def test_no_base_emoji_straddles_the_splits_of_stills_and_clips_together() -> None:
    rows = IMAGES + CLIPS
    train = {row["base"] for row in rows if row["split"] == "train"}
    held_out = {row["base"] for row in rows if row["split"] != "train"}
    assert {row["split"] for row in rows} == {"train", "held-out", "held-out-variant"}
    assert not train & held_out
    # Nor does a file of a held-out picture come back under another name among those trained on.
    content = {row["path"]: (CORPUS / row["path"]).read_bytes() for row in rows}
    trained = {content[row["path"]] for row in rows if row["split"] == "train"}
    assert not [row["path"] for row in rows if row["split"] != "train" and content[row["path"]] in trained]


@pytest.mark.parametrize(("rows", "count"), [(IMAGES, 250), (CLIPS, 30)], ids=["stills", "clips"])
def test_held_out_queries_are_one_for_each_base_emoji_and_unique(rows: list[dict], count: int) -> None:
    held_out = [row for row in rows if row["split"] == "held-out"]
    assert len(held_out) == len({row["base"] for row in held_out}) == count
    assert len({row["captions"][0] for row in held_out}) == count
    assert all(row["skin_tone"] is None and ": " in row["captions"][0] for row in held_out)


def test_no_held_out_picture_looks_like_that_of_another_base() -> None:
    signatures: dict[str, np.ndarray] = {}
    for row in IMAGES:
        if row["split"] != "held-out-variant" and row["skin_tone"] is None:
            with Image.open(CORPUS / row["path"]) as image:
                signatures.setdefault(row["base"], emoji_media.signature(image))
    every = np.stack(list(signatures.values()))
    for row in IMAGES:
        if row["split"] == "held-out":
            distance = np.abs(every - signatures[row["base"]]).mean(axis=1)
            # Under 2 for one drawing used twice; the bundled stills are compressed, hence the margin.
            assert np.sort(distance)[1] > 1.8, row["path"]


def test_the_held_out_draw_is_one_for_stills_and_clips_and_keeps_when_emoji_are_added() -> None:
    def draw(stills: int) -> set[str]:
        bases = [f"base-{number}" for number in range(stills)]
        return emoji.draw_held_out(bases, bases[:40], bases[30:50], stills=12, clips=5, seed=7)

    held_out = draw(100)
    assert held_out == draw(100)
    assert len(held_out) == 12
    assert len(held_out & {f"base-{number}" for number in range(30)}) == 5
    assert not held_out & {f"base-{number}" for number in range(30, 50)}
    assert len(held_out & draw(110)) >= 9


def test_licences_of_both_packages_are_there_with_attribution() -> None:
    for name, holder in (("fluent-emoji.txt", "Microsoft"), ("emojibase-data.txt", "Miles Johnson")):
        text = (CORPUS / "LICENSES" / name).read_text("utf-8")
        assert holder in text
        assert "Permission is hereby granted, free of charge" in text


@pytest.mark.parametrize(
    ("spelling", "code"),
    [
        ("1F44B-1F3FB", "1f44b-1f3fb"),
        ("23-fe0f-20e3", "0023-20e3"),
        ("1f3f4-e0067_e0062_e0065_e006e_e0067", "1f3f4-e0067-e0062-e0065-e006e-e0067-e007f"),
    ],
)
def test_spellings_of_a_code_meet(spelling: str, code: str) -> None:
    assert emoji.normal_code(spelling) == code


# --- the script, on small packages made of the bundled files ---

_WORDS = [
    {"label": "waving hand", "hexcode": "1F44B", "tags": ["bye", "hello"], "group": 1, "subgroup": 16},
    {"label": "grinning face", "hexcode": "1F600", "tags": ["smile"], "group": 0, "subgroup": 0},
]
_WORDS[0]["skins"] = [{"label": "waving hand: light skin tone", "hexcode": "1F44B-1F3FB", "tone": 1}]
_MESSAGES = {
    "groups": [{"order": 0, "message": "smileys"}, {"order": 1, "message": "people"}],
    "subgroups": [{"order": 0, "message": "smiling"}, {"order": 16, "message": "fingers open"}],
}


def _pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _animated() -> bytes:
    frames = [Image.new("RGBA", (256, 256), (255, 0, 0, 0)) for _ in range(12)]
    for index, frame in enumerate(frames):
        frame.paste((200, 30, 30, 255), (index * 16, 64, index * 16 + 64, 128))
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], duration=42, lossless=True)
    return out.getvalue()


@pytest.fixture
def package_folder(tmp_path: Path) -> Path:
    """Packages in the form of the real ones: three stills; one animation that moves and one that does not."""
    folder = tmp_path / "packages"
    folder.mkdir()
    words = {"data": _WORDS, "messages": _MESSAGES}
    members = {f"package/en/{name}.json": json.dumps(value).encode() for name, value in words.items()}
    _pack(folder / build_corpus.WORDS.tarball, members)
    stills = {
        name: (CORPUS / f"images/{name}.webp").read_bytes() for name in ("1f44b", "1f44b-1f3fb", "1f600")
    }
    members = {f"package/assets/{name}.webp": data for name, data in stills.items()}
    hostile = {"package/assets/../../../../escaped.webp": b"x", "package/README.md": b"words"}
    _pack(folder / build_corpus.STILLS.tarball, members | hostile)
    animations = {"package/assets/1f44b.webp": _animated(), "package/assets/1f600.webp": stills["1f600"]}
    for package in build_corpus.ANIMATIONS:
        last = package == build_corpus.BUNDLED_ANIMATIONS
        _pack(folder / package.tarball, animations if last else {"package/assets/.gitkeep": b""})
    return folder


def test_fetching_stills_writes_media_captions_and_the_bundled_split(
    package_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "full"
    assert build_corpus.main(["fetch", "emoji", target.as_uri(), "--packages", str(package_folder)]) == 0
    rows = [json.loads(line) for line in (target / "images.jsonl").read_text("utf-8").splitlines()]
    split = {row["path"]: row["split"] for row in IMAGES}
    assert [row["path"] for row in rows] == [
        "images/1f44b-1f3fb.webp",
        "images/1f44b.webp",
        "images/1f600.webp",
    ]
    assert {row["path"]: row["split"] for row in rows} == {row["path"]: split[row["path"]] for row in rows}
    assert rows[0]["captions"][0] == "waving hand with light skin tone: bye, hello"
    assert rows[0]["base"] == rows[1]["base"] == "1f44b"
    assert rows[0]["skin_tone"] == "light"
    assert all((target / row["path"]).read_bytes() == (CORPUS / row["path"]).read_bytes() for row in rows)
    assert not list(tmp_path.rglob("escaped*"))


def test_fetching_clips_leaves_out_what_stands_still_and_goes_on_where_it_was(
    package_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fetch", "emoji-clips", str(tmp_path / "full"), "--packages", str(package_folder)]
    assert build_corpus.main(command) == 0
    assert "1 stand still: left out, 1 written" in capsys.readouterr().out
    first = (tmp_path / "full" / "clips.jsonl").read_bytes()
    assert build_corpus.main(command) == 0
    assert "1 there already" in capsys.readouterr().out
    assert (tmp_path / "full" / "clips.jsonl").read_bytes() == first
    frames = _frames((tmp_path / "full" / "clips" / "1f44b.mp4").read_bytes())
    assert frames.shape == (12, 256, 256, 3)
    assert frames[0, 0, 0].min() > 245  # on white
    assert abs(int(frames[6, 96, 6 * 16 + 32, 0]) - 200) < 20  # and the square is where the animation has it


def test_clips_and_stills_are_encoded_to_the_same_bytes_each_time() -> None:
    frames = emoji_media.animation_frames(_animated(), 64, 12)
    assert emoji_media.encode_clip(frames, 12, 28) == emoji_media.encode_clip(frames, 12, 28)
    still = (CORPUS / IMAGES[0]["path"]).read_bytes()
    assert emoji_media.shrink(still, 64, 65) == emoji_media.shrink(still, 64, 65)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_fetching_stamps_takes_first_lines_and_leaves_out_letters_and_svg(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        f"Package: {build_corpus.STAMPS}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n"
        "Description: stamps\n"
    )
    stamps = root / "usr/share/tuxpaint/stamps"
    for name in ("animals/gnu.png", "animals/gnu_mirror.png", "animals/owl.svg", "symbols/alphabets/a.png"):
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        (stamps / name).write_bytes(b"picture of " + name.encode())
    (stamps / "animals/gnu.txt").write_text("The baby of a gnu.\nfr.utf8=Le petit du gnou.\n", "utf-8")
    (stamps / "symbols/alphabets/a.txt").write_text("A\n")
    packed = tmp_path / f"{build_corpus.STAMPS}_1_all.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--build", str(root), str(packed)], check=True, capture_output=True)
    build_corpus.fetch_stamps(open_storage(str(tmp_path / "full")), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "full" / "stamps.jsonl").read_text("utf-8").splitlines()]
    assert [(row["path"], row["captions"]) for row in rows] == [
        ("stamps/animals/gnu.png", ["The baby of a gnu."])
    ]
    assert sorted(file.path for file in open_storage(str(tmp_path / "full")).list()) == [
        "stamps.jsonl",
        "stamps/animals/gnu.png",
    ]


def test_a_missing_package_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_corpus.main(["fetch", "emoji", str(tmp_path / "t"), "--packages", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "emojibase-data-17.0.0.tgz does not exist" in error
    assert "npm pack emojibase-data@17.0.0" in error


def test_a_damaged_package_is_named(tmp_path: Path, package_folder: Path) -> None:
    path = package_folder / build_corpus.STILLS.tarball
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(PackageError, match=r"fluent-emoji-3d.* is damaged"):
        list(packages.npm_members(path, r".*\.webp"))
