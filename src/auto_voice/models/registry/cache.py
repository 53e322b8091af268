"""Loaded models: one load per key however many threads ask, least recently used out first."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from auto_voice.errors import ModelLoadError

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
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
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
            mine.model = load()
        except BaseException as error:
            mine.error = error
            raise
        finally:
            with self._lock:
                del self._flights[key], self._reserved[key]
                if mine.error is None:
                    self._loaded[key] = _Loaded(mine.model, megabytes)
            mine.done.set()
        return mine.model

    def peek(self, key: str) -> Any:
        """The model if it is loaded, else None; does not count as use."""
        with self._lock:
            loaded = self._loaded.get(key)
            return None if loaded is None else loaded.model

    def keys(self) -> tuple[str, ...]:
        """What is loaded, least recently used first."""
        with self._lock:
            return tuple(self._loaded)

    @property
    def megabytes(self) -> int:
        """What the loaded models take together, by their declared needs."""
        with self._lock:
            return self._used()

    def drop(self, key: str) -> bool:
        """Forget a model, closing it if it can be closed; False if it was not loaded."""
        with self._lock:
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
        while self._loaded and self._used() + megabytes > self._budget_mb:
            evicted, _ = self._loaded.popitem(last=False)
            log.info("unloading %s to make room for %s", evicted, key)
