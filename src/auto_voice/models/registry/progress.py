"""How far a transfer is: a bar for people, a callback for programs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Hears a label, the bytes done and the bytes in all (0 where the total is unknown).
ProgressCallback = Callable[[str, int, int], None]


class DownloadProgressBar:
    """A tqdm bar on standard error, silent where nobody watches, and an optional callback.

    Args:
        label: shown before the bar.
        total: bytes; 0 if unknown.
        enabled: None shows the bar on a terminal alone.
        callback: told every change, whether the bar shows or not.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        enabled: bool | None = None,
        callback: ProgressCallback | None = None,
    ) -> None:
        self.label = label
        self.total = total
        self.enabled = sys.stderr.isatty() if enabled is None else enabled
        self.position = 0
        self._callback = callback
        self._bar: Any = None

    def update_to(self, position: int) -> None:
        """Moves to ``position`` bytes; backwards where a transfer had to start again."""
        if position == self.position:
            return
        self.position = position
        if self._callback is not None:
            self._callback(self.label, position, self.total)
        if self._bar is None and self.enabled:
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self.label, total=self.total or None, initial=position,
                unit="B", unit_scale=True, unit_divisor=1000,
            )  # fmt: skip
        elif self._bar is not None:
            self._bar.update(position - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> DownloadProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
