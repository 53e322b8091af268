"""What is computed of a recording: here, that a copy at another speed is another voice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from auto_voice.training.data import Utterance
from auto_voice.training.features import feature_path, prepare


@pytest.mark.parametrize("speed", [0.85, 1.0, 1.2])
def test_speed_moves_pitch_and_length_alike(tmp_path: Path, speed: float) -> None:
    path = tmp_path / "tone.wav"
    seconds, hertz, rate = 3.0, 400.0, 22050
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * hertz * np.arange(seconds * rate) / rate), rate)
    heard = prepare(Utterance(path, "s", "c", speed))
    assert len(heard) == pytest.approx(seconds * 16000 / speed, abs=2)
    loudest = np.abs(np.fft.rfft(heard * np.hanning(len(heard)))).argmax() * 16000 / len(heard)
    assert loudest == pytest.approx(hertz * speed, abs=1)


def test_a_copy_has_features_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"anything")
    names = {feature_path(tmp_path, Utterance(path, "s", "c", s)) for s in (0.9, 1.0, 1.1)}
    assert len(names) == 3
    assert feature_path(tmp_path, Utterance(path, "s", "c")) in names
