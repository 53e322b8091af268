"""A vocoder of fewer operations, made of another: channels are left out, the rest is fitted and
then taught to give what the whole one gives (distillation, Hinton et al. 2015).

Between the two convolutions of each residual step of HiFi-GAN some channels are left out, those
that contribute least, and the second convolution is fitted again by least squares, so that it makes
up for what the steps before it lost (as He et al. 2017 do with images). No adversary is needed: the
whole vocoder says for any mel what the sound should be, and what each stage should give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.errors import AutoVoiceError, TrainingError
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.training.data import Utterance
from auto_voice.training.features import prepare
from auto_voice.training.networks.generators import SLOPE, HiFiGANNet
from auto_voice.training.trainer import fast_bfloat16
from auto_voice.types import SPEECH_RATE, FloatArray

# Frames and crops of speech that channels are chosen and convolutions are fitted on.
FITTED_FRAMES, FITTED_CROPS = 64, 40
# Ridge of the least squares, as a share of the mean square of what they read.
RIDGE = 1e-4
# Positions of the long, narrow stages that they read: every third one.
SPARSE_CHANNELS, SPARSE_STEP = 64, 3
# Spread of the level of a crop in nats.
LEVEL_SPREAD = 0.5
# Frames beyond its end of which a live crop sees some, and these at least.
LEAST_AHEAD = 3
# Windows of the spectra that are compared, in samples, and the quietest magnitude that counts.
WINDOWS = (256, 512, 1024, 2048)
QUIETEST = 1e-3
# Crops on which is validated, for each crop of a step.
HELD_OUT_CROPS = 4


def mels(utterances: Sequence[Utterance]) -> tuple[list[FloatArray], dict[Path, str]]:
    """``(bands, frames)`` float16 of each recording, as a vocoder takes it, and what is wrong with
    those that cannot be used."""
    found: list[FloatArray] = []
    failures: dict[Path, str] = {}
    for utterance in tqdm(utterances, desc="mels", unit="file", disable=None):
        try:
            samples = prepare(utterance)
        except AutoVoiceError as error:
            failures[utterance.path] = str(error)
            continue
        at_rate = resample(samples, SPEECH_RATE, HIFIGAN_MEL.sample_rate)
        mel: FloatArray = log_mel(at_rate, HIFIGAN_MEL).astype(np.float16)
        found.append(mel)
    return found, failures


class VocoderTask:
    """A HiFi-GAN with fewer channels: for each mel, what the whole one gives.

    Args:
        train, held_out: mels ``(bands, frames)`` to train and to validate on.
        teacher: the whole vocoder.
        shape: its sizes.
        batch: crops in a step.
        frames: mel frames in a crop.
        hidden_share: see ``HiFiGANShape``.
        live: share of the crops of which no more is seen, beyond the frames that are judged, than
            a live conversion has: a few frames, and then the last one again and again.
        fixed_stages: first stages, with what is before them, that stay as they were fitted. They
            decide where each wave lies.

    Raises:
        TrainingError: no recording is long enough, or numbers that cannot be.
    """

    def __init__(
        self,
        train: Sequence[FloatArray],
        held_out: Sequence[FloatArray],
        teacher: HiFiGANNet,
        shape: HiFiGANShape,
        batch: int,
        frames: int,
        hidden_share: float = 0.5,
        live: float = 0.5,
        fixed_stages: int = 1,
    ) -> None:
        if not 0 < hidden_share <= shape.hidden_share:
            raise TrainingError(
                f"vocoder.task.hidden_share is {hidden_share}; choose a share above 0 and up to "
                f"{shape.hidden_share}, that of the vocoder it is made of."
            )
        if shape.bands != HIFIGAN_MEL.bands or shape.hop_samples != HIFIGAN_MEL.hop_samples:
            raise TrainingError(
                "vocoder_from takes other mels than a converter gives; name one with "
                f"{HIFIGAN_MEL.bands} bands and a hop of {HIFIGAN_MEL.hop_samples} samples."
            )
        least = -(-max(WINDOWS) // shape.hop_samples)
        if frames < least:
            raise TrainingError(f"vocoder.task.frames is {frames}; make it {least} or more.")
        self.ahead = shape.context_frames
        self.batch, self.frames, self.live = batch, frames, live
        self.teacher, self.hop_samples = teacher.eval().requires_grad_(False), shape.hop_samples
        long = frames + self.ahead
        self.train, self.held_out = (
            [mel for mel in part if mel.shape[1] >= long] for part in (train, held_out)
        )
        if not self.train or not self.held_out:
            seconds = long / HIFIGAN_MEL.frame_rate
            raise TrainingError(
                f"A vocoder is taught on recordings of {seconds:.1f} s and more, and there are "
                "none to train on or to hold out; add longer ones."
            )
        self.shape = replace(shape, hidden_share=hidden_share)
        rng = np.random.default_rng(0)
        sample = _crops(self.train, rng, FITTED_CROPS, min(FITTED_FRAMES, long))
        device = next(teacher.parameters()).device
        self.model = pruned(teacher, self.shape, sample.to(device))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not self._fixed(name, fixed_stages))

    def _fixed(self, name: str, stages: int) -> bool:
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "resblocks":
            return int(number) < stages * self.model.branches
        return stages > 0 and (kind == "conv_pre" or (kind == "ups" and int(number) < stages))

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        mel = _crops(self.train, rng, self.batch, self.frames + self.ahead)
        mel += torch.from_numpy(rng.normal(0, LEVEL_SPREAD, (self.batch, 1, 1)).astype(np.float32))
        live = [int(rng.integers(LEAST_AHEAD, self.ahead)) for _ in range(self.batch)]
        seen = [ahead if rng.random() < self.live else self.ahead for ahead in live]
        return self._terms(mel, seen)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, ahead in (("", self.ahead), ("_live", self.ahead // 2)):
            rng = np.random.default_rng(0)
            sums: dict[str, float] = {}
            for _ in range(HELD_OUT_CROPS):
                mel = _crops(self.held_out, rng, self.batch, self.frames + self.ahead)
                for key, value in self._terms(mel, [ahead] * self.batch).items():
                    sums[key] = sums.get(key, 0.0) + float(value) / HELD_OUT_CROPS
            figures |= {f"{key}{name}": value for key, value in sums.items()}
        return figures

    def score(self, figures: Mapping[str, float]) -> float:
        return figures["loss"] + figures["loss_live"]

    def _terms(self, mel: Tensor, ahead: Sequence[int]) -> dict[str, Tensor]:
        """How far the sound of ``(batch, bands, frames + context)`` is from the teacher's.

        Args:
            ahead: of each crop, frames that are seen beyond those that are judged.
        """
        device = next(self.model.parameters()).device
        seen = mel.clone()
        for row, count in zip(seen, ahead, strict=True):
            row[:, self.frames + count :] = row[:, self.frames + count - 1 : self.frames + count]
        half = torch.is_grad_enabled() and fast_bfloat16(str(device), convolutions=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            with torch.no_grad():
                wanted = self.teacher.to(device).states(mel.to(device))
            given = self.model.states(seen.to(device))
        judged = [
            tuple(x[..., : x.shape[-1] * self.frames // mel.shape[2]].float() for x in pair)
            for pair in zip(given, wanted, strict=True)
        ]
        *states, (sound, true) = judged
        terms = {
            f"stage_{number}": (x - y).square().mean() / y.var(-1, keepdim=True).mean()
            for number, (x, y) in enumerate(states, 1)
        }
        terms["wave"] = (sound - true).abs().mean() / true.abs().mean()
        terms["spectrum"] = torch.stack(
            [_spectral_distance(sound[:, 0], true[:, 0], window) for window in WINDOWS]
        ).mean()
        total = torch.stack(list(terms.values())).sum()
        return {"loss": total, **{name: value.detach() for name, value in terms.items()}}


def _spectral_distance(sound: Tensor, true: Tensor, window: int) -> Tensor:
    """Of ``(batch, samples)``: spectral convergence and the distance of the logarithms (Arık et al.
    2019; Yamamoto et al. 2020)."""
    shape = torch.hann_window(window, device=sound.device)
    a, b = (
        torch.stft(x, window, window // 4, window, shape, center=False, return_complex=True).abs()
        for x in (sound, true)
    )
    logs = (torch.log(a + QUIETEST) - torch.log(b + QUIETEST)).abs().mean()
    distance: Tensor = (a - b).norm() / b.norm() + logs
    return distance


@torch.no_grad()
def pruned(teacher: HiFiGANNet, shape: HiFiGANShape, mel: Tensor) -> HiFiGANNet:
    """``teacher`` with fewer hidden channels.

    Args:
        shape: sizes of the result, whose ``hidden_share`` is below that of the teacher.
        mel: ``(batch, bands, frames)`` of speech.
    """
    net = HiFiGANNet(shape).to(mel.device).eval()
    own = net.state_dict()
    same = {n: v for n, v in teacher.state_dict().items() if own[n].shape == v.shape}
    net.load_state_dict(same, strict=False)
    x = wanted = teacher.conv_pre(mel)
    for stage, up in enumerate(teacher.ups):
        x, wanted = (up(F.leaky_relu(values, SLOPE)) for values in (x, wanted))
        sums = [torch.zeros_like(x), torch.zeros_like(x)]
        for number in range(stage * net.branches, (stage + 1) * net.branches):
            y, true = x, wanted
            whole: Any = teacher.resblocks[number]
            small: Any = net.resblocks[number]
            for convs in zip(whole.convs1, whole.convs2, small.convs1, small.convs2, strict=True):
                y, true = _pruned_step(*convs, y, true)
            sums[0] += y
            sums[1] += true
        x, wanted = (total / net.branches for total in sums)
    return net


def _pruned_step(
    first: nn.Conv1d, second: nn.Conv1d, small_first: nn.Conv1d, small_second: nn.Conv1d,
    x: Tensor, true: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fits ``small_first`` and ``small_second`` to stand for ``first`` and ``second``.

    Args:
        x, true: what the small and the whole network have before this step.

    Returns:
        What they have after it.
    """
    true = true + second(F.leaky_relu(first(F.leaky_relu(true, SLOPE)), SLOPE))
    hidden = F.leaky_relu(first(F.leaky_relu(x, SLOPE)), SLOPE)
    contribution = hidden.var((0, 2)) * second.weight.square().sum((0, 2))
    kept = contribution.argsort(descending=True)[: small_second.in_channels].sort().values
    small_first.load_state_dict({n: values[kept] for n, values in first.state_dict().items()})
    weight, bias = _least_squares(hidden[:, kept], true - x, second.kernel_size[0])
    small_second.load_state_dict({"weight": weight, "bias": bias})
    return x + small_second(hidden[:, kept]), true


