"""What one training step computes: batches, networks, losses and held-out figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.envelope import CEPSTRA_SIZE, random_warp
from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.inference.shaping import warp_formants
from auto_voice.models.content_model import ContentNet
from auto_voice.models.converter_model import (
    MEL_MEAN,
    MEL_SCALE,
    ConverterNet,
    VoiceCondition,
    pitch_inputs,
    voice_profile,
)
from auto_voice.models.speaker_adaptation import GUARD_FRAMES
from auto_voice.training.augmentation import perturb
from auto_voice.training.corpus import Corpus, Item, crop
from auto_voice.training.discriminator import Adversary
from auto_voice.training.features import SPEEDS
from auto_voice.training.perceptual_losses import Ears
from auto_voice.types import FloatArray, Mel

CONTENT_RATE = 50.0
MIN_REFERENCE_FRAMES = 48
# Of the log of the factor of invented voices: two of three within a tenth of the original.
INVENTED_SPREAD = 0.1


# Of the vocoder's mel.
SILENCE = float(np.log(HIFIGAN_MEL.log_floor or 1e-5))

NetT = TypeVar("NetT", bound=nn.Module)


class Task(Protocol[NetT]):
    """A network and its loss."""

    model: NetT

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Terms of one random batch; ``loss`` is the one that is minimised."""
        ...

    def validate(self) -> dict[str, float]:
        """Figures on held-out speakers, from the same crops each time."""
        ...

    def score(self, figures: Mapping[str, float]) -> float:
        """The one number of ``validate`` that tells which network is best; less is better."""
        ...


