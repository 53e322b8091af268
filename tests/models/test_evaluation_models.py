"""The models that judge: their front ends without weights, their verdicts with real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from auto_voice.audio.resample import resample
from auto_voice.errors import AudioContentError, MissingDependencyError, ModelLoadError
from auto_voice.models import dvector_model, quality_model, recogniser
from auto_voice.models.registry.catalog import ModelFile, ModelVersion
from auto_voice.models.runtime import devices

if TYPE_CHECKING:
    from auto_voice.models import ModelRegistry
    from auto_voice.types import FloatArray

RATE = 16000


class FakeNetwork:
    """A network that remembers its inputs."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.seen: list[np.ndarray] = []

    def __call__(self, values: np.ndarray) -> np.ndarray:
        self.seen.append(values.copy())
        return self.answer(values)


def noise(seconds: float) -> FloatArray:
    rng = np.random.default_rng(0)
    return (0.1 * rng.normal(size=int(seconds * RATE))).astype(np.float32)


def version(name: str, file: str) -> ModelVersion:
    return ModelVersion(name, "1.0", "x", "x", (ModelFile(file, (), "", 0),), "MIT")


def test_dvector_front_end_agrees_with_librosa() -> None:
    librosa = pytest.importorskip("librosa")
    x = noise(1.3)
    expected = librosa.feature.melspectrogram(
        y=x, sr=RATE, n_fft=512, win_length=400, hop_length=160, n_mels=40,
        window="hamming", center=False, power=2.0,
    )  # fmt: skip
    ours = dvector_model.log_mel_frames(x)
    np.testing.assert_allclose(ours, np.log10(expected + 1e-10).T, atol=2e-4)


def test_dvector_averages_unit_windows_of_eight_tenths_of_a_second() -> None:
    session = FakeNetwork(
        lambda w: np.pad(w.mean(axis=1), ((0, 0), (0, 216))) * (1 + np.arange(len(w)))[:, None],
    )
    encoder = dvector_model.DVectorModel(session)
    frames = dvector_model.log_mel_frames(noise(4.0))
    found = encoder.embed_utterance(noise(4.0))
    windows = session.seen[0]
    assert windows.shape == (1 + (len(frames) - 80) // 40, 80, 40)
    np.testing.assert_array_equal(windows[2], frames[80:160])
    # Each window counts the same, whatever the length of its raw vector.
    raw = windows.mean(axis=1)
    expected = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(found[:40], expected / np.linalg.norm(expected), atol=1e-5)
    assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-6)
    assert encoder.similarity(found, found) == pytest.approx(1.0)


def test_dvector_pads_short_speech_and_batches_long_speech() -> None:
    session = FakeNetwork(lambda w: np.ones((len(w), 256), np.float32))
    encoder = dvector_model.DVectorModel(session)
    encoder.embed_utterance(noise(0.2))
    assert session.seen[0].shape == (1, 80, 40)
    assert (session.seen[0][0, -1] == 0).all()
    encoder.embed_utterance(noise(60))
    assert max(len(w) for w in session.seen) <= dvector_model.BATCH_WINDOWS


def test_quality_hears_every_second_in_windows_of_nine() -> None:
    session = FakeNetwork(lambda _: np.array([[3.0, 4.0, 2.0]]))
    model = quality_model.QualityModel(session)
    x = np.arange(20 * RATE, dtype=np.float32) / (20 * RATE)
    model.score(x)
    assert len(session.seen) == 11
    assert all(w.shape == (1, quality_model.WINDOW_SAMPLES) for w in session.seen)
    np.testing.assert_array_equal(session.seen[10][0], x[10 * RATE :][:144_160])


def test_quality_repeats_short_audio_and_limits_loud_audio() -> None:
    session = FakeNetwork(lambda _: np.array([[3.0, 4.0, 2.0]]))
    x = noise(2.0)
    x[0] = 3.0
    quality_model.QualityModel(session).score(x)
    assert len(session.seen) == 7  # doubled to 16 s
    window = session.seen[0]
    np.testing.assert_array_equal(window[0, : len(x)], np.clip(x, -1, 1))
    np.testing.assert_array_equal(window[0, len(x) : 2 * len(x)], window[0, : len(x)])


def test_quality_applies_the_published_calibration() -> None:
    session = FakeNetwork(lambda _: np.array([[3.0, 4.0, 2.0]]))
    found = quality_model.QualityModel(session).score(noise(1))
    assert found.speech == pytest.approx(-0.08397278 * 9 + 1.22083953 * 3 + 0.0052439)
    assert found.background == pytest.approx(-0.13166888 * 16 + 1.60915514 * 4 - 0.39604546)
    assert found.overall == pytest.approx(-0.06766283 * 4 + 1.11546468 * 2 + 0.04602535)


