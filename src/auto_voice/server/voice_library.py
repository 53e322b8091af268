"""Stored voices as the API shows them; kept by the library that every other way in uses."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.errors import VoiceError
from auto_voice.types import EMBEDDING_DIMS, Voice
from auto_voice.voices.library import VoiceLibrary
from auto_voice.voices.voice_file import load_voice

# An export of the longest reference that is kept is an eighth of this.
VOICE_FILE_BYTES = 20_000_000


class Shelf:
    """Voices by name.

    Args:
        folder: None for the setting ``voice_dir``.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._library = VoiceLibrary(folder)
        self._lock = threading.Lock()

    def listed(self) -> list[dict[str, Any]]:
        return [about(voice) for voice in self.all().values()]

    def all(self) -> Mapping[str, Voice]:
        """Every voice that can be read, by name."""
        found = {}
        for name in self._library.names():
            try:
                found[name] = self._library.get(name)
            except VoiceError:
                continue  # whoever asks for it by name hears why
        return found

    def get(self, name: str) -> Voice:
        return self._library.get(name)

    def check_name(self, name: str, overwrite: bool) -> None:
        """Raises VoiceError if a voice cannot be added under the name."""
        self._library.path(name)
        if name in self._library and not overwrite:
            raise VoiceError(f"there is a voice {name!r} already; choose another name.")

    def add(self, name: str, voice: Voice, overwrite: bool) -> Voice:
        with self._lock:
            self.check_name(name, overwrite)
            self._library.add(name, voice, overwrite=overwrite)
            return self._library.get(name)

    def rename(self, name: str, to: str) -> Voice:
        with self._lock:
            if name != to:
                self.check_name(to, overwrite=False)
            self._library.rename(name, to)
            return self._library.get(to)

    def remove(self, name: str) -> None:
        with self._lock:
            self._library.remove(name)

    def export_bytes(self, name: str) -> bytes:
        self._library.get(name)
        return self._library.path(name).read_bytes()

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
        return self.add(name or voice.name or "imported", voice, overwrite=False)


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
    """What is told of a voice."""
    return {
        "name": voice.name,
        "speech_seconds": round(voice.speech_seconds, 2),
        "pitch_hz": None if voice.log_f0_mean is None else round(math.exp(voice.log_f0_mean), 1),
        "encoder": voice.encoder,
        "quality": dict(voice.quality),
        "notes": list(voice.notes),
        "consent": voice.consent,
    }
