"""Features of training speech: the same functions that inference calls, computed once and stored.

One safetensors file an utterance, named by what it was made from, so that a broken run goes on
where it stopped and a changed recording is computed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from auto_voice.audio.envelope import with_envelope
from auto_voice.audio.io import read_audio
from auto_voice.audio.level import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, HIFIGAN_MEL, log_mel
from auto_voice.audio.pitch import align_pitch, extract_pitch
from auto_voice.audio.resample import resample
from auto_voice.errors import AutoVoiceError, TrainingError
from auto_voice.filesystem import atomic_write
from auto_voice.models.base import SpeakerEncoderStage
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.models.runtime.graphs import FOLDER, SUFFIX, graph_name
from auto_voice.models.whisper_encoder import (
    ARCHITECTURE,
    ContentSpace,
    WhisperEncoder,
    WhisperShape,
)
from auto_voice.training.data import Utterance
from auto_voice.types import FloatArray

log = logging.getLogger(__name__)

TEACHER = "recogniser_base"
# Part of every file's name; raise it when a feature's definition changes.
VERSION = 2
# Playback speeds of the content encoder's training input: pitch and formants move together.
SPEEDS = (0.86, 1.0, 1.16)
MIN_SECONDS, MAX_SECONDS = 0.8, 29.5


@dataclass(frozen=True)
class Models:
    """What the extraction needs, by name, so that workers load it themselves.

    Attributes:
        model_dir: of the registry that serves the teacher and the speaker encoder.
        content_space: file that ``fit_content_space`` wrote.
        layers: of the teacher.
        envelope, cepstra: whether the content ends with those.
    """

    model_dir: Path
    content_space: Path
    layers: int = 4
    envelope: bool = False
    cepstra: bool = False


def feature_path(folder: Path, utterance: Utterance) -> Path:
    stat = utterance.path.stat()
    made_from = f"{VERSION}|{utterance.path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return folder / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.safetensors"


def prepare(utterance: Utterance) -> FloatArray:
    """``(samples,)`` at 16 kHz and at the level that the networks are trained at."""
    audio = read_audio(utterance.path, sample_rate=16000).samples
    seconds = len(audio) / 16000
    if seconds < MIN_SECONDS:
        raise AutoVoiceError(
            f"{utterance.path} lasts {seconds:.2f} s; at least {MIN_SECONDS} s are needed."
        )
    audio = audio[: int(MAX_SECONDS * 16000)]
    return (audio * gain_to_speech_level(audio, 16000)).astype(np.float32)


def prepared(utterances: Sequence[Utterance], purpose: str) -> Iterator[FloatArray]:
    """:func:`prepare` of those that can be read, with progress; the log names the others."""
    for utterance in tqdm(utterances, desc=purpose, unit="file", disable=None):
        try:
            yield prepare(utterance)
        except AutoVoiceError as error:
            log.warning("left out of the %s: %s", purpose, error)


def compute(utterance: Utterance, models: Models) -> dict[str, FloatArray]:
    """Everything that the trainings read of one utterance.

    Returns:
        ``mel`` ``(80, frames)`` float16 as the vocoder takes it; ``log_f0`` and ``voiced``
        ``(frames,)`` at its frame rate; ``teacher`` ``(time, dims)`` float16 at 50 Hz;
        ``embedding`` ``(256,)`` of the whole utterance; ``content_mel_<speed>`` ``(80, 2 time)``
        float16 at 100 Hz for each of ``SPEEDS``.
    """
    audio = prepare(utterance)
    mel = log_mel(resample(audio, 16000, HIFIGAN_MEL.sample_rate), HIFIGAN_MEL)
    pitch = extract_pitch(audio, 16000)
    log_f0, voiced = align_pitch(pitch, HIFIGAN_MEL.frame_rate, mel.shape[1])
    teacher, space, speaker = _loaded(models)
    features: dict[str, FloatArray] = {
        "mel": mel.astype(np.float16),
        "log_f0": log_f0,
        "voiced": voiced.astype(np.float16),
        "embedding": speaker.embed_utterance(audio),
    }
    for speed in SPEEDS:
        # Reading n samples as if they were n / speed plays them faster and higher.
        played = audio if speed == 1.0 else resample(audio, round(16000 * speed), 16000)
        features[f"content_mel_{speed}"] = log_mel(played, CONTENT_MEL).astype(np.float16)
    content = space.project(teacher.features(audio))
    if models.envelope:
        content = with_envelope(content, features["content_mel_1.0"], models.cepstra)
    features["teacher"] = _centred(content).astype(np.float16)
    return features


def _centred(content: FloatArray) -> FloatArray:
    """Without the utterance's mean, which holds much of the speaker and the channel."""
    return np.asarray(content - content.mean(0), np.float32)


