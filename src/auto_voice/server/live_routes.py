"""``/v1/live``: a WebSocket that converts while one speaks.

The client first sends one JSON object: ``voice`` (stored), ``sample_rate``, and where wanted
``output_rate``, ``format`` (``pcm16`` or ``float32``), ``own_voice``, ``block_ms``,
``lookahead_ms``, ``controls`` and ``drop``. The server answers ``{"type": "ready", …}``. From then
on binary messages are little-endian samples of one channel, in both directions. JSON objects with
``voice`` or ``controls`` change these; ``{"end": true}`` ends the stream: the rest of the result
comes, then ``{"type": "report", …}``.

What comes faster than it can be converted is left out, the oldest first, and
``{"type": "dropped", "samples": …}`` says so; with ``"drop": false`` the server reads more slowly
instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, cast

import numpy as np
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from auto_voice.errors import AutoVoiceError, BusyError, ConfigError
from auto_voice.inference.controls import Controls, controls_from
from auto_voice.inference.streaming import MOST_WAITING_BLOCKS, LiveStream, as_samples
from auto_voice.server.context import Context
from auto_voice.server.engine import LiveConversion
from auto_voice.types import FloatArray

log = logging.getLogger(__name__)

# Seconds in which the first message must come, and the longest pause between two others.
FIRST_SECONDS, IDLE_SECONDS = 10.0, 60.0
# Bytes of one message: some seconds of sound.
MOST_BYTES = 1 << 20
# Close codes of RFC 6455 and its registry: done, a message that cannot be, a defect, no capacity.
DONE, UNUSABLE, DEFECT, FULL = 1000, 1008, 1011, 1013
# Format to the dtype of its samples.
FORMATS: Mapping[str, str] = {"pcm16": "<i2", "float32": "<f4"}
KNOWN = frozenset(
    {
        "voice", "sample_rate", "output_rate", "format", "own_voice", "block_ms", "lookahead_ms",
        "controls", "drop",
    }
)  # fmt: skip


class Conversation:
    """One client's stream.

    Args:
        request: its first message.
    """

    def __init__(self, socket: WebSocket, context: Context, request: Mapping[str, Any]) -> None:
        self._socket, self._context = socket, context
        self._dtype = np.dtype(FORMATS[_choice(request, "format", "pcm16")])
        self._drop = bool(request.get("drop", True))
        self._request = request
        # What the client sent and nobody has looked at yet, and the samples in it.
        self._waiting: deque[FloatArray | Mapping[str, Any]] = deque()
        self._held = self._left_out = 0
        self._came, self._room = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """From the first message to the end.

        Raises:
            AutoVoiceError: what the client asks cannot be.
            WebSocketDisconnect: it went away.
        """
        with contextlib.ExitStack() as held:
            conversion = await asyncio.to_thread(held.enter_context, self._opened())
            await self._serve(conversion)

    async def _serve(self, conversion: LiveConversion) -> None:
        stream = conversion.stream
        await self._say(
            {
                "type": "ready",
                "latency_ms": stream.latency_ms,
                "block_ms": 1000 * stream.block_seconds,
                "sample_rate": stream.sample_rate,
                "output_rate": stream.output_rate,
                "models": stream.models,
                "notes": list(stream.notes),
            }
        )
        reading = asyncio.create_task(self._read(stream))
        try:
            await self._convert(conversion, reading)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await self._send(await asyncio.to_thread(stream.flush))
        lost = round(self._left_out / stream.sample_rate / stream.block_seconds)
        await self._say({"type": "report", **asdict(stream.report()), "dropped_blocks": lost})

    def _opened(self) -> AbstractContextManager[LiveConversion]:
        """What opens the stream that the client asks for."""
        request = self._request
        unknown = sorted(set(request) - KNOWN)
        if unknown:
            raise ConfigError(
                f"there is no field {unknown[0]!r}; known: {', '.join(sorted(KNOWN))}."
            )
        if not isinstance(request.get("voice"), str):
            raise ConfigError('the first message must name a stored voice: {"voice": …}.')
        numbers = {
            name: _number(request, name) for name in ("block_ms", "lookahead_ms") if name in request
        }
        own, output_rate = request.get("own_voice"), request.get("output_rate")
        return self._context.engine.live(
            request["voice"],
            _controls(request),
            sample_rate=round(_number(request, "sample_rate")),
            output_rate=None if output_rate is None else round(_number(request, "output_rate")),
            own_voice=None if own is None else str(own),
            **numbers,
        )

    async def _read(self, stream: LiveStream) -> None:
        """Keeps what the client sends, in order, until it says that this is the end."""
        seconds = (MOST_WAITING_BLOCKS + 1) * stream.block_seconds
        most = round(seconds * stream.sample_rate)
        try:
            while True:
                item = await self._received()
                if not isinstance(item, Mapping):
                    await self._make_room(most - len(item))
                    self._held += len(item)
                self._waiting.append(item)
                self._came.set()
                if isinstance(item, Mapping) and item.get("end"):
                    return
        finally:
            self._came.set()

    async def _received(self) -> FloatArray | Mapping[str, Any]:
        try:
            message = await asyncio.wait_for(self._socket.receive(), IDLE_SECONDS)
        except asyncio.TimeoutError:
            raise ConfigError(f"nothing came for {IDLE_SECONDS:.0f} s.") from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        if message.get("text") is not None:
            return parsed(message["text"])
        data = message["bytes"]
        if len(data) > MOST_BYTES or len(data) % self._dtype.itemsize:
            raise ConfigError(
                f"a binary message holds whole samples of {self._dtype.itemsize} bytes, "
                f"{MOST_BYTES} bytes at most."
            )
        return as_samples(np.frombuffer(data, self._dtype).astype(self._dtype.newbyteorder("=")))

    async def _make_room(self, most: int) -> None:
        """Until no more than ``most`` samples wait, or none do."""
        lost = 0
        while self._held > max(0, most):
            if not self._drop:
                self._room.clear()
                await self._room.wait()
                continue
            oldest = next(n for n, i in enumerate(self._waiting) if not isinstance(i, Mapping))
            lost += len(self._waiting[oldest])
            self._held -= len(self._waiting[oldest])
            del self._waiting[oldest]
        if lost:
            self._left_out += lost
            await self._say({"type": "dropped", "samples": lost})

    async def _convert(self, conversion: LiveConversion, reading: asyncio.Task[None]) -> None:
        """Everything that comes, until the end of it."""
        while True:
            while not self._waiting:
                if reading.done():
                    reading.result()
                    return
                self._came.clear()
                await self._came.wait()
            item = self._waiting.popleft()
            if isinstance(item, Mapping):
                await asyncio.to_thread(self._change, conversion, item)
                continue
            self._held -= len(item)
            self._room.set()
            await self._send(await asyncio.to_thread(conversion.stream.push, item))

    def _change(self, conversion: LiveConversion, wanted: Mapping[str, Any]) -> None:
        unknown = sorted(set(wanted) - {"voice", "controls", "end"})
        if unknown:
            raise ConfigError(
                f"there is no field {unknown[0]!r}; a message may hold voice, controls or end."
            )
        if not {"voice", "controls"} & set(wanted):
            return
        voice = str(wanted["voice"]) if "voice" in wanted else None
        conversion.change(voice, _controls(wanted) if "controls" in wanted else None)

    async def _send(self, samples: FloatArray) -> None:
        if not len(samples):
            return
        if self._dtype.kind == "i":
            samples = np.round(np.clip(samples, -1, 1) * 32767)
        await self._socket.send_bytes(samples.astype(self._dtype).tobytes())

    async def _say(self, message: Mapping[str, Any]) -> None:
        await self._socket.send_text(json.dumps(message))


async def live(socket: WebSocket) -> None:
    """Serves one connection; what is wrong is said in ``{"type": "error", …}`` before it closes."""
    context = cast(Context, socket.app.state.context)
    await socket.accept()
    code, reason = DONE, ""
    try:
        with context.live_streams.slot(socket.scope["autovoice.client"]):
            text = await asyncio.wait_for(socket.receive_text(), FIRST_SECONDS)
            await Conversation(socket, context, parsed(text)).run()
    except WebSocketDisconnect:
        return
    except (asyncio.TimeoutError, KeyError):
        code, reason = UNUSABLE, "The first message must be a JSON object that names a voice."
    except BusyError as error:
        code, reason = FULL, str(error)
    except AutoVoiceError as error:
        code, reason = (DEFECT if error.http_status >= 500 else UNUSABLE), str(error)
    except Exception as error:
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        code, reason = DEFECT, f"Unexpected {type(error).__name__}; the server's log has more."
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # The client may be gone.
        if reason:
            await socket.send_text(json.dumps({"type": "error", "message": reason}))
        # A close frame holds 123 bytes of text.
        await socket.close(code, reason.encode()[:120].decode(errors="ignore"))


def parsed(text: str) -> Mapping[str, Any]:
    """The JSON object of a message.

    Raises:
        ConfigError: it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("a text message must be a JSON object.") from error
    if not isinstance(found, dict):
        raise ConfigError("a text message must be a JSON object.")
    return found


def _choice(request: Mapping[str, Any], name: str, default: str) -> str:
    value = request.get(name, default)
    if value not in FORMATS:
        raise ConfigError(f"{name} must be one of {', '.join(FORMATS)}, not {value!r}.")
    return str(value)


def _number(request: Mapping[str, Any], name: str) -> float:
    value = request.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ConfigError(f"{name} must be a number, not {value!r}.")
    return float(value)


def _controls(message: Mapping[str, Any]) -> Controls:
    values = message.get("controls") or {}
    if not isinstance(values, dict):
        raise ConfigError("controls must be a JSON object of names and values.")
    return controls_from(values)


ROUTES = [WebSocketRoute("/v1/live", live)]
