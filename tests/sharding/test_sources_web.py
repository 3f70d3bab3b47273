"""Promises of fetching urls: nothing private is reached, hosts' wishes hold, every fault has its own cause."""

import contextlib
import email.utils
import http.client
import re
import threading
import time

import pytest

from sharding.errors import BadData
from sharding.foreign import _facts
from sharding.secrets import public_address
from sharding.sources import connections
from sharding.sources import web as web_module
from sharding.sources.addresses import remote_url
from sharding.sources.config import FetchConfig
from sharding.sources.connections import Origin, is_public
from sharding.sources.robots import RobotsCache, opted_out
from sharding.sources.web import Downloader
from tests.fixtures.web import BODY, Answer, WebServer, no_proxies, redirect, self_signed

_METADATA = "169.254.169.254"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(web_module, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(web_module, "_robots", RobotsCache())


@contextlib.contextmanager
def _downloader(max_bytes=1000, **options):
    downloader = Downloader(FetchConfig(**{"allow_private": True, "timeout_s": 5} | options), max_bytes)
    try:
        yield downloader
    finally:
        downloader.close()


def _cause(url, **options):
    with _downloader(**options) as downloader:
        try:
            downloader.download(url)
        except BadData as fault:
            return fault.cause
    return None


@pytest.mark.parametrize(
    ("answer", "cause", "requests"),
    [
        (Answer(), None, 1),
        (Answer(length=None), None, 1),  # until the connection ends
        (Answer(b"5\r\nhello\r\n0\r\n\r\n", headers=[("Transfer-Encoding", "chunked")]), None, 1),
        (Answer(b"5\r\nhello\r\n", headers=[("Transfer-Encoding", "chunked")], length=None), "cut-body", 2),
        ([Answer(status=503), Answer()], None, 2),
        ([Answer(status=429, headers=[("Retry-After", "0")]), Answer()], None, 2),
        ([Answer(length=50), Answer()], None, 2),
        (Answer(length=50), "cut-body", 2),
        (Answer(status=500), "http-500", 2),
        (Answer(status=429, headers=[("Retry-After", "3600")]), "http-429", 1),  # longer than we would wait
        (Answer(status=403), "http-403", 1),
        (Answer(status=404), "missing-file", 1),
        (Answer(status=410), "missing-file", 1),
        (Answer(b"x" * 1001), "too-many-bytes", 1),
        (Answer(b"x" * 1001, length=None), "too-many-bytes", 1),
        (Answer(b"x", length=10**15), "too-many-bytes", 1),
        (Answer(headers=[("Content-Encoding", "gzip")]), "encoded-body", 1),
        (Answer(headers=[("Content-Encoding", "identity")]), None, 1),
        (redirect("/ok"), None, 1),
        (redirect("/a"), "too-many-redirects", 6),
        (redirect("file:///etc/hostname"), "bad-address", 1),
        (Answer(status=302), "http-302", 1),
    ],
)
def test_each_kind_of_answer_has_its_cause_and_its_number_of_tries(web, answer, cause, requests):
    web.answers["/a"] = answer
    assert _cause(f"{web.url}/a") == cause
    assert web.seen["/a"] == requests


def test_bodies_come_whole(web):
    large = bytes(range(256)) * 2000
    web.answers |= {"/known": Answer(large), "/unknown": Answer(large, length=None)}
    with _downloader(max_bytes=len(large)) as downloader:
        assert downloader.download(f"{web.url}/known") == large
        assert downloader.download(f"{web.url}/unknown") == large


@pytest.mark.parametrize(
    "answer",
    [
        Answer(wait=3),
        Answer(drip=0.1),
        Answer(hold=threading.Event()),
        Answer(b"x" * 100, drip_body=0.1),
        Answer(b"x" * 100, drip_body=0.1, length=None),
    ],
)
def test_a_host_that_stalls_or_drips_ends_in_time(web, answer):
    web.answers["/a"] = answer
    assert _cause(f"{web.url}/a", timeout_s=0.3, attempts=1) == "timed-out"
    assert not web.finished["/a"]  # it was not waited for


def test_a_time_out_is_tried_again_once(web):
    web.answers["/a"] = [Answer(wait=1), Answer()]
    assert _cause(f"{web.url}/a", timeout_s=0.4) is None


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:9/x", "connection-failed"),
        ("http://no-such-host.invalid/x", "no-such-host"),
        ("http://[::1/x", "bad-address"),
        ("http://host:port/x", "bad-address"),
        ("http:///x", "bad-address"),
        ("ftp://127.0.0.1/x", "bad-address"),
    ],
)
def test_what_cannot_be_asked_at_all_has_its_cause(monkeypatch, url, cause):
    no_proxies(monkeypatch)
    assert _cause(url, attempts=1, timeout_s=2) == cause


