"""Voice files and tables from elsewhere: one sentence each, and nothing is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from auto_voice.batch.jobs import BatchJob, Defaults, collect
from auto_voice.batch.manifest import Manifest
from auto_voice.errors import AudioFormatError, AudioOutputError, ConfigError, VoiceError
from auto_voice.inference import PipelineConfig
from auto_voice.inference.result import OutputSpec
from auto_voice.types import Voice
from auto_voice.voices.blending import blend_voices
from auto_voice.voices.library import VoiceLibrary
from auto_voice.voices.voice_file import load_voice, save_voice


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "v.wav"):
        Path(name).touch()
    return tmp_path


def voice(**facts) -> Voice:
    embedding = np.zeros(256, np.float32)
    embedding[0] = 1
    frames = {"mel": np.zeros((9, 80), np.float32), "content": np.zeros((9, 2), np.float32)}
    return Voice(**{"embedding": embedding, "frames": frames, "log_f0_mean": 5.0, **facts})


def altered(arrays=None, **facts) -> Path:
    path = save_voice("voice.safetensors", voice())
    with safe_open(str(path), framework="numpy") as file:
        metadata = dict(file.metadata())
    about = json.loads(metadata["voice"]) | facts
    save_file(load_file(path) | (arrays or {}), path, metadata | {"voice": json.dumps(about)})
    return path


@pytest.mark.parametrize(
    ("arrays", "facts"),
    [
        ({"embedding": np.ones(10, np.float32)}, {}),
        ({"embedding": np.zeros(256, np.float32)}, {}),
        ({"frames.mel": np.full((9, 80), 1e30, np.float32)}, {}),
        ({"frames.mel": np.ones(9, np.float32)}, {}),
        ({"frames.mel": np.ones((9, 79), np.float32)}, {}),
        ({"frames.content": np.ones((5, 2), np.float32)}, {}),
        ({"speech": np.ones(16000, np.float32)}, {}),
        ({}, {"log_f0_mean": 1e9}),
        ({}, {"log_f0_mean": float("nan")}),
        ({}, {"quality": {"snr_db": float("nan")}}),
        ({}, {"quality": [1, 2]}),
        ({}, {"notes": None}),
    ],
)
def test_numbers_that_cannot_be_are_refused(arrays, facts):
    with pytest.raises(VoiceError, match="clone the voice again"):
        load_voice(altered(arrays, **facts))


def test_text_of_a_voice_file_cannot_steer_a_terminal():
    loaded = load_voice(altered(notes=["\x1b[31mred\nline"], consent="a\x07b"))
    assert loaded.notes == (" [31mred line",)
    assert loaded.consent == "a b"


def test_what_is_far_too_large_is_not_read():
    with Path("big.safetensors").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(VoiceError, match="too large"):
        load_voice("big.safetensors")


def test_a_damaged_voice_can_be_removed_and_does_not_hide_the_others():
    library = VoiceLibrary("voices")
    library.add("good", voice())
    library.path("bad").write_bytes(b"no")
    found, damaged = library.readable()
    assert list(found) == ["good"]
    assert len(damaged) == 1
    library.remove("bad")
    assert library.names() == ["good"]


def test_a_blend_keeps_what_the_owners_agreed_to():
    a, b = voice(name="a", consent="form 1"), voice(name="b", consent="form 2")
    assert blend_voices([(a, 1), (b, 1)]).consent == "a: form 1; b: form 2"


def test_content_of_another_width_is_refused(hand_made, source, reference):
    pipeline, _ = hand_made()
    made = pipeline.clone(reference)
    frames = {**made.frames, "content": np.zeros((len(made.frames["mel"]), 7), np.float32)}
    wrong = voice(frames=frames, encoder=made.encoder, content_space=made.content_space)
    with pytest.raises(VoiceError, match="content of 7 numbers"):
        pipeline.convert(source, wrong)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("x.csv", "source\n", "holds no jobs"),
        ("x.csv", "source,source\na.wav,a.wav\n", "two columns source"),
        ("x.csv", "source\n" + "x" * 200_000 + "\n", "not CSV"),
        ("x.csv", "source\na\0b.wav\n", "NUL"),
        ("x.csv", "source,rate\na.wav,1e999\n", "whole number of Hz"),
        ("x.jsonl", '{"source": "a.wav", "rate": Infinity}', "whole number of Hz"),
        ("x.jsonl", '{"source": "a.wav", "rate": 44100.5}', "whole number of Hz"),
        ("x.jsonl", '{"source": "a.wav", "semitones": 1' + 400 * "0" + "}", "within ±36"),
        ("x.jsonl", "[" * 100_000, "not JSON"),
    ],
)
def test_tables_that_cannot_be_are_one_sentence(name, text, match):
    Path(name).write_text(text)
    with pytest.raises(ConfigError, match=match):
        collect([name], Defaults(voice=("v.wav",)))


def test_a_cell_may_hold_lines_and_odd_separators():
    Path("x.csv").write_text('source,voice\n"a\u2028b.wav",v.wav\n')
    (job,) = collect(["x.csv"], Defaults())
    assert job.source == "a\u2028b.wav"


def test_no_batch_replaces_what_it_reads():
    with pytest.raises(ConfigError, match=r"a\.wav is also an input of this batch"):
        collect(["a.wav"], Defaults(voice=("v.wav",), output=OutputSpec("")))
    Path("x.jsonl").write_text('{"source": "a.wav", "output": "v.wav"}')
    with pytest.raises(ConfigError, match=r"v\.wav is also an input"):
        collect(["x.jsonl"], Defaults(voice=("v.wav",), output=OutputSpec("")))


def test_short_conversions_do_not_replace_their_source(hand_made):
    with pytest.raises(AudioOutputError, match="also an input"):
        hand_made()[0].convert_file(Path("a.wav"), voice(), Path("a.wav"))


def test_a_name_that_is_no_utf8_comes_back_from_the_manifest():
    job = BatchJob("\udcff.wav", OutputSpec("out\udcff.wav"), ("v.wav",))
    with Manifest(Path("out/manifest.jsonl")) as manifest:
        manifest.record(job, "started")
    with Manifest(Path("out/manifest.jsonl")) as manifest:
        assert manifest.owns(job)


def test_a_truncated_recording_is_used_only_where_that_was_asked_for(hand_made, speech):
    soundfile.write("whole.wav", speech(4.0), 16000)
    Path("cut.wav").write_bytes(Path("whole.wav").read_bytes()[:64044])
    with pytest.raises(AudioFormatError, match="--allow-truncated"):
        hand_made()[0].convert_file(Path("cut.wav"), voice(), Path("out.wav"))
    pipeline, _ = hand_made(PipelineConfig(allow_truncated=True))
    for seconds in (300, 0):
        result = pipeline.convert_file("cut.wav", voice(), "out.wav", memory_seconds=seconds)
        assert result.seconds == pytest.approx(2.0, abs=0.01)
        assert any("truncated" in note for note in result.notes)
