"""Connections that send nothing, or a request header without an end, are closed."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# For the header of a request to come in, counted from the connection or the last answer.
HEADER_SECONDS = 20.0


class PatientProtocol(H11Protocol):
    """uvicorn's, which by itself waits for the first byte and the last of a header for ever.

    A thousand such connections would be all that it takes.
    """

    header_seconds = HEADER_SECONDS
    _due: asyncio.TimerHandle | None = None
    _seen: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(exc)

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
