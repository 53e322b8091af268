"""Where the melody of a source goes: moved to the voice, widened or narrowed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.pitch import F_MAX_HZ, F_MIN_HZ, log_f0_statistics
from auto_voice.audio.pitch_octaves import OCTAVE, corrected
from auto_voice.inference.controls import VOICE, Controls
from auto_voice.types import FloatArray, Pitch, Voice

FILLED_AT_ONCE = 100_000
FAR_SEMITONES = 20.0
LEAST_SPREAD = 0.02
# Share of the voiced frames beyond the pitch range that is worth a note.
BEYOND_SHARE = 0.05


def moved(pitch: Pitch, voice: Voice, controls: Controls) -> tuple[Pitch, float, list[str]]:
    """The melody that is to be spoken, by how many semitones its mean moved, and what to say of it.

    Mean and spread are those of the voice without its creak, and leave out frames far from the
    median, so a creaky recording is moved as far as one that is not.
    """
    level = without_creak(pitch, controls)
    statistics = log_f0_statistics(level)
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
    log_f0, plain = (
        np.log(np.maximum(track.f0_hz.astype(np.float64), 1e-3)) for track in (pitch, level)
    )
    # A creak lies an octave below the voice however wide that ranges, but not in a monotone.
    leaps = log_f0 - plain if factor else 0.0
    out = np.exp(mean + factor * (plain - mean) + leaps + semitones * OCTAVE / 12)
    notes += _beyond(out[pitch.voiced])
    return Pitch(out.astype(np.float32), pitch.voiced, pitch.frame_rate), semitones, notes


def _beyond(f0_hz: NDArray[np.float64]) -> list[str]:
    """What there is to say of a melody, ``(voiced,)``, that leaves the range of voices."""
    notes = []
    for share, where in (
        (np.mean(f0_hz > F_MAX_HZ), f"above {F_MAX_HZ:.0f} Hz"),
        (np.mean(f0_hz < F_MIN_HZ), f"below {F_MIN_HZ:.0f} Hz"),
    ):
        if share > BEYOND_SHARE:
            notes.append(
                f"{100 * share:.0f} % of the melody lie {where}, beyond the range of the models, "
                "and will not come out at their pitch; transpose less."
            )
    return notes


def without_creak(pitch: Pitch, controls: Controls) -> Pitch:
    """The track whose mean and spread are a voice's own; a song's leaps are a part of it."""
    return pitch if controls.singing else corrected(pitch)


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
