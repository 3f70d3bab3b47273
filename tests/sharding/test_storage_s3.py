"""The promises of storage on S3: on a real server, and through a proxy that breaks answers on purpose."""

import http.client
import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sharding.errors import StorageFault, UserError
from sharding.storage import Storage, open_storage
from sharding.storage_s3 import S3Backend
from tests.fixtures.s3 import running_s3_server

pytestmark = pytest.mark.server


class FaultyProxy:
    """Stands between client and server. Each fault in ``faults`` spoils one answer, in order; then all is
    well.

    ``cut``: half the body, then the connection closes. ``busy``: 503. ``stall``: no answer for a while.
    ``reset``: the request does not reach the server. ``lost``: it is carried out, but the answer is lost.
    ``page``: a proxy's HTML. ``PUT:busy`` and the like wait for the next request of that kind.
    """

    def __init__(self, server):
        self.faults: deque[str] = deque()
        self._lock = threading.Lock()
        self.requests: list[tuple[str, str | None]] = []
        outer, host = self, server.endpoint_url.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests.append((self.command, self.headers.get("Range")))
                fault = outer.next_fault(self.command)
                self.close_connection = True
                if fault == "reset":
                    return
                if fault == "stall":
                    time.sleep(1.5)
                    return
                if fault in ("busy", "page"):
                    answer = (
                        b"<Error><Code>SlowDown</Code></Error>" if fault == "busy" else b"<html>Bad gateway"
                    )
                    self.send_response(503 if fault == "busy" else 502)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                    return
                connection = http.client.HTTPConnection(host, timeout=30)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                reply = connection.getresponse()
                content = reply.read()
                connection.close()
                if fault == "lost":
                    return
                self.send_response_only(reply.status)
                for name, value in reply.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def next_fault(self, command):
        with self._lock:
            if self.faults and self.faults[0].rpartition(":")[0] in ("", command):
                return self.faults.popleft().rpartition(":")[2]
            return None

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("sharding.storage_s3._FIRST_WAIT_S", 0.02)


@pytest.fixture
def proxy(s3_server):
    proxy = FaultyProxy(s3_server)
    yield proxy
    proxy.close()


@pytest.fixture
def storage(s3_server, proxy):
    """A storage behind the proxy that gives up after 4 tries and 0.7 s of silence."""
    return s3_server.storage("data", endpoint_url=proxy.url, attempts=4, read_timeout_s=0.7)


def test_a_read_that_breaks_goes_on_by_range_from_where_it_broke(storage, proxy):
    data = os.urandom(3 << 20)
    storage.write_bytes("file", data)
    proxy.requests.clear()
    proxy.faults.extend(["cut", "cut"])
    assert storage.read_bytes("file") == data
    half = len(data) // 2
    assert proxy.requests == [
        ("GET", None), ("GET", f"bytes={half}-"), ("GET", f"bytes={half + (len(data) - half) // 2}-"),
    ]  # fmt: skip
    proxy.requests.clear()
    proxy.faults.append("cut")
    assert storage.read_bytes("file", 1000, 2000) == data[1000:3000]
    assert proxy.requests == [("GET", "bytes=1000-2999"), ("GET", "bytes=2000-2999")]


def test_a_read_that_breaks_while_the_file_is_replaced_gives_the_new_file_whole(storage, proxy, monkeypatch):
    old, new = b"o" * 100_000, b"n" * 120_000
    storage.write_bytes("file", old)
    proxy.faults.append("cut")
    with monkeypatch.context() as patch:
        # The pause after the broken answer is when the other writer comes.
        patch.setattr("sharding.storage_s3.time.sleep", lambda _: storage.write_bytes("file", new))
        assert storage.read_bytes("file") == new


