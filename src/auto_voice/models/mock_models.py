"""Stand-ins of every kind: numpy only, deterministic, the shapes of the real ones, no weights.

They answer to the input (louder speech gives another embedding, a longer mel longer audio), so a
pipeline built on them can be tested; what they make is not speech, and ``mock`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.errors import AudioContentError
from auto_voice.models.base import cosine
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.types import Content, FloatArray, Mel, Pitch, Voice, Waveform

MOCK_SPACE = "mock"
# Samples at 16 kHz: 25 ms of which 20 are new, as HuBERT sees them; then bands and the floor of
# the logarithm of its features, and how long a syllable of its noise is.
_WINDOW = 400
_HOP = 320
_BANDS = 32
_LOG_FLOOR = float(np.log(1e-5))
_SYLLABLE_SECONDS = 0.22
# The first three formants of five vowels (Peterson and Barney 1952, men).
_VOWELS_HZ = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)


class MockContentEncoder:
    """Band energies through a fixed random projection, framed as HuBERT frames its input."""

    name = "mock"
    mock = True
    sample_rate = 16000
    frame_rate = 50.0

    def __init__(self, dims: int = 768) -> None:
        self.dims, self.space = dims, MOCK_SPACE
        self._projection = _projection(_BANDS, dims, seed=1)

    def extract_features(
        self, audio: ArrayLike, lengths: NDArray[np.int64] | None = None
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` at 16 kHz to ``(batch, time, dims)``."""
        features = _bands(_checked(audio)) @ self._projection
        if lengths is not None:
            for row, length in enumerate(np.asarray(lengths)):
                features[row, _frames(int(length)) :] = 0
        return features

    def encode(self, samples: FloatArray) -> Content:
        """``(samples,)`` to ``samples // 320`` frames of content in its space."""
        # Centres frame i on its own 20 ms, as the real encoders do.
        margin = (_WINDOW - _HOP) // 2
        padded = np.pad(_checked(samples)[0], margin)
        return Content(self.extract_features(padded)[0], self.frame_rate, self.space)


