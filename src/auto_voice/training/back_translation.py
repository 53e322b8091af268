"""Back-translation: which recordings a converter shall say in other voices, and the list of both.

A conversion keeps the timing of its source. So the content of the conversion and the mel of the
recording that it was made from are aligned frame by frame, and a converter that learns to draw the
second from the first meets another vocal tract in the content than in the mel. What the conversion
lacks is on the side of the input alone (as in translation, Sennrich et al. 2016).
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from auto_voice.errors import TrainingError
from auto_voice.filesystem import atomic_write
from auto_voice.training.data import SOURCE, Utterance

JOBS, SPEECH = "jobs.csv", "speech.csv"
# Corpus of what is made.
MADE = "made"
# Recordings that a voice is cloned from at most.
REFERENCES = 3
# Between the recordings of one voice in a table of jobs.
SEPARATOR = "|"


def plan(
    utterances: Sequence[Utterance], folder: Path, per_speaker: int = 2, seed: int = 9
) -> tuple[int, Path, Path]:
    """Writes a table of conversions, which a batch makes, and a list of speech to train on.

    Each speaker says ``per_speaker`` recordings, drawn at random, in the voice of another one.
    What is aligned with others already is only listed.

    Args:
        utterances: see ``data.scan``.
        folder: for ``jobs.csv``, ``speech.csv`` and the conversions.

    Returns:
        How many conversions there are, the table and the list.

    Raises:
        TrainingError: fewer than two speakers, or the folder cannot be written to.
    """
    by_speaker: defaultdict[str, list[Utterance]] = defaultdict(list)
    for utterance in utterances:
        if not utterance.parallel and SEPARATOR not in str(utterance.path):
            by_speaker[utterance.speaker].append(utterance)
    speakers = sorted(by_speaker)
    if len(speakers) < 2:
        raise TrainingError(
            "Recordings are converted into the voices of other speakers, and there are fewer than "
            "two; add speakers."
        )
    jobs, made = [], {}
    for speaker in speakers:
        rng = np.random.default_rng([seed, _number(speaker)])
        own = by_speaker[speaker]
        for index in sorted(rng.permutation(len(own))[:per_speaker].tolist()):
            other = speakers[int(rng.integers(len(speakers) - 1))]
            other = speakers[-1] if other == speaker else other
            theirs = by_speaker[other]
            chosen = rng.permutation(len(theirs))[:REFERENCES]
            voice = SEPARATOR.join(str(theirs[i].path.resolve()) for i in sorted(chosen.tolist()))
            path = own[index].path
            name = f"{path.stem}-{_number(str(path.resolve())):08x}.wav"
            jobs.append((str(path.resolve()), voice, name))
            made[path] = name
    table, speech = folder / JOBS, folder / SPEECH
    _write(table, [("source", "voice", "output"), *jobs])
    _write(speech, [("path", "speaker", "corpus", "parallel", "role"), *_rows(utterances, made)])
    return len(jobs), table, speech


def _rows(
    utterances: Iterable[Utterance], made: dict[Path, str]
) -> Iterable[tuple[str, str, str, str, str]]:
    """Of the list of speech. A conversion has its source's speaker, so that both are held out."""
    for u in utterances:
        name = made.get(u.path, "")
        role = SOURCE if u.source_only else ""
        yield str(u.path.resolve()), u.speaker, u.corpus, u.parallel or Path(name).stem, role
        if name:
            yield name, u.speaker, MADE, Path(name).stem, SOURCE


def _write(path: Path, rows: Iterable[Sequence[str]]) -> None:
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


def _number(name: str) -> int:
    """A number of 32 bits that a name always has."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
