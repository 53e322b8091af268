"""From a list of conversions to an ``Evaluation``; a shared recording is judged once."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from auto_voice.audio.io import read_audio
from auto_voice.audio.pitch import extract_pitch, without_octave_errors
from auto_voice.batch.executors import SHARED_KEPT, Executor, Record, Worker, WorkerSpec
from auto_voice.errors import AudioError, EvaluationError
from auto_voice.evaluation import metrics
from auto_voice.evaluation.judges import Judges, load_judges
from auto_voice.evaluation.metrics import character_errors, normalise_text, word_errors
from auto_voice.evaluation.pairs import (
    Pair,
    conversion_path,
    refuse_mock,
    told_notes,
)
from auto_voice.evaluation.results import (
    RESAMPLES,
    SEED,
    Evaluation,
    PairScore,
    estimate_all,
    machine,
)
from auto_voice.models.quality_model import Quality
from auto_voice.progress import tell
from auto_voice.types import FloatArray, Pitch, Voice, Waveform

if TYPE_CHECKING:
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline

log = logging.getLogger(__name__)

# The source is recognised a second time from here on: Whisper reads it in other windows then, so
# that the difference shows how unsure it is.
LATER_SECONDS = 0.1
# Sources and references of which a worker keeps the judgements: texts, vectors and pitch.
RECORDINGS_KEPT = 256
# Judges that tell who speaks.
SPEAKER_ROLES = ("speaker", "speaker2")


class JudgedRecording:
    """One file, read and judged when asked, each judgement kept; the samples are let go.

    Args:
        path: of the recording.
        judges: who listens.
        allow_truncated: take what is there of a truncated file.
    """

    def __init__(self, path: Path, judges: Judges, *, allow_truncated: bool = False) -> None:
        self.path = path
        self._judges = judges
        self._allow_truncated = allow_truncated
        self._audio: Waveform | None = None

    @property
    def audio(self) -> Waveform:
        if self._audio is None:
            self._audio = read_audio(self.path, allow_truncated=self._allow_truncated)
        return self._audio

    def release(self) -> None:
        """Forget the samples; the judgements stay."""
        self._audio = None

    @cached_property
    def embeddings(self) -> Mapping[str, FloatArray]:
        """Role of each speaker encoder to its unit vector."""
        found = {}
        for role in SPEAKER_ROLES:
            encoder = getattr(self._judges, role)
            if encoder is not None:
                samples = metrics.samples_at(self.audio, encoder.sample_rate)
                found[role] = encoder.embed_utterance(samples)
        return found

    @cached_property
    def text(self) -> str:
        recogniser = self._judges.recogniser
        assert recogniser is not None
        return recogniser.transcribe(metrics.samples_at(self.audio, recogniser.sample_rate))

    @cached_property
    def text_again(self) -> str:
        """What is heard after ``LATER_SECONDS`` of silence: a sure listener hears the same."""
        recogniser = self._judges.recogniser
        assert recogniser is not None
        samples = metrics.samples_at(self.audio, recogniser.sample_rate)
        later = np.zeros(round(LATER_SECONDS * recogniser.sample_rate), np.float32)
        return recogniser.transcribe(np.concatenate([later, samples]))

    @cached_property
    def quality(self) -> Quality:
        judge = self._judges.quality
        assert judge is not None
        return judge.score(metrics.samples_at(self.audio, judge.sample_rate))

    @cached_property
    def pitch(self) -> Pitch:
        return extract_pitch(self.audio.samples, self.audio.sample_rate)

    @cached_property
    def melody(self) -> Pitch:
        """``pitch`` without creak and octave errors of the detector."""
        return without_octave_errors(self.pitch)

    @cached_property
    def loudness(self) -> float:
        return metrics.loudness_lufs(self.audio)

    @cached_property
    def seconds(self) -> float:
        return self.audio.seconds


class Scorer:
    """Scores conversions; sources and references that several share are judged once.

    Args:
        judges: loaded models.
        allow_truncated: take what is there of truncated recordings.
    """

    def __init__(self, judges: Judges, *, allow_truncated: bool = False) -> None:
        self.judges = judges
        self._allow_truncated = allow_truncated
        self._recordings: dict[Path, JudgedRecording] = {}

    def recording(self, path: Path) -> JudgedRecording:
        """The one record of a file."""
        key = path.resolve()
        if key not in self._recordings:
            self._recordings[key] = JudgedRecording(
                path, self.judges, allow_truncated=self._allow_truncated
            )
        return self._recordings[key]

    def forget(self, path: Path) -> None:
        """Drop the record of a file; who asks for it again has it judged again."""
        self._recordings.pop(path.resolve(), None)

    def score(self, pair: Pair, extra: Mapping[str, float] | None = None) -> PairScore:
        """Every figure of one conversion.

        Args:
            extra: figures measured elsewhere, such as ``rtf``.

        Raises:
            AudioError: a recording cannot be used.
            EvaluationError: ``pair`` has no conversion.
        """
        if pair.converted is None:
            raise EvaluationError(f"{pair.id} has not been converted; run the pipeline first.")
        source, converted = self.recording(pair.source), self.recording(pair.converted)
        targets = [self.recording(p) for p in pair.targets]
        values: dict[str, float] = dict(extra or {})
        counts: dict[str, int] = {}
        texts: dict[str, str] = {}
        values |= self._similarities(source, targets, converted)
        if self.judges.recogniser is not None:
            texts = {"reference": pair.transcript or source.text, "heard": converted.text}
            counts = _counts(texts["reference"], texts["heard"])
            if not counts["words"]:
                counts = {}  # Words that are heard where none were said are of no rate.
            else:
                values["wer"] = counts["word_edits"] / counts["words"]
                texts["unconverted"] = source.text if pair.transcript else source.text_again
                unconverted = word_errors(texts["reference"], texts["unconverted"]).edits
                counts["unconverted_edits"] = unconverted
                values["unconverted_wer"] = unconverted / counts["words"]
                values["cer"] = counts["character_edits"] / counts["characters"]
        if self.judges.quality is not None:
            values |= _qualities(source.quality, converted.quality)
        if self.judges.pitch:
            values |= _pitches(source, targets[0], converted)
        if self.judges.signal:
            values |= _signals(source, converted)
            if pair.parallel is not None:
                parallel = self.recording(pair.parallel)
                values["mcd_db"] = metrics.mel_cepstral_distance(parallel.audio, converted.audio)
                parallel.release()
        notes = tuple(f"converted: {note}" for note in converted.audio.notes)
        for recording in (source, converted, *targets):
            recording.release()
        return PairScore(
            id=pair.id,
            source=str(pair.source),
            targets=tuple(str(p) for p in pair.targets),
            converted=str(pair.converted),
            source_speaker=pair.source_speaker,
            target_speaker=pair.target_speaker,
            values={k: float(v) for k, v in values.items() if math.isfinite(v)},
            counts=counts,
            texts=texts,
            notes=notes,
        )

    def voice(self, paths: Iterable[Path], role: str) -> FloatArray:
        """Mean embedding of several recordings of one person, by the encoder of ``role``."""
        recordings = [self.recording(p) for p in paths]
        found = np.mean([r.embeddings[role] for r in recordings], axis=0)
        for recording in recordings:
            recording.release()
        return np.asarray(found, dtype=np.float32)

    def _similarities(
        self,
        source: JudgedRecording,
        targets: Sequence[JudgedRecording],
        converted: JudgedRecording,
    ) -> dict[str, float]:
        values = {}
        for role in converted.embeddings:
            end = role.removeprefix("speaker")
            target = np.mean([t.embeddings[role] for t in targets], axis=0)
            values[f"secs{end}"] = metrics.cosine(target, converted.embeddings[role])
            values[f"source_similarity{end}"] = metrics.cosine(
                source.embeddings[role], converted.embeddings[role]
            )
            values[f"unconverted_secs{end}"] = metrics.cosine(target, source.embeddings[role])
        return values

    def verification(self, pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
        """Can a verifier tell whose voice the conversions are? Equal error rate by encoder.

        Each conversion is tried against its own target (same) and against the target of every
        other speaker in the list (different). Empty with fewer than two target speakers.
        """
        roles = [r for r in SPEAKER_ROLES if getattr(self.judges, r) is not None]
        return verification(pairs, roles, lambda path, role: self.voice((path,), role))

    def trials(
        self, trials: Iterable[tuple[Sequence[Path], Sequence[Path], bool]]
    ) -> dict[str, dict[str, float]]:
        """Equal error rate over (recordings, recordings, same speaker?), by encoder.

        Raises:
            EvaluationError: trials of one kind are missing.
        """
        listed = list(trials)
        found = {}
        for role in SPEAKER_ROLES:
            if getattr(self.judges, role) is None:
                continue
            scores: dict[bool, list[float]] = {True: [], False: []}
            for a, b, same in listed:
                scores[same].append(metrics.cosine(self.voice(a, role), self.voice(b, role)))
            found[role] = _error_rate(scores[True], scores[False])
        return found


def verification(
    pairs: Sequence[Pair], roles: Iterable[str], embedding: Callable[[Path, str], FloatArray]
) -> dict[str, dict[str, float]]:
    """See :meth:`Scorer.verification`.

    Args:
        embedding: of a recording by the encoder of a role.
    """
    voices: dict[str, tuple[Path, ...]] = {}
    for pair in pairs:
        voices.setdefault(pair.target_speaker, pair.targets)
    if len(voices) < 2:
        return {}

    def unit(paths: Sequence[Path], role: str) -> FloatArray:
        voice = np.mean([embedding(path, role) for path in paths], axis=0)
        return np.asarray(voice / max(float(np.linalg.norm(voice)), 1e-12), dtype=np.float32)

    found = {}
    for role in roles:
        # One product of matrices: a thousand targets make a million trials.
        others = np.stack([unit(paths, role) for paths in voices.values()])
        same, different = [], []
        for pair in pairs:
            if pair.converted is not None:
                mine = unit((pair.converted,), role)
                same.append(float(unit(pair.targets, role) @ mine))
                strange = [who != pair.target_speaker for who in voices]
                different.append((others @ mine)[strange])
        found[role] = _error_rate(same, np.concatenate(different))
    return found


def _error_rate(same: ArrayLike, different: ArrayLike) -> dict[str, float]:
    result = metrics.equal_error_rate(same, different)
    return {
        "eer": result.rate,
        "threshold": result.threshold,
        "same": result.same,
        "different": result.different,
    }


def evaluate(
    pairs: Sequence[Pair],
    judges: Judges,
    *,
    name: str,
    group_by: str = "pair",
    resamples: int = RESAMPLES,
    seed: int = SEED,
    extra: Mapping[str, Mapping[str, float]] | None = None,
    system: Mapping[str, str] | None = None,
    peak_memory_mb: float | None = None,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Score every conversion and put intervals around the figures.

    A conversion whose recordings cannot be used is left out of the figures and named in the
    notes; nothing is scored in its place.

    Args:
        pairs: with conversions.
        name: of the system.
        group_by: what the bootstrap resamples: ``pair``, ``source`` or ``target`` (speakers).
        extra: pair id to figures measured elsewhere.
        system: stage to ``name@version``, where this project converted.

    Raises:
        EvaluationError: not one conversion could be scored.
    """
    scorer = Scorer(judges)
    scored, problems = [], list(notes)
    for done, pair in enumerate(pairs, 1):
        try:
            scored.append((pair, scorer.score(pair, (extra or {}).get(pair.id))))
        except AudioError as error:
            problems.append(_left_out(pair, str(error)))
        tell("judge", done, len(pairs), name)
    return _evaluation(
        scored, problems, scorer.verification, of=len(pairs), name=name, group_by=group_by,
        resamples=resamples, seed=seed, pins=judges.pins, system=system or {},
        peak_memory_mb=peak_memory_mb,
    )  # fmt: skip


