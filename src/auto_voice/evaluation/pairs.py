"""The pairs to score: read from a CSV file or a folder, or converted by a pipeline."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from auto_voice.audio.formats import list_folder
from auto_voice.errors import EvaluationError
from auto_voice.progress import tell

if TYPE_CHECKING:
    from auto_voice.inference.result import Account
    from auto_voice.inference.voice_conversion_pipeline import VoiceConversionPipeline

LAYOUT = (
    "a folder holds either pairs.csv, or the folders source, target and converted with files of "
    "the same names (or converted/SOURCE__TARGET.wav)"
)
COLUMNS = ("source", "target", "converted", "transcript", "parallel")
_SEPARATOR = re.compile(r"__|_to_")


@dataclass(frozen=True)
class Pair:
    """One conversion to score.

    Attributes:
        id: unique in its list, the same for every system that converts the same pair.
        source: the recording that was converted.
        targets: reference recordings of the target speaker, at least one.
        converted: the result; None until a pipeline has made it.
        transcript: what is said; empty to take what the recogniser hears in the source.
        parallel: the target speaker saying the same words, if there is such a recording.
        source_speaker, target_speaker: labels; parent folder or file name where not given.
    """

    id: str
    source: Path
    targets: tuple[Path, ...]
    converted: Path | None = None
    transcript: str = ""
    parallel: Path | None = None
    source_speaker: str = ""
    target_speaker: str = ""


def read_pairs(path: str | Path) -> list[Pair]:
    """The conversions listed by a CSV file or laid out in a folder.

    Raises:
        EvaluationError: no such path, no conversions, missing columns or files; the message
            names the line or file and what to do.
    """
    root = Path(path)
    if root.is_dir():
        listed = root / "pairs.csv"
        return read_csv(listed) if listed.is_file() else read_folder(root)
    if not root.is_file():
        raise EvaluationError(f"{root} does not exist; give a CSV file or a folder.")
    return read_csv(root)


def read_csv(path: Path) -> list[Pair]:
    """Rows with the columns source, target, converted and optionally transcript, parallel, id,
    source_speaker, target_speaker. Paths are relative to the file; several references are
    separated by ``|``.

    Raises:
        EvaluationError: as ``read_pairs``.
    """
    pairs = []
    for line, row in read_table(path, ("source", "target", "converted")):
        base, where = path.parent, f"{path}:{line}"
        targets = tuple(_existing(base, t, where) for t in row["target"].split("|") if t.strip())
        if not targets:
            raise EvaluationError(f"{where}: the column target is empty; name a reference.")
        parallel = row.get("parallel", "")
        source = _existing(base, row["source"], where)
        pairs.append(
            Pair(
                id=row.get("id", "") or _pair_id(source, targets),
                source=source,
                targets=targets,
                converted=_existing(base, row["converted"], where),
                transcript=row.get("transcript", ""),
                parallel=_existing(base, parallel, where) if parallel else None,
                source_speaker=row.get("source_speaker", "") or source.stem,
                target_speaker=row.get("target_speaker", "") or targets[0].stem,
            )
        )
    return _unique(pairs, str(path))


def read_folder(root: Path) -> list[Pair]:
    """``converted/X.wav`` with ``source/X.*`` and ``target/X.*`` (or a folder ``target/X/`` of
    several references), or ``converted/S__T.wav`` (also ``S_to_T``) with ``source/S.*`` and
    ``target/T.*``. ``transcripts/X.txt`` holds the words, by conversion or by source.

    Raises:
        EvaluationError: as ``read_pairs``.
    """
    for name in ("source", "target", "converted"):
        if not (root / name).is_dir():
            raise EvaluationError(f"{root} has no folder {name}: {LAYOUT}.")
    sources, references = (audio_files(root / name) for name in ("source", "target"))
    pairs = []
    for converted in audio_files(root / "converted"):
        source_name, target_name = _names(converted.stem, sources)
        source = _find(root / "source", sources, source_name, converted)
        targets = _find_targets(root / "target", references, target_name, converted)
        pairs.append(
            Pair(
                id=converted.stem,
                source=source,
                targets=targets,
                converted=converted,
                transcript=_transcript(root / "transcripts", converted.stem, source.stem),
                source_speaker=source.stem,
                target_speaker=target_name,
            )
        )
    return _unique(pairs, str(root))


def read_test_set(
    root: str | Path, *, per_speaker: int = 1, references: int = 1, limit: int | None = None
) -> list[Pair]:
    """Every ordered pair of speakers of a folder that holds one folder of recordings each.

    The first ``references`` recordings of a speaker, by name, serve as target; the following
    ``per_speaker`` as sources, so no recording is both. ``limit`` keeps so many pairs, spread
    evenly. A text file of the same name beside a recording is its transcript.

    Args:
        references: 0 takes all that are not sources.

    Raises:
        EvaluationError: fewer than two speakers have enough recordings.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is not a folder; give one folder per speaker inside one.")
    speakers: dict[str, tuple[list[Path], list[Path]]] = {}
    for one in sorted(p for p in folder.iterdir() if p.is_dir()):
        files = audio_files(one, deep=True)
        kept = references or max(1, len(files) - per_speaker)
        sources = files[kept : kept + per_speaker]
        if files[:kept] and sources:
            speakers[one.name] = (sources, files[:kept])
    if len(speakers) < 2:
        raise EvaluationError(
            f"{folder} needs at least two folders of speakers with {references + per_speaker} "
            f"recordings each; {len(speakers)} found."
        )
    pairs = [
        Pair(
            id=f"{source.stem}__{target}",
            source=source,
            targets=tuple(refs),
            transcript=_transcript(source.parent, source.stem),
            source_speaker=name,
            target_speaker=target,
        )
        for name, (sources, _) in speakers.items()
        for target, (_, refs) in speakers.items()
        if target != name
        for source in sources
    ]
    # Before some are picked: an id must mean the same pair whatever the limit.
    pairs = _unique(pairs, str(folder))
    if limit and limit < len(pairs):
        pairs = [pairs[i * len(pairs) // limit] for i in range(limit)]
    return pairs


def read_trials(path: Path) -> list[tuple[Path, Path, bool]]:
    """Speaker verification trials: columns ``a``, ``b``, ``same`` (1/0, yes/no, true/false).

    Raises:
        EvaluationError: as ``read_pairs``.
    """
    words = {"1": True, "yes": True, "true": True, "same": True}
    words |= {"0": False, "no": False, "false": False, "different": False}
    trials = []
    for line, row in read_table(path, ("a", "b", "same")):
        where, answer = f"{path}:{line}", row["same"].lower()
        if answer not in words:
            raise EvaluationError(f"{where}: the column same says {answer!r}; write 1 or 0.")
        a, b = (_existing(path.parent, row[c], where) for c in ("a", "b"))
        trials.append((a, b, words[answer]))
    return trials


def read_table(path: Path, required: Iterable[str]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Line number and stripped cells of each row of a comma- or tab-separated file.

    Raises:
        EvaluationError: unreadable, a required column is missing, or there are no rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as UTF-8 text; save it as CSV.") from error
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    # Not by splitlines, which would cut a quoted transcript at its line breaks.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        yield from _rows(reader, path, required)
    except csv.Error as error:
        raise EvaluationError(f"{path} is no CSV file ({error}); save it as CSV.") from error


def _rows(
    reader: csv.DictReader[str], path: Path, required: Iterable[str]
) -> Iterator[tuple[int, Mapping[str, str]]]:
    header = [h.strip().lower() for h in reader.fieldnames or ()]
    missing = [c for c in required if c not in header]
    if missing:
        raise EvaluationError(
            f"{path} lacks the column {', '.join(missing)}; its first line must name "
            f"{', '.join(required)}."
        )
    reader.fieldnames = header
    found = False
    for row in reader:
        cells = {k: (v or "").strip() for k, v in row.items() if isinstance(k, str)}
        if any(cells.values()):
            found = True
            yield reader.line_num, cells
    if not found:
        raise EvaluationError(f"{path} has no rows; add one for each conversion.")


def audio_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """Recordings of a folder by name; hidden files and other types are passed over."""
    return list(list_folder(folder, deep=deep).recordings)


def _names(stem: str, sources: Iterable[Path]) -> tuple[str, str]:
    """Names of source and target that a converted file's name stands for."""
    if any(p.stem == stem for p in sources):
        return stem, stem
    for match in _SEPARATOR.finditer(stem):
        if match.start() and match.end() < len(stem):
            return stem[: match.start()], stem[match.end() :]
    return stem, stem


def _find(folder: Path, files: Iterable[Path], stem: str, converted: Path) -> Path:
    matches = [p for p in files if p.stem == stem]
    if len(matches) != 1:
        many = f"{len(matches)} recordings" if matches else "no recording"
        raise EvaluationError(f"{folder} has {many} named {stem} for {converted.name}; {LAYOUT}.")
    return matches[0]


def _find_targets(
    folder: Path, files: Iterable[Path], stem: str, converted: Path
) -> tuple[Path, ...]:
    several = folder / stem
    if several.is_dir() and (own := audio_files(several)):
        return tuple(own)
    return (_find(folder, files, stem, converted),)


def _transcript(folder: Path, *stems: str) -> str:
    for stem in stems:
        file = folder / f"{stem}.txt"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise EvaluationError(f"{file} cannot be read as UTF-8 text.") from error
    return ""


def _existing(base: Path, name: str, where: str) -> Path:
    path = base / name.strip()
    try:
        found = bool(name.strip()) and path.is_file()
    except OSError:  # Too long for a name, for one.
        found = False
    if not found:
        raise EvaluationError(
            f"{where}: {name.strip() or 'an empty cell'} is not a file; paths are relative to "
            "the CSV file."
        )
    return path


def _pair_id(source: Path, targets: tuple[Path, ...]) -> str:
    return f"{source.stem}__{targets[0].stem}"


def _unique(pairs: list[Pair], where: str) -> list[Pair]:
    if not pairs:
        raise EvaluationError(f"{where} holds no conversions; {LAYOUT}.")
    seen: dict[str, int] = {}
    out = []
    for pair in pairs:
        seen[pair.id] = count = seen.get(pair.id, 0) + 1
        out.append(pair if count == 1 else replace(pair, id=f"{pair.id}#{count}"))
    return out


@dataclass(frozen=True)
class Conversions:
    """What a pipeline made of a test set.

    Attributes:
        pairs: with their conversions.
        extra: pair id to ``rtf``: seconds of computing per second of audio, without loading
            models and cloning.
        system: stage to the exact ``name@version`` that ran.
        peak_memory_mb: highest resident memory of the process so far; None where the system
            does not tell.
        notes: what the pipeline altered or replaced, each once.
    """

    pairs: tuple[Pair, ...]
    extra: dict[str, dict[str, float]]
    system: dict[str, str]
    peak_memory_mb: float | None
    notes: tuple[str, ...]


def convert_all(
    pipeline: VoiceConversionPipeline,
    pairs: Sequence[Pair],
    folder: Path,
) -> Conversions:
    """Convert each pair into ``folder/<id>.wav``; references are cloned once.

    Raises:
        EvaluationError: mock models would be scored.
        AutoVoiceError: whatever the pipeline raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    voices = {}
    done: list[Pair] = []
    extra: dict[str, dict[str, float]] = {}
    system: dict[str, str] = {}
    notes: dict[str, None] = {}
    for number, pair in enumerate(pairs, 1):
        if pair.targets not in voices:
            voices[pair.targets] = pipeline.clone([str(p) for p in pair.targets])
        result = pipeline.convert(pair.source, voices[pair.targets])
        refuse_mock(result)
        path = result.save(conversion_path(folder, number, pair))
        done.append(replace(pair, converted=path))
        extra[pair.id] = {"rtf": result.seconds_per_second}
        system.update(result.models)
        notes.update(dict.fromkeys(told_notes(result)))
        tell("pairs", number, len(pairs))
    return Conversions(tuple(done), extra, system, peak_memory_mb(), tuple(notes))


def conversion_path(folder: Path, number: int, pair: Pair) -> Path:
    """Where the conversion of a pair goes; ``number`` is its place in the list, from 1."""
    # Names come from files, so what could leave the folder is replaced.
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in pair.id).lstrip(".")
    return folder / f"{number:04d}_{name}.wav"


def refuse_mock(result: Account) -> None:
    """Raises EvaluationError where mock models made the result."""
    if result.mock:
        raise EvaluationError(
            "Mock models make noise, which has no quality to measure; use real models."
        )


def told_notes(result: Account) -> list[str]:
    """What an evaluation passes on of a conversion's notes."""
    return [note for note in result.notes if "fallback" in note]


def peak_memory_mb() -> float | None:
    """Highest resident memory of this process so far, MB (10^6 bytes)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
