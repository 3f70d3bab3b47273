"""What ``logs -f`` makes of a stream that ends, and who is asked where the environment names a proxy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import jobs
from cluster.errors import ClusterError
from cluster.loopback import ask_loopback_directly, direct_environment, is_loopback, proxy_variable
from sharding.errors import UserError
from sharding.storage import StorageConfig, open_storage
from tests.fixtures.job_server import JOB, JobServer, serving

LOG = "".join(f"line {number}: täglich\n" for number in range(40)) + "the last line, cut off"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
NOBODY = "http://127.0.0.1:9"  # nothing listens at the discard port


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a test makes of the environment is undone."""
    monkeypatch.setattr(jobs, "_POLL_S", 0.01)
    for name in _PROXIES:
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, "")  # so that it is put back as it was
            monkeypatch.delenv(spelling)


@pytest.mark.parametrize(
    ("streams", "ends_after"),
    [
        ([(len(LOG), "closed")], 1),
        ([(100, "closed"), (100, "closed"), (0, "closed"), (333, "closed"), (len(LOG), "closed")], 5),
        ([(100, "closed"), (40, "closed"), (len(LOG), "closed")], 3),  # a stream that did not get as far
        ([(250, "closed")], 1),  # the job ended, the stream had not told all
        ([(250, "cut")], 1),
    ],
)
def test_no_line_of_a_followed_log_is_lost_or_doubled(
    streams: list[tuple[int, str]], ends_after: int
) -> None:
    with serving(JobServer(LOG, streams, ends_after)) as server:
        assert list(jobs.logs(server.address, JOB, follow=True)) == LOG.splitlines()


def test_a_connection_that_is_cut_while_the_job_runs_is_told_in_a_line() -> None:
    seen = []

    def follow() -> None:
        for line in jobs.logs(server.address, JOB, follow=True):
            seen.append(line)

    broken = JobServer(LOG, [(250, "cut")], ends_after=2)
    with serving(broken) as server, pytest.raises(ClusterError) as told:
        follow()
    assert seen == LOG[:250].splitlines()[: len(seen)]
    assert len(seen) > 10
    assert "1006" in str(told.value)
    assert f"the job goes on (RUNNING): glscl logs -f {JOB}" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_job_or_server_that_is_not_there_is_told_in_a_line() -> None:
    with serving(JobServer(LOG)) as server:
        for ask in (jobs.status, lambda *asked: list(jobs.logs(*asked, follow=True))):
            with pytest.raises(ClusterError, match='there is no job "nobody"'):
                ask(server.address, "nobody")
    with pytest.raises(ClusterError, match=r"no Ray job server answers at http://127\.0\.0\.1:\d+$"):
        list(jobs.logs(server.address, JOB, follow=True))


def test_ctrl_c_leaves_a_followed_log_with_one_line() -> None:
    """As a terminal does it, to the command; takes the second that its imports need."""
    with serving(JobServer(LOG, [(250, "held")], ends_after=9)) as server:
        following = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "logs", "-f", JOB, "--address", server.address],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert following.stdout is not None
        assert following.stdout.readline() == "line 0: täglich\n"
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=60)
    assert following.returncode == 130
    assert errors == f"the job goes on; it ends with glscl stop {JOB}\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": NOBODY},
        {"http_proxy": NOBODY, "NO_PROXY": "example.org"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"HTTP_PROXY": NOBODY, "HTTPS_PROXY": NOBODY, "no_proxy": "example.org", "NO_PROXY": "other.org"},
    ],
)
def test_a_server_on_loopback_is_asked_without_the_environments_proxy(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with serving(JobServer(LOG, [(len(LOG), "closed")])) as server:
        assert jobs.status(server.address, JOB).status == "RUNNING"
        assert list(jobs.logs(server.address, JOB)) == LOG.splitlines()
    # What was excepted stays so, by the spelling that counts where there are two.
    for name in ("no_proxy", "NO_PROXY"):
        assert variables.get("no_proxy", variables.get("NO_PROXY", "")) in os.environ[name]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"HTTP_PROXY": NOBODY}, "HTTP_PROXY"),
        ({"http_proxy": "http://user:word@127.0.0.1:9"}, "http_proxy"),
        ({"ALL_PROXY": NOBODY}, "ALL_PROXY"),
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY"),
    ],
)
def test_a_proxy_through_which_a_server_is_not_reached_is_named(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError) as told:
        jobs.status("http://head.invalid:8265", JOB)
    assert str(told.value) == (
        "no Ray job server answers at http://head.invalid:8265 (asked through the proxy that "
        f"{named} names; NO_PROXY excepts hosts)"
    )


def test_a_storage_on_loopback_is_asked_without_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's rule of what NO_PROXY excepts is another than requests'."""
    monkeypatch.setenv("HTTP_PROXY", NOBODY)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "any")
    with serving(JobServer()) as server:  # it answers 404 to what it does not know
        ask_loopback_directly()
        config = StorageConfig(url="s3://bucket/prefix", endpoint_url=server.address, attempts=1)
        with pytest.raises(UserError, match=f"does not exist at {server.address}"):
            open_storage(config).check(write=False)


def test_what_is_loopback_and_what_a_proxy_is_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = ["localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.8.0.1", "::1", "[::1]"]
    others = ["", "localhost.example.org", "128.0.0.1", "head", "127.0.0.1.nip.io", "::2", "0.0.0.0"]
    assert all(map(is_loopback, loopback))
    assert not any(map(is_loopback, others))
    assert direct_environment("http://127.0.0.1:1") == {}  # no proxy, nothing to except
    monkeypatch.setenv("HTTP_PROXY", NOBODY)
    assert "127.0.0.7" in direct_environment("http://127.0.0.7:1", "http://head:1")["NO_PROXY"].split(",")
    assert "head" not in direct_environment("http://head:1")["NO_PROXY"].split(",")
    assert proxy_variable("https://head:1") is None
    monkeypatch.setenv("NO_PROXY", "head")
    assert proxy_variable("http://head:1") is None
    monkeypatch.setenv("NO_PROXY", "*")
    assert direct_environment() == {}
