from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from auto_voice import load_voice, save_voice
from auto_voice.audio.loudness import true_peak
from auto_voice.audio.pitch import extract_pitch, log_f0_statistics
from auto_voice.errors import (
    AudioContentError,
    AudioNotFoundError,
    ConfigError,
    MockAudioError,
    ModelLoadError,
    UnknownModelError,
    VoiceError,
)
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.inference.inputs import as_waveform
from auto_voice.types import Voice, Waveform
from hand_made_stages import LocalContent, LocalVocoder


def mean_pitch_hz(pitch) -> float:
    return float(np.exp(log_f0_statistics(pitch)[0]))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 192000])
@pytest.mark.parametrize("missing", [0, 1, 137])
def test_the_result_is_as_long_as_the_source_to_the_sample(
    hand_made, speech, reference, rate, missing
):
    pipeline, _ = hand_made()
    samples = speech(1.0, 130.0, rate)[: rate - missing]
    result = pipeline.convert(Waveform(samples, rate), reference)
    assert result.sample_rate == 22050
    assert abs(len(result.samples) - len(samples) * 22050 / rate) <= 0.5


def test_the_pitch_given_to_the_converter_lies_at_the_voices_mean(hand_made, source, reference):
    pipeline, registry = hand_made()
    voice = pipeline.clone(reference)
    result = pipeline.convert(source, voice)
    moved = registry.stages["converter_compact"].calls[-1].pitch
    assert mean_pitch_hz(moved) == pytest.approx(np.exp(voice.log_f0_mean), rel=1e-3)
    assert result.semitones == pytest.approx(12 * np.log2(210 / 120), abs=0.3)


def test_semitones_transpose_and_match_pitch_can_be_switched_off(hand_made, source, reference):
    pipeline, registry = hand_made()
    calls = registry.stages["converter_compact"].calls
    own = mean_pitch_hz(extract_pitch(source.samples, 16000))
    pipeline.convert(source, reference, match_pitch=False)
    pipeline.convert(source, reference, match_pitch=False, semitones=12)
    pipeline.convert(source, reference, semitones=-12)
    heights = [mean_pitch_hz(call.pitch) for call in calls]
    voice = calls[0].voice
    assert heights == pytest.approx([own, 2 * own, np.exp(voice.log_f0_mean) / 2], rel=1e-2)


def test_octave_errors_of_the_tracker_do_not_move_the_result(
    hand_made, source, reference, monkeypatch
):
    def with_octave_errors(samples, rate):
        pitch = extract_pitch(samples, rate)
        wrong = np.arange(len(pitch.f0_hz)) % 5 == 0
        return replace(pitch, f0_hz=np.where(wrong, 2 * pitch.f0_hz, pitch.f0_hz))

    pipeline, _ = hand_made()
    voice = pipeline.clone(reference)
    right = pipeline.convert(source, voice).semitones
    monkeypatch.setattr("auto_voice.inference.analysis.extract_pitch", with_octave_errors)
    assert pipeline.convert(source, voice).semitones == pytest.approx(right, abs=0.25)


def test_a_source_without_pitch_is_converted_and_said_so(hand_made, reference):
    whisper = 0.1 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    pipeline, _ = hand_made()
    result = pipeline.convert(Waveform(whisper, 16000), reference)
    assert result.semitones == 0
    assert any("No pitch was found in the source" in note for note in result.notes)


def test_the_result_is_as_loud_as_the_source(hand_made, source, reference):
    pipeline, _ = hand_made()
    voice = pipeline.clone(reference)
    loud = pipeline.convert(source, voice)
    quiet = pipeline.convert(Waveform(source.samples * 0.01, 16000), voice)
    np.testing.assert_allclose(quiet.samples, loud.samples * 0.01, atol=2e-5)


def test_what_would_clip_is_turned_down_and_said_so(hand_made, source, reference):
    pipeline, _ = hand_made()
    loud = Waveform(source.samples * np.float32(20 / np.abs(source.samples).max()), 16000)
    result = pipeline.convert(loud, reference)
    assert true_peak(result.samples, result.sample_rate) == pytest.approx(-1, abs=0.1)
    assert any("turned down" in note for note in result.notes)
    assert any("quieter than the source" in note for note in result.notes)


