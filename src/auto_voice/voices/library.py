"""The voice library: voices that are stored under a name, one file each, in the user's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from auto_voice.errors import UnknownVoiceError, VoiceError
from auto_voice.filesystem import copy_into_place
from auto_voice.settings import get_settings
from auto_voice.types import Voice
from auto_voice.voices.voice_file import SUFFIX, load_voice, load_voice_facts, save_voice

T = TypeVar("T")

NAME = re.compile(r"[^\W_][\w .+-]{0,62}", re.UNICODE)


class VoiceLibrary:
    """The folder of stored voices.

    Args:
        folder: by default the setting ``voice_dir`` (``AUTOVOICE_VOICE_DIR``). It is made when the
            first voice is added.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = get_settings(voice_dir=folder).voice_dir

    def names(self) -> list[str]:
        """Of all stored voices, in order."""
        if not self.folder.is_dir():
            return []
        found = (path.name[: -len(SUFFIX)] for path in self.folder.glob(f"*{SUFFIX}"))
        return sorted(name for name in found if is_name(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and is_name(name) and self.path(name).is_file()

    def path(self, name: str) -> Path:
        """Where the voice ``name`` is, or would be.

        Raises:
            VoiceError: it cannot be a name.
        """
        if not is_name(name):
            raise VoiceError(
                f"{name!r} cannot name a voice; use up to 63 letters, digits, spaces, '.', '-', "
                "'+' and '_', with a letter or digit first."
            )
        return self.folder / f"{name}{SUFFIX}"

    def get(self, name: str) -> Voice:
        """The stored voice.

        Raises:
            VoiceError: there is none of that name, or its file is damaged.
        """
        return replace(load_voice(self.require(name)), name=name)

    def require(self, name: str) -> Path:
        """Where the voice ``name`` is; its file may be damaged.

        Raises:
            VoiceError: there is none of that name.
        """
        path = self.path(name)
        if not path.is_file():
            raise self._unknown(name)
        return path

    def _unknown(self, name: str) -> UnknownVoiceError:
        return UnknownVoiceError(f"there is no voice {name!r}; {self._known()}")

    def facts(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """What the file of each voice says of it, by name, without reading its arrays.

        See :func:`~auto_voice.voices.voice_file.load_voice_facts`; and one sentence for each whose
        file is damaged.
        """
        return self._each(lambda name: load_voice_facts(self.require(name)))

    def readable(self) -> tuple[dict[str, Voice], list[str]]:
        """The voices by name, and one sentence for each whose file is damaged."""
        return self._each(self.get)

    def _each(self, read: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
        found: dict[str, T] = {}
        damaged = []
        for name in self.names():
            try:
                found[name] = read(name)
            except VoiceError as error:
                damaged.append(str(error))
        return found, damaged

    def add(self, name: str, voice: Voice | Path, *, overwrite: bool = False) -> Path:
        """Keep ``voice``, or a copy of the voice file of that path, under ``name``.

        Raises:
            VoiceError: the name is taken and ``overwrite`` is false, or cannot be.
        """
        path = self.path(name)
        if path.exists() and not overwrite:
            self._refuse(name)
        try:
            # Voices are personal data: the folder is its owner's alone.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise VoiceError(
                f"the voice folder {self.folder} cannot be made ({error.strerror}); set "
                "AUTOVOICE_VOICE_DIR to another."
            ) from error
        if isinstance(voice, Path):
            try:
                copy_into_place(voice, path)
            except OSError as error:
                raise VoiceError(f"{path} cannot be written ({error.strerror}).") from error
            return path
        return save_voice(path, replace(voice, name=name))

    def _refuse(self, name: str) -> NoReturn:
        raise VoiceError(
            f"there is a voice {name!r} already; add --overwrite or choose another name."
        )

    def remove(self, name: str) -> None:
        """Delete the voice ``name``, damaged or not.

        Raises:
            VoiceError: there is none, or it may not be deleted.
        """
        path = self.require(name)
        try:
            path.unlink()
        except OSError as error:
            raise VoiceError(f"{path} cannot be deleted ({error.strerror}).") from error

    def rename(self, name: str, to: str, *, overwrite: bool = False) -> Path:
        """Keep the voice ``name`` as ``to``.

        Raises:
            VoiceError: as :meth:`get`, :meth:`add` and :meth:`remove`.
        """
        voice = self.get(name)
        if self.path(name) == self.path(to):
            return self.path(name)
        path = self.add(to, voice, overwrite=overwrite)
        self.remove(name)
        return path

    def _known(self) -> str:
        names = self.names()
        if not names:
            return "none is stored yet; add one with `autovoice voices add NAME RECORDING`."
        return f"stored are: {', '.join(names)}."


def is_name(name: str) -> bool:
    """Whether a voice can be stored under ``name``."""
    return bool(NAME.fullmatch(name)) and name == name.strip()


def resolve_voice(
    target: str | os.PathLike[str], library: Callable[[], VoiceLibrary] = VoiceLibrary
) -> Voice | Path:
    """What a user names as a voice: a stored voice, a voice file, or a recording.

    A file of that name wins over a stored voice, as it always did; ``voice:NAME`` means the stored
    one.

    Raises:
        VoiceError: neither a file nor a stored voice.
    """
    text = os.fspath(target)
    if text.startswith("voice:"):
        return library().get(text[len("voice:") :])
    path = Path(target)
    if path.exists() or not is_name(text):
        return path
    stored = library()
    if text in stored:
        return stored.get(text)
    if path.suffix:
        return path  # Whoever reads it says that there is no such file.
    raise VoiceError(f"{text!r} is neither a recording nor a stored voice; {stored._known()}")
