"""Features of training speech: the same functions that inference calls, computed once and stored.

One safetensors file an utterance, named by what it was made from, so that a broken run goes on
where it stopped and a changed recording is computed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.io import read_audio
from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, HIFIGAN_MEL, log_mel, with_envelope
from auto_voice.audio.pitch import align_pitch, extract_pitch
from auto_voice.audio.resample import resample
from auto_voice.batch.executors import (
    Executor,
    ProcessExecutor,
    Record,
    Worker,
    WorkerSpec,
    limit_threads,
)
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
    log_energies,
)
from auto_voice.training.data import Utterance
from auto_voice.types import SPEECH_RATE, FloatArray

# Ranges of playback speed: far enough from 1 to be another throat, near enough to be speech.
SPEED_RANGES = ((0.82, 0.93), (1.08, 1.22))
# Standard deviation of the random response of a perturbed copy, dB.
RESPONSE_DB = 5.0


@dataclass(frozen=True)
class Pauses:
    """Silence around a recording and the noise floor under all of it.

    Attributes:
        lead_seconds, trail_seconds: of silence inserted before and after.
        noise_dbfs: level of the noise floor, speech lying at ``SPEECH_DBFS``; None: no noise.
        tilt_db_per_octave: of the noise's spectrum.
        hum_hz, hum_dbfs: of a mains hum with four harmonics; ``hum_hz`` 0: none.
        seed: of the noise itself.
    """

    lead_seconds: float = 0.0
    trail_seconds: float = 0.0
    noise_dbfs: float | None = None
    tilt_db_per_octave: float = 0.0
    hum_hz: float = 0.0
    hum_dbfs: float = -60.0
    seed: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, share: float = 1.0) -> Pauses:
        """Random ones for ``share`` of all recordings, no change for the others."""
        if rng.random() >= share:
            return cls()
        lead, trail = (
            float(rng.uniform(0.1, 0.9)) if rng.random() < 0.8 else 0.0 for _ in range(2)
        )
        noise = float(rng.uniform(-90, -50)) if rng.random() < 0.85 else None
        hum = float(rng.choice([50.0, 60.0])) if rng.random() < 0.15 else 0.0
        return cls(
            lead, trail, noise, float(rng.uniform(-6, 0)), hum,
            float(rng.uniform(-70, -50)), int(rng.integers(2**31)),
        )  # fmt: skip

    def insert(self, samples: FloatArray, sample_rate: int = SPEECH_RATE) -> FloatArray:
        """``(samples,)`` at the networks' level, with silence around it and noise under it."""
        lead, trail = (round(s * sample_rate) for s in (self.lead_seconds, self.trail_seconds))
        out = np.pad(samples, (lead, trail)).astype(np.float32)
        rng = np.random.default_rng(self.seed)
        if self.noise_dbfs is not None:
            out += _noise(rng, len(out), self.noise_dbfs, self.tilt_db_per_octave)
        if self.hum_hz:
            out += _hum(rng, len(out), sample_rate, self.hum_hz, self.hum_dbfs)
        return out


def _noise(rng: np.random.Generator, samples: int, dbfs: float, tilt: float) -> FloatArray:
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    octave = np.log2(np.maximum(np.arange(len(spectrum)), 1) / max(1, len(spectrum) / 64))
    spectrum *= 10 ** (tilt * np.maximum(octave, -1) / 20)
    noise = np.fft.irfft(spectrum, samples)
    rms = float(np.sqrt(np.mean(noise**2))) or 1.0
    return np.asarray(noise * (10 ** (dbfs / 20) / rms), np.float32)


def _hum(
    rng: np.random.Generator, samples: int, sample_rate: int, hertz: float, dbfs: float
) -> FloatArray:
    time = np.arange(samples) / sample_rate
    out = np.zeros(samples)
    for harmonic in range(1, 6):
        level = 10 ** ((dbfs - rng.uniform(0, 12) * (harmonic > 1)) / 20)
        out += level * np.sin(2 * np.pi * (hertz * harmonic * time + rng.random()))
    return np.asarray(out, np.float32)


