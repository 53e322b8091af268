"""HuBERT (Hsu et al. 2021) with the parameter names of the published checkpoint."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.models.hubert_model import KERNELS, STRIDES, HuBERTShape


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
