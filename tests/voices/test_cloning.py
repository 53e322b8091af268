from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from auto_voice import load_voice, save_voice
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.errors import AudioOutputError, VoiceError
from auto_voice.types import Waveform
from auto_voice.voices.cloning import MOST_SECONDS, build_voice
from hand_made_stages import LocalContent, Speaker


def build(*recordings, name="ann"):
    pairs = [(f"the reference {i}", recording) for i, recording in enumerate(recordings)]
    return build_voice(pairs, Speaker(), LocalContent(), name)


def test_a_voice_knows_the_pitch_of_its_recording(speech):
    voice = build(Waveform(speech(6.0, 200.0), 16000))
    assert np.exp(voice.log_f0_mean) == pytest.approx(200, rel=0.02)
    # The vibrato of the signal: 6 % peak, so 4.2 % RMS.
    assert voice.log_f0_std == pytest.approx(0.042, abs=0.015)


def test_frames_of_content_and_mel_go_together(speech):
    voice = build(Waveform(speech(6.0), 16000))
    mel, content = voice.frames["mel"], voice.frames["content"]
    assert mel.shape[1] == 80
    assert content.shape[1] == 2
    assert len(mel) == len(content) == pytest.approx(voice.speech_seconds * 86.13, abs=2)
    # The first content dimension is the level, so it moves with the loudness of the mel.
    assert np.corrcoef(np.exp(mel).mean(1), content[:, 0])[0, 1] > 0.8


def test_level_and_rate_of_the_recording_do_not_change_the_voice(speech):
    loud = build(Waveform(speech(5.0), 16000))
    quiet = build(Waveform(speech(5.0) * 0.05, 16000))
    fine = build(Waveform(speech(5.0, sample_rate=48000), 48000))
    for other, limit in ((quiet, 1e-4), (fine, 0.05)):
        assert float(loud.embedding @ other.embedding) > 1 - limit
    difference = np.abs(loud.frames["mel"] - quiet.frames["mel"])
    assert np.median(difference) < 0.02


@pytest.mark.slow
def test_several_recordings_share_what_is_listened_to(speech):
    voice = build(*(Waveform(speech(25.0, seed=seed), 16000) for seed in range(3)))
    assert (MOST_SECONDS - 1) * 86.1 <= len(voice.frames["mel"]) <= MOST_SECONDS * 86.2
    assert voice.speech_seconds > MOST_SECONDS
    assert np.linalg.norm(voice.embedding) == pytest.approx(1)


def test_short_references_are_used_with_a_warning(speech):
    assert any("only" in note for note in build(Waveform(speech(2.5), 16000)).notes)
    assert build(Waveform(speech(8.0), 16000)).notes == ()


def test_mel_is_the_one_of_training(speech):
    """Concatenated references keep each recording's own mel: no frame mixes two of them."""
    one, two = Waveform(speech(5.0), 16000), Waveform(speech(5.0, 210.0, seed=3), 16000)
    both = build(one, two).frames["mel"]
    np.testing.assert_array_equal(both[: len(build(one).frames["mel"])], build(one).frames["mel"])
    assert both.dtype == log_mel(np.zeros(1000, np.float32), HIFIGAN_MEL).dtype


def test_a_voice_file_brings_everything_back(speech, tmp_path):
    voice = build(Waveform(speech(5.0), 16000))
    path = save_voice(tmp_path / "ann.safetensors", voice)
    again = load_voice(path)
    np.testing.assert_array_equal(again.embedding, voice.embedding)
    for name, values in voice.frames.items():
        np.testing.assert_array_equal(again.frames[name], values)
    for field in ("log_f0_mean", "log_f0_std", "name", "speech_seconds", "encoder", "notes"):
        assert getattr(again, field) == getattr(voice, field)
    assert again.content_space == "local"
    assert [p.name for p in tmp_path.iterdir()] == ["ann.safetensors"]


def test_bad_voice_files_give_one_clear_sentence(speech, tmp_path):
    good = save_voice(tmp_path / "good.safetensors", build(Waveform(speech(5.0), 16000)))
    data = good.read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (b"", b"RIFF", data[:100], data[:-1], b"\x80\x04" + data):
        bad.write_bytes(content)
        with pytest.raises(VoiceError, match="clone"):
            load_voice(bad)
    with pytest.raises(VoiceError, match="there is no voice file"):
        load_voice(tmp_path / "none.safetensors")
    save_file({"embedding": np.ones(256, np.float32)}, bad)
    with pytest.raises(VoiceError, match="not a voice file"):
        load_voice(bad)
    about = json.dumps({"log_f0_mean": None})
    metadata = {"format": "auto_voice.voice/1", "voice": about}
    save_file({"embedding": np.ones(256, np.float32)}, bad, metadata=metadata)
    with pytest.raises(VoiceError, match="damaged"):
        load_voice(bad)
    nan = build(Waveform(speech(5.0), 16000))
    nan.embedding[3] = np.nan
    with pytest.raises(VoiceError, match="damaged numbers"):
        load_voice(save_voice(bad, nan))


def test_a_voice_that_cannot_be_written_leaves_nothing(speech, tmp_path):
    with pytest.raises(AudioOutputError, match="cannot be written"):
        save_voice(tmp_path / "no" / "ann.safetensors", build(Waveform(speech(5.0), 16000)))
    assert list(tmp_path.iterdir()) == []
