"""Limits on what clients send at the same time and how slowly, so that none keeps others out.

Nothing here counts against a client that waits for the server: only the time in which the server
waited for the client's bytes does.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message as MimeHeaders
from typing import Any, ClassVar

import h11
from starlette.types import Message, Receive
from uvicorn.protocols.http.h11_impl import H11Protocol

from auto_voice.errors import BusyError, UploadError
from auto_voice.server.settings import ServerSettings

# Seconds for the header of a request, counted from the connection or from the last answer.
HEADER_SECONDS = 20.0
# Connections of one address: a fifth of the 1000 that the server holds.
MOST_CONNECTIONS = 200
# Requests that are answered at the same time, of everybody and of one address. A page opens 6
# connections, a program that converts directly may have 4 requests waiting.
MOST_OPEN, MOST_OPEN_ADDRESS = 500, 100
# Bytes of a body that carries a token, or a few fields. Tokens have at most 1000 characters.
SESSION_BYTES, SMALL_BYTES = 4_096, 65_536
# Seconds in which such a body must have come.
SMALL_SECONDS = 5.0
# Bytes and seconds of a refused body that are still taken, see LimitedBody.drain.
DRAIN_BYTES, DRAIN_SECONDS = 64_000_000, 3.0
# Bytes at the end of a form among which its closing delimiter must be: text may follow it.
TAIL_BYTES = 1024


@dataclass(frozen=True)
class BodyLimits:
    """Limits of one request body.

    Attributes:
        most_bytes: size.
        stall_seconds: longest pause; also the head start before the rate counts.
        least_rate: bytes per second on average; 0 for any.
        within_seconds: for the whole body.
    """

    most_bytes: int
    stall_seconds: float
    least_rate: float
    within_seconds: float

    def check_size(self, size: int) -> None:
        """Raises UploadError (413) if ``size`` is too large."""
        if size > self.most_bytes:
            advice = "; send FLAC or MP3 in place of WAV, or fewer files"
            raise UploadError(
                f"The request is larger than the {_bytes(self.most_bytes)} that are taken"
                f"{advice if self.most_bytes > SMALL_BYTES else ''}."
            )


SESSION = BodyLimits(SESSION_BYTES, SMALL_SECONDS, 0.0, SMALL_SECONDS)
SMALL = BodyLimits(SMALL_BYTES, SMALL_SECONDS, 0.0, SMALL_SECONDS)


def _bytes(count: int) -> str:
    return f"{count / 1e6:g} MB" if count >= 1_000_000 else f"{count / 1e3:.0f} kB"


class LimitedBody:
    """An ASGI ``receive`` that holds a body to its limits and knows whether all of it has come."""

    def __init__(self, receive: Receive, content_type: str) -> None:
        self._receive = receive
        self._delimiter = _closing_delimiter(content_type)
        self._limits: BodyLimits | None = None
        self._ended: Callable[[], None] = lambda: None
        self._whole = False
        self._size = 0
        self._waited = 0.0
        self._tail = b""

    def limit(self, limits: BodyLimits, ended: Callable[[], None] = lambda: None) -> None:
        """Hold the body to ``limits`` and call ``ended`` when its last byte has come."""
        self._limits, self._ended = limits, ended

    async def __call__(self) -> Message:
        """The next message.

        Raises:
            UploadError: 408 when it comes too slowly, 413 when it is too large, 400 when a form
                ends before its closing delimiter.
        """
        if self._whole or self._limits is None:
            return await self._next(None)
        left, problem = self._patience(self._limits)
        begun = time.monotonic()
        try:
            message = await self._next(max(0.0, left))
        except asyncio.TimeoutError:
            raise UploadError(problem, 408) from None
        self._waited += time.monotonic() - begun
        self._limits.check_size(self._size)
        if _is_last(message):
            self._ended()
            if message["type"] == "http.request" and self._delimiter not in self._tail:
                raise UploadError(
                    "The form ends before its last part is complete (its closing delimiter is "
                    "missing), so a part may have been lost; send it again.",
                    400,
                )
        return message

    async def _next(self, timeout: float | None) -> Message:
        message = await asyncio.wait_for(self._receive(), timeout)
        data = message.get("body", b"")
        self._size += len(data)
        self._tail = (self._tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        self._whole = self._whole or _is_last(message)
        return message

    def _patience(self, limits: BodyLimits) -> tuple[float, str]:
        """Seconds that the next bytes may take, and what is wrong if they take longer."""
        stall = limits.stall_seconds
        found = [
            (stall, f"The upload paused for more than {stall:g} s; send it again."),
            (
                limits.within_seconds - self._waited,
                f"The upload took more than {limits.within_seconds:g} s; send smaller files.",
            ),
        ]
        if limits.least_rate:
            found.append(
                (
                    stall + self._size / limits.least_rate - self._waited,
                    f"The upload came more slowly than {limits.least_rate / 1e3:g} kB per second; "
                    "send smaller files (FLAC or MP3 in place of WAV) or use a faster connection.",
                )
            )
        return min(found)

    async def drain(self) -> None:
        """Take what is still on its way, within limits.

        A connection that is closed on a client that still sends is reset, and the reset can
        overtake the answer: the client would see a broken pipe in place of the sentence.
        """
        most = self._size + DRAIN_BYTES
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self._whole and self._size < most and (left := deadline - time.monotonic()) > 0:
            try:
                await self._next(left)
            except asyncio.TimeoutError:
                return


def _is_last(message: Message) -> bool:
    return message["type"] != "http.request" or not message.get("more_body", False)


def _closing_delimiter(content_type: str) -> bytes:
    """The bytes that must end a form (RFC 2046); none for other bodies."""
    headers = MimeHeaders()
    headers["content-type"] = content_type
    boundary = headers.get_boundary()
    return f"--{boundary}--".encode("latin-1", "replace") if boundary else b""


class Traffic:
    """Requests and uploads under way, of everybody and of each client; used in the event loop.

    Args:
        settings: how many uploads and bytes there may be.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._requests: Counter[str] = Counter()
        self._uploads: Counter[str] = Counter()
        self.upload_bytes = 0

    @contextmanager
    def request(self, address: str) -> Iterator[None]:
        """Count a request while it is answered.

        Raises:
            BusyError: there are too many.
        """
        with _counted(self._requests, address):
            if self._requests[address] > MOST_OPEN_ADDRESS:
                raise BusyError("You have too many requests open; wait for some of them.", 1, 429)
            if self._requests.total() > MOST_OPEN:
                raise BusyError("Too many requests at once; try again in a moment.", 1)
            yield

    @contextmanager
    def upload(self, client: str, size: int) -> Iterator[Callable[[], None]]:
        """Count an upload of ``size`` bytes; what is yielded is called when its body has come.

        Raises:
            BusyError: there are too many, or too many bytes.
        """
        settings = self._settings
        if self._uploads[client] >= settings.uploads_at_once_client:
            raise BusyError("You send too many uploads at once; wait for one of them.", 1, 429)
        if self._uploads.total() >= settings.uploads_at_once:
            raise BusyError("Too many uploads at once; try again in a moment.", 1)
        if self.upload_bytes + size > settings.uploads_bytes:
            raise BusyError("Too much is being uploaded at once; try again in a moment.", 5)
        slot = _counted(self._uploads, client)
        slot.__enter__()
        is_open = True

        def end() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                slot.__exit__(None, None, None)

        self.upload_bytes += size
        try:
            yield end
        finally:
            end()
            self.upload_bytes -= size


