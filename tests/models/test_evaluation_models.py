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


# What librosa 0.11 makes of 1.3 s of noise: ``melspectrogram(sr=16000, n_fft=512, win_length=400,
# hop_length=160, n_mels=40, window="hamming", center=False)``, logarithm of ten of 1e-10 more; the
# means of the bands over time, and one frame.
LIBROSA_MEANS = [
    -1.35506,
    -1.38495,
    -1.43203,
    -1.48295,
    -1.44626,
    -1.42946,
    -1.41953,
    -1.42346,
    -1.41261,
    -1.40646,
    -1.42642,
    -1.43827,
    -1.39244,
    -1.29346,
    -1.37836,
    -1.42552,
    -1.40572,
    -1.36011,
    -1.41394,
    -1.34313,
    -1.31171,
    -1.34202,
    -1.33751,
    -1.34566,
    -1.34089,
    -1.34142,
    -1.33049,
    -1.34832,
    -1.36644,
    -1.38409,
    -1.38303,
    -1.3448,
    -1.30921,
    -1.31433,
    -1.32332,
    -1.32393,
    -1.31513,
    -1.32548,
    -1.32592,
    -1.3076,
]
LIBROSA_FRAME_10 = [
    -1.12677,
    -1.03867,
    -1.22117,
    -1.88478,
    -1.97183,
    -1.79218,
    -1.11674,
    -1.19754,
    -1.55524,
    -1.09569,
    -1.142,
    -1.2387,
    -1.34285,
    -1.60688,
    -2.35439,
    -1.52283,
    -1.52797,
    -1.36698,
    -1.01578,
    -1.22779,
    -1.53063,
    -1.1796,
    -1.06415,
    -1.41033,
    -1.86685,
    -1.49548,
    -1.58225,
    -1.33241,
    -1.21412,
    -1.49046,
    -1.26334,
    -1.2113,
    -1.36257,
    -1.27059,
    -1.43201,
    -1.2386,
    -1.15079,
    -1.26661,
    -1.24827,
    -1.26444,
]


def test_dvector_front_end_agrees_with_librosa() -> None:
    ours = dvector_model.log_mel_frames(noise(1.3))
    assert ours.shape == (127, 40)
    np.testing.assert_allclose(ours.mean(axis=0), LIBROSA_MEANS, atol=2e-5)
    np.testing.assert_allclose(ours[10], LIBROSA_FRAME_10, atol=2e-5)


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


# What speechmos 0.0.1.1 (librosa 0.11) says of parts of a sample, in samples at 16 kHz: overall,
# speech, background. Up to 16 s; beyond, the published script loses windows to rounding.
SPEECHMOS = {
    (0, 3 * RATE): (2.9309, 3.3512, 3.86837),
    (0, 10 * RATE): (3.21619, 3.62142, 3.92306),
    (5 * RATE, 20 * RATE): (3.01577, 3.57305, 3.61306),
}


@pytest.mark.weights
def test_quality_agrees_with_speechmos(weights_registry: ModelRegistry) -> None:
    model = weights_registry.load("quality_dnsmos")
    x = speech(weights_registry, "sample_two_cities")
    for (start, stop), expected in SPEECHMOS.items():
        found = model.score(x[start:stop])
        ours = (found.overall, found.speech, found.background)
        assert ours == pytest.approx(expected, abs=1e-4)


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
