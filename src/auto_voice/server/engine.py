"""The one place where the server meets the engine: every call it makes is here, and no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from auto_voice.errors import MissingDependencyError
from auto_voice.inference.controls import controls_from
from auto_voice.inference.file_conversion import convert_file
from auto_voice.inference.result import ConversionResult, FileResult
from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline
from auto_voice.server.voice_library import Shelf, about
from auto_voice.types import Voice, Waveform
from auto_voice.voices.enrolment import enrol
from auto_voice.voices.inspection import inspect_file


class Evaluator(Protocol):
    """What judges conversions; given by whoever starts the server, because it is a room apart."""

    def words_kept(self, source: Path, converted: Path) -> float:
        """Share of the words of ``source`` that are heard in ``converted``, 0 to 1."""
        ...

    def pair(
        self, source: Path, targets: Sequence[Path], converted: Path, transcript: str
    ) -> dict[str, Any]:
        """``figures``, ``texts`` and ``models`` of one conversion."""
        ...


class Engine:
    """Models and voices behind the server.

    Args:
        pipeline: one set of loaded models for all threads.
        voice_dir: where enrolled voices are kept; None for the setting ``voice_dir``.
        evaluator: None where evaluation is not installed.
    """

    def __init__(
        self,
        pipeline: VoiceConversionPipeline,
        voice_dir: Path | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.registry = pipeline.registry
        self._evaluator = evaluator
        self.voices = Shelf(voice_dir)

    @property
    def mock(self) -> bool:
        return self.registry.use_mock

    @property
    def can_evaluate(self) -> bool:
        return self._evaluator is not None

    # Converting

    def clone(self, references: Sequence[Waveform], name: str) -> Voice:
        return self.pipeline.clone(list(references), name=name)

    def convert(
        self,
        source: Waveform,
        voice: Voice,
        controls: Mapping[str, Any],
        progress: Callable[[float], None],
    ) -> ConversionResult:
        return self.pipeline.convert(
            source, voice, controls=controls_from(dict(controls)), progress=progress
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
    ) -> FileResult:
        """From file to file in constant memory; goes on where an earlier call was stopped."""
        return convert_file(
            self.pipeline,
            source,
            voice,
            output,
            controls=controls_from(dict(controls)),
            subtype=subtype,
            allow_mock=True,
            progress=progress,
        )

    def enrol(
        self, references: Sequence[tuple[str, Waveform]], name: str, consent: str, overwrite: bool
    ) -> dict[str, Any]:
        self.voices.check_name(name, overwrite)
        voice = enrol(self.pipeline, references, name, consent=consent)
        return about(self.voices.add(name, voice, overwrite))

    def similarity(self, audio: Waveform, voice: Voice) -> float:
        return self.pipeline.similarity(audio, voice)

    # Judging

    def inspect(self, path: Path, name: str) -> dict[str, Any]:
        """What is in a recording, and whose stored voice it resembles."""
        found = inspect_file(path, self.pipeline.speaker_encoder, self.voices.all())
        return found.as_dict() | {"file": name}

    @property
    def evaluator(self) -> Evaluator:
        """Raises MissingDependencyError where there is none."""
        if self._evaluator is None:
            raise MissingDependencyError(
                "this server cannot evaluate; install it with: "
                'pip install "auto-voice[eval,server]"'
            )
        return self._evaluator

    # Models

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
        timing = self.registry.warmup_models([name if version is None else f"{name}@{version}"])
        return {"resolved": self.registry.resolved(name, version), "timings": _plain(timing)}

    def warm_up(self) -> dict[str, float]:
        """Load every stage and run it once."""
        return self.pipeline.warmup()

    def unload(self, name: str, version: str | None) -> None:
        self.registry.unload(name, version)


def _plain(timing: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(found) for name, found in timing.items()}
