"""Octave errors of a pitch detector: folded back, or left out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from auto_voice.types import Pitch

SLIP_GAP_FRAMES = 2
LOCAL_SECONDS = 0.5
"""Around each frame, whose median says in which octave the voice is."""
OCTAVE = float(np.log(2.0))


def repaired(pitch: Pitch) -> Pitch:
    """The track with octave errors of the detector folded back.

    A frame is folded where it lies an octave, give or take two semitones, from the median of the
    half second around it, itself pulled towards the median of the whole, and where the detector
    leapt to get there: it slips for a few frames, or in a whole creaky word, while a voice that
    rises an octave glides.
    """
    known = np.flatnonzero(pitch.voiced)
    if len(known) == 0:
        return pitch
    heard = np.log(pitch.f0_hz[known].astype(np.float64))
    log_f0 = _folded(heard, np.full(len(heard), _centre(heard)), slack=0.45)
    reach = round(LOCAL_SECONDS / 2 * pitch.frame_rate)
    log_f0 = _folded(log_f0, _running_median(log_f0, known, reach), slack=0.17)
    f0 = pitch.f0_hz.copy()
    f0[known] = np.exp(_only_slips(heard, log_f0, known))
    return Pitch(f0, pitch.voiced, pitch.frame_rate)


def without_slips(pitch: Pitch) -> Pitch:
    """The track with frames that :func:`repaired` would fold counted as unvoiced."""
    slipped = pitch.voiced & (repaired(pitch).f0_hz != pitch.f0_hz)
    return Pitch(pitch.f0_hz, pitch.voiced & ~slipped, pitch.frame_rate)


def _only_slips(
    heard: NDArray[np.float64], folded: NDArray[np.float64], frames: NDArray[np.int64]
) -> NDArray[np.float64]:
    """``folded`` where the detector slipped, ``heard`` where a voice just rose or fell far.

    A slip begins or ends with a leap of its own; a melody glides. A stretch between two pauses
    shows neither, and there only what lies too low is moved: creak halves a pitch, little
    doubles it.
    """
    out: NDArray[np.float64] = heard.copy()
    moved = np.abs(folded - heard) > OCTAVE / 2
    together = np.diff(frames, prepend=frames[0] - SLIP_GAP_FRAMES - 1) <= SLIP_GAP_FRAMES
    edges = np.flatnonzero(
        np.diff(moved, prepend=False, append=False) | ~np.append(together, False)
    )
    for start, stop in pairwise(edges):
        if not moved[start]:
            continue
        leaps = [
            abs(heard[a] - heard[a - 1]) > OCTAVE / 2
            for a in (start, stop)
            if 0 < a < len(heard) and together[a]
        ]
        if any(leaps) if leaps else folded[start] > heard[start]:
            out[start:stop] = folded[start:stop]
    return out


def _centre(log_f0: NDArray[np.float64]) -> float:
    """The strongest place of the distribution: it stays when 2 of 5 frames are an octave off."""
    semitones = 12 * log_f0 / OCTAVE
    low = np.floor(semitones.min()) - 6
    counts = np.bincount(np.round((semitones - low) * 2).astype(np.int64), minlength=24)
    offsets = np.arange(-12, 13)
    smooth = np.convolve(counts, np.exp(-0.5 * (offsets / 4) ** 2), mode="same")
    return float((low + np.argmax(smooth) / 2) * OCTAVE / 12)


def _folded(
    log_f0: NDArray[np.float64], around: NDArray[np.float64], slack: float
) -> NDArray[np.float64]:
    """Values within ``slack`` octaves of a whole octave from ``around``, brought to its octave."""
    octaves = (log_f0 - around) / OCTAVE
    whole = np.round(octaves)
    wrong = (whole != 0) & (np.abs(octaves - whole) <= slack)
    return np.where(wrong, log_f0 - whole * OCTAVE, log_f0)


def _running_median(
    values: NDArray[np.float64], frames: NDArray[np.int64], reach: int
) -> NDArray[np.float64]:
    """Median over the voiced frames that lie within ``reach`` frames of each."""
    low = np.searchsorted(frames, frames - reach)
    high = np.searchsorted(frames, frames + reach, side="right")
    medians = (np.median(values[a:b]) for a, b in zip(low, high, strict=True))
    return np.fromiter(medians, np.float64, len(values))  # A list of hours takes 30 MB more.
