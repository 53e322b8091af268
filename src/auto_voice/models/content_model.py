"""The compact content encoder: what is said, 64 numbers 50 times a second.

A stack of one-dimensional ConvNeXt blocks on a log-mel spectrogram, trained to predict whitened
principal components of a recogniser's hidden states from voice-perturbed speech, so that the
words stay and the speaker does not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.envelope import envelope_size, with_envelope
from auto_voice.audio.level import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, log_mel
from auto_voice.errors import ModelLoadError
from auto_voice.models.convnext import ConvNeXtBlock
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.weights import load_module
from auto_voice.types import Content, FloatArray

SAMPLES_PER_FRAME = 2 * CONTENT_MEL.hop_samples
# Rough mean and spread of ``CONTENT_MEL`` at the level that the networks are trained at.
MEL_MEAN, MEL_SCALE = -9.0, 4.0


class ContentNet(nn.Module):
    """``(batch, 80, 2 * frames)`` log-mel at 100 Hz to ``(batch, frames, dims)`` at 50 Hz.

    Args:
        dims: of the content space.
        width: channels of the trunk.
        blocks: ConvNeXt blocks.
        kernel: frames that one block sees, at 50 Hz.
        expansion: of the blocks' perceptrons.
        lookahead: frames of the future that each block sees; None for a centred kernel.
    """

    def __init__(
        self,
        dims: int = 64,
        width: int = 256,
        blocks: int = 8,
        kernel: int = 9,
        expansion: int = 3,
        lookahead: int | None = None,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "dims": dims, "width": width, "blocks": blocks, "kernel": kernel,
            "expansion": expansion, "lookahead": lookahead,
        }  # fmt: skip
        self.stem = nn.Conv1d(CONTENT_MEL.bands, width, 6, stride=2)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(width, kernel, expansion, lookahead=lookahead) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, dims)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.stem(F.pad((mel - MEL_MEAN) / MEL_SCALE, (2, 2)))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x.transpose(1, 2)))
        return out


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
    """``ContentNet``, in evaluation mode, as a stage."""

    def __init__(
        self,
        net: ContentNet,
        name: str,
        space: str,
        device: str = "cpu",
        envelope: bool = False,
        cepstra: bool = False,
    ) -> None:
        super().__init__(name, space, net.head.out_features, device, envelope, cepstra)
        self.net = net

    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """``(samples // 320, dims)`` of a piece at the level of the whole, the mean left in."""
        frames = len(samples) // SAMPLES_PER_FRAME
        if frames == 0:
            return np.zeros((0, self.dims), np.float32)
        return self.encode_mel(log_mel(samples, CONTENT_MEL)[:, : 2 * frames])

    @torch.inference_mode()
    def encode_mel(self, mel: FloatArray) -> FloatArray:
        """``CONTENT_MEL`` ``(80, 2 * frames)`` to ``(frames, dims)``, the mean left in."""
        seen = torch.from_numpy(mel)[None].to(self.device)
        features: FloatArray = self.net(seen)[0].float().cpu().numpy()
        return with_envelope(features, mel, self.cepstra) if self.envelope else features


def build(
    files: Mapping[str, Path], version: ModelVersion, device: str = "cpu"
) -> CompactContentEncoder:
    """From the catalog's record; ``params`` has ``net`` (for ``ContentNet``) and ``space``, and
    ``envelope`` and ``cepstra`` where they follow.

    Raises:
        ModelLoadError: the weights do not fit the architecture.
    """
    path = next(iter(files.values()))
    net = load_module(
        lambda: ContentNet(**version.params.get("net", {})), path, device=device
    ).float()
    return CompactContentEncoder(
        net, version.key, version.params["space"], device,
        version.params.get("envelope", False), version.params.get("cepstra", False),
    )  # fmt: skip
