"""Promises about tables that other programs wrote badly: a bad cell costs one row, and every line is accounted for."""

import csv
import io
import json
import random
import time
import tracemalloc
from collections import deque

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharding.errors import StorageFault, UserError
from sharding.sources import Input, grouping, rows
from sharding.sources.addresses import BelowBase
from sharding.sources.rows import json_rows, parquet_rows, table_rows, text_lines
from tests.sharding.listings import listed, source
from tests.sharding.preparation import prepare_files
from tests.sharding.real_media import picture

HEAD = b"file,caption\n"
QUOTE = '"'


def table(path, **options):
    return source(path, **({"kind": "table", "path_column": "file", "caption_column": "caption"} | options))


def inputs_of(path, data, **options):
    path.write_bytes(data)
    return listed(table(path, **options))[0]


def facts(inputs):
    return [item.problem or (item.address, item.captions, item.not_text) for item in inputs]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'a.jpg,"one\nb.jpg,two\nc.jpg,three\n', ["bad-row", "b.jpg", "c.jpg"]),  # nothing closes it
        (b'a.jpg,"one\nb.jpg,15"\nc.jpg,three\n', ["bad-row", "b.jpg", "c.jpg"]),  # by chance something does
        (b'a.jpg,"one\nb.jpg,"two, too"\n', ["bad-row", "b.jpg"]),
        (b'"a.jpg","one\n"b.jpg","two"\n', ["bad-row", "b.jpg"]),
        (b'a.jpg,"one\nb.jpg,"two\nc.jpg,three\n', ["bad-row", "bad-row", "c.jpg"]),
        (b'a.jpg,one\nb.jpg,"two', ["a.jpg", "bad-row"]),  # in the last line
        (b'"a.jpg,one\nb.jpg,two\n', ["bad-row", "b.jpg"]),  # in the first column
        (b'a.jpg,"one" more\nb.jpg,two\n', ["bad-row", "b.jpg"]),
        (b'a.jpg,"one"",\nb.jpg,two\n', ["bad-row", "b.jpg"]),
        (b"a.jpg,one,more\nb.jpg,two\n", ["bad-row", "b.jpg"]),
        (b"a.jpg,caf\xe9\nb.jpg,two\n", ["a.jpg", "b.jpg"]),
        (b"\xff.jpg,one\nb.jpg,two\n", ["bad-address", "b.jpg"]),
        (b"\0\0\0\0\nb.jpg,two\n", ["bad-address", "b.jpg"]),
    ],
)
def test_a_row_of_csv_with_wrong_marks_or_bytes_costs_that_row(tmp_path, body, expected):
    found = inputs_of(tmp_path / "t.csv", HEAD + body)
    assert [item.problem or item.address for item in found] == expected
    reasons = [item.reason for item in found if item.problem == "bad-row"]
    assert all(reasons)
    bad = [place for place, cause in enumerate(expected) if cause == "bad-row"]
    assert [item.address for item in found if item.problem == "bad-row"] == [f"t.csv:{2 + n}" for n in bad]


def test_an_unclosed_quotation_is_named_by_the_line_where_it_opens(tmp_path):
    lines = [f"{n}.jpg," + (QUOTE if n == 16 else "") + f"noise {n}\n" for n in range(50)]
    found = inputs_of(tmp_path / "t.csv", HEAD + "".join(lines).encode())
    assert len(found) == 50
    assert [(item.address, item.reason) for item in found if item.problem] == [
        ("t.csv:18", "a quotation opens here that is not closed before the row in line 19")
    ]


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r"])
def test_cells_over_several_lines_and_every_kind_of_line_end_are_legal(tmp_path, ends):
    body = HEAD + b'a.jpg,"one, two\nthree, ""four""\n\nfive"\n\nb.jpg,5" wide\nc.jpg,last'
    found = inputs_of(tmp_path / "t.csv", b"\xef\xbb\xbf" + body.replace(b"\n", ends))
    end = ends.decode()
    assert facts(found) == [
        ("a.jpg", [f'one, two{end}three, "four"{end}{end}five'], 0),
        ("b.jpg", ['5" wide'], 0),
        ("c.jpg", ["last"], 0),
    ]


def test_mixed_line_ends_are_lines_each():
    data = b"a\nb\r\nc\rd\r\r\ne"
    found = list(text_lines(io.BytesIO(data), "u"))
    assert found == [(1, "a\n"), (2, "b\r\n"), (3, "c\r"), (4, "d\r"), (5, "\r\n"), (6, "e")]
    for size in (1, 2, 3):  # however the reads are cut
        stream = io.BytesIO(data)
        stream.readline = lambda _, stream=stream, size=size: io.BytesIO.readline(stream, size)
        assert list(text_lines(stream, "u")) == found
    assert list(text_lines(io.BytesIO(b"a\rb\nc"), "u", ends=b"\n")) == [(1, "a\rb\n"), (2, "c")]


