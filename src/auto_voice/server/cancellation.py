"""Cancellation: running work asks at every piece whether it must stop, and networks end at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from auto_voice.models.runtime.sessions import Interrupted, Interruption

# Seconds between two reports of progress.
REPORT_SECONDS = 0.25


class Stopped(BaseException):
    """The work was told to stop; not an Exception, so that no handler of errors keeps it going."""


class CancellationToken:
    """Stops one piece of work, and carries its progress back.

    Args:
        report: told the fraction done, at most four times a second.
        others_wait: whether somebody else's work waits for the worker.
    """

    def __init__(
        self,
        report: Callable[[float], None] | None = None,
        others_wait: Callable[[], bool] | None = None,
    ) -> None:
        self._stop = threading.Event()
        self._networks = Interruption()
        self._report = report
        self._others_wait = others_wait
        self._reported_at = 0.0
        self.fraction = 0.0

    def stop(self) -> None:
        """Make the next :meth:`check` raise, and networks that run; called from any thread."""
        self._stop.set()
        self._networks.stop()

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raise :class:`Stopped` if the work must stop."""
        if self._stop.is_set():
            raise Stopped

    def progress(self, fraction: float) -> None:
        """Say how far the work is, and check."""
        self.check()
        self.fraction = min(1.0, max(0.0, fraction))
        now = time.monotonic()
        if self._report is not None and now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self._report(self.fraction)

    def give_way(self) -> None:
        """Stop if others wait, for work that goes on later from where it is now."""
        if self._others_wait is not None and self._others_wait():
            self.stop()
            self.check()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let :meth:`stop` end every network that this thread runs.

        A vocoder spends seconds in one call for half a minute of audio.
        """
        try:
            with self._networks.covers():
                yield
        except Interrupted:
            raise Stopped from None
