"""When a model cannot be had: what may step in, why, and how everyone gets to know."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass

from auto_voice.errors import (
    AutoVoiceError,
    DiskSpaceError,
    DownloadError,
    IntegrityError,
    MissingDependencyError,
    ModelLoadError,
    ModelUnavailableError,
    OfflineError,
    StoreError,
)
from auto_voice.models.registry.catalog import ModelVersion

log = logging.getLogger(__name__)

# UnsafeFileError is not here: an attack must not pass as an outage.
_REASONS: tuple[tuple[type[AutoVoiceError], str], ...] = (
    (OfflineError, "not installed and offline"),
    (ModelUnavailableError, "unreachable"),
    (DownloadError, "unreachable"),
    (IntegrityError, "served with wrong bytes"),
    (DiskSpaceError, "too big for the disk"),
    (StoreError, "not storable"),
    (MissingDependencyError, "not runnable without a missing dependency"),
    (ModelLoadError, "not loadable"),
)
# The errors after which a substitute may be tried.
RECOVERABLE = tuple(kind for kind, _ in _REASONS)


class FallbackWarning(UserWarning):
    """Another model than the one asked for does the work."""


@dataclass(frozen=True)
class Substitute:
    """What answers in place of a model.

    Attributes:
        wanted: the model asked for.
        version: what loads instead; None is the mock.
        reason: why, an adjective phrase about ``wanted``.
    """

    wanted: ModelVersion
    version: ModelVersion | None
    reason: str

    def __str__(self) -> str:
        served = "mock" if self.version is None else self.version.key
        return f"{served} (fallback: {self.wanted.name} {self.reason})"

    def announce(self, error: AutoVoiceError) -> None:
        """Tells it once; ``error`` is why."""
        served = "A mock, which makes no speech," if self.version is None else self.version.key
        announce(f"{served} stands in for {self.wanted.key}, which is {self.reason}", error)


def announce(message: str, error: AutoVoiceError) -> None:
    """A line in the log where one is kept, and a ``FallbackWarning`` for whoever calls us.

    Without a log Python itself would print the line beside the warning, so it is left out.
    """
    if log.hasHandlers():
        log.warning("%s: %s", message, error)
    warnings.warn(f"{message}: {error}", FallbackWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """For ``warnings.warn`` in ``announce``: the first frame outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if not str(frame.f_globals.get("__name__", "")).startswith("auto_voice"):
            return level
        frame, level = frame.f_back, level + 1
    return 2


def reason_of(error: AutoVoiceError) -> str:
    """Why a model cannot be had, as in ``hubert_base unreachable``."""
    return next(text for kind, text in _REASONS if isinstance(error, kind))
