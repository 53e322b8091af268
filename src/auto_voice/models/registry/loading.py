"""The life of a loaded model: one load for all threads, what may step in where a model cannot be
had and how everyone gets to know, and one real inference so that nobody waits for set-up."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from auto_voice import events
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
from auto_voice.progress import tell

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    model: Any
    megabytes: int


class _Flight:
    """One load under way; those who wait for it share its outcome, also a failure."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.model: Any = None
        self.error: BaseException | None = None
        self.thread = threading.get_ident()
        # Whether the model stays in the cache; not if it was dropped while it loaded.
        self.kept = True

    def outcome(self) -> Any:
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.model


class ModelCache:
    """Models by key, shared by all threads.

    Args:
        budget_mb: what the models may take together; 0 for no limit. What is evicted is freed
            once its last user lets go of it.
    """

    def __init__(self, budget_mb: int = 0) -> None:
        self._budget_mb = budget_mb
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._flights: dict[str, _Flight] = {}
        self._reserved: dict[str, int] = {}

    def get(self, key: str, megabytes: int, load: Callable[[], Any]) -> Any:
        """The model of ``key``; ``load`` runs at most once at a time, outside the lock.

        Args:
            megabytes: what the model takes; room is made before ``load`` runs.

        Raises:
            ModelLoadError: the model alone exceeds the budget.
            Exception: what ``load`` raised, in every thread that waited for it.
        """
        known = self._known(key)
        if known is not None:
            events.emit(events.Reuse(key))
            return known.model
        with self._lock:
            if key in self._loaded:  # since a moment ago
                return self._loaded[key].model
            flight = self._flights.get(key)
            if flight is None:
                self._make_room(key, megabytes)
                self._flights[key] = mine = _Flight()
                self._reserved[key] = megabytes
        if flight is not None:
            if flight.thread == threading.get_ident():
                raise ModelLoadError(f"loading {key} needs {key} itself; check the catalog")
            return flight.outcome()
        try:
            tell("load", 0, 1, key)
            mine.model = load()
            tell("load", 1, 1, key)
        except BaseException as error:
            mine.error = error
            raise
        finally:
            with self._lock:
                del self._flights[key], self._reserved[key]
                if mine.error is None and mine.kept:
                    self._loaded[key] = _Loaded(mine.model, megabytes)
                    # Loads that ran beside this one could make no room in each other.
                    self._evict(key)
            mine.done.set()
        return mine.model

    def _known(self, key: str) -> _Loaded | None:
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
            return self._loaded.get(key)

    def keys(self) -> tuple[str, ...]:
        """What is loaded, least recently used first."""
        with self._lock:
            return tuple(self._loaded)

    def loading(self) -> tuple[str, ...]:
        """What is being loaded now."""
        with self._lock:
            return tuple(self._flights)

    @property
    def megabytes(self) -> int:
        """What the loaded models take together, by their declared needs."""
        with self._lock:
            return self._used()

    def drop(self, key: str) -> bool:
        """Forget a model, closing it if it can be closed; False if it was not loaded.

        One that is being loaded goes to those who wait for it and is not kept.
        """
        with self._lock:
            if key in self._flights:
                self._flights[key].kept = False
            loaded = self._loaded.pop(key, None)
        if loaded is None:
            return False
        close = getattr(loaded.model, "close", None)
        if callable(close):
            close()
        return True

    def _used(self) -> int:
        return sum(e.megabytes for e in self._loaded.values()) + sum(self._reserved.values())

    def _make_room(self, key: str, megabytes: int) -> None:
        if not self._budget_mb:
            return
        if megabytes > self._budget_mb:
            raise ModelLoadError(
                f"{key} needs {megabytes} MB, more than the memory budget of {self._budget_mb} MB; "
                "raise memory_budget_mb or choose a smaller model"
            )
        self._evict(key, megabytes)

    def _evict(self, key: str, megabytes: int = 0) -> None:
        """Forgets the least recently used until ``megabytes`` more fit, but never ``key``."""
        if not self._budget_mb:
            return
        for other in [other for other in self._loaded if other != key]:
            if self._used() + megabytes <= self._budget_mb:
                return
            gone = self._loaded.pop(other)
            events.emit(events.Evict(other, key, gone.megabytes))