def test_connections_are_kept_and_a_closed_one_is_replaced_without_a_try(web):
    web.answers |= {f"/{n}": Answer() for n in range(20)}
    with _downloader(attempts=1) as downloader:
        for number in range(10):
            downloader.download(f"{web.url}/{number}")
        assert web.connections == 1
        idle = next(iter(downloader._pool._idle))
        connections.cut(idle.sock)  # as a host does that is tired of waiting
        assert downloader.download(f"{web.url}/11") == BODY
        with contextlib.suppress(BadData):
            downloader.download(f"{web.url}/missing")
        downloader.download(f"{web.url}/12")
    assert web.connections == 2


def test_few_idle_connections_are_kept_and_none_after_the_end(web):
    servers = [WebServer() for _ in range(6)]
    try:
        with _downloader(threads=2) as downloader:
            for server in servers:
                server.answers["/a"] = Answer()
                downloader.download(f"{server.url}/a")
            assert len(downloader._pool._idle) == 4  # twice the threads
            kept = list(downloader._pool._idle)
            late = downloader._pool.new(Origin(False, "127.0.0.1", web.port))
            late.connect()
        downloader._pool.give(Origin(False, "127.0.0.1", web.port), late)
        assert [connection.sock for connection in (*kept, late)] == [None] * 5
    finally:
        for server in servers:
            server.close()


