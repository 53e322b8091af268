"""Speech to train on: which recordings there are, who speaks, and who is held out."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from auto_voice.audio.formats import READABLE, list_folder
from auto_voice.errors import TrainingError
from auto_voice.filesystem import atomic_write

SOURCE = "source"
ROLES = ("", SOURCE)


@dataclass(frozen=True)
class Utterance:
    """One recording of one speaker.

    Attributes:
        path: of the recording.
        speaker: unique among all corpora.
        corpus: where it comes from; sampling weights are set by corpus.
        parallel: recordings of one name say the same with the same timing and F0, frame for frame;
            empty: there is no such other.
        source_only: its content may be learnt from, its sound not: it is what a converter made.
    """

    path: Path
    speaker: str
    corpus: str
    parallel: str = ""
    source_only: bool = False


def scan(sources: Sequence[Path]) -> list[Utterance]:
    """Recordings of folders and of CSV lists, sorted by path.

    A folder's direct subfolders name speakers, and recordings right inside it are one speaker
    each, named by their file. A CSV has the columns ``path`` (relative to the CSV or absolute),
    ``speaker`` (empty: the file is its own speaker) and, if wanted, ``corpus``, ``parallel`` (a
    name that aligned recordings share) and ``role`` (``source``: only content is learnt from it).

    Raises:
        TrainingError: a source is missing, empty, or a CSV without these columns.
    """
    found: dict[Path, Utterance] = {}
    for source in sources:
        listed = _from_csv(source) if source.suffix.lower() == ".csv" else _from_folder(source)
        if not listed:
            raise TrainingError(
                f"{source} holds no recordings; name a folder with one subfolder per speaker "
                f"({READABLE}) or a CSV with the columns path,speaker."
            )
        found.update((utterance.path, utterance) for utterance in listed)
    return sorted(found.values(), key=lambda utterance: str(utterance.path))


def hold_out(
    utterances: Sequence[Utterance], share: float, by: str = "speaker"
) -> tuple[list[Utterance], list[Utterance]]:
    """Training and held-out utterances, chosen by a hash of a name.

    The choice depends on nothing but the name, so adding data never moves what is held out into
    training. Only where the hash would leave one side empty does one name change sides. Aligned
    recordings of several speakers are held out by sentence, so that none is on both sides, and a
    recording is never parted from what a converter made of it.

    Args:
        by: ``speaker``: whole speakers, as every figure of unseen voices needs; ``recording``:
            single recordings, where a network is fitted to a speaker and judged on the same.
    """
    several = _said_by_several(utterances)
    names = [
        u.parallel
        if u.parallel in several
        else u.speaker
        if by == "speaker"
        else u.parallel or u.path.name
        for u in utterances
    ]
    rank = {name: number_of(name) / 2**32 for name in names}
    ordered = sorted(rank, key=lambda name: rank[name])
    held = {name for name in ordered if rank[name] < share}
    if len(ordered) > 1:
        held = (held | {ordered[0]}) - {ordered[-1]}
    pairs = list(zip(utterances, names, strict=True))
    return [u for u, name in pairs if name not in held], [u for u, name in pairs if name in held]


def _said_by_several(utterances: Sequence[Utterance]) -> set[str]:
    """Names of aligned recordings that more than one speaker made."""
    speakers: defaultdict[str, set[str]] = defaultdict(set)
    for utterance in utterances:
        if utterance.parallel:
            speakers[utterance.parallel].add(utterance.speaker)
    return {name for name, known in speakers.items() if len(known) > 1}


def number_of(name: str) -> int:
    """A number of 32 bits that a name always has."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big")


def write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    """Writes a CSV list, such as :func:`scan` reads.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file).writerows(rows)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written ({error.strerror or error}); give another folder with --out."
        ) from error


def _from_csv(path: Path) -> list[Utterance]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"{path} cannot be read as a CSV list: {error}.") from error
    if rows and not {"path", "speaker"} <= rows[0].keys():
        raise TrainingError(f"{path} needs the columns path,speaker; it has {','.join(rows[0])}.")
    utterances = []
    for row in rows:
        recording = path.parent / row["path"]
        corpus = row.get("corpus") or path.stem
        role = row.get("role") or ""
        if role not in ROLES:
            raise TrainingError(
                f"{path}: the role of {row['path']} is {role!r}; leave it empty, or write "
                f"{' or '.join(r for r in ROLES if r)}."
            )
        parallel = row.get("parallel") or ""
        utterances.append(
            Utterance(
                recording, row["speaker"] or f"{corpus}/{recording.stem}", corpus,
                # Sentences of two corpora may have one number.
                f"{path.resolve().parent}/{parallel}" if parallel else "", role == SOURCE,
            )
        )  # fmt: skip
    return utterances


def _from_folder(folder: Path) -> list[Utterance]:
    if not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder; name a folder of recordings or a CSV list.")
    utterances = []
    for path in list_folder(folder).recordings:
        inside = path.relative_to(folder).parts
        speaker = inside[0] if len(inside) > 1 else path.stem
        utterances.append(Utterance(path, f"{folder.name}/{speaker}", folder.name))
    return utterances
