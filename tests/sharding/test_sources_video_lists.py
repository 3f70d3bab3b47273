"""Promises of MSR-VTT's and LSMDC's lists."""

import json

import pytest

from sharding.errors import UserError
from sharding.sources import Input, rows
from sharding.sources.addresses import BelowBase
from sharding.storage import open_storage
from tests.sharding.listings import configured, fetched, listed, source

JSFUSION = """key,vid_key,video_id,sentence
ret0,msr9770,video9770,a person is connecting something to system
ret1,msr9771,video9771,"a little girl does gymnastics, twice"
ret2,msr7020,video7020,a woman creating a fondant baby and flower
ret3,msr7021,../video7021,a way out of the folder
ret4,msr7022
ret5,msr7023,video7023,one cell,too many
"""
TRAIN = "video_id\nvideo0\nvideo2\nvideo1\n"
DATA = {
    "videos": [{"video_id": "video0", "split": "train", "url": "http://h/?v=x"}],
    "sentences": [
        {"video_id": "video1", "caption": "a car", "sen_id": 0},
        {"video_id": "video0", "caption": "a cartoon", "sen_id": 1},
        {"video_id": "video1", "caption": "the car", "sen_id": 2},
        {"video_id": "video1", "caption": 7, "sen_id": 3},
        {"video_id": "video9", "caption": "of another split", "sen_id": 4},
    ],
}
FIRST = "3009_BATTLE_LOS_ANGELES_00.03.07.170-00.03.09.675"
SECOND = "0010_Frau_Ohne_Gewissen_00.07.27.289-00.07.28.932"
THIRD = "1012_Unbreakable_00.05.16.065-00.05.21.941"
LSMDC = "\n".join(
    f"{clip}\t00.03.07.170\t00.03.09.675\t00.03.06.0\t00.03.10.0\t{sentence}"
    for clip, sentence in [
        (FIRST, 'SOMEONE says "no".'),
        (SECOND, "SOMEONE drives, fast."),
        (THIRD, "He waits."),
        (FIRST, "They leave."),
        ("../../etc/passwd", "x"),
    ]
)


def msrvtt(tmp_path, text=JSFUSION, name="MSRVTT_JSFUSION_test.csv", **options):
    (tmp_path / name).write_text(text)
    return source(
        tmp_path / name, kind="msrvtt", modality="video", videos=str(tmp_path / "videos all"), **options
    )


def lsmdc(tmp_path, text=LSMDC):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").write_bytes(data)
    return source(
        tmp_path / "LSMDC16_challenge_1000_publictect.csv",
        kind="lsmdc",
        modality="video",
        videos=str(tmp_path / "movies"),
    )


def put(tmp_path, *paths):
    for number, path in enumerate(paths):
        file = tmp_path / "movies" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * (number + 1))


def test_the_1k_a_list_has_a_sentence_for_each_clip(tmp_path):
    opened = msrvtt(tmp_path)
    inputs, _ = listed(opened)
    assert opened.base == (tmp_path / "videos all").as_uri()
    assert inputs[:3] == [
        Input.at(BelowBase("video9770.mp4"), captions=["a person is connecting something to system"]),
        Input.at(BelowBase("video9771.mp4"), captions=["a little girl does gymnastics, twice"]),
        Input.at(BelowBase("video7020.mp4"), captions=["a woman creating a fondant baby and flower"]),
    ]
    assert [(item.address, item.problem) for item in inputs[3:]] == [
        ("MSRVTT_JSFUSION_test.csv:5", "bad-row"),
        ("MSRVTT_JSFUSION_test.csv:6", "bad-row"),
        ("MSRVTT_JSFUSION_test.csv:7", "bad-row"),
    ]


def test_a_clip_that_is_listed_twice_is_one_sample_with_both_sentences(tmp_path):
    text = "video_id,sentence\nvideo1,a\nvideo2,b\nvideo1,c\n"
    assert [item.captions for item in listed(msrvtt(tmp_path, text))[0]] == [["a", "c"], ["b"]]


def test_the_9k_list_takes_all_sentences_of_the_annotations(tmp_path):
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(DATA))
    annotations = str(tmp_path / "MSRVTT_data.json")
    inputs, digest = listed(msrvtt(tmp_path, TRAIN, "MSRVTT_train.9k.csv", annotations=annotations))
    assert inputs == [
        Input.at(BelowBase("video0.mp4"), captions=["a cartoon"]),
        Input.at(BelowBase("video2.mp4")),
        Input.at(BelowBase("video1.mp4"), captions=["a car", "the car"], not_text=1),
    ]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(DATA).replace("the car", "some car"))
    assert listed(msrvtt(tmp_path, TRAIN, "MSRVTT_train.9k.csv", annotations=annotations))[1] != digest


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        ("key,vid_key\n", None, r"test\.csv has no column 'video_id'; it has key, vid_key$"),
        ("", None, "has no column 'video_id'; it has none"),
        (TRAIN, None, "has no column 'sentence'; .* as source.annotations"),
        ("video_id,sentence\n", None, "empty corpus: .*test.csv lists no clips"),
        (TRAIN, "{}", r"data\.json has no list 'sentences'"),
        (TRAIN, "{", r"data\.json is not JSON"),
    ],
)
def test_files_that_are_not_of_msr_vtt_are_user_errors(tmp_path, text, data, message):
    options = {}
    if data is not None:
        (tmp_path / "data.json").write_text(data)
        options = {"annotations": str(tmp_path / "data.json")}
    with pytest.raises(UserError, match=message):
        listed(msrvtt(tmp_path, text, **options))


