"""The compact content encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.mel import CONTENT_MEL
from auto_voice.models.content_model import MEL_MEAN, MEL_SCALE
from auto_voice.training.networks.convnext import ConvNeXtBlock


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
