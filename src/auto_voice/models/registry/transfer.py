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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from auto_voice.errors import (
    DownloadError,
    DownloadStalledError,
    DownloadStatusError,
    IntegrityError,
)
from auto_voice.models.registry.partials import HashingSink, Partial, PartialRecord
from auto_voice.models.registry.sources import public_url

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
# A longer chain of redirects is a loop.
_MAX_REDIRECTS = 10
# Of a page that lists the files of a project: the longest known lists take some megabytes.
_PAGE_BYTES = 64 << 20


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


@dataclass(frozen=True)
class HttpOptions:
    """How the network is reached; empty is by the environment (HTTPS_PROXY, SSL_CERT_FILE, …).

    Attributes:
        proxy: address of a proxy for everything.
        cert: file or folder of certificates to trust.
        client_cert: file that holds our own certificate and its key.
        unverified_hosts: whose certificates are not checked.
    """

    proxy: str = ""
    cert: str = ""
    client_cert: str = ""
    unverified_hosts: tuple[str, ...] = ()

    def client_options(self) -> dict[str, Any]:
        """Keyword arguments of ``httpx2.Client``.

        Raises:
            DownloadError: the certificates cannot be read.
        """
        import httpx2

        options: dict[str, Any] = {"proxy": self.proxy} if self.proxy else {}
        if self.cert or self.client_cert:
            try:
                options["verify"] = self._certificates()
            except OSError as error:
                named = self.client_cert or self.cert
                raise DownloadError(f"the certificate {named} cannot be used ({error})") from error
        if self.unverified_hosts:
            options["mounts"] = {
                f"all://{host}": httpx2.HTTPTransport(
                    verify=False, proxy=proxy_of(f"https://{host}/", self.proxy) or None
                )
                for host in self.unverified_hosts
            }
        return options

    def _certificates(self) -> Any:
        import ssl

        place, is_folder = self.cert or None, Path(self.cert or "-").is_dir()
        context = ssl.create_default_context(
            cafile=None if is_folder else place, capath=place if is_folder else None
        )
        if self.client_cert:
            context.load_cert_chain(self.client_cert)
        return context


def proxy_of(url: str, given: str = "") -> str:
    """The proxy that a request for ``url`` goes through; empty for none.

    Args:
        given: a proxy for everything, which wins over the environment.
    """
    parts = urlsplit(url)
    if given:
        return given
    import urllib.request  # 20 ms of importing, and most runs fetch nothing.

    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all", "")
    return "" if proxy and urllib.request.proxy_bypass(parts.hostname or "") else proxy


@dataclass(frozen=True)
class Page:
    """A small document, read into memory.

    Attributes:
        url: that answered in the end, after redirects.
        content_type: without parameters, in lower case.
    """

    url: str
    content_type: str
    body: bytes


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
        options: proxy and certificates.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        transport: httpx2.BaseTransport | None = None,
        clock: Clock | None = None,
        jitter: Callable[[], float] = random.random,
        options: HttpOptions | None = None,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.options = options or HttpOptions()
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
        on_total: Callable[[int], None] = _ignore,
    ) -> str:
        """Completes ``partial`` from ``url``; its sha256.

        Args:
            limit: bytes the file has (``exact``) or may have.
            headers: sent to the origin of ``url`` alone, e.g. Authorization.
            on_position: is told how many bytes the partial holds.
            on_total: is told how many bytes the whole file has, once the server said so.

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
                        self._attempt(url, sink, headers or {}, exact, on_position, on_total)
                    digest = sink.hexdigest()
                    sink.sync()
                    return digest
                except _RetryableError as error:
                    if sink.position >= best + self.policy.progress_bytes:
                        best, failures = sink.position, 0
                    failures += 1
                    self._wait_or_give_up(url, error, failures)

    def read(self, url: str, headers: Mapping[str, str] | None = None) -> Page:
        """A page of at most 64 MiB, with the retries of ``fetch``.

        Raises:
            DownloadError: it could not be had, or it is larger.
        """
        failures = 0
        while True:
            try:
                with self._open(url, headers or {}) as response:
                    if response.status_code != 200:
                        self._refuse(url, response)
                    body = bytearray()
                    for chunk in response.iter_bytes():
                        body += chunk
                        if len(body) > _PAGE_BYTES:
                            raise DownloadError(f"{public_url(url)} is too long for a page")
                    kind = response.headers.get("content-type", "").partition(";")[0]
                    return Page(str(response.url), kind.strip().lower(), bytes(body))
            except _RetryableError as error:
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
        # One hiccup is nobody's business; a wait that adds up is told to who waits.
        level = logging.INFO if failures == 1 else logging.WARNING
        attempt, most = failures + 1, self.policy.attempts
        log.log(level, "%s; try %d of %d in %.1f s", error.reason, attempt, most, seconds)
        self.clock.sleep(seconds)

    def _attempt(
        self,
        url: str,
        sink: HashingSink,
        headers: Mapping[str, str],
        exact: bool,
        on_position: Callable[[int], None],
        on_total: Callable[[int], None],
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
            if total != -1:
                on_total(total)
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
            f"{public_url(url)} answered {status} {response.reason_phrase}".rstrip(),
            status,
            response.headers,
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
            what = f"timed out ({type(error).__name__}){self._through(url, error)}"
            raise _RetryableError(DownloadStalledError(f"{public_url(url)} {what}")) from error
        except httpx2.TransportError as error:
            if isinstance(error, httpx2.UnsupportedProtocol):
                raise DownloadError(f"{public_url(url)}: {error}") from error
            detail = f"{str(error) or type(error).__name__}{self._through(url, error)}"
            raise _RetryableError(DownloadError(f"{public_url(url)}: {detail}")) from error
        except httpx2.RequestError as error:  # such as a body that cannot be unpacked
            detail = str(error) or type(error).__name__
            raise _RetryableError(DownloadError(f"{public_url(url)}: {detail}")) from error
        except httpx2.InvalidURL as error:
            raise DownloadError(f"{public_url(url)} is not a valid address: {error}") from error

    def _through(self, url: str, error: Exception) -> str:
        """Names the proxy where it, and not the server, may be what is dead."""
        import httpx2

        connecting = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)
        proxy = proxy_of(url, self.options.proxy)
        if self._transport is not None or not proxy or not isinstance(error, connecting):
            return ""
        return f" through the proxy {public_url(proxy)}: check that it runs, or unset it"

    def _connect(self) -> httpx2.Client:
        import httpx2

        with self._guard:
            if self._client is None:
                timeout = httpx2.Timeout(
                    self.policy.read_timeout_s, connect=self.policy.connect_timeout_s
                )
                agent = {"User-Agent": "auto_voice"}
                given = {} if self._transport is not None else self.options.client_options()
                self._client = httpx2.Client(
                    transport=self._transport, timeout=timeout, headers=agent, **given
                )
            return self._client


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