def test_no_more_requests_reach_a_host_at_once_than_allowed(web):
    web.answers |= {f"/{n}": Answer(wait=0.05) for n in range(12)}
    with _downloader(per_host=3) as downloader:
        threads = [threading.Thread(target=downloader.download, args=(f"{web.url}/{n}",)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert web.most_at_once == 3
    assert sum(web.seen.values()) == 12


def test_a_host_that_asks_for_rest_gets_it_from_all_threads(web, monkeypatch):
    web.answers["/busy"] = [Answer(status=429, headers=[("Retry-After", "1")]), Answer()]
    naps = []
    with _downloader() as downloader:
        monkeypatch.setattr(downloader, "_sleep", naps.append)
        downloader.download(f"{web.url}/busy")
        downloader.download(f"{web.url}/ok")
    assert naps[1] == 1.0  # before the second try
    assert all(0.5 < nap <= 1 for nap in naps[2:])  # before every other request to the host
    assert len(naps) == 4


def test_a_retry_after_may_be_a_date():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < web_module._retry_after(date) <= 100
    assert web_module._retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert web_module._retry_after("soon") is None


@pytest.mark.parametrize(
    ("tags", "out"),
    [
        (["noai"], "noai"),
        (["nofollow, NoImageAI"], "noimageai"),
        (["nofollow", "noindex"], "noindex"),
        (["none"], "none"),
        (["otherbot: noai, noindex"], None),
        (["glscl-pipeline: noai"], "noai"),
        (["otherbot: nofollow, glscl-pipeline: noimageindex"], "noimageindex"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noindex"], "noindex"),
        (["max-image-preview: large"], None),
        ([""], None),
    ],
)
def test_opt_out_headers_hold_for_all_or_for_the_one_they_name(tags, out):
    assert opted_out(tags, "glscl-pipeline", FetchConfig().opt_out) == out


def test_a_file_whose_host_opts_out_is_left_out_unless_told_otherwise(web):
    web.answers["/a"] = Answer(headers=[("X-Robots-Tag", "nofollow"), ("X-Robots-Tag", "noimageai")])
    assert _cause(f"{web.url}/a") == "opted-out"
    assert _cause(f"{web.url}/a", opt_out=["noai"]) is None
    assert _cause(f"{web.url}/a", opt_out=[]) is None


def test_robots_txt_is_asked_once_a_host_and_obeyed(web):
    rules = "User-agent: *\nDisallow: /private\n\nUser-agent: other\nDisallow: /\n"
    web.answers |= {
        "/robots.txt": Answer(rules.encode()),
        "/private/a": Answer(),
        "/b": redirect("/private/a"),
    }
    assert _cause(f"{web.url}/private/a", robots=True) == "robots-txt"
    assert _cause(f"{web.url}/ok", robots=True) is None
    assert _cause(f"{web.url}/b", robots=True) == "robots-txt"  # where a redirect leads, too
    assert web.seen["/robots.txt"] == 1
    assert web.seen["/private/a"] == 0
    assert _cause(f"{web.url}/private/a") is None  # not asked for


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (Answer(status=404), None),
        (Answer(status=403), None),
        (Answer(status=503), "robots-txt"),
        (Answer(b"User-agent: glscl-pipeline\nDisallow: /"), "robots-txt"),
        (Answer(headers=[("X-Robots-Tag", "noindex")], body=b""), None),
    ],
)
def test_a_host_without_rules_lets_in_and_one_that_cannot_say_does_not(web, answer, cause):
    web.answers["/robots.txt"] = answer
    assert _cause(f"{web.url}/ok", robots=True) == cause


def test_the_user_agent_says_who_to_write_to(web):
    with _downloader(user_agent="birds/2.0", contact="mailto:me@example.org") as downloader:
        downloader.download(f"{web.url}/ok")
    assert web.headers["/ok"]["User-Agent"] == "birds/2.0 (+mailto:me@example.org)"
    assert web.headers["/ok"]["Accept-Encoding"] == "identity"
    with pytest.raises(ValueError, match="name or name/version"):
        FetchConfig(user_agent="a b\r\nX: y")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        (_METADATA, False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::5db8:d70e", True),
        ("ff02::1", False),
    ],
)
def test_public_addresses_are_told_from_all_others(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", _METADATA])
def test_private_addresses_are_refused_however_they_are_written(monkeypatch, web, host):
    assert _cause(f"http://{host}:{web.port}/ok", allow_private=False) == "private-address"
    assert not web.connections


def _names(monkeypatch, table, web=None):
    """Resolve names from a table of lists, one address for each time, and connect "public" ones to ``web``."""
    asked = []
    real_connect = connections.socket.create_connection

    def resolve(host, port):
        asked.append(host)
        addresses = table[host]
        return [addresses.pop(0) if len(addresses) > 1 else addresses[0]]

    def connect(place, timeout):
        host, port = place
        if host == _PUBLIC:
            return real_connect(("127.0.0.1", port), timeout)
        raise AssertionError(f"connected to {host}")

    monkeypatch.setattr(connections, "resolve", resolve)
    monkeypatch.setattr(connections.socket, "create_connection", connect)
    return asked


_PUBLIC = "93.184.215.14"


def test_a_redirect_from_an_allowed_host_to_a_private_address_is_refused(monkeypatch, web):
    web.answers |= {
        "/a": redirect(f"http://{_METADATA}/latest/meta-data/"),
        "/b": redirect(f"http://inside:{web.port}/ok"),
        "/c": redirect("/ok"),
    }
    _names(monkeypatch, {"outside": [_PUBLIC], "inside": ["10.0.0.7"], _METADATA: [_METADATA]})
    causes = [_cause(f"http://outside:{web.port}/{path}", allow_private=False) for path in "abc"]
    assert causes == ["private-address", "private-address", None]


def test_the_address_that_was_judged_is_the_one_connected_to(monkeypatch, web):
    # A name that answers with a public address first and a private one from then on.
    asked = _names(monkeypatch, {"rebinding": [_PUBLIC, "127.0.0.1"]})
    with _downloader(allow_private=False) as downloader:
        assert downloader.download(f"http://rebinding:{web.port}/ok") == BODY
        assert asked == ["rebinding"]  # once: what it would answer next does not matter
        connections.cut(next(iter(downloader._pool._idle)).sock)  # so that it is asked again
        with pytest.raises(BadData, match="private-address"):
            downloader.download(f"http://rebinding:{web.port}/ok")
    assert web.seen["/ok"] == 1


def test_of_a_name_with_both_only_public_addresses_are_connected_to(monkeypatch):
    monkeypatch.setattr(connections, "resolve", lambda host, port: ["10.0.0.1", _PUBLIC])
    assert connections.allowed_addresses(Origin(False, "both", 80), allow_private=False) == [_PUBLIC]


def test_tls_verifies_the_name_although_the_address_is_connected_to(monkeypatch, tmp_path):
    no_proxies(monkeypatch)
    context, authority = self_signed(tmp_path, "outside")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    server = WebServer(context)
    server.answers["/ok"] = Answer()
    try:
        _names(monkeypatch, {"outside": [_PUBLIC], "impostor": [_PUBLIC]})
        assert _cause(f"https://outside:{server.port}/ok", allow_private=False) is None
        assert _cause(f"https://impostor:{server.port}/ok", allow_private=False) == "tls-failed"
        monkeypatch.delenv("SSL_CERT_FILE")
        assert _cause(f"https://outside:{server.port}/ok", allow_private=False) == "tls-failed"
    finally:
        server.close()


def test_a_tls_handshake_that_never_ends_is_ended(monkeypatch):
    no_proxies(monkeypatch)
    with connections.socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"https://127.0.0.1:{deaf.getsockname()[1]}/"
        assert _cause(url, timeout_s=0.2, attempts=1) == "timed-out"


def test_a_proxy_of_the_environment_gets_the_request_but_no_private_address(monkeypatch, web):
    no_proxies(monkeypatch)
    monkeypatch.setenv("http_proxy", f"http://me:pw@127.0.0.1:{web.port}")
    web.answers["http://no-such-host.invalid/a"] = Answer()
    assert _cause("http://no-such-host.invalid/a", allow_private=False) is None
    assert web.headers["http://no-such-host.invalid/a"]["Proxy-Authorization"].startswith("Basic ")
    assert _cause(f"http://{_METADATA}/a", allow_private=False) == "private-address"


def test_user_names_in_urls_are_used_and_neither_recorded_nor_taken_elsewhere(web):
    other = WebServer()
    web.answers["/a"] = redirect(f"http://127.0.0.1:{other.port}/b")
    try:
        with _downloader() as downloader, pytest.raises(BadData) as caught:
            downloader.download(f"http://me:s3cret@127.0.0.1:{web.port}/a")
        assert "s3cret" not in str(caught.value)
        assert web.headers["/a"]["Authorization"].startswith("Basic ")
        assert "Authorization" not in other.headers["/b"]
    finally:
        other.close()


def test_urls_are_encoded_where_they_are_not(web):
    web.answers |= {"/a%20b/%C3%A9.jpg?q=%20x": Answer(), "/%41": Answer()}
    with _downloader() as downloader:
        assert downloader.download(f"{web.url}/a b/é.jpg?q= x#part") == BODY
        assert downloader.download(f"{web.url}/%41") == BODY
        assert downloader.download(f"HTTP{web.url.removeprefix('http')}/%41") == BODY


def test_close_ends_what_is_in_hand(web):
    web.answers["/a"] = Answer(hold=threading.Event())
    done = threading.Event()
    with _downloader(timeout_s=60) as downloader:

        def download():
            with contextlib.suppress(BadData, http.client.HTTPException, web_module.Cancelled):
                downloader.download(f"{web.url}/a")
            done.set()

        threading.Thread(target=download, daemon=True).start()
        while not web.seen["/a"]:
            time.sleep(0.01)
    assert done.wait(5)


def test_recorded_addresses_hold_no_secrets():
    assert public_address("https://me:pw@host/a.png?id=3") == "https://host/a.png?id=3"
    assert public_address("https://h/a?X-Amz-Signature=s&id=3&token=t") == "https://h/a?id=3"
    assert public_address("https://h/a?access_token=t&authkey=k&api_key=a&id=3") == "https://h/a?id=3"
    assert public_address("http://me:pw@[broken/x") == "http://[broken/x"
    assert public_address("http://user:p/w@host/x") == "http://host/x"
    assert public_address("http://h/a b.png?id=3&pwd=p&key=k&jwt=j&pass=p#f") == "http://h/a b.png?id=3"
    assert public_address("s3://AKIA:wJalr/XUtn@bucket/k") == "s3://bucket/k"
    for ordinary in (
        "http://host/a@b.jpg",
        "https://h:8080/1/47@N00_b.jpg?v=2@x",
        "s3://b/a@b#c.jpg?token=1",
    ):
        assert public_address(ordinary) == ordinary
    with pytest.raises(BadData) as caught:
        remote_url("s3://AKIA:wJalr/XUtn@bucket/k")
    assert not re.search("AKIA|wJalr|XUtn", str(caught.value))
    assert "wJalr" not in str(_facts(b'{"url": "http://AKIA:wJalr/XUtn@host/k?jwt=wJalr"}'))
    assert public_address("folder/a?b@c.png") == "folder/a?b@c.png"