def test_a_line_of_any_length_costs_its_row_and_no_memory(monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(rows, "_BLOCK", 1 << 16)
    body = b"a.jpg," + b"x" * (30 << 20) + b"\nb.jpg,ok\n" + b'c.jpg,"' + b"y\n" * (1 << 21) + b"z"
    stream = io.BytesIO(HEAD + body)
    tracemalloc.start()
    found = table_rows(stream, "u", None, ["file", "caption"], address_column="file")
    assert [(row.number, row.cells is None) for row, _ in zip(found, range(4), strict=False)] == [
        (2, True), (3, False), (4, True), (5, False),
    ]  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_long_cell_is_a_cell_whether_it_is_asked_for_or_not(tmp_path, suffix):
    mark = "," if suffix == ".csv" else "\t"
    lines = [("file", "caption", "other"), ("a.jpg", "x" * 200_000, "1"), ("b.jpg", "y", "z" * 200_000)]
    found = inputs_of(tmp_path / f"t{suffix}", "\n".join(mark.join(line) for line in lines).encode())
    assert facts(found) == [("a.jpg", ["x" * 200_000], 0), ("b.jpg", ["y"], 0)]


@pytest.mark.parametrize(
    ("suffix", "data", "message"),
    [
        (".csv", "file,caption\n".encode("utf-16"), "is in UTF-16: save it as UTF-8"),
        (".jsonl", '{"file": 1}\n'.encode("utf-16"), "is in UTF-16: save it as UTF-8"),
        (".csv", "file,caption\n".encode("utf-16-be"), "NUL bytes in line 1"),
        (".csv", b'file,"caption\na.jpg,x\n', "line 1 has no names of columns: a quotation opens here"),
        (".csv", b"file,caption,caption\n", "has two columns 'caption'"),
        (".tsv", b"\x1f\x8b\x08junk\xff\n", "has no column 'file'; it has "),
        (".csv", b"\n\n", "has no column 'file'; it has none"),
        (".parquet", b"PAR1" + bytes(60) + b"PAR1", "is not a Parquet file, or is damaged"),
    ],
)
def test_a_table_that_cannot_be_read_at_all_is_named(tmp_path, suffix, data, message):
    with pytest.raises(UserError, match=message) as caught:
        inputs_of(tmp_path / f"t{suffix}", data)
    str(caught.value).encode()  # it can be printed


def test_whatever_is_done_to_one_line_of_a_csv_the_others_stay(tmp_path):
    draw = random.Random(7)
    pieces = ['"', ",", "\n", "\r", '""', "\0", "\udcff", "x", "{", "\t", " "]
    for trial in range(300):
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        for number in range(12):
            caption = draw.choice(["plain", "with, comma", 'with "marks"', "two\nlines", ""])
            writer.writerow([f"{number}.jpg", f"{caption} {number}"])
        records = [f"{n}.jpg" for n in range(12)]
        text = sink.getvalue()
        broken = draw.randrange(12)
        start = text.index(f"{broken}.jpg")
        end = text.index("\n", start)
        place = draw.randrange(start, end + 1)
        text = text[:place] + draw.choice(pieces) + text[place + draw.randrange(2) :]
        data = HEAD + text.encode("utf-8", "surrogateescape")
        found = list(table_rows(io.BytesIO(data), "u", None, ["file", "caption"], address_column="file"))
        there = [row.cells["file"] for row in found if row.cells is not None]
        neighbours = {f"{broken}.jpg", f"{broken + 1}.jpg"}  # whose line end may be gone
        assert [name for name in records if name not in there and name not in neighbours] == [], (trial, data)
        # Each line begins a row, goes on one, or is blank.
        numbers = [row.number for row in found]
        assert numbers == sorted(set(numbers))


STRANGE = {
    "not UTF-8": None,
    "null": pa.nulls(3),
    "NaN": pa.array([float("nan")] * 3),
    "bytes": pa.array([b"x"] * 3),
    "nested": pa.array([{"a": "x"}] * 3),
    "lists of lists": pa.array([[["x"]]] * 3),
    "a map": pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
    "a date": pa.array([19_000] * 3, pa.date32()),
    "an unknown time zone": pa.array([2**62 + 1] * 3, pa.timestamp("ns", "Nowhere/City")),
    "a year beyond Python's": pa.array([2**60] * 3, pa.timestamp("us")),
}


def unchecked(values):
    """A column of strings of these bytes."""
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.utf8(), len(values), buffers)


