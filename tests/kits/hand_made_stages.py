"""Speech-like signals and stages whose behaviour is known exactly."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.pitch import align_pitch
from auto_voice.inference.chunking import Joiner
from auto_voice.models.mock_models import mock_sample
from auto_voice.models.registry.store import ModelStore
from auto_voice.types import Content, Mel


@cache
def speech_like(
    seconds: float = 4.0, f0_hz: float = 140.0, sample_rate: int = 16000, seed: int = 0
) -> np.ndarray:
    """``(samples,)`` that level, pitch and speech detectors take for speech."""
    return mock_sample(seconds, sample_rate, f0_hz=f0_hz, seed=seed).samples


class LocalContent:
    """Content that looks 5 frames around itself: RMS and zero crossings, smoothed."""

    name, space, sample_rate, frame_rate, dims = "local@1", "local", 16000, 50.0, 2

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def encode(self, samples):
        self.lengths.append(len(samples))
        frames = len(samples) // 320
        framed = samples[: frames * 320].reshape(frames, 320)
        raw = np.stack([np.sqrt((framed**2).mean(1)), (np.diff(framed > 0) != 0).mean(1)], axis=1)
        kernel = np.ones(5) / 5
        smooth = np.stack([np.convolve(raw[:, i], kernel, mode="same") for i in range(2)], axis=1)
        return Content(smooth.astype(np.float32), self.frame_rate, self.space)


class LocalConverter:
    """A mel whose first band is log-F0, second voicing, third and fourth content; it keeps what it
    was given."""

    name, content_space, sample_rate, hop_samples = "follow@1", "local", 22050, 256

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def convert(self, content, pitch, voice, frames):
        self.calls.append(SimpleNamespace(content=content, pitch=pitch, voice=voice, frames=frames))
        rate = self.sample_rate / self.hop_samples
        log_f0, voiced = align_pitch(pitch, rate, frames)
        features = interpolate_frames(content.features, content.frame_rate, rate, frames)
        values = np.zeros((80, frames), np.float32)
        values[0], values[1], values[2:4] = log_f0, voiced, features.T
        return Mel(values, self.sample_rate, self.hop_samples)


class LocalVocoder:
    """Audio that follows the content of its own frame and the next two."""

    name, sample_rate, hop_samples, bands = "local@1", 22050, 256, 80

    def synthesize(self, mel):
        envelope = np.convolve(mel[2] + 0.2 * mel[3], [1 / 3] * 3)[1:-1]
        within = np.sin(2 * np.pi * 3 * np.arange(256) / 256)
        return (envelope[:, None] * within[None]).reshape(1, -1).astype(np.float32)


class Speaker:
    """A unit vector that depends on the mean spectrum."""

    name, sample_rate, dims = "speaker@1", 16000, 256

    def embed_utterance(self, samples):
        frames = samples[: len(samples) // 512 * 512].reshape(-1, 512)
        spectrum = np.abs(np.fft.rfft(frames, axis=1)).mean(0)[:256]
        return (spectrum / np.linalg.norm(spectrum)).astype(np.float32)

    def similarity(self, a, b):
        return float(a @ b)


class HandMade:
    """A registry of the stages above, by the default names."""

    KINDS: ClassVar[dict[str, str]] = {
        "content_whisper": "content",
        "converter_compact": "converter",
        "hifigan_universal": "vocoder",
        "vocoder_compact": "vocoder",
        "speaker_encoder": "speaker",
    }

    use_mock = False

    def __init__(self, **stages) -> None:
        self.store = ModelStore(Path("no-such-folder"))
        self.stages = {
            "content_whisper": LocalContent(),
            "converter_compact": LocalConverter(),
            "hifigan_universal": LocalVocoder(),
            "vocoder_compact": LocalVocoder(),
            "speaker_encoder": Speaker(),
        } | stages

    def version(self, name, version=None):
        params = {"guidance": getattr(self.stages[name], "guidance", 0.0)}
        return SimpleNamespace(
            name=name, version="1.0", kind=self.KINDS[name], quantised=None, params=params
        )

    def is_installed(self, version):
        return False

    def in_space(self, name, space):
        return None

    def load(self, name, version=None):
        return self.stages[name]

    def load_installed(self, names):
        pass

    def quickest(self, name):
        return name

    def resolved(self, name, version=None):
        return self.stages[name].name

    def is_mock(self, name, version=None):
        return False


def join(pieces, hop_samples, samples):
    """Rendered pieces, pairs of a chunk and its audio in order, as ``(samples,)``."""
    joiner = Joiner(hop_samples, samples)
    return np.concatenate([joiner.push(chunk, audio) for chunk, audio in pieces])
