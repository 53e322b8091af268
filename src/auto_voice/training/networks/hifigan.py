"""The generator of HiFi-GAN (Kong et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.models.hifigan_model import HiFiGANShape

# Of the leaky rectifiers.
SLOPE = 0.1


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
