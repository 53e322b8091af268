"""Back-translation: which recordings a converter shall say in other voices, and the list of both.

A conversion keeps the timing of its source. So the content of the conversion and the mel of the
recording that it was made from are aligned frame by frame, and a converter that learns to draw the
second from the first meets another vocal tract in the content than in the mel. What the conversion
lacks is on the side of the input alone (as in translation, Sennrich et al. 2016).
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from auto_voice.errors import TrainingError
from auto_voice.training.data import SOURCE, Utterance, number_of, write_csv

JOBS, SPEECH = "jobs.csv", "speech.csv"
# Corpus of what is made.
MADE = "made"
# Recordings that a voice is cloned from at most.
REFERENCES = 3
# Between the recordings of one voice in a table of jobs.
SEPARATOR = "|"

log = logging.getLogger(__name__)


def plan(
    utterances: Iterable[Utterance], folder: Path, per_speaker: int = 2, seed: int = 9
) -> tuple[int, Path, Path]:
    """Writes a table of conversions, which a batch makes, and a list of speech to train on.

    Each speaker says ``per_speaker`` recordings, drawn at random, in the voice of another one.
    What is aligned with others already, or was made by a converter, is only listed.

    Args:
        utterances: see ``data.scan``; those in ``folder`` are what was made before, and left out.
        folder: for ``jobs.csv``, ``speech.csv`` and the conversions.

    Returns:
        How many conversions there are, the table and the list.

    Raises:
        TrainingError: fewer than two speakers, one recording of two, or the folder cannot be
            written to.
    """
    known = _by_path(utterances, _absolute(folder))
    by_speaker: defaultdict[str, list[str]] = defaultdict(list)
    for path, utterance in known.items():
        if not utterance.parallel and not utterance.source_only:
            by_speaker[utterance.speaker].append(path)
    speakers = sorted(by_speaker)
    if len(speakers) < 2:
        raise TrainingError(
            "Recordings are converted into the voices of other speakers, and there are fewer than "
            "two; add speakers."
        )
    jobs, made = [], {}
    for speaker in speakers:
        rng = np.random.default_rng([seed, number_of(speaker)])
        own = by_speaker[speaker]
        for index in sorted(rng.permutation(len(own))[:per_speaker].tolist()):
            # The last one's place stands for the speaker's own.
            drawn = speakers[int(rng.integers(len(speakers) - 1))]
            theirs = by_speaker[speakers[-1] if drawn == speaker else drawn]
            chosen = rng.permutation(len(theirs))[:REFERENCES]
            voice = SEPARATOR.join(theirs[i] for i in sorted(chosen.tolist()))
            path = own[index]
            made[path] = f"{Path(path).stem}-{number_of(path):08x}.wav"
            jobs.append((path, voice, made[path]))
    table, speech = folder / JOBS, folder / SPEECH
    write_csv(table, [("source", "voice", "output"), *jobs])
    write_csv(speech, [("path", "speaker", "corpus", "parallel", "role"), *_rows(known, made)])
    return len(jobs), table, speech


def _by_path(utterances: Iterable[Utterance], folder: str) -> dict[str, Utterance]:
    """By absolute path, without those in ``folder`` and those that a table of jobs cannot name."""
    known: dict[str, Utterance] = {}
    for utterance in utterances:
        path = _absolute(utterance.path)
        if os.path.commonpath([path, folder]) == folder:
            continue
        if SEPARATOR in path or not _is_text(path):
            log.warning("left out, because of a character in its path: %r", path)
            continue
        other = known.setdefault(path, utterance)
        if other.speaker != utterance.speaker:
            raise TrainingError(
                f"{path} is listed twice, as {other.speaker} and as {utterance.speaker}; list it "
                "once."
            )
    return known


def _rows(
    known: Mapping[str, Utterance], made: Mapping[str, str]
) -> Iterable[tuple[str, str, str, str, str]]:
    """Of the list of speech. A conversion has its source's speaker, so that both are held out."""
    for path, u in known.items():
        name = made.get(path, "")
        yield path, u.speaker, u.corpus, u.parallel or name, SOURCE if u.source_only else ""
        if name:
            yield name, u.speaker, MADE, name, SOURCE


def _absolute(path: Path) -> str:
    """Links are not followed: what they lead to may have a name without ending."""
    return os.path.abspath(path)  # noqa: PTH100


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return "\n" not in path and "\r" not in path