def _least_squares(x: Tensor, wanted: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """Weight ``(out, in, kernel)`` and bias of the convolution that leads from ``(batch, in,
    samples)`` nearest to ``(batch, out, samples)``."""
    inside, outside = x.shape[1], wanted.shape[1]
    size = inside * kernel + 1
    square = x.new_zeros(size, size, dtype=torch.float64)
    product = x.new_zeros(size, outside, dtype=torch.float64)
    step = SPARSE_STEP if outside <= SPARSE_CHANNELS else 1
    for row, target in zip(F.pad(x, (kernel // 2, kernel // 2)), wanted, strict=True):
        taken = row.unfold(1, kernel, 1)[:, ::step].permute(1, 0, 2).flatten(1)
        known = F.pad(taken, (0, 1), value=1.0)
        square += (known.T @ known).double()
        product += (known.T @ target.T[::step]).double()
    ridge = RIDGE * square.diagonal().mean()
    square.diagonal().add_(ridge)
    found = torch.linalg.solve(square, product).float()
    return found[:-1].T.reshape(outside, inside, kernel), found[-1]


def _crops(mels: Sequence[FloatArray], rng: np.random.Generator, count: int, frames: int) -> Tensor:
    """``(count, bands, frames)`` of random recordings, none of which is shorter."""
    found = []
    for _ in range(count):
        mel = mels[int(rng.integers(len(mels)))]
        start = int(rng.integers(mel.shape[1] - frames + 1))
        found.append(mel[:, start : start + frames].astype(np.float32))
    return torch.from_numpy(np.stack(found))
