"""The compact converter: content, pitch and a voice to a log-mel spectrogram.

The voice enters in two ways. A vector (speaker embedding, long-term spectrum, pitch range) steers
every block. And attention looks up, for each content frame, what the reference speaker's own
spectrum was when similar content was spoken, so that details no single vector holds come from the
reference itself. The pitch enters as the harmonics it makes, so that the network shapes them
rather than draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.harmonics import harmonic_template
from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.audio.pitch import NEUTRAL_LOG_F0, align_pitch
from auto_voice.errors import ModelLoadError, VoiceError
from auto_voice.models.convnext import ConvNeXtBlock
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.weights import load_module
from auto_voice.models.speaker_adaptation import Adaptation, Speech, adapt, adapted
from auto_voice.types import Content, FloatArray, Mel, Pitch, Voice

# Mean and spread of ``HIFIGAN_MEL`` over training speech; networks see standardised mels.
MEL_MEAN, MEL_SCALE = -5.5, 2.2
LOG_F0_SCALE = 0.35
NEUTRAL_LOG_F0_STD = 0.2
# Frames of the reference that attention sees at most: about 18.6 s, evenly thinned beyond.
REFERENCE_FRAMES = 1600
PROFILE_SIZE = 2 * HIFIGAN_MEL.bands + 2
PITCH_SIZE = 3 + HIFIGAN_MEL.bands


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
        self.project = nn.Parameter(torch.eye(dims).repeat(heads, 1, 1))
        self.sharpness = nn.Parameter(torch.linspace(-2.5, -0.5, heads))
        self.empty = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(heads * (HIFIGAN_MEL.bands + 1), width)

    def forward(self, content: Tensor, voice: VoiceCondition) -> Tensor:
        """``(batch, frames, dims)`` to ``(batch, frames, width)``."""
        batch, frames, _ = content.shape
        q = F.normalize(torch.einsum("btd,hde->bhte", content, self.project), dim=-1)
        k = F.normalize(torch.einsum("brd,hde->bhre", voice.keys, self.project), dim=-1)
        scale = torch.exp(self.sharpness + 5.0).view(1, -1, 1, 1)
        score = torch.matmul(q * scale, k.transpose(-1, -2))
        score = score.masked_fill(~voice.mask[:, None, None, :], -1e4)
        empty = self.empty.view(1, -1, 1, 1).expand(batch, -1, frames, 1)
        weight = torch.softmax(torch.cat([score, empty], dim=-1), dim=-1)
        found = torch.matmul(weight[..., :-1], voice.values[:, None])
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


def pitch_inputs(log_f0: FloatArray, voiced: FloatArray, log_f0_mean: float) -> FloatArray:
    """What ``ConverterNet`` knows of the pitch: ``(frames, PITCH_SIZE)`` float32.

    Log-F0 against 150 Hz, log-F0 against the voice's mean, voicing, and the harmonics as the mel
    shows them.
    """
    absolute = (log_f0 - NEUTRAL_LOG_F0) / LOG_F0_SCALE
    relative = (log_f0 - log_f0_mean) / LOG_F0_SCALE
    numbers = np.stack([absolute, relative, voiced], axis=-1)
    template = harmonic_template(log_f0, voiced) / MEL_SCALE
    return np.concatenate([numbers, template], axis=-1).astype(np.float32)


def voice_profile(mel: FloatArray, log_f0_mean: float, log_f0_std: float) -> FloatArray:
    """``(PROFILE_SIZE,)`` from a reference mel ``(frames, bands)``, its natural log.

    Quiet frames are left out: they tell of the room.
    """
    values = (mel.astype(np.float32) - MEL_MEAN) / MEL_SCALE
    loudness = values.mean(1)
    values = values[loudness >= np.quantile(loudness, 0.3)]
    pitch = [(log_f0_mean - NEUTRAL_LOG_F0) / LOG_F0_SCALE, log_f0_std / LOG_F0_SCALE]
    return np.concatenate([values.mean(0), values.std(0), np.array(pitch)]).astype(np.float32)


def thin(frames: int, limit: int = REFERENCE_FRAMES) -> slice:
    """Every n-th frame, so that at most ``limit`` stay."""
    return slice(None, None, max(1, -(-frames // limit)))


class CompactConverter:
    """``ConverterNet`` as a stage.

    Args:
        net: with weights, in evaluation mode.
        name: ``name@version`` of the weights.
        content_space: that ``net`` was trained on.
        device: where ``net`` is.
        plan: how :meth:`adapt` fits the network to a voice.
    """

    sample_rate = HIFIGAN_MEL.sample_rate
    hop_samples = HIFIGAN_MEL.hop_samples

    def __init__(
        self,
        net: ConverterNet,
        name: str,
        content_space: str,
        device: str = "cpu",
        plan: Adaptation | None = None,
    ) -> None:
        self.net = net
        self.name = name
        self.content_space = content_space
        self.device = device
        self.plan = plan or Adaptation()

    @torch.inference_mode()
    def convert(self, content: Content, pitch: Pitch, voice: Voice, frames: int) -> Mel:
        """The mel of ``content`` spoken by ``voice``: ``(80, frames)``.

        Args:
            pitch: already transposed to where the result should lie.
            frames: of the output, at 22 050 / 256 = 86.13 a second.

        Raises:
            ModelLoadError: ``content`` is in another space.
            VoiceError: the voice's reference frames were made in another space.
        """
        if content.space != self.content_space:
            raise ModelLoadError(
                f"{self.name} speaks from content in {self.content_space}, not {content.space}; "
                "choose the content encoder it was trained on or calibrate yours to it."
            )
        if voice.frames and voice.content_space != self.content_space:
            raise VoiceError(
                f"The voice {voice.name or '(unnamed)'} was enrolled in {voice.content_space}, and "
                f"{self.name} needs {self.content_space}; enrol it again from its reference."
            )
        rate = self.sample_rate / self.hop_samples
        features = interpolate_frames(content.features, content.frame_rate, rate, frames)
        log_f0, voiced = align_pitch(pitch, rate, frames)
        mean = voice.log_f0_mean if voice.log_f0_mean is not None else float(log_f0.mean())
        inputs = pitch_inputs(log_f0, voiced.astype(np.float32), mean)
        arguments = self._tensor(features), self._tensor(inputs), self._condition(voice, mean)
        mel = self._network(voice)(*arguments)
        values = mel[0].float().cpu().numpy().T * MEL_SCALE + MEL_MEAN
        return Mel(values.astype(np.float32), self.sample_rate, self.hop_samples)

    @torch.inference_mode(False)
    def adapt(
        self, voice: Voice, steps: int, progress: Callable[[float], None] | None = None
    ) -> Voice:
        """``voice`` with what the network learns from its speech in ``steps``.

        Args:
            progress: called with the fraction done, from 0 to 1.

        Returns:
            A voice adapted to this converter, about 6 MB larger; ``voice`` itself where it holds
            no speech with known pitch, or less than 1.1 s.
        """
        pitch, mel = voice.frames.get("pitch"), voice.frames.get("mel")
        if pitch is None or mel is None or voice.content_space != self.content_space:
            return voice
        log_f0, voiced = np.ascontiguousarray(pitch.T)
        mean = voice.log_f0_mean if voice.log_f0_mean is not None else float(log_f0.mean())
        condition = self._condition(voice, mean, thinned=False)
        speech = Speech(
            content=condition.keys[0],
            pitch=self._tensor(pitch_inputs(log_f0, voiced, mean))[0],
            mel=condition.values[0],
            embedding=condition.embedding[0],
            profile=condition.profile[0],
        )
        plan = replace(self.plan, steps=steps)
        difference = adapt(self.net, speech, plan, progress)
        return replace(voice, adaptation=difference, adapted_to=self.name) if difference else voice

    def _network(self, voice: Voice) -> nn.Module:
        if not voice.adaptation or voice.adapted_to != self.name:
            return self.net
        try:
            return adapted(self.net, voice.adaptation)
        except (KeyError, ValueError) as error:
            raise VoiceError(
                f"The voice {voice.name or '(unnamed)'} holds an adaptation that does not fit "
                f"{self.name} ({error}); enrol it again from its reference."
            ) from error

    def _condition(self, voice: Voice, log_f0_mean: float, thinned: bool = True) -> VoiceCondition:
        mel, keys = voice.frames.get("mel"), voice.frames.get("content")
        if mel is None or keys is None:
            mel = np.zeros((0, HIFIGAN_MEL.bands), np.float32)
            keys = np.zeros((0, self.net.stem.in_channels - PITCH_SIZE), np.float32)
        profile = np.zeros(PROFILE_SIZE, np.float32)
        if len(mel):
            std = voice.log_f0_std if voice.log_f0_std is not None else NEUTRAL_LOG_F0_STD
            profile = voice_profile(mel, log_f0_mean, std)
        kept = thin(len(mel)) if thinned else slice(None)
        values = (mel[kept].astype(np.float32) - MEL_MEAN) / MEL_SCALE
        mask = torch.ones(1, len(values), dtype=torch.bool, device=self.device)
        return VoiceCondition(
            self._tensor(voice.embedding),
            self._tensor(profile),
            self._tensor(keys[kept].astype(np.float32)),
            self._tensor(values),
            mask,
        )

    def _tensor(self, array: FloatArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))[None].to(self.device)


def build(
    files: Mapping[str, Path], version: ModelVersion, device: str = "cpu"
) -> CompactConverter:
    """From the catalog's record; ``params`` holds ``net`` (arguments of ``ConverterNet``) and
    ``content_space``.

    Raises:
        ModelLoadError: the weights do not fit the architecture.
    """
    path = next(iter(files.values()))
    net = load_module(
        lambda: ConverterNet(**version.params.get("net", {})), path, device=device
    ).float()
    return CompactConverter(net, version.key, version.params["content_space"], device)
