"""How running work learns that it must stop: it asks at every piece, stage and network layer."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Seconds between two reports of progress.
REPORT_SECONDS = 0.25

_running = threading.local()
_hook_lock = threading.Lock()
_hooked = False


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
        self._report = report
        self._others_wait = others_wait
        self._reported_at = 0.0

    def stop(self) -> None:
        """Make the next :meth:`check` raise; called from any thread."""
        self._stop.set()

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
        now = time.monotonic()
        if self._report is not None and now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self._report(min(1.0, max(0.0, fraction)))

    def give_way(self) -> None:
        """Stop if others wait, for work that goes on later from where it is now."""
        if self._others_wait is not None and self._others_wait():
            self.stop()
            self.check()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let every torch layer that this thread runs ask :meth:`check` first.

        A vocoder spends seconds in one call for half a minute of audio, but no layer of it does.
        """
        _watch_layers()
        _running.token = self
        try:
            yield
        finally:
            _running.token = None


def _watch_layers() -> None:
    global _hooked
    if _hooked or "torch" not in sys.modules:
        return
    with _hook_lock:
        if not _hooked:
            from torch.nn.modules.module import register_module_forward_pre_hook

            register_module_forward_pre_hook(_ask)
            _hooked = True


def _ask(module: Any, inputs: Any) -> None:
    token = getattr(_running, "token", None)
    if token is not None:
        token.check()
