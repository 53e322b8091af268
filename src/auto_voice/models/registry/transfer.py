"""One HTTP download that resumes, retries and never splices two versions of a file."""

from __future__ import annotations

import email.utils
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit, urlunsplit

from auto_voice.errors import (
    DownloadError,
    DownloadStalledError,
    DownloadStatusError,
    IntegrityError,
)
from auto_voice.models.registry.partials import HashingSink, Partial, PartialRecord

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_MAX_REDIRECTS = 10


def _ignore(position: int) -> None:
    pass


class Clock(Protocol):
    """Time, injected so that tests do not wait."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The real one."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class RetryPolicy:
    """When to try again and how long to wait.

    Attributes:
        attempts: in a row without progress before a source is given up.
        backoff_s: the first wait is drawn from [0, backoff_s]; the range doubles each time.
        backoff_cap_s: upper end of that range.
        retry_after_cap_s: a server that asks for a longer pause is given up at once.
        connect_timeout_s: for a connection.
        read_timeout_s: without a single byte.
        min_bytes_per_s: over ``speed_window_s``; slower counts as a stall.
        progress_bytes: that refill the budget of attempts.
    """

    attempts: int = 6
    backoff_s: float = 0.5
    backoff_cap_s: float = 30.0
    retry_after_cap_s: float = 120.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 20.0
    min_bytes_per_s: float = 1024.0
    speed_window_s: float = 30.0
    progress_bytes: int = 1 << 16

    def wait_s(self, failures: int, jitter: float) -> float:
        """Seconds before the next try: full jitter below a capped exponential."""
        return jitter * min(self.backoff_cap_s, self.backoff_s * 2.0 ** (failures - 1))


class _RetryableError(Exception):
    """This attempt failed; the next may not."""

    def __init__(self, reason: DownloadError, retry_after_s: float = 0.0) -> None:
        super().__init__(str(reason))
        self.reason = reason
        self.retry_after_s = retry_after_s


class HttpTransfer:
    """Downloads over HTTP into partials; one connection pool, shared by threads.

    Args:
        policy: retries and timeouts.
        transport: an ``httpx2.BaseTransport`` in place of the network.
        clock: time.
        jitter: draws from [0, 1).
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        transport: httpx2.BaseTransport | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.clock = clock or SystemClock()
        self._transport = transport
        self._jitter = jitter
        self._client: httpx2.Client | None = None
        self._guard = threading.Lock()

    def close(self) -> None:
        with self._guard:
            if self._client is not None:
                self._client.close()
            self._client = None

    def fetch(
        self,
        url: str,
        partial: Partial,
        *,
        limit: int,
        exact: bool = True,
        headers: Mapping[str, str] | None = None,
        on_position: Callable[[int], None] = _ignore,
    ) -> str:
        """Completes ``partial`` from ``url``; its sha256.

        Args:
            limit: bytes the file has (``exact``) or may have.
            headers: sent to the origin of ``url`` alone, e.g. Authorization.
            on_position: hears how many bytes the partial holds.

        Raises:
            DownloadStatusError: a status that no retry would change.
            DownloadError: the budget of attempts is spent; the partial stays for the next run.
            IntegrityError: the server's file has another size.
        """
        failures = 0
        with HashingSink(partial, limit) as sink:
            best = sink.position
            while True:
                try:
                    if not self._complete(sink, exact):
                        self._attempt(url, sink, headers or {}, exact, on_position)
                    digest = sink.hexdigest()
                    sink.sync()
                    return digest
                except _RetryableError as error:
                    if sink.position >= best + self.policy.progress_bytes:
                        best, failures = sink.position, 0
                    failures += 1
                    self._wait_or_give_up(url, error, failures)

    def _complete(self, sink: HashingSink, exact: bool) -> bool:
        if exact:
            return sink.position == sink.limit
        record = sink.partial.read_record()
        return record is not None and sink.position > 0 and record.size == sink.position

    def _wait_or_give_up(self, url: str, error: _RetryableError, failures: int) -> None:
        if failures >= self.policy.attempts or error.retry_after_s > self.policy.retry_after_cap_s:
            raise error.reason from error
        seconds = max(self.policy.wait_s(failures, self._jitter()), error.retry_after_s)
        log.info("%s: %s; trying again in %.1f s", public_url(url), error.reason, seconds)
        self.clock.sleep(seconds)

    def _attempt(
        self,
        url: str,
        sink: HashingSink,
        headers: Mapping[str, str],
        exact: bool,
        on_position: Callable[[int], None],
    ) -> None:
        asked = {"Accept-Encoding": "identity", **headers}
        known = sink.partial.read_record()
        if sink.position:
            asked["Range"] = f"bytes={sink.position}-"
            if known and known.url == public_url(url) and known.etag:
                asked["If-Range"] = known.etag
        with self._open(url, asked) as response:
            total = self._accept(url, response, sink, known)
            if exact and total not in (-1, sink.limit):
                raise IntegrityError(
                    f"{public_url(url)} has {total} bytes and not {sink.limit}, so it is another "
                    "file"
                )
            record = PartialRecord(public_url(url), _validator(response), total)
            if record != known:
                sink.partial.write_record(record)
            on_position(sink.position)
            self._receive(url, response, sink, on_position)
        wanted = sink.limit if exact else total
        if wanted != -1 and sink.position < wanted:
            raise _RetryableError(
                DownloadError(f"{public_url(url)} ended after {sink.position} of {wanted} bytes")
            )

    def _accept(
        self,
        url: str,
        response: httpx2.Response,
        sink: HashingSink,
        known: PartialRecord | None,
    ) -> int:
        """Total size of the remote file, -1 if unknown, with the sink where the body starts."""
        status = response.status_code
        if status == 206 and sink.position:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            # With If-Range a server may leave its validator out of a 206.
            changed = (
                known is not None
                and known.url == public_url(url)
                and _validator(response) not in ("", known.etag)
            )
            if match is None or int(match[1]) != sink.position or changed:
                sink.restart()
                raise _RetryableError(
                    DownloadError(f"{public_url(url)} changed or answered another range")
                )
            return -1 if match[3] == "*" else int(match[3])
        if status == 416 and sink.position:
            sink.restart()
            raise _RetryableError(DownloadError(f"{public_url(url)} is shorter than the partial"))
        if status == 200:
            if sink.position:
                log.info("%s cannot continue the partial: starting clean", public_url(url))
                sink.restart()
            return int(response.headers.get("content-length", -1))
        self._refuse(url, response)
        raise AssertionError  # pragma: no cover

    def _refuse(self, url: str, response: httpx2.Response) -> None:
        status = response.status_code
        reason = DownloadStatusError(
            f"{public_url(url)} answered {status} {response.reason_phrase}".rstrip(), status
        )
        if status in (408, 425, 429) or status >= 500:
            raise _RetryableError(reason, _retry_after_s(response.headers.get("retry-after", "")))
        raise reason

    def _receive(
        self,
        url: str,
        response: httpx2.Response,
        sink: HashingSink,
        on_position: Callable[[int], None],
    ) -> None:
        since, at = self.clock.now(), sink.position
        for chunk in response.iter_raw():
            sink.write(chunk)
            on_position(sink.position)
            now = self.clock.now()
            if now - since < self.policy.speed_window_s:
                continue
            if (sink.position - at) / (now - since) < self.policy.min_bytes_per_s:
                raise _RetryableError(
                    DownloadStalledError(
                        f"{public_url(url)} sent less than {self.policy.min_bytes_per_s:.0f} "
                        f"bytes a second for {now - since:.0f} s"
                    )
                )
            since, at = now, sink.position

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The streamed response after redirects; network trouble becomes a retryable error."""
        import httpx2

        try:
            client = self._connect()
            request = client.build_request("GET", url, headers=dict(headers))
            response = client.send(request, stream=True)
            try:
                for _ in range(_MAX_REDIRECTS):
                    if response.next_request is None:
                        break
                    # httpx2 drops Authorization here when the origin differs.
                    following = response.next_request
                    if request.url.scheme == "https" and following.url.scheme != "https":
                        raise DownloadError(f"{public_url(url)} redirects to an insecure address")
                    response.close()
                    response = client.send(following, stream=True)
                if response.next_request is not None:
                    raise DownloadError(f"{public_url(url)} redirects too often")
                yield response
            finally:
                response.close()
        except httpx2.TimeoutException as error:
            raise _RetryableError(
                DownloadStalledError(f"{public_url(url)} timed out ({type(error).__name__})")
            ) from error
        except httpx2.TransportError as error:
            if isinstance(error, httpx2.UnsupportedProtocol):
                raise DownloadError(f"{public_url(url)}: {error}") from error
            detail = str(error) or type(error).__name__
            raise _RetryableError(DownloadError(f"{public_url(url)}: {detail}")) from error
        except httpx2.InvalidURL as error:
            raise DownloadError(f"{public_url(url)} is not a valid address: {error}") from error

    def _connect(self) -> httpx2.Client:
        import httpx2

        with self._guard:
            if self._client is None:
                timeout = httpx2.Timeout(
                    self.policy.read_timeout_s, connect=self.policy.connect_timeout_s
                )
                agent = {"User-Agent": "auto_voice"}
                self._client = httpx2.Client(
                    transport=self._transport, timeout=timeout, headers=agent
                )
            return self._client


def public_url(url: str) -> str:
    """The address without user, password, query and fragment: fit for records and messages."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _validator(response: httpx2.Response) -> str:
    """What If-Range may carry: a strong ETag, else Last-Modified, else nothing."""
    etag: str = response.headers.get("etag", "")
    if etag and not etag.startswith("W/"):
        return etag
    modified: str = response.headers.get("last-modified", "")
    return modified


def _retry_after_s(text: str) -> float:
    """Seconds from a Retry-After header, which holds seconds or a date."""
    if not text:
        return 0.0
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())