class LiveStreams:
    """Live conversions that are open, of everybody and of each client; used in the event loop.

    Args:
        settings: how many there may be.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._open: Counter[str] = Counter()

    @contextmanager
    def slot(self, client: str) -> Iterator[None]:
        """A place while it is used.

        Raises:
            BusyError: there is none.
        """
        if self._open[client] >= self._settings.live_streams_client:
            raise BusyError("You have too many live conversions open; end one of them.", 5, 429)
        if self._open.total() >= self._settings.live_streams:
            raise BusyError("Every live conversion of this server is taken; try again later.", 5)
        with _counted(self._open, client):
            yield


@contextmanager
def _counted(counter: Counter[str], key: str) -> Iterator[None]:
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, but it closes connections that send no request, or no end of a header.

    uvicorn by itself waits for ever for both, so that a thousand connections that cost nothing
    would stop it.
    """

    header_seconds = HEADER_SECONDS
    # Addresses that speak for many clients.
    proxies: frozenset[str] = frozenset()
    _connections: ClassVar[Counter[str]] = Counter()
    _address = ""
    _due: asyncio.TimerHandle | None = None
    _seen: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        self._connections[self._address] += 1
        is_proxy = not self.proxies.isdisjoint({self._address, "*"})
        if self._connections[self._address] > MOST_CONNECTIONS and not is_proxy:
            transport.close()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The connection goes on under another protocol, which has limits of its own."""
        self._forget()
        super().handle_websocket_upgrade(event)

    def _forget(self) -> None:
        if self._due is not None:
            self._due.cancel()
        self._connections[self._address] -= 1
        if self._connections[self._address] <= 0:
            del self._connections[self._address]

    def _watch(self) -> None:
        self._due = self.loop.call_later(self.header_seconds, self._look)

    def _look(self) -> None:
        """Close if since the last look no request has begun and none was being answered."""
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._seen is (self.cycle or self):
            self.transport.close()
            return
        self._seen = (self.cycle or self) if idle else None
        self._watch()
