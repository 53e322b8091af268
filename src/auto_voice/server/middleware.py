"""The outermost layer: identity, permission, admission, upload limits, headers, log and metrics.

It decides before a body is read, so that a full queue or a foreign site costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from auto_voice.errors import (
    AutoVoiceError,
    BusyError,
    NotPermittedError,
    ServerError,
    UploadError,
)
from auto_voice.server.context import Context
from auto_voice.server.logs import request_id
from auto_voice.server.security import (
    EXPOSED,
    HEADERS,
    check_host,
    check_origin,
    client_of,
    token_of,
)
from auto_voice.server.voice_library import VOICE_FILE_BYTES

log = logging.getLogger("auto_voice.server.requests")

# Of the guarded paths, those that need no token.
OPEN = frozenset({"/healthz", "/readyz", "/v1/session"})
DIRECT = frozenset({"/v1/convert", "/v1/evaluate", "/v1/inspect", "/v1/voices"})
SMALL_BODY_BYTES = 65_536
LIMITS = {"/v1/voices/import": VOICE_FILE_BYTES + SMALL_BODY_BYTES}
# Requests that are answered at the same time, uploads or not.
MOST_OPEN = 500
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BODIES = frozenset({"POST", "PUT", "PATCH"})


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context
        self._uploads = 0
        self._bytes = 0
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        given = headers.get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else secrets.token_hex(8)
        request_id.set(identity)
        exchange = _Exchange(scope, send, identity)
        started = time.monotonic()
        body = _Body(receive)
        self._open += 1
        try:
            if self._open > MOST_OPEN:
                raise BusyError("Too many requests at once; try again in a moment.", 1)
            await self._admit(scope, headers, body, exchange)
        except AutoVoiceError as error:
            if scope["method"] in _BODIES and not exchange.status:
                await body.drain()
            await exchange.refuse(error)
        except Exception as error:
            log.error("unexpected %s", type(error).__name__, exc_info=error)
            text = f"Unexpected {type(error).__name__}; the server's log has more under this id."
            await exchange.refuse(ServerError(text, 500))
        finally:
            self._open -= 1
            self._account(scope, exchange, time.monotonic() - started)

    async def _admit(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, exchange: _Exchange
    ) -> None:
        settings, path, method = self._context.settings, scope["path"], scope["method"]
        check_host(settings, headers.get("host", ""))
        token = ""
        if path.startswith("/v1/") or path == "/metrics":
            exchange.origin = check_origin(settings, scope["scheme"], headers)
            if method == "OPTIONS" and exchange.origin:
                await exchange.preflight()
                return
            if path not in OPEN:
                token = token_of(settings, headers)
            exchange.private = True
        address = scope["client"][0] if scope.get("client") else "unknown"
        scope["autovoice.client"] = client_of(token, address)
        scope["autovoice.request_id"] = exchange.identity
        if method not in _BODIES:
            await self._app(scope, receive, exchange.send)
            return
        await self._check_load(path, scope["autovoice.client"])
        limit = LIMITS.get(path, SMALL_BODY_BYTES)
        if path in DIRECT or path == "/v1/jobs":
            limit = settings.upload_bytes
        size = limit  # of a body that does not say
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit():
            size = int(declared[:18])
            _check_size(size, limit)
        if self._uploads >= settings.uploads_at_once:
            raise BusyError("Too many uploads at once; try again in a moment.", 1)
        if self._bytes + size > settings.uploads_bytes:
            raise BusyError("Too much is being uploaded at once; try again in a moment.", 5)
        if size > SMALL_BODY_BYTES and not self._context.files.has_room(self._bytes + size):
            raise BusyError("The server's disk is full; try again later.", 60, 507)
        upload = _Upload(receive, limit, settings.upload_stall_seconds, self._upload_ended)
        self._uploads += 1
        self._bytes += size
        try:
            await self._app(scope, upload, exchange.send)
        finally:
            upload.end()
            self._bytes -= size

    async def _check_load(self, path: str, client: str) -> None:
        if path in DIRECT or path == "/v1/jobs":
            context = self._context
            await asyncio.to_thread(context.store.check, client, path in DIRECT, context.limits)

    def _upload_ended(self) -> None:
        self._uploads -= 1

    def _account(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "") or "(none)"
        status = exchange.status or 499
        metrics = self._context.metrics
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        metrics.request(method, route, status, seconds)
        if status in (429, 503, 507) and method in _BODIES:
            metrics.rejected(status)
        quiet = route in ("/healthz", "/readyz", "/metrics") and status in (200, 503)
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %d",
            method,
            route if route != "(none)" else _short(scope["path"]),
            status,
            extra={
                "seconds": round(seconds, 4),
                "client": scope.get("autovoice.client", ""),
                "bytes": exchange.sent,
            },
        )


DRAIN_BYTES, DRAIN_SECONDS = 8_000_000, 1.0
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _short(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path[:120])


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise UploadError(
            f"The request is larger than the {limit / 1e6:g} MB that are taken; send FLAC or MP3 "
            "in place of WAV, or fewer files."
        )


class _Body:
    """``receive`` that knows whether all of the request has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._whole = False

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._whole = True
        return message

    async def drain(self) -> None:
        """Take what is still on its way, within limits.

        A connection that is closed on a client that still sends is reset, and the reset can
        overtake the answer: the client would see a broken pipe in place of the sentence.
        """
        taken = 0
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self._whole and taken < DRAIN_BYTES and (left := deadline - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self(), left)
            except asyncio.TimeoutError:
                return
            taken += len(message.get("body", b""))


