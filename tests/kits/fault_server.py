"""A local web server that fails on command, and small helpers around it.

Each request takes the next fault of its path's queue; an empty queue serves properly, with
Range, If-Range and ETag as RFC 9110 has them.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import random
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from auto_voice.models.registry.catalog import ModelFile, ModelVersion
from local_server import local_server

_FLIPPED = bytes(255 - value for value in range(256))


@dataclass
class Served:
    """A file of the server; tests change its fields while it runs."""

    data: bytes
    etag: str = ""
    last_modified: str = ""
    ranges: bool = True
    honour_if_range: bool = True
    length: bool = True
    content_type: str = ""


@dataclass(frozen=True)
class Fault:
    """What to do to one request.

    Attributes:
        status: answered instead of the file.
        headers: added to the answer.
        cut_after: body bytes, then the connection is closed; ``reset`` sends RST instead.
        stall_after: body bytes, then silence until the server closes.
        wrong_bytes: the body is flipped.
        content_range: sent in place of the true one.
        redirect: answered with 302 to this address.
    """

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    cut_after: int | None = None
    reset: bool = False
    stall_after: int | None = None
    wrong_bytes: bool = False
    content_range: str = ""
    redirect: str = ""


@dataclass
class Seen:
    """One request as it was served."""

    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0


@dataclass
class FaultServer:
    files: dict[str, Served] = field(default_factory=dict)
    faults: dict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    closing: threading.Event = field(default_factory=threading.Event)
    delay_s: float = 0.0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    def serve(self, path: str, data: bytes, **options: object) -> str:
        etag = options.pop("etag", f'"{hashlib.md5(data).hexdigest()}"')
        self.files[path] = Served(data, etag=str(etag), **options)  # type: ignore[arg-type]
        return self.url(path)

    def fail(self, path: str, *faults: Fault) -> None:
        self.faults[path].extend(faults)

    def of(self, path: str) -> list[Seen]:
        return [request for request in self.seen if request.path == path]

    def sent(self, path: str) -> int:
        return sum(request.sent for request in self.of(path))


def _handler(server: FaultServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0].lstrip("/")
            seen = Seen(path, {name.lower(): value for name, value in self.headers.items()})
            server.seen.append(seen)
            self.close_connection = True
            queue = server.faults[path]
            fault = queue.popleft() if queue else Fault()
            with contextlib.suppress(OSError):
                self._answer(path, fault, seen)

        def _answer(self, path: str, fault: Fault, seen: Seen) -> None:
            served = server.files.get(path)
            if fault.redirect:
                return self._plain(302, (("Location", fault.redirect),), seen)
            if fault.status:
                return self._plain(fault.status, fault.headers, seen)
            if served is None:
                return self._plain(404, (), seen)
            start = self._start(served)
            if start >= len(served.data) and start:
                return self._plain(416, (), seen)
            seen.status = 206 if start else 200
            self.send_response(seen.status)
            if served.content_type:
                self.send_header("Content-Type", served.content_type)
            if served.etag:
                self.send_header("ETag", served.etag)
            if served.last_modified:
                self.send_header("Last-Modified", served.last_modified)
            if start:
                whole = len(served.data)
                true = f"bytes {start}-{whole - 1}/{whole}"
                self.send_header("Content-Range", fault.content_range or true)
            if served.length:
                self.send_header("Content-Length", str(len(served.data) - start))
            self.send_header("Connection", "close")
            self.end_headers()
            self._body(served.data[start:], fault, seen)

        def _start(self, served: Served) -> int:
            wanted = self.headers.get("Range", "")
            if not served.ranges or not wanted.startswith("bytes="):
                return 0
            condition = self.headers.get("If-Range", "")
            known = ("", served.etag, served.last_modified)
            if served.honour_if_range and condition not in known:
                return 0
            return int(wanted[len("bytes=") :].partition("-")[0])

        def _plain(self, status: int, headers: tuple[tuple[str, str], ...], seen: Seen) -> None:
            seen.status = status
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()

        def _body(self, body: bytes, fault: Fault, seen: Seen) -> None:
            if fault.wrong_bytes:
                body = body.translate(_FLIPPED)
            ends = [end for end in (fault.cut_after, fault.stall_after) if end is not None]
            end = min([*ends, len(body)])
            for at in range(0, end, 1 << 16):
                piece = body[at : min(at + (1 << 16), end)]
                self.wfile.write(piece)
                seen.sent += len(piece)
                if server.delay_s:
                    time.sleep(server.delay_s)
            if fault.stall_after is not None:
                server.closing.wait(20)
            if fault.reset:
                # A linger of zero makes close() send RST.
                time.sleep(0.05)
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

    return Handler


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    state = FaultServer()
    with local_server(_handler(state)) as state.port:
        try:
            yield state
        finally:
            state.closing.set()


class FakeClock:
    """Counts sleeps in place of sleeping; ``now`` is moved by hand."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


def random_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def model_file(
    data: bytes, *sources: str | tuple[str, ...], name: str = "weights.bin"
) -> ModelFile:
    listed = tuple((source,) if isinstance(source, str) else source for source in sources)
    return ModelFile(name, listed, hashlib.sha256(data).hexdigest(), len(data))


def model_version(*files: ModelFile, name: str = "toy", version: str = "1.0") -> ModelVersion:
    return ModelVersion(name, version, "vocoder", "toy", files, "MIT")
