from __future__ import annotations

import errno
import json
import logging
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_voice.audio.pitch import extract_pitch
from auto_voice.errors import (
    AudioContentError,
    AudioFormatError,
    AudioOutputError,
    MockAudioError,
    ModelLoadError,
)
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.inference.analysis import Analysis, analyse, pitch_of
from auto_voice.inference.checkpoint import Checkpoint
from auto_voice.inference.chunking import Chunk, ContentWindows, Joiner, halved
from auto_voice.inference.controls import Controls
from auto_voice.inference.inputs import FileSamples, MemorySamples, Section
from auto_voice.inference.result import OutputSpec
from auto_voice.models.base import DRAWING
from auto_voice.types import Content, Pitch, Waveform
from auto_voice.voices.voice_file import save_voice
from hand_made_stages import LocalContent, LocalConverter, LocalVocoder, join

PIECES = PipelineConfig(chunk_seconds=6)
SECONDS = 20.0


class CentredLocal(LocalContent):
    """Takes the utterance's mean out of its features, as the compact encoder does."""

    def encode(self, samples):
        features = super().encode(samples).features
        return self.centred(features, features.mean(0))

    def encode_piece(self, samples):
        return super().encode(samples).features

    def centred(self, features, mean):
        return Content(features - mean, self.frame_rate, self.space)


class Counting(LocalVocoder):
    """Stops at a call, or where a piece has too many frames; remembers how long pieces were."""

    def __init__(self, stop_at=None, most_frames=None, error=None):
        self.stop_at, self.most_frames, self.error = stop_at, most_frames, error or MemoryError()
        self.frames: list[int] = []

    def synthesize(self, mel):
        if self.most_frames is not None and mel.shape[1] > self.most_frames:
            raise self.error
        self.frames.append(mel.shape[1])
        if self.stop_at is not None and len(self.frames) >= self.stop_at:
            raise KeyboardInterrupt
        return super().synthesize(mel)


@pytest.fixture
def talk(tmp_path, speech):
    path = tmp_path / "talk.wav"
    # Odd lengths and rates show what rounding does.
    soundfile.write(path, speech(SECONDS, 130.0)[:-77], 16000, subtype="FLOAT")
    return path


@pytest.fixture
def voice(hand_made, reference):
    return hand_made()[0].clone(reference)


def decibels(error, whole):
    return 20 * np.log10(np.linalg.norm(error) / np.linalg.norm(whole) + 1e-12)


def on_disk(pipeline, source, target, output, subtype=None, **options):
    """``convert_file`` of a source that goes through the disk however short it is."""
    spec = OutputSpec(output, subtype=subtype)
    return pipeline.convert_file(source, target, spec, memory_seconds=0, **options)


def read(path):
    return soundfile.read(path, dtype="float32")[0]


@pytest.mark.slow
def test_from_file_to_file_gives_what_memory_gives(hand_made, talk, voice, tmp_path):
    pipeline, _ = hand_made(PIECES)
    in_memory = pipeline.convert(talk, voice)
    seen: list[float] = []

    def tell(progress):
        if progress.stage == "convert":
            seen.append(progress.fraction)

    result = on_disk(pipeline, talk, voice, tmp_path / "out.wav", subtype="float", progress=tell)
    out = read(tmp_path / "out.wav")
    assert len(out) == len(in_memory.samples) == result.length
    assert decibels(out - in_memory.samples, out) < -100
    assert result.chunks >= 4
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.slow
def test_pieces_of_an_encoder_that_removes_the_mean_give_what_the_whole_gives(
    hand_made, talk, reference
):
    whole_pipeline, _ = hand_made(content_whisper=CentredLocal())
    piece_pipeline, _ = hand_made(PIECES, content_whisper=CentredLocal())
    voice = whole_pipeline.clone(reference)
    whole, pieces = (p.convert(talk, voice) for p in (whole_pipeline, piece_pipeline))
    assert (whole.chunks, pieces.chunks > 3) == (1, True)
    assert decibels(whole.samples - pieces.samples, whole.samples) < -60


