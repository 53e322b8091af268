"""What the project's own content encoders have in common: what is said, 50 times a second."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, envelope_size
from auto_voice.errors import ModelLoadError
from auto_voice.types import Content, FloatArray

# 20 ms at 16 kHz: two mel frames make one of content.
SAMPLES_PER_FRAME = 2 * CONTENT_MEL.hop_samples


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
