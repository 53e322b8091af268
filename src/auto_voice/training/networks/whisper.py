"""The first layers of a Whisper encoder (Radford et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.models.whisper_encoder import POSITIONS, WhisperShape

HEAD = 64


class WhisperNet(nn.Module):
    """``(batch, 80, 2 * frames)`` Whisper log-mel to ``(batch, frames, width)``.

    Its parameters have the names that the encoder's arrays have in a CTranslate2 file.
    """

    def __init__(self, shape: WhisperShape) -> None:
        super().__init__()
        self.layers, self.heads = shape.layers, shape.width // HEAD
        self.width = width = shape.width
        sizes: dict[str, tuple[int, ...]] = {
            "conv1/weight": (width, shape.bands, 3), "conv1/bias": (width,),
            "conv2/weight": (width, width, 3), "conv2/bias": (width,),
            POSITIONS: (shape.positions, width),
        }  # fmt: skip
        for index in range(shape.layers):
            for part in ("self_attention", "ffn"):
                first = 3 * width if part == "self_attention" else 4 * width
                second = width if part == "self_attention" else 4 * width
                place = f"layer_{index}/{part}"
                sizes |= {
                    f"{place}/layer_norm/gamma": (width,), f"{place}/layer_norm/beta": (width,),
                    f"{place}/linear_0/weight": (first, width), f"{place}/linear_0/bias": (first,),
                    f"{place}/linear_1/weight": (width, second), f"{place}/linear_1/bias": (width,),
                }  # fmt: skip
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def forward(self, mel: Tensor) -> Tensor:
        """Gradients flow back to ``mel`` where it asks for them."""
        x = F.gelu(F.conv1d(mel, self._of("conv1/weight"), self._of("conv1/bias"), padding=1))
        x = F.conv1d(x, self._of("conv2/weight"), self._of("conv2/bias"), stride=2, padding=1)
        x = F.gelu(x).transpose(1, 2)
        x = x + self._of(POSITIONS)[: x.shape[1]]
        for index in range(self.layers):
            place = f"layer_{index}"
            x = x + self._attend(place, self._norm(x, f"{place}/self_attention"))
            hidden = self._linear(self._norm(x, f"{place}/ffn"), f"{place}/ffn/linear_0")
            x = x + self._linear(F.gelu(hidden), f"{place}/ffn/linear_1")
        return x

    def _attend(self, place: str, x: Tensor) -> Tensor:
        batch, frames, _ = x.shape
        qkv = self._linear(x, f"{place}/self_attention/linear_0")
        q, k, v = qkv.reshape(batch, frames, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.reshape(batch, frames, self.width)
        return self._linear(mixed, f"{place}/self_attention/linear_1")

    def _norm(self, x: Tensor, place: str) -> Tensor:
        gamma, beta = (self._of(f"{place}/layer_norm/{part}") for part in ("gamma", "beta"))
        return F.layer_norm(x, (self.width,), gamma, beta)

    def _linear(self, x: Tensor, place: str) -> Tensor:
        return F.linear(x, self._of(f"{place}/weight"), self._of(f"{place}/bias"))

    def _of(self, name: str) -> Tensor:
        return self._parameters[name]  # type: ignore[return-value]
