from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from audio_signals import speech_like, tone
from auto_voice.audio.encoding import FORMATS, choose_encoding
from auto_voice.audio.io import (
    AudioWriter,
    ensure_writable,
    fit_to_output,
    probe,
    read_audio,
    write_audio,
)
from auto_voice.audio.writing import soft_limit
from auto_voice.errors import AudioContentError, AudioOutputError
from auto_voice.filesystem import atomic_write
from auto_voice.types import Waveform

SPEECH = Waveform(speech_like(3.0), 16_000)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "subtype", "written", "tolerance"),
    [
        ("o.wav", None, "PCM_16", 1e-4),
        ("o.wav", "24", "PCM_24", 1e-6),
        ("o.WAV", "pcm_u8", "PCM_U8", 0.01),
        ("o.wav", "8", "PCM_U8", 0.01),
        ("o.wav", "float", "FLOAT", 0.0),
        ("o.wav", "double", "DOUBLE", 0.0),
        ("o.flac", None, "PCM_16", 1e-4),
        ("o.flac", "PCM_24", "PCM_24", 1e-6),
        ("o.aif", None, "PCM_16", 1e-4),
    ],
)
def test_what_is_written_is_read_back(tmp_path, name, subtype, written, tolerance):
    path = write_audio(tmp_path / name, SPEECH, subtype=subtype)
    assert path == tmp_path / name
    assert soundfile.info(path).subtype == written
    got = read_audio(path)
    assert got.sample_rate == 16_000
    np.testing.assert_allclose(got.samples, SPEECH.samples, atol=tolerance)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "format", "subtype"),
    [
        ("o.ogg", None, None),
        ("o.opus", None, None),
        ("o.mp3", None, None),
        ("o.ogg", None, "opus"),
        ("o.tmp", "mp3", None),
    ],
)
def test_lossy_formats_keep_the_length(tmp_path, name, format, subtype):
    path = write_audio(tmp_path / name, SPEECH, format=format, subtype=subtype)
    got = read_audio(path, sample_rate=16_000).samples
    assert len(got) == len(SPEECH.samples)
    assert np.corrcoef(got, SPEECH.samples)[0, 1] > 0.95


def test_a_long_vorbis_file_is_written(tmp_path):
    long = Waveform(np.tile(SPEECH.samples, 40), 16_000)
    assert probe(write_audio(tmp_path / "o.ogg", long)).frames == len(long.samples)


def test_the_rate_is_changed_where_asked_or_needed_and_logged(tmp_path, caplog):
    at_22k = Waveform(tone(440, 2.0, 22_050), 22_050)
    with caplog.at_level(logging.WARNING):
        assert (
            probe(write_audio(tmp_path / "a.wav", at_22k, sample_rate=48_000)).sample_rate == 48_000
        )
        assert "resampled from 22050 to 48000 Hz" in caplog.text
        caplog.clear()
        opus = write_audio(tmp_path / "a.opus", at_22k)
        assert "resampled from 22050 to 24000 Hz" in caplog.text
        got = read_audio(opus, sample_rate=22_050).samples
    assert abs(len(got) - 44_100) <= 1
    assert choose_encoding(Path("a.mp3")).nearest_rate(192_000) == 48_000


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rate", [1000, 384_000])
def test_every_format_takes_every_rate_or_the_nearest_that_it_can_carry(tmp_path, name, rate):
    made = read_audio(write_audio(tmp_path / f"a.{name}", SPEECH, sample_rate=rate))
    carried = choose_encoding(tmp_path / f"a.{name}").nearest_rate(rate)
    # Opus decodes at 48 kHz whatever it was given.
    assert made.sample_rate == (48_000 if name == "opus" else carried)
    assert made.seconds == pytest.approx(SPEECH.seconds, abs=0.01)


