"""Creak, slips of the pitch detector and what is made of them.

Folding is tested with the controls.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from auto_voice.audio.pitch import (
    corrected,
    corrected_by_sound,
    without_octave_errors,
)
from auto_voice.evaluation.metrics import pitch_agreement
from auto_voice.types import FloatArray, Pitch


def _melody(slips: slice = slice(0, 0), octaves: float = -1.0) -> Pitch:
    time = np.arange(500) / 62.5
    f0 = 120 * 2 ** (0.25 * np.sin(2 * np.pi * 0.7 * time))
    f0[slips] *= 2.0**octaves
    return Pitch(f0.astype(np.float32), time % 1.0 < 0.8, 62.5)


def test_slipped_frames_are_left_out_and_no_others() -> None:
    slipped = _melody(slice(200, 215))
    kept = without_octave_errors(slipped)
    expected = slipped.voiced.copy()
    expected[200:215] = False
    np.testing.assert_array_equal(kept.voiced, expected)
    np.testing.assert_array_equal(kept.f0_hz, slipped.f0_hz)
    clean = _melody()
    np.testing.assert_array_equal(without_octave_errors(clean).voiced, clean.voiced)


def test_a_slip_on_the_source_does_not_count_and_one_in_the_conversion_does() -> None:
    right, slipped = _melody(), _melody(slice(200, 215))
    assert pitch_agreement(slipped, right).correlation < 0.9
    assert pitch_agreement(without_octave_errors(slipped), right).correlation == pytest.approx(
        1, abs=1e-6
    )
    assert pitch_agreement(without_octave_errors(right), slipped).correlation < 0.9


RATE = 16000
STRETCH = slice(200, 215)


def _pulses(melody: Pitch, seed: int = 0) -> FloatArray:
    """What glottal pulses at ``melody`` sound like behind a resonance, and a little noise."""
    seconds = len(melody.f0_hz) / melody.frame_rate
    time = np.arange(int(seconds * RATE)) / RATE
    f0 = np.interp(time, np.arange(len(melody.f0_hz)) / melody.frame_rate, melody.f0_hz)
    phase = np.cumsum(f0) / RATE
    pulses = np.diff(np.floor(phase), prepend=0.0)
    mouth = np.exp(-time[:400] * 400) * np.sin(2 * np.pi * 700 * time[:400])
    noise = 0.02 * np.random.default_rng(seed).standard_normal(len(time))
    return (np.convolve(pulses, mouth)[: len(time)] + noise).astype(np.float32)


def _reader(sound: FloatArray) -> Callable[[int, int], FloatArray]:
    return lambda start, stop: sound[start:stop]


def _hum(sound: FloatArray) -> FloatArray:
    time = np.arange(len(sound)) / RATE
    return (sound + 0.5 + 0.05 * np.sin(2 * np.pi * 60 * time)).astype(np.float32)


@pytest.mark.parametrize("beside", [lambda sound: sound, _hum], ids=["clean", "hum and offset"])
@pytest.mark.parametrize("stretch", [STRETCH, slice(0, 12), slice(400, 412)])
def test_creak_is_left_and_a_slip_is_folded_back(
    stretch: slice, beside: Callable[[FloatArray], FloatArray]
) -> None:
    level, leapt = _melody(), _melody(stretch)
    creaky, plain = beside(_pulses(leapt)), beside(_pulses(level))
    np.testing.assert_array_equal(
        corrected_by_sound(leapt, _reader(creaky), RATE).f0_hz, leapt.f0_hz
    )
    np.testing.assert_allclose(
        corrected_by_sound(leapt, _reader(plain), RATE).f0_hz, level.f0_hz, rtol=1e-5
    )
    doubled = _melody(stretch, 1.0)
    np.testing.assert_allclose(
        corrected_by_sound(doubled, _reader(plain), RATE).f0_hz, level.f0_hz, rtol=1e-5
    )


def test_a_slip_beside_a_creak_is_folded_alone() -> None:
    creaky, heard = _melody(STRETCH), _melody(STRETCH)
    heard.f0_hz[215:225] *= 2
    fixed = corrected_by_sound(heard, _reader(_pulses(creaky)), RATE)
    np.testing.assert_allclose(fixed.f0_hz, creaky.f0_hz, rtol=1e-5)


def test_where_the_sound_tells_nothing_its_neighbours_do() -> None:
    level, leapt = _melody(), _melody(STRETCH)
    for sound in (np.zeros(8 * RATE), np.zeros(10), np.full(8 * RATE, 0.1)):
        fixed = corrected_by_sound(leapt, _reader(sound.astype(np.float32)), RATE)
        np.testing.assert_allclose(fixed.f0_hz, level.f0_hz, rtol=1e-5)


def test_a_track_without_voice_stays_without() -> None:
    silent = Pitch(np.zeros(10, np.float32), np.zeros(10, bool), 62.5)
    assert corrected(silent) is silent
    assert not corrected_by_sound(silent, _reader(np.zeros(0, np.float32)), RATE).voiced.any()
    assert not without_octave_errors(silent).voiced.any()