def test_a_sentence_of_no_clip_costs_that_sentence(tmp_path):
    sentences = [{"video_id": "video0", "caption": "a"}, {}, 7, {"video_id": ["video0"], "caption": "b"}]
    text = json.dumps({"sentences": sentences, "info": "LATIN"}).encode().replace(b"LATIN", b"caf\xe9")
    (tmp_path / "data.json").write_bytes(text.replace(b'"caption": "b"', b'"caption": ' + b"7" * 6000))
    inputs, _ = listed(msrvtt(tmp_path, "video_id\nvideo0\n", annotations=str(tmp_path / "data.json")))
    assert inputs[0] == Input.at(BelowBase("video0.mp4"), captions=["a"])
    places = [(item.address, item.problem) for item in inputs[1:]]
    assert places == [(f"data.json:sentences[{n}]", "bad-row") for n in (1, 2, 3)]


def test_an_unclosed_quotation_in_a_list_costs_its_line(tmp_path):
    text = 'video_id,sentence\nvideo1,"a cat\nvideo2,a dog\nvideo3,"a ""big"" cow,\nin two lines"\nvideo4,caf\udce9\n'
    (tmp_path / "list.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = source(tmp_path / "list.csv", kind="msrvtt", modality="video", videos=str(tmp_path))
    assert [(item.address, item.captions, item.not_text, item.problem) for item in listed(found)[0]] == [
        ("video2.mp4", ["a dog"], 0, None),
        ("video3.mp4", ['a "big" cow,\nin two lines'], 0, None),
        ("video4.mp4", [], 1, None),
        ("list.csv:2", [], 0, "bad-row"),
    ]


def test_files_that_are_not_there_are_named(tmp_path):
    options = {"kind": "msrvtt", "modality": "video", "videos": str(tmp_path)}
    with pytest.raises(UserError, match=r"no such file: .*gone\.csv"):
        listed(source(tmp_path / "gone.csv", **options))
    with pytest.raises(UserError, match=r"no such file: .*gone\.json"):
        listed(msrvtt(tmp_path, TRAIN, annotations=str(tmp_path / "gone.json")))
    with pytest.raises(UserError, match=r"no such file: .*gone\.csv"):
        listed(source(tmp_path / "gone.csv", kind="lsmdc", modality="video", videos=str(tmp_path)))
    with pytest.raises(UserError, match="movies"):
        listed(lsmdc(tmp_path))


def test_lsmdc_clips_are_found_wherever_they_lie(tmp_path):
    put(tmp_path, f"{SECOND}.avi", f"3009_BATTLE_LOS_ANGELES/{FIRST}.avi", "notes.txt", f"{THIRD}.txt")
    opened = lsmdc(tmp_path)
    inputs, digest = listed(opened)
    assert opened.base == (tmp_path / "movies").as_uri()
    assert inputs == [
        Input.at(
            BelowBase(f"3009_BATTLE_LOS_ANGELES/{FIRST}.avi"),
            captions=['SOMEONE says "no".', "They leave."],
            size=2,
        ),
        Input.at(BelowBase(f"{SECOND}.avi"), captions=["SOMEONE drives, fast."], size=1),
        Input.at(BelowBase(f"1012_Unbreakable/{THIRD}.avi"), captions=["He waits."]),
        Input(
            address="LSMDC16_challenge_1000_publictect.csv:5", problem="bad-row", reason="it names no clip"
        ),
    ]
    (tmp_path / "movies" / f"{SECOND}.avi").write_bytes(b"longer")
    assert listed(lsmdc(tmp_path))[1] != digest


def test_a_clip_without_a_file_is_missing_data(tmp_path):
    put(tmp_path, f"{SECOND}.avi")
    lsmdc(tmp_path)
    config = configured(
        "video",
        kind="lsmdc",
        path=str(tmp_path / "LSMDC16_challenge_1000_publictect.csv"),
        videos=str(tmp_path / "movies"),
    )
    found = fetched(config, open_storage(tmp_path))
    causes = [one.fault and one.fault.cause for one in found]
    assert causes == ["missing-file", None, "missing-file", "bad-row"]


def test_rows_of_lsmdc_that_are_not_whole_are_named_by_line(tmp_path):
    put(tmp_path, f"{FIRST}.avi")
    text = LSMDC.encode().splitlines()[0] + b"\r\n\r\nshort\t1\tx\n" + b"a\t1\t2\t3\t4\t\xff\n"
    inputs, _ = listed(lsmdc(tmp_path, text))
    assert [(item.address, item.problem, item.captions) for item in inputs] == [
        (f"{FIRST}.avi", None, ['SOMEONE says "no".']),
        ("LSMDC16_challenge_1000_publictect.csv:3", "bad-row", []),
        ("LSMDC16_challenge_1000_publictect.csv:4", "bad-row", []),
    ]


def test_two_files_of_one_clip_are_refused(tmp_path):
    put(tmp_path, f"{FIRST}.avi", f"again/{FIRST}.mp4")
    with pytest.raises(UserError, match=rf"two files of clip {FIRST}: {FIRST}\.avi and again/"):
        listed(lsmdc(tmp_path))


def test_a_file_of_lsmdc_that_is_no_list_is_refused(tmp_path, monkeypatch):
    put(tmp_path, f"{FIRST}.avi")
    with pytest.raises(UserError, match="empty corpus"):
        listed(lsmdc(tmp_path, "\n"))
    monkeypatch.setattr(rows, "LONGEST_LINE", 200)
    with pytest.raises(UserError, match="empty corpus"):
        listed(lsmdc(tmp_path, "x" * 400))
    inputs, _ = listed(lsmdc(tmp_path, LSMDC.splitlines()[2] + "\n" + "x" * 400))
    assert [(item.problem, item.reason) for item in inputs] == [(None, None), ("bad-row", "it is too long")]
