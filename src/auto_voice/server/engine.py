"""The one place where the server meets models and voices: every call that it makes is here."""

from __future__ import annotations

import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.errors import (
    AutoVoiceError,
    MissingDependencyError,
    UnknownModelError,
    UnknownVoiceError,
    VoiceError,
    install_hint,
)
from auto_voice.inference.controls import Controls, controls_from
from auto_voice.inference.result import ConversionResult, FileResult, OutputSpec
from auto_voice.inference.streaming import LiveStream
from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.models.registry.catalog import ModelFile, ModelVersion
from auto_voice.models.registry.sources import bundled_files
from auto_voice.progress import Progress
from auto_voice.types import EMBEDDING_DIMS, Voice, Waveform
from auto_voice.voices.inspection import inspect_file
from auto_voice.voices.library import VoiceLibrary
from auto_voice.voices.voice_file import load_voice, save_voice

log = logging.getLogger(__name__)

# Recordings of the catalog for who has none at hand: 4 s to convert, and 10 s of a voice.
SAMPLES = {"recording": "sample_clone_test", "voice": "sample_beckett"}
# Hz of the recording that is kept with a voice.
SPEECH_RATE_HZ = 16_000


class Evaluator(Protocol):
    """Measures conversions; whoever starts the server gives it, as evaluation is another room."""

    def words_kept(self, source: Path, converted: Path, allow_truncated: bool) -> float:
        """Share of the words of ``source`` that are recognised in ``converted``, 0 to 1."""
        ...

    def pair(
        self,
        source: Path,
        targets: Sequence[Path],
        converted: Path,
        transcript: str,
        allow_truncated: bool,
    ) -> dict[str, Any]:
        """``figures``, ``texts`` and ``models`` of one conversion."""
        ...


@dataclass
class _ModelSet:
    """Models on one device: the pipeline, another on the same models that takes truncated
    recordings, and how many calls they are in."""

    pipeline: VoiceConversionPipeline
    lenient: VoiceConversionPipeline
    calls: int = 0


@dataclass(frozen=True)
class LiveConversion:
    """A stream, and the models and voices that it can be changed with."""

    stream: LiveStream
    pipeline: VoiceConversionPipeline
    voices: StoredVoices

    def change(self, voice: str | None = None, controls: Controls | None = None) -> None:
        """From the next block on, speak as a stored voice and by ``controls``; None keeps them.

        Raises:
            AutoVoiceError: there is no such voice, or controls that need the whole recording.
        """
        found = None if voice is None else self.pipeline.voice(self.voices.get(voice))
        self.stream.change(found, controls)


