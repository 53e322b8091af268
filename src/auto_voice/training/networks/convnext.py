"""The one-dimensional ConvNeXt block that the compact models are built of, and its dropout."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shares are told apart by this many levels.
LEVELS = 1 << 16


class Dropout(nn.Dropout):
    """``nn.Dropout`` (Srivastava et al. 2014) in less than half of its time on a CPU.

    torch draws one number after the other there; this draws only a seed from it, and 16 bits for
    each value from NumPy. So what is left out still follows from the generator's state.

    Args:
        p: share that is left out; so near to 1 that all would be, it leaves out nearly all.
        generator: on the CPU; torch's own, which all threads share, where there is none.
    """

    def __init__(self, p: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__(p)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        if x.device.type != "cpu" and self.generator is None:
            return super().forward(x)
        seed = int(torch.randint(2**62, (1,), generator=self.generator))
        rng = np.random.Generator(np.random.SFC64(seed))
        drawn = torch.from_numpy(rng.integers(-LEVELS // 2, LEVELS // 2, tuple(x.shape), np.int16))
        left_out = min(round(self.p * LEVELS), LEVELS - 1)
        kept = drawn.to(x.device) >= left_out - LEVELS // 2  # int16 begins there.
        return x * kept / (1 - left_out / LEVELS)


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
