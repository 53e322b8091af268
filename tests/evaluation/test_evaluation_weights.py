"""Real judges on a case whose answer is known: speech through the vocoder and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import soundfile

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.cli.main import main
from auto_voice.evaluation import evaluate, load_judges, read_pairs, save_evaluation

if TYPE_CHECKING:
    from auto_voice.models import ModelRegistry

SECONDS = 6


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_speech_through_the_vocoder_keeps_voice_words_and_melody(
    weights_registry: ModelRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faster_whisper")
    for part in ("source", "target", "converted"):
        (tmp_path / part).mkdir()
    vocoder = weights_registry.load("hifigan_universal")
    recordings = {n: weights_registry.load(f"sample_{n}") for n in ("two_cities", "clone_test")}
    rate = HIFIGAN_MEL.sample_rate
    speech = {
        n: resample(w.samples, w.sample_rate, rate)[: SECONDS * rate] for n, w in recordings.items()
    }
    names = list(speech)
    for name, other in zip(names, reversed(names), strict=True):
        again = vocoder.synthesize(log_mel(speech[name], HIFIGAN_MEL))[0]
        # Back to itself, and, as a conversion that changes nothing, towards the other voice.
        for target in (name, other):
            pair = f"{name}__{target}"
            soundfile.write(tmp_path / "converted" / f"{pair}.wav", again, rate)
        for part in ("source", "target"):
            soundfile.write(tmp_path / part / f"{name}.wav", speech[name], rate)

    judges = load_judges(weights_registry)
    pairs = read_pairs(tmp_path)
    result = evaluate(pairs, judges, name="vocoder")
    pairs = {p.id: p.values for p in result.pairs}
    for name, other in zip(names, reversed(names), strict=True):
        kept, unmoved = pairs[f"{name}__{name}"], pairs[f"{name}__{other}"]
        assert kept["secs"] > 0.88
        assert kept["secs2"] > 0.85
        assert kept["secs"] > unmoved["secs"] + 0.15
        assert kept["secs2"] > unmoved["secs2"] + 0.3
        assert unmoved["source_similarity"] == pytest.approx(kept["secs"])
        assert kept["wer"] < 0.2
        assert kept["f0_correlation"] > 0.85
        assert kept["register_cents"] < 60
        assert abs(kept["dnsmos"] - kept["dnsmos_source"]) < 0.5
        assert kept["duration_ratio"] == pytest.approx(1.0, abs=0.01)
    assert set(result.models) == {"speaker", "speaker2", "recogniser", "quality", "pitch"}

    saved = str(save_evaluation(result, tmp_path / "r.json"))
    limits = ["--min", "f0_correlation=0.85", "--max", "wer=0.2", "--min", "dnsmos=2.3"]
    assert main(["evaluate", "gate", saved, *limits]) == 0
    assert "passed: vocoder, 4 conversions" in capsys.readouterr().out
