"""Fine-tuning a converter to one voice: a few gradient steps on the voice's own speech.

A vector and a lookup tell a converter trained on few voices how a new one differs; they do not
make it that voice. The reference itself is training data: its content and pitch are known, and so
is the mel they should give. Some dozens of steps on random crops of it, each hidden from the
attention that looks into the reference, move an unseen speaker as close as a trained one
(test-time training, Sun et al. 2020; for voices: AdaSpeech, Chen et al. 2021).

What the steps learn is kept as the difference to the converter's weights, scaled down where the
voice's speech is short: a line between the two networks keeps more of what the wide training
taught, words above all, than its far end does (WiSE-FT, Wortsman et al. 2022).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from auto_voice.audio.mel import CEPSTRA_SIZE, random_warp
from auto_voice.models.converter_model import CompactConverter, pitch_inputs
from auto_voice.training.networks.generators import (
    ConverterNet,
    ConvNeXtBlock,
    Dropout,
    VoiceCondition,
)
from auto_voice.training.networks.loading import with_weights
from auto_voice.types import Voice

log = logging.getLogger(__name__)

# Layers that say how a voice sounds. Those before them say what is spoken: fitted too, they
# forget words, and the voice comes no closer.
LATE = ("embed", "describe", "mix", "film", "project", "head", "attention.out")
# Mel frames on both sides of a crop that the attention must not see.
GUARD_FRAMES = 16
# Of the voice that the attention sees in a step, 7.4 s: elsewhere each time.
SEEN_FRAMES = 640
# Ten seconds. From so much speech ``FineTuningPlan.steps`` learn what there is to learn.
SHORT_FRAMES = 860
# More speech is learnt from for longer, in proportion, up to this.
MOST_TIMES_LONGER = 2.5
# Of a voice: about 1.1 s. From less nothing can be learnt.
LEAST_FRAMES = 96


@dataclass(frozen=True)
class FineTuningPlan:
    """How far a converter goes towards a voice.

    Attributes:
        steps: of Adam, for speech of ten seconds or less; see ``steps_for``.
        rate: learning rate at its peak, falling to 0 along a line.
        share, most_share: of the learnt difference that is kept: the first from ten seconds of
            speech or less, the second from 25 s on, where it is more the voice and less the words
            that happened to be in it; in proportion between.
        crops: in a step.
        frames: of a crop at most.
        warp: spread of the log of the factor by which the cepstra of a crop are warped, where the
            content ends with some: they are the voice's own, and a source's will not be.
        noise, dropout: on the content of a crop and in the blocks, as in ``ConverterTask``: without
            them the words that happened to be said are learnt with the voice, and others forgotten.
        seed: of all that is drawn.
    """

    steps: int = 40
    rate: float = 1e-3
    share: float = 0.8
    most_share: float = 1.0
    crops: int = 8
    frames: int = 96
    warp: float = 0.15
    noise: float = 0.3
    dropout: float = 0.1
    seed: int = 0

    def steps_for(self, frames: int) -> int:
        """Steps for speech of so many mel frames."""
        return round(self.steps * _times_longer(frames))

    def share_for(self, frames: int) -> float:
        """What is kept of what speech of so many mel frames taught."""
        beyond = (_times_longer(frames) - 1) / (MOST_TIMES_LONGER - 1)
        return self.share + beyond * (self.most_share - self.share)


@dataclass(frozen=True, eq=False)
class Speech:
    """A voice's speech as ``ConverterNet`` sees it, on one device.

    Attributes:
        content: ``(frames, dims)`` at the mel rate.
        pitch: ``(frames, PITCH_SIZE)``.
        mel: ``(frames, bands)`` standardised.
        embedding: ``(256,)``.
        profile: ``(PROFILE_SIZE,)``.
    """

    content: Tensor
    pitch: Tensor
    mel: Tensor
    embedding: Tensor
    profile: Tensor


def _times_longer(frames: int) -> float:
    return min(max(frames / SHORT_FRAMES, 1.0), MOST_TIMES_LONGER)


def fine_tune(
    converter: CompactConverter,
    voice: Voice,
    steps: int,
    progress: Callable[[float], None] | None = None,
    plan: FineTuningPlan | None = None,
) -> Voice:
    """``voice`` with what the network of ``converter`` learns from its speech in ``steps``.

    Args:
        progress: called with the fraction done, from 0 to 1.

    Returns:
        A voice fine-tuned to this converter, about 6 MB larger; ``voice`` itself where it holds
        no speech with known pitch, or less than 1.1 s.
    """
    pitch, mel = voice.frames.get("pitch"), voice.frames.get("mel")
    if pitch is None or mel is None or voice.content_space != converter.content_space:
        return voice
    log_f0, voiced = np.ascontiguousarray(pitch.T)
    mean = voice.log_f0_mean if voice.log_f0_mean is not None else float(log_f0.mean())
    known = converter.conditioning(voice, mean, thinned=False)
    device = converter.device if converter.device.startswith("cuda") else "cpu"
    if not torch.cuda.is_available():
        device = "cpu"
    with torch.inference_mode(False):
        net = with_weights(
            lambda: ConverterNet(**asdict(converter.shape)), converter.weights, converter.name
        ).to(device)
        content, inputs, values, embedding, profile = (
            torch.from_numpy(np.ascontiguousarray(array)).to(device)
            for array in (
                known.keys, pitch_inputs(log_f0, voiced, mean), known.values, known.embedding,
                known.profile,
            )
        )  # fmt: skip
    speech = Speech(content, inputs, values, embedding, profile)
    learnt = difference(net, speech, replace(plan or FineTuningPlan(), steps=steps), progress)
    return (
        replace(voice, fine_tuning=learnt, fine_tuned_converter=converter.name) if learnt else voice
    )


def difference(
    net: ConverterNet,
    speech: Speech,
    plan: FineTuningPlan,
    progress: Callable[[float], None] | None = None,
) -> dict[str, NDArray[np.float16]]:
    """What to add to the weights of ``net`` to speak as in ``speech``.

    ``net`` itself stays as it is. The same speech, plan and thread count give the same numbers.
    The tensors of ``speech`` are no inference tensors.

    Args:
        progress: called with the fraction done, from 0 to 1.

    Returns:
        One half-precision array for each fitted parameter, by name; empty where the speech is
        shorter than ``LEAST_FRAMES``, or where what was learnt is not finite.
    """
    steps = plan.steps_for(len(speech.mel))
    if len(speech.mel) < LEAST_FRAMES or steps < 1:
        return {}
    with torch.inference_mode(False), torch.enable_grad():
        # A copy made in inference mode could not be trained.
        student = copy.deepcopy(net).train().requires_grad_(False)
        fitted = {n: p for n, p in student.named_parameters() if any(part in n for part in LATE)}
        for parameter in fitted.values():
            parameter.requires_grad_(True)
        _leave_out(student, plan)
        optimizer = Adam(list(fitted.values()), betas=(0.9, 0.98))
        rng = np.random.default_rng(plan.seed)
        for step in range(steps):
            loss = _loss(student, speech, plan, rng)
            optimizer.step(
                torch.autograd.grad(loss, optimizer.parameters),
                rate=plan.rate * min(1.0, (step + 1) / 5) * (1 - step / steps),
            )
            if progress is not None:
                progress((step + 1) / steps)
    before = dict(net.named_parameters())
    share = plan.share_for(len(speech.mel))
    learnt = {
        name: (share * (after.detach() - before[name].detach())).half().cpu().numpy()
        for name, after in fitted.items()
    }
    if not all(np.isfinite(values).all() for values in learnt.values()):
        log.warning("the fine-tuning to a voice diverged; the converter stays as it is")
        return {}
    return learnt


class Adam:
    """Algorithm 1 of Kingma and Ba (2015), as ``torch.optim.Adam`` computes it.

    That one imports torch's compiler at its first step, which takes a second and 70 MB: as long as
    a dozen steps of this fine-tuning.
    """

    def __init__(
        self, parameters: Sequence[Tensor], betas: tuple[float, float], epsilon: float = 1e-8
    ) -> None:
        self.parameters = parameters
        self._betas, self._epsilon = betas, epsilon
        self._means = [torch.zeros_like(p) for p in parameters]
        self._squares = [torch.zeros_like(p) for p in parameters]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """Moves the parameters against ``gradients``, one of the shape of each."""
        self._steps += 1
        first, second = self._betas
        size = rate / (1 - first**self._steps)
        correction = math.sqrt(1 - second**self._steps)
        moments = zip(self.parameters, gradients, self._means, self._squares, strict=True)
        for parameter, gradient, mean, square in moments:
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            spread = square.sqrt().div_(correction).add_(self._epsilon)
            parameter.addcdiv_(mean, spread, value=-size)


def _leave_out(net: Module, plan: FineTuningPlan) -> None:
    """Has the blocks of ``net`` leave out hidden values while it is fitted."""
    generator = torch.Generator().manual_seed(plan.seed)
    for module in net.modules():
        if isinstance(module, ConvNeXtBlock):
            module.dropout = Dropout(plan.dropout, generator)


def _loss(
    net: ConverterNet, speech: Speech, plan: FineTuningPlan, rng: np.random.Generator
) -> Tensor:
    """Mean distance of the mel of random crops, in standardised units."""
    total = len(speech.mel)
    length = min(plan.frames, total // 3)
    starts = [int(s) for s in rng.integers(0, total - length + 1, plan.crops)]
    seen = min(SEEN_FRAMES, total)
    first = int(rng.integers(0, total - seen + 1))
    visible = torch.ones(plan.crops, seen, dtype=torch.bool, device=speech.mel.device)
    for row, start in enumerate(starts):
        low, high = start - GUARD_FRAMES - first, start + length + GUARD_FRAMES - first
        visible[row, max(0, low) : max(0, high)] = False

    def cut(values: Tensor) -> Tensor:
        return torch.stack([values[start : start + length] for start in starts])

    def every(values: Tensor) -> Tensor:
        return values[None].expand(plan.crops, *values.shape)

    voice = VoiceCondition(
        every(speech.embedding),
        every(speech.profile),
        every(speech.content[first : first + seen]),
        every(speech.mel[first : first + seen]),
        visible,
    )
    content = cut(speech.content)
    if net.cepstra:
        warps = np.stack([random_warp(rng, plan.warp) for _ in starts])
        warp = torch.from_numpy(warps).to(content.device)
        cepstra = content[..., -CEPSTRA_SIZE:] @ warp
        content = torch.cat([content[..., :-CEPSTRA_SIZE], cepstra], dim=-1)
    if plan.noise:
        drawn = rng.standard_normal(content.shape, np.float32)
        content = content + plan.noise * torch.from_numpy(drawn).to(content.device)
    predicted = net(content, cut(speech.pitch), voice)
    loss: Tensor = (predicted - cut(speech.mel)).abs().mean()
    return loss
