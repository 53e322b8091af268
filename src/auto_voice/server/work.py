"""What each kind of job does with one item."""

from __future__ import annotations

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
from auto_voice.server.uploads import decode
from auto_voice.types import Voice, Waveform

KEPT_VOICES = 8
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
        result = self._kinds[claim.job.kind](claim, control)
        stages = STAGES if claim.job.kind == "convert" else 1
        self._metrics.models_used(before, self._engine.registry.loaded(), stages)
        return result

    def _convert(self, claim: Claim, control: Control) -> Record:
        request, index = claim.job.request, claim.item.index
        source = self._decode(claim, f"in-{index}", claim.item.name, control)
        voice = self._voice(claim, control)
        result = self._engine.convert(source, voice, request["controls"], control)
        control.check()
        path = self._files.folder(claim.job.id) / f"out-{index}.{request['format']}"
        result.save(path, format=request["format"], subtype=request["subtype"], allow_mock=True)
        summary = result.summary()
        self._metrics.conversion(summary)
        made = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "name": f"{Path(claim.item.name).stem}_as_{voice.name or 'voice'}.{request['format']}",
            "summary": summary,
        }
        if request.get("measure"):
            original = self._files.folder(claim.job.id) / f"in-{index}"
            made["figures"] = self._figures(source, original, result.audio, path, voice, control)
        return made

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
        settings = self._settings
        most = claim.job.request.get("most_seconds", settings.longest_seconds)
        return decode(
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
        return self._engine.voices.enrol(
            request["name"], waves, consent=request["consent"], overwrite=request["overwrite"]
        )

    def _inspect(self, claim: Claim, control: Control) -> Record:
        wave = self._decode(claim, "in-0", claim.item.name, control)
        return self._engine.inspect(wave, claim.item.name)

    def _evaluate(self, claim: Claim, control: Control) -> Record:
        request, folder = claim.job.request, self._files.folder(claim.job.id)
        names = [("in-0", request["names"][0]), ("in-1", request["names"][1])]
        names += [(f"ref-{n}", name) for n, name in enumerate(request["references"])]
        for file, name in names:
            # Judged by path below; decoding first puts the client's name into what goes wrong.
            self._decode(claim, file, name, control)
        targets = [folder / f"ref-{n}" for n in range(len(request["references"]))]
        return self._engine.evaluator.pair(
            folder / "in-0", targets, folder / "in-1", request["transcript"]
        )

    def _pull(self, claim: Claim, control: Control) -> Record:
        return self._engine.pull(claim.job.request["model"], claim.job.request["version"])

    def _warm(self, claim: Claim, control: Control) -> Record:
        return self._engine.warm(claim.job.request["model"], claim.job.request["version"])