@pytest.mark.parametrize("fault", ["busy", "page", "stall", "reset", "cut", "lost"])
def test_every_call_outlasts_a_transient_fault(storage, proxy, fault, tmp_path):
    data = os.urandom(100_000)
    source = tmp_path / "source"
    source.write_bytes(data)
    for call in (
        lambda: storage.write_bytes("a/file", data),
        lambda: storage.upload(source, "a/file"),
        lambda: storage.read_bytes("a/file"),
        lambda: storage.size("a/file"),
        lambda: list(storage.list()),
        lambda: storage.download("a/file", tmp_path / "copy", size=len(data)),
        lambda: storage.create_exclusive("claim", data),
        lambda: storage.check(write=True),
        lambda: storage.delete("a", recursive=True),
    ):
        proxy.faults.append(fault)
        result = call()
        proxy.faults.clear()
        assert result not in (False, [])
    assert [file.path for file in storage.list()] == ["claim"]
    assert storage.read_bytes("claim") == data
    assert (tmp_path / "copy").read_bytes() == data


def test_a_fault_that_stays_ends_after_the_configured_tries_with_the_url(storage, proxy):
    proxy.faults.extend(["busy"] * 100)
    with pytest.raises(StorageFault) as caught:
        storage.read_bytes("file")
    assert storage.url_of("file") in str(caught.value)
    assert "4 tries" in str(caught.value)
    assert len(proxy.requests) == 4  # nothing below this layer retries


def test_silence_ends_by_time_out(storage, proxy):
    proxy.faults.extend(["stall"] * 100)
    with pytest.raises(StorageFault):
        storage.size("file")
    assert len(proxy.requests) == 4


def test_a_create_whose_answer_was_lost_is_still_ours_and_one_that_lost_the_race_is_not(storage, proxy):
    proxy.faults.append("lost")
    assert storage.create_exclusive("claim", b"mine")
    proxy.faults.append("busy")
    assert not storage.create_exclusive("claim", b"other")
    assert storage.read_bytes("claim") == b"mine"