class MockSpeakerEncoder:
    """The utterance's mean band energies, projected to a unit vector."""

    name = "mock"
    mock = True
    sample_rate = 16000

    def __init__(self, dims: int = 256) -> None:
        self.dims = dims
        self._projection = _projection(_BANDS, dims, seed=2)

    def embed_utterance(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(dims,)`` of unit norm."""
        bands = _bands(_checked(samples))[0]
        vector = bands.mean(axis=0) @ self._projection
        # GE2E ends in a ReLU: embeddings have no negative entries.
        vector = np.maximum(vector, 0) + np.float32(1e-6)
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)

    def similarity(self, a: FloatArray, b: FloatArray) -> float:
        """Cosine of two embeddings, in [-1, 1]."""
        return cosine(a, b)


class MockConverter:
    """A mel whose loudness follows the content and whose tilt follows the voice."""

    name = "mock"
    mock = True

    def __init__(self, sample_rate: int = 22050, hop_samples: int = 256, bands: int = 80) -> None:
        self.content_space = MOCK_SPACE
        self.sample_rate = sample_rate
        self.hop_samples = hop_samples
        self._bands = bands

    def convert(self, content: Content, pitch: Pitch, voice: Voice, frames: int) -> Mel:
        """``(bands, frames)`` in the range of real log-mels."""
        loudness = np.abs(content.features).mean(axis=1) if len(content.features) else np.zeros(1)
        envelope = np.interp(
            np.linspace(0, 1, frames), np.linspace(0, 1, len(loudness)), np.tanh(loudness)
        )
        tilt = (
            np.resize(voice.embedding, self._bands)[:, None]
            - np.linspace(0, 4, self._bands)[:, None]
        )
        values = np.clip(-5 + 3 * envelope[None, :] + tilt, _LOG_FLOOR, 2)
        return Mel(values.astype(np.float32), self.sample_rate, self.hop_samples)


class MockVocoder:
    """A tone whose loudness follows the mel and whose pitch follows its centre of gravity."""

    name = "mock"
    mock = True

    def __init__(self, sample_rate: int = 22050, hop_samples: int = 256, bands: int = 80) -> None:
        self.sample_rate = sample_rate
        self.hop_samples = hop_samples
        self.bands = bands

    def synthesize(self, mel: ArrayLike) -> FloatArray:
        """``(bands, frames)``, or a batch of them, to ``(batch, frames * hop_samples)``."""
        values = np.asarray(mel, dtype=np.float32)
        values = values[None] if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[1] != self.bands:
            raise ValueError(f"mel must be (batch, {self.bands}, frames), not {values.shape}")
        power = np.exp(np.minimum(values, 2))
        loudness = np.minimum(np.sqrt(power.mean(axis=1)), 0.5)
        centre = (power * np.arange(self.bands)[:, None]).sum(axis=1) / power.sum(axis=1)
        f0_hz = np.repeat(100 + 2 * centre, self.hop_samples, axis=1)
        phase = 2 * np.pi * np.cumsum(f0_hz, axis=1, dtype=np.float64) / self.sample_rate
        audio = np.sin(phase) * np.repeat(loudness, self.hop_samples, axis=1)
        return np.asarray(audio, dtype=np.float32)


class MockRecogniser:
    """Hears ``mock`` once per second of audio."""

    name = "mock"
    mock = True
    sample_rate = 16000
    language = "en"

    def transcribe(self, samples: FloatArray) -> str:
        """``(samples,)`` at 16 kHz to text."""
        return " ".join(["mock"] * max(1, len(samples) // self.sample_rate))


class MockQuality:
    """The same middling scores for everything."""

    name = "mock"
    mock = True
    sample_rate = 16000

    def score(self, samples: FloatArray) -> Any:
        """``(samples,)`` at 16 kHz to a ``Quality``."""
        from auto_voice.models.quality_model import Quality

        return Quality(overall=3.0, speech=3.0, background=3.0)


class MockSynthesiser:
    """Babble, of a length that follows the tokens and a pitch that follows the timbre."""

    name = "mock"
    mock = True
    sample_rate = 24000

    def speak(self, tokens: Sequence[int], style: FloatArray, speed: float) -> FloatArray:
        """``(samples,)`` at 24 kHz, 60 ms a token."""
        seconds = 0.06 * (len(tokens) + 2) / speed
        f0_hz = 150 + 40 * float(np.tanh(style[0]))
        return mock_sample(seconds, self.sample_rate, f0_hz=f0_hz).samples


def mock_sample(
    seconds: float = 6.0, sample_rate: int = 16000, *, f0_hz: float = 140.0, seed: int = 0
) -> Waveform:
    """Babble without words: glides between vowels, hisses and pauses, which detectors of level,
    pitch and speech take for speech."""
    rng = np.random.RandomState(seed)
    time_s = np.arange(int(seconds * sample_rate)) / sample_rate
    position = time_s / _SYLLABLE_SECONDS
    index, within = position.astype(int), position % 1
    vowels = rng.randint(len(_VOWELS_HZ), size=int(index[-1]) + 1)
    formants = np.array(_VOWELS_HZ, dtype=float)[vowels]
    f0 = f0_hz * (1 + 0.06 * np.sin(2 * np.pi * 0.7 * time_s))
    phase = 2 * np.pi * np.cumsum(f0) / sample_rate
    voice = np.zeros(len(time_s))
    glides = [np.interp(position - 0.5, np.arange(len(vowels)), column) for column in formants.T]
    for k in range(1, int(min(4500, 0.45 * sample_rate) / f0_hz)):
        resonance = sum(
            height / (1 + ((k * f0 - centre) / width) ** 2)
            for centre, height, width in zip(glides, (1, 0.6, 0.3), (60, 90, 130), strict=True)
        )
        voice += (resonance + 0.003) / np.sqrt(k) * np.sin(k * phase + k)
    envelope = np.clip(4 * np.minimum(within, 1 - within), 0, 1) ** 0.7
    hiss = np.diff(rng.standard_normal(len(time_s)), prepend=0)
    onset = np.where(vowels[index] % 2, np.sin(np.pi * np.clip(5 * within, 0, 1)), 0)
    speaking = np.sin(2 * np.pi * 0.23 * time_s + 1) > -0.8
    samples = (voice * envelope / np.max(np.abs(voice)) + 0.05 * onset * hiss) * speaking
    samples = 0.25 * samples / np.max(np.abs(samples)) + 1e-4 * rng.standard_normal(len(samples))
    return Waveform(samples.astype(np.float32), sample_rate, ("mock sample, not a recording",))


def build_mock(version: ModelVersion, stands_in: bool = False) -> Any:
    """The mock of ``version``'s kind with the dimensions that its params declare.

    Args:
        stands_in: among real models it has the content space of the model that it replaces, so
            that those take it; mocks among themselves all share the space ``mock``.
    """
    mock = _BY_KIND[version.kind](version.params)
    if stands_in:
        for name in ("space", "content_space"):
            if hasattr(mock, name) and name in version.params:
                setattr(mock, name, str(version.params[name]))
    return mock


_BY_KIND: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "content": lambda p: MockContentEncoder(int(p.get("dims", p.get("net", {}).get("dims", 768)))),
    "converter": lambda p: MockConverter(),
    "vocoder": lambda p: MockVocoder(
        int(p.get("sample_rate", 22050)), int(p.get("hop_samples", 256)), int(p.get("bands", 80))
    ),
    "speaker": lambda p: MockSpeakerEncoder(int(p.get("dims", 256))),
    "sample": lambda p: mock_sample(),
    "recogniser": lambda p: MockRecogniser(),
    "quality": lambda p: MockQuality(),
    "synthesiser": lambda p: MockSynthesiser(),
}


def _projection(rows: int, columns: int, seed: int) -> FloatArray:
    """A matrix of fixed noise of variance ``1 / rows``, the same with every version of numpy.

    The finaliser of MurmurHash3 over a counter: importing ``numpy.random`` would take longer than
    everything else that a mock does.
    """
    mixed = np.arange(rows * columns, dtype=np.uint64) + np.uint64((seed + 1) << 32)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    values = (uniform - 0.5) * np.sqrt(12 / rows)
    return np.asarray(values.reshape(rows, columns), dtype=np.float32)


def _checked(audio: ArrayLike) -> FloatArray:
    """``(batch, samples)`` float32 that is finite and not empty, as the real models demand."""
    rows = np.atleast_2d(np.asarray(audio, dtype=np.float32))
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise AudioContentError("the audio is empty or not finite; give (samples,) of speech")
    return rows


def _frames(samples: int) -> int:
    return max(0, (samples - _WINDOW) // _HOP + 1)


def _bands(rows: FloatArray) -> FloatArray:
    """``(batch, samples)`` to ``(batch, frames, 32)`` log band energies, 50 frames a second."""
    padded = np.pad(rows, ((0, 0), (0, max(0, _WINDOW - rows.shape[1]))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW, axis=1)[:, ::_HOP]
    power = np.abs(np.fft.rfft(windows * np.hanning(_WINDOW).astype(np.float32))) ** 2
    edges = np.linspace(0, power.shape[-1], _BANDS + 1).astype(int)[:-1]
    bands = np.add.reduceat(power, edges, axis=-1)
    return np.asarray(np.log1p(bands), dtype=np.float32)