def test_loud_audio_is_turned_down_as_a_whole_never_clipped(tmp_path, caplog):
    loud = Waveform(tone(440, peak=2.0), 16_000)
    with caplog.at_level(logging.WARNING):
        got = read_audio(write_audio(tmp_path / "a.wav", loud)).samples
    assert "turned down by 6.0 dB" in caplog.text
    np.testing.assert_allclose(got, tone(440, peak=0.999), atol=1e-4)
    fitted = fit_to_output(loud, choose_encoding(Path("a.wav")))
    assert "turned down by 6.0 dB" in fitted.notes[0]
    kept = read_audio(write_audio(tmp_path / "f.wav", loud, subtype="float")).samples
    np.testing.assert_array_equal(kept, loud.samples)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_or_empty_is_not_written(tmp_path, bad):
    samples = tone()
    samples[5] = bad
    with pytest.raises(AudioContentError, match="not numbers"):
        write_audio(tmp_path / "a.wav", Waveform(samples, 16_000))
    with pytest.raises(AudioContentError, match="no audio to write"):
        write_audio(tmp_path / "a.wav", Waveform(samples[:0], 16_000))
    with pytest.raises(AudioContentError, match="no audio to write"):
        write_audio(tmp_path / "a.wav", Waveform(np.zeros((4, 2), np.float32), 16_000))
    assert names(tmp_path) == []


# Where it may go


def test_outputs_that_are_refused(tmp_path):
    source = tmp_path / "in.wav"
    write_audio(source, SPEECH)
    (tmp_path / "link.wav").symlink_to(source)
    (tmp_path / "hard.wav").hardlink_to(source)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioOutputError, match="is a folder"):
        ensure_writable(tmp_path)
    with pytest.raises(AudioOutputError, match=r"folder .*absent does not exist"):
        ensure_writable(tmp_path / "absent" / "o.wav")
    with pytest.raises(AudioOutputError, match="not a regular file"):
        ensure_writable(tmp_path / "pipe.wav")
    with pytest.raises(AudioOutputError, match="exists already"):
        ensure_writable(source, overwrite=False)
    with pytest.raises(AudioOutputError, match="home directory"):
        ensure_writable("~nobody_of_this_name/out.wav")
    with pytest.raises(AudioOutputError, match="cannot be written to"):
        ensure_writable("a\0.wav")
    with pytest.raises(AudioOutputError, match="Not a directory"):
        ensure_writable(source / "below.wav")
    for same in (source, tmp_path / "link.wav", tmp_path / "hard.wav", f"{tmp_path}/./in.wav"):
        with pytest.raises(AudioOutputError, match="also an input"):
            ensure_writable(same, inputs=["nowhere.wav", b"bytes", str(source)])
    assert not (tmp_path / "absent").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_file_is_found_before_any_work():
    with pytest.raises(AudioOutputError, match=r"folder /proc is not writable \([^\[\]]+\); name"):
        ensure_writable("/proc/x.wav")


def test_outputs_that_are_allowed(tmp_path):
    assert (
        ensure_writable(tmp_path / "new.wav", inputs=[tmp_path / "in.wav"]) == tmp_path / "new.wav"
    )
    deep = tmp_path / "a" / "b" / "o.wav"
    assert write_audio(deep, SPEECH, create_parents=True).is_file()


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AudioOutputError, match=r"is not writable \(Permission denied\); name"):
        ensure_writable(tmp_path / "o.wav")


def test_a_symbolic_link_is_written_through(tmp_path):
    (tmp_path / "real.wav").write_bytes(b"old")
    (tmp_path / "link.wav").symlink_to(tmp_path / "real.wav")
    write_audio(tmp_path / "link.wav", SPEECH)
    assert (tmp_path / "link.wav").is_symlink()
    assert len(read_audio(tmp_path / "real.wav").samples) == len(SPEECH.samples)


@pytest.mark.parametrize(
    ("name", "format", "subtype", "words"),
    [
        ("o.xyz", None, None, "no output format for 'xyz'; use one of wav, flac"),
        ("o", None, None, "has no extension"),
        ("o.wav", "m4a", None, "'m4a'"),
        ("o.flac", None, "float", "flac cannot be written as 'float'; use one of pcm_16, pcm_24"),
        ("o.mp3", None, "24", "mp3 cannot be written as '24'"),
    ],
)
def test_unknown_encodings_list_the_known(tmp_path, name, format, subtype, words):
    with pytest.raises(AudioOutputError, match=words):
        write_audio(tmp_path / name, SPEECH, format=format, subtype=subtype)
    assert names(tmp_path) == []


def test_every_row_of_the_table_is_what_the_encoder_takes():
    for row in FORMATS.values():
        for coding in row.subtypes.values():
            assert soundfile.check_format(row.container, coding)


