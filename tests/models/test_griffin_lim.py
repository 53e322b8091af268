"""The vocoder without weights: its audio has the mel it was given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel, mel_filters
from auto_voice.errors import AudioContentError
from auto_voice.models.base import Vocoder
from auto_voice.models.griffin_lim_model import GriffinLimModel, build, linear_magnitude
from auto_voice.models.registry.catalog import ModelVersion

RATE = 22050


def voice_like(seconds: float, f0_hz: float = 140.0) -> np.ndarray:
    """Harmonics under two formants, gliding and swelling."""
    t = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(f0_hz * (1 + 0.1 * np.sin(2 * np.pi * t))) / RATE
    out = np.zeros_like(t)
    for k in range(1, 30):
        hz = k * f0_hz
        gain = np.exp(-(((hz - 600) / 300) ** 2)) + 0.3 * np.exp(-(((hz - 1800) / 500) ** 2))
        out += (gain + 0.01) * np.sin(k * phase)
    return (0.1 * out * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def test_the_mel_of_the_audio_is_the_mel_that_was_given() -> None:
    mel = log_mel(voice_like(2.0), HIFIGAN_MEL)
    audio = GriffinLimModel().synthesize(mel)
    assert audio.shape == (1, mel.shape[1] * 256)
    assert audio.dtype == np.float32
    again = log_mel(audio[0], HIFIGAN_MEL)
    loud = mel > -6.0
    assert np.abs(again - mel)[loud].mean() < 0.2


def test_more_iterations_come_closer() -> None:
    mel = log_mel(voice_like(1.0), HIFIGAN_MEL)
    loud = mel > -6.0
    errors = [
        np.abs(log_mel(GriffinLimModel(iterations=n).synthesize(mel)[0], HIFIGAN_MEL) - mel)[
            loud
        ].mean()
        for n in (1, 32)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_a_tone_keeps_its_frequency_and_its_place() -> None:
    t = np.arange(RATE) / RATE
    tone = np.where(t < 0.5, 0.3 * np.sin(2 * np.pi * 1000 * t), 0).astype(np.float32)
    audio = GriffinLimModel().synthesize(log_mel(tone, HIFIGAN_MEL))[0]
    early, late = audio[2000:9000], audio[13000:20000]
    peak = np.argmax(np.abs(np.fft.rfft(early * np.hanning(len(early))))) * RATE / len(early)
    assert abs(peak - 1000) < 40
    assert np.sqrt(np.mean(late**2)) < 0.02 * np.sqrt(np.mean(early**2))
    assert 0.5 < np.std(early) / np.std(tone[2000:9000]) < 1.5


def test_the_linear_spectrum_has_the_mel_it_came_from() -> None:
    mel = log_mel(voice_like(0.5), HIFIGAN_MEL)
    magnitude = linear_magnitude(mel)
    assert (magnitude >= 0).all()
    again = np.log(np.maximum(mel_filters(HIFIGAN_MEL) @ magnitude.T, 1e-5))
    assert np.abs(again - mel).mean() < 0.1


def test_silence_stays_silent() -> None:
    audio = GriffinLimModel().synthesize(np.full((80, 50), np.log(1e-5), np.float32))
    assert np.abs(audio).max() < 1e-3


def test_it_is_deterministic_and_rows_are_independent() -> None:
    model = build({}, ModelVersion("gl", "1.0", "vocoder", "griffin_lim", (), "MIT"), "cpu")
    assert isinstance(model, Vocoder)
    assert model.name == "gl@1.0"
    mels = [log_mel(voice_like(0.3, hz), HIFIGAN_MEL) for hz in (120.0, 220.0)]
    batch = model.synthesize(np.stack(mels))
    for mel, samples in zip(mels, batch, strict=True):
        np.testing.assert_array_equal(model.synthesize(mel)[0], samples)


@pytest.mark.parametrize(
    "mel", [np.zeros((79, 10)), np.zeros(80), np.zeros((80, 0)), np.full((80, 4), np.nan)]
)
def test_a_wrong_mel_is_refused(mel: np.ndarray) -> None:
    with pytest.raises(AudioContentError, match="mel"):
        GriffinLimModel().synthesize(mel)


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, numpy\n"
        "from auto_voice.models.griffin_lim_model import GriffinLimModel\n"
        "GriffinLimModel(iterations=1).synthesize(numpy.zeros((80, 4)))\n"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