BAD = [b"one", b"caf\xe9", b"three"]
NAMES = pa.array(["a.jpg", "b.jpg", "c.jpg"])


@pytest.mark.parametrize("what", STRANGE)
def test_cells_of_parquet_that_are_not_text_cost_their_row(tmp_path, what):
    odd = STRANGE[what] if STRANGE[what] is not None else unchecked(BAD)
    captions = pa.concat_arrays([pa.array(["x"]).cast(pa.string())] * 3)
    pq.write_table(pa.table({"file": NAMES, "odd": odd, "caption": captions}), tmp_path / "t.parquet")
    found = listed(table(tmp_path / "t.parquet", caption_column=["caption", "odd"]))[0]
    assert [item.address for item in found] == ["a.jpg", "b.jpg", "c.jpg"]
    not_text = [int((what == "not UTF-8" and n == 1) or what not in ("not UTF-8", "null")) for n in range(3)]
    assert [item.not_text for item in found] == not_text
    assert [item.captions[0] for item in found] == ["x", "x", "x"]
    assert [item.reason for item in found] == [
        f"not text in t.parquet:{n}" if other else None for n, other in enumerate(not_text, start=1)
    ]


@pytest.mark.parametrize("how", ["plain", "dictionary", "list"])
def test_bytes_of_parquet_that_are_not_utf8_cost_their_row_in_any_column(tmp_path, how):
    column = unchecked(BAD)
    if how == "dictionary":
        column = column.dictionary_encode()
    if how == "list":
        column = pa.ListArray.from_arrays([0, 1, 2, 3], column)
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"file": NAMES, "caption": column, "name": unchecked(BAD)}), path)
    assert facts(listed(table(path))[0]) == [
        ("a.jpg", ["one"], 0), ("b.jpg", [], 1), ("c.jpg", ["three"], 0),
    ]  # fmt: skip
    named = listed(table(path, path_column="name", caption_column="file"))[0]
    assert [item.problem or item.address for item in named] == ["one", "bad-address", "three"]
    chosen = listed(table(path, where={"name": ["one", "two"]}))[0]
    assert [item.problem or item.address for item in chosen] == ["a.jpg", "bad-row"]
    assert chosen[1].address == "t.parquet:2"
    assert "'where'" in chosen[1].reason


def parquet(count=3000, **options):
    draw = random.Random(3)
    captions = [f"noise {draw.getrandbits(60)}" for _ in range(count)]
    made = pa.table({"file": [f"{n}.jpg" for n in range(count)], "caption": captions})
    sink = io.BytesIO()
    pq.write_table(made, sink, row_group_size=count // 3, use_dictionary=False, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "none"},
        {"compression": "none", "write_page_checksum": True},
    ],
)
def test_a_damaged_page_of_parquet_costs_its_row_group_by_number(tmp_path, options):
    data = bytearray(parquet(data_page_size=4096, **options))
    offset = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(1).data_page_offset
    data[offset + 5000 : offset + 5040] = bytes(40)
    found = inputs_of(tmp_path / "t.parquet", bytes(data))
    assert len(found) == 3000
    bad = [item for item in found if item.problem is not None]
    assert {item.problem for item in bad} == {"bad-row"}
    assert [item.address for item in bad] == [f"t.parquet:{n}" for n in range(1001, 2001)]
    assert bad[0].reason.startswith("rows 1001 to 2000 (of row group 1) cannot be read: ")
    assert [item.address for item in found[2000:2002]] == ["2000.jpg", "2001.jpg"]


def test_any_damage_to_parquet_costs_rows_that_are_counted_or_names_the_file():
    whole, draw = parquet(60), random.Random(5)
    outcomes = set()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            found = list(parquet_rows(io.BytesIO(data), "u", ["file", "caption"]))
        except UserError as error:
            outcomes.add(f"named {str(error)[:2]}")
        else:
            outcomes.add("bad rows" if any(row.cells is None for row in found) else "rows")
            assert [row.number for row in found] == list(range(1, len(found) + 1))
    assert {"named u ", "rows"} <= outcomes <= {"named u ", "rows", "bad rows"}