@pytest.mark.slow
def test_all_ways_to_give_a_source_and_a_voice_mean_the_same(
    hand_made, source, reference, tmp_path
):
    for name, audio in {"source": source, "reference": reference}.items():
        soundfile.write(tmp_path / f"{name}.wav", audio.samples, 16000, subtype="FLOAT")
    pipeline, _ = hand_made()
    voice = pipeline.clone(reference)
    save_voice(tmp_path / "voice.safetensors", voice)
    expected = np.asarray(pipeline.convert(source, voice))
    for given_source, target in [
        (source.samples, reference),
        (tmp_path / "source.wav", tmp_path / "reference.wav"),
        (str(tmp_path / "source.wav"), [tmp_path / "reference.wav"]),
        (source.samples[None], reference.samples),
        (source.samples.astype(np.float64), tmp_path / "voice.safetensors"),
        (source, load_voice(tmp_path / "voice.safetensors")),
    ]:
        result = pipeline.convert(given_source, target, sample_rate=16000)
        np.testing.assert_array_equal(np.asarray(result), expected)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8])
def test_integer_samples_mean_what_they_mean_in_a_file(source, dtype):
    limits = np.iinfo(dtype)
    middle, scale = (limits.max + limits.min + 1) // 2, (limits.max - limits.min) // 2
    integers = np.round(source.samples.astype(float) * scale + middle).astype(dtype)
    found = as_waveform(integers, 16000, "the source").samples
    np.testing.assert_allclose(found, source.samples, atol=1.01 / scale)


def test_a_bare_embedding_works_keeps_the_pitch_and_says_so(hand_made, source, reference):
    pipeline, registry = hand_made()
    embedding = 3 * pipeline.clone(reference).embedding
    result = pipeline.convert(source, embedding)
    assert result.semitones == 0
    assert any("bare embedding" in note for note in result.notes)
    given = registry.stages["converter_compact"].calls[-1].voice
    assert np.linalg.norm(given.embedding) == pytest.approx(1)
    own = mean_pitch_hz(extract_pitch(source.samples, 16000))
    assert np.exp(given.log_f0_mean) == pytest.approx(own, rel=1e-3)
    assert result.voice.log_f0_mean is None


def test_the_account_names_models_and_repeats_what_was_done_to_the_recordings(
    hand_made, source, reference
):
    pipeline, _ = hand_made()
    result = pipeline.convert(source.with_note("mixed down"), reference.with_note("resampled"))
    assert result.models == {
        "content": "local@1",
        "speaker": "speaker@1",
        "converter": "follow@1",
        "vocoder": "local@1",
    }
    assert "source: mixed down" in result.notes
    assert "the reference: resampled" in result.notes
    assert {"read", "load", "voice", "pitch", "content", "convert", "vocode"} <= set(result.timings)
    assert result.seconds_per_second > 0
    assert not result.mock


def test_progress_rises_to_one(hand_made, speech, reference):
    pipeline, _ = hand_made(PipelineConfig(chunk_seconds=3))
    seen: list[float] = []
    pipeline.convert(
        Waveform(speech(9.0), 16000),
        reference,
        progress=lambda told: seen.append(told.fraction) if told.stage == "convert" else None,
    )
    assert len(seen) >= 3
    assert seen == sorted(seen)
    assert seen[-1] == 1


@pytest.mark.slow
def test_threads_share_one_pipeline(mock_pipeline, source, reference):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: mock_pipeline.convert(source, reference), range(16)))
    for result in results:
        np.testing.assert_array_equal(result.samples, results[0].samples)


def test_mock_audio_is_marked_deterministic_and_not_written_unasked(
    mock_pipeline, source, reference, tmp_path
):
    result = mock_pipeline.convert(source, reference)
    assert result.mock
    assert all("mock" in model for model in result.models.values())
    again = VoiceConversionPipeline(PipelineConfig(use_mock_models=True)).convert(source, reference)
    np.testing.assert_array_equal(result.samples, again.samples)
    with pytest.raises(MockAudioError, match=r"noise and not speech.*--mock"):
        result.save(tmp_path / "out.wav")
    assert list(tmp_path.iterdir()) == []
    assert result.save(tmp_path / "out.wav", allow_mock=True).exists()


def test_warm_up_runs_every_stage(mock_pipeline):
    timings = mock_pipeline.warmup()
    assert {"speaker", "load", "content", "convert", "vocode"} <= set(timings)
    VoiceConversionPipeline(PipelineConfig(use_mock_models=True, enable_model_warmup=True))


