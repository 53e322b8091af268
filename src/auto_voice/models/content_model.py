"""The compact content encoder: what is said, 64 numbers 50 times a second.

A stack of one-dimensional ConvNeXt blocks on a log-mel spectrogram, trained to predict whitened
principal components of a recogniser's hidden states from voice-perturbed speech, so that the
words stay and the speaker does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, envelope_size, log_mel, with_envelope
from auto_voice.errors import ModelLoadError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import load_network, shape_from
from auto_voice.models.runtime.sessions import Network
from auto_voice.types import Content, FloatArray

# 20 ms at 16 kHz: two mel frames make one of content.
SAMPLES_PER_FRAME = 2 * CONTENT_MEL.hop_samples
# Rough mean and spread of ``CONTENT_MEL`` at the level that the networks are trained at.
MEL_MEAN, MEL_SCALE = -9.0, 4.0


@dataclass(frozen=True)
class ContentShape:
    """Sizes of ``ContentNet``; see there."""

    dims: int = 64
    width: int = 256
    blocks: int = 8
    kernel: int = 9
    expansion: int = 3
    lookahead: int | None = None


class CentredEncoder(ABC):
    """A content encoder that levels its input and removes the utterance's mean from its features.

    Args:
        name: ``name@version`` of the weights.
        space: of the features; encoders that were trained on one teacher share it.
        components: that the network gives.
        device: where the network is.
        envelope: whether those of ``band_envelope`` follow.
        cepstra: whether, with the envelope, ``cepstra`` follow, too.

    Raises:
        ModelLoadError: ``cepstra`` without ``envelope``.
    """

    sample_rate = CONTENT_MEL.sample_rate
    frame_rate = CONTENT_MEL.sample_rate / SAMPLES_PER_FRAME

    def __init__(
        self,
        name: str,
        space: str,
        components: int,
        device: str = "cpu",
        envelope: bool = False,
        cepstra: bool = False,
    ) -> None:
        if cepstra and not envelope:
            raise ModelLoadError(f"{name}: cepstra follow the envelope; set envelope: true, too.")
        self.name = name
        self.space = space
        self.components = components
        self.dims = components + envelope_size(envelope, cepstra)
        self.device = device
        self.envelope = envelope
        self.cepstra = cepstra

    def extract_features(
        self, audio: ArrayLike, lengths: NDArray[np.int64] | None = None
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` at 16 kHz to ``(batch, samples // 320, dims)``.

        Each row equals what it gives alone; frames past a row's length are zero.
        """
        batch = np.atleast_2d(np.asarray(audio, dtype=np.float32))
        valid = np.full(len(batch), batch.shape[1]) if lengths is None else np.asarray(lengths)
        out = np.zeros((len(batch), batch.shape[1] // SAMPLES_PER_FRAME, self.dims), np.float32)
        for row, samples, length in zip(out, batch, valid, strict=True):
            features = self._one(samples[:length])
            row[: len(features)] = features
        return out

    def encode(self, samples: FloatArray) -> Content:
        """One utterance ``(samples,)`` at 16 kHz to ``(samples // 320, dims)`` in ``space``."""
        features = self._one(np.asarray(samples, dtype=np.float32))
        return Content(features, self.frame_rate, self.space)

    @abstractmethod
    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """``(samples // 320, dims)`` of a piece at the level of the whole, the mean left in."""

    def centred(self, features: FloatArray, mean: FloatArray) -> Content:
        """Features of a piece as the content of an utterance whose ``mean`` is ``(dims,)``."""
        return Content(features - mean, self.frame_rate, self.space)

    def _one(self, samples: FloatArray) -> FloatArray:
        gain = np.float32(gain_to_speech_level(samples, self.sample_rate))
        features = self.encode_piece(samples * gain)
        return features - features.mean(0) if len(features) else features


class CompactContentEncoder(CentredEncoder):
    """``ContentNet`` as a stage.

    Args:
        network: ``(batch, 80, 2 * frames)`` log-mel to ``(batch, frames, components)``.
        components: that the network gives.
    """

    def __init__(
        self,
        network: Network,
        components: int,
        name: str,
        space: str,
        envelope: bool = False,
        cepstra: bool = False,
    ) -> None:
        super().__init__(name, space, components, network.device, envelope, cepstra)
        self.network = network

    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """``(samples // 320, dims)`` of a piece at the level of the whole, the mean left in."""
        frames = len(samples) // SAMPLES_PER_FRAME
        if frames == 0:
            return np.zeros((0, self.dims), np.float32)
        return self.encode_mel(log_mel(samples, CONTENT_MEL)[:, : 2 * frames])

    def encode_mel(self, mel: FloatArray) -> FloatArray:
        """``CONTENT_MEL`` ``(80, 2 * frames)`` to ``(frames, dims)``, the mean left in."""
        features: FloatArray = self.network(np.ascontiguousarray(mel[None], np.float32))[0]
        return with_envelope(features, mel, self.cepstra) if self.envelope else features


def build(
    files: Mapping[str, Path], version: ModelVersion, device: str = "cpu"
) -> CompactContentEncoder:
    """From the catalog's record; ``params`` has ``net`` (for ``ContentNet``) and ``space``, and
    ``envelope`` and ``cepstra`` where they follow.

    Raises:
        ModelLoadError: the weights do not fit the architecture.
    """
    shape = shape_from(ContentShape, version.params.get("net", {}), version.key)
    network = load_network("content_student", shape, files, version.key, device)
    return CompactContentEncoder(
        network, shape.dims, version.key, version.params["space"],
        version.params.get("envelope", False), version.params.get("cepstra", False),
    )  # fmt: skip
