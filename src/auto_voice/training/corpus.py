"""Features of a whole corpus in memory, random crops of them, and perturbations of the crops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import TrainingError
from auto_voice.training.data import Utterance
from auto_voice.training.features import load
from auto_voice.types import FloatArray

# Draws until it is taken that there is no other speaker.
OTHER_SPEAKER_DRAWS = 100
# Share of draws that take the speaker's utterance of nearest mean pitch: a timbre of synthetic
# speech speaks with several prosodies, a person with one.
NEAREST_PITCH = 0.7


@dataclass(eq=False)
class LoadedUtterance:
    """One utterance's features; see ``features.compute``."""

    utterance: Utterance
    features: dict[str, FloatArray]
    log_f0_mean: float = 0.0
    log_f0_std: float = 0.0

    def __post_init__(self) -> None:
        voiced = self.features["voiced"] > 0.5
        log_f0 = self.features["log_f0"]
        spoken = log_f0[voiced] if voiced.any() else log_f0
        near = spoken[np.abs(spoken - np.median(spoken)) < 0.6 * np.log(2.0)]
        self.log_f0_mean, self.log_f0_std = float(near.mean()), float(near.std())

    def cached(self, name: str, compute: Callable[[], FloatArray]) -> FloatArray:
        """A derived feature, computed on first use and kept in half precision."""
        if name not in self.features:
            self.features[name] = compute().astype(np.float16)
        return self.features[name]

    @property
    def frames(self) -> int:
        return int(self.features["mel"].shape[1])


@dataclass(eq=False)
class Aligned:
    """Recordings that say the same frame for frame.

    Attributes:
        targets: whose mel may be learnt, from the content of any other.
        sources: of which only the content is used.
    """

    targets: list[LoadedUtterance] = field(default_factory=list)
    sources: list[LoadedUtterance] = field(default_factory=list)

    def draw(self, rng: np.random.Generator) -> tuple[LoadedUtterance, LoadedUtterance]:
        """A random target, and another recording to take its content from."""
        target = self.targets[rng.integers(len(self.targets))]
        others = [item for item in (*self.targets, *self.sources) if item is not target]
        return target, others[rng.integers(len(others))]


@dataclass(eq=False)
class Corpus:
    """Utterances with features, grouped by speaker.

    Attributes:
        items: those that had features.
        weights: how often a corpus is drawn, relative to its share of frames; missing: 1.
        parallel: aligned recordings of several speakers.
        converted: real recordings with what a converter made of them.
    """

    items: Sequence[LoadedUtterance]
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise TrainingError(
                "None of the recordings to learn from, or none to hold out, could be used; "
                "failures.csv in the output folder says why."
            )
        self.by_speaker: dict[str, list[int]] = defaultdict(list)
        aligned: defaultdict[str, Aligned] = defaultdict(Aligned)
        for index, item in enumerate(self.items):
            utterance = item.utterance
            if not utterance.source_only:
                self.by_speaker[utterance.speaker].append(index)
            if utterance.parallel:
                group = aligned[utterance.parallel]
                (group.sources if utterance.source_only else group.targets).append(item)
        whole = [g for _, g in sorted(aligned.items()) if len(g.targets) + len(g.sources) > 1]
        self.parallel = [g for g in whole if g.targets and not g.sources]
        self.converted = [g for g in whole if g.targets and g.sources]
        # A speaker with an hour of speech must not drown one with ten seconds: share by sqrt.
        spoken = {
            speaker: sum(self.items[i].frames for i in indices)
            for speaker, indices in self.by_speaker.items()
        }
        chance = np.array(
            [
                0.0
                if item.utterance.source_only
                else item.frames
                / np.sqrt(spoken[item.utterance.speaker])
                * self.weights.get(item.utterance.corpus, 1.0)
                for item in self.items
            ]
        )
        self._chance = chance / chance.sum()

    @classmethod
    def load(
        cls, utterances: Sequence[Utterance], folder: Path, weights: dict[str, float]
    ) -> Corpus:
        """From stored features; utterances without any are skipped."""
        loaded = ((u, load(folder, u)) for u in utterances)
        return cls([LoadedUtterance(u, f) for u, f in loaded if f is not None], weights)

    def draw(self, rng: np.random.Generator, count: int) -> list[LoadedUtterance]:
        """``count`` random items."""
        return [self.items[i] for i in rng.choice(len(self.items), count, p=self._chance)]

    def other_speaker(self, rng: np.random.Generator, item: LoadedUtterance) -> LoadedUtterance:
        """A random item of another speaker, or ``item`` where none is ever drawn."""
        others = (other for _ in range(OTHER_SPEAKER_DRAWS) for other in self.draw(rng, 1))
        speaker = item.utterance.speaker
        return next((other for other in others if other.utterance.speaker != speaker), item)

    def same_speaker(self, rng: np.random.Generator, item: LoadedUtterance) -> LoadedUtterance:
        """Another utterance of the same speaker, or the same one where there is no other."""
        others = [i for i in self.by_speaker[item.utterance.speaker] if self.items[i] is not item]
        return self.items[others[rng.integers(len(others))]] if others else item

    def of_like_pitch(self, rng: np.random.Generator, item: LoadedUtterance) -> LoadedUtterance:
        """The same, mostly the one whose mean pitch is nearest: what a voice is like depends on
        how high it speaks."""
        others = [i for i in self.by_speaker[item.utterance.speaker] if self.items[i] is not item]
        if not others or rng.random() >= NEAREST_PITCH:
            return self.same_speaker(rng, item)
        found = min(others, key=lambda i: abs(self.items[i].log_f0_mean - item.log_f0_mean))
        return self.items[found]


