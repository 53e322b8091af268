"""The paths to which a recording may be written, and the formats in which."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from auto_voice.errors import AudioOutputError, reason
from auto_voice.filesystem import temporary_beside


@dataclass(frozen=True)
class OutputFormat:
    """Attributes:
    container: libsndfile's name.
    subtypes: user's word → libsndfile's subtype; the first is the default.
    rates: Hz that the format can carry; empty for any.
    """

    container: str
    subtypes: dict[str, str]
    rates: tuple[int, ...] = ()


_PCM = {"pcm_16": "PCM_16", "pcm_24": "PCM_24"}
_WIDE = {"pcm_32": "PCM_32", "float": "FLOAT"}
FORMATS: dict[str, OutputFormat] = {
    "wav": OutputFormat("WAV", {**_PCM, **_WIDE, "double": "DOUBLE", "pcm_u8": "PCM_U8"}),
    "flac": OutputFormat("FLAC", {**_PCM, "pcm_s8": "PCM_S8"}),
    "ogg": OutputFormat("OGG", {"vorbis": "VORBIS", "opus": "OPUS"}),
    "opus": OutputFormat("OGG", {"opus": "OPUS"}, (8000, 12000, 16000, 24000, 48000)),
    "mp3": OutputFormat(
        "MP3",
        {"mpeg_layer_iii": "MPEG_LAYER_III"},
        (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000),
    ),
    "aiff": OutputFormat("AIFF", {**_PCM, **_WIDE}),
}
_SHORTHANDS = {"8": "pcm_u8", "16": "pcm_16", "24": "pcm_24", "32": "pcm_32", "32f": "float"}
# libvorbis has settings up to 200 kHz, and beyond them libsndfile 1.2 ends the process.
VORBIS_HIGHEST_RATE = 192_000
HOLDS_ANY_PEAK = ("FLOAT", "DOUBLE")


@dataclass(frozen=True)
class Encoding:
    """One row of the table above, chosen.

    Attributes:
        name: key of ``FORMATS``.
        container: libsndfile's name of the file format.
        subtype: libsndfile's name of the sample coding.
        rates: Hz that it can carry; empty for any up to ``highest_rate``.
        highest_rate: Hz; None for any.
    """

    name: str
    container: str
    subtype: str
    rates: tuple[int, ...]
    highest_rate: int | None = None

    def nearest_rate(self, sample_rate: int) -> int:
        """``sample_rate`` if the format can carry it, else the next higher (or highest) rate."""
        if not self.rates:
            return min(sample_rate, self.highest_rate or sample_rate)
        if sample_rate in self.rates:
            return sample_rate
        return min((rate for rate in self.rates if rate > sample_rate), default=self.rates[-1])


def choose_encoding(path: Path, format: str | None = None, subtype: str | None = None) -> Encoding:
    """The encoding for ``path`` by its extension, or by ``format`` where that is given.

    Args:
        format: ``wav``, ``flac``, ``ogg``, ``opus``, ``mp3`` or ``aiff``.
        subtype: e.g. ``pcm_24``, ``float``, or bits as ``16``, ``24``, ``32f``.

    Raises:
        AudioOutputError: unknown format or subtype; the message lists the known ones.
    """
    name = (format or path.suffix.lstrip(".")).lower()
    name = {"aif": "aiff", "oga": "ogg", "wave": "wav"}.get(name, name)
    row = FORMATS.get(name)
    if row is None:
        asked = f"{name!r}" if name else f"{str(path)!r}, which has no extension"
        raise AudioOutputError(
            f"There is no output format for {asked}; use one of {', '.join(FORMATS)}."
        )
    wanted = (subtype or next(iter(row.subtypes))).lower()
    coding = row.subtypes.get(_SHORTHANDS.get(wanted, wanted))
    if coding is None:
        raise AudioOutputError(
            f"{name} cannot be written as {subtype!r}; use one of {', '.join(row.subtypes)}."
        )
    rates = FORMATS["opus"].rates if coding == "OPUS" else row.rates
    return Encoding(
        name, row.container, coding, rates, VORBIS_HIGHEST_RATE if coding == "VORBIS" else None
    )


def ensure_writable(
    path: str | os.PathLike[str],
    inputs: Iterable[object] = (),
    *,
    overwrite: bool = True,
    create_parents: bool = False,
) -> Path:
    """The path to write to, checked before any work is done; nothing stays created but parents.

    Args:
        inputs: recordings that are read (paths count, anything else is ignored): none of them
            may be the output.
        overwrite: whether an existing file may be replaced.
        create_parents: make missing folders; otherwise a missing folder is an error, because it
            is more often a typing error than a wish.

    Raises:
        AudioOutputError: a folder, a missing folder, no permission, one of the inputs, an
            existing file, or something that is not a regular file.
    """
    target = Path(path)
    try:
        target = target.expanduser()
        with suppress(FileNotFoundError):
            target.lstat()  # raises for names that no system call takes
        if target.is_symlink():
            target = target.resolve()
        if target.is_dir():
            raise AudioOutputError(f"{target} is a folder; name a file in it.")
        if create_parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.is_dir():
            raise AudioOutputError(f"The folder {target.parent} does not exist; create it first.")
        exists = target.exists()
        if exists and not stat.S_ISREG(target.stat().st_mode):
            raise AudioOutputError(f"{target} is not a regular file; name another output.")
        for source in inputs:
            if not isinstance(source, (str, os.PathLike)):
                continue
            with suppress(RuntimeError):  # a ~ without a home; who reads it tells
                source = Path(os.fspath(source)).expanduser()
            original = Path(os.fspath(source))
            if exists and original.exists() and target.samefile(original):
                raise AudioOutputError(
                    f"{target} is also an input and would be overwritten; name another output."
                )
        if exists and not overwrite:
            raise AudioOutputError(
                f"{target} exists already; add --overwrite (overwrite=True) or name another output."
            )
        _try_folder(target)
    except (OSError, ValueError, RuntimeError) as error:  # the last from a ~ without a home
        raise AudioOutputError(
            f"{str(path)!r} cannot be written to ({reason(error)}); name another output."
        ) from error
    return target


def _try_folder(target: Path) -> None:
    """Make a file beside ``target`` and delete it: permissions alone do not tell.

    Raises:
        AudioOutputError: the folder takes none, as ``/proc`` and disks that are mounted to be read.
    """
    trial = temporary_beside(target)
    try:
        trial.open("xb").close()
    except OSError as error:
        raise AudioOutputError(
            f"The folder {target.parent} is not writable ({reason(error)}); name another output."
        ) from error
    trial.unlink()