@pytest.mark.slow
def test_an_interrupted_conversion_goes_on_where_it_was(hand_made, talk, voice, tmp_path, caplog):
    out = tmp_path / "out.flac"
    expected, _ = hand_made(PIECES, hifigan_universal=(complete := Counting()))
    on_disk(expected, talk, voice, tmp_path / "whole.flac")
    stopping, _ = hand_made(PIECES, hifigan_universal=Counting(stop_at=3))
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        on_disk(stopping, talk, voice, out)
    assert "the same command goes on from there" in caplog.text
    assert not out.exists()
    going_on, _ = hand_made(PIECES, hifigan_universal=(rest := Counting()))
    result = on_disk(going_on, talk, voice, out)
    assert result.resumed
    assert len(rest.frames) == len(complete.frames) - 2
    np.testing.assert_array_equal(read(out), read(tmp_path / "whole.flac"))
    assert list(tmp_path.glob("*.partial")) == []


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["source.f32", "result.f32", "analysis.npz", "state.json"])
def test_a_damaged_checkpoint_never_becomes_silence(hand_made, talk, voice, tmp_path, damaged):
    out = tmp_path / "out.wav"
    on_disk(hand_made(PIECES)[0], talk, voice, tmp_path / "whole.wav")
    stopping, _ = hand_made(PIECES, hifigan_universal=Counting(stop_at=3))
    with pytest.raises(KeyboardInterrupt):
        on_disk(stopping, talk, voice, out)
    path = tmp_path / "out.wav.partial" / damaged
    if damaged == "state.json":
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "source": []}))
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = on_disk(hand_made(PIECES)[0], talk, voice, out)
    assert result.resumed == (damaged == "analysis.npz")
    np.testing.assert_array_equal(read(out), read(tmp_path / "whole.wav"))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["controls", "source", *DRAWING])
def test_another_command_does_not_go_on_with_foreign_pieces(
    hand_made, talk, voice, tmp_path, change, speech
):
    out = tmp_path / "out.wav"
    stopping, _ = hand_made(PIECES, hifigan_universal=Counting(stop_at=3))
    with pytest.raises(KeyboardInterrupt):
        on_disk(stopping, talk, voice, out)
    controls, converter = Controls(), LocalConverter()
    if change == "controls":
        controls = Controls(semitones=1.0)
    elif change in DRAWING:
        setattr(converter, change, 0.2)
    else:
        soundfile.write(talk, speech(SECONDS, 90.0), 16000)
    pipeline, _ = hand_made(
        PIECES, hifigan_universal=(again := Counting()), converter_compact=converter
    )
    assert not on_disk(pipeline, talk, voice, out, controls=controls).resumed
    assert len(again.frames) >= 4


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")],
    ids=["numpy", "gpu"],
)
@pytest.mark.slow
def test_where_memory_does_not_suffice_pieces_are_halved(
    hand_made, talk, voice, tmp_path, error, caplog, monkeypatch
):
    let_go = []
    forget = ContentWindows.forget
    monkeypatch.setattr(
        ContentWindows, "forget", lambda self: (let_go.append(self), forget(self))[1]
    )
    pipeline, _ = hand_made(PIECES)
    whole = pipeline.convert(talk, voice)
    small, _ = hand_made(
        PIECES, hifigan_universal=(tight := Counting(most_frames=200, error=error))
    )
    with caplog.at_level(logging.WARNING):
        result = on_disk(small, talk, voice, tmp_path / "out.wav", subtype="float")
    assert "the memory is full: going on in pieces" in caplog.text
    assert let_go
    assert max(tight.frames) <= 200
    assert result.chunks > whole.chunks
    assert decibels(read(tmp_path / "out.wav") - whole.samples, whole.samples) < -60


@pytest.mark.slow
def test_memory_that_does_not_suffice_for_a_second_is_said(hand_made, talk, voice, tmp_path):
    pipeline, _ = hand_made(PIECES, hifigan_universal=Counting(most_frames=10))
    with pytest.raises(ModelLoadError, match="even for a second"):
        on_disk(pipeline, talk, voice, tmp_path / "out.wav")
    broken, _ = hand_made(PIECES, hifigan_universal=Counting(0, error=RuntimeError("a defect")))
    broken.registry.stages["hifigan_universal"].most_frames = 1
    with pytest.raises(RuntimeError, match="a defect"):
        on_disk(broken, talk, voice, tmp_path / "out.wav")


def test_two_processes_do_not_write_one_output(hand_made, talk, voice, tmp_path):
    folder = tmp_path / "out.wav.partial"
    folder.mkdir()
    pipeline, _ = hand_made(PIECES)
    with (
        FileLock(folder / "lock"),
        pytest.raises(AudioOutputError, match=r"another process is writing .*out\.wav;"),
    ):
        on_disk(pipeline, talk, voice, tmp_path / "out.wav")