class _Upload:
    """``receive`` with a limit on bytes and on pauses."""

    def __init__(self, receive: Receive, limit: int, stall_seconds: float, ended: Any) -> None:
        self._receive, self._limit, self._stall = receive, limit, stall_seconds
        self._ended = ended
        self._size = 0
        self._open = True

    async def __call__(self) -> Message:
        if not self._open:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._stall)
        except asyncio.TimeoutError:
            raise UploadError(
                f"The upload paused for more than {self._stall:g} s; send it again.", 408
            ) from None
        self._size += len(message.get("body", b""))
        _check_size(self._size, self._limit)
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.end()
        return message

    def end(self) -> None:
        if self._open:
            self._open = False
            self._ended()


class _Exchange:
    """``send`` that adds headers and remembers what was answered."""

    def __init__(self, scope: Scope, send: Send, identity: str) -> None:
        self._scope, self._send = scope, send
        self.identity = identity
        self.origin = ""
        self.private = False
        self.status = 0
        self.sent = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message["headers"]}
            added = [
                (name.encode(), value.encode())
                for name, value in self._headers().items()
                if name.encode() not in present
            ]
            message["headers"] = [*message["headers"], *added]
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)

    def _headers(self) -> dict[str, str]:
        headers = {**HEADERS, "x-request-id": self.identity}
        if self.private:
            headers["cache-control"] = "no-store"
        if self.origin:
            headers |= {
                "access-control-allow-origin": self.origin,
                "access-control-expose-headers": EXPOSED,
                "cross-origin-resource-policy": "cross-origin",
                "vary": "origin",
            }
        return headers

    async def refuse(self, error: AutoVoiceError) -> None:
        """Answer with the error, unless an answer has begun."""
        if self.status:
            raise error
        body, headers = error_answer(error, self.identity)
        await self._answer(error.http_status, body, headers)

    async def preflight(self) -> None:
        """Let a listed origin's page send what the API takes."""
        headers = {
            "access-control-allow-methods": "GET, POST, PATCH, DELETE",
            "access-control-allow-headers": "authorization, content-type, idempotency-key",
            "access-control-max-age": "600",
        }
        await self._answer(204, b"", headers)

    async def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        # A body that was not read would be taken for the next request.
        raw = {**headers, "content-length": str(len(body)), "connection": "close"}
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in raw.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})


def error_answer(error: AutoVoiceError, identity: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers that answer with an error."""
    kind = getattr(error, "kind", type(error).__name__)
    message = " ".join(str(error).split())
    record = {"type": kind, "message": message, "status": error.http_status}
    headers = {"content-type": "application/json"}
    if isinstance(error, BusyError):
        headers["retry-after"] = str(error.retry_after)
    if isinstance(error, NotPermittedError) and error.http_status == 401:
        headers["www-authenticate"] = 'Bearer realm="auto_voice"'
    text = json.dumps({"error": record, "request_id": identity}, ensure_ascii=False)
    # File names may hold halves of surrogate pairs.
    return text.encode("utf-8", "replace"), headers
