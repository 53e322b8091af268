"""HiFi-GAN V1 (Kong et al. 2020): log-mel spectrogram to 22.05 kHz audio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.errors import AudioContentError, ConfigError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.weights import (
    Array,
    as_batch,
    checkpoint_arrays,
    load_module,
    only_file,
)
from auto_voice.types import FloatArray

SLOPE = 0.1
# Frames synthesised at once (6 s): bounds the memory to about 100 MB per row of the batch.
CHUNK_FRAMES = 512
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class HiFiGANShape:
    """Sizes of the generator; the defaults are those of V1 (13.9 M parameters)."""

    bands: int = 80
    channels: int = 512
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 16, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> HiFiGANShape:
        """The entries of a catalog's ``params`` that are sizes; the others are left alone."""
        known: dict[str, Any] = {
            field.name: tuple(value) if isinstance(value := params[field.name], list) else value
            for field in fields(cls)
            if field.name in params
        }
        return cls(**known)

    @property
    def hop_samples(self) -> int:
        return int(np.prod(self.upsample_rates))

    @property
    def context_frames(self) -> int:
        """Frames on each side of a frame that its samples depend on: 14 for V1.

        Walked backwards from the output: a convolution of kernel ``k`` and dilation ``d`` reaches
        ``d (k - 1) / 2`` samples, a transposed one of stride ``u`` maps a reach ``r`` to
        ``(r + overhang) / u`` of its input.
        """
        longest = max(self.block_kernels)
        blocks = sum((d + 1) * (longest - 1) // 2 for d in self.dilations)
        reach = 3
        for rate, kernel in zip(
            self.upsample_rates[::-1], self.upsample_kernels[::-1], strict=True
        ):
            overhang = kernel - 1 - (kernel - rate) // 2
            reach = -(-(reach + blocks + overhang) // rate)
        return reach + 3


def _same(channels: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=padding)


class _ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same(channels, kernel) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            y = F.leaky_relu_(dilated(F.leaky_relu(x, SLOPE)), SLOPE)
            x = x + plain(y)
        return x


class HiFiGANNet(nn.Module):
    """``(batch, bands, frames)`` log-mel to ``(batch, 1, frames * hop)`` in [-1, 1]."""

    def __init__(self, shape: HiFiGANShape) -> None:
        super().__init__()
        self.branches = len(shape.block_kernels)
        width = shape.channels
        self.conv_pre = nn.Conv1d(shape.bands, width, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(shape.upsample_rates, shape.upsample_kernels, strict=True):
            padding = (kernel - rate) // 2
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding))
            width //= 2
            for size in shape.block_kernels:
                self.resblocks.append(_ResBlock(width, size, shape.dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu_(x, SLOPE))
            first = stage * self.branches
            total = self.resblocks[first](x)
            for block in self.resblocks[first + 1 : first + self.branches]:
                total = total + block(x)
            x = total / self.branches
        # The published generator falls back on PyTorch's default slope for the last one.
        return torch.tanh(self.conv_post(F.leaky_relu_(x)))


class HiFiGANModel:
    """HiFi-GAN as a vocoder. Loaded once, it may be called from many threads.

    Args:
        net: the generator in evaluation mode.
        shape: its sizes.
        name: ``name@version`` of the weights.
        device: where ``net`` is.
        precision: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 where the CPU has
            instructions for it. Measured on copy-synthesis, the difference is inaudible.
        chunk_frames: frames synthesised at once; the result does not depend on it.
    """

    sample_rate = HIFIGAN_MEL.sample_rate

    def __init__(
        self,
        net: HiFiGANNet,
        shape: HiFiGANShape | None = None,
        *,
        name: str = "hifigan",
        device: str = "cpu",
        precision: str = "auto",
        chunk_frames: int = CHUNK_FRAMES,
    ) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(
                f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}."
            )
        self.net = net
        self.shape = shape or HiFiGANShape()
        self.name = name
        self.device = device
        self.bands = self.shape.bands
        self.hop_samples = self.shape.hop_samples
        self.chunk_frames = chunk_frames
        if precision == "auto":
            precision = "bfloat16" if device == "cpu" and cpu_has_bfloat16() else "float32"
        self.precision = precision

    def synthesize(self, mel: ArrayLike) -> FloatArray:
        """``(bands, frames)`` or ``(batch, bands, frames)`` to ``(batch, frames * hop_samples)``.

        Long input is synthesised in chunks that overlap by the network's receptive field, so the
        memory is bounded and the result is that of one pass.

        Args:
            mel: numpy or torch, as ``audio.mel.HIFIGAN_MEL`` defines it.

        Returns:
            float32 in [-1, 1] at 22 050 Hz.

        Raises:
            AudioContentError: empty, not finite, or another number of bands.
        """
        batch = as_batch(mel, 3, "mel")
        rows, bands, frames = batch.shape
        if bands != self.bands:
            raise AudioContentError(f"mel must have {self.bands} bands, not {bands}.")
        audio = np.empty((rows, frames * self.hop_samples), dtype=np.float32)
        context, hop = self.shape.context_frames, self.hop_samples
        for start in range(0, frames, self.chunk_frames):
            stop = min(start + self.chunk_frames, frames)
            first, last = max(0, start - context), min(frames, stop + context)
            samples = self._forward(batch[:, :, first:last])
            audio[:, start * hop : stop * hop] = samples[
                :, (start - first) * hop : (stop - first) * hop
            ]
        return audio

    def _forward(self, mel: FloatArray) -> FloatArray:
        reduced = self.precision == "bfloat16"
        with (
            torch.inference_mode(),
            torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=reduced),
        ):
            x = torch.from_numpy(np.ascontiguousarray(mel)).to(self.device)
            samples: FloatArray = self.net(x)[:, 0].float().cpu().numpy()
        return samples


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; emulated, it would be slower than float32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def convert_checkpoint(path: Path) -> dict[str, Array]:
    """The published generator (key ``generator``) as arrays, weight normalisation folded.

    Raises:
        UnsafeFileError, ModelLoadError: see ``weights.checkpoint_arrays``.
    """
    return checkpoint_arrays(path, under="generator")


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> HiFiGANModel:
    """The vocoder whose weights are the one file of ``files``.

    ``version.params`` may hold the sizes of ``HiFiGANShape``, ``precision`` and ``chunk_frames``.

    Raises:
        ModelLoadError, UnsafeFileError: see ``weights.load_module``.
    """
    shape = HiFiGANShape.from_params(version.params)
    net = load_module(
        lambda: HiFiGANNet(shape),
        only_file(files, version.key),
        device=device,
        convert=convert_checkpoint,
    )
    return HiFiGANModel(
        net,
        shape,
        name=version.key,
        device=device,
        precision=str(version.params.get("precision", "auto")),
        chunk_frames=int(version.params.get("chunk_frames", CHUNK_FRAMES)),
    )