def evaluate_on(
    executor: Executor, spec: WorkerSpec, pairs: Sequence[Pair], folder: Path, *, name: str,
    group_by: str = "pair",
) -> Evaluation:  # fmt: skip
    """Convert every pair into ``folder`` and score it, wherever the executor's workers are.

    Args:
        spec: of :func:`pair_spec`.

    Raises:
        AutoVoiceError: no worker can be made, or none of the pairs could be scored.
    """
    numbered = {str(number): pair for number, pair in enumerate(pairs, 1)}
    scored: dict[int, tuple[Pair, PairScore]] = {}
    problems: list[str] = []
    pins: dict[str, str] = {}
    system: dict[str, str] = {}
    notes: dict[str, None] = {}
    known: dict[tuple[Path, str], FloatArray] = {}
    jobs = (_job(number, pair, folder) for number, pair in numbered.items())
    for done, (job, outcome) in enumerate(executor.run(spec, jobs), 1):
        pair = replace(numbered[job["number"]], converted=Path(job["converted"]))
        if outcome["status"] == "done":
            score = outcome["score"]
            score = {**score, "targets": tuple(score["targets"]), "notes": tuple(score["notes"])}
            scored[int(job["number"])] = (pair, PairScore(**score))
            pins = outcome["pins"]
            system.update(outcome["system"])
            notes.update(dict.fromkeys(outcome["notes"]))
            for path, role, vector in outcome["embeddings"]:
                known[Path(path), role] = np.asarray(vector, np.float32)
        else:
            problems.append(_left_out(pair, outcome["error"]))
        tell("pairs", done, len(pairs))
    found = [scored[number] for number in sorted(scored)]
    roles = [role for role in SPEAKER_ROLES if any(r == role for _, r in known)]
    return _evaluation(
        found, [*notes, *problems],
        lambda them: verification(them, roles, lambda path, role: known[path, role]),
        of=len(pairs), name=name, group_by=group_by, resamples=RESAMPLES, seed=SEED, pins=pins,
        system=system,
    )  # fmt: skip


