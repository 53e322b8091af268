"""Content from a recogniser: hidden states of a Whisper encoder in a whitened subspace.

Whisper (Radford et al. 2022) was trained to write down words in any voice, so the middle of its
encoder holds what is said with little of who says it. It teaches the compact content encoder, and
serves as a content encoder itself. Only the encoder's first layers are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from auto_voice.audio.envelope import with_envelope
from auto_voice.audio.mel import CONTENT_MEL, MelSpec, log_mel
from auto_voice.errors import ModelLoadError
from auto_voice.models.content_model import CentredEncoder
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.ctranslate2_file import read_ctranslate2
from auto_voice.models.runtime.weights import is_safetensors, map_safetensors
from auto_voice.types import FloatArray

WHISPER_MEL = MelSpec(
    sample_rate=16000, n_fft=400, win_samples=400, hop_samples=160, bands=80,
    f_min_hz=0.0, f_max_hz=8000.0, power=2, log_floor=None, pad_samples=200,
)  # fmt: skip
# Whisper's frame ``i`` is centred at ``20 i`` ms; without the first 10 ms it is ``20 i + 10``,
# the centre that every content frame of this project has.
SHIFT_SAMPLES = 160
# A transformer parks huge values in a few dimensions at frames of no meaning; they are clipped.
OUTLIER, MAD_TO_DEVIATION = 4.0, 1.4826
WINDOW_FRAMES, MARGIN_FRAMES = 1400, 50
PREFIX = "encoder/"


class WhisperEncoder:
    """The first layers of a Whisper encoder, with frozen weights.

    Args:
        arrays: weights as ``read_arrays`` names them.
        layers: how many to run.
        device: where to run them.

    Raises:
        ModelLoadError: an array is missing.
    """

    def __init__(self, arrays: Mapping[str, Tensor], layers: int = 4, device: str = "cpu") -> None:
        arrays = {name: array.to(device).float() for name, array in arrays.items()}
        try:
            self.conv1 = arrays["conv1/weight"], arrays["conv1/bias"]
            self.conv2 = arrays["conv2/weight"], arrays["conv2/bias"]
            self.positions = arrays["position_encodings/encodings"]
            self.layers = [_layer(arrays, i) for i in range(layers)]
        except KeyError as error:
            raise ModelLoadError(f"The Whisper encoder lacks {error}; fetch it again.") from error
        self.device = device
        self.width = self.positions.shape[1]
        self.heads = self.width // 64

    def hidden(self, mel: Tensor) -> Tensor:
        """``(batch, 80, 2 * frames)`` Whisper log-mel to ``(batch, frames, width)``.

        Gradients flow back to ``mel`` where it asks for them.
        """
        x = F.gelu(F.conv1d(mel, *self.conv1, padding=1))
        x = F.gelu(F.conv1d(x, *self.conv2, stride=2, padding=1)).transpose(1, 2)
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = x + self._attend(layer, _norm(x, layer, "self_attention/layer_norm"))
            hidden = _norm(x, layer, "ffn/layer_norm")
            hidden = F.gelu(_linear(hidden, layer, "ffn/linear_0"))
            x = x + _linear(hidden, layer, "ffn/linear_1")
        return x

    def _attend(self, layer: dict[str, Tensor], x: Tensor) -> Tensor:
        batch, frames, _ = x.shape
        qkv = _linear(x, layer, "self_attention/linear_0")
        q, k, v = qkv.view(batch, frames, 3, self.heads, 64).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, frames, -1)
        return _linear(mixed, layer, "self_attention/linear_1")

    @torch.inference_mode()
    def features(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(samples // 320, width)`` float32, of any length.

        Whisper knows 30 s; a longer input passes in windows that overlap by two seconds, of which
        each gives its middle.
        """
        frames = len(samples) // 320
        mel = torch.from_numpy(whisper_log_mel(np.pad(samples[SHIFT_SAMPLES:], (0, SHIFT_SAMPLES))))
        out = np.zeros((frames, self.width), np.float32)
        step = WINDOW_FRAMES - 2 * MARGIN_FRAMES
        for start in range(0, max(1, frames - 2 * MARGIN_FRAMES), step):
            stop = min(start + WINDOW_FRAMES, frames)
            seen = mel[None, :, 2 * start : 2 * stop].to(self.device)
            kept = 0 if start == 0 else MARGIN_FRAMES
            out[start + kept : stop] = self.hidden(seen)[0, kept : stop - start].cpu().numpy()
        return out


