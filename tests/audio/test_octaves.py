"""Slips of the pitch detector and what is made of them. Folding is tested with the controls."""

from __future__ import annotations

import numpy as np
import pytest

from auto_voice.audio.octaves import repaired, without_slips
from auto_voice.evaluation.metrics import pitch_agreement
from auto_voice.types import Pitch


def _melody(slips: slice = slice(0, 0), octaves: float = -1.0) -> Pitch:
    time = np.arange(500) / 62.5
    f0 = 120 * 2 ** (0.25 * np.sin(2 * np.pi * 0.7 * time))
    f0[slips] *= 2.0**octaves
    return Pitch(f0.astype(np.float32), time % 1.0 < 0.8, 62.5)


def test_slipped_frames_are_left_out_and_no_others() -> None:
    slipped = _melody(slice(200, 215))
    kept = without_slips(slipped)
    expected = slipped.voiced.copy()
    expected[200:215] = False
    np.testing.assert_array_equal(kept.voiced, expected)
    np.testing.assert_array_equal(kept.f0_hz, slipped.f0_hz)
    clean = _melody()
    np.testing.assert_array_equal(without_slips(clean).voiced, clean.voiced)


def test_a_slip_on_the_source_does_not_count_and_one_in_the_conversion_does() -> None:
    right, slipped = _melody(), _melody(slice(200, 215))
    assert pitch_agreement(slipped, right).correlation < 0.9
    assert pitch_agreement(without_slips(slipped), right).correlation == pytest.approx(1, abs=1e-6)
    assert pitch_agreement(without_slips(right), slipped).correlation < 0.9


def test_a_track_without_voice_stays_without() -> None:
    silent = Pitch(np.zeros(10, np.float32), np.zeros(10, bool), 62.5)
    assert repaired(silent) is silent
    assert not without_slips(silent).voiced.any()
