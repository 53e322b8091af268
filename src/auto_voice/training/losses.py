"""Losses that a converter is trained with besides the distance to the true mel.

The mean distance is least for a mel that averages all that could have been said, which is blurred.
A discriminator learns to tell such mels from real ones, and the converter to pass for real (least
squares, Mao et al. 2017; on mels: Yang et al. 2021).

Where a sentence was never spoken in a voice there is no true mel, but its words are those of the
source and its speaker is the target. A recogniser and a speaker encoder, both frozen, measure how
far a conversion is from that (perceptual losses, Johnson et al. 2016; for the speaker: YourTTS,
Casanova et al. 2022). Each reads a mel of its own, so a linear map, fitted on recordings, leads
there from the vocoder's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.mel import GE2E_MEL, HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.errors import TrainingError
from auto_voice.filesystem import atomic_write
from auto_voice.models.whisper_encoder import (
    ContentSpace,
    log_energies,
    scaled,
)
from auto_voice.training.networks.encoders import SpeakerNet, WhisperNet, projected
from auto_voice.types import FloatArray

# Frame rate in Hz of the mels that recogniser and speaker encoder read; frame ``i`` is centred at
# ``10 (i + 1)`` ms.
MAP_RATE = 100
# Version of the maps and of the losses; raise it when either changes.
VERSION = 2
# Frames that the map reads: windows of the vocoder's mel are nearly twice as long.
NEIGHBOURS = 3
# Regularisation of the maps' least squares.
RIDGE = 1e-2
# Whisper clips its mel so many decades below the loudest value.
RANGE = 8.0
# Added to GE2E's linear mel before its logarithm.
QUIETEST = 1e-7


class MelDiscriminator(nn.Module):
    """Tells real mels from predicted ones, patch by patch.

    Args:
        channels: of the layers, each of which halves time and frequency.
    """

    def __init__(self, channels: Sequence[int] = (24, 48, 96)) -> None:
        super().__init__()
        layers, before = [], 1
        for width in channels:
            layers.append(nn.Conv2d(before, width, (3, 5), stride=2, padding=(1, 2)))
            before = width
        self.layers = nn.ModuleList(layers)
        self.head = nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, mel: Tensor) -> list[Tensor]:
        """Activations of each layer for standardised mels ``(batch, frames, bands)``, scores."""
        x = mel[:, None]
        activations = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2)
            activations.append(x)
        return [*activations, self.head(x)]


class AdversarialLoss:
    """A discriminator in training, and its losses for the converter (Mao et al. 2017).

    Args:
        settings: arguments of ``MelDiscriminator``.
        learning_rate: of its Adam.
    """

    def __init__(
        self, settings: Mapping[str, Any] | None = None, learning_rate: float = 2e-4
    ) -> None:
        self.discriminator = MelDiscriminator(**(settings or {}))
        self.learning_rate = learning_rate
        self.optimizer = self._optimiser()

    def to(self, device: torch.device) -> None:
        """Moves the discriminator before training; a stored state is loaded afterwards."""
        if next(self.discriminator.parameters()).device != device:
            self.discriminator.to(device)
            self.optimizer = self._optimiser()

    def _optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.discriminator.parameters(), lr=self.learning_rate, betas=(0.5, 0.9)
        )

    def update(self, predicted: Tensor, target: Tensor) -> Tensor:
        """One step of the discriminator; its loss is 0.5 at chance and 0 when always right."""
        real, made = self.discriminator(target)[-1], self.discriminator(predicted.detach())[-1]
        loss: Tensor = (real - 1).square().mean() + made.square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def losses(self, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The adversarial loss of ``predicted``, and its feature matching loss to ``target``."""
        self.discriminator.requires_grad_(False)
        activations = self.discriminator(predicted)
        with torch.no_grad():
            wanted = self.discriminator(target)
        self.discriminator.requires_grad_(True)
        parts = [
            (ours - theirs).abs().mean() / (theirs.abs().mean() + 1e-6)
            for ours, theirs in zip(activations[:-1], wanted[:-1], strict=True)
        ]
        return (activations[-1] - 1).square().mean(), torch.stack(parts).mean()

    def adversarial(self, mel: Tensor) -> Tensor:
        """The adversarial loss of ``mel``, which has no true counterpart."""
        self.discriminator.requires_grad_(False)
        verdict = self.discriminator(mel)[-1]
        self.discriminator.requires_grad_(True)
        loss: Tensor = (verdict - 1).square().mean()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Network and optimiser."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])


