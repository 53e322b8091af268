"""Made-up speech features: every speaker a spectrum of its own, every content a bump of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from auto_voice.training.corpus import Corpus, LoadedUtterance
from auto_voice.training.data import Utterance
from auto_voice.training.features import WHISPER_ENERGIES

DIMS = 8


def item(speaker: int, number: int, seconds: float = 4.0) -> LoadedUtterance:
    """One utterance whose mel is a bump where the content says, on the speaker's tilt."""
    rng = np.random.default_rng((speaker, number))
    time = round(seconds * 50)
    content = np.repeat(rng.normal(size=(time // 5 + 1, DIMS)), 5, axis=0)[:time]
    frames = round(seconds * 22050 / 256)
    where = np.arange(frames) * time // frames
    bands = np.arange(80)[:, None]
    tilt = np.cos(np.pi * bands / 80 * (1 + speaker)) * 1.5
    mel = -5.5 + tilt + 2 * np.exp(-((bands - 40 - 12 * content[where, 0]) ** 2) / 50)
    embedding = np.eye(256)[speaker]
    features = {
        "mel": mel.astype(np.float16),
        "log_f0": np.full(frames, np.log(140.0), np.float32),
        "voiced": np.ones(frames, np.float16),
        "teacher": content.astype(np.float16),
        "embedding": embedding.astype(np.float32),
    }
    energies = np.repeat(np.tile(content, (1, 10)), 2, axis=0).T - 3.0
    features[WHISPER_ENERGIES] = energies.astype(np.float16)
    utterance = Utterance(Path(f"{speaker}-{number}.wav"), f"speaker{speaker}", "made-up")
    return LoadedUtterance(utterance, features)


def corpus(speakers: int = 4, each: int = 2, seconds: float = 4.0) -> Corpus:
    return Corpus([item(s, n, seconds) for s in range(speakers) for n in range(each)])
