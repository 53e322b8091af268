"""Progress: one channel through which every stage tells how far it is.

Whoever calls names a listener once, around everything that is done inside: conversions, downloads,
loads and judging tell it, whichever object they belong to. It is of the thread that does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """How far one stage of the work is.

    Attributes:
        stage: ``download``, ``load``, ``fine-tune`` or ``convert``; of an evaluation ``pairs`` and
            ``judge``.
        done: how much of it is done, in the stage's own unit (bytes, models, steps, frames,
            conversions).
        total: how much there is in all, in the same unit; 0 where it is not known.
        item: what the stage works on, such as the name of a model or of a voice.
    """

    stage: str
    done: float
    total: float = 1.0
    item: str = ""

    @property
    def fraction(self) -> float:
        """From 0 to 1; 0 where the total is not known."""
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0


# Is told each step of every stage. What it raises ends the work.
ProgressCallback: TypeAlias = Callable[[Progress], None]

_LISTENER: ContextVar[ProgressCallback | None] = ContextVar("progress", default=None)


def listener() -> ProgressCallback | None:
    """Who is told of what this thread does now."""
    return _LISTENER.get()


@contextmanager
def told_to(callback: ProgressCallback | None) -> Iterator[None]:
    """Everything that is done inside, in this thread, is told to ``callback``; with None to whom it
    was told before."""
    token = _LISTENER.set(callback or _LISTENER.get())
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(stage: str, done: float, total: float = 1.0, item: str = "") -> None:
    """Tell the listener, if there is one; see :class:`Progress`."""
    callback = _LISTENER.get()
    if callback is not None:
        callback(Progress(stage, done, total, item))
