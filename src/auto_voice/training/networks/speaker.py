"""The GE2E speaker encoder (Wan et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpeakerNet(nn.Module):
    """``(windows, frames, 40)`` linear mel to ``(windows, 256)`` of unit norm, none negative."""

    def __init__(self, bands: int = 40, width: int = 256, dims: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(bands, width, layers, batch_first=True)
        self.linear = nn.Linear(width, dims)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)