class Engine:
    """Models and voices behind the server.

    Args:
        pipeline: one set of loaded models for all threads.
        voice_dir: where enrolled voices are kept; None for the setting ``voice_dir``. Or the
            library itself.
        evaluator: measures conversions; None where evaluation is not installed.
        others: further sets of the same models on other devices. Each call goes to the set that is
            in the fewest.
    """

    def __init__(
        self,
        pipeline: VoiceConversionPipeline,
        voice_dir: Path | VoiceLibrary | None = None,
        evaluator: Evaluator | None = None,
        others: Sequence[VoiceConversionPipeline] = (),
    ) -> None:
        self.pipeline = pipeline
        self.registry = pipeline.registry
        self._evaluator = evaluator
        self.voices = StoredVoices(voice_dir, pipeline.registry)
        self.blobs = Blobs(pipeline.registry)
        self._sets = [_ModelSet(made, _lenient(made)) for made in (pipeline, *others)]
        self._lock = threading.Lock()

    @contextmanager
    def _set(self) -> Iterator[_ModelSet]:
        with self._lock:
            chosen = min(self._sets, key=lambda models: models.calls)
            chosen.calls += 1
        try:
            yield chosen
        finally:
            with self._lock:
                chosen.calls -= 1

    @property
    def mock(self) -> bool:
        return self.registry.use_mock

    @property
    def can_evaluate(self) -> bool:
        return self._evaluator is not None

    # Converting

    def clone(
        self, references: Sequence[Waveform], name: str, progress: Callable[[float], None]
    ) -> Voice:
        with self._set() as models:
            return models.pipeline.clone(
                list(references), name=name, progress=_fraction_of("fine-tune", progress)
            )

    def convert(
        self,
        source: Waveform,
        voice: Voice,
        controls: Mapping[str, Any],
        progress: Callable[[float], None],
    ) -> ConversionResult:
        with self._set() as models:
            return models.pipeline.convert(
                source,
                voice,
                controls=controls_from(controls),
                progress=_fraction_of("convert", progress),
            )

    def convert_file(
        self,
        source: Path,
        voice: Voice,
        output: Path,
        controls: Mapping[str, Any],
        progress: Callable[[float], None],
        *,
        subtype: str | None,
        allow_truncated: bool,
    ) -> FileResult:
        """From file to file in constant memory; goes on where an earlier call was stopped."""
        with self._set() as models:
            pipeline = models.lenient if allow_truncated else models.pipeline
            return pipeline.convert_file(
                source,
                voice,
                OutputSpec(output, subtype=subtype, allow_mock=True),
                controls=controls_from(controls),
                memory_seconds=0,
                progress=_fraction_of("convert", progress),
            )

    @contextmanager
    def live(
        self, voice: str, controls: Controls, *, own_voice: str | None = None, **options: Any
    ) -> Iterator[LiveConversion]:
        """A live conversion to a stored voice; its set of models counts as used until it ends.

        Args:
            own_voice: a stored voice of who speaks.
            options: of ``VoiceConversionPipeline.stream``.

        Raises:
            AutoVoiceError: a voice is missing, or something is asked that no live conversion can
                do.
        """
        with self._set() as models:
            stream = models.pipeline.stream(
                self.voices.get(voice),
                controls,
                own_voice=None if own_voice is None else self.voices.get(own_voice),
                **options,
            )
            stream.warm_up(1)
            yield LiveConversion(stream, models.pipeline, self.voices)

    def enrol(
        self,
        references: Sequence[tuple[str, Waveform]],
        name: str,
        consent: str,
        overwrite: bool,
        progress: Callable[[float], None],
        made: Path,
        keep: Callable[[], None],
    ) -> dict[str, Any]:
        """Keep the voice of ``references`` under ``name``.

        Args:
            made: where the voice is written before; what is there already was made by an earlier
                try, which may have got as far as the library.
            keep: called when it is written.
        """
        if not made.exists():
            self.voices.check_name(name, overwrite)
            self._learn(references, name, consent, progress, made)
            keep()
        progress(1.0)  # the last moment at which it can be cancelled
        return about(self.voices.publish(name, made, overwrite))

    def _learn(
        self,
        references: Sequence[tuple[str, Waveform]],
        name: str,
        consent: str,
        progress: Callable[[float], None],
        made: Path,
    ) -> None:
        with self._set() as models:
            voice = models.pipeline.clone(
                [waveform for _, waveform in references],
                name=name,
                labels=[label for label, _ in references],
                consent=consent,
                progress=_fraction_of("fine-tune", progress),
            )
        save_voice(made, replace(voice, name=name))

    def similarity(self, audio: Waveform, voice: Voice) -> float:
        with self._set() as models:
            return models.pipeline.similarity(audio, voice)

    # Measuring

    def inspect(self, path: Path, name: str) -> dict[str, Any]:
        """Inspect a recording and compare it with the stored voices."""
        with self._set() as models:
            found = inspect_file(path, models.pipeline.speaker_encoder, self.voices.all())
        return found.as_dict() | {"file": name}

    @property
    def evaluator(self) -> Evaluator:
        """Raises MissingDependencyError where there is none."""
        if self._evaluator is None:
            raise MissingDependencyError(
                "this server cannot evaluate; whoever runs it installs that with: "
                f"{install_hint('eval,server')}"
            )
        return self._evaluator

    # Models and samples

    def sample(self, name: str) -> Waveform:
        """A recording of the catalog to try the server with.

        Raises:
            UnknownModelError: there is no such sample.
            ModelError: it cannot be fetched.
        """
        if name not in SAMPLES:
            raise UnknownModelError(f"there is no sample {name!r}; known: {', '.join(SAMPLES)}.")
        return cast(Waveform, self.registry.load(SAMPLES[name]))

    def models(self) -> list[dict[str, Any]]:
        return [asdict(status) for status in self.registry.status()]

    def model(self, name: str, version: str | None = None) -> list[dict[str, Any]]:
        """Every version of a model, or one.

        Raises:
            UnknownModelError: there is none.
        """
        wanted = self.registry.version(name, version)
        return [
            found
            for found in self.models()
            if found["name"] == wanted.name
            and (version is None or found["version"] == wanted.version)
        ]

    def pull(self, name: str, version: str | None) -> dict[str, Any]:
        files = self.registry.pull(name, version)
        return {"files": sorted(files)}

    def warm(self, name: str, version: str | None) -> dict[str, Any]:
        key = name if version is None else f"{name}@{version}"
        for models in self._sets[1:]:
            models.pipeline.registry.warmup_models([key])
        timing = self.registry.warmup_models([key])
        return {"resolved": self.registry.resolved(name, version), "timings": _plain(timing)}

    def warm_up(self) -> dict[str, float]:
        """Load every stage and run it once; seconds by stage, on all devices together."""
        total: dict[str, float] = {}
        for models in self._sets:
            for stage, seconds in models.pipeline.warmup().items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def unload(self, name: str, version: str | None) -> None:
        for models in self._sets:
            models.pipeline.registry.unload(name, version)


