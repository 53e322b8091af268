"""HuBERT base (Hsu et al. 2021): self-supervised features of what is said, 768 numbers, 50 Hz.

A plain module with the parameter names of the published checkpoint and nothing of the library
that published it: a third of the time to the first result, and less memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.errors import AudioContentError, ConfigError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.weights import (
    Array,
    as_batch,
    checkpoint_arrays,
    load_module,
    only_file,
)
from auto_voice.types import Content, FloatArray

KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
# Product of the strides: 20 ms at 16 kHz.
HOP_SAMPLES = 320
# Samples that one frame sees before the transformer; shorter audio has no frame.
FIELD_SAMPLES = 400
SAMPLE_RATE = 16000
# Layer that ``encode`` reads: the upper middle of the network knows most about phones (Pasad et
# al. 2023), and the layers above it need not be computed.
CONTENT_LAYER = 9


@dataclass(frozen=True)
class HuBERTShape:
    """Sizes of the network; the defaults are those of HuBERT base (94.4 M parameters)."""

    dims: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    channels: int = 512
    position_kernel: int = 128
    position_groups: int = 16

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> HuBERTShape:
        """The entries of a catalog's ``params`` that are sizes; the others are left alone."""
        known = {name: int(params[name]) for name in cls.__dataclass_fields__ if name in params}
        return cls(**known)


def frames_of(samples: int) -> int:
    """Frames that so many samples give: ``(samples - 400) // 320 + 1``, none below 400."""
    return max(0, (samples - FIELD_SAMPLES) // HOP_SAMPLES + 1)


class _ConvLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, stride=stride, bias=False)
        self.layer_norm = nn.GroupNorm(outputs, outputs) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        return F.gelu(x)


class _FrontEnd(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        width = shape.channels
        self.conv_layers = nn.ModuleList(
            _ConvLayer(width if i else 1, width, kernel, stride, norm=i == 0)
            for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True))
        )

    def forward(self, samples: Tensor) -> Tensor:
        x = samples[:, None]
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)


class _Projection(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(shape.channels)
        self.projection = nn.Linear(shape.channels, shape.dims)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(self.layer_norm(x))
        return out


class _PositionConv(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        kernel = shape.position_kernel
        self.conv = nn.Conv1d(
            shape.dims, shape.dims, kernel, padding=kernel // 2, groups=shape.position_groups
        )

    def forward(self, x: Tensor) -> Tensor:
        # An even kernel with symmetric padding gives one frame too many.
        y = self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]
        return F.gelu(y).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.k_proj = nn.Linear(shape.dims, shape.dims)
        self.v_proj = nn.Linear(shape.dims, shape.dims)
        self.q_proj = nn.Linear(shape.dims, shape.dims)
        self.out_proj = nn.Linear(shape.dims, shape.dims)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        query, key, value = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=valid)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(shape.dims, shape.feed_forward)
        self.output_dense = nn.Linear(shape.feed_forward, shape.dims)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output_dense(F.gelu(self.intermediate_dense(x)))
        return out


class _Layer(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.attention = _Attention(shape)
        self.layer_norm = nn.LayerNorm(shape.dims)
        self.feed_forward = _FeedForward(shape)
        self.final_layer_norm = nn.LayerNorm(shape.dims)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = self.layer_norm(x + self.attention(x, valid))
        out: Tensor = self.final_layer_norm(x + self.feed_forward(x))
        return out


class _Encoder(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.pos_conv_embed = _PositionConv(shape)
        self.layer_norm = nn.LayerNorm(shape.dims)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))

    def forward(self, x: Tensor, valid: Tensor | None, layers: int) -> Tensor:
        x = self.layer_norm(x + self.pos_conv_embed(x))
        for layer in self.layers[:layers]:
            x = layer(x, valid)
        return x


class HuBERTNet(nn.Module):
    """``(batch, samples)`` at 16 kHz to ``(batch, frames, dims)`` after ``layers`` layers."""

    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.feature_extractor = _FrontEnd(shape)
        self.feature_projection = _Projection(shape)
        self.encoder = _Encoder(shape)

    def forward(self, samples: Tensor, lengths: list[int], layers: int) -> Tensor:
        counts = [frames_of(length) for length in lengths]
        if min(lengths) == samples.shape[1]:
            x = self.feature_projection(self.feature_extractor(samples))
            out: Tensor = self.encoder(x, None, layers)
            return out
        # The first layer normalises over time, so padding would change its statistics: the
        # convolutions see each row at its own length, the transformer the padded batch.
        rows = [
            self.feature_projection(self.feature_extractor(row[None, :length]))[0]
            for row, length in zip(samples, lengths, strict=True)
        ]
        x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        places = torch.arange(x.shape[1], device=x.device)
        valid = places < torch.tensor(counts, device=x.device)[:, None]
        out = self.encoder(x, valid[:, None, None], layers)
        return out * valid[:, :, None]


