"""Promises of the fetcher: what it reads of files, in which order results come, and how much it holds."""

import threading
import time

import pytest

from sharding.config import PrepareConfig
from sharding.errors import BadData
from sharding.sources import Input
from sharding.sources.addresses import BelowBase, WebUrl, table_address
from sharding.sources.budget import ByteBudget, Cancelled
from sharding.sources.config import FetchConfig, FolderSource, TableSource
from sharding.sources.fetch import Fetcher
from sharding.storage import open_storage
from tests.fixtures.web import Answer


def _fetcher(folder, max_bytes=100, source=None, **options):
    config = FetchConfig(**{"allow_private": True} | options)
    source = source or FolderSource(kind="folder", path=str(folder))
    storage = open_storage(folder)
    return Fetcher(storage, storage.url, source, config, max_bytes)


@pytest.mark.parametrize(
    ("address", "cause"),
    [
        ("here.png", None),
        ("ABSOLUTE/here.png", None),
        ("file://ABSOLUTE/here.png", None),
        ("FILE://localhost/ABSOLUTE/here%2epng", None),
        ("gone.png", "missing-file"),
        ("../here.png", "bad-address"),
        ("ftp://host/a.png", "bad-address"),
        ("folder", "missing-file"),
        ("large.png", "too-many-bytes"),
        ("n" * 300, "unreadable-file"),
    ],
)
def test_stored_files_are_fetched_or_counted(tmp_path, address, cause):
    (tmp_path / "here.png").write_bytes(b"x")
    (tmp_path / "large.png").write_bytes(b"x" * 101)
    (tmp_path / "folder").mkdir()
    try:
        media = table_address(address.replace("ABSOLUTE", str(tmp_path)), "", on_this_machine=True)
        # A table on this machine: the one source whose names may be absolute paths.
        table = TableSource(kind="table", path=str(tmp_path / "t.csv"), path_column="p", caption_column="c")
        fault = _fetcher(tmp_path, source=table).fetch(Input.at(media)).fault
    except BadData as refused:
        fault = refused
    assert (fault.cause if fault else None) == cause


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20, (3 << 20) + 1])
def test_files_of_any_size_come_whole_up_to_the_limit(tmp_path, size):
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "a.png").write_bytes(data[:size])
    got = _fetcher(tmp_path, max_bytes=3 << 20).fetch(Input.at(BelowBase("a.png")))
    assert (got.media, got.fault and got.fault.cause) == (
        (data[:size], None) if size <= 3 << 20 else (b"", "too-many-bytes")
    )


@pytest.mark.parametrize("now", [b"", b"12", b"1234"])
def test_a_file_that_changed_its_size_since_it_was_listed_is_told(tmp_path, now):
    (tmp_path / "a.png").write_bytes(now)
    assert _fetcher(tmp_path).fetch(Input.at(BelowBase("a.png"), size=3)).fault.cause == "size-mismatch"


def test_a_listed_size_above_the_limit_is_not_read(tmp_path):
    fault = _fetcher(tmp_path).fetch(Input.at(BelowBase("not-even-there.png"), size=101)).fault
    assert fault.cause == "too-many-bytes"


def test_many_are_fetched_in_their_order(tmp_path):
    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(b"%d" % number)
    inputs = (Input.at(BelowBase(f"{number}.png")) for number in range(100))
    got = _fetcher(tmp_path, threads=4).fetch_all(inputs)
    assert [fetched.media for fetched in got] == [b"%d" % number for number in range(100)]


class _Watched(ByteBudget):
    """Remembers the most that was held."""

    def __init__(self, limit):
        super().__init__(limit)
        self.most = 0
        budgets.append(self)

    def _fits(self, lease, size):
        self.most = max(self.most, self._held)
        return super()._fits(lease, size)


budgets: list[_Watched] = []


def _drain(fetcher, inputs, monkeypatch):
    """Use the results one by one, slowly enough that reading ahead meets its bound."""
    from sharding.sources import fetch

    monkeypatch.setattr(fetch, "ByteBudget", _Watched)
    budgets.clear()
    results, mostly = [], 0
    for fetched in fetcher.fetch_all(inputs):
        time.sleep(0.005)
        results.append(fetched)
        mostly = max(mostly, budgets[0].held)
    return results, max(mostly, budgets[0].most)


