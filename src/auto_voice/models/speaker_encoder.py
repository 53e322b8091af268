"""GE2E speaker encoder (Wan et al. 2018): 256 numbers of unit norm that say who speaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from auto_voice.audio.mel import GE2E_MEL, log_mel
from auto_voice.errors import AudioContentError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import load_network
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.runtime.weights import Array, as_batch, checkpoint_arrays
from auto_voice.types import FloatArray

# Frames that the network sees at once: 1.6 s.
WINDOW_FRAMES = 160
WINDOWS_PER_SECOND = 1.3
# A last window with less speech than this share is left out, unless it is the only one.
MIN_COVERAGE = 0.75
WINDOWS_AT_ONCE = 64
TARGET_DBFS = -30.0


@dataclass(frozen=True)
class SpeakerShape:
    """Sizes of the network."""

    bands: int = GE2E_MEL.bands
    width: int = 256
    dims: int = 256
    layers: int = 3


class SpeakerEncoder:
    """Who speaks, from 16 kHz speech. Loaded once, it may be called from many threads.

    Args:
        network: ``(windows, frames, 40)`` linear mel to ``(windows, 256)`` of unit norm.
        name: ``name@version`` of the weights.
    """

    sample_rate = GE2E_MEL.sample_rate

    def __init__(self, network: Network, *, name: str = "speaker_encoder") -> None:
        self.network = network
        self.name = name
        self.device = network.device
        self.dims = SpeakerShape().dims

    def embed_utterance(self, samples: FloatArray, *, level: bool = True) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(256,)`` float32 of unit norm.

        The normalised mean over 1.6 s windows, 1.3 of them a second; the last is padded with
        zeros where at least three quarters of it hold audio, and left out otherwise. The same
        waveform gives the embedding that Resemblyzer's ``embed_utterance`` gives.

        Args:
            samples: numpy or torch. Long silences should be cut first
                (``audio.vad.trim_silence``); they pull every voice towards one point.
            level: raise quiet audio to -30 dBFS first, as Resemblyzer's preprocessing does: the
                mel is linear, so the level matters. Louder audio is left as it is.

        Raises:
            AudioContentError: empty, silent, not finite, or not one channel.
        """
        audio = _one_channel(samples)
        if level:
            audio = raise_level(audio)
        windows = self._windows(audio)
        parts = [
            self.network(windows[start : start + WINDOWS_AT_ONCE])
            for start in range(0, len(windows), WINDOWS_AT_ONCE)
        ]
        return _unit(np.concatenate(parts).mean(axis=0))

    def similarity(self, a: FloatArray, b: FloatArray) -> float:
        """Cosine of two embeddings, in [-1, 1]; above about 0.75 they are likely one person.

        Raises:
            AudioContentError: an embedding of another length, or of zeros.
        """
        if np.shape(a) != (self.dims,) or np.shape(b) != (self.dims,):
            raise AudioContentError(
                f"Embeddings must have shape ({self.dims},), not {np.shape(a)} and {np.shape(b)}."
            )
        return float(np.clip(np.dot(_unit(np.asarray(a)), _unit(np.asarray(b))), -1.0, 1.0))

    def _windows(self, audio: FloatArray) -> FloatArray:
        starts = window_starts(len(audio))
        covered = (starts[-1] + WINDOW_FRAMES) * GE2E_MEL.hop_samples
        padded = np.pad(audio, (0, max(0, covered - len(audio))))
        mel = log_mel(padded, GE2E_MEL).T
        return np.stack([mel[start : start + WINDOW_FRAMES] for start in starts])


def window_starts(samples: int) -> list[int]:
    """First mel frame of each 1.6 s window over so many samples at 16 kHz; at least one."""
    hop = GE2E_MEL.hop_samples
    frames = -(-(samples + 1) // hop)
    step = round(GE2E_MEL.frame_rate / WINDOWS_PER_SECOND)
    starts = list(range(0, max(1, frames - WINDOW_FRAMES + step + 1), step))
    coverage = (samples - starts[-1] * hop) / (WINDOW_FRAMES * hop)
    return starts[:-1] if coverage < MIN_COVERAGE and len(starts) > 1 else starts


def raise_level(samples: FloatArray, target_dbfs: float = TARGET_DBFS) -> FloatArray:
    """``samples`` amplified to an RMS of ``target_dbfs``, or as they are if louder.

    Raises:
        AudioContentError: all samples are zero.
    """
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    if rms == 0.0:
        raise AudioContentError("The recording is silent; give one with speech.")
    gain = 10 ** (target_dbfs / 20) / rms
    return samples if gain <= 1.0 else (samples * gain).astype(np.float32)


class SpeakerEncoderModel:
    """A ``SpeakerEncoder`` behind the calls of the other models: any rate, one row or a batch.

    Args:
        encoder: what does the work.
    """

    def __init__(self, encoder: SpeakerEncoder) -> None:
        self.encoder = encoder
        self.name = encoder.name
        self.dims = encoder.dims
        self.sample_rate = encoder.sample_rate

    def extract_embedding(self, audio: ArrayLike, sample_rate: int = 16000) -> FloatArray:
        """``(samples,)`` to ``(256,)``, or ``(batch, samples)`` to ``(batch, 256)``, unit norm.

        Raises:
            AudioContentError: as ``SpeakerEncoder.embed_utterance``.
        """
        single = np.ndim(audio) == 1
        batch = as_batch(audio, 2, "audio")
        if sample_rate != self.sample_rate:
            from auto_voice.audio.resample import resample

            batch = np.stack([resample(row, sample_rate, self.sample_rate) for row in batch])
        embeddings = np.stack([self.encoder.embed_utterance(row) for row in batch])
        return embeddings[0] if single else embeddings

    def embed_utterance(self, samples: FloatArray) -> FloatArray:
        """As ``SpeakerEncoder.embed_utterance``."""
        return self.encoder.embed_utterance(samples)

    def similarity(self, a: FloatArray, b: FloatArray) -> float:
        """As ``SpeakerEncoder.similarity``."""
        return self.encoder.similarity(a, b)


def convert_checkpoint(path: Path) -> dict[str, Array]:
    """The published checkpoint (key ``model_state``) as arrays under this module's names.

    Raises:
        UnsafeFileError, ModelLoadError: see ``weights.checkpoint_arrays``.
    """
    arrays = checkpoint_arrays(path, under="model_state")
    return {key: value for key, value in arrays.items() if select(key)}


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> SpeakerEncoder:
    """The encoder whose weights are the one file of ``files``.

    Raises:
        ModelLoadError, UnsafeFileError: see ``graphs.load_network``.
    """
    network = load_network(
        "ge2e", SpeakerShape(), files, version.key, device,
        convert=convert_checkpoint, select=select,
    )  # fmt: skip
    return SpeakerEncoder(network, name=version.key)


def select(key: str) -> str | None:
    # The scale and offset of the training loss say nothing about a voice.
    return None if key.startswith("similarity_") else key


def _one_channel(samples: ArrayLike) -> FloatArray:
    if np.ndim(samples) != 1:
        raise AudioContentError(f"audio must be one channel, not shape {np.shape(samples)}.")
    row: FloatArray = as_batch(samples, 2, "audio")[0]
    return row


def _unit(vector: FloatArray) -> FloatArray:
    norm = float(np.linalg.norm(vector))
    if norm == 0.0:
        raise AudioContentError("The recording gives no speaker embedding; give clear speech.")
    return (vector / norm).astype(np.float32)