def test_a_fault_of_the_storage_is_no_damage_of_the_table():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell() < 3000:
                raise StorageFault("the store is away")
            return super().read(size)

    with pytest.raises(StorageFault):
        list(parquet_rows(Broken(parquet()), "u", ["file", "caption"]))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"file": "a.jpg", "caption": "x", "caption": "y"}', "bad-row"),
        (b'{"file": "a.jpg", "caption": "x", "n": 1, "n": 2, "m": {"q": 1, "q": 2}}', None),
        (b'{"file": "a.jpg", "caption": ["x", NaN, "\\ud83d", {"a": 1}]}', None),
        (b'{"file": "a.jpg", "caption": "x", "n": ' + b"9" * 5000 + b"}", "bad-row"),
        (b'{"file": "a.jpg", "caption": "x", "n": 1e999}', None),
        (b'{"file": "a.jpg", "caption": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "bad-row"),
        (b'{"file": "a\\ud83d.jpg", "caption": "x"}', "bad-address"),
        (b'{"file": "\xff.jpg", "caption": "x"}', "bad-address"),
        (b'{"file": "a.jpg", "caption": "x", "other": "\xff"}', None),
        (b'{"file": "a.jpg", "caption": "x"}\r{"file": "b.jpg"}', "bad-row"),
        (b"null", "bad-row"),
    ],
)
def test_a_line_of_json_costs_one_row_at_most(tmp_path, line, problem):
    good = b'{"file": "z.jpg", "caption": "good"}'
    found = inputs_of(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + good + b"\n" + line + b"\n\n" + good)
    assert [item.problem for item in found] == [None, problem, None]
    if problem is None:
        assert found[1].captions == ["x"]


def test_columns_of_json_are_looked_for_in_all_rows_and_no_more_of_them_is_kept():
    lines = b"".join(b'{"key%d": 1}\n' % n for n in range(5_000))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"has no column 'file'; it has key0, .*key19"):
        deque(json_rows(io.BytesIO(lines), "u", ["file"]), maxlen=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    # Of rows that cannot be read nobody knows the columns: they are counted.
    assert [row.cells for row in json_rows(io.BytesIO(b"{\n{\n"), "u", ["file"])] == [None, None]


CAPTIONS = [("0.jpg", "a"), ("1.jpg", "b"), ("0.jpg", "c"), ("2.jpg", "d"), ("1.jpg", "b"), ("0.jpg", "e")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_rows_of_a_sample_are_brought_together_wherever_they_stand(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"file": name, "caption": caption}) for name, caption in CAPTIONS]
        path.write_text("\n".join(lines))
    elif suffix == ".parquet":
        pq.write_table(
            pa.table([pa.array(column) for column in zip(*CAPTIONS, strict=True)], ["file", "caption"]), path
        )
    else:
        mark = "," if suffix == ".csv" else "\t"
        path.write_text("\n".join(mark.join(row) for row in [("file", "caption"), *CAPTIONS]))
    found, digest = listed(table(path, group_by="file"))
    assert found == [
        Input.at(BelowBase("0.jpg"), captions=["a", "c", "e"]),
        Input.at(BelowBase("1.jpg"), captions=["b", "b"]),
        Input.at(BelowBase("2.jpg"), captions=["d"]),
    ]
    assert listed(table(path, group_by="file"))[1] == digest
    assert len(listed(table(path))[0]) == 6


def test_a_row_that_belongs_to_no_group_is_counted_and_costs_the_others_nothing(tmp_path):
    lines = [
        {"id": 1, "file": "a.jpg", "caption": "x"},
        {"id": 1, "file": None, "caption": "y"},
        {"id": 1, "file": "b.jpg", "caption": "z"},
        {"id": None, "file": "a.jpg", "caption": "q"},
        {"id": "\ud83d", "file": "a.jpg", "caption": "q"},
        {"id": 1, "file": "a.jpg", "caption": 7},
        {"id": "1", "file": "a.jpg", "caption": "of another"},
    ]
    data = "\n".join(map(json.dumps, lines)).encode() + b"\n{broken\n"
    found = inputs_of(tmp_path / "t.jsonl", data, group_by="id")
    assert [(item.address, item.problem, item.captions, item.not_text) for item in found] == [
        ("a.jpg", None, ["x"], 1),
        ("t.jsonl:2", "bad-address", [], 0),
        ("t.jsonl:3", "bad-row", [], 0),
        ("t.jsonl:4", "bad-row", [], 0),
        ("t.jsonl:5", "bad-row", [], 0),
        ("a.jpg", None, ["of another"], 0),
        ("t.jsonl:8", "bad-row", [], 0),
    ]
    assert "other media than t.jsonl:1" in found[2].reason