def _lenient(pipeline: VoiceConversionPipeline) -> VoiceConversionPipeline:
    """On the same loaded models; whether truncated recordings are taken is set per pipeline."""
    return VoiceConversionPipeline(
        replace(pipeline.config, allow_truncated=True, enable_model_warmup=False),
        model_registry=pipeline.registry,
    )


def _fraction_of(stage: str, tell: Callable[[float], None]) -> Callable[[Progress], None]:
    """Tells ``tell`` the fraction of one stage that is done."""

    def hear(progress: Progress) -> None:
        if progress.stage == stage:
            tell(progress.fraction)

    return hear


def _plain(timing: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in timing.items()}


# Files for other machines

# Downloads that run at once for others.
MOST_FETCHES = 2
# Seconds during which a download that failed is not tried again.
FETCH_AGAIN_SECONDS = 60.0


class Blobs:
    """Files of models by their sha256, which other machines fetch here instead of from outside.

    Args:
        registry: its store and catalog say what there is.
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MOST_FETCHES)
        self._under_way: set[str] = set()
        self._failed: dict[str, float] = {}

    def path(self, sha256: str) -> Path | None:
        """The file with this hash; None if it is not here."""
        found = self._registry.store.path_of(sha256)
        if found is None and (named := self._named(sha256)) is not None:
            found = (bundled_files(named[0]) or {}).get(named[1].file)
        return found

    def fetch(self, sha256: str) -> int | None:
        """Have a file of the catalog fetched, once however many ask.

        Returns:
            How many of its bytes have arrived; None if the catalog does not name it, or it could
            not be had a moment ago.
        """
        named = self._named(sha256)
        if named is None or self._registry.settings.offline:
            return None
        version, file = named
        with self._lock:
            if time.monotonic() - self._failed.get(version.key, -math.inf) < FETCH_AGAIN_SECONDS:
                return None
            if version.key not in self._under_way:
                self._under_way.add(version.key)
                threading.Thread(
                    target=self._bring, args=(version,), name="mirror", daemon=True
                ).start()
        return self._registry.loader.arrived(file)

    def _named(self, sha256: str) -> tuple[ModelVersion, ModelFile] | None:
        for version in self._registry.catalog.versions():
            for file in version.files:
                if file.sha256 == sha256:
                    return version, file
        return None

    def _bring(self, version: ModelVersion) -> None:
        try:
            with self._slots:
                self._registry.pull(version.name, version.version)
        except AutoVoiceError as error:
            log.warning("%s could not be fetched for other machines: %s", version.key, error)
            self._failed[version.key] = time.monotonic()
        finally:
            with self._lock:
                self._under_way.discard(version.key)


# Voices

# Bytes of an imported voice: an export of the longest reference that is kept is an eighth of it.
VOICE_FILE_BYTES = 20_000_000
# What enrolment writes stays far below these.
MOST_NOTES, LONGEST_NOTE = 50, 300
MOST_FIGURES = 50
LONGEST_CONSENT = 500
# Notes that tell what was done and ask for nothing.
_HARMLESS = re.compile(r"resampled from|down to one|encoded again")
# Seconds of speech that a voice can have been made from.
LONGEST_SPEECH = 3600.0
# Of a weight: fine-tuning moves none by a tenth of it.
LARGEST_CHANGE = 2.0


class StoredVoices:
    """The voice library as the API shows it.

    Args:
        place: a folder, None for the setting ``voice_dir``, or the library itself.
        registry: knows the converters that a voice can be fine-tuned for.
    """

    def __init__(self, place: Path | VoiceLibrary | None, registry: ModelRegistry) -> None:
        self._library = place if isinstance(place, VoiceLibrary) else VoiceLibrary(place)
        self._registry = registry
        lock = threading.Lock()
        self._lock: Callable[[], AbstractContextManager[Any]] = lambda: lock

    def share(self, exclusively: Callable[[], AbstractContextManager[Any]]) -> None:
        """Change voices only within what ``exclusively`` gives, for other processes do, too."""
        self._lock = exclusively

    def listed(self) -> list[dict[str, Any]]:
        """A description of each voice that can be read; no array of a voice is read."""
        # Whoever asks for a damaged one by its name is told so.
        found, _ = self._library.facts()
        return [_shown(name, facts) for name, facts in found.items()]

    def all(self) -> Mapping[str, Voice]:
        """Every voice that can be read, by name."""
        return self._library.readable()[0]

    def get(self, name: str) -> Voice:
        return self._library.get(name)

    def file(self, name: str) -> Path:
        """The path of a stored voice; raises UnknownVoiceError."""
        return self._library.require(name)

    def speech(self, name: str) -> Waveform:
        """The recording that was kept with a voice.

        Raises:
            VoiceError: there is no such voice, or it was stored without its recording (404).
        """
        voice = self._library.get(name)
        if voice.speech is None:
            raise UnknownVoiceError(
                f"the voice {name!r} was stored without its recording; convert something to hear "
                "it."
            )
        return Waveform(voice.speech.astype(np.float32) / np.float32(32768), SPEECH_RATE_HZ)

    def check_name(self, name: str, overwrite: bool) -> None:
        """Raises VoiceError if a voice cannot be added under the name."""
        self._library.path(name)
        if name in self._library and not overwrite:
            raise VoiceError(f"there is a voice {name!r} already; choose another name.")

    def add(self, name: str, voice: Voice, overwrite: bool) -> Voice:
        with self._lock():
            self.check_name(name, overwrite)
            self._library.add(name, voice, overwrite=overwrite)
            return self._library.get(name)

    def publish(self, name: str, made: Path, overwrite: bool) -> Voice:
        """Keep the voice file ``made`` under ``name``, unless it is what is there."""
        with self._lock():
            is_there = name in self._library and not overwrite
            if is_there and self._library.require(name).read_bytes() == made.read_bytes():
                return self._library.get(name)
            self.check_name(name, overwrite)
            self._library.add(name, made, overwrite=overwrite)
            return self._library.get(name)

    def rename(self, name: str, to: str) -> Voice:
        with self._lock():
            if name != to:
                self.check_name(to, overwrite=False)
            self._library.rename(name, to)
            return self._library.get(to)

    def remove(self, name: str) -> None:
        with self._lock():
            self._library.remove(name)

    def export_bytes(self, name: str) -> bytes:
        self._library.get(name)
        return self._library.require(name).read_bytes()

    def import_bytes(self, data: bytes, name: str) -> Voice:
        """Keep a voice file's voice, by its own name if ``name`` is empty.

        Raises:
            VoiceError: it is no voice file, or one that no converter can speak with.
        """
        self._library.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The leading dot keeps it out of the library while it is looked at.
        temporary = self._library.folder / f".{secrets.token_hex(8)}"
        try:
            temporary.write_bytes(data)
            voice = load_voice(temporary)
        except VoiceError:
            raise VoiceError(
                "the file is no voice, or damaged; send one that `autovoice clone` or an export "
                "made."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
        _check_shapes(voice)
        _check_facts(voice)
        self._check_fine_tuning(voice)
        return self.add(name or voice.name or "imported", voice, overwrite=False)

    def _check_fine_tuning(self, voice: Voice) -> None:
        if bool(voice.fine_tuning) != bool(voice.fine_tuned_converter):
            raise VoiceError(
                "the voice file does not say which converter it was fine-tuned for; export it "
                "again."
            )
        if not voice.fine_tuning:
            return
        name, _, version = voice.fine_tuned_converter.partition("@")
        try:
            known = self._registry.version(name, version or None)
        except UnknownModelError:
            known = None
        if known is None or known.kind != "converter":
            raise VoiceError(
                f"the voice was fine-tuned for the converter {voice.fine_tuned_converter[:80]}, "
                "which this server does not have; clone it here from its recordings."
            )
        largest = max(float(np.abs(values).max()) for values in voice.fine_tuning.values())
        if not largest < LARGEST_CHANGE:
            raise VoiceError(
                "the voice file holds a fine-tuning that would only make noise; clone the voice "
                "again."
            )


def _check_facts(voice: Voice) -> None:
    fits = len(voice.notes) <= MOST_NOTES and all(len(n) <= LONGEST_NOTE for n in voice.notes)
    fits = fits and len(voice.quality) <= MOST_FIGURES and len(voice.consent) <= LONGEST_CONSENT
    if not fits:
        raise VoiceError(
            f"the voice file holds more text than a voice has (at most {MOST_NOTES} notes of "
            f"{LONGEST_NOTE} characters); clone the voice again."
        )
    if not 0 <= voice.speech_seconds <= LONGEST_SPEECH:
        raise VoiceError("the voice file holds values that no voice has; clone the voice again.")


def _check_shapes(voice: Voice) -> None:
    mel, content = voice.frames.get("mel"), voice.frames.get("content")
    fits = voice.embedding.shape == (EMBEDDING_DIMS,) and (mel is None) == (content is None)
    if mel is not None and content is not None:
        fits &= mel.ndim == content.ndim == 2
        fits = fits and 0 < len(mel) == len(content) and mel.shape[1] == HIFIGAN_MEL.bands
    if not fits:
        raise VoiceError("the voice file holds numbers of other shapes than a voice has.")
    if abs(float(np.linalg.norm(voice.embedding)) - 1.0) > 0.01:
        raise VoiceError("the voice file holds values that no voice has; clone the voice again.")


def about(voice: Voice) -> dict[str, Any]:
    """A voice as the API describes it."""
    return _shown(voice.name, vars(voice) | {"has_recording": voice.speech is not None})


def _shown(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    pitch = facts["log_f0_mean"]
    said = [str(note)[:LONGEST_NOTE] for note in facts["notes"][:MOST_NOTES]]
    if len(facts["notes"]) > MOST_NOTES:
        said[MOST_NOTES - 1 :] = ["There are more notes; clone the voice again."]
    return {
        "name": name,
        "speech_seconds": round(facts["speech_seconds"], 2),
        "pitch_hz": None if pitch is None else round(math.exp(pitch), 1),
        "encoder": facts["encoder"],
        "quality": dict(list(facts["quality"].items())[:MOST_FIGURES]),
        "notes": [note for note in said if not _HARMLESS.search(note)],
        "remarks": [note for note in said if _HARMLESS.search(note)],
        "consent": facts["consent"][:LONGEST_CONSENT],
        "has_recording": facts["has_recording"],
    }
