"""What one training step computes: batches, networks, losses and held-out figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.mel import CEPSTRA_SIZE, HIFIGAN_MEL, random_warp
from auto_voice.errors import TrainingError
from auto_voice.inference.effects import warp_formants
from auto_voice.models.converter_model import (
    MEL_MEAN,
    MEL_SCALE,
    pitch_inputs,
    voice_profile,
)
from auto_voice.models.whisper_encoder import ContentSpace, scaled
from auto_voice.training.corpus import (
    Aligned,
    Corpus,
    LoadedUtterance,
    crop,
    perturb,
    smooth_response,
)
from auto_voice.training.features import PERTURBED, WHISPER_ENERGIES
from auto_voice.training.fine_tuning import GUARD_FRAMES
from auto_voice.training.losses import AdversarialLoss, PerceptualLosses
from auto_voice.training.networks.encoders import ContentNet
from auto_voice.training.networks.generators import ConverterNet, VoiceCondition
from auto_voice.types import FloatArray, Mel

# Frames a second of every content encoder.
CONTENT_RATE = 50.0
# Frames of the blocks that a content encoder learns to be given, and those beyond a block that it
# sees: 80 to 320 ms, 20 to 120 ms. It is validated with about what a live conversion has.
SHORTEST_BLOCK, LONGEST_BLOCK = 4, 16
SHORTEST_LOOKAHEAD, LONGEST_LOOKAHEAD = 1, 6
LIVE = (8, 5)
# Weight of the content's mean in the loss: utterances are centred, but a stream begins before its
# mean is known.
MEAN_WEIGHT = 0.1
# Share of the crops that do not begin at the first position.
LATER = 0.5
# Crops that a content encoder's first subspace is found from, and its ridge for each frame.
SUBSPACE_SAMPLE, SUBSPACE_RIDGE = 200, 0.01
# From decimal to natural logs.
NATURAL = np.float32(np.log(10.0))
# Mel frames, 0.56 s: about the half second that cloning asks for.
MIN_REFERENCE_FRAMES = 48
# Standard deviation of the natural log of the VTLP factor: two of three lie within a tenth of 1.
VTLP_SPREAD = 0.1


# Of the vocoder's mel.
SILENCE = float(np.log(HIFIGAN_MEL.log_floor or 1e-5))

NetT = TypeVar("NetT", bound=nn.Module)
# Content, pitch inputs and standardised mel of a crop, each ``(frames, …)``, and its voice.
Crop: TypeAlias = "tuple[FloatArray, FloatArray, FloatArray, tuple[FloatArray, ...]]"


@dataclass(frozen=True, eq=False)
class VoiceChange:
    """A change that turns the voice of a recording into one that nobody has.

    Attributes:
        factor: every frequency is multiplied by it.
        response: ``(bands,)`` nats added to the mel: another throat, room or microphone.
    """

    factor: float = 1.0
    response: FloatArray | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator, response_db: float) -> VoiceChange:
        """Another vocal tract length, and where ``response_db`` is not 0 another response."""
        factor = float(np.exp(rng.normal(0, VTLP_SPREAD)))
        if not response_db:
            return cls(factor)
        # In nats of power, where this mel is of amplitudes. The mean over the bands stays.
        response = smooth_response(rng, HIFIGAN_MEL.bands, response_db) / 2
        return cls(factor, (response - response.mean()).astype(np.float32))

    @property
    def log_factor(self) -> float:
        return math.log(self.factor)

    def __call__(self, mel: FloatArray) -> FloatArray:
        """``(bands, frames)`` as ``(frames, bands)`` in the changed voice."""
        values = mel.astype(np.float32)
        if self.factor != 1.0:
            values = warp_formants(
                Mel(values, HIFIGAN_MEL.sample_rate, HIFIGAN_MEL.hop_samples), self.factor
            ).values
        out: FloatArray = values.T
        if self.response is not None:
            out = np.maximum(out + self.response, np.float32(SILENCE))
        return out


UNCHANGED = VoiceChange()


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
    """The content encoder: the teacher's features of clean speech, from that or a perturbed copy,
    and from all of it or as a stream brings it.

    Args:
        corpus, held_out: what to train and to validate on.
        model: the first layers of the teacher; without a subspace, it begins with the best one.
        batch: crops in a step.
        frames: content frames in a crop.
        perturbed: share of the crops that are perturbed.
        streamed: share of the crops that come in blocks, of ``SHORTEST_BLOCK`` to ``LONGEST_BLOCK``
            frames, with ``SHORTEST_LOOKAHEAD`` to ``LONGEST_LOOKAHEAD`` more in sight.

    Half of the crops begin at the first of the network's positions, the others anywhere, since
    recordings and streams are longer than a crop.
    """

    def __init__(
        self,
        corpus: Corpus,
        held_out: Corpus,
        model: ContentNet,
        batch: int,
        frames: int,
        perturbed: float = 0.5,
        streamed: float = 0.5,
    ) -> None:
        self.model = model
        self.dims = model.projection.shape[1]
        self.corpus, self.held_out = corpus, held_out
        self.batch, self.frames = batch, frames
        self.perturbed, self.streamed = perturbed, streamed
        if not bool(model.projection.any()):
            self._begin()

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        errors = []
        for item in self.corpus.draw(rng, self.batch):
            strength = float(rng.random() < self.perturbed)
            start = block = lookahead = 0
            if rng.random() < LATER:
                start = int(rng.integers(self.model.shape.positions - self.frames + 1))
            if rng.random() < self.streamed:
                block = int(rng.integers(SHORTEST_BLOCK, LONGEST_BLOCK + 1))
                lookahead = int(rng.integers(SHORTEST_LOOKAHEAD, LONGEST_LOOKAHEAD + 1))
            errors.append(self._errors(item, rng, strength, (start, block, lookahead)))
        missed, mean, energy = torch.stack(errors).sum(0)
        error = missed / energy
        return {"loss": error + MEAN_WEIGHT * mean / energy, "r2": 1 - error.detach()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        last = self.model.shape.positions - self.frames
        figures = {}
        for name, strength, place in (
            ("clean", 0.0, (0, 0, 0)),
            ("perturbed", 1.0, (last // 2, 0, 0)),
            ("streamed", 0.0, (0, *LIVE)),
        ):
            rng = np.random.default_rng(0)
            items = self.held_out.draw(rng, 4 * self.batch)
            errors = torch.stack([self._errors(item, rng, strength, place) for item in items])
            missed, _, energy = errors.sum(0).tolist()
            figures[f"r2_{name}"] = 1 - missed / energy
        return figures

    def score(self, figures: Mapping[str, float]) -> float:
        """Share of the content that is missed, in the mean over the ways that it is heard."""
        return 1 - sum(figures.values()) / len(figures)

    def _errors(
        self,
        item: LoadedUtterance,
        rng: np.random.Generator,
        strength: float,
        place: tuple[int, int, int],
    ) -> Tensor:
        """``(3,)`` of a crop: energy of its centred content that the prediction misses, energy of
        the prediction's mean, and energy of the content.

        Args:
            strength: of the perturbation.
            place: first position, block and look-ahead; see ``ContentNet``.
        """
        energies, target = self._crop(item, rng, strength)
        mel = scaled(energies, running_peak(energies, *place[1:]))
        device = _device(self.model)
        wanted, seen = torch.from_numpy(target).to(device), torch.from_numpy(mel)[None].to(device)
        content = self.model(seen, *place)[0].float()
        mean = content.mean(0)
        missed = (content - mean - wanted).square().sum()
        return torch.stack([missed, len(content) * mean.square().sum(), wanted.square().sum()])

    def _crop(
        self, item: LoadedUtterance, rng: np.random.Generator, strength: float
    ) -> tuple[FloatArray, FloatArray]:
        """``log_energies`` ``(80, 2 * frames)`` and centred content ``(frames, dims)``."""
        teacher = item.features["teacher"][:, : self.dims]
        part = crop(rng, len(teacher), self.frames)
        target = teacher[part].astype(np.float32)
        energies = item.features[WHISPER_ENERGIES][:, 2 * part.start : 2 * part.stop]
        # Perturbations count in natural logs.
        heard = perturb(energies.astype(np.float32) * NATURAL, rng, strength) / NATURAL
        return heard, target - target.mean(0)

    @torch.no_grad()
    def _begin(self) -> None:
        """The subspace of the network as it is: where its states lie, and the linear map of them
        that is nearest to the teacher's content."""
        rng = np.random.default_rng(0)
        crops = [self._crop(i, rng, 0.0) for i in self.corpus.draw(rng, SUBSPACE_SAMPLE)]
        mels = (torch.from_numpy(scaled(heard, heard.max()))[None] for heard, _ in crops)
        states = [self.model.states(mel)[0].numpy() for mel in mels]
        space = ContentSpace.fit(states, 1)
        self.model.mean.copy_(torch.from_numpy(space.mean))
        self.model.scale.copy_(torch.from_numpy(space.scale))
        every = np.concatenate([s - s.mean(0) for s in map(space.standardised, states)])
        x, y = every.astype(np.float64), np.concatenate([target for _, target in crops])
        penalty = SUBSPACE_RIDGE * len(x) * np.eye(x.shape[1])
        found = np.linalg.solve(x.T @ x + penalty, x.T @ y.astype(np.float64))
        self.model.projection.copy_(torch.from_numpy(found.astype(np.float32)))


