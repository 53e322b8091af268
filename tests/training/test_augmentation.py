"""Perturbations do to a spectrum what their names say."""

from __future__ import annotations

import numpy as np
import pytest

from auto_voice.training import corpus as aug


def _peak(band: int = 40) -> np.ndarray:
    bands = np.arange(80)[:, None]
    return (-10 + 6 * np.exp(-((bands - band) ** 2) / 8) + np.zeros((1, 50))).astype(np.float32)


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_formants_move_by_the_factor(factor: float) -> None:
    moved = aug.warp_formants(_peak(), factor).mean(1)
    assert np.argmax(moved) == pytest.approx(40 / factor, abs=1)


def test_a_response_is_smooth_and_the_same_in_every_frame() -> None:
    change = aug.equalise(_peak(), np.random.default_rng(0), 6.0) - _peak()
    assert np.ptp(change, axis=1).max() < 1e-4
    assert np.abs(np.diff(change[:, 0])).max() < 0.3
    assert np.ptp(change[:, 0]) > 0.1


def test_noise_fills_quiet_bands_and_leaves_loud_ones() -> None:
    mel = _peak()
    mel[:40] = -18
    noisy = aug.add_noise(mel, np.random.default_rng(0), snr_db=8.0)
    assert (noisy[:30] > mel[:30] + 1).mean() > 0.95
    assert np.abs(noisy[40] - mel[40]).max() < 1.5
    assert noisy.dtype == np.float32


def test_less_signal_to_noise_is_more_noise() -> None:
    mel = _peak()
    levels = [
        aug.add_noise(mel, np.random.default_rng(0), snr_db).mean() for snr_db in (40, 25, 10)
    ]
    assert levels == sorted(levels)


def test_a_telephone_passes_nothing_above_its_band() -> None:
    cut = aug.limit_band(_peak(), 50, -18.0)
    assert (cut[50:] == -18).all()
    assert (cut[:50] == _peak()[:50]).all()


def test_no_strength_leaves_the_input_alone() -> None:
    mel = _peak()
    assert aug.perturb(mel, np.random.default_rng(0), 0.0) is mel


def test_perturbation_is_random_but_repeatable() -> None:
    one, same, other = (aug.perturb(_peak(), np.random.default_rng(s)) for s in (1, 1, 2))
    assert (one == same).all()
    assert np.abs(one - other).max() > 0.1
    assert np.isfinite(one).all()
