"""What each kind of job does with one item."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from auto_voice.errors import AutoVoiceError
from auto_voice.server.control import Control
from auto_voice.server.engine import Engine
from auto_voice.server.files import JobFiles
from auto_voice.server.jobs import Claim, Record
from auto_voice.server.metrics import Metrics
from auto_voice.server.settings import ServerSettings
from auto_voice.server.uploads import Decoding, check_upload, gathered
from auto_voice.types import Voice, Waveform

KEPT_VOICES = 8
IN_MEMORY_SECONDS = 300.0
"""Longer recordings go through the disk, in pieces, and are not measured."""
STAGES = 4


class Work:
    """Does items; see :class:`~auto_voice.server.worker.Perform`.

    Args:
        engine: models and voices.
        files: where uploads lie and results go.
        settings: limits of decoding.
        metrics: told of each conversion.
    """

    def __init__(
        self, engine: Engine, files: JobFiles, settings: ServerSettings, metrics: Metrics
    ) -> None:
        self._engine, self._files = engine, files
        self._settings, self._metrics = settings, metrics
        self._voices: OrderedDict[str, Voice] = OrderedDict()
        self._lock = Lock()
        self._kinds: Mapping[str, Callable[[Claim, Control], Record]] = {
            "convert": self._convert,
            "enrol": self._enrol,
            "inspect": self._inspect,
            "evaluate": self._evaluate,
            "pull": self._pull,
            "warm": self._warm,
        }

    def __call__(self, claim: Claim, control: Control) -> Record:
        before = self._engine.registry.loaded()
        try:
            result = self._kinds[claim.job.kind](claim, control)
        except AutoVoiceError as error:
            self._rename(claim, error)
            raise
        stages = STAGES if claim.job.kind == "convert" else 1
        self._metrics.models_used(before, self._engine.registry.loaded(), stages)
        return result

    def _rename(self, claim: Claim, error: AutoVoiceError) -> None:
        """Say the client's name of a file where the error says ours."""
        folder, request = self._files.folder(claim.job.id), claim.job.request
        said = str(error)
        for prefix, names in (
            ("in", request.get("names", ())),
            ("ref", request.get("references", ())),
        ):
            for n, name in enumerate(names):
                ours = rf"({re.escape(str(folder))}[/\\])?\b{prefix}-{n}\b"
                said = re.sub(ours, str(name).replace("\\", ""), said)
        if said != str(error):
            error.args = (said, *error.args[1:])

    def _convert(self, claim: Claim, control: Control) -> Record:
        request, index = claim.job.request, claim.item.index
        folder, name = self._files.folder(claim.job.id), claim.item.name
        original, path = folder / f"in-{index}", folder / f"out-{index}.{request['format']}"
        seconds = check_upload(original, name, request["most_seconds"])
        voice = self._voice(claim, control)
        figures = None
        if seconds is not None and seconds <= IN_MEMORY_SECONDS:
            source = self._decode(claim, original.name, name, control)
            made = self._engine.convert(source, voice, request["controls"], control)
            control.check()
            made.save(path, format=request["format"], subtype=request["subtype"], allow_mock=True)
            summary = made.summary()
            if request.get("measure"):
                figures = self._figures(source, original, made.audio, path, voice, control)
        else:
            # Read once to the end first: what cannot be decoded fails before an hour of work.
            for _ in self._blocks(claim, original.name, name, control):
                pass
            summary = self._engine.convert_file(
                original, voice, path, request["controls"], control, subtype=request["subtype"]
            ).summary()
        self._metrics.conversion(summary)
        return {
            "file": path.name,
            "bytes": path.stat().st_size,
            "name": f"{Path(name).stem}_as_{voice.name or 'voice'}.{request['format']}",
            "summary": summary,
            **({} if figures is None else {"figures": figures}),
        }

    def _figures(
        self,
        source: Waveform,
        original: Path,
        made: Waveform,
        made_path: Path,
        voice: Voice,
        control: Control,
    ) -> dict[str, Any]:
        """Likeness before and after, and the words kept where something can hear them."""
        found: dict[str, Any] = {
            "similarity_before": round(self._engine.similarity(source, voice), 4),
            "similarity": round(self._engine.similarity(made, voice), 4),
        }
        control.check()
        if not self._engine.can_evaluate:
            return found
        try:
            kept = self._engine.evaluator.words_kept(original, made_path)
            found["words_kept"] = round(kept, 4)
        except AutoVoiceError as error:
            found["note"] = f"The words were not counted: {error}"
        return found

    def _voice(self, claim: Claim, control: Control) -> Voice:
        request, job_id = claim.job.request, claim.job.id
        if request["voice"]:
            return self._engine.voices.get(request["voice"])
        with self._lock:
            known = self._voices.get(job_id)
        if known is not None:
            return known
        waves = [
            self._decode(claim, f"ref-{n}", name, control, reference=True)
            for n, name in enumerate(request["references"])
        ]
        voice = self._engine.clone(waves, Path(request["references"][0]).stem)
        with self._lock:
            self._voices[job_id] = voice
            while len(self._voices) > KEPT_VOICES:
                self._voices.popitem(last=False)
        return voice

    def _decode(
        self, claim: Claim, file: str, name: str, control: Control, *, reference: bool = False
    ) -> Waveform:
        blocks = self._blocks(claim, file, name, control, reference=reference)
        return gathered(blocks)

    def _blocks(
        self, claim: Claim, file: str, name: str, control: Control, *, reference: bool = False
    ) -> Decoding:
        settings = self._settings
        most = claim.job.request.get("most_seconds", settings.longest_seconds)
        return Decoding(
            self._files.folder(claim.job.id) / file,
            name,
            most_seconds=settings.reference_seconds if reference else most,
            within_seconds=settings.decode_seconds,
            control=control,
        )

    def _enrol(self, claim: Claim, control: Control) -> Record:
        request = claim.job.request
        waves = [
            (name, self._decode(claim, f"ref-{n}", name, control, reference=True))
            for n, name in enumerate(request["references"])
        ]
        return self._engine.enrol(waves, request["name"], request["consent"], request["overwrite"])

    def _inspect(self, claim: Claim, control: Control) -> Record:
        for _ in self._blocks(claim, "in-0", claim.item.name, control):
            pass
        path = self._files.folder(claim.job.id) / "in-0"
        return self._engine.inspect(path, claim.item.name)

    def _evaluate(self, claim: Claim, control: Control) -> Record:
        request, folder = claim.job.request, self._files.folder(claim.job.id)
        names = [("in-0", request["names"][0]), ("in-1", request["names"][1])]
        names += [(f"ref-{n}", name) for n, name in enumerate(request["references"])]
        for file, name in names:
            # Judged by path below, without the limits of decoding.
            for _ in self._blocks(claim, file, name, control):
                pass
        targets = [folder / f"ref-{n}" for n in range(len(request["references"]))]
        return self._engine.evaluator.pair(
            folder / "in-0", targets, folder / "in-1", request["transcript"]
        )

    def _pull(self, claim: Claim, control: Control) -> Record:
        return self._engine.pull(claim.job.request["model"], claim.job.request["version"])

    def _warm(self, claim: Claim, control: Control) -> Record:
        return self._engine.warm(claim.job.request["model"], claim.job.request["version"])
