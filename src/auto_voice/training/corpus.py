"""Features of a whole corpus in memory, and random crops of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from auto_voice.errors import TrainingError
from auto_voice.training.data import Utterance
from auto_voice.training.features import load
from auto_voice.types import FloatArray

OTHER_SPEAKER_DRAWS = 100
# Share of draws that take the speaker's utterance of nearest mean pitch: a timbre of synthetic
# speech speaks with several prosodies, a person with one.
NEAREST_PITCH = 0.7


@dataclass(eq=False)
class Speech:
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

    targets: list[Speech] = field(default_factory=list)
    sources: list[Speech] = field(default_factory=list)

    def draw(self, rng: np.random.Generator) -> tuple[Speech, Speech]:
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

    items: Sequence[Speech]
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
        return cls([Speech(u, f) for u, f in loaded if f is not None], weights)

    def draw(self, rng: np.random.Generator, count: int) -> list[Speech]:
        """``count`` random items."""
        return [self.items[i] for i in rng.choice(len(self.items), count, p=self._chance)]

    def other_speaker(self, rng: np.random.Generator, item: Speech) -> Speech:
        """A random item of another speaker, or ``item`` where none is ever drawn."""
        others = (other for _ in range(OTHER_SPEAKER_DRAWS) for other in self.draw(rng, 1))
        speaker = item.utterance.speaker
        return next((other for other in others if other.utterance.speaker != speaker), item)

    def same_speaker(self, rng: np.random.Generator, item: Speech) -> Speech:
        """Another utterance of the same speaker, or the same one where there is no other."""
        others = [i for i in self.by_speaker[item.utterance.speaker] if self.items[i] is not item]
        return self.items[others[rng.integers(len(others))]] if others else item

    def of_like_pitch(self, rng: np.random.Generator, item: Speech) -> Speech:
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
