"""Every way to hand over a recording, and a result that behaves like audio."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from auto_voice import OutputSpec, convert
from auto_voice.errors import AudioContentError, AudioFormatError, AudioOutputError, ConfigError
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.inference.inputs import Source, as_waveform
from auto_voice.models import ModelRegistry
from auto_voice.progress import told_to
from auto_voice.types import Voice, Waveform
from hand_made_stages import speech_like
from registry_kit import tone_catalog

MOCK = PipelineConfig(use_mock_models=True)


@pytest.fixture(scope="module")
def samples():
    return speech_like(2.0, 120.0)


def taken(audio, rate=16000):
    return as_waveform(audio, rate, "the source")


def test_an_array_without_a_rate_is_an_error_that_says_so(hand_made, source, reference):
    pipeline, _ = hand_made()
    with pytest.raises(ConfigError, match=r"carries no sample rate; pass sample_rate=48000"):
        pipeline.convert(source.samples, reference)
    with pytest.raises(ConfigError, match="carries no sample rate"):
        pipeline.convert(source, reference.samples)
    with pytest.raises(ConfigError, match="carries no sample rate"):
        pipeline.clone(reference.samples)
    long = np.repeat(source.samples, 3)
    assert pipeline.convert(long, reference, sample_rate=48000).seconds == pytest.approx(3.0)


@pytest.mark.parametrize("rate", [16000.0, np.float32(16000), np.int64(16000)])
def test_rates_may_be_numbers_of_any_kind(samples, rate):
    found = taken(samples, rate)
    assert (found.sample_rate, type(found.sample_rate)) == (16000, int)


@pytest.mark.parametrize("rate", [0, -16000, 44100.5, "16000", True, 16, 1e9, np.nan, [16000]])
def test_rates_that_cannot_be_are_one_sentence(samples, rate):
    with pytest.raises(ConfigError, match="must be a whole number of Hz"):
        taken(samples, rate)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_integers_of_any_width_mean_what_they_mean_in_a_file(samples, dtype):
    limits = np.iinfo(dtype)
    middle, scale = (int(limits.max) + int(limits.min) + 1) // 2, (limits.max - limits.min) // 2
    integers = np.round(samples.astype(float) * scale + middle).astype(dtype)
    np.testing.assert_allclose(taken(integers).samples, samples, atol=1.01 / scale)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.longdouble])
def test_floats_of_any_width(samples, dtype):
    np.testing.assert_allclose(taken(samples.astype(dtype)).samples, samples, atol=1e-3)


def test_both_layouts_of_channels_are_mixed_to_the_same(samples):
    stereo = np.stack([samples, 0.5 * samples])
    rows, columns = taken(stereo), taken(stereo.T)
    np.testing.assert_array_equal(rows.samples, columns.samples)
    np.testing.assert_allclose(rows.samples, 0.75 * samples, atol=1e-6)
    assert rows.notes == ("mixed 2 channels down to one",)
    # As in a file, a silent channel does not lower the level, and opposite ones do not cancel.
    silent = taken(np.stack([samples, 0 * samples]))
    np.testing.assert_array_equal(silent.samples, samples)
    opposite = taken(np.stack([samples, -samples]))
    np.testing.assert_array_equal(opposite.samples, samples)
    assert "cancel each other out" in opposite.notes[0]
    np.testing.assert_array_equal(taken(samples[None, None]).samples, samples)


def test_tensors_are_taken_as_they_are(samples):
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(samples)
    np.testing.assert_array_equal(taken(tensor).samples, samples)
    np.testing.assert_array_equal(taken(tensor[None].requires_grad_()).samples, samples)
    np.testing.assert_allclose(taken(tensor.bfloat16()).samples, samples, atol=4e-3)
    np.testing.assert_allclose(taken((tensor * 32767).to(torch.int16)).samples, samples, atol=1e-4)


def test_files_may_be_bytes_or_open(samples, tmp_path):
    path = tmp_path / "talk.flac"
    soundfile.write(path, samples, 16000)
    expected = taken(path, None).samples
    data = path.read_bytes()
    with path.open("rb") as file:
        for given in (data, bytearray(data), memoryview(data), io.BytesIO(data), file, str(path)):
            np.testing.assert_array_equal(taken(given, None).samples, expected)
    with path.open(encoding="latin-1") as file, pytest.raises(AudioFormatError, match="'rb'"):
        taken(file, None)
    with path.open("ab") as file, pytest.raises(AudioFormatError, match="cannot be read"):
        taken(file, None)


@pytest.mark.parametrize(
    ("audio", "sentence"),
    [
        (None, "must be numbers"),
        (object(), "must be numbers"),
        ({"a": 1}, "must be numbers"),
        (np.ones(16000, bool), "must be numbers"),
        (["a.wav", 3.0], "must be numbers"),
        (b"no audio at all", "not a recording"),
    ],
)
def test_what_is_no_recording_is_one_sentence(audio, sentence):
    for rate in (16000, None):
        with pytest.raises((ConfigError, AudioFormatError), match=sentence):
            taken(audio, rate)


def test_blocks_of_a_file_are_what_the_whole_is(samples, tmp_path):
    path = tmp_path / "talk.wav"
    soundfile.write(path, np.tile(speech_like(2.0, 120.0, 44100), 3), 44100, subtype="FLOAT")
    whole, streamed = Source(path), Source(path, memory_seconds=1)
    assert (whole.in_memory, streamed.in_memory) == (True, False)
    a, b = (np.concatenate(list(one.blocks(16000))) for one in (whole, streamed))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert whole.facts == streamed.facts
    before = streamed.identity(tmp_path)
    soundfile.write(path, speech_like(3.0), 16000)
    assert Source(path, memory_seconds=1).identity(tmp_path) != before


def test_a_result_behaves_like_its_samples(source, reference):
    torch = pytest.importorskip("torch")
    result = convert(source, reference, config=MOCK)
    assert len(result) == result.shape[0] == len(result.samples)
    np.testing.assert_array_equal(result[100:200], result.samples[100:200])
    np.testing.assert_array_equal(result * 0.5, result.samples * np.float32(0.5))
    np.testing.assert_array_equal(result + result, 2 * result.samples)
    np.testing.assert_array_equal(np.asarray(result), result.samples)
    np.testing.assert_array_equal(-result, -result.samples)
    assert np.max(np.abs(result)) == np.max(np.abs(result.samples))
    assert np.concatenate([result, result]).dtype == np.float32
    assert torch.equal(torch.as_tensor(np.asarray(result)), torch.from_numpy(result.samples))
    tensor = torch.as_tensor(result)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (len(result),))
    assert result == result
    assert len({result, result}) == 1
    for value in (result, result.audio, result.voice):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 100
    again = convert(result, reference, config=MOCK)
    assert again.seconds == pytest.approx(result.seconds, abs=1e-3)


def test_a_result_may_be_changed_in_place(source, reference):
    result = original = convert(source, reference, config=MOCK)
    samples = result.samples.copy()
    assert np.add(result, result, out=result) is original.samples
    np.testing.assert_array_equal(original.samples, 2 * samples)
    result *= 0.5
    assert type(result) is np.ndarray
    np.testing.assert_array_equal(result, samples)
    np.testing.assert_array_equal(original.samples, samples)


@pytest.mark.parametrize("rate", [0, -1, 999, 384_001, 44100.5, np.nan, 1e300, True, "44100", [1]])
def test_output_rates_that_cannot_be_are_one_sentence(tmp_path, rate):
    with pytest.raises(AudioOutputError, match="must be a whole number of Hz between 1000 and"):
        OutputSpec(tmp_path / "a.wav", rate=rate).check()


@pytest.mark.parametrize("rate", [44100, 44100.0, np.int64(44100)])
def test_output_rates_may_be_numbers_of_any_kind(tmp_path, rate):
    found = OutputSpec(tmp_path / "a.wav", rate=rate).check().file_rate(16000)
    assert (found, type(found)) == (44100, int)


def test_the_output_is_checked_before_any_work(hand_made, source, reference, tmp_path):
    pipeline, registry = hand_made()
    (tmp_path / "there.wav").touch()
    for spec in (
        OutputSpec(tmp_path / "no" / "x.wav"),
        OutputSpec(tmp_path / "x.xyz"),
        OutputSpec(tmp_path / "x.wav", subtype="vorbis"),
        OutputSpec(tmp_path / "there.wav", overwrite=False),
    ):
        with pytest.raises(AudioOutputError):
            pipeline.convert_file(source, reference, spec)
    assert registry.stages["content_whisper"].lengths == []
    made = pipeline.convert_file(source, reference, OutputSpec(tmp_path / "x", "flac", rate=48000))
    info = soundfile.info(tmp_path / "x")
    assert (info.format, info.samplerate, made.file_rate) == ("FLAC", 48000, 48000)
    opus = pipeline.convert_file(source, reference, tmp_path / "x.opus")
    assert opus.file_rate == soundfile.info(tmp_path / "x.opus").samplerate == 24000


def test_progress_of_every_stage_comes_through_one_channel(hand_made, source, reference):
    pipeline, _ = hand_made()
    seen = []
    pipeline.convert(source, reference, progress=seen.append)
    assert {event.stage for event in seen} == {"convert"}
    assert all(0 <= event.fraction <= 1 for event in seen)
    assert seen[-1].fraction == 1
    pipeline.progress = (default := []).append
    pipeline.convert(source, reference)
    assert len(default) == len(seen)


def test_the_progress_of_a_call_carries_downloads_and_loads(tmp_path, source, reference):
    """Even if neither the pipeline nor its registry has a listener of its own."""
    registry = ModelRegistry(
        tmp_path / "models", use_mock=True, config=tone_catalog(tmp_path), progress=False
    )
    pipeline = VoiceConversionPipeline(model_registry=registry)
    seen = []
    pipeline.convert(source, reference, progress=seen.append)
    loads = {event.item: event.fraction for event in seen if event.stage == "load"}
    assert len(loads) == 4
    assert set(loads.values()) == {1.0}
    real = ModelRegistry(tmp_path / "models", config=tone_catalog(tmp_path), progress=False)
    seen.clear()
    with told_to(seen.append):
        real.load("tone")
    assert [event.stage for event in seen] == ["load", "download", "load"]
    assert seen[1].item == "tone@1.0 tone.wav"
    assert seen[1].fraction == 1


def test_short_references_convert_with_a_warning(hand_made, speech, source):
    pipeline, _ = hand_made()
    result = pipeline.convert(source, Waveform(speech(1.0, 210.0), 16000))
    assert any("of speech; 5 to 30 s come closer" in note for note in result.notes)
    with pytest.raises(AudioContentError, match="give 5 to 30 s"):
        pipeline.convert(source, Waveform(speech(1.0, 210.0)[:6000], 16000))


def test_cloning_warns_of_what_inspect_sees(hand_made, speech, monkeypatch):
    pipeline, _ = hand_made()
    rng = np.random.default_rng(0)
    clean = speech(6.0, 140.0)
    seconds = np.arange(len(clean)) / 16000
    chord = sum(np.sin(2 * np.pi * f * seconds) for f in (220, 277, 330)) / 3
    quiet = np.zeros(3 * 16000)
    paused = np.concatenate([quiet, clean, quiet])
    step = np.arange(len(paused)) // 8000 % 4
    phase = np.cumsum(2 * np.pi * np.array([262, 330, 392, 494])[step] / 16000)
    melody = 0.01 * (np.sin(phase) + np.sin(1.5 * phase))
    spectrum = np.fft.rfft(clean)
    spectrum[np.fft.rfftfreq(len(clean), 1 / 16000) > 3400] = 0
    cases = {
        "noisy": clean + 0.03 * rng.standard_normal(len(clean)),
        "noisy (": clean + 0.1 * chord,
        "music or other voices": paused + melody,
        "narrow band": np.fft.irfft(spectrum, len(clean)),
    }
    for word, audio in cases.items():
        notes = pipeline.clone(Waveform(audio.astype(np.float32), 16000)).notes
        assert any(word in note for note in notes), word
    assert not any("record" in note for note in pipeline.clone(Waveform(clean, 16000)).notes)
    monkeypatch.setattr("auto_voice.voices.inspection.count_speakers", lambda *_: 2)
    notes = pipeline.clone(Waveform(clean, 16000)).notes
    assert any("2 people seem to speak" in note for note in notes)


def test_a_voice_holds_no_path_of_the_machine_it_was_made_on(hand_made, tmp_path, speech):
    folder = tmp_path / "private-folder"
    folder.mkdir()
    stereo = np.stack([speech(4.0), speech(4.0)], axis=1)
    soundfile.write(folder / "ann.wav", stereo, 16000)
    pipeline, _ = hand_made()
    voice = pipeline.clone(folder / "ann.wav")
    assert voice.name == "ann"
    assert any("ann.wav: mixed" in note for note in voice.notes)
    assert not any("private-folder" in note for note in voice.notes)


def test_mock_output_is_refused_before_the_work(source, reference, tmp_path, monkeypatch):
    from auto_voice.errors import MockAudioError
    from auto_voice.inference import VoiceConversionPipeline

    pipeline = VoiceConversionPipeline(MOCK)
    monkeypatch.setattr(
        "auto_voice.inference.voice_conversion_pipeline.build_voice", None
    )  # Cloning would fail.
    with pytest.raises(MockAudioError):
        pipeline.convert_file(source, reference, Path(tmp_path / "x.wav"))


def test_voices_and_results_can_be_sent_to_other_processes(hand_made, source, reference):
    pipeline, _ = hand_made()
    result = pipeline.convert(source, reference)
    again = pickle.loads(pickle.dumps(result))
    np.testing.assert_array_equal(again.samples, result.samples)
    bare = Voice(np.full(256, 1 / 16, np.float32))
    assert copy.deepcopy(bare).frames == {}


def test_references_that_are_voices_or_lack_labels_are_told(hand_made, reference):
    pipeline, _ = hand_made()
    voice = pipeline.clone(reference)
    with pytest.raises(ConfigError, match="not voices; give one voice"):
        pipeline.voice([voice, voice])
    with pytest.raises(ConfigError, match="2 labels for 1 recordings"):
        pipeline.clone([reference], labels=["one", "two"])
    assert pipeline.clone([reference, reference], labels=["one", "two"]).name == voice.name
