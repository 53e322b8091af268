"""The one-dimensional ConvNeXt block that the compact models are built of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.models.dropout import Dropout


class ConvNeXtBlock(nn.Module):
    """``(batch, width, frames)`` to the same shape (Liu et al. 2022; in time: Siuzdak 2023).

    A depthwise convolution over time, then a two-layer perceptron at each frame, added to the
    input. With a condition, the normalised activations are scaled and shifted by it (FiLM, Perez
    et al. 2018).

    Args:
        width: channels.
        kernel: frames that the convolution spans.
        expansion: hidden channels of the perceptron are ``expansion * width``.
        condition: size of the condition vector; 0 for none.
        lookahead: frames of the future inside the kernel; None for a centred kernel.

    ``dropout`` leaves out hidden values while it trains; its ``p`` is 0 until a task sets it.
    """

    def __init__(
        self,
        width: int,
        kernel: int,
        expansion: int,
        condition: int = 0,
        lookahead: int | None = None,
    ) -> None:
        super().__init__()
        ahead = (kernel - 1) // 2 if lookahead is None else lookahead
        self.pad = (kernel - 1 - ahead, ahead)
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=condition == 0)
        self.film = nn.Linear(condition, 2 * width) if condition else None
        self.expand = nn.Linear(width, expansion * width)
        self.dropout = Dropout()
        self.project = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.2))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """``condition`` is ``(batch, condition)``."""
        y = self.depthwise(F.pad(x, self.pad)).transpose(1, 2)
        y = self.norm(y)
        if self.film is not None and condition is not None:
            gain, bias = self.film(condition).unsqueeze(1).chunk(2, dim=-1)
            y = y * (1 + gain) + bias
        y = self.project(self.dropout(F.gelu(self.expand(y)))) * self.scale
        out: Tensor = x + y.transpose(1, 2)
        return out
