"""Stored voices as the server shows them: one safetensors file each."""

from __future__ import annotations

import math
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from auto_voice.audio.quality import measure_quality
from auto_voice.errors import VoiceError
from auto_voice.inference.voice_file import SUFFIX, load_voice, save_voice
from auto_voice.types import Voice, Waveform

_PLAIN = re.compile(r"[^/\\\x00-\x1f\x7f]{1,80}")


class Shelf:
    """Voices by name.

    Args:
        folder: made when the first voice is kept.
        clone: recordings and a name to a voice.
    """

    def __init__(self, folder: Path, clone: Callable[[Sequence[Waveform], str], Voice]) -> None:
        self._folder, self._clone = folder, clone
        self._lock = threading.Lock()

    def listed(self) -> list[dict[str, Any]]:
        return [_about(load_voice(path)) for path in sorted(self._folder.glob(f"*{SUFFIX}"))]

    def get(self, name: str) -> Voice:
        return load_voice(self._path(name))

    def show(self, name: str) -> dict[str, Any]:
        return _about(self.get(name))

    def check_name(self, name: str, overwrite: bool) -> None:
        if self._file(name).exists() and not overwrite:
            raise VoiceError(f"there is a voice {name} already; choose another name.")

    def enrol(
        self,
        name: str,
        references: Sequence[tuple[str, Waveform]],
        *,
        consent: str,
        overwrite: bool,
    ) -> dict[str, Any]:
        voice = self._clone([wave for _, wave in references], name)
        advice = [
            f"{label}: {text}"
            for label, wave in references
            for text in measure_quality(wave.samples, wave.sample_rate).advice()
        ]
        voice = replace(voice, notes=tuple(dict.fromkeys((*voice.notes, *advice))))
        with self._lock:
            self.check_name(name, overwrite)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            save_voice(self._file(name), voice)
        return _about(voice)

    def rename(self, name: str, to: str) -> dict[str, Any]:
        with self._lock:
            voice = replace(self.get(name), name=to)
            self.check_name(to, False)
            save_voice(self._file(to), voice)
            self._path(name).unlink()
        return _about(voice)

    def remove(self, name: str) -> None:
        with self._lock:
            self._path(name).unlink()

    def export_bytes(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def import_bytes(self, data: bytes, name: str) -> dict[str, Any]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._folder / f".{secrets.token_hex(8)}"
        try:
            temporary.write_bytes(data)
            try:
                voice = load_voice(temporary)
            except VoiceError:
                raise VoiceError(
                    "the file is no voice; send one that `autovoice clone` or an export made."
                ) from None
        finally:
            temporary.unlink(missing_ok=True)
        voice = replace(voice, name=name or voice.name or "imported")
        with self._lock:
            self.check_name(voice.name, False)
            save_voice(self._file(voice.name), voice)
        return _about(voice)

    def _path(self, name: str) -> Path:
        path = self._file(name)
        if not path.is_file():
            raise VoiceError(f"there is no voice {name}; GET /v1/voices lists them.")
        return path

    def _file(self, name: str) -> Path:
        if not _PLAIN.fullmatch(name):
            raise VoiceError("a voice's name has 1 to 80 characters and no slashes.")
        return self._folder / (name.encode().hex()[:200] + SUFFIX)


def _about(voice: Voice) -> dict[str, Any]:
    return {
        "name": voice.name,
        "speech_seconds": round(voice.speech_seconds, 2),
        "pitch_hz": None if voice.log_f0_mean is None else round(math.exp(voice.log_f0_mean), 1),
        "encoder": voice.encoder,
        "notes": list(voice.notes),
        "consent": "",
    }