# Fallbacks

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
        answers = "mock" if self.version is None else self.version.key
        events.emit(events.Fallback(self.wanted.key, answers, self.reason))
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
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] != "auto_voice":
            return level
        frame, level = frame.f_back, level + 1
    return 2


def reason_of(error: AutoVoiceError) -> str:
    """Why a model cannot be had, as in ``hubert_base unreachable``."""
    return next(text for kind, text in _REASONS if isinstance(error, kind))


# Warming up

# Of noise that a model runs on: all its parts work, and nobody waits long.
SECONDS = 1.0


@dataclass(frozen=True)
class WarmupTiming:
    """What warming one model took.

    Attributes:
        model: what really answered, as ``registry.resolved`` says it.
        load_s: seconds to fetch, verify and load; about 0 if it was loaded.
        inference_s: seconds of the first inference on one second of audio.
    """

    model: str
    load_s: float
    inference_s: float


def run_once(model: Any, version: ModelVersion, seconds: float = SECONDS) -> Any:
    """What a loaded model makes of so many seconds of a sweeping tone: an array, where it makes
    one."""
    return _RUN[version.kind](model, version, seconds)


def _noise(sample_rate: int, seconds: float) -> Any:
    import numpy as np

    # A quadratic phase sweeps all frequencies; numpy.random would take longer to import than a
    # mock to run.
    phase = np.arange(int(seconds * sample_rate), dtype=np.float64) ** 2
    return (0.05 * np.sin(phase)).astype(np.float32)


def _content(model: Any, version: ModelVersion, seconds: float) -> Any:
    return model.encode(_noise(model.sample_rate, seconds)).features


def _speaker(model: Any, version: ModelVersion, seconds: float) -> Any:
    return model.embed_utterance(_noise(model.sample_rate, seconds))


def _vocoder(model: Any, version: ModelVersion, seconds: float) -> Any:
    import numpy as np

    frames = round(seconds * model.sample_rate / model.hop_samples)
    return model.synthesize(np.full((model.bands, frames), -5.0, dtype=np.float32))


def _converter(model: Any, version: ModelVersion, seconds: float) -> Any:
    import numpy as np

    from auto_voice.types import Content, Pitch, Voice

    dims = int(version.params.get("net", {}).get("dims", 64))
    rows = round(50 * seconds)
    content = Content(np.zeros((rows, dims), dtype=np.float32), 50.0, model.content_space)
    hops = round(62.5 * seconds)
    pitch = Pitch(np.full(hops, 120.0, dtype=np.float32), np.ones(hops, dtype=np.bool_), 62.5)
    voice = Voice(np.full(256, 1 / 16, dtype=np.float32), log_f0_mean=4.8, log_f0_std=0.2)
    frames = round(seconds * model.sample_rate / model.hop_samples)
    return model.convert(content, pitch, voice, frames).values


def _recogniser(model: Any, version: ModelVersion, seconds: float) -> Any:
    return model.transcribe(_noise(model.sample_rate, seconds))


def _quality(model: Any, version: ModelVersion, seconds: float) -> Any:
    return model.score(_noise(model.sample_rate, seconds))


def _synthesiser(model: Any, version: ModelVersion, seconds: float) -> Any:
    import numpy as np

    # Ten phonemes take about a second to say.
    style = np.zeros(int(version.params.get("style", 256)), dtype=np.float32)
    return model.speak([16] * round(10 * seconds), style, 1.0)


def _sample(model: Any, version: ModelVersion, seconds: float) -> Any:
    """A recording is ready once it is read."""
    return model.samples


_RUN: Mapping[str, Callable[[Any, ModelVersion, float], Any]] = {
    "content": _content,
    "converter": _converter,
    "vocoder": _vocoder,
    "speaker": _speaker,
    "sample": _sample,
    "recogniser": _recogniser,
    "quality": _quality,
    "synthesiser": _synthesiser,
}
