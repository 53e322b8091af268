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

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from auto_voice import events
from auto_voice.errors import AutoVoiceError, BusyError, NotPermittedError, ServerError
from auto_voice.server.admission import (
    SESSION,
    SMALL,
    SMALL_BYTES,
    BodyLimits,
    LimitedBody,
    Traffic,
)
from auto_voice.server.context import Context
from auto_voice.server.engine import VOICE_FILE_BYTES
from auto_voice.server.security import (
    EXPOSED,
    HEADERS,
    check_host,
    check_origin,
    client_of,
    token_of,
)
from auto_voice.server.telemetry import request_id

log = logging.getLogger("auto_voice.server.requests")

# Of the guarded paths, those that need no token.
OPEN = frozenset({"/healthz", "/readyz", "/v1/session"})
DIRECT = frozenset({"/v1/convert", "/v1/evaluate", "/v1/inspect", "/v1/voices"})
UPLOADS = DIRECT | {"/v1/jobs", "/v1/voices/import"}
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BODIES = frozenset({"POST", "PUT", "PATCH"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class RequestMiddleware:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context
        self._traffic = Traffic(context.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        if scope["type"] == "websocket":
            await self._admit_websocket(scope, headers, receive, send)
            return
        given = headers.get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else secrets.token_hex(8)
        request_id.set(identity)
        exchange = _Exchange(scope, send, identity)
        started = time.monotonic()
        body = LimitedBody(receive, headers.get("content-type", ""))
        scope["autovoice.address"] = scope["client"][0] if scope.get("client") else "unknown"
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        with (
            events.continued(headers.get("traceparent", "")),
            events.span(events.Request(method)) as answering,
        ):
            try:
                with self._traffic.request(client_of("", scope["autovoice.address"])):
                    await self._refusing(scope, headers, body, exchange)
            except BusyError as error:
                await exchange.refuse(error)
            finally:
                route = getattr(scope.get("route"), "path", "") or "(none)"
                status = exchange.status or 499
                answering.complete(route=route, status=status)
                self._log(scope, exchange, route, status, time.monotonic() - started)

    async def _admit_websocket(
        self, scope: Scope, headers: Mapping[str, str], receive: Receive, send: Send
    ) -> None:
        """By the rules of other requests; one that is refused is answered with 403."""
        settings = self._context.settings
        address = scope["client"][0] if scope.get("client") else "unknown"
        request_id.set(secrets.token_hex(8))
        try:
            with self._traffic.request(client_of("", address)):
                check_host(settings, headers.get("host", ""))
                # A page's origin has the scheme that it was itself loaded with.
                scheme = scope["scheme"].replace("ws", "http", 1)
                check_origin(settings, scheme, headers)
                token = token_of(settings, headers, self._context.sessions)
                scope["autovoice.client"] = client_of(token, address)
                await self._app(scope, receive, send)
        except (NotPermittedError, BusyError) as error:
            log.info("websocket %s refused: %s", _short(scope["path"]), error)
            await send({"type": "websocket.close", "code": 1008, "reason": str(error)[:100]})

    async def _refusing(
        self, scope: Scope, headers: Mapping[str, str], body: LimitedBody, exchange: _Exchange
    ) -> None:
        try:
            await self._admit(scope, headers, body, exchange)
        except AutoVoiceError as error:
            if scope["method"] in _BODIES and not exchange.status:
                await body.drain()
            await exchange.refuse(error)
        except Exception as error:
            log.error("unexpected %s", type(error).__name__, exc_info=error)
            text = f"Unexpected {type(error).__name__}; the server's log has more under this id."
            await exchange.refuse(ServerError(text, 500))

    async def _admit(
        self, scope: Scope, headers: Mapping[str, str], body: LimitedBody, exchange: _Exchange
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
                token = token_of(settings, headers, self._context.sessions)
            exchange.private = True
        client = scope["autovoice.client"] = client_of(token, scope["autovoice.address"])
        scope["autovoice.request_id"] = exchange.identity
        if method not in _BODIES:
            await self._app(scope, body, exchange.send)
            return
        if path in UPLOADS and method == "POST":
            await self._take_upload(scope, headers, body, exchange, client)
            return
        # Whoever has no token yet holds no place that others need, and only for a moment.
        limits = SESSION if path in OPEN else SMALL
        _declared_size(headers, limits)
        body.limit(limits)
        await self._app(scope, body, exchange.send)

    async def _take_upload(
        self,
        scope: Scope,
        headers: Mapping[str, str],
        body: LimitedBody,
        exchange: _Exchange,
        client: str,
    ) -> None:
        context, settings, path = self._context, self._context.settings, scope["path"]
        if path in DIRECT or path == "/v1/jobs":
            await asyncio.to_thread(context.store.check, client, path in DIRECT, context.limits)
        limits = BodyLimits(
            settings.upload_bytes
            if path != "/v1/voices/import"
            else VOICE_FILE_BYTES + SMALL_BYTES,
            settings.upload_stall_seconds,
            settings.upload_least_rate,
            settings.upload_seconds,
        )
        size = _declared_size(headers, limits)
        with self._traffic.upload(client, size) as ended:
            context.files.check_room(self._traffic.upload_bytes)
            body.limit(limits, ended)
            await self._app(scope, body, exchange.send)

    def _log(
        self, scope: Scope, exchange: _Exchange, route: str, status: int, seconds: float
    ) -> None:
        quiet = route in ("/healthz", "/readyz", "/metrics") and status in (200, 503)
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %d",
            scope["method"] if scope["method"] in _METHODS else "OTHER",
            route if route != "(none)" else _short(scope["path"]),
            status,
            extra={
                "seconds": round(seconds, 4),
                "client": scope.get("autovoice.client", ""),
                "bytes": exchange.sent,
            },
        )


def _short(path: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in path[:120])


def _declared_size(headers: Mapping[str, str], limits: BodyLimits) -> int:
    """Bytes of the body by its header, or all that it may have; raises UploadError beyond that."""
    declared = headers.get("content-length", "")
    if not (declared.isascii() and declared.isdigit()):
        return limits.most_bytes
    size = int(declared[:18])
    limits.check_size(size)
    return size


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
    if (seconds := getattr(error, "retry_after", None)) is not None:
        headers["retry-after"] = str(seconds)
    if isinstance(error, NotPermittedError) and error.http_status == 401:
        headers["www-authenticate"] = 'Bearer realm="auto_voice"'
    text = json.dumps({"error": record, "request_id": identity}, ensure_ascii=False)
    # File names may hold halves of surrogate pairs.
    return text.encode("utf-8", "replace"), headers
