"""The content teacher: hidden states of a Whisper encoder, reduced to a whitened subspace.

Whisper (Radford et al. 2022) was trained to write down words in any voice, so the middle of its
encoder holds what is said with little of who says it. The weights are the catalog's recogniser, a
CTranslate2 file, which is a flat list of named arrays; only the encoder's first layers are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.mel import MelSpec, log_mel
from auto_voice.errors import ModelLoadError
from auto_voice.types import FloatArray

WHISPER_MEL = MelSpec(
    sample_rate=16000, n_fft=400, win_samples=400, hop_samples=160, bands=80,
    f_min_hz=0.0, f_max_hz=8000.0, power=2, log_floor=None, pad_samples=200,
)  # fmt: skip
SHIFT_SAMPLES = 160
"""Whisper's frame ``i`` is centred at ``20 i`` ms; without the first 10 ms it is ``20 i + 10``,
the centre that every content frame of this project has."""
OUTLIER, MAD_TO_DEVIATION = 4.0, 1.4826
"""A transformer parks huge values in a few dimensions at frames of no meaning; they are clipped."""
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class WhisperTeacher(nn.Module):
    """``(batch, 80, 2 * frames)`` Whisper log-mel to ``(batch, frames, 512)`` hidden states."""

    def __init__(self, model_bin: Path, layers: int = 4) -> None:
        super().__init__()
        arrays = {
            name.removeprefix("encoder/"): torch.from_numpy(array)
            for name, array in read_ctranslate2(model_bin)
            if name.startswith("encoder/")
        }
        try:
            self.conv1 = arrays["conv1/weight"], arrays["conv1/bias"]
            self.conv2 = arrays["conv2/weight"], arrays["conv2/bias"]
            self.positions = arrays["position_encodings/encodings"]
            self.layers = [
                {
                    name.removeprefix(f"layer_{i}/"): array
                    for name, array in arrays.items()
                    if name.startswith(f"layer_{i}/")
                }
                for i in range(layers)
            ]
        except KeyError as error:
            raise ModelLoadError(
                f"{model_bin} is not a Whisper encoder: it lacks {error}."
            ) from error
        self.width = self.positions.shape[1]
        self.heads = self.width // 64

    @torch.inference_mode()
    def forward(self, mel: Tensor) -> Tensor:
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

    def features(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(samples // 320, 512)`` float32; at most 30 s."""
        frames = len(samples) // 320
        mel = whisper_log_mel(np.pad(samples[SHIFT_SAMPLES:], (0, SHIFT_SAMPLES)))
        hidden: FloatArray = self(torch.from_numpy(mel)[None])[0, :frames].numpy()
        return hidden


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
        z = np.clip((x - mean) / scale, -OUTLIER, OUTLIER)
        values, vectors = np.linalg.eigh(np.cov(z, rowvar=False))
        largest = np.argsort(values)[::-1][:dims]
        projection = vectors[:, largest] / np.sqrt(values[largest])
        return cls(*(np.asarray(a, np.float32) for a in (mean, scale, projection)))

    def project(self, features: FloatArray) -> FloatArray:
        """Without the utterance's mean, which holds much of the speaker and the channel."""
        y = np.clip((features - self.mean) / self.scale, -OUTLIER, OUTLIER) @ self.projection
        centred: FloatArray = y - y.mean(0)
        return centred


def read_ctranslate2(path: Path) -> Iterator[tuple[str, FloatArray]]:
    """Named float arrays of a CTranslate2 model file (format version 6), halves widened."""
    data = memoryview(path.read_bytes())
    at = 0

    def take(layout: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(layout, data, at)
        at += struct.calcsize(layout)
        return int(value)

    def text() -> str:
        nonlocal at
        length = take("<H")
        value = bytes(data[at : at + length]).rstrip(b"\0").decode()
        at += length
        return value

    try:
        take("<I")
        text()
        take("<I")
        for _ in range(take("<I")):
            name, rank = text(), take("<B")
            shape = tuple(take("<I") for _ in range(rank))
            dtype, size = _DTYPES[take("<B")], take("<I")
            array = np.frombuffer(data[at : at + size], dtype=dtype).reshape(shape)
            at += size
            if array.dtype.kind == "f":
                yield name, array.astype(np.float32)
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ModelLoadError(f"{path} is not a CTranslate2 model file: {error}.") from error


def _linear(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, layer[f"{name}/weight"], layer[f"{name}/bias"])


def _norm(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer[f"{name}/gamma"], layer[f"{name}/beta"])