class PerceptualLosses:
    """A recogniser and a speaker encoder behind maps from the vocoder's mel.

    Args:
        recogniser: its first layers.
        space: of the content.
        speaker: on the recogniser's device; has no layer that differs in training, so it is put
            into that mode, which cuDNN wants for gradients.
        maps: ``words`` and ``voice``, see :func:`fit_maps`.
    """

    def __init__(
        self,
        recogniser: WhisperNet,
        space: ContentSpace,
        speaker: SpeakerNet,
        maps: Mapping[str, FloatArray],
    ) -> None:
        device = next(recogniser.parameters()).device
        self.recogniser, self.device = recogniser, device
        self.speaker = speaker.requires_grad_(False).train()
        self.space = space
        # A whitened component was divided by its spread along its direction.
        spread = 1 / torch.from_numpy(np.linalg.norm(space.projection, axis=0)).to(device)
        self.spread = (spread / spread.square().mean().sqrt()).float()
        self.maps = {name: torch.from_numpy(values).to(device) for name, values in maps.items()}

    def words(self, mel: Tensor, loudest: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Content features, and the loudest value of the mel, below which Whisper clips it.

        Args:
            mel: ``(batch, frames, 80)``, natural log, as the vocoder takes it.
            loudest: ``(batch, 1, 1)`` of another mel of the same sound.

        Returns:
            ``(batch, time, dims)`` at 50 Hz without the mean over time, each component as wide as
            the recogniser's states, each of one spread, are along it, and ``(batch, 1, 1)``.
        """
        mapped = self._mapped(mel, "words")
        mapped = mapped[:, : mapped.shape[1] // 2 * 2]
        if loudest is None:
            loudest = mapped.amax((1, 2), keepdim=True)
        scaled = (torch.maximum(mapped, loudest - RANGE) + 4.0) / 4.0
        hidden = self.recogniser(scaled.transpose(1, 2)).float()
        content = self._projected(hidden) * self.spread
        return content - content.mean(1, keepdim=True), loudest

    def voice(self, mel: Tensor) -> Tensor:
        """Speaker embeddings ``(batch, 256)`` of unit norm of mels as in :meth:`words`."""
        with torch.autocast(mel.device.type, enabled=False):
            embedding: Tensor = self.speaker(torch.exp(self._mapped(mel, "voice")))
        return embedding

    def _projected(self, features: Tensor) -> Tensor:
        """``ContentSpace.project`` of ``(..., wide)``, with gradients."""
        space = (self.space.mean, self.space.scale, self.space.projection)
        return projected(features, *(torch.from_numpy(a).to(features.device) for a in space))

    def _mapped(self, mel: Tensor, name: str) -> Tensor:
        weight = self.maps[name]
        with torch.autocast(mel.device.type, enabled=False):
            mapped: Tensor = _stacked(mel.float()) @ weight[:-1] + weight[-1]
        return mapped


def fit_maps(recordings: Iterable[FloatArray]) -> dict[str, FloatArray]:
    """Ridge regressions from the vocoder's mel to those of recogniser and speaker encoder.

    Args:
        recordings: ``(samples,)`` at 16 kHz and at the level that the networks are trained at.

    Raises:
        TrainingError: there are none.

    Returns:
        ``words`` ``(241, 80)`` to the decimal log of Whisper's mel before it is scaled, and
        ``voice`` ``(241, 40)`` to the natural log of GE2E's.
    """
    size = NEIGHBOURS * HIFIGAN_MEL.bands + 1
    square = RIDGE * np.eye(size)
    products = {"words": np.zeros((size, 80)), "voice": np.zeros((size, GE2E_MEL.bands))}
    count = 0
    for samples in recordings:
        known, wanted = _pair(samples)
        count += 1
        square += known.T @ known
        for name, values in wanted.items():
            products[name] += known.T @ values
    if not count:
        raise TrainingError(
            "None of the recordings can be read any more; check that they are where they were."
        )
    solved = {name: np.linalg.solve(square, product) for name, product in products.items()}
    return {name: values.astype(np.float32) for name, values in solved.items()}


def stored_maps(path: Path, recordings: Iterable[FloatArray]) -> dict[str, FloatArray]:
    """Those that ``path`` holds; fitted and stored there where it is missing or damaged."""
    with suppress(FileNotFoundError, SafetensorError):
        return load_file(path)
    with atomic_write(path) as temporary:
        save_file(fit_maps(recordings), temporary)
    return load_file(path)


def _pair(samples: FloatArray) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """What the maps read of a recording, and what they should give."""
    at_rate = resample(samples, 16000, HIFIGAN_MEL.sample_rate)
    mel = torch.from_numpy(log_mel(at_rate, HIFIGAN_MEL).T.copy())[None]
    stacked = _stacked(mel)[0].double().numpy()
    energies = log_energies(samples)
    words = 4.0 * scaled(energies, energies.max()).T.astype(np.float64) - 4.0
    voice = np.log(log_mel(samples, GE2E_MEL).T.astype(np.float64) + QUIETEST)[1:]
    frames = min(len(stacked), len(words), len(voice))
    known = np.concatenate([stacked[:frames], np.ones((frames, 1))], axis=1)
    return known, {"words": words[:frames], "voice": voice[:frames]}


def _stacked(mel: Tensor) -> Tensor:
    """``(batch, frames, bands)`` to ``(batch, frames at 100 Hz, 3 * bands)``: each frame between
    its neighbours."""
    frames = mel.shape[1]
    # A frame of the vocoder's mel is centred in its hop.
    count = int((frames - 0.5) / HIFIGAN_MEL.frame_rate * MAP_RATE)
    at = (np.arange(count) + 1) / MAP_RATE * HIFIGAN_MEL.frame_rate - 0.5
    at = np.clip(at, 0, frames - 1)
    below = np.minimum(at.astype(np.int64), max(0, frames - 2))
    above = np.minimum(below + 1, frames - 1)
    share = torch.from_numpy((at - below).astype(np.float32)).to(mel.device)[None, :, None]
    between = mel[:, below] * (1 - share) + mel[:, above] * share
    reach = np.arange(NEIGHBOURS) - NEIGHBOURS // 2
    # The edges stand for what lies beyond them.
    rows = [np.clip(np.arange(count) + offset, 0, count - 1) for offset in reach]
    return torch.cat([between[:, row] for row in rows], dim=-1)
