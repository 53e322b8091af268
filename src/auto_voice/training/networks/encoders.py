"""Torch definitions of the encoders (compact content, Whisper, HuBERT, GE2E) and their blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.mel import CONTENT_MEL
from auto_voice.models.content_model import MEL_MEAN, MEL_SCALE
from auto_voice.models.hubert_model import KERNELS, STRIDES, HuBERTShape
from auto_voice.models.whisper_encoder import HEAD, POSITIONS, WhisperShape

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
        x = self._begun(mel)
        x = x + self._of(POSITIONS)[: x.shape[1]]
        for index in range(self.layers):
            x = self._layer(index, x, self._parts(index, x))
        return x

    def _begun(self, mel: Tensor) -> Tensor:
        x = F.gelu(F.conv1d(mel, self._of("conv1/weight"), self._of("conv1/bias"), padding=1))
        x = F.conv1d(x, self._of("conv2/weight"), self._of("conv2/bias"), stride=2, padding=1)
        return F.gelu(x).transpose(1, 2)

    def _parts(self, index: int, x: Tensor) -> Tensor:
        """Queries, keys and values of a layer, ``(3, batch, heads, frames, HEAD)``."""
        batch, frames, _ = x.shape
        x = self._norm(x, f"layer_{index}/self_attention")
        qkv = self._linear(x, f"layer_{index}/self_attention/linear_0")
        return qkv.reshape(batch, frames, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)

    def _layer(self, index: int, x: Tensor, parts: Iterable[Tensor]) -> Tensor:
        place = f"layer_{index}"
        q, k, v = parts
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.reshape(x.shape[0], x.shape[1], self.width)
        x = x + self._linear(mixed, f"{place}/self_attention/linear_1")
        hidden = self._linear(self._norm(x, f"{place}/ffn"), f"{place}/ffn/linear_0")
        return x + self._linear(F.gelu(hidden), f"{place}/ffn/linear_1")

    def _norm(self, x: Tensor, place: str) -> Tensor:
        gamma, beta = (self._of(f"{place}/layer_norm/{part}") for part in ("gamma", "beta"))
        return F.layer_norm(x, (self.width,), gamma, beta)

    def _linear(self, x: Tensor, place: str) -> Tensor:
        return F.linear(x, self._of(f"{place}/weight"), self._of(f"{place}/bias"))

    def _of(self, name: str) -> Tensor:
        return self._parameters[name]  # type: ignore[return-value]


class WhisperLiveNet(WhisperNet):
    """The same for sound that comes bit by bit: what came before is remembered, not given again."""

    def forward(  # type: ignore[override]
        self, mel: Tensor, skip: Tensor, start: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(batch, frames, width)``, and what is to be remembered of these frames.

        Args:
            mel: ``(batch, 80, 2 * (skip + frames))``.
            skip: ``(1,)`` frames at the beginning that only the convolutions see.
            start: ``(1,)`` place of the first other frame among the positions.
            memory: ``(layers, 2, batch, heads, earlier frames, HEAD)`` of earlier calls.
        """
        x = self._begun(mel)
        x = x[:, skip[0] :]
        places = start + torch.arange(x.shape[1], device=x.device)
        x = x + self._of(POSITIONS).index_select(0, places)
        held = []
        for index in range(self.layers):
            q, k, v = self._parts(index, x)
            held.append(torch.stack([k, v]))
            x = self._layer(index, x, (q, *torch.cat([memory[index], held[-1]], dim=3)))
        return x, torch.stack(held)


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

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.attention(x))
        out: Tensor = self.final_layer_norm(x + self.feed_forward(x))
        return out


class _Encoder(nn.Module):
    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.pos_conv_embed = _PositionConv(shape)
        self.layer_norm = nn.LayerNorm(shape.dims)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [self.layer_norm(x + self.pos_conv_embed(x))]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class HuBERTNet(nn.Module):
    """``(batch, samples)`` at 16 kHz, rows of one length, to what enters the transformer and what
    each of its layers gives, ``(batch, frames, dims)`` each."""

    def __init__(self, shape: HuBERTShape) -> None:
        super().__init__()
        self.feature_extractor = _FrontEnd(shape)
        self.feature_projection = _Projection(shape)
        self.encoder = _Encoder(shape)

    def forward(self, samples: Tensor) -> tuple[Tensor, ...]:
        states: tuple[Tensor, ...]
        states = self.encoder(self.feature_projection(self.feature_extractor(samples)))
        return states


class SpeakerNet(nn.Module):
    """``(windows, frames, 40)`` linear mel to ``(windows, 256)`` of unit norm, none negative."""

    def __init__(self, bands: int = 40, width: int = 256, dims: int = 256, layers: int = 3) -> None:
        super().__init__()
        self.lstm = nn.LSTM(bands, width, layers, batch_first=True)
        self.linear = nn.Linear(width, dims)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)