def test_a_large_upload_goes_in_parts_and_outlasts_faults(storage, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("sharding.storage_s3._PART", 5 << 20)  # the least that S3 allows
    storage = Storage(storage.config.model_copy(update={"read_timeout_s": 20}))
    data = os.urandom(12 << 20)
    (tmp_path / "source").write_bytes(data)
    proxy.faults.extend(["POST:busy", "PUT:busy", "PUT:reset", "PUT:lost", "POST:lost"])
    sent = storage.upload(tmp_path / "source", "large")
    assert [command for command, _ in proxy.requests].count("POST") >= 2  # begin and complete
    assert not proxy.faults
    storage.download("large", tmp_path / "copy", size=sent.size, sha256=sent.sha256)
    assert (tmp_path / "copy").read_bytes() == data


def test_an_upload_in_parts_that_fails_leaves_no_parts_behind(
    storage, proxy, s3_server, tmp_path, monkeypatch
):
    (tmp_path / "source").write_bytes(bytes(12 << 20))
    bucket = s3_server.bucket()  # of its own: all that is left in it would be of this upload

    def spoil(self, operation, *arguments, **request):
        if operation == "upload_part" and request["PartNumber"] == 2:
            raise StorageFault("spoilt")
        return true_call(self, operation, *arguments, **request)

    true_call = S3Backend._call
    monkeypatch.setattr("sharding.storage_s3._PART", 5 << 20)
    storage = Storage(storage.config.model_copy(update={"url": f"s3://{bucket}/data", "read_timeout_s": 20}))
    monkeypatch.setattr(S3Backend, "_call", spoil)
    with pytest.raises(StorageFault, match="spoilt"):
        storage.upload(tmp_path / "source", "large")
    assert not s3_server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert list(storage.list()) == []


def test_a_server_that_dies_and_comes_back_is_waited_for(monkeypatch):
    monkeypatch.setattr("sharding.storage_s3._LONGEST_WAIT_S", 0.5)
    with running_s3_server() as server, ThreadPoolExecutor(1) as pool:
        storage = server.storage("data", attempts=100)
        storage.write_bytes("file", b"content")
        server.kill()
        reading = pool.submit(storage.read_bytes, "file")
        time.sleep(1)
        server.start()
        assert reading.result(60) == b"content"


@pytest.mark.parametrize("page", [7, 1000])
def test_a_listing_is_whole_and_sorted_and_one_request_where_a_page_holds_it(s3_server, monkeypatch, page):
    monkeypatch.setattr("sharding.storage_s3._PAGE", page)
    monkeypatch.setattr("sharding.storage_s3._DELETE_AT_ONCE", 10)
    storage = s3_server.storage("many")
    names = [f"{number:04d}/x" if number % 5 == 0 else f"{number:04d}" for number in range(60)]
    names = sorted(names + [f"{number:04d}.txt" for number in range(0, 60, 5)])
    with ThreadPoolExecutor(16) as pool:  # one Storage, many threads
        list(pool.map(lambda name: storage.write_bytes(name, b"1"), names))
    asked, plain = list[str](), S3Backend._once

    def once(self, operation, **request):
        asked.append(operation)
        return plain(self, operation, **request)

    monkeypatch.setattr(S3Backend, "_once", once)
    assert [file.path for file in storage.list()] == names
    assert (asked == ["list_objects_v2"]) == (page == 1000)
    storage.delete("", recursive=True)
    assert list(storage.list()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"access_key": "nobody", "secret_key": "wrongsecret"}, "the access key is not known"),
        ({"secret_key": "wrongsecret"}, "the secret key does not belong to the access key"),
        ({"url": "s3://no-such-bucket/x"}, "bucket 'no-such-bucket' does not exist"),
        ({"url": "s3://No_bucket!/x"}, "not a valid name"),
        ({"endpoint_url": "http://127.0.0.1:9"}, "cannot reach http://127.0.0.1:9"),
        ({"endpoint_url": "http://nowhere.invalid"}, "cannot reach http://nowhere.invalid"),
        ({"access_key": None, "secret_key": None, "anonymous": True}, "access denied"),
        ({"access_key": None, "secret_key": None}, "no credentials: set AWS_ACCESS_KEY_ID"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line_before_anything_starts(
    s3_server, change, message, caplog, monkeypatch
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    url = s3_server.fresh("x")
    storage = Storage(s3_server.config(**{"url": url, **change}))
    with caplog.at_level(logging.DEBUG, "sharding"), pytest.raises(UserError, match=message) as caught:
        storage.check(write=True)
    text = str(caught.value)
    assert text.startswith(storage.url + ":")
    assert "\n" not in text
    for secret in ("wrongsecret", s3_server.secret_key, s3_server.access_key):
        assert secret not in text + caplog.text


def test_wrong_credentials_are_told_apart_from_a_missing_file_also_later(s3_server):
    storage = s3_server.storage("x", secret_key="wrong")
    for call in (storage.read_bytes, storage.size, storage.exists):
        with pytest.raises(UserError):
            call("file")
    with pytest.raises(UserError):
        storage.write_bytes("file", b"")
    with pytest.raises(UserError):
        next(storage.list())


def test_a_user_who_may_only_read_is_told_so_when_writing_is_to_come(s3_server, monkeypatch):
    storage = s3_server.storage("x")
    storage.check(write=True)
    true_once = S3Backend._once

    def deny(self, operation, **request):
        # What S3 answers to a key without the permission; SeaweedFS has users of one kind only in this set-
        # up.
        return true_once(Storage(s3_server.config(self.url_of(""), access_key="x", secret_key="y"))._backend
                         if operation == "put_object" else self, operation, **request)  # fmt: skip

    monkeypatch.setattr(S3Backend, "_once", deny)
    storage.check(write=False)
    with pytest.raises(UserError):
        storage.check(write=True)


def test_endpoint_and_credentials_come_from_the_usual_variables(s3_server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    url = s3_server.fresh("x")
    open_storage(url).write_bytes("file", b"1")
    assert open_storage(url).read_bytes("file") == b"1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint_url)  # the more specific one wins
    assert open_storage(url).read_bytes("file") == b"1"


def test_what_consoles_leave_as_markers_of_empty_folders_is_no_file(s3_server):
    storage = s3_server.storage("x")
    bucket, _, prefix = storage.url.removeprefix("s3://").partition("/")
    s3_server.client().put_object(Bucket=bucket, Key=f"{prefix}/empty/", Body=b"")
    storage.write_bytes("full/file", b"1")
    assert [file.path for file in storage.list()] == ["full/file"]
