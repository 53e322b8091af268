"""The jobs of a batch: from folders, patterns and tables."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from auto_voice.audio.formats import AUDIO_SUFFIXES, list_folder
from auto_voice.batch.executors import file_name, is_url, remote, said
from auto_voice.errors import (
    AudioNotFoundError,
    AutoVoiceError,
    ConfigError,
    reason,
)
from auto_voice.filesystem import shown_url
from auto_voice.inference.controls import controls_from
from auto_voice.inference.result import HIGHEST_OUTPUT_RATE, LOWEST_OUTPUT_RATE, OutputSpec

log = logging.getLogger(__name__)

TABLE_SUFFIXES = frozenset({".csv", ".jsonl"})
_OWN = ("source", "voice", "output", "format", "subtype", "rate")


@dataclass(frozen=True)
class BatchJob:
    """One conversion of a batch.

    Attributes:
        source: path of the recording.
        output: path and format of the result.
        voice: a stored voice, a voice file or a recording; several recordings: a list.
        controls: names and values of ``Controls``.
    """

    source: str
    output: OutputSpec
    voice: tuple[str, ...]
    controls: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """Path of the result."""
        return os.fspath(self.output.path)

    def record(self) -> dict[str, Any]:
        """The job as JSON values."""
        output = asdict(self.output)
        job = {"source": self.source, "output": output.pop("path"), "voice": list(self.voice)}
        return {**job, "controls": dict(self.controls), **output}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> BatchJob:
        """The job of a :meth:`record`."""
        job = dict(record)
        source, voice, controls = job.pop("source"), tuple(job.pop("voice")), job.pop("controls")
        return cls(source, OutputSpec(job.pop("output"), **job), voice, controls)

    @property
    def key(self) -> str:
        """Changes when the options or the files of source and voice do."""
        facts = [self.record(), *(_stamp(path) for path in (self.source, *self.voice))]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Defaults:
    """What a job has that its row does not say; ``output.path`` is the folder for results."""

    voice: tuple[str, ...] = ()
    output: OutputSpec = field(default_factory=lambda: OutputSpec("converted"))
    controls: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.output.path)

    def target(self, name: str) -> str:
        """Path or address of the result ``name`` in the folder."""
        folder = os.fspath(self.output.path)
        return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(self.folder / name)


def collect(inputs: Iterable[str], defaults: Defaults) -> list[BatchJob]:
    """The jobs of files, folders, glob patterns and CSV or JSONL tables.

    A folder is searched through, and its shape is kept in the output folder. A table has a column
    ``source`` and may have ``voice``, ``output``, ``format``, ``subtype``, ``rate`` and any
    control; paths in it are relative to the table.

    Raises:
        AudioNotFoundError: an input that does not exist, or a folder without recordings.
        ConfigError: a table that cannot be read, a job without voice, or two jobs with one output.
    """
    jobs: list[BatchJob] = []
    for given in inputs:
        try:
            jobs += _of_input(given, defaults)
        except AutoVoiceError:
            raise
        except (OSError, ValueError) as error:  # Names that no system call takes, locked folders.
            raise ConfigError(f"{shown_url(given)!r} cannot be read ({reason(error)}).") from error
    return _apart(_distinct(jobs))


def _of_input(given: str, defaults: Defaults) -> list[BatchJob]:
    if is_url(given):
        return _of_url(given, defaults)
    path = Path(given)
    if path.is_dir():
        return _of_folder(path, defaults)
    if path.suffix.lower() in TABLE_SUFFIXES:
        rows = list(_of_table(path, defaults))
        if not rows:
            raise ConfigError(f"{path} holds no jobs; write one row for each recording.")
        return rows
    if path.exists():
        return [_of_file(path, path.name, defaults)]
    found = sorted(Path(p) for p in glob.glob(given, recursive=True))  # noqa: PTH207
    files = [p for p in found if p.is_file()]
    if not files:
        raise AudioNotFoundError(f"there is no file or folder {given}.")
    return [_of_file(p, p.name, defaults) for p in files]


def _apart(jobs: list[BatchJob]) -> list[BatchJob]:
    """``jobs``, none of which would replace what another one reads."""
    read = {os.path.realpath(name) for job in jobs for name in (job.source, *job.voice)}
    for job in jobs:
        if os.path.realpath(job.target) in read:
            raise ConfigError(
                f"{shown_url(job.target)} is also an input of this batch and would be "
                "overwritten; choose another output folder."
            )
    return jobs


def _distinct(jobs: list[BatchJob]) -> list[BatchJob]:
    """Without repetitions; two jobs for one output would overwrite each other."""
    by_output: dict[str, BatchJob] = {}
    for job in jobs:
        output = str(Path(job.target).absolute())
        other = by_output.setdefault(output, job)
        if other != job:
            raise ConfigError(
                f"{shown_url(other.source)} and {shown_url(job.source)} would both become "
                f"{shown_url(job.target)}; convert them in two batches, or give a table with a "
                "column output."
            )
    return list(by_output.values())


def _of_folder(folder: Path, defaults: Defaults) -> list[BatchJob]:
    outputs = defaults.folder.resolve()
    # Only a folder of results inside that of the recordings holds nothing but results.
    inside = folder.resolve() in outputs.parents

    def given(paths: Iterable[Path]) -> list[Path]:
        return [p for p in paths if not (inside and outputs in p.resolve().parents)]

    listing = list_folder(folder)
    found, ignored = given(listing.recordings), given(listing.ignored)
    if ignored:
        names = ", ".join(str(path.relative_to(folder)) for path in ignored)
        log.warning("%s: ignored, because their names are not of recordings: %s", folder, names)
    if listing.skipped:
        names = ", ".join(str(path.relative_to(folder)) for path in listing.skipped)
        log.warning(
            "%s: not looked into, because they are links or may not be listed: %s", folder, names
        )
    if not found:
        raise AudioNotFoundError(f"the folder {folder} holds no recordings.")
    return [_of_file(path, path.relative_to(folder), defaults) for path in found]


def _of_url(given: str, defaults: Defaults) -> list[BatchJob]:
    """Of an address: a file, a folder or a pattern."""
    files, path = remote(given)
    root = path.rstrip("/")
    outputs = defaults.target("")
    inside = f"{remote(outputs)[1].rstrip('/')}/" if is_url(outputs) else ""
    try:
        if glob.has_magic(path):
            named = {name: Path(name).name for name in files.glob(path) if files.isfile(name)}
        elif files.isdir(path):
            listed = {name: name[len(root) + 1 :] for name in files.find(root)}
            if inside.startswith(f"{root}/") and inside != f"{root}/":  # Nothing but results.
                listed = {n: r for n, r in listed.items() if not n.startswith(inside)}
            named = {n: r for n, r in listed.items() if Path(r).suffix.lower() in AUDIO_SUFFIXES}
            if ignored := ", ".join(sorted(listed[n] for n in listed.keys() - named.keys())):
                log.warning("%s: ignored, because their names are not of recordings: %s",
                            shown_url(given), ignored)  # fmt: skip
        else:
            named = {path: file_name(path)} if files.isfile(path) else {}
    except Exception as error:  # Each kind of storage has its own.
        raise ConfigError(f"{shown_url(given)} cannot be read ({said(error)}).") from error
    if not named:
        raise AudioNotFoundError(f"there are no recordings at {shown_url(given)}.")
    return [_of_file(files.unstrip_protocol(n), named[n], defaults) for n in sorted(named)]


def _of_file(source: str | Path, relative: str | Path, defaults: Defaults) -> BatchJob:
    """Of a recording, which has the name ``relative`` in the output folder but for its ending."""
    named = Path(relative)
    named = named.with_name(f"{named.stem}.{defaults.output.format or 'wav'}")
    output = replace(defaults.output, path=defaults.target(named.as_posix()))
    return _job(str(source), output, defaults.voice, {}, defaults)


def _of_table(path: Path, defaults: Defaults) -> Iterator[BatchJob]:
    for line, row in _rows(path):
        where = f"{path}:{line}"
        source = str(row.get("source") or "").strip()
        if not source:
            raise ConfigError(f"{where}: there is no source; each row names a recording.")
        relative = Path(file_name(source) if is_url(source) else source)
        format_ = _text(row.get("format")) or defaults.output.format
        name = str(row.get("output") or f"{relative.stem}.{format_ or 'wav'}")
        path_ = name if is_url(name) or Path(name).is_absolute() else defaults.target(name)
        if ".." in Path(name).parts:
            raise ConfigError(
                f"{where}: the output {shown_url(name)} climbs out of the output folder."
            )
        voice = _voices(row.get("voice"), path.parent) or defaults.voice
        given = {k: v for k, v in row.items() if k not in _OWN and v not in (None, "")}
        output = replace(
            defaults.output,
            path=path_,
            format=format_,
            subtype=_text(row.get("subtype")) or defaults.output.subtype,
            rate=_rate(row.get("rate"), where) or defaults.output.rate,
        )
        try:
            read = source if is_url(source) else str(_beside(source, path.parent))
            yield _job(read, output, voice, given, defaults)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def _job(
    source: str,
    output: OutputSpec,
    voice: tuple[str, ...],
    given: Mapping[str, Any],
    defaults: Defaults,
) -> BatchJob:
    if not voice:
        raise ConfigError(
            f"{shown_url(source)} has no voice; give --voice, or a column voice in the table."
        )
    if any("\0" in path for path in (source, os.fspath(output.path), *voice)):
        raise ConfigError("a path holds a NUL character; write the table again.")
    controls = controls_from({**defaults.controls, **given})
    return BatchJob(source, output, voice, controls.account())


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a CSV or JSONL file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise AudioNotFoundError(f"there is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({reason(error)}).") from error
    if path.suffix.lower() == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}:{number}: this line is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ConfigError(f'{path}:{number}: a job is an object such as {{"source": …}}.')
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        if "source" not in columns:
            raise ConfigError(f"{path}: the first line must name the columns, source among them.")
        double = sorted({name for name in columns if columns.count(name) > 1})
        if double:
            raise ConfigError(f"{path}: there are two columns {double[0]}; leave one.")
        for row in reader:
            if None in row:
                raise ConfigError(f"{path}:{reader.line_num}: more cells than columns.")
            yield reader.line_num, {str(k).strip(): (v or "").strip() for k, v in row.items()}
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: this is not CSV ({error}).") from error


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def _voices(value: Any, folder: Path) -> tuple[str, ...]:
    """Voices of a cell: a list, or text with ``|`` between several recordings."""
    if value in (None, ""):
        return ()
    listed = value if isinstance(value, list) else str(value).split("|")
    return tuple(stored_or_file(str(item).strip(), folder) for item in listed)


def stored_or_file(name: str, folder: Path | None = None) -> str:
    """The path of a voice: a file beside the table, or a stored voice; else the name as it is."""
    from auto_voice.voices.library import VoiceLibrary

    if is_url(name):
        return name
    path = _beside(name, folder) if folder is not None else Path(name)
    if path.exists():
        return str(path)
    library = VoiceLibrary()
    plain = name.removeprefix("voice:")
    return str(library.path(plain)) if plain in library else name


def _beside(name: str, folder: Path) -> Path:
    path = Path(name).expanduser()
    return path if path.is_absolute() else folder / path


def _rate(value: Any, where: str) -> int | None:
    if value in (None, ""):
        return None
    try:
        rate = float(value)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if isinstance(value, bool) or not (
        LOWEST_OUTPUT_RATE <= rate <= HIGHEST_OUTPUT_RATE and rate == int(rate)
    ):
        raise ConfigError(
            f"{where}: rate must be a whole number of Hz between {LOWEST_OUTPUT_RATE} and "
            f"{HIGHEST_OUTPUT_RATE}, not {value!r}."
        )
    return int(rate)


def _stamp(path: str) -> list[Any]:
    """What changes when a file does; nothing for what is no file."""
    if is_url(path):
        files, place = remote(path)
        try:
            return [path, str(files.ukey(place))]
        except FileNotFoundError:
            return [path]
        except Exception as error:  # Each kind of storage has its own.
            raise ConfigError(f"{shown_url(path)} cannot be read ({said(error)}).") from error
    try:
        stat = Path(path).stat()
    except OSError:
        return [path]
    return [path, stat.st_size, stat.st_mtime_ns]
