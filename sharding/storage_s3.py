"""Storage on S3 and whatever speaks its protocol, through s3fs.

s3fs keeps the client, its event loop and the credentials. This module adds what it lacks: one retry layer
with a known end (botocore's and s3fs's own are switched off, lest three of them multiply), reads that go on
by range from where they broke, uploads that are verified, and errors that name the url and what to do.
Nothing comes from a listings cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import math
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import aiohttp
import botocore.exceptions as aws
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from s3fs import S3FileSystem

from sharding.errors import BadData, StorageFault, UnreadableObject, UserError
from sharding.names import escape_name

if TYPE_CHECKING:
    from sharding.storage import FileState, StorageConfig

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0
_PART = 16 << 20  # of a multipart upload
_MOST_PARTS = 10_000  # S3's limit
_PARTS_AT_ONCE = 4
_DELETE_AT_ONCE = 1000
_PAGE = 1000  # of a listing; S3 gives no more
_READ = 1 << 20
_MARK = "glscl-writer"

# What a client is made from besides the configuration: another value needs another client.
_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION",
    "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
)  # fmt: skip

_NO_SUCH_FILE = {"NoSuchKey", "NoSuchVersion", "404"}
_WRONG_KEY = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the credentials have expired",
    "InvalidToken": "the session token is not valid",
}
_DENIED = {"AccessDenied", "403", "AllAccessDisabled", "AccountProblem", "InvalidPayer"}
_NO_KEY = {
    "KeyTooLongError", "InvalidURI", "InvalidBucketName", "XMinioInvalidObjectName", "XMinioInvalidResourceName",
}  # fmt: skip
_OF_THE_REQUEST = {"PreconditionFailed", "412", "InvalidRange"}
_WRONG_SIGNATURE = "SignatureDoesNotMatch"  # also of a server that signs another key than it was asked for
_WRONG_REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed"}
_TRANSIENT_CODES = {
    "SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "BadDigest",
    "IncompleteBody", "XAmzContentSHA256Mismatch", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "TooManyRequests",
    "MalformedXML",  # ours is well-formed: it was damaged on its way
    "RequestTimeTooSkewed",  # this machine's clock was set, and is being set right; else the last try says so
}  # fmt: skip
_SERVER_CODES = {"InternalError", "ServiceUnavailable"}  # known by their status, but of one file of many
_TRANSIENT_ERRORS: tuple[type[BaseException], ...] = (
    aws.HTTPClientError, aws.ConnectionError, aws.ResponseStreamingError, aws.IncompleteReadError,
    aws.FlexibleChecksumError, aiohttp.ClientError, ConnectionError, TimeoutError,
    ResponseParserError,  # an answer that is not S3's: a proxy's error page, say
)  # fmt: skip
_NO_CREDENTIALS = (
    aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError, aws.ProfileNotFound,
)  # fmt: skip


class _Short(ConnectionError):
    """A body that ended before the length its header promised."""


_clients: dict[tuple[Any, ...], S3FileSystem] = {}
_clients_lock = threading.Lock()


def _after_fork() -> None:
    # A lock that another thread held at the fork would never be released in the child; clients must not cross
    # it.
    global _clients_lock
    _clients_lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)


def _client(config: StorageConfig) -> S3FileSystem:
    """The process's one client for this configuration, made on first use."""
    key = (
        config.endpoint_url, config.region, config.access_key, config.secret_key, config.anonymous,
        config.connect_timeout_s, config.read_timeout_s, *(os.environ.get(name) for name in _ENVIRONMENT),
    )  # fmt: skip
    with _clients_lock:
        if key not in _clients:
            client = S3FileSystem(
                anon=config.anonymous,
                endpoint_url=_endpoint(config),
                key=config.access_key and config.access_key.get_secret_value(),
                secret=config.secret_key and config.secret_key.get_secret_value(),
                client_kwargs={"region_name": config.region} if config.region else {},
                config_kwargs={
                    "connect_timeout": config.connect_timeout_s,
                    "read_timeout": config.read_timeout_s,
                    "retries": {"mode": "standard", "total_max_attempts": 1},
                    "max_pool_connections": 64,
                },
                use_listings_cache=False,
                skip_instance_cache=True,
            )
            client.retries = 1
            _clients[key] = client
        return _clients[key]


