"""What converters learnt of the voices that were used last, so that each is fitted once."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from auto_voice.models.base import AdaptiveConverter
from auto_voice.types import Voice

log = logging.getLogger(__name__)

# Fitted voices that are remembered, 6 MB each.
KEPT_VOICES = 8

Key: TypeAlias = tuple[str, int, str]


class FittedVoices:
    """Fits converters to voices; one object serves many threads.

    Args:
        most: that are remembered.
    """

    def __init__(self, most: int = KEPT_VOICES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, Mapping[str, NDArray[np.float16]]] = OrderedDict()
        self._running: dict[Key, threading.Lock] = {}

    def fitted(
        self,
        converter: AdaptiveConverter,
        voice: Voice,
        steps: int,
        progress: Callable[[float], None] | None = None,
    ) -> Voice:
        """``voice`` with ``converter`` fitted to it in ``steps``.

        Threads that ask for the same voice at once wait for the first of them; where that one is
        stopped, the next goes on in its place.
        """
        key = (converter.name, steps, _fingerprint(voice))
        with self._lock:
            turn = self._running.setdefault(key, threading.Lock())
        try:
            with turn:
                learnt = self._remembered(key)
                if learnt is None:
                    name = voice.name or "(unnamed)"
                    log.info("fitting %s to the voice %s", converter.name, name)
                    made = converter.adapt(voice, steps, progress)
                    if made.adapted_to != converter.name:
                        return voice  # Too little speech to learn from.
                    learnt = made.adaptation
                    self._remember(key, learnt)
        finally:
            with self._lock:
                if self._running.get(key) is turn:
                    del self._running[key]
        return replace(voice, adaptation=learnt, adapted_to=converter.name)

    def _remembered(self, key: Key) -> Mapping[str, NDArray[np.float16]] | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _remember(self, key: Key, learnt: Mapping[str, NDArray[np.float16]]) -> None:
        with self._lock:
            self._known[key] = learnt
            while len(self._known) > self._most:
                self._known.popitem(last=False)


def _fingerprint(voice: Voice) -> str:
    """A hash of everything that a converter learns from."""
    digest = hashlib.sha256(repr((voice.log_f0_mean, voice.log_f0_std)).encode())
    arrays: dict[str, NDArray[Any]] = {"embedding": voice.embedding, **voice.frames}
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
