"""What each way of modelling the target voice gains, on the same pairs of unseen speakers.

    python benchmarks/target_modelling.py SPEAKERS [--limit 12] [--references 1]

SPEAKERS holds one folder of recordings for each speaker, as for ``autovoice evaluate pipeline``.
The same sources are converted into the same voices again and again, and only what the converter
knows of the voice changes. The last column counts the seconds that making a voice takes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from auto_voice import PipelineConfig, VoiceConversionPipeline
from auto_voice.audio.io import read_audio, write_audio
from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.evaluation.judges import load_judges
from auto_voice.evaluation.pairs import Pair, read_test_set
from auto_voice.evaluation.scoring import evaluate
from auto_voice.models.converter_model import CompactConverter
from auto_voice.training import fine_tuning as fitting
from auto_voice.types import Voice, Waveform
from auto_voice.voices.cloning import bare_voice

COLUMNS = (
    "secs", "secs2", "source_similarity2", "wer", "dnsmos", "f0_correlation", "voicing_error",
)  # fmt: skip
VOCODER_ALONE = "nothing: the source's own mel through the vocoder"


def fitted(
    steps: int,
    share: float = fitting.FineTuningPlan().share,
    everywhere: bool = False,
    rate: float = 1e-3,
) -> Callable[[Any, Voice], Voice]:
    """The converter fitted to the voice by a plan of its own."""

    def make(converter: Any, voice: Voice) -> Voice:
        kept = fitting.LATE
        fitting.LATE = ("",) if everywhere else kept
        try:
            plan = fitting.FineTuningPlan(share=share, rate=rate)
            return fitting.fine_tune(converter, voice, steps, plan=plan)
        finally:
            fitting.LATE = kept

    return make


def embedding_alone(_: Any, voice: Voice) -> Voice:
    """No frames, but the pitch: without it the conversion would be at another height."""
    bare = bare_voice(voice.embedding)
    return replace(bare, log_f0_mean=voice.log_f0_mean, log_f0_std=voice.log_f0_std)


def as_it_is(converter: Any, voice: Voice) -> Voice:
    """The voice that cloning gave."""
    return voice


class Matching:
    """A converter whose output gets the mean and spread of the reference, band by band."""

    def __init__(self, converter: Any) -> None:
        self.converter = converter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.converter, name)

    def convert(self, content: Any, pitch: Any, voice: Voice, frames: int) -> Any:
        mel = self.converter.convert(content, pitch, voice, frames)
        wanted = voice.frames["mel"].T
        loud, loud_there = mel.values.mean(0), wanted.mean(0)
        here = mel.values[:, loud >= np.quantile(loud, 0.3)]
        there = wanted[:, loud_there >= np.quantile(loud_there, 0.3)]
        moved = (mel.values - here.mean(1, keepdims=True)) * (
            there.std(1, keepdims=True) / here.std(1, keepdims=True)
        ) + there.mean(1, keepdims=True)
        gate = 1 / (1 + np.exp(-2 * (loud - np.quantile(loud, 0.3))))
        return replace(mel, values=(mel.values + gate * (moved - mel.values)).astype(np.float32))


def without_attention(converter: Any) -> Any:
    """The same network, the lookup into the reference's frames left out."""
    silent = {
        name: np.zeros_like(values) if name.startswith("attention.out.") else values
        for name, values in converter.weights.items()
    }
    return CompactConverter(
        converter.graph, silent, converter.shape, converter.name, converter.content_space
    )


VARIANTS: Mapping[str, tuple[Callable[[Any, Voice], Voice], Callable[[Any], Any]]] = {
    "embedding alone": (embedding_alone, lambda c: c),
    "+ long-term spectrum": (as_it_is, without_attention),
    "+ attention over the reference": (as_it_is, lambda c: c),
    "+ output statistics of the reference": (as_it_is, Matching),
    "fitted, 10 steps": (fitted(10), lambda c: c),
    "fitted, 40 steps": (fitted(40), lambda c: c),
    "fitted, 40 steps, whole difference": (fitted(40, share=1.0), lambda c: c),
    "fitted, 40 steps, every layer, whole difference": (
        fitted(40, share=1.0, everywhere=True, rate=5e-4), lambda c: c),
    "fitted, 120 steps": (fitted(120), lambda c: c),
    "fitted, 40 steps, + output statistics of the reference": (fitted(40), Matching),
}  # fmt: skip


class Pipeline(VoiceConversionPipeline):
    """With a converter that can be changed."""

    dressed: Any = None

    @property
    def converter(self) -> Any:
        return self.dressed or super().converter


def convert(
    pipeline: Pipeline, pairs: list[Pair], variant: str, folder: Path
) -> tuple[list[Pair], float]:
    """Conversions of ``pairs``, and the mean seconds that a voice took."""
    prepare, dress = VARIANTS[variant]
    plain = pipeline.converter
    voices: dict[tuple[Path, ...], Voice] = {}
    took = []
    done = []
    for number, pair in enumerate(pairs):
        if pair.targets not in voices:
            voice = pipeline.clone([str(p) for p in pair.targets], fine_tune=False)
            started = time.perf_counter()
            voices[pair.targets] = prepare(plain, voice)
            took.append(time.perf_counter() - started)
        pipeline.dressed = dress(plain)
        result = pipeline.convert(pair.source, voices[pair.targets])
        pipeline.dressed = None
        done.append(replace(pair, converted=result.save(folder / f"{number:03d}.wav")))
    return done, float(np.mean(took))


def revocode(pipeline: Pipeline, pairs: list[Pair], folder: Path) -> list[Pair]:
    """The sources analysed and vocoded: what the words lose before any conversion."""
    done = []
    for number, pair in enumerate(pairs):
        rate = HIFIGAN_MEL.sample_rate
        source = read_audio(pair.source, sample_rate=rate).samples
        gain = gain_to_speech_level(source, rate)
        mel = log_mel((source * gain).astype(np.float32), HIFIGAN_MEL)
        audio = pipeline.vocoder.synthesize(mel)[0][: len(source)] / gain
        path = write_audio(folder / f"{number:03d}.wav", Waveform(audio, rate))
        done.append(replace(pair, converted=path))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speakers", type=Path)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these rows alone")
    options = parser.parse_args()
    pairs = read_test_set(options.speakers, references=options.references, limit=options.limit)
    pipeline = Pipeline(PipelineConfig(fine_tune_steps=0))
    judges = load_judges(pipeline.registry)
    print(f"{len(pairs)} pairs, {pipeline.converter.name}\n")
    print("| the converter knows | " + " | ".join(COLUMNS) + " | seconds a voice |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for variant in options.only or [VOCODER_ALONE, *VARIANTS]:
        with tempfile.TemporaryDirectory() as folder:
            if variant == VOCODER_ALONE:
                made, seconds = revocode(pipeline, pairs, Path(folder)), 0.0
            else:
                made, seconds = convert(pipeline, pairs, variant, Path(folder))
            result = evaluate(made, judges, name=variant)
        figures = " | ".join(f"{result.estimates[name].value:.3f}" for name in COLUMNS)
        print(f"| {variant} | {figures} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
