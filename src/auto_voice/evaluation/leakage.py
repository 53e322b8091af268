"""Content leakage: what of the speaker similarity is lost because the content comes from another
throat, all else equal.

On aligned parallel speech one sentence is said in several timbres with the same durations and F0.
It is converted to one of these voices twice, from that voice's own recording and from another's;
both results should be equally like the voice. What the second is less is what the content features
bring along of the source's vocal tract. Which of them do is told without any conversion: timbres
that say the same at the same time should have the same content, so what differs between them is the
throat's.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from auto_voice.audio.io import read_audio, write_audio
from auto_voice.audio.mel import envelope_size
from auto_voice.errors import EvaluationError
from auto_voice.evaluation.results import Estimate, estimate
from auto_voice.models.content_model import CentredEncoder
from auto_voice.progress import tell
from auto_voice.types import FloatArray, Voice

if TYPE_CHECKING:
    from auto_voice.evaluation.judges import Judges
    from auto_voice.evaluation.metrics import Embedder
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline

Embed = Callable[[Path], FloatArray]
"""A recording to a unit vector of its speaker."""
Convert = Callable[[Path, Path], Path]
"""Source and reference to the recording of the conversion."""
LIST = "speech.csv"
COLUMNS = ("real", "own", "other", "leakage", "unconverted")


@dataclass(frozen=True)
class Trial:
    """One sentence in one voice.

    Attributes:
        own: the voice saying the sentence.
        other: another timbre saying it, aligned with ``own``.
        reference: the voice saying another sentence.
    """

    own: Path
    other: Path
    reference: Path


def read_trials(folder: Path, count: int, seed: int = 1) -> list[Trial]:
    """``count`` random trials of a corpus of aligned parallel speech, each of another voice as
    long as there are such.

    Args:
        folder: holds ``speech.csv`` with the columns path, speaker and parallel.

    Raises:
        EvaluationError: no such list, or no voice with two sentences.
    """
    aligned = _aligned(folder)
    spoken: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for group in aligned.values():
        for row in group:
            spoken[row["speaker"]].append(row)
    rng = np.random.default_rng(seed)
    voices = [
        name
        for name, own in sorted(spoken.items())
        if len({r["parallel"] for r in own}) > 1 and any(_others(aligned, r) for r in own)
    ]
    if not voices:
        raise EvaluationError(
            f"{folder / LIST} names no voice with two sentences that others say, too."
        )
    order = [voices[i] for i in rng.permutation(len(voices))]
    trials = []
    for turn in range(count):
        own = spoken[order[turn % len(order)]]
        candidates = [r for r in own if _others(aligned, r)]
        chosen = candidates[rng.integers(len(candidates))]
        others = _others(aligned, chosen)
        references = [r for r in own if r["parallel"] != chosen["parallel"]]
        picks = (
            chosen,
            others[rng.integers(len(others))],
            references[rng.integers(len(references))],
        )
        trials.append(Trial(*(folder / row["path"] for row in picks)))
    return trials


def read_sentences(folder: Path, count: int, seed: int = 1) -> list[list[Path]]:
    """``count`` random sentences at most, each as its recordings by several speakers.

    Args:
        folder: as for :func:`read_trials`.

    Raises:
        EvaluationError: no such list, or no sentence that several say.
    """
    several = [
        [folder / row["path"] for row in group]
        for _, group in sorted(_aligned(folder).items())
        if len({row["speaker"] for row in group}) > 1
    ]
    if not several:
        raise EvaluationError(f"{folder / LIST} names no sentence that several speakers say.")
    order = np.random.default_rng(seed).permutation(len(several))[:count]
    return [several[i] for i in sorted(order)]


def _aligned(folder: Path) -> Mapping[str, Sequence[Mapping[str, str]]]:
    """Rows of the list by sentence.

    Raises:
        EvaluationError: there is no such list.
    """
    listed = folder / LIST
    try:
        with listed.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise EvaluationError(
            f"{listed} cannot be read ({error.strerror}); name a folder that "
            "`autovoice train corpus` made."
        ) from error
    if rows and not {"path", "speaker", "parallel"} <= rows[0].keys():
        raise EvaluationError(
            f"{listed} lacks one of the columns path, speaker and parallel; name a folder that "
            "`autovoice train corpus` made."
        )
    aligned: defaultdict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        if row["parallel"]:
            aligned[row["parallel"]].append(row)
    return aligned


def _others(
    aligned: Mapping[str, Sequence[Mapping[str, str]]], row: Mapping[str, str]
) -> list[Mapping[str, str]]:
    """Recordings of the same sentence by other speakers."""
    return [r for r in aligned[row["parallel"]] if r["speaker"] != row["speaker"]]


def measure(
    trials: Sequence[Trial],
    convert: Convert,
    encoders: Mapping[str, Embed],
) -> dict[str, dict[str, Estimate]]:
    """Speaker similarity to the reference, by encoder.

    Returns:
        For each encoder ``real`` (the voice's own recording), ``own`` (converted from it),
        ``other`` (converted from another timbre), ``leakage`` (their difference) and
        ``unconverted`` (the other timbre itself), each with its interval.
    """
    scores: dict[str, list[tuple[float, ...]]] = {name: [] for name in encoders}
    for number, trial in enumerate(trials, 1):
        made = [convert(source, trial.reference) for source in (trial.own, trial.other)]
        for name, embed in encoders.items():
            target = embed(trial.reference)
            real, own, other, source = (
                float(embed(path) @ target) for path in (trial.own, *made, trial.other)
            )
            scores[name].append((real, own, other, own - other, source))
        tell("pairs", number, len(trials))
    return {
        name: {column: estimate([row[i] for row in rows]) for i, column in enumerate(COLUMNS)}
        for name, rows in scores.items()
    }


def throat_shares(
    sentences: Sequence[Sequence[Path]],
    encode: Callable[[Path], FloatArray],
    groups: Mapping[str, slice],
) -> dict[str, Estimate]:
    """Which share of the variance of the content is between timbres that say the same at once: 0
    where the content holds nothing of the throat, 1 where it holds nothing else.

    Args:
        sentences: recordings that are aligned, one list a sentence.
        encode: a recording to its content features ``(frames, dims)``.
        groups: dims by name.

    Returns:
        For each group the mean over sentences, with its interval.
    """
    shares: dict[str, list[float]] = {name: [] for name in groups}
    for number, recordings in enumerate(sentences, 1):
        contents = [encode(path) for path in recordings]
        frames = min(len(content) for content in contents)
        # (timbres, frames, dims); the last frames may differ by one.
        together = np.stack([content[:frames] for content in contents])
        # Unbiased, or six timbres would seem to differ by a sixth less than they do.
        between = together.var(0, ddof=1).mean(0)
        total = together.reshape(-1, together.shape[-1]).var(0)
        for name, dims in groups.items():
            spread = float(total[dims].sum())
            shares[name].append(float(between[dims].sum()) / spread if spread else 0.0)
        tell("sentences", number, len(sentences))
    return {name: estimate(values) for name, values in shares.items()}


def content_parts(encoder: Any) -> tuple[Callable[[Path], FloatArray], dict[str, slice]]:
    """How a content encoder encodes a recording, and which of its features are learnt, which
    envelopes and which cepstra; one group where it has no such parts."""

    def encode(path: Path) -> FloatArray:
        samples = read_audio(path, sample_rate=encoder.sample_rate).samples
        return np.asarray(encoder.encode(samples).features, np.float32)

    if not isinstance(encoder, CentredEncoder):
        return encode, {"all": slice(None)}
    ends = (encoder.components, encoder.components + envelope_size(encoder.envelope, False))
    parts = {
        "learnt": slice(0, ends[0]),
        "envelope": slice(*ends),
        "cepstra": slice(ends[1], encoder.dims),
    }
    return encode, {name: dims for name, dims in parts.items() if dims.stop > dims.start}


def pipeline_parts(
    pipeline: VoiceConversionPipeline, judges: Judges, scratch: Path
) -> tuple[Convert, dict[str, Embed]]:
    """How a pipeline converts, each voice cloned once, and how the judges embed a recording.

    Args:
        scratch: folder for the conversions.
    """
    voices: dict[Path, Voice] = {}

    def convert(source: Path, reference: Path) -> Path:
        if reference not in voices:
            voices[reference] = pipeline.clone([read_audio(reference)])
        made = pipeline.convert(read_audio(source), voices[reference]).audio
        out = scratch / f"{len(list(scratch.iterdir())):05d}.wav"
        write_audio(out, made)
        return out

    def embed_with(encoder: Embedder) -> Embed:
        return lambda path: encoder.embed_utterance(
            read_audio(path, sample_rate=encoder.sample_rate).samples
        )

    roles = {"speaker": judges.speaker, "speaker2": judges.speaker2}
    return convert, {name: embed_with(e) for name, e in roles.items() if e is not None}
