"""The envelope of four bands: what sounds where and when."""

from __future__ import annotations

import numpy as np

from auto_voice.audio.envelope import BANDS, ENVELOPE_SIZE, FLOOR, SCALE, band_envelope
from auto_voice.audio.mel import CONTENT_MEL, log_mel

RATE = CONTENT_MEL.sample_rate


def _tone(hz: float, start: float, stop: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(int(RATE * seconds)) / RATE
    return np.where((time >= start) & (time < stop), 0.1 * np.sin(2 * np.pi * hz * time), 0.0)


def _envelope(samples: np.ndarray) -> np.ndarray:
    return band_envelope(log_mel(samples.astype(np.float32), CONTENT_MEL))


def test_each_band_hears_its_own_tone() -> None:
    for band, hz in enumerate((300.0, 1200.0, 2800.0, 6000.0)):
        frame = _envelope(_tone(hz, 0.0, 1.0))[25]
        assert frame.shape == (ENVELOPE_SIZE,)
        assert np.argmax(frame[:BANDS]) == band
        assert np.argmax(frame[BANDS:]) == band


def test_a_burst_lies_in_its_half_of_a_frame() -> None:
    # Frame 20 spans 400 to 420 ms.
    for start, half in ((0.400, 0), (0.410, 1)):
        top = _envelope(_tone(6000.0, start, start + 0.01))[20, BANDS - 1 :: BANDS]
        assert np.argmax(top) == half


def test_twice_the_level_is_so_much_more_in_every_band() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    louder = _envelope(2 * noise) - _envelope(noise)
    assert np.allclose(louder, np.log(4.0) / SCALE, atol=1e-3)


def test_silence_has_a_floor() -> None:
    silent = _envelope(np.zeros(RATE))
    assert np.ptp(silent) == 0
    assert np.array_equal(silent, _envelope(np.full(RATE, 1e-9)))
    assert np.exp(FLOOR) < 1e-5