class HuBERTModel:
    """HuBERT as a content encoder: 16 kHz speech to 768-d features at 50 Hz.

    Frame ``i`` is centred at sample ``320 i + 200``; ``n`` samples give
    ``(n - 400) // 320 + 1`` frames. Loaded once, it may be called from many threads.

    Args:
        net: the network in evaluation mode.
        shape: its sizes.
        name: ``name@version`` of the weights; with ``content_layer`` it names the space of
            ``encode``, e.g. ``hubert_base@1.0/layer9``.
        device: where ``net`` is.
        content_layer: hidden layer that ``encode`` returns, 0 to ``shape.layers``.
        normalise: bring each row to zero mean and unit variance first. The base model was
            trained without; its first layer makes the level immaterial either way.
    """

    sample_rate = SAMPLE_RATE
    frame_rate = SAMPLE_RATE / HOP_SAMPLES

    def __init__(
        self,
        net: HuBERTNet,
        shape: HuBERTShape | None = None,
        *,
        name: str = "hubert_base",
        device: str = "cpu",
        content_layer: int | None = None,
        normalise: bool = False,
    ) -> None:
        self.net = net
        self.shape = shape or HuBERTShape()
        self.name = name
        self.dims = self.shape.dims
        self.device = device
        self.content_layer = min(CONTENT_LAYER, self.shape.layers)
        if content_layer is not None:
            self.content_layer = self._checked_layer(content_layer)
        # An adapter fitted on one layer must not be taken for another's.
        self.space = f"{name}/layer{self.content_layer}"
        self.normalise = normalise

    def extract_features(
        self,
        audio: ArrayLike,
        lengths: NDArray[np.int64] | None = None,
        layer: int | None = None,
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` to ``(batch, frames, dims)`` float32.

        Args:
            audio: numpy or torch, float in [-1, 1] at 16 kHz, rows padded at their end.
            lengths: valid samples of each row; None if all are full. Frames past a row's own
                length are zero; the others equal those of the row alone.
            layer: 0 for what enters the transformer, ``k`` for the output of its layer ``k``,
                None for the last.

        Raises:
            AudioContentError: empty, shorter than 400 samples, not finite, or wrong lengths.
            ConfigError: there is no such layer.
        """
        batch = as_batch(audio, 2, "audio")
        sizes = self._checked_lengths(batch, lengths)
        layers = self.shape.layers if layer is None else self._checked_layer(layer)
        if self.normalise:
            batch = np.stack([_standardised(row, n) for row, n in zip(batch, sizes, strict=True)])
        with torch.inference_mode():
            samples = torch.from_numpy(batch[:, : max(sizes)]).to(self.device)
            features: FloatArray = self.net(samples, sizes, layers).cpu().numpy()
        frames = frames_of(batch.shape[1])
        return np.pad(features, ((0, 0), (0, frames - features.shape[1]), (0, 0)))

    def encode(self, samples: FloatArray) -> Content:
        """One utterance ``(samples,)`` at 16 kHz to ``samples // 320`` frames of ``content_layer``.

        40 samples of silence on each side centre frame ``i`` at sample ``320 i + 160``, the
        middle of its 20 ms, as the other content encoders have it.
        """
        margin = (FIELD_SAMPLES - HOP_SAMPLES) // 2
        padded = np.pad(as_batch(samples, 2, "audio")[0], margin)
        features = self.extract_features(padded, layer=self.content_layer)[0]
        return Content(features, self.frame_rate, self.space)

    def _checked_layer(self, layer: int) -> int:
        if not 0 <= layer <= self.shape.layers:
            raise ConfigError(f"{self.name} has layers 0 to {self.shape.layers}, not {layer}.")
        return layer

    def _checked_lengths(self, batch: FloatArray, lengths: NDArray[np.int64] | None) -> list[int]:
        rows, samples = batch.shape
        sizes = [samples] * rows if lengths is None else np.asarray(lengths).astype(int).tolist()
        if len(sizes) != rows or max(sizes) > samples:
            raise AudioContentError(
                f"lengths must give, for each of {rows} rows, at most {samples} samples."
            )
        if min(sizes) < FIELD_SAMPLES:
            raise AudioContentError(
                f"audio must be at least {FIELD_SAMPLES} samples (25 ms at 16 kHz) long, "
                f"not {min(sizes)}."
            )
        return sizes


HubertModel = HuBERTModel


def convert_checkpoint(path: Path) -> dict[str, Array]:
    """The published ``pytorch_model.bin`` as arrays under this module's names.

    Raises:
        UnsafeFileError, ModelLoadError: see ``weights.checkpoint_arrays``.
    """
    named = ((_select(key), value) for key, value in checkpoint_arrays(path).items())
    return {key: value for key, value in named if key is not None}


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> HuBERTModel:
    """The encoder whose weights are the one file of ``files``.

    ``version.params`` may hold the sizes of ``HuBERTShape``, ``content_layer`` and ``normalise``.

    Raises:
        ModelLoadError, UnsafeFileError: see ``weights.load_module``.
    """
    shape = HuBERTShape.from_params(version.params)
    net = load_module(
        lambda: HuBERTNet(shape),
        only_file(files, version.key),
        device=device,
        convert=convert_checkpoint,
        select=_select,
    )
    return HuBERTModel(
        net,
        shape,
        name=version.key,
        device=device,
        content_layer=version.params.get("content_layer"),
        normalise=bool(version.params.get("normalise", False)),
    )


def _select(key: str) -> str | None:
    # Fine-tuned checkpoints prefix the encoder; the mask embedding serves training alone.
    key = key.removeprefix("hubert.")
    parts = ("feature_extractor.", "feature_projection.", "encoder.")
    return key if key.startswith(parts) else None


def _standardised(row: FloatArray, length: int) -> FloatArray:
    speech = row[:length]
    out = np.zeros_like(row)
    out[:length] = (speech - speech.mean()) / np.sqrt(speech.var() + 1e-7)
    return out