def test_mock_mode_needs_neither_torch_nor_onnxruntime_to_be_imported():
    code = (
        "import sys, auto_voice; p = auto_voice.VoiceConversionPipeline("
        "auto_voice.PipelineConfig(use_mock_models=True)); p.content_encoder, p.vocoder; "
        "print(*{'torch', 'onnxruntime', 'transformers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


@pytest.mark.parametrize(
    ("samples", "error", "sentence"),
    [
        (np.zeros(0, np.float32), AudioContentError, "holds 0.000 s"),
        (np.ones(800, np.float32), AudioContentError, "at least 0.1 s"),
        (np.zeros(16000, np.float32), AudioContentError, "only silence"),
        (np.full(16000, np.nan, np.float32), AudioContentError, "NaN"),
        (np.full(16000, np.inf, np.float32), AudioContentError, "NaN or infinite"),
        (np.ones((2, 3, 16000), np.float32), ConfigError, "channels"),
        (np.ones((500, 500), np.float32), ConfigError, "channels"),
        (np.array(["a"] * 16000), ConfigError, "must be numbers"),
        (np.ones(16000, np.complex64), ConfigError, "must be numbers"),
        ([[1.0, 2.0], [3.0]] * 8000, ConfigError, "not an array of samples"),
        (np.ones(16000, np.int64), ConfigError, "full scale is not known"),
        (np.full(16000, 20000.0), AudioContentError, "1 is full scale"),
    ],
)
def test_a_bad_source_gives_one_clear_sentence(hand_made, reference, samples, error, sentence):
    pipeline, _ = hand_made()
    with pytest.raises(error, match=sentence) as caught:
        pipeline.convert(samples, reference, sample_rate=16000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("embedding", [np.zeros(256), np.ones(10), np.full(256, np.nan)])
def test_a_bad_embedding_gives_one_clear_sentence(hand_made, source, embedding):
    pipeline, _ = hand_made()
    with pytest.raises(VoiceError, match="finite, non-zero embedding of 256"):
        pipeline.convert(source, embedding)


def test_bad_references(hand_made, source, speech, tmp_path):
    pipeline, _ = hand_made()
    noise = 1e-3 * np.random.default_rng(0).standard_normal(48000).astype(np.float32)
    with pytest.raises(AudioContentError, match=r"the reference holds .*speech; give 5 to 30 s"):
        pipeline.convert(source, Waveform(noise, 16000))
    with pytest.raises(AudioContentError, match="the reference holds only 0"):
        pipeline.convert(source, Waveform(speech(4.0)[2000:8000], 16000))
    with pytest.raises(AudioNotFoundError):
        pipeline.convert(source, tmp_path / "no.wav")
    with pytest.raises(AudioContentError, match="no reference"):
        pipeline.clone([])


@pytest.mark.parametrize("semitones", [37, -100, float("nan"), float("inf")])
def test_absurd_transpositions_are_refused(hand_made, source, reference, semitones):
    pipeline, _ = hand_made()
    with pytest.raises(ConfigError, match="within ±36"):
        pipeline.convert(source, reference, semitones=semitones)


def test_models_that_do_not_fit_each_other_are_named(hand_made, source, reference):
    foreign = LocalContent()
    foreign.space, foreign.name = "elsewhere", "foreign@1"
    pipeline, _ = hand_made(content_whisper=foreign)
    with pytest.raises(ModelLoadError, match="autovoice models map content_whisper"):
        pipeline.convert(source, reference)
    coarse = LocalVocoder()
    coarse.hop_samples = 512
    pipeline, _ = hand_made(hifigan_universal=coarse)
    with pytest.raises(ModelLoadError, match="choose a vocoder with the converter's mel"):
        pipeline.convert(source, reference)


def test_a_vocoder_that_gives_another_length_is_caught(hand_made, source, reference):
    class Short(LocalVocoder):
        def synthesize(self, mel):
            return super().synthesize(mel)[:, :-256]

    pipeline, _ = hand_made(hifigan_universal=Short())
    with pytest.raises(ModelLoadError, match=r"gave .* samples for"):
        pipeline.convert(source, reference)


def test_a_model_of_another_kind_is_refused_with_those_that_fit(source, reference):
    config = PipelineConfig(use_mock_models=True, vocoder="speaker_encoder")
    with pytest.raises(ConfigError, match=r"is a speaker model, not a vocoder.*hifigan_universal"):
        VoiceConversionPipeline(config).convert(source, reference)
    config = PipelineConfig(use_mock_models=True, converter="no_such")
    with pytest.raises(UnknownModelError, match="no_such"):
        VoiceConversionPipeline(config).convert(source, reference)


def test_a_voice_of_another_encoder_is_refused(hand_made, source, reference):
    pipeline, _ = hand_made()
    voice = replace(pipeline.clone(reference), encoder="other@2", name="ann", speech=None)
    with pytest.raises(VoiceError, match=r"ann was made with other@2.*clone it again"):
        pipeline.convert(source, voice)


def test_chunks_cannot_be_shorter_than_two_seconds():
    with pytest.raises(ConfigError, match="at least 2"):
        PipelineConfig(chunk_seconds=1)


def test_similarity_is_one_with_oneself(hand_made, reference, source):
    pipeline, _ = hand_made()
    voice = Voice(pipeline.speaker_encoder.embed_utterance(reference.samples))
    assert pipeline.similarity(reference, voice) == pytest.approx(1)
    assert pipeline.similarity(source, voice) < 0.99