def _endpoint(config: StorageConfig) -> str | None:
    """Of the server; None: Amazon's.

    Raises:
        UserError: a variable names none that may be used.
    """
    from sharding.storage import checked_endpoint

    if config.endpoint_url:
        return config.endpoint_url
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if value := os.environ.get(name):
            try:
                return checked_endpoint(value)
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
    return None


class _Failure(NamedTuple):
    """A failed request, understood: its S3 error code and HTTP status (None if it got no answer)."""

    error: BaseException
    code: str | None
    status: int | None

    @property
    def transient(self) -> bool:
        if self.code is None:
            return isinstance(self.error, _TRANSIENT_ERRORS)
        if self.code in _TRANSIENT_CODES or self.status == 429:
            return True
        return self.status is not None and self.status >= 500 and self.status != 501


def _understand(error: BaseException) -> _Failure:
    # s3fs raises an error of Python's own with botocore's as its cause.
    answers = (getattr(each, "response", None) for each in (error, error.__cause__))
    response = next((answer for answer in answers if isinstance(answer, dict)), None)
    if response is None:
        return _Failure(error, None, None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return _Failure(error, str(response.get("Error", {}).get("Code") or status), status)


class S3Backend:
    """A prefix in a bucket. See ``sharding.storage.Backend``."""

    exact_paths: ClassVar[bool] = True

    def __init__(self, config: StorageConfig, bucket: str, prefix: str) -> None:
        self._config, self._bucket, self._prefix = config, bucket, prefix

    def url_of(self, path: str) -> str:
        key = self._key(path)
        return f"s3://{self._bucket}/{key}" if key else f"s3://{self._bucket}"

    def at(self, path: str) -> S3Backend:
        return S3Backend(self._config, self._bucket, self._key(path))

    def local_path(self, path: str) -> None:
        return None

    def check(self, *, write: bool) -> None:
        attempts = min(2, self._config.attempts)  # someone is waiting in front of it
        url, place = self.url_of(""), _endpoint(self._config) or "S3"
        try:
            # Listing, unlike HEAD, is answered with a body that says what is wrong.
            self._call("list_objects_v2", "", attempts, Prefix=self._folder(""), MaxKeys=1)
            if write:
                probe = f".glscl-{secrets.token_hex(8)}.part"
                self._call("put_object", probe, attempts, Key=self._key(probe), Body=b"")
                self._call("delete_object", probe, attempts, Key=self._key(probe))
        except StorageFault as error:
            reason = str(error).partition(" tries: ")[2] or error
            raise UserError(f"{url}: cannot reach {place} ({reason})") from None
        except FileNotFoundError:
            raise UserError(f"{url} does not exist at {place}") from None

    def state(self, path: str) -> FileState:
        from sharding.storage import FileState

        try:
            head = self._retry(lambda: self._once("head_object", Key=self._key(path)), path, of_object=True)
        except UnreadableObject:
            self.read(path, 0, 1, None)  # a refused HEAD has no body that would say why
            raise
        return FileState(int(head["ContentLength"]), str(head.get("ETag", "")))

    def iterate(
        self, prefix: str, others: Callable[[str, str], None] | None = None
    ) -> Iterator[tuple[str, int]]:
        """One request where all fits into a page, however many folders there are; else folder by folder."""
        folder, skip = self._folder(prefix), len(self._folder(""))
        page = self._call("list_objects_v2", folder[skip:], Prefix=folder, MaxKeys=_PAGE)
        if page.get("IsTruncated"):
            yield from self._walk(folder, skip)
            return
        for key, size in sorted((entry["Key"], int(entry["Size"])) for entry in page.get("Contents", [])):
            if _is_file(key[skip:], size):
                yield key[skip:], size

    def _walk(self, folder: str, skip: int) -> Iterator[tuple[str, int]]:
        """Files under one folder by full key. Folder by folder, since not every server lists flat in key
        order: SeaweedFS gives "a/x" before "a.txt". Within a folder all list by name, so an entry may go out
        once the names of the page have passed it."""
        waiting: list[tuple[str, int]] = []  # a heap; a folder has size -1
        token: dict[str, str] = {}
        more = True
        while more:
            page = self._call(
                "list_objects_v2", folder[skip:], Prefix=folder, Delimiter="/", MaxKeys=_PAGE, **token
            )
            found = [(entry["Key"], int(entry["Size"])) for entry in page.get("Contents", [])]
            found += [(entry["Prefix"], -1) for entry in page.get("CommonPrefixes", [])]
            for entry in found:
                heapq.heappush(waiting, entry)
            more = bool(page.get("IsTruncated"))
            if more:
                token = {"ContinuationToken": page["NextContinuationToken"]}
            passed = max((key.rstrip("/") for key, _ in found), default="")
            while waiting and (not more or waiting[0][0] < passed):
                key, size = heapq.heappop(waiting)
                if size < 0:
                    yield from self._walk(key, skip)
                elif _is_file(key[skip:], size):
                    yield key[skip:], size

    def read(self, path: str, offset: int, length: int | None, version: str | None) -> bytes:
        if length == 0:
            self.state(path)  # S3 has no empty ranges; still say if the file is missing
            return b""
        data = bytearray()
        seen = version

        def note(tag: str) -> None:
            nonlocal seen
            seen = tag

        def rest() -> None:
            """Fetch what is still wanted; on a fault ``data`` keeps what came, and the next try goes on from
            there.
            """
            start = offset + len(data)
            if length is not None and len(data) >= length:
                return
            end = "" if length is None else offset + length - 1
            request: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key(path)}
            if start or length is not None:
                request["Range"] = f"bytes={start}-{end}"
            if seen:
                request["IfMatch"] = seen
            client = _client(self._config)
            try:
                sync(client.loop, _fetch, client, request, data, note)
            except OSError as error:
                if _understand(error).code == "InvalidRange":
                    return  # nothing (more) from there on
                raise

        for last in (False, True):
            try:
                self._retry(rest, path, of_object=True)
                break
            except FileExistsError:  # another version than the one begun with
                if version is not None or last:
                    raise StorageFault(
                        f"{escape_name(self.url_of(path))} was replaced while it was read"
                    ) from None
                data.clear()  # whoever asked for no version gets the new one, from its start
                seen = None
        return bytes(data)

    def write(self, path: str, data: bytes) -> None:
        self._call("put_object", path, Key=self._key(path), Body=data)

    def create(self, path: str, data: bytes) -> bool:
        # A try may be carried out although its answer is lost (and aiohttp repeats a PUT on its own): the
        # next one then finds the file, which is ours all the same. The mark in its metadata tells.
        mark = secrets.token_hex(16)
        try:
            self._call(
                "put_object", path, Key=self._key(path), Body=data, IfNoneMatch="*", Metadata={_MARK: mark}
            )
        except FileExistsError:
            head = self._call("head_object", path, Key=self._key(path))
            return bool(head.get("Metadata", {}).get(_MARK) == mark)
        return True

    def upload(self, source: Path, path: str) -> tuple[int, str]:
        digest = hashlib.sha256()
        expected = source.stat().st_size
        with source.open("rb") as file:
            if expected <= 2 * _PART:
                data = file.read()
                digest.update(data)
                size = len(data)
                self.write(path, data)
            else:
                size = self._upload_parts(file, expected, path, digest)
        stored = self.state(path).size
        if not size == expected == stored:
            raise StorageFault(
                f"{self.url_of(path)} has {stored} bytes after uploading {expected} of {source}"
            )
        return size, digest.hexdigest()

    def _upload_parts(self, file: Any, expected: int, path: str, digest: Any) -> int:
        part_size = max(_PART, math.ceil(expected / _MOST_PARTS))
        key, sent = self._key(path), 0
        upload = self._call("create_multipart_upload", path, Key=key)["UploadId"]
        running: list[Future[dict[str, Any]]] = []
        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
                while part := file.read(part_size):
                    digest.update(part)
                    sent += len(part)
                    if len(running) >= _PARTS_AT_ONCE:
                        running[-_PARTS_AT_ONCE].result()  # bounds the parts held in memory
                    request = {"Key": key, "UploadId": upload, "PartNumber": len(running) + 1, "Body": part}
                    running.append(pool.submit(self._call, "upload_part", path, **request))
                tags = [future.result()["ETag"] for future in running]
            parts = [{"PartNumber": i, "ETag": tag} for i, tag in enumerate(tags, 1)]
            try:
                request = {"Key": key, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
                self._call("complete_multipart_upload", path, **request)
            except FileNotFoundError:
                # A first try may have been carried out although its answer was lost; the caller compares
                # sizes.
                if not self._stored(path):
                    raise
        except BaseException:
            self._abort(upload, path)
            raise
        return sent

    def _abort(self, upload: str, path: str) -> None:
        """Remove the parts of an upload that failed: nobody sees them, but they are paid for."""
        try:
            self._call(
                "abort_multipart_upload",
                path,
                min(3, self._config.attempts),
                Key=self._key(path),
                UploadId=upload,
            )
        except (OSError, UserError) as error:
            _log.warning(
                "%s: parts of upload %s may be left in the store: %s", self.url_of(path), upload, error
            )

    def _stored(self, path: str) -> bool:
        try:
            self.state(path)
        except FileNotFoundError:
            return False
        return True

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("delete_object", path, Key=self._key(path))

    def delete_tree(self, path: str) -> None:
        names: list[str] = []
        for name, _ in self.iterate(path):
            names.append(name)
            if len(names) == _DELETE_AT_ONCE:
                self._delete_many(names)
                names = []
        self._delete_many(names)

    def _delete_many(self, names: list[str]) -> None:
        if not names:
            return
        objects = [{"Key": self._key(name)} for name in names]
        reply = self._call("delete_objects", names[0], Delete={"Objects": objects, "Quiet": True})
        for error in reply.get("Errors", []):
            code = str(error.get("Code"))
            url = escape_name(f"s3://{self._bucket}/{error.get('Key')}")
            said = f"{url} cannot be deleted: {escape_name(code)}"
            raise StorageFault(said) if code in _TRANSIENT_CODES | _SERVER_CODES else UserError(said)

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path) if part)

    def _folder(self, path: str) -> str:
        key = self._key(path)
        return f"{key}/" if key else ""

    def _call(self, operation: str, path: str, attempts: int | None = None, /, **request: Any) -> Any:
        return self._retry(lambda: self._once(operation, **request), path, attempts)

    def _once(self, operation: str, **request: Any) -> Any:
        return _client(self._config).call_s3(operation, Bucket=self._bucket, **request)

    def _retry(
        self, call: Callable[[], _T], path: str, attempts: int | None = None, *, of_object: bool = False
    ) -> _T:
        """Call until it works, a fault is no transient one, or the tries are used up; with growing, uneven
        pauses.

        Args:
            of_object: an object is read, so that a refusal is of this one alone until others are refused too.
        """
        attempts = attempts or self._config.attempts
        for attempt in range(1, attempts + 1):
            try:
                return call()
            except (OSError, ValueError, aws.BotoCoreError, *_TRANSIENT_ERRORS) as error:
                failure = _understand(error)
                reason = self._hide(getattr(error, "strerror", None) or str(error) or type(error).__name__)
                if not failure.transient:
                    refused = self._refused(failure, path, reason) if of_object else None
                    raise refused or self._translate(failure, path, reason) from None
                if attempt == attempts:
                    if isinstance(error, aws.FlexibleChecksumError):
                        raise BadData(
                            "checksum-mismatch", f"{escape_name(self.url_of(path))}: {reason}"
                        ) from None
                    fault = StorageFault(
                        f"{escape_name(self.url_of(path))}: given up after {attempts} tries: {reason}"
                    )
                    raise fault from None
                _log.warning("%s: try %d of %d failed (%s)", self.url_of(path), attempt, attempts, reason)
                wait = min(_FIRST_WAIT_S * 2 ** (attempt - 1), _LONGEST_WAIT_S)
                # An instance of its own: the global random state belongs to the training.
                time.sleep(wait * random.Random().uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _refused(self, failure: _Failure, path: str, reason: str) -> UnreadableObject | None:
        """What a failed request says of the one object; None where it is of the store, or the object is missing."""
        url, code, place = escape_name(self.url_of(path)), failure.code, _endpoint(self._config) or "S3"
        if isinstance(failure.error, aws.ParamValidationError) or code in _NO_KEY:
            return UnreadableObject(
                f"{url}: not a valid name for a bucket or file ({reason[:100]})", "bad-address"
            )
        if code is None or failure.status is None:
            return None
        if code == "InvalidObjectState":
            return UnreadableObject(f"{url}: archived: it must be restored before it can be read", "archived")
        if code in _DENIED:
            detail = f"{url}: access denied by {place}: check the credentials and their permissions"
            return UnreadableObject(detail, "access-denied")
        if code.startswith("KMS.") or ("Invalid" in code and "encrypt" in reason.lower()):
            return UnreadableObject(f"{url}: cannot be decrypted: {code}: {reason}", "encrypted")
        if code == "NoSuchBucket":
            return UnreadableObject(
                f"{url}: bucket {self._bucket!r} does not exist at {place}", "no-such-bucket"
            )
        if code in _WRONG_REGION:
            detail = f"{url}: bucket {self._bucket!r} is in another region: set region ({reason})"
            return UnreadableObject(detail, "wrong-region")
        odd = any(part in ("", ".", "..") for part in self._key(path).split("/"))
        if odd and (code == _WRONG_SIGNATURE or failure.status == 400):
            detail = (
                f"{url}: {place} does not take keys with empty, '.' or '..' parts between slashes ({code})"
            )
            return UnreadableObject(detail, "bad-address")
        of_store = code in _WRONG_KEY or code in _NO_SUCH_FILE or code in _OF_THE_REQUEST
        if not of_store and (400 <= failure.status < 500 or failure.status == 501):
            return UnreadableObject(f"{url}: {code}: {reason}", "unreadable-file")
        return None

    def _translate(self, failure: _Failure, path: str, reason: str) -> BaseException:
        url, code, error = escape_name(self.url_of(path)), failure.code, failure.error
        place = _endpoint(self._config) or "S3"
        if code == "NoSuchBucket":
            return UserError(f"{url}: bucket {self._bucket!r} does not exist at {place}")
        if code in ("PreconditionFailed", "412"):
            return FileExistsError(17, "exists already", url)
        if code in _NO_SUCH_FILE or code == "NoSuchUpload":
            return FileNotFoundError(2, "no such file", url)
        if code in _WRONG_KEY:
            return UserError(f"{url}: credentials refused by {place}: {_WRONG_KEY[code]}")
        if code in _DENIED:
            return UserError(f"{url}: access denied by {place}: check the credentials and their permissions")
        if code in _WRONG_REGION:
            return UserError(f"{url}: bucket {self._bucket!r} is in another region: set region ({reason})")
        if isinstance(error, _NO_CREDENTIALS):
            return UserError(
                f"{url}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({reason})"
            )
        if isinstance(error, aws.ParamValidationError):
            return UserError(f"{url}: not a valid name for a bucket or file ({reason[:100]}...)")
        if isinstance(error, ValueError) and "endpoint" in reason:
            return UserError(f"{url}: AWS_ENDPOINT_URL is not valid ({reason})")
        if failure.status is not None and (400 <= failure.status < 500 or failure.status == 501):
            return UserError(f"{url}: refused by {place}: {code}: {reason}")
        if code is not None or isinstance(error, (aws.BotoCoreError, OSError)):
            return StorageFault(f"{url}: {code or type(error).__name__}: {reason}")
        return error  # not of the storage: a bug, as it is

    def _hide(self, text: str) -> str:
        """``text`` on one line, without anything secret that a server or library may have put in."""
        for secret in (self._config.access_key, self._config.secret_key):
            if secret is not None and secret.get_secret_value():
                text = text.replace(secret.get_secret_value(), "***")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            if value := os.environ.get(name):
                text = text.replace(value, "***")
        return " ".join(text.replace(" (reached max retries: 0)", "").split())


def _is_file(path: str, size: int) -> bool:
    """Whether an object is more than the marker of a folder, as consoles make them."""
    return bool(path) and (size > 0 or not path.endswith("/"))


async def _fetch(
    client: S3FileSystem, request: dict[str, Any], into: bytearray, note: Callable[[str], None]
) -> None:
    """Append the body of one GET to ``into`` as it comes; its ETag is noted before, for who must go on after
    a cut.
    """
    response = await client._call_s3("get_object", **request)
    note(str(response.get("ETag", "")))
    body, start = response["Body"], len(into)
    try:
        while chunk := await body.read(_READ):
            into += chunk
    except aws.FlexibleChecksumError:
        del into[start:]  # whole, but not what was stored: nothing to go on from
        raise
    finally:
        body.close()
    if len(into) - start != response["ContentLength"]:
        raise _Short(f"got {len(into) - start} of {response['ContentLength']} bytes")
