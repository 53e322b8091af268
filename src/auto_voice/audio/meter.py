"""Loudness and peak of a recording that comes block by block."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.loudness import (
    ABSOLUTE_GATE_LUFS,
    BLOCK_SECONDS,
    BLOCK_STEP_SECONDS,
    PEAK_MARGIN_SAMPLES,
    RELATIVE_GATE_LU,
    k_weighted,
    true_peak,
)
from auto_voice.types import FloatArray

# Sound before a block that its filters hear first: their slowest pole has died away by then.
SETTLE_SECONDS = 1.0


class LoudnessMeter:
    """Integrated loudness (BS.1770-4) and true peak of blocks in order, in constant memory.

    Agrees with :func:`auto_voice.audio.loudness.integrated_loudness` of the joined blocks.

    Args:
        peaks: whether the peaks are measured as well, which takes most of the time.
    """

    def __init__(self, sample_rate: int, peaks: bool = True) -> None:
        self.sample_rate = sample_rate
        self._peaks = peaks
        self.peak = 0.0
        self._true_peak = 0.0
        self._step = round(BLOCK_STEP_SECONDS * sample_rate)
        self._settle = round(SETTLE_SECONDS * sample_rate)
        self._before = np.zeros(self._settle, np.float32)
        self._held = np.zeros(0, np.float32)
        self._steps: list[NDArray[np.float64]] = []

    def add(self, block: FloatArray) -> None:
        """The next ``(samples,)``."""
        if self._peaks:
            self._look_for_peaks(block)
        joined = np.concatenate([self._held, block])
        whole = len(joined) // self._step * self._step
        if whole:
            self._measure(joined[:whole])
        self._held = joined[whole:]

    @property
    def true_peak_db(self) -> float:
        """dBTP; -inf for silence."""
        return 20 * math.log10(self._true_peak) if self._true_peak > 0 else -math.inf

    @property
    def loudness_lufs(self) -> float:
        """Of what came so far; -inf if nothing passes the gates."""
        blocks = self.block_powers()
        blocks = blocks[blocks > 10 ** ((ABSOLUTE_GATE_LUFS + 0.691) / 10)]
        if len(blocks) == 0:
            return -math.inf
        return _lufs(blocks[blocks > blocks.mean() * 10 ** (RELATIVE_GATE_LU / 10)])

    def block_powers(self) -> NDArray[np.float64]:
        """``(blocks,)`` weighted power of each 0.4 s, 0.1 s apart; of all if that is shorter."""
        steps = np.concatenate(self._steps) if self._steps else np.zeros(0)
        size = round(BLOCK_SECONDS / BLOCK_STEP_SECONDS)
        if len(steps) >= size:
            return np.convolve(steps, np.ones(size) / size, mode="valid")
        rest = np.concatenate([self._before, self._held])
        weighted = k_weighted(rest.astype(np.float64), self.sample_rate)[self._settle :]
        total = steps.sum() * self._step + float(np.square(weighted).sum())
        count = len(steps) * self._step + len(self._held)
        return np.array([total / count]) if count else np.zeros(0)

    def _look_for_peaks(self, block: FloatArray) -> None:
        self.peak = max(self.peak, float(np.max(np.abs(block), initial=0.0)))
        # A peak between two samples needs its neighbours on both sides, so one margin waits.
        around = np.concatenate([self._before[-PEAK_MARGIN_SAMPLES:], self._held, block])
        self._true_peak = max(self._true_peak, 10 ** (true_peak(around, self.sample_rate) / 20))

    def _measure(self, whole: FloatArray) -> None:
        heard = np.concatenate([self._before, whole])
        weighted = k_weighted(heard.astype(np.float64), self.sample_rate)[self._settle :]
        self._steps.append(np.square(weighted).reshape(-1, self._step).mean(axis=1))
        self._before = heard[-self._settle :]


def speech_loudness(source: LoudnessMeter, result: LoudnessMeter) -> tuple[float, float]:
    """LUFS of both over the same time: where ``source`` passes the gate of BS.1770-4.

    The absolute gate falls with a source that is quieter than that throughout. -inf for silence.
    """
    own, made = source.block_powers(), result.block_powers()
    count = min(len(own), len(made))
    own, made = own[:count], made[:count]
    loudest = float(own.max(initial=0.0))
    audible = own > min(10 ** ((ABSOLUTE_GATE_LUFS + 0.691) / 10), 1e-3 * loudest)
    if not audible.any():
        return -math.inf, -math.inf
    heard = audible & (own > own[audible].mean() * 10 ** (RELATIVE_GATE_LU / 10))
    return _lufs(own[heard]), _lufs(made[heard])


def _lufs(powers: NDArray[np.float64]) -> float:
    mean = float(powers.mean()) if len(powers) else 0.0
    return -0.691 + 10 * math.log10(mean) if mean > 0 else -math.inf
