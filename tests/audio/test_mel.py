from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import speech_like, tone
from auto_voice.audio import frames as frames_module
from auto_voice.audio.mel import CONTENT_MEL, GE2E_MEL, HIFIGAN_MEL, MelSpec, log_mel, mel_filters

SPECS = {"hifigan": HIFIGAN_MEL, "ge2e": GE2E_MEL, "content": CONTENT_MEL}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@each_spec
def test_the_bands_are_slaneys(spec):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    reference = audio_utils.mel_filter_bank(
        spec.n_fft // 2 + 1,
        spec.bands,
        spec.f_min_hz,
        spec.f_max_hz,
        spec.sample_rate,
        norm="slaney",
        mel_scale="slaney",
    ).T
    np.testing.assert_allclose(mel_filters(spec), reference, atol=1e-7)


def published_hifigan(samples):
    """The definition in HiFi-GAN's meldataset.py (Kong et al. 2020), on torch's own transform."""
    torch = pytest.importorskip("torch")
    pad = (HIFIGAN_MEL.n_fft - HIFIGAN_MEL.hop_samples) // 2
    x = torch.nn.functional.pad(torch.tensor(samples)[None, None], (pad, pad), mode="reflect")
    spectrum = torch.stft(
        x[0],
        HIFIGAN_MEL.n_fft,
        hop_length=HIFIGAN_MEL.hop_samples,
        window=torch.hann_window(HIFIGAN_MEL.win_samples),
        center=False,
        return_complex=True,
    )[0]
    magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
    mel = torch.tensor(np.array(mel_filters(HIFIGAN_MEL))) @ magnitude
    return torch.log(torch.clamp(mel, min=1e-5)).numpy()


@pytest.mark.parametrize("length", [385, 1024, 5000, 22_050, 66_001])
def test_hifigan_mel_is_the_published_one(length):
    x = speech_like(3.1, 22_050)[-length:] if length < 66_001 else speech_like(3.0, 22_050)
    got = log_mel(x, HIFIGAN_MEL)
    reference = published_hifigan(x)
    assert got.shape == reference.shape == (80, len(x) // 256)
    np.testing.assert_allclose(got, reference, atol=2e-3)
    assert np.abs(got - reference).mean() < 1e-4


def test_ge2e_mel_is_a_centred_power_spectrogram():
    torch = pytest.importorskip("torch")
    x = speech_like(2.0)
    spectrum = torch.stft(
        torch.tensor(x),
        400,
        hop_length=160,
        window=torch.hann_window(400),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    reference = mel_filters(GE2E_MEL) @ spectrum.abs().square().numpy()
    np.testing.assert_allclose(log_mel(x, GE2E_MEL), reference, rtol=1e-3, atol=1e-6)


@each_spec
@settings(max_examples=25, deadline=None)
@given(length=st.integers(0, 6000))
def test_the_number_of_frames_is_the_promised_one(spec: MelSpec, length):
    got = log_mel(np.random.default_rng(length).standard_normal(length).astype(np.float32), spec)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert got.shape[0] == spec.bands
    if length > spec.pad_samples:
        assert got.shape[1] == spec.frames(length)
    assert got.shape[1] >= 1


@each_spec
@pytest.mark.parametrize("hz", [250, 1000, 3000, 6500])
def test_a_tone_lights_the_band_that_holds_it(spec, hz):
    got = log_mel(tone(hz, 1.0, spec.sample_rate), spec).mean(axis=1)
    bins = np.linspace(0, spec.sample_rate / 2, spec.n_fft // 2 + 1)
    bank = mel_filters(spec)
    centres = (bank * bins).sum(axis=1) / bank.sum(axis=1)
    # Filters narrower than a bin sit on it, hence the slack at low frequencies.
    assert abs(centres[got.argmax()] - hz) < 0.04 * hz + spec.sample_rate / spec.n_fft


def test_twice_the_level_is_ln_2_more_in_magnitude_and_4_times_in_power():
    x = speech_like(1.0, 22_050)
    difference = log_mel(2 * x, HIFIGAN_MEL) - log_mel(x, HIFIGAN_MEL)
    loud = log_mel(x, HIFIGAN_MEL) > -3
    np.testing.assert_allclose(difference[loud], np.log(2), atol=1e-3)
    y = speech_like(1.0)
    np.testing.assert_allclose(log_mel(2 * y, GE2E_MEL), 4 * log_mel(y, GE2E_MEL), rtol=1e-4)


def test_silence_lies_on_the_floor():
    got = log_mel(np.zeros(22_050, np.float32), HIFIGAN_MEL)
    assert got.max() < np.log(1e-4)
    assert got.min() >= np.log(np.float32(1e-5)) - 1e-6


def test_working_in_pieces_leaves_no_seam(monkeypatch):
    x = speech_like(2.0, 22_050)
    whole = log_mel(x, HIFIGAN_MEL)
    monkeypatch.setattr(frames_module, "FRAMES_AT_ONCE", 7)
    np.testing.assert_allclose(log_mel(x, HIFIGAN_MEL), whole, atol=1e-5)


@each_spec
def test_a_shift_by_one_hop_shifts_the_frames_by_one(spec):
    x = speech_like(1.5, spec.sample_rate)
    here, later = log_mel(x, spec), log_mel(x[spec.hop_samples :], spec)
    edge = spec.n_fft // spec.hop_samples + 1
    np.testing.assert_allclose(
        here[:, edge + 1 : -edge], later[:, edge:-edge], rtol=1e-4, atol=1e-4
    )