def pair_spec(settings: Mapping[str, Any]) -> WorkerSpec:
    """How the workers of :func:`evaluate_on` are made, from arguments of :func:`worker`."""
    return WorkerSpec(
        f"{__name__}:worker", settings,
        reads=("source", "parallel"), shared=("targets", "config"), writes=("converted",),
    )  # fmt: skip


def _job(number: str, pair: Pair, folder: Path) -> dict[str, Any]:
    return {
        "number": number, "id": pair.id, "source": str(pair.source),
        "targets": [str(path) for path in pair.targets],
        "converted": str(conversion_path(folder, int(number), pair)),
        "transcript": pair.transcript, "parallel": str(pair.parallel or ""),
        "source_speaker": pair.source_speaker, "target_speaker": pair.target_speaker,
    }  # fmt: skip


def worker(
    registry: Mapping[str, Any] | None = None,
    pipeline: Mapping[str, Any] | None = None,
    judges: Mapping[str, Any] | None = None,
) -> Worker:
    """A worker that converts pairs and scores them.

    Args:
        registry: keyword arguments of ``ModelRegistry``.
        pipeline: keyword arguments of ``PipelineConfig``.
        judges: keyword arguments of ``load_judges``.
    """
    from auto_voice.inference.voice_conversion_pipeline import (
        PipelineConfig,
        VoiceConversionPipeline,
    )
    from auto_voice.models.model_registry import ModelRegistry

    opened = ModelRegistry(progress=False, **(registry or {}))
    config = PipelineConfig(**(pipeline or {}))
    made = VoiceConversionPipeline(config, model_registry=opened)
    return Judging(made, load_judges(opened, **(judges or {})))