@pytest.mark.parametrize("known", [True, False])
def test_bytes_read_ahead_stay_within_the_budget_and_a_larger_file_passes(tmp_path, monkeypatch, known):
    # Numbers in MiB; the budget is 4. Unsized reads hold a block of 1 MiB before they know.
    sizes = [1, 2, 9, 1, 1, 1, 6, 1, 3, 3, 3, 0, 1, 20, 1]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.png").write_bytes(b"%02d" % number + b"x" * (size << 20))
    inputs = [
        Input.at(BelowBase(f"{n}.png"), size=2 + (size << 20) if known else None)
        for n, size in enumerate(sizes)
    ]
    fetcher = _fetcher(tmp_path, max_bytes=64 << 20, threads=8, in_flight_mb=4)
    results, most = _drain(fetcher, inputs, monkeypatch)
    assert [item.media[:2] for item in results] == [b"%02d" % n for n in range(len(sizes))]
    assert [len(item.media) for item in results] == [2 + (size << 20) for size in sizes]
    assert most <= (4 << 20) + (20 << 20) + 2  # the budget, and the one file that is next


def test_urls_stay_within_the_budget_though_they_share_few_places_at_a_host(tmp_path, web, monkeypatch):
    body = b"x" * (1 << 20)
    for number in range(12):
        sized = number % 3
        web.answers[f"/{number}"] = Answer(body * (1 + number % 4), length=-1 if sized else None)
    inputs = [Input.at(WebUrl(f"{web.url}/{number}")) for number in range(12)]
    fetcher = _fetcher(tmp_path, max_bytes=8 << 20, threads=6, in_flight_mb=3, per_host=2)
    results, most = _drain(fetcher, inputs, monkeypatch)
    assert [len(item.media) >> 20 for item in results] == [1 + number % 4 for number in range(12)]
    assert most <= 7 << 20


def test_what_is_next_never_waits_and_others_wait_for_room():
    budget = ByteBudget(10)
    first, second, third = budget.lease(0), budget.lease(1), budget.lease(2)
    first.reserve(100)  # larger than the budget
    assert not second.try_reserve(1)
    reserved = threading.Event()

    def reserve():
        third.reserve(5)
        reserved.set()

    thread = threading.Thread(target=reserve)
    thread.start()
    assert not reserved.wait(0.05)
    first.release()
    thread.join(5)
    assert reserved.is_set()
    assert budget.held == 5
    second.reserve(100)  # next now
    second.reserve(3)
    assert budget.held == 8
    for lease in (second, third):
        lease.release()
    assert budget.held == 0


def test_who_waits_for_room_is_woken_when_nobody_wants_it_any_more():
    budget = ByteBudget(1)
    budget.lease(0).reserve(1)
    causes = []

    def wait():
        try:
            budget.lease(1).reserve(1)
        except Cancelled as error:
            causes.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    budget.cancel()
    thread.join(5)
    assert len(causes) == 1


def test_a_reader_that_stops_early_leaves_no_thread_behind(tmp_path, web):
    before = threading.active_count()
    hold = threading.Event()
    web.answers["/slow"] = Answer(hold=hold)
    (tmp_path / "0.png").write_bytes(b"x")
    inputs = [Input.at(BelowBase("0.png")), *(Input.at(WebUrl(f"{web.url}/slow")) for _ in range(10))]
    results = _fetcher(tmp_path, threads=4).fetch_all(inputs)
    assert next(results).media == b"x"
    results.close()
    hold.set()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_faults_release_what_they_held(tmp_path, web):
    web.answers["/cut"] = Answer(b"x" * 10, length=1 << 20)
    budget = ByteBudget(10 << 20)
    lease = budget.lease(1)
    fetched = _fetcher(tmp_path, max_bytes=2 << 20, attempts=1).fetch(
        Input.at(WebUrl(f"{web.url}/cut")), lease
    )
    assert isinstance(fetched.fault, BadData)
    assert budget.held == 0


def test_what_decides_which_samples_there_are_is_in_the_digest_and_the_rest_is_not():
    def digest(**fetch):
        value = {"source": {"kind": "folder", "path": "/x"}, "modality": "image", "fetch": fetch}
        return PrepareConfig.model_validate(value).digest

    assert digest() == digest(threads=3, timeout_s=1, attempts=5, contact="me@example.org", in_flight_mb=1)
    assert digest() == digest(opt_out=["NoIndex", "noai", "noimageai", "noimageindex", "noai"])
    assert len({digest(), digest(robots=True), digest(opt_out=[])}) == 3


@pytest.mark.parametrize("size", [100, (2 << 20) + 1, (2 << 20) - 1])
def test_a_file_that_changes_its_size_while_it_is_read_is_told(tmp_path, monkeypatch, size):
    (tmp_path / "a.png").write_bytes(b"x" * ((2 << 20) - (size > 100)))
    fetcher = _fetcher(tmp_path, max_bytes=3 << 20)
    monkeypatch.setattr(type(open_storage(tmp_path)), "size", lambda storage, path: size)
    fault = fetcher.fetch(Input.at(BelowBase("a.png"))).fault
    assert (fault and fault.cause) == (None if size == (2 << 20) - 1 else "size-mismatch")