def random_response(samples: FloatArray, rng: np.random.Generator, spread_db: float) -> FloatArray:
    """``samples`` through a smooth random response: six cosines over the mel-like log frequency."""
    spectrum = np.fft.rfft(samples)
    place = np.log1p(np.arange(len(spectrum)) / len(spectrum) * 8000 / 700) / np.log1p(8000 / 700)
    order = np.arange(1, 7)[:, None]
    amounts = rng.normal(0, spread_db, (6, 1)) / np.sqrt(order)
    gain_db = (amounts * np.cos(np.pi * order * place)).sum(0)
    return np.asarray(np.fft.irfft(spectrum * 10 ** (gain_db / 20), len(samples)), np.float32)


def perturbed_copy(samples: FloatArray, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """``(samples,)`` through a random response and played at a random speed, and that speed:
    what was at ``t`` seconds is at ``t / speed``."""
    speed = float(rng.uniform(*SPEED_RANGES[int(rng.integers(len(SPEED_RANGES)))]))
    # Reading n samples as if they were n / speed plays them faster and moves formants and F0 up.
    responded = random_response(samples, rng, RESPONSE_DB)
    return resample(responded, round(SPEECH_RATE * speed), SPEECH_RATE), speed


log = logging.getLogger(__name__)

TEACHER = "recogniser_base"
# Part of every file's name; raise it when a feature's definition changes.
VERSION = 3
MIN_SECONDS, MAX_SECONDS = 0.8, 29.5
# Names of the features that hold the content of perturbed copies begin so, and that of what a
# content encoder reads.
PERTURBED, WHISPER_ENERGIES = "perturbed_", "whisper_energies"


@dataclass(frozen=True)
class Models:
    """What the extraction needs, by name, so that workers load it themselves.

    Attributes:
        model_dir, config, offline, mirrors: of the registry that serves the teacher and the speaker
            encoder; None for what is set where the work is done.
        content_space: file that ``fit_content_space`` wrote.
        layers: of the teacher.
        envelope, cepstra: whether the content ends with those.
        pauses: share of recordings that get silence around them and a noise floor.
        perturbed: copies with other formants whose content is computed, too.
    """

    model_dir: Path | None
    content_space: Path
    layers: int = 4
    envelope: bool = False
    cepstra: bool = False
    pauses: float = 0.0
    perturbed: int = 0
    config: Path | None = None
    offline: bool | None = False
    mirrors: tuple[str, ...] | None = None

    def spec(self) -> WorkerSpec:
        """How workers that compute features with them are made."""
        settings = {n: str(v) if isinstance(v, Path) else v for n, v in vars(self).items()}
        return WorkerSpec(
            f"{__name__}:worker", {"models": settings},
            reads=("recordings",), shared=("content_space", "config"), writes=("features",),
        )  # fmt: skip


_PATHS = ("model_dir", "content_space", "config")


def feature_path(folder: Path, utterance: Utterance) -> Path:
    try:
        stat = utterance.path.stat()
        stamp = f"{stat.st_size}|{stat.st_mtime_ns}"
    except OSError:
        stamp = "absent"  # Whoever reads the recording says why.
    made_from = f"{VERSION}|{utterance.path.resolve()}|{stamp}"
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
        ``embedding`` ``(256,)`` of the whole utterance; ``whisper_energies`` ``(80, 2 time)``
        float16 at 100 Hz; ``perturbed_<n>`` ``(time, dims)`` float16, the content of copies with
        other formants.
    """
    speech = prepare(utterance)
    # Aligned recordings get the same pauses, or they were aligned no more.
    pauses = Pauses.draw(_generator(utterance.parallel or utterance.path.name), models.pauses)
    audio = pauses.insert(speech)
    mel = log_mel(resample(audio, 16000, HIFIGAN_MEL.sample_rate), HIFIGAN_MEL)
    pitch = extract_pitch(audio, 16000)
    log_f0, voiced = align_pitch(pitch, HIFIGAN_MEL.frame_rate, mel.shape[1])
    teacher, space, speaker = _loaded(models)
    features: dict[str, FloatArray] = {
        "mel": mel.astype(np.float16),
        "log_f0": log_f0,
        "voiced": voiced.astype(np.float16),
        "embedding": speaker.embed_utterance(speech),
    }
    features[WHISPER_ENERGIES] = log_energies(audio).astype(np.float16)
    features["teacher"] = _content(audio, teacher, space, models).astype(np.float16)
    rng = _generator(utterance.path.name)
    for index in range(models.perturbed):
        played, speed = perturbed_copy(audio, rng)
        content = interpolate_frames(
            _content(played, teacher, space, models), 50.0 / speed, 50.0, len(features["teacher"])
        )
        features[f"{PERTURBED}{index}"] = content.astype(np.float16)
    return features


def _content(
    audio: FloatArray, teacher: WhisperEncoder, space: ContentSpace, models: Models
) -> FloatArray:
    """``(time, dims)`` at 50 Hz, without the utterance's mean."""
    content = space.project(teacher.features(audio))
    if models.envelope:
        content = with_envelope(content, log_mel(audio, CONTENT_MEL), models.cepstra)
    return _centred(content)


def _generator(name: str) -> np.random.Generator:
    """Random numbers that a name always has."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def _centred(content: FloatArray) -> FloatArray:
    """Without the utterance's mean, which holds much of the speaker and the channel."""
    return np.asarray(content - content.mean(0), np.float32)


def extract(
    utterances: Sequence[Utterance],
    folder: Path,
    models: Models,
    workers: int | None = None,
    executor: Executor | None = None,
) -> dict[Path, str]:
    """Computes what is missing in ``folder``; goes on where an earlier run stopped.

    Args:
        workers: processes of this machine; by default one for each core.
        executor: who computes instead of them.

    Returns:
        What was wrong with each recording that was left out.

    Raises:
        TrainingError: a worker died, so that some are still missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [u for u in utterances if not feature_path(folder, u).exists()]
    jobs = (
        {
            "recordings": [str(u.path) for u in batch],
            "parallel": [u.parallel for u in batch],
            "features": [str(feature_path(folder, u)) for u in batch],
        }
        for batch in _batches(missing, 16)
    )
    failures: dict[Path, str] = {}
    lost = ""
    executor = executor or ProcessExecutor(workers or os.cpu_count() or 1)
    with tqdm(total=len(missing), desc="features", unit="file", disable=None) as bar:
        for job, outcome in executor.run(models.spec(), jobs):
            if outcome["status"] == "done":
                failures.update((Path(path), why) for path, why in outcome["left_out"])
            else:
                lost = outcome["error"]
            bar.update(len(job["recordings"]))
    if lost:
        raise TrainingError(f"Some features are missing ({lost}); run the same command again.")
    return failures


def load(folder: Path, utterance: Utterance) -> dict[str, FloatArray] | None:
    """Stored features of an utterance; None where there are none."""
    path = feature_path(folder, utterance)
    return load_file(path) if path.exists() else None


def worker(models: Mapping[str, Any]) -> Worker:
    """A worker that computes features; see :meth:`Models.spec`."""
    limit_threads(1)  # Workers share the cores.
    paths = {name: Path(models[name]) for name in _PATHS if models[name]}
    made = Models(**{**models, **paths})
    _loaded(made)

    def work(job: Record) -> dict[str, Any]:
        left_out = []
        jobs = zip(job["recordings"], job["parallel"], job["features"], strict=True)
        for recording, parallel, target in jobs:
            try:
                features = compute(Utterance(Path(recording), "", "", parallel), made)
            except AutoVoiceError as error:
                left_out.append([recording, str(error)])
                continue
            # What is lost in a power cut is computed again.
            with atomic_write(Path(target), durable=False) as temporary:
                save_file({k: np.ascontiguousarray(v) for k, v in features.items()}, temporary)
        return {"status": "done", "left_out": left_out}

    return work


def _batches(items: Sequence[Utterance], size: int) -> Iterator[Sequence[Utterance]]:
    return (items[i : i + size] for i in range(0, len(items), size))


@lru_cache(maxsize=1)
def _loaded(models: Models) -> tuple[WhisperEncoder, ContentSpace, SpeakerEncoderStage]:
    registry = ModelRegistry(
        models.model_dir, config=models.config, offline=models.offline, mirrors=models.mirrors
    )
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
) -> None:
    """Fits the content space on ``sample`` utterances, spread over the list, and stores it.

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
    space = ContentSpace.fit(features, dims)
    with atomic_write(target) as temporary:
        save_file(vars(space), temporary)