class Judging:
    """Converts and scores pairs, each reference cloned and each recording judged once as long as
    few others come between."""

    def __init__(self, pipeline: VoiceConversionPipeline, judges: Judges) -> None:
        self.pipeline = pipeline
        self.scorer = Scorer(judges)
        self._voices: OrderedDict[tuple[Path, ...], Voice] = OrderedDict()
        self._judged: OrderedDict[Path, None] = OrderedDict()

    def __call__(self, record: Record) -> dict[str, Any]:
        pair = Pair(
            record["id"], Path(record["source"]), tuple(Path(t) for t in record["targets"]),
            transcript=record["transcript"],
            parallel=Path(record["parallel"]) if record["parallel"] else None,
            source_speaker=record["source_speaker"], target_speaker=record["target_speaker"],
        )  # fmt: skip
        outcome = self._scored(record, pair)
        self.scorer.forget(Path(record["converted"]))
        for recording in filter(None, (pair.source, pair.parallel, *pair.targets)):
            self._judged[recording] = None
            self._judged.move_to_end(recording)
            if outcome["status"] != "done":  # Its samples may not have been let go.
                self.scorer.forget(recording)
        while len(self._judged) > RECORDINGS_KEPT:
            self.scorer.forget(self._judged.popitem(last=False)[0])
        return outcome

    def _voice(self, targets: tuple[Path, ...]) -> Voice:
        if targets not in self._voices:
            self._voices[targets] = self.pipeline.clone([str(path) for path in targets])
        self._voices.move_to_end(targets)
        if len(self._voices) > SHARED_KEPT:
            self._voices.popitem(last=False)
        return self._voices[targets]

    def _scored(self, record: Record, pair: Pair) -> dict[str, Any]:
        try:
            result = self.pipeline.convert(pair.source, self._voice(pair.targets))
            refuse_mock(result)
            path = result.save(Path(record["converted"]))
            pair = replace(pair, converted=path)
            score = self.scorer.score(pair, {"rtf": result.seconds_per_second})
        except AudioError as error:
            return {"status": "failed", "error": " ".join(str(error).split())}
        embeddings = [
            [str(p), role, vector.tolist()]
            for p in (path, *pair.targets)
            for role, vector in self.scorer.recording(p).embeddings.items()
        ]
        return {
            "status": "done", "score": asdict(score), "system": dict(result.models),
            "pins": dict(self.scorer.judges.pins), "notes": told_notes(result),
            "embeddings": embeddings,
        }  # fmt: skip


