"""Where the melody of a source goes: repaired, moved to the voice, widened or narrowed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.pitch import log_f0_statistics
from auto_voice.inference.controls import VOICE, Controls
from auto_voice.types import FloatArray, Pitch, Voice

FILLED_AT_ONCE = 100_000
SLIP_GAP_FRAMES = 2
LOCAL_SECONDS = 0.5
"""Around each frame, whose median says in which octave the voice is."""
OCTAVE = float(np.log(2.0))
FAR_SEMITONES = 20.0
LEAST_SPREAD = 0.02


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


def moved(pitch: Pitch, voice: Voice, controls: Controls) -> tuple[Pitch, float, list[str]]:
    """The melody that is to be spoken, by how many semitones its mean moved, and what to say of it.

    The means leave out frames far from the median, so what octave errors the repair could not
    reach in either recording do not move the result.
    """
    if not controls.singing:
        pitch = repaired(pitch)
    statistics = log_f0_statistics(pitch)
    if statistics is None:
        wanted = voice.log_f0_mean is not None and controls.match_pitch
        notes = ["No pitch was found in the source, so none was moved."] if wanted else []
        return pitch, controls.semitones, notes
    mean, spread = statistics
    automatic = 0.0
    notes = []
    if controls.match_pitch and voice.log_f0_mean is not None:
        automatic = 12.0 * (voice.log_f0_mean - mean) / OCTAVE
        if controls.singing:
            automatic = 12.0 * round(automatic / 12.0)
        elif abs(automatic) > FAR_SEMITONES:
            notes.append(
                f"The voices lie {abs(automatic):.0f} semitones apart; if that sounds wrong, keep "
                "the pitch or set semitones yourself."
            )
    factor = _range_factor(controls, voice, spread)
    semitones = automatic + controls.semitones
    log_f0 = np.log(np.maximum(pitch.f0_hz.astype(np.float64), 1e-3))
    out = mean + factor * (log_f0 - mean) + semitones * OCTAVE / 12
    return Pitch(np.exp(out).astype(np.float32), pitch.voiced, pitch.frame_rate), semitones, notes


def _range_factor(controls: Controls, voice: Voice, spread: float) -> float:
    if controls.pitch_range != VOICE:
        return float(controls.pitch_range)
    if voice.log_f0_std is None:
        return 1.0
    return float(np.clip(voice.log_f0_std / max(spread, LEAST_SPREAD), 0.25, 4.0))


def cut(pitch: Pitch, log_f0: FloatArray | None, start: int, stop: int) -> Pitch:
    """Frames ``[start, stop)`` that interpolate over unvoiced frames as the whole does.

    Args:
        log_f0: of the whole, from :func:`filled`; None if nothing is voiced.
    """
    f0, voiced = pitch.f0_hz[start:stop].copy(), pitch.voiced[start:stop].copy()
    if log_f0 is not None and len(voiced):
        # A cut inside an unvoiced stretch would have only one neighbour to hold on to. It lies
        # deep in the context, so that it counts as voiced is heard nowhere.
        inner = [0] if start > 0 else []
        inner += [-1] if stop < len(pitch.voiced) else []
        for edge in inner:
            f0[edge] = f0[edge] if voiced[edge] else np.exp(log_f0[start:stop][edge])
            voiced[edge] = True
    return Pitch(f0, voiced, pitch.frame_rate)


def filled(pitch: Pitch) -> FloatArray | None:
    """``(frames,)`` ln(Hz), linear over unvoiced stretches and held at the ends."""
    known = np.flatnonzero(pitch.voiced)
    if len(known) == 0:
        return None
    log_f0 = np.log(pitch.f0_hz[known])
    out = np.empty(len(pitch.voiced), np.float32)
    for start in range(0, len(out), FILLED_AT_ONCE):
        frames = np.arange(start, min(start + FILLED_AT_ONCE, len(out)))
        out[frames] = np.interp(frames, known, log_f0)
    return out