class ContentTask:
    """The content encoder: teacher features of clean speech from a perturbed copy.

    Args:
        corpus, held_out: what to train and to validate on.
        net: arguments of ``ContentNet``.
        batch: crops in a step.
        frames: content frames in a crop.
    """

    def __init__(
        self, corpus: Corpus, held_out: Corpus, net: Mapping[str, Any], batch: int, frames: int
    ) -> None:
        self.model = ContentNet(**net)
        self.dims = self.model.head.out_features
        self.corpus, self.held_out = corpus, held_out
        self.batch, self.frames = batch, frames

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        crops = [self._crop(item, rng, 1.0) for item in self.corpus.draw(rng, self.batch)]
        error = self._error(crops)
        return {"loss": error, "r2": 1 - error.detach()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        figures = {}
        for name, strength in (("clean", 0.0), ("perturbed", 1.0)):
            rng = np.random.default_rng(0)
            crops = [self._crop(i, rng, strength) for i in self.held_out.draw(rng, 4 * self.batch)]
            figures[f"r2_{name}"] = 1 - float(self._error(crops))
        return figures

    def score(self, figures: Mapping[str, float]) -> float:
        """Share of the perturbed speech's content that is missed."""
        return 1 - figures["r2_perturbed"]

    def _error(self, crops: Sequence[tuple[FloatArray, FloatArray]]) -> Tensor:
        """Share of the target's energy that the prediction misses."""
        device = _device(self.model)
        mel, target = _pad([c[0] for c in crops], device), _pad([c[1] for c in crops], device)
        mask = _mask([len(c[1]) for c in crops], device)
        return _missed(self.model(mel.transpose(1, 2)).float(), target, mask)

    def _crop(
        self, item: Item, rng: np.random.Generator, strength: float
    ) -> tuple[FloatArray, FloatArray]:
        speed = SPEEDS[rng.integers(len(SPEEDS))] if strength else 1.0
        mel = item.features[f"content_mel_{speed}"]
        total = mel.shape[1] // 2
        part = crop(rng, total, self.frames)
        # Played at ``speed``, the teacher's frames pass at 50 * speed a second.
        target = item.cached(
            f"teacher_{speed}",
            lambda: interpolate_frames(
                item.features["teacher"][:, : self.dims].astype(np.float32),
                CONTENT_RATE * speed, CONTENT_RATE, total,
            ),
        )[part].astype(np.float32)  # fmt: skip
        seen = mel[:, 2 * part.start : 2 * part.stop].astype(np.float32)
        return perturb(seen, rng, strength).T, target


class ConverterTask:
    """The converter: the mel of speech from its content, its pitch and another sample of the voice.

    Args:
        corpus, held_out: what to train and to validate on.
        net: arguments of ``ConverterNet``.
        batch: crops in a step.
        frames: mel frames in a crop.
        reference_frames: mel frames of the reference at most.
        content: features that hold the content, one drawn for each crop, so that one converter
            understands several encoders of one space.
        bare: share of crops whose voice is the embedding alone.
        invented: share of crops in a voice that nobody has: crop and reference with all
            frequencies moved by one factor, and no embedding, so that the rest of the reference
            must tell who speaks (vocal tract length perturbation, Jaitly & Hinton 2013).
        warp: spread of the log of the factor by which the source's cepstra are warped, where the
            content ends with some; see ``cepstral_warp``.
        noise: spread of what is added at random to the content of the crop, whose components have a
            spread of one: a network that heard few voices must not tell them by their content.
        dropout: share of the hidden values of the blocks that a step leaves out (Srivastava et al.
            2014): little speech is learnt by heart otherwise.
        texture: weight of what a critic, trained against the converter, sees differently.
        real: weight of passing as real with that critic.
        swapped: crops in a step, besides ``batch``, that are spoken in the voice and at the height
            of another speaker (of the same, where there is only one), for the two that follow.
        said: weight of the share of the words that a recogniser misses in them; see ``Ears``.
        alike: weight of the distance to the other's voice in a speaker encoder, and of how much
            nearer to the voice of the source than the other's is.
        ears: of recogniser and speaker encoder, where they are asked.
    """

    def __init__(
        self,
        corpus: Corpus,
        held_out: Corpus,
        net: Mapping[str, Any],
        batch: int,
        frames: int,
        reference_frames: int,
        content: Sequence[str] = ("teacher",),
        bare: float = 0.1,
        invented: float = 0.0,
        noise: float = 0.0,
        warp: float = 0.15,
        dropout: float = 0.0,
        texture: float = 0.0,
        real: float = 0.0,
        swapped: int = 8,
        said: float = 0.0,
        alike: float = 0.0,
        ears: Ears | None = None,
    ) -> None:
        self.model = ConverterNet(**net)
        self.swapped, self.said, self.alike = swapped, said, alike
        self.ears = ears if swapped and (said or alike) else None
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.adversary = Adversary() if texture or real else None
        self.texture, self.real = texture, real
        self.corpus, self.held_out = corpus, held_out
        self.batch, self.frames, self.reference_frames = batch, frames, reference_frames
        self.content, self.bare = tuple(content), bare
        self.invented, self.noise, self.warp = invented, noise, warp

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        predicted, target, mask = self.forward(self.corpus, rng, self.batch)
        error = (predicted - target).abs().mean(-1)[mask].mean()
        terms = {"loss": error, "l1": error.detach() * MEL_SCALE}
        if self.adversary is not None:
            self.adversary.to(predicted.device)
            made = torch.where(mask[..., None], predicted, target)
            terms["critic"] = self.adversary.learn(made, target)
            terms["real"], terms["texture"] = self.adversary.complain(made, target)
            terms["loss"] = (
                terms["loss"] + self.real * terms["real"] + self.texture * terms["texture"]
            )
        if self.ears is not None:
            mel, terms["missed"], terms["unlike"] = self._heard(self.corpus, rng, self.swapped)
            terms["loss"] = (
                terms["loss"] + self.said * terms["missed"] + self.alike * terms["unlike"]
            )
            if self.adversary is not None and self.real:
                terms["real_swapped"] = self.adversary.suspicion(mel)
                terms["loss"] = terms["loss"] + self.real * terms["real_swapped"]
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Of the critic."""
        return self.adversary.state_dict() if self.adversary else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave, here or in the stage before; nothing changes nothing."""
        if self.adversary and state:
            # An optimiser's state goes where its parameters are, so they move first.
            self.adversary.to(_device(self.model))
            self.adversary.load_state_dict(state)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        figures = {}
        for name in dict.fromkeys(self.content):
            predicted, target, mask = self.forward(
                self.held_out, np.random.default_rng(0), 4 * self.batch, plainly=name
            )
            error = (predicted - target).abs().mean(-1)[mask].mean()
            detail = _detail(predicted)[mask].mean() / _detail(target)[mask].mean()
            figures[f"l1_{name}"] = float(error) * MEL_SCALE
            figures[f"detail_{name}"] = float(detail)
        if self.ears is not None:
            _, missed, unlike = self._heard(
                self.held_out, np.random.default_rng(0), 4 * self.swapped, plainly=True
            )
            figures |= {"missed": float(missed), "unlike": float(unlike)}
        return figures

    def score(self, figures: Mapping[str, float]) -> float:
        """Distance to the true mel, and with perceptual losses what they weigh of it."""
        distance = sum(figures[f"l1_{name}"] for name in dict.fromkeys(self.content))
        return (
            distance / MEL_SCALE / len(set(self.content))
            + self.said * figures.get("missed", 0.0)
            + self.alike * figures.get("unlike", 0.0)
        )

    def _heard(
        self, corpus: Corpus, rng: np.random.Generator, count: int, plainly: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Crops in the voices of others: the mels ``(batch, frames, bands)``, with silence behind
        the short ones, which share of the words is missed in them, and how far the voices of the
        whole ones are from those they should be, on the side of the source above all.

        Args:
            plainly: with no noise on the content.
        """
        assert self.ears is not None
        content, pitch, spoken, voices, own, others = [], [], [], [], [], []
        for item in corpus.draw(rng, count):
            other = corpus.stranger(rng, item)
            part = crop(rng, item.frames, self.frames)
            ear = self.content[rng.integers(len(self.content))]
            hidden = part if other is item else slice(0, 0)
            voice, log_f0_mean = self._voice(corpus, other, hidden, rng, ear)
            log_f0 = item.features["log_f0"][part] + np.float32(log_f0_mean - item.log_f0_mean)
            voiced = item.features["voiced"][part].astype(np.float32)
            content.append(self._said(item, part, rng, ear, 0.0 if plainly else self.noise))
            pitch.append(pitch_inputs(log_f0, voiced, log_f0_mean))
            spoken.append(item.features["mel"][:, part].T.astype(np.float32))
            voices.append(voice)
            own.append(item)
            others.append(other)
        device = _device(self.model)
        condition = _stack_voices(voices, device)
        mel = self.model(_pad(content, device), _pad(pitch, device), condition).float()
        made, true = mel * MEL_SCALE + MEL_MEAN, _pad(spoken, device)
        lengths = [len(mel) for mel in spoken]
        mask = _mask(lengths, device)[..., None]
        silence = true.new_tensor(SILENCE)
        made, true = torch.where(mask, made, silence), torch.where(mask, true, silence)
        missed = unlike = true.new_zeros(())
        if self.said:
            with torch.no_grad():
                words, loudest = self.ears.words(true)
            heard, _ = self.ears.words(made, loudest)
            missed = (heard - words).square().sum() / words.square().sum()
        # Silence would pull every voice towards one point.
        whole = [row for row, length in enumerate(lengths) if length == max(lengths)]
        if self.alike:
            known = (np.stack([self._own_voice(x[row]) for row in whole]) for x in (others, own))
            target, source = (torch.from_numpy(values).to(device) for values in known)
            unlike = _unlike(self.ears.voice(made[whole]), target, source).mean()
        return (made - MEL_MEAN) / MEL_SCALE, missed, unlike

    def _own_voice(self, item: Item) -> FloatArray:
        """``(256,)`` of unit norm: what the speaker encoder hears in crops of the item itself."""
        ears, frames = self.ears, self.frames
        assert ears is not None

        @torch.no_grad()
        def listen() -> FloatArray:
            mel = torch.from_numpy(item.features["mel"].astype(np.float32).T).to(ears.device)
            count = max(1, len(mel) // frames)
            crops = torch.stack([mel[i * frames : (i + 1) * frames] for i in range(count)])
            heard = F.normalize(ears.voice(crops).mean(0), dim=0)
            return np.asarray(heard.cpu().numpy(), np.float32)

        return item.cached(f"voice_in_{frames}", listen).astype(np.float32)

    def _said(
        self, item: Item, part: slice, rng: np.random.Generator, ear: str, noise: float
    ) -> FloatArray:
        """``(frames, dims)`` of content as the network hears it in training."""
        said = mel_rate_content(item, ear)[part].astype(np.float32)
        if self.model.cepstra:
            # Held-out figures, too, are those of a source with another mouth.
            said[:, -CEPSTRA_SIZE:] = said[:, -CEPSTRA_SIZE:] @ random_warp(rng, self.warp)
        if noise:
            said += np.float32(noise) * rng.standard_normal(said.shape, np.float32)
        return said

    def forward(
        self,
        corpus: Corpus,
        rng: np.random.Generator,
        count: int,
        plainly: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mels ``(batch, frames, bands)``, predicted and true, and which frames count.

        Args:
            plainly: the one content feature to hear, with no noise and nobody invented.
        """
        ears = self.content if plainly is None else (plainly,)
        invented, noise = (self.invented, self.noise) if plainly is None else (0.0, 0.0)
        content, pitch, target, voices = [], [], [], []
        for item in corpus.draw(rng, count):
            part = crop(rng, item.frames, self.frames)
            ear = ears[rng.integers(len(ears))]
            moved = invented > 0 and rng.random() < invented
            factor = float(np.exp(rng.normal(0, INVENTED_SPREAD))) if moved else 1.0
            voice, log_f0_mean = self._voice(corpus, item, part, rng, ear, factor)
            features = item.features
            log_f0 = features["log_f0"][part] + np.float32(np.log(factor))
            voiced = features["voiced"][part].astype(np.float32)
            content.append(self._said(item, part, rng, ear, noise))
            pitch.append(pitch_inputs(log_f0, voiced, log_f0_mean))
            target.append(standardise(_warped(features["mel"][:, part], factor)))
            voices.append(voice)
        device = _device(self.model)
        heard = _stack_voices(voices, device)
        predicted = self.model(_pad(content, device), _pad(pitch, device), heard).float()
        return predicted, _pad(target, device), _mask([len(t) for t in target], device)

    def _voice(
        self,
        corpus: Corpus,
        item: Item,
        part: slice,
        rng: np.random.Generator,
        heard: str,
        factor: float = 1.0,
    ) -> tuple[tuple[FloatArray, ...], float]:
        """Embedding, profile, keys and values from elsewhere in the speaker's speech.

        Args:
            factor: that every frequency of the voice is moved by.
        """
        other = corpus.companion(rng, item)
        frames = np.arange(other.frames)
        if other is item:
            hidden = (frames >= part.start - GUARD_FRAMES) & (frames < part.stop + GUARD_FRAMES)
            frames = frames[~hidden]
        length = int(rng.integers(self.reference_frames // 4, self.reference_frames + 1))
        frames = frames[crop(rng, len(frames), length)]
        embedding = other.features["embedding"] * np.float32(factor == 1.0)
        log_f0_mean = other.log_f0_mean + float(np.log(factor))
        dims = other.features[heard].shape[1]
        if len(frames) < MIN_REFERENCE_FRAMES or rng.random() < self.bare:
            bands = HIFIGAN_MEL.bands
            nothing = np.zeros((0, dims), np.float32), np.zeros((0, bands), np.float32)
            return (embedding, np.zeros(2 * bands + 2, np.float32), *nothing), log_f0_mean
        mel = _warped(other.features["mel"][:, frames], factor)
        keys = mel_rate_content(other, heard)[frames].astype(np.float32)
        profile = voice_profile(mel, log_f0_mean, other.log_f0_std)
        return (embedding, profile, keys, standardise(mel)), log_f0_mean


def mel_rate_content(item: Item, feature: str) -> FloatArray:
    """A content feature ``(time, dims)`` at 50 Hz as ``(frames, dims)`` float16 at the mel rate."""
    return item.cached(
        f"{feature}_at_mel_rate",
        lambda: interpolate_frames(
            item.features[feature].astype(np.float32),
            CONTENT_RATE, HIFIGAN_MEL.frame_rate, item.frames,
        ),
    )  # fmt: skip


def standardise(mel: FloatArray) -> FloatArray:
    """Natural-log mel to the scale that networks see."""
    return np.asarray((mel.astype(np.float32) - MEL_MEAN) / MEL_SCALE, np.float32)


def _warped(mel: FloatArray, factor: float) -> FloatArray:
    """``(bands, frames)`` as ``(frames, bands)`` with every frequency times ``factor``."""
    values = mel.astype(np.float32)
    if factor != 1.0:
        values = warp_formants(
            Mel(values, HIFIGAN_MEL.sample_rate, HIFIGAN_MEL.hop_samples), factor
        ).values
    out: FloatArray = values.T
    return out


def _missed(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Share of the target's energy that the prediction misses."""
    share: Tensor = (predicted - target)[mask].square().sum() / target[mask].square().sum()
    return share


def _unlike(voice: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """``(batch,)``: how far voices ``(batch, dims)`` of unit norm are from those they should be,
    and how much nearer to the source's than those are."""
    left = ((voice - target) * source).sum(-1)
    return 1 - (voice * target).sum(-1) + F.relu(left)


def _detail(mel: Tensor) -> Tensor:
    """How much neighbouring bands differ, ``(batch, frames)``: falls when a mel is blurred."""
    bend: Tensor = mel[..., 2:] - 2 * mel[..., 1:-1] + mel[..., :-2]
    return bend.abs().mean(-1)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _pad(rows: Sequence[FloatArray], device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    out = np.zeros((len(rows), longest, rows[0].shape[1]), np.float32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out).to(device)


def _mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)


def _stack_voices(voices: Sequence[tuple[FloatArray, ...]], device: torch.device) -> VoiceCondition:
    embedding, profile = (
        torch.from_numpy(np.stack([v[i] for v in voices])).to(device) for i in (0, 1)
    )
    keys, values = _pad([v[2] for v in voices], device), _pad([v[3] for v in voices], device)
    mask = _mask([len(v[2]) for v in voices], device)
    return VoiceCondition(embedding, profile, keys, values, mask)