def crop(rng: np.random.Generator, total: int, length: int) -> slice:
    """A random stretch of ``length`` frames, or all of them where there are fewer."""
    start = int(rng.integers(max(1, total - length + 1)))
    return slice(start, min(start + length, total))


# Nats of power in a decibel.
LOG_POWER_PER_DB = float(np.log(10.0) / 10.0)


def warp_formants(mel: FloatArray, factor: float) -> FloatArray:
    """``(bands, frames)`` with its bands read at ``factor`` times their index: formants move."""
    bands = len(mel)
    position = np.clip(np.arange(bands) * factor, 0, bands - 1)
    before = position.astype(np.int64)
    share = (position - before).astype(np.float32)[:, None]
    after = np.minimum(before + 1, bands - 1)
    return np.asarray(mel[before] * (1 - share) + mel[after] * share, np.float32)


def smooth_response(rng: np.random.Generator, bands: int, spread_db: float) -> NDArray[np.float64]:
    """``(bands,)`` in nats of power: four cosines over the bands, and an overall gain."""
    order = np.arange(5)[:, None]
    basis = np.cos(np.pi * order * (np.arange(bands) + 0.5) / bands)
    amounts = rng.normal(0, spread_db, (5, 1)) / (1 + order)
    response: NDArray[np.float64] = LOG_POWER_PER_DB * (basis * amounts).sum(0)
    return response


def equalise(mel: FloatArray, rng: np.random.Generator, spread_db: float) -> FloatArray:
    """Adds a smooth random response."""
    response = smooth_response(rng, len(mel), spread_db)[:, None]
    return np.asarray(mel + response, np.float32)


def add_noise(mel: FloatArray, rng: np.random.Generator, snr_db: float) -> FloatArray:
    """Adds stationary noise of a random tilt, ``snr_db`` under the loud frames."""
    bands = len(mel)
    loud = np.quantile(mel.mean(0), 0.9)
    tilt = rng.uniform(-20, 5) * np.linspace(-0.5, 0.5, bands)[:, None]
    level = loud + LOG_POWER_PER_DB * (tilt - snr_db)
    # The power of one noise frame is exponentially distributed; averaging over a band narrows it.
    flutter = rng.normal(0, 0.35, mel.shape)
    noisy = np.logaddexp(mel, level + flutter)
    return np.asarray(noisy, dtype=np.float32)


def limit_band(mel: FloatArray, top_band: int, floor: float) -> FloatArray:
    """Nothing above ``top_band``: what a telephone passes."""
    cut: FloatArray = mel.copy()
    cut[top_band:] = floor
    return cut


def perturb(mel: FloatArray, rng: np.random.Generator, strength: float = 1.0) -> FloatArray:
    """A random mixture of all of them; ``strength`` 0 leaves the input alone."""
    if strength <= 0:
        return mel
    out = warp_formants(mel, float(np.exp(rng.normal(0, 0.07 * strength))))
    out = equalise(out, rng, 5.0 * strength)
    if rng.random() < 0.15 * strength:
        out = limit_band(out, int(rng.integers(52, 66)), float(np.log(1e-8)))
    if rng.random() < 0.5 * strength:
        out = add_noise(out, rng, float(rng.uniform(8, 40)))
    return out