# Atomic


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    target = write_audio(tmp_path / "o.wav", SPEECH)
    before = target.read_bytes()

    def work():
        with AudioWriter(target, 16_000) as writer:
            writer.write(tone())
            assert target.read_bytes() == before
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    assert target.read_bytes() == before
    assert names(tmp_path) == ["o.wav"]


@pytest.mark.parametrize("letter", ["a", "é", "声", "𝄞"])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, letter):
    stem = letter * (251 // len(letter.encode()))
    written = write_audio(tmp_path / f"{stem}.wav", SPEECH)
    assert names(tmp_path) == [written.name]
    with atomic_write(written) as temporary:
        temporary.write_bytes(b"new")
    assert written.read_bytes() == b"new"


def test_a_full_disk_is_one_sentence_and_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AudioOutputError, match="disk full"):
        write_audio(tmp_path / "o.wav", SPEECH)
    assert names(tmp_path) == []
    monkeypatch.undo()
    monkeypatch.setattr(soundfile.SoundFile, "write", full)
    with pytest.raises(AudioOutputError, match="disk full"):
        write_audio(tmp_path / "o.wav", SPEECH)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["o.wav", "o.flac", "o.ogg", "o.mp3"])
def test_a_disk_that_fills_while_encoding_prints_nothing(tmp_path, capfd, name):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).standard_normal(160_000).astype(np.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(AudioOutputError, match="disk full"):
            write_audio(tmp_path / name, Waveform(noise * np.float32(0.1), 16_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("output_rate", [None, 22_050])
def test_blocks_make_the_file_that_one_write_makes(tmp_path, output_rate):
    with AudioWriter(tmp_path / "a.flac", 16_000, output_rate=output_rate) as writer:
        for block in np.array_split(SPEECH.samples, 17):
            writer.write(block)
    whole = write_audio(tmp_path / "b.flac", SPEECH, sample_rate=output_rate)
    np.testing.assert_allclose(
        read_audio(tmp_path / "a.flac").samples, read_audio(whole).samples, atol=1e-4
    )
    assert writer.notes == ()


def test_blocks_above_full_scale_are_limited_and_noted(tmp_path, caplog):
    with AudioWriter(tmp_path / "a.wav", 16_000) as writer:
        writer.write(tone(peak=0.97))
        writer.write(tone(peak=1.5))
    assert "above full scale were limited" in writer.notes[0]
    got = read_audio(tmp_path / "a.wav").samples
    np.testing.assert_allclose(got[:16_000], tone(peak=0.97), atol=1e-4)
    assert np.abs(got).max() <= 1.0
    with (
        pytest.raises(AudioContentError, match="not numbers"),
        AudioWriter(tmp_path / "b.wav", 16_000) as bad,
    ):
        bad.write(np.array([np.nan], np.float32))
    assert names(tmp_path) == ["a.wav"]


def test_a_writer_is_used_inside_its_with_block(tmp_path):
    writer = AudioWriter(tmp_path / "a.wav", 16_000)
    with pytest.raises(AudioOutputError, match="closed"):
        writer.write(tone())


def test_a_rate_that_the_format_refuses(tmp_path):
    with (
        pytest.raises(AudioOutputError, match="cannot be written as flac"),
        AudioWriter(tmp_path / "a.flac", 2_000_000),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OverflowError("too large")])
def test_whatever_stops_a_writer_from_opening_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("auto_voice.audio.writing.soundfile.SoundFile", fail)
    with pytest.raises(type(error)), AudioWriter(tmp_path / "a.wav", 16_000):
        pass
    assert names(tmp_path) == []


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    path = write_audio(tmp_path / "o.wav", SPEECH)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@settings(max_examples=100)
@given(npst.arrays(np.float32, 20, elements=st.floats(-1e4, 1e4, width=32)))
def test_the_limiter_bounds_keeps_order_and_leaves_quiet_samples(x):
    y = soft_limit(x)
    assert np.abs(y).max() <= 1.0
    quiet = np.abs(x) <= 0.95
    np.testing.assert_array_equal(y[quiet], x[quiet])
    assert (np.diff(y[np.argsort(x)]) >= 0).all()
