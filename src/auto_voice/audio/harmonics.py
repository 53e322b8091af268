"""What a pitch looks like in a mel spectrogram, before any vocal tract shapes it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from auto_voice.audio.mel import HIFIGAN_MEL, mel_filters
from auto_voice.audio.pitch import F_MAX_HZ, F_MIN_HZ
from auto_voice.types import FloatArray

STEPS_PER_OCTAVE = 60
# Between harmonics, the side lobes of a real window and real voices' noise lie about here.
FLOOR = 1e-2


def harmonic_template(log_f0: FloatArray, voiced: FloatArray) -> FloatArray:
    """Log-mel of a harmonic series over that of white noise of the same power, per frame.

    Each harmonic is a line seen through the Hann window of ``HIFIGAN_MEL``; equal amplitudes.
    Networks add an envelope to it instead of drawing every harmonic by themselves.

    Args:
        log_f0: ``(frames,)`` ln(Hz).
        voiced: ``(frames,)`` in [0, 1]; the template is scaled by it.

    Returns:
        ``(frames, 80)`` float32, natural log.
    """
    table = _table()
    position = (np.asarray(log_f0, np.float64) / np.log(2.0) - np.log2(F_MIN_HZ)) * STEPS_PER_OCTAVE
    position = np.clip(position, 0, len(table) - 1)
    before = position.astype(np.int64)
    after = np.minimum(before + 1, len(table) - 1)
    share = (position - before)[:, None].astype(np.float32)
    mixed = table[before] * (1 - share) + table[after] * share
    return np.asarray(mixed * np.asarray(voiced, np.float32)[:, None], np.float32)


@lru_cache(maxsize=1)
def _table() -> FloatArray:
    """``(steps, 80)``: the template at every sixtieth of an octave."""
    spec = HIFIGAN_MEL
    bank = mel_filters(spec).astype(np.float64)
    bins = np.arange(spec.n_fft // 2 + 1) * spec.sample_rate / spec.n_fft
    steps = int(np.ceil(np.log2(F_MAX_HZ / F_MIN_HZ) * STEPS_PER_OCTAVE)) + 1
    rows = np.empty((steps, spec.bands), np.float32)
    for index in range(steps):
        f0 = F_MIN_HZ * 2 ** (index / STEPS_PER_OCTAVE)
        harmonics = np.arange(1, int(spec.f_max_hz / f0) + 2) * f0
        offset = (bins[:, None] - harmonics) * spec.n_fft / spec.sample_rate
        magnitude = np.sqrt(np.square(_hann_lobe(offset)).sum(1))
        # A line carries the power that white noise spreads over f0: the comb's mean square is 1.
        magnitude /= np.sqrt(np.mean(np.square(magnitude[bins < spec.f_max_hz])))
        level = (bank @ magnitude) / bank.sum(1)
        rows[index] = np.log(np.maximum(level, FLOOR))
    rows.flags.writeable = False
    return rows


def _hann_lobe(bins: np.ndarray) -> np.ndarray:
    """Magnitude of the Hann window's transform, in bins from its centre, 1 at the centre."""
    # sin(pi x) / (pi x) / (1 - x^2), whose limit at |x| = 1 is one half.
    near_one = np.isclose(np.abs(bins), 1.0)
    safe = np.where(near_one, 0.0, bins)
    return np.abs(np.where(near_one, 0.5, np.sinc(safe) / (1 - safe**2)))