@pytest.mark.parametrize(
    ("samples", "match"),
    [(np.zeros(32000), "only silence"), (0.1 * np.ones(100), "at least 0.1 s")],
    ids=["silent", "short"],
)
def test_bad_sources_leave_nothing_behind(hand_made, voice, tmp_path, samples, match):
    soundfile.write(tmp_path / "bad.wav", samples, 16000)
    pipeline, _ = hand_made(PIECES)
    with pytest.raises(AudioContentError, match=match):
        on_disk(pipeline, tmp_path / "bad.wav", voice, tmp_path / "out.wav")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.wav"]


def test_mock_audio_is_refused_before_the_work(talk, reference, tmp_path):
    pipeline = VoiceConversionPipeline(PipelineConfig(use_mock_models=True))
    with pytest.raises(MockAudioError):
        on_disk(pipeline, talk, reference, tmp_path / "out.wav")


@pytest.mark.slow
def test_short_recordings_go_through_memory_and_long_ones_through_the_disk(
    hand_made, talk, voice, tmp_path
):
    seen: dict[str, list[str]] = {}

    def look(name):
        def tell(progress):
            seen[name] = [path.name for path in tmp_path.glob("*.partial")]

        return tell

    pipeline, _ = hand_made(PIECES)
    a, b = OutputSpec(tmp_path / "a.wav", rate=44100), OutputSpec(tmp_path / "b.wav", rate=44100)
    short = pipeline.convert_file(talk, voice, a, progress=look("a"))
    long = pipeline.convert_file(talk, voice, b, memory_seconds=5, progress=look("b"))
    assert seen == {"a": [], "b": ["b.wav.partial"]}
    assert soundfile.info(tmp_path / "b.wav").samplerate == long.file_rate == 44100
    assert short.summary().keys() == long.summary().keys()
    np.testing.assert_allclose(read(tmp_path / "a.wav"), read(tmp_path / "b.wav"), atol=1e-4)


def test_pitch_in_blocks_is_the_pitch_of_the_whole(speech, monkeypatch):
    monkeypatch.setattr("auto_voice.inference.analysis.PITCH_BLOCK_FRAMES", 200)
    samples = speech(10.0)
    whole, blocks = extract_pitch(samples, 16000), pitch_of(MemorySamples(samples, 16000), 1.0)
    np.testing.assert_array_equal(blocks.voiced, whole.voiced)
    np.testing.assert_allclose(blocks.f0_hz, whole.f0_hz, rtol=1e-4)


def test_what_is_known_of_a_tape_does_not_depend_on_where_it_lies(tmp_path, speech):
    samples = speech(6.0)
    stored = FileSamples(tmp_path / "x.f32", 16000)
    for start in range(0, len(samples), 7777):
        stored.append(samples[start : start + 7777])
    a, b = analyse(MemorySamples(samples, 16000)), analyse(stored)
    assert a.gain == b.gain
    np.testing.assert_array_equal(a.energies, b.energies)
    np.testing.assert_array_equal(a.pitch.f0_hz, b.pitch.f0_hz)
    np.testing.assert_array_equal(a.melody.f0_hz, b.melody.f0_hz)
    part = Section(stored, 1000, 5000)
    np.testing.assert_array_equal(part.read(-5, 9999), samples[1000:5000])
    stored.truncate(10)
    assert len(FileSamples(tmp_path / "x.f32", 16000)) == len(stored) == 10