def extract(
    utterances: Sequence[Utterance], folder: Path, models: Models, workers: int | None = None
) -> dict[Path, str]:
    """Computes what is missing in ``folder``; goes on where an earlier run stopped.

    Returns:
        What was wrong with each recording that was left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [u for u in utterances if not feature_path(folder, u).exists()]
    failures: dict[Path, str] = {}
    workers = workers or os.cpu_count() or 1
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), _single_thread) as pool,
        tqdm(total=len(missing), desc="features", unit="file", disable=None) as bar,
    ):
        jobs = [pool.submit(_store, batch, folder, models) for batch in _batches(missing, 16)]
        for job in as_completed(jobs):
            done, failed = job.result()
            failures.update(failed)
            bar.update(done)
    return failures


def load(folder: Path, utterance: Utterance) -> dict[str, FloatArray] | None:
    """Stored features of an utterance; None where there are none."""
    path = feature_path(folder, utterance)
    return load_file(path) if path.exists() else None


def _store(
    utterances: Sequence[Utterance], folder: Path, models: Models
) -> tuple[int, dict[Path, str]]:
    failed: dict[Path, str] = {}
    for utterance in utterances:
        try:
            features = compute(utterance, models)
        except AutoVoiceError as error:
            failed[utterance.path] = str(error)
            continue
        target = feature_path(folder, utterance)
        # What is lost in a power cut is computed again.
        with atomic_write(target, durable=False) as temporary:
            save_file({k: np.ascontiguousarray(v) for k, v in features.items()}, temporary)
    return len(utterances), failed


def _batches(items: Sequence[Utterance], size: int) -> Iterator[Sequence[Utterance]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _single_thread() -> None:
    """Workers share the cores: one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"


@lru_cache(maxsize=1)
def _loaded(models: Models) -> tuple[WhisperEncoder, ContentSpace, SpeakerEncoderStage]:
    registry = ModelRegistry(models.model_dir)
    space = ContentSpace(**load_file(models.content_space))
    return load_teacher(registry, models.layers), space, registry.load_speaker_encoder()


def load_teacher(registry: ModelRegistry, layers: int = 4, device: str = "cpu") -> WhisperEncoder:
    """The content teacher from the catalog's recogniser."""
    return WhisperEncoder.load(
        registry.path(TEACHER, file="model.bin"), layers, device, teacher_graph
    )


def teacher_graph(shape: WhisperShape) -> bytes:
    """The package's graph of the teacher, or one that is made for a recipe of other layers."""
    path = FOLDER / f"{graph_name(ARCHITECTURE, shape)}{SUFFIX}"
    if path.exists():
        return path.read_bytes()
    # Only then, because it loads torch into every process that computes features.
    from auto_voice.training.export_graphs import export

    return export(ARCHITECTURE, shape)


def fit_content_space(
    utterances: Sequence[Utterance],
    teacher: WhisperEncoder,
    target: Path,
    dims: int,
    sample: int,
    begins: ContentSpace | None = None,
) -> None:
    """Fits the content space on ``sample`` utterances, spread over the list, and stores it.

    Args:
        begins: the space that the new one begins with, if any.

    Raises:
        TrainingError: none of them can be used.
    """
    chosen = utterances[:: max(1, len(utterances) // sample)][:sample]
    features = [teacher.features(samples) for samples in prepared(chosen, "content space")]
    if not features:
        raise TrainingError(
            f"None of {len(chosen)} recordings can be used, for example {chosen[0].path}; "
            "check them with: autovoice inspect FILE"
        )
    space = begins.widened(features, dims) if begins else ContentSpace.fit(features, dims)
    with atomic_write(target) as temporary:
        save_file(vars(space), temporary)
