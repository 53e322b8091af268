"""Torch definitions of the encoders: Whisper, HuBERT, GE2E."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.models.hubert_model import KERNELS, STRIDES, HuBERTShape
from auto_voice.models.runtime.graphs import check_fit
from auto_voice.models.runtime.weights import Array
from auto_voice.models.whisper_encoder import (
    HEAD,
    OUTLIER,
    POSITIONS,
    REMEMBERED_FRAMES,
    ContentSpace,
    WhisperShape,
)


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
                first = 3 * width if part == "self_attention" else shape.hidden
                second = width if part == "self_attention" else shape.hidden
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
        return self._through(x + self._of(POSITIONS)[: x.shape[1]])

    def _through(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """All layers; ``mask`` ``(frames, frames)`` is what (second) each (first) attends to."""
        for index in range(self.layers):
            x = self._layer(index, x, self._parts(index, x), mask)
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

    def _layer(
        self, index: int, x: Tensor, parts: Iterable[Tensor], mask: Tensor | None = None
    ) -> Tensor:
        place = f"layer_{index}"
        q, k, v = parts
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
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
        return self.continued(self._begun(mel)[:, skip[0] :], start, memory)

    def continued(self, x: Tensor, start: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The same of what the convolutions gave."""
        places = start + torch.arange(x.shape[1], device=x.device)
        x = x + self._of(POSITIONS).index_select(0, places)
        held = []
        for index in range(self.layers):
            q, k, v = self._parts(index, x)
            held.append(torch.stack([k, v]))
            x = self._layer(index, x, (q, *torch.cat([memory[index], held[-1]], dim=3)))
        return x, torch.stack(held)


class ContentNet(WhisperNet):
    """Whisper log-mel ``(batch, 80, 2 * frames)`` to content ``(batch, frames, dims)``.

    The states of the last layer in a subspace that is learnt with them; what runs in inference is
    a ``WhisperNet`` and a ``ContentSpace``.

    Attributes:
        mean, scale: ``(width,)`` of the states, at which they are clipped.
        projection: ``(width, dims)``.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: WhisperShape, dims: int) -> None:
        super().__init__(shape)
        self.shape = shape
        self._of(POSITIONS).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(shape.width))
        self.register_buffer("scale", torch.ones(shape.width))
        self.projection = nn.Parameter(torch.zeros(shape.width, dims))

    def forward(self, mel: Tensor, start: int = 0, block: int = 0, lookahead: int = 0) -> Tensor:
        """Content of the whole, or as a stream gets it.

        Args:
            start: place of the first frame among the positions.
            block: frames that come at once; 0 for all of them.
            lookahead: frames beyond a block that are known when it comes.
        """
        states = self.states(mel, start, block, lookahead)
        return projected(states, self.mean, self.scale, self.projection)

    def states(self, mel: Tensor, start: int = 0, block: int = 0, lookahead: int = 0) -> Tensor:
        """``(batch, frames, width)`` of the last layer; see ``forward``."""
        x = self._begun(mel)
        frames, mask = x.shape[1], None
        places = torch.arange(frames)
        if block:
            places, mask = streamed(frames, block, lookahead)
            mask = mask.to(x.device)
        places = places.to(x.device)
        x = x[:, places] + self._of(POSITIONS)[start + places]
        return self._through(x, mask)[:, :frames]

    def encoder_weights(self) -> dict[str, Tensor]:
        """Those of the ``WhisperNet``."""
        own = {"mean", "scale", "projection"}
        return {name: value for name, value in self.state_dict().items() if name not in own}

    def take_encoder(self, arrays: Mapping[str, Array], source: str) -> None:
        """Puts ``arrays`` in place of its own.

        Args:
            source: what to call the place that they come from.

        Raises:
            ModelLoadError: they are another network's.
        """
        own = self.encoder_weights()
        check_fit({name: tuple(value.shape) for name, value in own.items()}, arrays, source)
        for name, value in own.items():
            value.copy_(torch.from_numpy(np.array(arrays[name], np.float32)))

    def subspace(self) -> ContentSpace:
        """Where its content lies among the states."""
        parts = (self.mean, self.scale, self.projection)
        return ContentSpace(*(part.detach().cpu().float().numpy() for part in parts))


def projected(states: Tensor, mean: Tensor, scale: Tensor, projection: Tensor) -> Tensor:
    """``ContentSpace.project`` of ``(..., width)``, with gradients."""
    return ((states - mean) / scale).clamp(-OUTLIER, OUTLIER) @ projection


def streamed(frames: int, block: int, lookahead: int) -> tuple[Tensor, Tensor]:
    """How ``WhisperLiveNet`` sees a stream, for all of its blocks at once.

    The look-ahead of a block is computed with it and again with the next, so its frames stand
    behind all others once more for each block (as in Shi et al. 2021).

    Returns:
        ``(positions,)`` frame of each position, those of the stream first, and
        ``(positions, positions)`` which (second) each (first) attends to.
    """
    main = torch.arange(frames)
    ends = range(block, frames, block)
    known = [torch.arange(end, min(end + lookahead, frames)) for end in ends]
    places = torch.cat([main, *known])
    numbers = [torch.full((len(part),), number) for number, part in enumerate(known)]
    part = torch.cat([main // block, *numbers])
    again = torch.arange(len(places)) >= frames
    first = part * block
    same = part[:, None] == part
    remembered = (places < first[:, None]) & (places >= first[:, None] - REMEMBERED_FRAMES)
    return places, same | (remembered & ~again)


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
