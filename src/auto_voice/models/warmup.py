"""One real inference per model, so that the first user does not wait for lazy set-up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_voice.models.registry.catalog import ModelVersion

# Of noise that a model runs on: all its parts work, and nobody waits long.
SECONDS = 1.0


@dataclass(frozen=True)
class WarmupTiming:
    """What warming one model took.

    Attributes:
        model: what really answered, as ``registry.resolved`` says it.
        load_s: seconds to fetch, verify and load; about 0 if it was loaded.
        inference_s: seconds of the first inference on one second of audio.
    """

    model: str
    load_s: float
    inference_s: float

    @property
    def total_s(self) -> float:
        return self.load_s + self.inference_s


def run_once(model: Any, version: ModelVersion) -> None:
    """Run a loaded model on one second of noise."""
    _RUN[version.kind](model, version)


def _noise(sample_rate: int) -> Any:
    import numpy as np

    return (0.05 * np.random.default_rng(0).standard_normal(int(SECONDS * sample_rate))).astype(
        np.float32
    )


def _content(model: Any, version: ModelVersion) -> None:
    model.encode(_noise(model.sample_rate))


def _speaker(model: Any, version: ModelVersion) -> None:
    model.embed_utterance(_noise(model.sample_rate))


def _vocoder(model: Any, version: ModelVersion) -> None:
    import numpy as np

    frames = round(SECONDS * model.sample_rate / model.hop_samples)
    model.synthesize(np.full((model.bands, frames), -5.0, dtype=np.float32))


def _converter(model: Any, version: ModelVersion) -> None:
    import numpy as np

    from auto_voice.types import Content, Pitch, Voice

    dims = int(version.params.get("net", {}).get("dims", 64))
    content = Content(np.zeros((50, dims), dtype=np.float32), 50.0, model.content_space)
    pitch = Pitch(np.full(63, 120.0, dtype=np.float32), np.ones(63, dtype=np.bool_), 62.5)
    voice = Voice(np.full(256, 1 / 16, dtype=np.float32), log_f0_mean=4.8, log_f0_std=0.2)
    model.convert(content, pitch, voice, round(SECONDS * model.sample_rate / model.hop_samples))


def _recogniser(model: Any, version: ModelVersion) -> None:
    model.transcribe(_noise(model.sample_rate))


def _quality(model: Any, version: ModelVersion) -> None:
    model.score(_noise(model.sample_rate))


def _sample(model: Any, version: ModelVersion) -> None:
    """A recording is ready once it is read."""


_RUN: Mapping[str, Callable[[Any, ModelVersion], None]] = {
    "content": _content,
    "converter": _converter,
    "vocoder": _vocoder,
    "speaker": _speaker,
    "sample": _sample,
    "recogniser": _recogniser,
    "quality": _quality,
}
