"""Folders of computed conversions, and judges whose verdicts are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from auto_voice.evaluation.judges import Judges
from evaluation_kit import PINS, RATE, PeakJudge, SpectrumEncoder, TableRecogniser, sing


@pytest.fixture
def recogniser() -> TableRecogniser:
    return TableRecogniser({})


@pytest.fixture
def judges(recogniser: TableRecogniser) -> Judges:
    encoder = SpectrumEncoder()
    return Judges(
        speaker=encoder,
        speaker2=encoder,
        recogniser=recogniser,
        quality=PeakJudge(),
        pins=PINS,
    )


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder of conversions: ``quality`` 1 is the target's own voice, 0 the source unchanged."""

    def make(name: str = "system", pairs: int = 4, quality: float = 1.0) -> Path:
        root = tmp_path / name
        for part in ("source", "target", "converted"):
            (root / part).mkdir(parents=True)
        for i in range(pairs):
            source, target = sing(110 + 10 * i, formant_hz=500), sing(210 - 9 * i, formant_hz=1500)
            mixed = sing(
                110 + 10 * i, formant_hz=500 + 1000 * quality - 20 * i, vibrato=0.1 + 0.01 * i
            )
            for part, audio in (("source", source), ("target", target), ("converted", mixed)):
                soundfile.write(root / part / f"p{i}.wav", audio.samples, RATE)
        return root

    return make