def whisper_log_mel(samples: FloatArray) -> FloatArray:
    """``(samples,)`` at 16 kHz to ``(80, samples // 160)``, scaled as Whisper was trained."""
    energy = log_mel(samples, WHISPER_MEL)[:, : len(samples) // 160]
    mel = np.log10(np.maximum(energy, 1e-10))
    scaled: FloatArray = (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
    return scaled


@dataclass(frozen=True, eq=False)
class ContentSpace:
    """A whitened principal subspace: ``(frames, wide)`` to ``(frames, dims)``."""

    mean: FloatArray
    scale: FloatArray
    projection: FloatArray

    @classmethod
    def fit(cls, features: Sequence[FloatArray], dims: int) -> ContentSpace:
        """From ``(frames, wide)`` of many utterances: standardise, rotate, keep, whiten."""
        x = np.concatenate(features).astype(np.float64)
        mean = np.median(x, axis=0)
        scale = np.median(np.abs(x - mean), axis=0) * MAD_TO_DEVIATION + 1e-6
        z = _standardised(x, mean, scale)
        values, vectors = np.linalg.eigh(np.cov(z, rowvar=False))
        largest = np.argsort(values)[::-1][:dims]
        projection = vectors[:, largest] / np.sqrt(values[largest])
        return cls(*(np.asarray(a, np.float32) for a in (mean, scale, projection)))

    def widened(self, features: Sequence[FloatArray], dims: int) -> ContentSpace:
        """This space, followed by the principal components of what it misses; ``dims`` in all."""
        x = np.concatenate(features).astype(np.float64)
        z = _standardised(x, self.mean, self.scale)
        covariance = np.cov(z, rowvar=False)
        known = self.projection.astype(np.float64)
        seen = known.T @ covariance @ known
        missed = np.eye(len(known)) - known @ np.linalg.solve(seen, known.T @ covariance)
        values, vectors = np.linalg.eigh(missed.T @ covariance @ missed)
        largest = np.argsort(values)[::-1][: dims - known.shape[1]]
        further = missed @ vectors[:, largest] / np.sqrt(values[largest])
        projection = np.concatenate([self.projection, further], axis=1)
        return ContentSpace(self.mean, self.scale, projection.astype(np.float32))

    def project(self, features: FloatArray) -> FloatArray:
        """``(frames, wide)`` to ``(frames, dims)``; an utterance's mean is still to be removed."""
        z = _standardised(features, self.mean, self.scale)
        return np.asarray(z @ self.projection, np.float32)

    def project_tensor(self, features: Tensor) -> Tensor:
        """:meth:`project` of ``(..., wide)``, with gradients, on the device of ``features``."""
        mean, scale, projection = (
            torch.from_numpy(array).to(features.device)
            for array in (self.mean, self.scale, self.projection)
        )
        return ((features - mean) / scale).clamp(-OUTLIER, OUTLIER) @ projection


def _standardised(features: NDArray[Any], mean: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    clipped: NDArray[Any] = np.clip((features - mean) / scale, -OUTLIER, OUTLIER)
    return clipped


def _linear(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, layer[f"{name}/weight"], layer[f"{name}/bias"])


def _norm(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer[f"{name}/gamma"], layer[f"{name}/beta"])


def _layer(arrays: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"layer_{index}/"
    found = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    if not found:
        raise KeyError(prefix)
    return found


class WhisperContentEncoder(CentredEncoder):
    """The hidden states of ``encoder`` in ``subspace``, as a stage."""

    def __init__(
        self,
        encoder: WhisperEncoder,
        subspace: ContentSpace,
        name: str,
        space: str,
        envelope: bool = False,
        cepstra: bool = False,
    ) -> None:
        dims = subspace.projection.shape[1]
        super().__init__(name, space, dims, encoder.device, envelope, cepstra)
        self.encoder = encoder
        self.subspace = subspace

    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """``(samples // 320, dims)`` of a piece at the level of the whole, the mean left in."""
        if len(samples) < 320:
            return np.zeros((0, self.dims), np.float32)
        features = self.subspace.project(self.encoder.features(samples))
        if not self.envelope:
            return features
        return with_envelope(features, log_mel(samples, CONTENT_MEL), self.cepstra)


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Encoder weights from a CTranslate2 file or from safetensors made of one."""
    if is_safetensors(path):
        return map_safetensors(path)
    return {
        name.removeprefix(PREFIX): torch.from_numpy(array)
        for name, array in read_ctranslate2(path)
        if name.startswith(PREFIX)
    }


def convert_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The encoder's arrays of a CTranslate2 file, in half precision as they were published."""
    return {name: array.half().numpy() for name, array in read_arrays(path).items()}


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> WhisperContentEncoder:
    """From ``model.bin`` and ``content_space.safetensors``; ``params`` has ``layers``, ``space``
    and, where they follow, ``envelope`` and ``cepstra``.

    Raises:
        ModelLoadError: the files do not fit.
    """
    weights, subspace = (files[file.file] for file in version.files)
    encoder = WhisperEncoder(read_arrays(weights), version.params["layers"], device)
    arrays = {name: array.numpy() for name, array in map_safetensors(subspace).items()}
    return WhisperContentEncoder(
        encoder, ContentSpace(**arrays), version.key, version.params["space"],
        version.params.get("envelope", False), version.params.get("cepstra", False),
    )  # fmt: skip
