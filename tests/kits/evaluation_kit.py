"""Voices that are computed, and judges whose verdicts are known; plain helpers of the tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import soundfile

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.models.quality_model import Quality
from auto_voice.types import FloatArray, Waveform

RATE = 16000


def sing(
    f0_hz: float = 120.0, seconds: float = 1.5, formant_hz: float = 700.0, vibrato: float = 0.1
) -> Waveform:
    """Harmonics under one formant, gliding by ``vibrato`` octaves, with silence on either side."""
    t = np.arange(int(seconds * RATE)) / RATE
    f0 = f0_hz * 2 ** (vibrato * np.sin(2 * np.pi * 1.3 * t))
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    x = np.zeros_like(t)
    for k in range(1, int(4000 / f0_hz)):
        x += np.sin(k * phase) / (1 + ((k * f0_hz - formant_hz) / 250) ** 2)
    x *= 0.3 / np.abs(x).max()
    pad = np.zeros(RATE // 5)
    return Waveform(np.concatenate([pad, x, pad]).astype(np.float32), RATE)


class SpectrumEncoder:
    """A stand-in for a speaker encoder: the mean spectrum, level removed."""

    sample_rate = RATE

    def embed_utterance(self, samples: FloatArray) -> FloatArray:
        mel = log_mel(resample(samples, RATE, HIFIGAN_MEL.sample_rate), HIFIGAN_MEL)
        mean = np.exp(mel).mean(axis=1)
        return (mean / np.linalg.norm(mean)).astype(np.float32)


class TableRecogniser:
    """Hears what a table says about a recording of that many samples."""

    sample_rate = RATE

    def __init__(self, table: dict[int, str], otherwise: str = "red cat blue dog") -> None:
        self.table = table
        self.otherwise = otherwise
        self.calls = 0

    def transcribe(self, samples: FloatArray) -> str:
        self.calls += 1
        return self.table.get(len(samples), self.otherwise)


class PeakJudge:
    """Finds a recording as good as it is loud."""

    sample_rate = RATE

    def score(self, samples: FloatArray) -> Quality:
        peak = float(np.abs(samples).max())
        return Quality(1 + 4 * peak, 1 + 4 * peak, 5.0)


PINS = {
    "speaker": "spectrum@1",
    "speaker2": "spectrum@2",
    "recogniser": "table@1",
    "quality": "peak@1",
    "pitch": "swift_f0@test",
}


class Copycat:
    """A pipeline whose conversions are the sources."""

    def __init__(self, mock: bool = False) -> None:
        self.mock = mock
        self.cloned: list[list[str]] = []

    def clone(self, references: list[str]) -> object:
        self.cloned.append(references)
        return references

    def convert(self, source: Path, voice: object) -> Any:
        samples, rate = soundfile.read(source, dtype="float32")

        def save(path: Path) -> Path:
            soundfile.write(path, samples, rate)
            return path

        return SimpleNamespace(
            mock=self.mock,
            save=save,
            seconds_per_second=0.25,
            models={"converter": "copycat@1"},
            notes=("converter: a (fallback: b)", "some other note"),
        )


def judging(**_: Any) -> Any:
    """A worker as ``auto_voice.evaluation.scoring.worker`` makes it, without models."""
    from auto_voice.evaluation.judges import Judges
    from auto_voice.evaluation.scoring import Judging

    encoder = SpectrumEncoder()
    judges = Judges(encoder, encoder, TableRecogniser({}), PeakJudge(), pins=PINS)
    return Judging(Copycat(), judges)  # type: ignore[arg-type]
