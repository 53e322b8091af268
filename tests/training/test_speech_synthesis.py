"""The corpus maker, with a synthesiser whose output shows what it was asked for."""

from __future__ import annotations

import csv
import json
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from auto_voice.batch.executors import InlineExecutor
from auto_voice.errors import TrainingError
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.training import speech_synthesis as s
from auto_voice.types import FloatArray

NAMES = ("af_one", "af_two", "bf_three", "am_four", "bm_five", "jm_six")
SYMBOLS = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}


def voices() -> dict[str, FloatArray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(20, s.STYLE_SIZE)).astype(np.float32) for name in NAMES}


class Recorder:
    """As long as the prosody and the tokens say, as loud as the timbre says."""

    def __init__(self) -> None:
        self.asked: list[FloatArray] = []

    def speak(self, tokens: Sequence[int], style: FloatArray, speed: float) -> FloatArray:
        self.asked.append(style)
        length = int(1000 * len(tokens) / speed * (1 + abs(float(style[-1]))))
        return np.full(length, 0.2 + 0.01 * float(style[0]), np.float32)


def corpus(sentences: Sequence[str] = ("a cat sat.", "a dog ran.")) -> s.ParallelCorpus:
    return s.ParallelCorpus(
        sentences, voices(), SYMBOLS, phonemes=str.lower, versions={"kokoro": "1"}
    )


def test_a_sentence_is_equally_long_in_all_its_timbres_and_sounds_different(tmp_path: Path) -> None:
    made = corpus().speak(0, tmp_path, Recorder())
    paths = [tmp_path / "00000" / clip["file"] for clip in made["clips"]]
    audio = [sf.read(path)[0] for path in paths]
    assert len({len(x) for x in audio}) == 1
    assert len({round(float(x[0]), 4) for x in audio}) == len(paths) == 6
    assert sf.info(paths[0]).samplerate == s.SAMPLE_RATE


def test_timbres_share_the_prosody_half_of_the_style(tmp_path: Path) -> None:
    synthesiser = Recorder()
    corpus().speak(0, tmp_path, synthesiser)
    asked = np.stack(synthesiser.asked)
    assert np.ptp(asked[:, s.TIMBRE_SIZE :], axis=0).max() == 0
    assert np.ptp(asked[:, : s.TIMBRE_SIZE], axis=0).min() > 0


def test_what_is_there_is_not_made_again_and_what_is_half_made_is(tmp_path: Path) -> None:
    first, again = Recorder(), Recorder()
    made = corpus().speak(0, tmp_path, first)
    assert corpus().speak(0, tmp_path, again) == json.loads(json.dumps(made))
    assert not again.asked
    (tmp_path / "00000" / "manifest.json").unlink()
    corpus().speak(0, tmp_path, again)
    assert len(again.asked) == 6


def test_a_list_that_changed_is_refused(tmp_path: Path) -> None:
    corpus().speak(0, tmp_path, Recorder())
    with pytest.raises(TrainingError, match="another sentence"):
        corpus(["no cat sat."]).speak(0, tmp_path, Recorder())


def test_a_silent_timbre_is_left_out(tmp_path: Path) -> None:
    class Mute(Recorder):
        def speak(self, tokens: Sequence[int], style: FloatArray, speed: float) -> FloatArray:
            return super().speak(tokens, style, speed) * (len(self.asked) % 2)

    assert len(corpus().speak(0, tmp_path, Mute())["clips"]) == 3


def test_the_manifest_names_weights_seed_versions_and_hashes(tmp_path: Path) -> None:
    made = corpus().speak(1, tmp_path, Recorder())
    stored = json.loads((tmp_path / "00001" / "manifest.json").read_text())
    assert stored["text"] == "a dog ran."
    assert stored["seed"] == 11
    assert stored["versions"] == {"kokoro": "1"}
    for clip in stored["clips"]:
        assert sum(clip["weights"].values()) == pytest.approx(1, abs=1e-3)
        assert len(clip["sha256"]) == 64
    assert sum(made["weights"].values()) == pytest.approx(1)


def test_each_timbre_of_a_block_speaks_three_sentences_of_it() -> None:
    for block in (0, 3):
        plan = s.plan_block(block)
        spoken = Counter(i for _, indices in plan for i in indices)
        first = block * s.BLOCK_TIMBRES
        assert spoken == {first + i: 3 for i in range(s.BLOCK_TIMBRES)}
        for sex, indices in plan:
            same = [i for i in indices if s.SEXES[i % 2] == sex]
            assert len(same) == s.SAME_SEX
            assert len(set(indices)) == 6


def test_timbres_begin_with_the_given_voices_and_are_always_the_same() -> None:
    assert s.draw_timbre(0, NAMES).weights == {"af_one": 1.0}
    assert s.draw_timbre(1, NAMES).weights == {"am_four": 1.0}
    assert s.draw_timbre(40, NAMES) == s.draw_timbre(40, NAMES)