@pytest.mark.parametrize("bad", [np.zeros(0), np.array([np.nan] * 800), np.array([np.inf] * 800)])
def test_what_is_no_sound_is_refused(bad: np.ndarray) -> None:
    session = FakeNetwork(lambda _: None)
    for judge in (
        dvector_model.DVectorModel(session).embed_utterance,
        quality_model.QualityModel(session).score,
        recogniser.Recogniser(None).transcribe,
    ):
        with pytest.raises(AudioContentError):
            judge(bad.astype(np.float32))


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"junk")
    for module, name in ((dvector_model, "speaker_dvector"), (quality_model, "quality_dnsmos")):
        with pytest.raises(ModelLoadError, match=f"m.onnx.*autovoice models pull {name}"):
            module.build({"m.onnx": path}, version(name, "m.onnx"), "cpu")


def test_a_missing_extra_is_answered_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    devices.onnx_runtime.cache_clear()
    for module, file, command in (
        (dvector_model, "m.onnx", "pip install onnxruntime"),
        (quality_model, "m.onnx", "pip install onnxruntime"),
        (recogniser, "model.bin", r"pip install 'auto-voice\[eval\]'"),
    ):
        with pytest.raises(MissingDependencyError, match=command):
            module.build({file: tmp_path / file}, version("x", file), "cpu")


def speech(registry: ModelRegistry, name: str) -> FloatArray:
    recording = registry.load(name)
    return resample(recording.samples, recording.sample_rate, RATE)


@pytest.mark.weights
def test_dvector_knows_one_reader_from_another(weights_registry: ModelRegistry) -> None:
    encoder = weights_registry.load("speaker_dvector")
    one = speech(weights_registry, "sample_two_cities")
    other = speech(weights_registry, "sample_clone_test")
    a, b = (encoder.embed_utterance(x) for x in (one[: 15 * RATE], one[20 * RATE : 35 * RATE]))
    c = encoder.embed_utterance(other)
    assert encoder.similarity(a, b) > 0.8
    assert encoder.similarity(a, c) < 0.6


@pytest.mark.weights
def test_quality_falls_with_noise(weights_registry: ModelRegistry) -> None:
    model = weights_registry.load("quality_dnsmos")
    clean = speech(weights_registry, "sample_two_cities")[: 10 * RATE]
    hiss = np.random.default_rng(0).normal(size=len(clean)) * clean.std()
    scores = [
        model.score((clean + hiss * 10 ** (-snr_db / 20)).astype(np.float32))
        for snr_db in (60, 20, 5)
    ]
    overall = [s.overall for s in scores]
    assert overall == sorted(overall, reverse=True)
    assert overall[0] - overall[2] > 0.5
    assert all(1 <= v <= 5 for s in scores for v in (s.overall, s.speech, s.background))


@pytest.mark.weights
@pytest.mark.filterwarnings("ignore")
def test_quality_agrees_with_speechmos(weights_registry: ModelRegistry) -> None:
    pytest.importorskip("librosa")
    dnsmos = pytest.importorskip("speechmos.dnsmos")
    model = weights_registry.load("quality_dnsmos")
    x = speech(weights_registry, "sample_two_cities")
    # Up to 16 s; beyond, the published script loses windows to rounding.
    for samples in (x[: 3 * RATE], x[: 10 * RATE], x[5 * RATE : 20 * RATE]):
        theirs = dnsmos.run(samples, RATE)
        ours = model.score(samples)
        assert ours.overall == pytest.approx(theirs["ovrl_mos"], abs=1e-4)
        assert ours.speech == pytest.approx(theirs["sig_mos"], abs=1e-4)
        assert ours.background == pytest.approx(theirs["bak_mos"], abs=1e-4)


@pytest.mark.weights
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_recogniser_hears_the_tale_of_two_cities(weights_registry: ModelRegistry) -> None:
    pytest.importorskip("faster_whisper")
    from auto_voice.evaluation.metrics import word_errors

    model = weights_registry.load("recogniser_base")
    heard = model.transcribe(speech(weights_registry, "sample_two_cities")[: 12 * RATE])
    said = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, "
        "it was the age of foolishness"
    )
    spoken = " ".join(heard.split()[: len(said.split())])
    assert word_errors(said, spoken).rate < 0.15
    assert model.transcribe(speech(weights_registry, "sample_two_cities")[: 12 * RATE]) == heard


class _Looping:
    """A recogniser that goes round in circles until repeats are forbidden."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def transcribe(self, samples: np.ndarray, **options: object) -> tuple[object, object]:
        self.asked.append(options)
        free = "no_repeat_ngram_size" not in options
        text, ratio = (" hold on" * 60, 30.0) if free else (" hold on, hold fast", 1.1)
        return iter([SimpleNamespace(text=text, compression_ratio=ratio)]), None


def test_a_text_that_goes_in_circles_is_looked_for_anew() -> None:
    model = _Looping()
    text = recogniser.Recogniser(model).transcribe(np.zeros(16000, np.float32))
    assert text == "hold on, hold fast"
    assert [options["temperature"] for options in model.asked] == [0.0, 0.0]