def running_peak(energies: FloatArray, block: int, lookahead: int) -> FloatArray:
    """``(1,)`` or, in blocks, ``(2 * frames,)`` loudest of ``log_energies`` that is known so far,
    as ``WhisperStream`` finds it."""
    loudest = np.maximum.accumulate(energies.max(axis=0))
    if not block:
        return loudest[-1:]
    frames = np.arange(len(loudest)) // 2
    known = (frames // block + 1) * block + lookahead
    found: FloatArray = loudest[np.minimum(2 * known, len(loudest)) - 1]
    return found


class ConverterTask:
    """The converter: the mel of speech from its content, its pitch and another sample of the voice.

    Args:
        corpus, held_out: what to train and to validate on.
        net: arguments of ``ConverterNet``.
        batch: crops in a step.
        frames: mel frames in a crop.
        reference_frames: mel frames of the reference at most.
        references: recordings that these are drawn from, where one is too short; embedding and
            pitch are those of the first.
        content: features that hold the content, one drawn for each crop, so that one converter
            understands several encoders of one space.
        embedding_only: share of crops whose voice is the embedding alone.
        vtlp: share of crops in a voice that nobody has: crop and reference with all
            frequencies moved by one factor, and no embedding, so that the rest of the reference
            must tell who speaks (vocal tract length perturbation, Jaitly & Hinton 2013). So are
            ``parallel`` and ``back_translated`` crops, whose content stays.
        response_db: of a smooth random response that crop and reference of those get, too: its
            spread over the bands is about half of this.
        cepstral_vtlp: spread of the log of the factor by which the source's cepstra are warped,
            where the content ends with some; see ``cepstral_warp``.
        noise: spread of what is added at random to the content of the crop, whose components have a
            spread of one: a network that saw few speakers must not recognise them by their content.
        dropout: share of the hidden values of the blocks that a step leaves out (Srivastava et al.
            2014): little speech is learnt by heart otherwise.
        feature_matching_loss: weight of the distance between the discriminator's activations of
            predicted and true mels (Larsen et al. 2016).
        adversarial_loss: weight of the least-squares adversarial loss (Mao et al. 2017).
        cross_speaker: crops in a step, besides ``batch``, that are converted to the voice and the
            pitch of another speaker (of the same, where there is only one), for the two losses
            that follow.
        content_loss: weight of the share of the recogniser's states that they miss; see
            ``PerceptualLosses``.
        speaker_loss: weight of their distance to the target in a speaker encoder, and of how much
            nearer to the source they are than the target is.
        perceptual: losses by a frozen recogniser and speaker encoder, where ``content_loss`` or
            ``speaker_loss`` is set.
        parallel: crops in a step, besides ``batch``, whose content comes from one timbre of aligned
            parallel speech and whose target is the mel of another: nothing in the content tells
            whose mel is wanted.
        back_translated: crops in a step, besides those, whose content comes from what a converter
            made of a real recording and whose target is that recording.
        perturbed: share of the crops in their own voice whose content is that of a copy with other
            formants, where there is one.
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
        embedding_only: float = 0.1,
        vtlp: float = 0.0,
        noise: float = 0.0,
        cepstral_vtlp: float = 0.15,
        dropout: float = 0.0,
        feature_matching_loss: float = 0.0,
        adversarial_loss: float = 0.0,
        cross_speaker: int = 8,
        content_loss: float = 0.0,
        speaker_loss: float = 0.0,
        perceptual: PerceptualLosses | None = None,
        parallel: int = 0,
        back_translated: int = 0,
        perturbed: float = 0.0,
        references: int = 1,
        response_db: float = 0.0,
    ) -> None:
        self.model = ConverterNet(**net)
        self.parallel, self.back_translated, self.perturbed = parallel, back_translated, perturbed
        for count, groups, what in (
            (parallel, corpus.parallel, "parallel"),
            (back_translated, corpus.converted, "back_translated"),
        ):
            if count and not groups:
                raise TrainingError(
                    f"The recipe asks for {what} crops and the speech has none; list aligned "
                    "recordings with the column parallel, or leave it out."
                )
        self.cross_speaker = cross_speaker
        self.content_loss, self.speaker_loss = content_loss, speaker_loss
        self.perceptual = perceptual if cross_speaker and (content_loss or speaker_loss) else None
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.adversary = AdversarialLoss() if feature_matching_loss or adversarial_loss else None
        self.feature_matching_loss, self.adversarial_loss = feature_matching_loss, adversarial_loss
        self.corpus, self.held_out = corpus, held_out
        self.batch, self.frames, self.reference_frames = batch, frames, reference_frames
        self.content, self.embedding_only = tuple(content), embedding_only
        self.vtlp, self.noise, self.cepstral_vtlp = vtlp, noise, cepstral_vtlp
        self.references, self.response_db = references, response_db

    def loss(self, rng: np.random.Generator) -> dict[str, Tensor]:
        crops = self._crops(self.corpus, rng, self.batch)
        crops += self._aligned_crops(self.corpus, self.corpus.parallel, rng, self.parallel)
        crops += self._aligned_crops(self.corpus, self.corpus.converted, rng, self.back_translated)
        predicted, target, mask = self._predict(crops)
        distance = (predicted - target).abs().mean(-1)
        error = distance[mask].mean()
        terms = {"loss": error, "l1": error.detach() * MEL_SCALE}
        if len(crops) > self.batch:
            aligned = slice(self.batch, None)
            across = distance.detach()[aligned][mask[aligned]].mean()
            terms["l1_across_throats"] = across * MEL_SCALE
        if self.adversary is not None:
            self.adversary.to(predicted.device)
            made = torch.where(mask[..., None], predicted, target)
            terms["discriminator"] = self.adversary.update(made, target)
            terms["adversarial"], terms["feature_matching"] = self.adversary.losses(made, target)
            terms["loss"] = (
                terms["loss"]
                + self.adversarial_loss * terms["adversarial"]
                + self.feature_matching_loss * terms["feature_matching"]
            )
        if self.perceptual is not None:
            mel, terms["content"], terms["speaker"] = self._cross_speaker_crops(
                self.corpus, rng, self.cross_speaker
            )
            terms["loss"] = (
                terms["loss"]
                + self.content_loss * terms["content"]
                + self.speaker_loss * terms["speaker"]
            )
            if self.adversary is not None and self.adversarial_loss:
                terms["adversarial_cross_speaker"] = self.adversary.adversarial(mel)
                terms["loss"] = (
                    terms["loss"] + self.adversarial_loss * terms["adversarial_cross_speaker"]
                )
        return terms

    def state_dict(self) -> dict[str, Any]:
        """State of the discriminator."""
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
        if self.parallel and self.held_out.parallel:
            # The difference of the two is what the source's throat costs.
            for name, across in (("same_throat", False), ("across_throats", True)):
                crops = self._aligned_crops(
                    self.held_out, self.held_out.parallel, np.random.default_rng(0),
                    4 * self.batch, across, training=False,
                )  # fmt: skip
                predicted, target, mask = self._predict(crops)
                error = (predicted - target).abs().mean(-1)[mask].mean()
                figures[f"l1_{name}"] = float(error) * MEL_SCALE
        if self.perceptual is not None:
            _, missed, unlike = self._cross_speaker_crops(
                self.held_out, np.random.default_rng(0), 4 * self.cross_speaker, plainly=True
            )
            figures |= {"content": float(missed), "speaker": float(unlike)}
        return figures

    def score(self, figures: Mapping[str, float]) -> float:
        """Distance to the true mel, and with perceptual losses what they weigh of it."""
        distance = sum(figures[f"l1_{name}"] for name in dict.fromkeys(self.content))
        return (
            distance / MEL_SCALE / len(set(self.content))
            + self.content_loss * figures.get("content", 0.0)
            + self.speaker_loss * figures.get("speaker", 0.0)
        )

    def _cross_speaker_crops(
        self, corpus: Corpus, rng: np.random.Generator, count: int, plainly: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Crops in the voices of others: the mels ``(batch, frames, bands)``, with silence behind
        the short ones, which share of the words is missed in them, and how far the voices of the
        whole ones are from those they should be, on the side of the source above all.

        Args:
            plainly: with no noise on the content.
        """
        assert self.perceptual is not None
        content, pitch, spoken, voices, own, others = [], [], [], [], [], []
        for item in corpus.draw(rng, count):
            other = corpus.other_speaker(rng, item)
            part = crop(rng, item.frames, self.frames)
            feature = self.content[rng.integers(len(self.content))]
            hidden = part if other is item else slice(0, 0)
            voice, log_f0_mean = self._voice(corpus, other, hidden, rng, feature)
            log_f0 = item.features["log_f0"][part] + np.float32(log_f0_mean - item.log_f0_mean)
            voiced = item.features["voiced"][part].astype(np.float32)
            content.append(
                self._content_input(item, part, rng, feature, 0.0 if plainly else self.noise)
            )
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
        if self.content_loss:
            with torch.no_grad():
                words, loudest = self.perceptual.words(true)
            predicted, _ = self.perceptual.words(made, loudest)
            missed = (predicted - words).square().sum() / words.square().sum()
        # Silence would pull every voice towards one point.
        whole = [row for row, length in enumerate(lengths) if length == max(lengths)]
        if self.speaker_loss:
            known = (np.stack([self._own_voice(x[row]) for row in whole]) for x in (others, own))
            target, source = (torch.from_numpy(values).to(device) for values in known)
            unlike = _unlike(self.perceptual.voice(made[whole]), target, source).mean()
        return (made - MEL_MEAN) / MEL_SCALE, missed, unlike

    def _own_voice(self, item: LoadedUtterance) -> FloatArray:
        """``(256,)`` of unit norm: the speaker encoder's mean embedding of crops of the item."""
        perceptual, frames = self.perceptual, self.frames
        assert perceptual is not None

        @torch.no_grad()
        def listen() -> FloatArray:
            mel = torch.from_numpy(item.features["mel"].astype(np.float32).T).to(perceptual.device)
            count = max(1, len(mel) // frames)
            crops = torch.stack([mel[i * frames : (i + 1) * frames] for i in range(count)])
            embedding = F.normalize(perceptual.voice(crops).mean(0), dim=0)
            return np.asarray(embedding.cpu().numpy(), np.float32)

        return item.cached(f"voice_in_{frames}", listen).astype(np.float32)

    def _content_input(
        self,
        item: LoadedUtterance,
        part: slice,
        rng: np.random.Generator,
        feature: str,
        noise: float,
    ) -> FloatArray:
        """``(frames, dims)`` content features as the network gets them in training."""
        content = mel_rate_content(item, feature)[part].astype(np.float32)
        if self.model.cepstra:
            # Held-out figures, too, are those of a source with another vocal tract length.
            warped = content[:, -CEPSTRA_SIZE:] @ random_warp(rng, self.cepstral_vtlp)
            content[:, -CEPSTRA_SIZE:] = warped
        if noise:
            content += np.float32(noise) * rng.standard_normal(content.shape, np.float32)
        return content

    def forward(
        self,
        corpus: Corpus,
        rng: np.random.Generator,
        count: int,
        plainly: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mels ``(batch, frames, bands)``, predicted and true, and which frames count.

        Args:
            plainly: the one content feature to use, without noise and without VTLP.
        """
        return self._predict(self._crops(corpus, rng, count, plainly))

    def _crops(
        self, corpus: Corpus, rng: np.random.Generator, count: int, plainly: str | None = None
    ) -> list[Crop]:
        """Random crops of speech in its own voice; ``plainly`` as for :meth:`forward`."""
        features_used = self.content if plainly is None else (plainly,)
        vtlp, noise, perturbed = (
            (self.vtlp, self.noise, self.perturbed) if plainly is None else (0.0, 0.0, 0.0)
        )
        crops = []
        for item in corpus.draw(rng, count):
            part = crop(rng, item.frames, self.frames)
            feature = features_used[rng.integers(len(features_used))]
            change = self._change(rng, vtlp)
            voice, log_f0_mean = self._voice(corpus, item, part, rng, feature, change)
            source = feature
            copies = [
                n
                for n in item.features
                if n.startswith(PERTURBED) and n[len(PERTURBED) :].isdigit()
            ]
            if perturbed and copies and rng.random() < perturbed:
                source = copies[rng.integers(len(copies))]
            content = self._content_input(item, part, rng, source, noise)
            crops.append(_crop(item, part, change, content, voice, log_f0_mean))
        return crops

    def _aligned_crops(
        self,
        corpus: Corpus,
        groups: Sequence[Aligned],
        rng: np.random.Generator,
        count: int,
        across: bool = True,
        training: bool = True,
    ) -> list[Crop]:
        """Random crops of aligned recordings.

        Args:
            across: whether the content is that of another recording than the mel.
        """
        crops = []
        for _ in range(count):
            target, source = groups[int(rng.integers(len(groups)))].draw(rng)
            part = crop(rng, min(target.frames, source.frames), self.frames)
            feature = self.content[rng.integers(len(self.content))]
            noise, vtlp = (self.noise, self.vtlp) if training else (0.0, 0.0)
            change = self._change(rng, vtlp)
            voice, log_f0_mean = self._voice(corpus, target, part, rng, feature, change)
            content = self._content_input(source if across else target, part, rng, feature, noise)
            crops.append(_crop(target, part, change, content, voice, log_f0_mean))
        return crops

    def _change(self, rng: np.random.Generator, share: float) -> VoiceChange:
        moved = share > 0 and rng.random() < share
        return VoiceChange.draw(rng, self.response_db) if moved else UNCHANGED

    def _predict(self, crops: Sequence[Crop]) -> tuple[Tensor, Tensor, Tensor]:
        """Mels ``(batch, frames, bands)``, predicted and true, and which frames count."""
        content, pitch, target, voices = zip(*crops, strict=True)
        device = _device(self.model)
        condition = _stack_voices(voices, device)
        predicted = self.model(_pad(content, device), _pad(pitch, device), condition).float()
        return predicted, _pad(target, device), _mask([len(t) for t in target], device)

    def _voice(
        self,
        corpus: Corpus,
        item: LoadedUtterance,
        part: slice,
        rng: np.random.Generator,
        feature: str,
        change: VoiceChange = UNCHANGED,
    ) -> tuple[tuple[FloatArray, ...], float]:
        """Embedding, profile, keys and values from elsewhere in the speaker's speech.

        Args:
            change: of the voice.
        """
        # Where timbres speak in several prosodies, the reference should mostly be of a like one.
        aligned = bool(item.utterance.parallel)
        draw = corpus.of_like_pitch if aligned else corpus.same_speaker
        first = draw(rng, item)
        length = int(rng.integers(self.reference_frames // 4, self.reference_frames + 1))
        others: list[LoadedUtterance] = []
        keys, mels = [], []
        for _ in range(self.references):
            other = draw(rng, item) if others else first
            if other in others:
                continue
            frames = np.arange(other.frames)
            if other is item:
                hidden = (frames >= part.start - GUARD_FRAMES) & (frames < part.stop + GUARD_FRAMES)
                frames = frames[~hidden]
            frames = frames[crop(rng, len(frames), length)]
            others.append(other)
            keys.append(mel_rate_content(other, feature)[frames].astype(np.float32))
            mels.append(change(other.features["mel"][:, frames]))
            length -= len(frames)
            if length < MIN_REFERENCE_FRAMES:
                break
        embedding = first.features["embedding"] * np.float32(change is UNCHANGED)
        log_f0_mean = first.log_f0_mean + change.log_factor
        mel, content = np.concatenate(mels), np.concatenate(keys)
        if len(mel) < MIN_REFERENCE_FRAMES or rng.random() < self.embedding_only:
            profile = np.zeros(2 * HIFIGAN_MEL.bands + 2, np.float32)
            return (embedding, profile, content[:0], mel[:0]), log_f0_mean
        profile = voice_profile(mel, log_f0_mean, first.log_f0_std)
        return (embedding, profile, content, standardise(mel)), log_f0_mean


def _crop(
    target: LoadedUtterance,
    part: slice,
    change: VoiceChange,
    content: FloatArray,
    voice: tuple[FloatArray, ...],
    log_f0_mean: float,
) -> Crop:
    """``part`` of ``target`` in its voice after ``change``, to be drawn from ``content``."""
    log_f0 = target.features["log_f0"][part] + change.log_factor
    voiced = target.features["voiced"][part].astype(np.float32)
    mel = standardise(change(target.features["mel"][:, part]))
    return content, pitch_inputs(log_f0, voiced, log_f0_mean), mel, voice


def mel_rate_content(item: LoadedUtterance, feature: str) -> FloatArray:
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
