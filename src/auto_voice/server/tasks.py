"""Tasks: what each kind of job does with one item."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from auto_voice.audio.io import read_audio
from auto_voice.errors import AutoVoiceError, OutputBusyError, VoiceError
from auto_voice.inference.result import FileResult
from auto_voice.server.engine import Engine
from auto_voice.server.files import VOICE_FILE, JobFiles, result_name
from auto_voice.server.jobs import CancellationToken, Claim, Json
from auto_voice.server.settings import ServerSettings
from auto_voice.server.uploads import (
    CUT_IT,
    HIGHEST_RATE_HZ,
    KEPT_RATE_HZ,
    Decoding,
    check_references,
    check_upload,
    gathered,
)
from auto_voice.types import Voice, Waveform
from auto_voice.voices.voice_file import load_voice

# Voices of jobs that are kept in memory, up to 10 MB each.
KEPT_VOICES = 8
# Seconds: longer recordings go through the disk, in pieces, between which others get their turn.
IN_MEMORY_SECONDS = 60.0
# Seconds: longer ones are not measured, the recogniser would take longer than the conversion did.
MEASURED_SECONDS = 300.0
# Shares of the progress, by the time that the steps usually take.
DECODED_SHARE = 0.05
CONVERTED_SHARE = 0.75
ENROLLED_SHARE = 0.95
# Times as long as it takes to carry a checkpoint to another machine is worked between two.
CARRY_SHARE = 10.0
# Of a conversion whose voice is first learnt from references.
LEARNT_SHARE = 0.4


class Tasks:
    """Does items; see :class:`~auto_voice.server.workers.Perform`.

    Args:
        engine: models and voices.
        files: where uploads lie and results go.
        settings: limits of decoding.
    """

    def __init__(self, engine: Engine, files: JobFiles, settings: ServerSettings) -> None:
        self._engine, self._files, self._settings = engine, files, settings
        self._voices: OrderedDict[str, Voice] = OrderedDict()
        self._lock = Lock()
        self._kinds: Mapping[str, Callable[[Claim, CancellationToken], Json]] = {
            "convert": self._convert,
            "enrol": self._enrol,
            "inspect": self._inspect,
            "evaluate": self._evaluate,
            "pull": self._pull,
            "warm": self._warm,
        }

    def __call__(self, claim: Claim, token: CancellationToken) -> Json:
        try:
            return self._kinds[claim.job.kind](claim, token)
        except AutoVoiceError as error:
            self._rename(claim, error)
            raise

    def undo(self, claim: Claim) -> None:
        """Forget the voice of a cancelled enrolment; one that replaced another stays."""
        request = claim.job.request
        if claim.job.kind == "enrol" and not request["overwrite"]:
            with contextlib.suppress(VoiceError):
                self._engine.voices.remove(request["name"])

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

    def _convert(self, claim: Claim, token: CancellationToken) -> Json:
        request, index = claim.job.request, claim.item.index
        folder, name = self._files.folder(claim.job.id), claim.item.name
        original, path = folder / f"in-{index}", folder / result_name(claim, request["format"])
        self._files.check_room()
        allow_truncated = bool(request.get("allow_truncated"))
        seconds = check_upload(
            original, name, request["most_seconds"], allow_truncated=allow_truncated
        )
        voice = self._voice(claim, token)
        measured = bool(request.get("measure")) and (seconds or math.inf) <= MEASURED_SECONDS
        share = CONVERTED_SHARE if measured else 1.0
        source: Waveform | None = None
        if seconds is not None and seconds <= IN_MEMORY_SECONDS:
            source = self._decode(claim, original.name, name, token)
            made = self._engine.convert(
                source, voice, request["controls"], _span(token, token.fraction, share)
            )
            token.check()
            made.save(path, format=request["format"], subtype=request["subtype"], allow_mock=True)
            summary, resumed = made.summary(), False
        else:
            account = self._convert_long(claim, original, voice, path, share, token)
            summary, resumed = account.summary(), account.resumed
        result = {
            "file": path.name,
            "bytes": path.stat().st_size,
            "name": f"{Path(name).stem}_as_{voice.name or 'voice'}.{request['format']}",
            "summary": summary,
            **({"resumed": True} if resumed else {}),
        }
        if measured:
            source = source or self._decode(claim, original.name, name, token)
            result["figures"] = self._figures(source, original, path, voice, token, allow_truncated)
        return result

    def _convert_long(
        self,
        claim: Claim,
        original: Path,
        voice: Voice,
        path: Path,
        share: float,
        token: CancellationToken,
    ) -> FileResult:
        """Piece by piece; after each, others who wait get the worker first."""
        request = claim.job.request
        began, checked = time.monotonic(), original.with_suffix(".checked")
        if not checked.exists():
            # Read once to the end first: what cannot be decoded fails before an hour of work.
            for _ in self._blocks(
                claim,
                original.name,
                claim.item.name,
                token,
                progress=_span(token, token.fraction, share * DECODED_SHARE),
            ):
                pass
            checked.touch()

        tell = _span(token, max(token.fraction, share * DECODED_SHARE), share)

        def piece(done: float) -> None:
            tell(done)
            # Where the next worker must first fetch what is done, it is worth it less often.
            patience = CARRY_SHARE * self._files.carrying_seconds
            if done < 1.0 and time.monotonic() - began > patience:
                token.give_way()

        # What is done is found under this name by whoever goes on with it.
        common = original.with_name(f"out-{claim.item.index}.{request['format']}")
        convert = partial(
            self._engine.convert_file,
            original,
            voice,
            controls=request["controls"],
            progress=piece,
            subtype=request["subtype"],
            allow_truncated=bool(request.get("allow_truncated")),
        )
        if common == path:
            return convert(output=path)
        try:
            account = convert(output=common)
        except OutputBusyError:
            # A worker that counts as dead still holds it; its ticket is void, its lock is not.
            return convert(output=path)
        common.replace(path)
        return account

    def _figures(
        self,
        source: Waveform,
        original: Path,
        made_path: Path,
        voice: Voice,
        token: CancellationToken,
        allow_truncated: bool,
    ) -> dict[str, Any]:
        """Speaker similarity before and after, and the words kept where that can be measured."""
        made = read_audio(made_path, allow_silence=True)
        found: dict[str, Any] = {
            "similarity_before": round(self._engine.similarity(source, voice), 4),
            "similarity": round(self._engine.similarity(made, voice), 4),
        }
        token.progress((1 + CONVERTED_SHARE) / 2)
        if not self._engine.can_evaluate:
            return found
        try:
            kept = self._engine.evaluator.words_kept(original, made_path, allow_truncated)
            found["words_kept"] = round(kept, 4)
        except AutoVoiceError as error:
            found["note"] = f"The words were not counted: {error}"
        return found

    def _voice(self, claim: Claim, token: CancellationToken) -> Voice:
        """The voice of a job: as it was stored when the job was accepted, or its references'."""
        request, job_id = claim.job.request, claim.job.id
        with self._lock:
            known = self._voices.get(job_id)
        if known is not None:
            return known
        if request["voice"]:
            path = self._files.folder(job_id) / VOICE_FILE
            voice = replace(load_voice(path), name=request["voice"])
        else:
            waves = [wave for _, wave in self._references(claim, token)]
            name = Path(request["references"][0]).stem
            voice = self._engine.clone(waves, name, _span(token, 0.0, LEARNT_SHARE))
        with self._lock:
            self._voices[job_id] = voice
            while len(self._voices) > KEPT_VOICES:
                self._voices.popitem(last=False)
        return voice

    def _references(self, claim: Claim, token: CancellationToken) -> list[tuple[str, Waveform]]:
        """The references by name; all together within the limit of one."""
        found, most = [], self._settings.reference_seconds
        for n, name in enumerate(claim.job.request["references"]):
            found.append((name, self._decode(claim, f"ref-{n}", name, token, most_seconds=most)))
            check_references(sum(wave.seconds for _, wave in found), most)
        return found

    def _decode(
        self,
        claim: Claim,
        file: str,
        name: str,
        token: CancellationToken,
        *,
        most_seconds: float | None = None,
    ) -> Waveform:
        return gathered(
            self._blocks(claim, file, name, token, most_seconds=most_seconds, to_hz=KEPT_RATE_HZ)
        )

    def _blocks(
        self,
        claim: Claim,
        file: str,
        name: str,
        token: CancellationToken,
        *,
        most_seconds: float | None = None,
        to_hz: int = HIGHEST_RATE_HZ,
        progress: Callable[[float], None] | None = None,
    ) -> Decoding:
        settings = self._settings
        most = claim.job.request.get("most_seconds", settings.longest_seconds)
        return Decoding(
            self._files.folder(claim.job.id) / file,
            name,
            most_seconds=most if most_seconds is None else most_seconds,
            within_seconds=settings.decode_seconds,
            token=token,
            progress=progress,
            to_hz=to_hz,
            allow_truncated=bool(claim.job.request.get("allow_truncated")),
            advice=claim.job.request.get("advice", CUT_IT),
        )

    def _enrol(self, claim: Claim, token: CancellationToken) -> Json:
        request = claim.job.request
        # Kept before it is published: whoever does this again, because the server died in between,
        # knows the voice in the library for its own.
        made = self._files.folder(claim.job.id) / "made-0.safetensors"
        waves = [] if made.exists() else self._references(claim, token)
        token.check()
        return self._engine.enrol(
            waves,
            request["name"],
            request["consent"],
            request["overwrite"],
            _span(token, DECODED_SHARE, ENROLLED_SHARE),
            made,
            lambda: self._files.save(claim, made.name),
        )

    def _inspect(self, claim: Claim, token: CancellationToken) -> Json:
        for _ in self._blocks(claim, "in-0", claim.item.name, token):
            pass
        path = self._files.folder(claim.job.id) / "in-0"
        return self._engine.inspect(path, claim.item.name)

    def _evaluate(self, claim: Claim, token: CancellationToken) -> Json:
        request, folder = claim.job.request, self._files.folder(claim.job.id)
        names = [("in-0", request["names"][0]), ("in-1", request["names"][1])]
        names += [(f"ref-{n}", name) for n, name in enumerate(request["references"])]
        notes = []
        for file, name in names:
            # Judged by path below, without the limits of decoding.
            blocks = self._blocks(claim, file, name, token)
            for _ in blocks:
                pass
            notes += [f"{name}: {note}" for note in blocks.notes]
        targets = [folder / f"ref-{n}" for n in range(len(request["references"]))]
        found = self._engine.evaluator.pair(
            folder / "in-0",
            targets,
            folder / "in-1",
            request["transcript"],
            request["allow_truncated"],
        )
        return found | {"notes": notes}

    def _pull(self, claim: Claim, token: CancellationToken) -> Json:
        return self._engine.pull(claim.job.request["model"], claim.job.request["version"])

    def _warm(self, claim: Claim, token: CancellationToken) -> Json:
        return self._engine.warm(claim.job.request["model"], claim.job.request["version"])


def _span(token: CancellationToken, low: float, high: float) -> Callable[[float], None]:
    """A callback that maps a fraction done to the part from ``low`` to ``high`` of the progress."""
    high = max(low, high)
    return lambda done: token.progress(low + (high - low) * done)