def test_drawn_timbres_spread_as_the_given_voices_do() -> None:
    table = voices()
    for sex in s.SEXES:
        names = [n for n in NAMES if s.sex_of(n) == sex]
        given = np.stack([table[n][5] for n in names])
        indices = [i for i in range(50, 1200) if s.SEXES[i % 2] == sex]
        drawn = np.stack([s.style_of(s.draw_timbre(i, NAMES).weights, table, 6) for i in indices])
        assert np.linalg.norm(drawn.mean(0) - given.mean(0)) < 0.1 * np.linalg.norm(given.std(0))
        ratio = drawn.var(0).sum() / given.var(0, ddof=1).sum()
        assert 0.5 < ratio < 1.3


def test_the_list_names_what_is_aligned(tmp_path: Path) -> None:
    made = corpus()
    for index in range(2):
        made.speak(index, tmp_path, Recorder())
    assert s.write_list(tmp_path) == 12
    with (tmp_path / "speech.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["parallel"] for row in rows) == {"00000": 6, "00001": 6}
    assert all((tmp_path / row["path"]).is_file() for row in rows)


def test_espeak_ipa_becomes_kokoro_symbols() -> None:
    assert s.kokoro_phonemes("h_əl_ˈoʊ\nw_ˈɜːld tʃ_eɪ_n", "Hello world chain!") == (
        "həlˈO wˈɜld ʧAn!"
    )


def test_a_missing_espeak_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("espeak-ng")

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(TrainingError, match="install the system package espeak-ng"):
        s.espeak_phonemes("hello")


def test_voices_are_tables_of_styles(tmp_path: Path) -> None:
    np.zeros((3, s.STYLE_SIZE), np.float32).tofile(tmp_path / "af_one.bin")
    assert s.read_voices(tmp_path)["af_one"].shape == (3, s.STYLE_SIZE)
    np.zeros(7, np.float32).tofile(tmp_path / "bad.bin")
    with pytest.raises(TrainingError, match="no table of styles"):
        s.read_voices(tmp_path)


def test_a_corpus_is_made_until_its_hours_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process, so that the stand-in synthesiser is seen.
    monkeypatch.setattr(s, "limit_threads", lambda _: None)
    here = InlineExecutor()
    monkeypatch.setattr(s, "OnnxSynthesiser", lambda _: Recorder())
    (tmp_path / "voices").mkdir()
    for name, table in voices().items():
        table.tofile(tmp_path / "voices" / f"{name}.bin")
    (tmp_path / "vocab.json").write_text(json.dumps({"vocab": SYMBOLS}))
    (tmp_path / "kokoro.onnx").write_bytes(b"graph")
    (tmp_path / "text.txt").write_text("\n".join(f"sentence {'abcdefgh'[i]}." for i in range(8)))
    sources = s.Sources(
        *(tmp_path / n for n in ("kokoro.onnx", "vocab.json", "voices", "text.txt")), "kokoro@1"
    )
    monkeypatch.setattr(
        s.Sources, "corpus",
        lambda self, seed: s.ParallelCorpus(
            s.read_sentences(self.sentences), voices(), SYMBOLS, str.lower
        ),
    )  # fmt: skip
    recordings, hours = s.make(sources, tmp_path / "out", 1e-6, executor=here)
    assert recordings == 6
    assert hours > 1e-6
    assert s.make(sources, tmp_path / "out", 1.0, executor=here)[0] == 8 * 6
    first = (tmp_path / "out" / "00000" / "manifest.json").stat().st_mtime_ns
    assert s.make(sources, tmp_path / "out", 1.0, executor=here)[0] == 8 * 6
    assert (tmp_path / "out" / "00000" / "manifest.json").stat().st_mtime_ns == first


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    names = ("k.onnx", "v.json", "voices", "text.txt")
    missing = s.Sources(*(tmp_path / name for name in names), "kokoro@1")
    with pytest.raises(TrainingError, match="symbols of kokoro@1 cannot be read"):
        missing.corpus(1)
    (tmp_path / "text.txt").write_text("\n\n")
    with pytest.raises(TrainingError, match="no sentences"):
        s.read_sentences(tmp_path / "text.txt")


def test_a_file_that_is_no_synthesiser_is_told(tmp_path: Path) -> None:
    (tmp_path / "kokoro.onnx").write_bytes(b"graph")
    with pytest.raises(TrainingError, match="give Kokoro as an ONNX graph"):
        s.OnnxSynthesiser(tmp_path / "kokoro.onnx")


def test_a_model_of_another_kind_is_no_synthesiser(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"hifigan_universal@.* is no synthesiser"):
        s.sources_of(ModelRegistry(tmp_path), "hifigan_universal", tmp_path, tmp_path)