def _left_out(pair: Pair, why: str) -> str:
    log.warning("%s left out: %s", pair.id, why)
    return f"{pair.id} was left out: {_without_folders(why, pair)}"


def _evaluation(
    scored: Sequence[tuple[Pair, PairScore]],
    problems: list[str],
    verify: Callable[[Sequence[Pair]], dict[str, dict[str, float]]],
    *,
    of: int,
    name: str,
    group_by: str,
    resamples: int,
    seed: int,
    pins: Mapping[str, str],
    system: Mapping[str, str],
    peak_memory_mb: float | None = None,
) -> Evaluation:
    """The figures over all pairs ``of`` a list that could be scored.

    Raises:
        EvaluationError: none could.
    """
    if not scored:
        raise EvaluationError(f"None of the {of} conversions could be scored: {problems[-1]}")
    pairs, scores = [pair for pair, _ in scored], [score for _, score in scored]
    units = _units(scores, group_by)
    if units < FEWEST_UNITS:
        what = "conversions" if group_by == "pair" else f"{group_by} speakers"
        problems.append(
            f"{units} {what} are too few for 95 % intervals, which are narrower than they say; "
            f"score at least {FEWEST_UNITS}."
        )
    return Evaluation(
        name=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        pairs=tuple(scores),
        estimates=estimate_all(scores, group_by=group_by, resamples=resamples, seed=seed),
        models=dict(pins),
        system=dict(system),
        settings={
            "interval": "95 % percentile bootstrap",
            "resampled_by": group_by,
            "resamples": resamples,
            "seed": seed,
            "reference_text": "given" if all(i.transcript for i in pairs) else
            "heard in the source" if not any(i.transcript for i in pairs) else "mixed",
        },
        machine=machine(),
        verification=verify(pairs),
        peak_memory_mb=peak_memory_mb,
        notes=tuple(problems),
        left_out=of - len(scored),
    )  # fmt: skip


# The range of n values holds their median with probability 1 - 2^(1 - n): 97 % here.
FEWEST_UNITS = 6


def _units(pairs: Sequence[PairScore], group_by: str) -> int:
    if group_by == "pair":
        return len(pairs)
    return len({p.source_speaker if group_by == "source" else p.target_speaker for p in pairs})


def _without_folders(text: str, pair: Pair) -> str:
    """Reports are passed on: they say which file, not where it lay on this machine."""
    paths = [pair.source, *pair.targets, pair.converted, pair.parallel]
    for path in sorted({str(p) for p in paths if p is not None}, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text


def _counts(reference: str, heard: str) -> dict[str, int]:
    words, characters = word_errors(reference, heard), character_errors(reference, heard)
    if not normalise_text(reference):
        log.warning("No words in a reference text; its pair has no word error rate.")
    return {
        "word_edits": words.edits,
        "words": words.reference,
        "character_edits": characters.edits,
        "characters": characters.reference,
    }


def _qualities(source: Quality, converted: Quality) -> dict[str, float]:
    return {
        "dnsmos": converted.overall,
        "dnsmos_speech": converted.speech,
        "dnsmos_background": converted.background,
        "dnsmos_source": source.overall,
    }


def _pitches(
    source: JudgedRecording, target: JudgedRecording, converted: JudgedRecording
) -> dict[str, float]:
    agreement = metrics.pitch_agreement(source.pitch, converted.pitch)
    melody = metrics.pitch_agreement(source.melody, converted.pitch)
    return {
        "f0_correlation": agreement.correlation,
        "melody_correlation": melody.correlation,
        "f0_rmse_cents": agreement.rmse_cents,
        "voicing_error": agreement.voicing_error,
        "register_cents": abs(metrics.register_error_cents(target.pitch, converted.pitch)),
    }


def _signals(source: JudgedRecording, converted: JudgedRecording) -> dict[str, float]:
    return {
        "duration_ratio": converted.seconds / source.seconds,
        "loudness_lufs": converted.loudness,
        "loudness_change_lu": converted.loudness - source.loudness,
        "clipped": metrics.clipped_share(converted.audio.samples),
    }