@pytest.mark.slow
def test_a_home_is_found_for_sources_of_every_length_and_voices(
    hand_made, talk, voice, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_voice(tmp_path / "ann.safetensors", voice)
    pipeline, _ = hand_made(PIECES)
    assert pipeline.voice("~/ann.safetensors").name == voice.name
    on_disk(pipeline, "~/talk.wav", voice, tmp_path / "out.wav")
    assert len(pipeline.convert("~/talk.wav", voice)) == len(read(tmp_path / "out.wav"))


def test_a_source_that_fails_is_not_blamed_on_the_output(
    hand_made, talk, voice, tmp_path, monkeypatch
):
    def failing(*_):
        raise OSError(errno.EIO, "Input/output error")
        yield

    monkeypatch.setattr("auto_voice.inference.inputs.RecordingReader.blocks", failing)
    with pytest.raises(AudioFormatError, match=r"talk\.wav cannot be read \(Input/output error\)"):
        on_disk(hand_made(PIECES)[0], talk, voice, tmp_path / "out.wav")


@pytest.mark.slow
def test_only_what_the_disk_does_is_blamed_on_the_output(
    hand_made, talk, voice, tmp_path, monkeypatch
):
    """An error of a model is no error of the disk, and what the disk refuses is told in words."""
    monkeypatch.setattr(
        "auto_voice.inference.conversion.prepare",
        lambda *_: (_ for _ in ()).throw(OSError("model")),
    )
    with pytest.raises(OSError, match=r"^model$"):
        on_disk(hand_made(PIECES)[0], talk, voice, tmp_path / "out.wav")
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("auto_voice.inference.checkpoint.fsync_file", full)
    with pytest.raises(
        AudioOutputError, match=r"\(No space left on device\); what is done is kept"
    ):
        on_disk(hand_made(PIECES)[0], talk, voice, tmp_path / "out.wav")


def test_a_checkpoint_is_deleted_while_it_is_held(tmp_path):
    folder = tmp_path / "out.wav.partial"
    cleared = []

    class Watched(Checkpoint):
        def _clear(self):
            cleared.append(self._lock.is_locked)
            super()._clear()

    with Watched(tmp_path / "out.wav", "key") as checkpoint:
        checkpoint.source(16000).append(np.ones(9, np.float32))
        (folder / ".state.json.1.abc.tmp").touch()
        checkpoint.finish()
    assert cleared == [True, True]
    assert not folder.exists()


def test_what_the_next_process_put_there_stays(tmp_path):
    with Checkpoint(tmp_path / "out.wav", "key") as checkpoint:
        checkpoint.finish()
        (checkpoint.folder / "another").touch()
    assert [path.name for path in checkpoint.folder.iterdir()] == ["another"]


def test_a_checkpoint_that_cannot_be_read_is_let_go(tmp_path):
    (tmp_path / "out.wav.partial" / "state.json").mkdir(parents=True)
    with (
        pytest.raises(AudioOutputError, match=r"out\.wav\.partial cannot be used"),
        Checkpoint(tmp_path / "out.wav", "key"),
    ):
        pass
    (tmp_path / "out.wav.partial" / "state.json").rmdir()
    with Checkpoint(tmp_path / "out.wav", "key") as checkpoint:
        checkpoint.finish()


def test_an_analysis_comes_back_as_it_was_kept(tmp_path):
    voiced = np.array([True, False, True])
    tracks = [Pitch(np.array(f0, np.float32), voiced, 62.5) for f0 in ([50, 0, 90], [100, 0, 90])]
    with Checkpoint(tmp_path / "out.wav", "key") as checkpoint:
        assert checkpoint.load_analysis() is None
        checkpoint.save_analysis(Analysis(640, 0.5, np.array([1.0, 2.0]), *tracks))
        back = checkpoint.load_analysis()
    assert (back.samples, back.gain, back.energies.tolist()) == (640, 0.5, [1.0, 2.0])
    for found, kept in zip((back.pitch, back.melody), tracks, strict=True):
        assert found.f0_hz.tolist() == kept.f0_hz.tolist()
        assert found.voiced.tolist() == voiced.tolist()
        assert found.frame_rate == 62.5


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 29), max_size=6, unique=True),
    short=st.integers(0, 255),
    stop=st.integers(0, 6),
)
def test_a_joiner_that_goes_on_gives_what_it_would_have_given(cuts, short, stop):
    samples = 60 * 256 - short
    whole = np.random.default_rng(0).standard_normal(60 * 256).astype(np.float32)
    # A core is at least two frames, so that its two fades do not meet.
    edges = [0, *(2 * cut for cut in sorted(cuts)), 60]
    chunks = [Chunk(a, b, max(0, a - 5), min(60, b + 5)) for a, b in pairwise(edges)]
    pieces = [(c, whole[c.context_start * 256 : c.context_stop * 256]) for c in chunks]
    np.testing.assert_allclose(join(pieces, 256, samples), whole[:samples], atol=1e-6)
    first = Joiner(256, samples)
    out = [first.push(*piece) for piece in pieces[:stop]]
    second = Joiner(256, samples, first.done, first.pending)
    out += [second.push(*piece) for piece in pieces[stop:]]
    np.testing.assert_allclose(np.concatenate(out), whole[:samples], atol=1e-6)


def test_halving_cuts_long_pieces_and_leaves_short_ones():
    assert halved([0, 100, 130, 230]) == [0, 50, 100, 130, 180, 230]


def test_a_trimmed_recording_is_as_long_as_its_speech(hand_made, speech, voice, tmp_path):
    quiet = 1e-4 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    samples = np.concatenate([quiet, speech(4.0), quiet])
    pipeline, _ = hand_made()
    result = pipeline.convert(Waveform(samples, 16000), voice, controls=Controls(trim=True))
    assert result.seconds == pytest.approx(4.0, abs=0.6)
    assert any(note.startswith("Trimmed: ") for note in result.notes)