def test_a_column_that_groups_everything_is_refused_and_memory_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(grouping, "MOST_ROWS", 50)
    peaks = []
    for count in (1_000, 8_000):
        path = tmp_path / f"{count}.csv"
        names = [f"{n % (count // 5)}.jpg,train,a caption of number {n} " + "x" * 50 for n in range(count)]
        path.write_text("file,split,caption\n" + "\n".join(names))
        monkeypatch.setattr(grouping, "_CACHE_KIB", 256)
        tracemalloc.start()
        found = sum(len(item.captions) == 5 for item in table(path, group_by="file").inputs(Nothing()))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found == count // 5
    assert peaks[1] < 1.5 * peaks[0] + 200_000
    with pytest.raises(UserError, match=r"group_by 'split': more than 50 rows have the value \"train\""):
        listed(table(path, group_by="split"))


class Nothing:
    """A digest that nobody asks for."""

    def update(self, data):
        pass


def test_an_adversary_of_quotations_takes_time_that_grows_with_the_table():
    def seconds(count):
        body = HEAD + b'x,"y\nz z\n' * count
        begin = time.perf_counter()
        list(table_rows(io.BytesIO(body), "u", None, ["file", "caption"], address_column="file"))
        return time.perf_counter() - begin

    seconds(100)
    small, large = seconds(1000), seconds(8000)
    assert large < 8 * 4 * max(small, 0.002)


@pytest.mark.parametrize(
    ("options", "dropped", "captions"),
    [
        ({}, {"duplicate": 1, "duplicate-other-caption": 2}, [["a"]]),
        ({"group_by": "file"}, {}, [["a", "b", "c"]]),
    ],
)
def test_copies_with_captions_of_their_own_count_apart_unless_they_are_grouped(options, dropped, captions):
    files = {"0.png": picture(0, image_format="PNG"), "t.csv": HEAD + b"0.png,a\n0.png,b\n0.png,a\n0.png,c\n"}
    where = {"kind": "table", "path": "{folder}/t.csv", "path_column": "file", "caption_column": "caption"}
    found = prepare_files(files, where | options, filters=[{"kind": "duplicates"}])
    assert found.counts.dropped == dropped
    assert [sample.captions for sample in found.samples] == captions


@pytest.mark.parametrize("line", [b'a",x,"\n', b'a",' + b"x" * 5000 + b',"\n'])
def test_lines_read_again_grow_with_the_table_and_not_with_its_square(monkeypatch, line):
    """Each line closes the quotation of the one before, and opens another."""
    monkeypatch.setattr(rows, "_MOST_AGAIN", 1000)
    monkeypatch.setattr(rows, "_MOST_BYTES_AGAIN", 1 << 20)
    monkeypatch.setattr(rows, "_FEW_LINES", 10)
    looked_at = []
    plain = rows._Lines.__next__
    monkeypatch.setattr(rows._Lines, "__next__", lambda self: looked_at.append(1) or plain(self))

    def work(count):
        looked_at.clear()
        found = list(table_rows(io.BytesIO(b"a,b,c\n" + line * count), "t.csv", None, ["a"]))
        assert [row.number for row in found] == list(range(2, count + 2))
        assert all(row.cells is None and row.reason for row in found)
        return len(looked_at)

    small, large = work(200), work(800)
    assert large - small <= 600 * 13 + 1000


def test_a_quotation_of_few_lines_is_read_however_much_was_read_again(monkeypatch):
    monkeypatch.setattr(rows, "_MOST_AGAIN", 50)
    body = (
        b'a",x,"\n' * 60 + b"end.jpg,b,c\n" + b'1.jpg,"two\nlines",y\n' + b'2.jpg,"' + b"\n" * 200 + b'",y\n'
    )
    found = list(table_rows(io.BytesIO(b"a,b,c\n" + body), "t.csv", None, ["a", "b"]))
    assert [row.cells for row in found if row.cells][:2] == [
        {"a": "end.jpg", "b": "b"},
        {"a": "1.jpg", "b": "two\nlines"},
    ]
    assert "not closed before 100 lines" in next(row.reason for row in found if row.number == 65)


@pytest.mark.parametrize("samples_per_shard", [3, 100])
def test_what_a_copy_counts_as_does_not_depend_on_how_the_table_is_cut(samples_per_shard):
    body = b"0.png,a\n0.png,b\n0.png,b\n0.png,b\n0.png,a\n1.png,a\n0.png,c\n1.png,b\n"
    files = {f"{n}.png": picture(n, image_format="PNG") for n in range(2)} | {"t.csv": HEAD + body}
    where = {"kind": "table", "path": "{folder}/t.csv", "path_column": "file", "caption_column": "caption"}
    block = {"filters": [{"kind": "duplicates"}], "samples_per_shard": samples_per_shard}
    found = prepare_files(files, where, **block)
    assert found.counts.dropped == {"duplicate": 3, "duplicate-other-caption": 3}
    assert [sample.captions for sample in found.samples] == [["a"], ["a"]]
