"""The envelope of four bands and the cepstra: what sounds where and when."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.fft import dct

from auto_voice.audio.mel import (
    BANDS,
    CEPSTRA,
    CEPSTRA_SIZE,
    CONTENT_MEL,
    ENVELOPE_SIZE,
    FLOOR,
    SCALE,
    SPREADS,
    band_envelope,
    cepstra,
    cepstral_warp,
    log_mel,
    with_envelope,
)

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


def _spectra(orders: range, frames: int = 40) -> np.ndarray:
    """``(80, frames)`` of random cosines of these orders, above the floor."""
    rng = np.random.default_rng(0)
    bands = (np.arange(80) + 0.5) / 80
    shapes = np.cos(np.pi * np.array(orders)[:, None] * bands)
    return (-6 + shapes.T @ rng.normal(0, 0.3, (len(orders), frames))).astype(np.float32)


def test_cepstra_hold_the_shape_and_leave_the_harmonics() -> None:
    shape, ripple = _spectra(range(1, CEPSTRA)), _spectra(range(CEPSTRA, 40)) + 6
    assert cepstra(shape).shape == (20, CEPSTRA_SIZE)
    assert np.allclose(cepstra(shape), cepstra(shape + ripple), atol=1e-4)
    first, second = np.split(cepstra(shape), 2, axis=1)
    assert np.allclose(first, cepstra(np.repeat(shape[:, 0::2], 2, axis=1))[:, :CEPSTRA])
    assert np.allclose(second, cepstra(np.repeat(shape[:, 1::2], 2, axis=1))[:, CEPSTRA:])


def test_cepstra_are_a_cosine_transform() -> None:
    mel = np.random.default_rng(0).normal(-6, 2, (80, 8)).astype(np.float32)
    expected = dct(np.maximum(mel, FLOOR), axis=0, norm="ortho")[:CEPSTRA] / SPREADS[:, None]
    assert np.allclose(cepstra(mel).reshape(8, CEPSTRA), expected.T, atol=1e-5)


def test_cepstra_of_silence_are_those_of_the_floor() -> None:
    assert np.array_equal(cepstra(np.full((80, 8), -30.0)), cepstra(np.full((80, 8), FLOOR)))


@pytest.mark.parametrize("factor", [0.8, 0.95, 1.0, 1.1, 1.25])
def test_a_warp_is_that_of_the_spectrum_itself(factor: float) -> None:
    mel = _spectra(range(1, 9))
    read = np.clip(np.arange(80) * factor, 0, 79)
    moved = np.stack([np.interp(read, np.arange(80), frame) for frame in mel.T], axis=1)
    made = cepstra(mel) @ cepstral_warp(factor)
    assert np.abs(made - cepstra(moved)).max() < 0.02
    if factor != 1.0:
        assert np.abs(cepstra(mel) - cepstra(moved)).max() > 0.1


def test_cepstra_come_last() -> None:
    mel, features = _spectra(range(9)), np.zeros((20, 3), np.float32)
    both = with_envelope(features, mel, with_cepstra=True)
    assert np.array_equal(both[:, : 3 + ENVELOPE_SIZE], with_envelope(features, mel))
    assert np.array_equal(both[:, 3 + ENVELOPE_SIZE :], cepstra(mel))
