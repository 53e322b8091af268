"""Torch definitions of what makes mels and audio: the converter and HiFi-GAN."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.models.converter_model import PITCH_SIZE, PROFILE_SIZE
from auto_voice.models.hifigan_model import HiFiGANShape

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
    input. The normalised activations are scaled and shifted by a condition (FiLM, Perez et al.
    2018).

    Args:
        width: channels.
        kernel: frames that the convolution spans.
        expansion: hidden channels of the perceptron are ``expansion * width``.
        condition: size of the condition vector.

    ``dropout`` leaves out hidden values while it trains; its ``p`` is 0 until a task sets it.
    """

    def __init__(self, width: int, kernel: int, expansion: int, condition: int) -> None:
        super().__init__()
        self.pad = (kernel // 2, (kernel - 1) // 2)
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(condition, 2 * width)
        self.expand = nn.Linear(width, expansion * width)
        self.dropout = Dropout()
        self.project = nn.Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``condition`` is ``(batch, condition)``."""
        y = self.depthwise(F.pad(x, self.pad)).transpose(1, 2)
        gain, bias = self.film(condition).unsqueeze(1).chunk(2, dim=-1)
        y = self.norm(y) * (1 + gain) + bias
        y = self.project(self.dropout(F.gelu(self.expand(y)))) * self.scale
        out: Tensor = x + y.transpose(1, 2)
        return out


class VoiceCondition(NamedTuple):
    """A batch of voices as the network sees them.

    Attributes:
        embedding: ``(batch, 256)`` unit norm.
        profile: ``(batch, PROFILE_SIZE)``: mean and spread of the standardised reference mel,
            pitch mean and spread; zeros where only an embedding is known.
        keys: ``(batch, frames, dims)`` content of the reference; may have no frames.
        values: ``(batch, frames, bands)`` standardised mel of the reference.
        mask: ``(batch, frames)`` bool, true where a frame is real.
    """

    embedding: Tensor
    profile: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor


class ReferenceAttention(nn.Module):
    """For each frame, a blend of the reference's mel frames of like content.

    Queries and keys share one projection that starts as the identity, so that the untrained layer
    is already a soft nearest-neighbour search; each head has its own sharpness. A learned empty
    slot lets a head find nothing.
    """

    def __init__(self, dims: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        # Under the meta device torch.eye and torch.linspace import torch's compiler and sympy,
        # which takes as long as the rest of the load, and 70 MB.
        identities = torch.zeros(heads, dims, dims)
        identities.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        self.project = nn.Parameter(identities)
        sharpness = np.linspace(-2.5, -0.5, heads).tolist()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))
        self.empty = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(heads * (HIFIGAN_MEL.bands + 1), width)

    def forward(self, content: Tensor, voice: VoiceCondition) -> Tensor:
        """``(batch, frames, dims)`` to ``(batch, frames, width)``."""
        batch, frames, _ = content.shape
        q = F.normalize(torch.matmul(content[:, None], self.project), dim=-1)
        k = F.normalize(torch.matmul(voice.keys[:, None], self.project), dim=-1)
        scale = torch.exp(self.sharpness + 5.0).view(1, -1, 1, 1)
        score = torch.matmul(q * scale, k.transpose(-1, -2))
        # Added, because a sum needs no second array of the largest size that there is here.
        score = score - 1e4 * (~voice.mask[:, None, None, :]).to(score.dtype)
        empty = self.empty.view(1, -1, 1, 1).expand(batch, -1, frames, 1)
        weight = torch.softmax(torch.cat([score, empty], dim=-1), dim=-1)
        # The empty slot's value is nothing, which spares a copy of the other weights.
        found = torch.matmul(weight, F.pad(voice.values, (0, 0, 0, 1))[:, None])
        heads = torch.cat([found, 1 - weight[..., -1:]], dim=-1)
        out: Tensor = self.out(heads.permute(0, 2, 1, 3).reshape(batch, frames, -1))
        return out


class ConverterNet(nn.Module):
    """``ConvNeXtBlock`` trunk under a voice condition.

    Args:
        dims: of the content space.
        width: channels of the trunk.
        blocks: of the trunk.
        kernel: frames that one block sees, at the mel rate.
        expansion: of the blocks' perceptrons.
        heads: of the attention over the reference; 0 leaves it out.
        use_profile: whether the long-term spectrum and pitch range of the reference are used.
        cepstra: whether the content ends with ``cepstra``; in training those of the source are
            warped, those of the reference are as they are.
    """

    def __init__(
        self,
        dims: int = 64,
        width: int = 224,
        blocks: int = 8,
        kernel: int = 7,
        expansion: int = 2,
        heads: int = 4,
        use_profile: bool = True,
        cepstra: bool = False,
    ) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {
            "dims": dims, "width": width, "blocks": blocks, "kernel": kernel,
            "expansion": expansion, "heads": heads, "use_profile": use_profile,
        }  # fmt: skip
        if cepstra:  # Left out, so that programs that know no cepstra read what has none.
            self.arguments["cepstra"] = True
        self.use_profile = use_profile
        self.cepstra = cepstra
        self.stem = nn.Conv1d(dims + PITCH_SIZE, width, 5, padding=2)
        self.attention = ReferenceAttention(dims, heads, width) if heads else None
        self.embed = nn.Linear(256, width)
        self.describe = nn.Linear(PROFILE_SIZE, width)
        self.mix = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(width, kernel, expansion, condition=width) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * HIFIGAN_MEL.bands)

    def forward(self, content: Tensor, pitch: Tensor, voice: VoiceCondition) -> Tensor:
        """Standardised mel ``(batch, frames, bands)``.

        Args:
            content: ``(batch, frames, dims)`` at the mel rate.
            pitch: ``(batch, frames, PITCH_SIZE)``; see ``pitch_inputs``.
        """
        condition = self.embed(16.0 * voice.embedding)
        if self.use_profile:
            condition = condition + self.describe(voice.profile)
        condition = F.gelu(self.mix(F.gelu(condition)))
        x = self.stem(torch.cat([content, pitch], dim=-1).transpose(1, 2))
        if self.attention is not None:
            x = x + self.attention(content, voice).transpose(1, 2)
        for block in self.blocks:
            x = block(x, condition)
        envelope, depth = self.head(self.norm(x.transpose(1, 2))).chunk(2, dim=-1)
        # Source and filter: the pitch's own harmonics, as deep as the frame and band let them be.
        out: Tensor = envelope + F.softplus(depth) * pitch[..., 3:]
        return out


# Of the leaky rectifiers.
SLOPE = 0.1


def _same(before: int, after: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv1d(before, after, kernel, dilation=dilation, padding=padding)


class _ResBlock(nn.Module):
    def __init__(self, channels: int, hidden: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_same(channels, hidden, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_same(hidden, channels, kernel) for _ in dilations)

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
                hidden = max(1, round(width * shape.hidden_share))
                self.resblocks.append(_ResBlock(width, hidden, size, shape.dilations))
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        return self.states(mel)[-1]

    def states(self, mel: Tensor) -> list[Tensor]:
        """What each stage gives, ``(batch, channels, samples)``, and the sound."""
        x, states = self.conv_pre(mel), []
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            first = stage * self.branches
            total = self.resblocks[first](x)
            for block in self.resblocks[first + 1 : first + self.branches]:
                total = total + block(x)
            x = total / self.branches
            states.append(x)
        # The published generator falls back on PyTorch's default slope for the last one.
        return [*states, torch.tanh(self.conv_post(F.leaky_relu(x)))]
