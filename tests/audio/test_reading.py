from __future__ import annotations

import io
import os
import struct
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import encode, speech_like, tone
from auto_voice.audio import io as audio_io
from auto_voice.audio.io import AudioWriter, iter_blocks, probe, read_audio
from auto_voice.audio.resample import resample
from auto_voice.errors import (
    AudioContentError,
    AudioError,
    AudioFormatError,
    AudioNotFoundError,
)

FIVE_SECONDS = tone(440, 5.0)
VARIED = speech_like(5.0)  # lossy coders make pages of realistic size of it


def correlation(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def assert_one_clear_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) > 20
    assert text.endswith(".") or "ffmpeg" in text


# What works


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "PCM_U8", 1 / 120),
        ("a.wav", "PCM_16", 1e-4),
        ("a.wav", "PCM_24", 1e-6),
        ("a.wav", "PCM_32", 1e-6),
        ("a.wav", "FLOAT", 0.0),
        ("a.wav", "DOUBLE", 0.0),
        ("a.flac", "PCM_16", 1e-4),
        ("a.flac", "PCM_24", 1e-6),
        ("a.aiff", "PCM_16", 1e-4),
        ("a.au", "PCM_16", 1e-4),
        ("a.w64", "PCM_16", 1e-4),
        ("a.caf", "PCM_16", 1e-4),
        ("a.wav", "ULAW", 0.02),
        ("a.wav", "ALAW", 0.02),
    ],
)
def test_lossless_codings_give_the_samples_back(wav, name, subtype, tolerance):
    path = wav(FIVE_SECONDS, name=name, subtype=subtype)
    got = read_audio(path)
    assert got.sample_rate == 16_000
    assert got.samples.dtype == np.float32
    np.testing.assert_allclose(got.samples, FIVE_SECONDS, atol=tolerance)
    assert got.notes == ()


@pytest.mark.parametrize(("name", "subtype"), [("a.mp3", None), ("a.ogg", None), ("a.ogg", "OPUS")])
def test_lossy_codings_keep_length_and_wave(wav, name, subtype):
    path = wav(VARIED, name=name, subtype=subtype)
    got = read_audio(path, sample_rate=16_000)
    assert len(got.samples) == len(VARIED)
    assert correlation(got.samples, VARIED) > 0.95


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_any_rate_is_read_and_resampled(wav, rate):
    path = wav(tone(440, 2.0, rate), rate)
    plain = read_audio(path)
    assert (plain.sample_rate, len(plain.samples)) == (rate, 2 * rate)
    got = read_audio(path, sample_rate=16_000)
    middle = slice(2000, 30_000)
    np.testing.assert_allclose(got.samples[middle], tone(440, 2.0)[middle], atol=2e-3)
    assert got.notes == (f"resampled from {rate} to 16000 Hz",)


def test_stereo_becomes_the_mean(wav):
    left, right = tone(300), tone(700)
    got = read_audio(wav(np.stack([left, right], 1), subtype="FLOAT"))
    np.testing.assert_allclose(got.samples, (left + right) / 2, atol=1e-6)
    assert got.notes == ("mixed 2 channels down to one",)


def test_speech_in_the_centre_of_5_1_keeps_its_level(wav):
    surround = np.zeros((16_000, 6), np.float32)
    surround[:, 2] = tone()
    got = read_audio(wav(surround, subtype="FLOAT"))
    np.testing.assert_allclose(got.samples, tone(), atol=1e-6)
    assert got.notes == ("mixed 1 of 6 channels down to one, the others are silent",)


def test_channels_in_opposite_phase_do_not_cancel(wav):
    got = read_audio(wav(np.stack([tone(), -tone()], 1), subtype="FLOAT"))
    np.testing.assert_allclose(got.samples, tone(), atol=1e-6)
    assert "cancel" in got.notes[0]


@pytest.mark.parametrize("kind", ["bytes", "file", "BytesIO", "later", "pipe"])
def test_memory_and_streams_are_read_like_the_file(tmp_path, kind):
    data = encode(FIVE_SECONDS)
    (tmp_path / "a.wav").write_bytes(data)
    expected = read_audio(tmp_path / "a.wav").samples
    if kind == "bytes":
        got = read_audio(data)
    elif kind == "file":
        with (tmp_path / "a.wav").open("rb") as stream:
            got = read_audio(stream)
            assert not stream.closed
    elif kind == "BytesIO":
        got = read_audio(io.BytesIO(data))
    elif kind == "later":
        stream = io.BytesIO(b"form field" + data)
        stream.seek(10)
        got = read_audio(stream)
    else:
        reading, writing = os.pipe()
        thread = threading.Thread(target=_pour, args=(writing, data))
        thread.start()
        with os.fdopen(reading, "rb") as stream:
            got = read_audio(stream)
        thread.join()
    np.testing.assert_array_equal(got.samples, expected)


def _pour(handle: int, data: bytes) -> None:
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)


def test_the_extension_does_not_matter(tmp_path):
    (tmp_path / "song.mp3").write_bytes(encode(FIVE_SECONDS, format="FLAC"))
    assert probe(tmp_path / "song.mp3").format == "flac"
    assert len(read_audio(tmp_path / "song.mp3").samples) == 80_000


def test_probe_tells_the_header(wav):
    info = probe(wav(np.zeros((48_000, 2), np.float32), 24_000, "a.flac", "PCM_24"))
    assert (info.format, info.subtype, info.channels) == ("flac", "flac", 2)
    assert (info.sample_rate, info.frames, info.seconds) == (24_000, 48_000, 2.0)


def test_a_wav_written_to_a_pipe_has_no_length_and_is_read_whole():
    data = bytearray(encode(FIVE_SECONDS))
    struct.pack_into("<I", data, 4, 0xFFFF_FFFF)
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFF_FFFF)
    got = read_audio(bytes(data))
    assert len(got.samples) == 80_000
    assert "does not say how long" in got.notes[0]


# Notes


def test_clipping_offset_quiet_and_overload_are_noted(wav):
    def notes(samples, subtype="FLOAT"):
        return " ".join(read_audio(wav(samples, subtype=subtype)).notes)

    assert "clipped" in notes(np.clip(tone(peak=2.0), -1, 1))
    assert "clipped" in notes(np.clip(tone(peak=2.0), -1, 1), "PCM_U8")
    assert "clipped" not in notes(tone(1000, peak=0.9))
    assert "DC offset of 20.0 %" in notes(tone() + 0.2)
    assert "very quiet (peak -46 dBFS)" in notes(tone(peak=0.005))
    assert "above full scale" in notes(tone(peak=3.0))


# What is refused


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", AudioContentError, "empty (0 bytes)"),
        (b"Dear diary,\n" * 50, AudioFormatError, "is text and not a recording"),
        ("Ünïcode\n".encode() * 600, AudioFormatError, "is text and not a recording"),
        (bytes(5000), AudioFormatError, "is not a recording"),
        (np.random.default_rng(0).bytes(9999), AudioFormatError, "is not a recording"),
        (b"\0\0\0\x20ftypM4A " + bytes(99), AudioFormatError, "cannot be decoded as mp4"),
        (b"\x1aE\xdf\xa3" + bytes(99), AudioFormatError, "cannot be decoded as matroska"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(99), AudioFormatError, "cannot be decoded as avi"),
        (b"\xff\xf1\x50\x80" + bytes(99), AudioFormatError, "is not a recording"),
        (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", AudioFormatError, "a playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", AudioFormatError, "a playlist"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), AudioFormatError, "PNG picture"),
        (b"%PDF-1.7 " + bytes(99), AudioFormatError, "PDF"),
        (b"wvpk" + bytes(99), AudioFormatError, "is WavPack and not a recording"),
        (b"\x7f\xfe\x80\x01\xfc\x3c" + bytes(99), AudioFormatError, "a bare DTS stream"),
        (b"PK\x03\x04" + bytes(99), AudioFormatError, "zip"),
        (b"RIFF\x24\0\0\0WAVE", AudioFormatError, "truncated before its first sample"),
        (b"fLaC" + bytes(200), AudioFormatError, "damaged or truncated"),
        (b"OggS" + bytes(200), AudioFormatError, "truncated"),
        (b"ID3\x04\0\0\0\0\0\x0a" + bytes(10), AudioFormatError, "truncated before"),
        (b".snd" + b"\xff" * 200, AudioFormatError, "damaged or truncated"),
        (encode(tone(seconds=0)), AudioContentError, "holds no samples"),
        (encode(np.zeros(16_000, np.float32)), AudioContentError, "only silence"),
        (encode(tone() * np.float32(1e30), subtype="FLOAT"), AudioContentError, "1 is full scale"),
        (encode(np.full(16_000, 2e-5, np.float32), subtype="FLOAT"), AudioContentError, "silence"),
    ],
)
def test_bad_content_gives_one_sentence(tmp_path, content, error, words):
    path = tmp_path / "in.wav"
    path.write_bytes(content)
    for source in (path, content, io.BytesIO(content)):
        with pytest.raises(error) as caught:
            read_audio(source)
        assert words in str(caught.value)
        assert_one_clear_sentence(caught.value)
    with pytest.raises(AudioError, match=r"in\.wav"):
        read_audio(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_place(wav, bad):
    samples = FIVE_SECONDS.copy()
    samples[40_000] = bad
    path = wav(samples, subtype="FLOAT")
    with pytest.raises(AudioContentError, match=r"NaN or infinite.*2\.500 s"):
        read_audio(path)
    stereo = wav(np.stack([tone(seconds=5.0), samples], 1), subtype="FLOAT", name="stereo.wav")
    with pytest.raises(AudioContentError, match=r"2\.500 s"):
        read_audio(stereo)


def test_missing_folder_fifo_and_odd_paths(tmp_path):
    with pytest.raises(AudioNotFoundError, match="does not exist") as caught:
        read_audio(tmp_path / "nowhere.wav")
    with pytest.raises(AudioNotFoundError, match="home directory"):
        read_audio("~nobody_of_this_name/talk.wav")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(AudioFormatError, match="is a folder"):
        read_audio(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(AudioFormatError, match="not a regular file"):
        read_audio(tmp_path / "pipe.wav")
    for odd in ("a\0b.wav", "x" * 5000):
        with pytest.raises(AudioNotFoundError, match="cannot be opened"):
            read_audio(odd)
    with pytest.raises(TypeError, match="expected a path"):
        read_audio(3.14)  # type: ignore[arg-type]


def test_a_file_without_permission(wav, monkeypatch):
    path = wav(tone())

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AudioFormatError, match="may not be read"):
        read_audio(path)


CUTS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("CAF", "PCM_16"),
    ("W64", "PCM_16"),
    ("RF64", "PCM_16"),
]


@pytest.mark.parametrize(("format", "subtype"), CUTS)
@pytest.mark.parametrize("share", [0.99, 0.9, 0.5, 0.1, 0.005])
def test_a_truncated_file_is_refused(format, subtype, share):
    data = encode(VARIED, format=format, subtype=subtype)
    with pytest.raises(AudioFormatError, match="truncated") as caught:
        read_audio(data[: int(len(data) * share)])
    assert_one_clear_sentence(caught.value)
    assert len(read_audio(data, sample_rate=16_000).samples) == len(VARIED)


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("FLAC", None), ("MP3", None)])
def test_a_truncated_file_can_be_taken_on_request(format, subtype):
    data = encode(VARIED, format=format, subtype=subtype)
    whole = read_audio(data).samples
    got = read_audio(data[: len(data) // 2], allow_truncated=True)
    assert 20_000 < len(got.samples) < 60_000
    assert correlation(got.samples[:15_000], whole[:15_000]) > 0.99
    assert any("truncated" in note for note in got.notes)
    assert "truncated" in " ".join(probe(data[: len(data) // 2]).notes) or format == "FLAC"


def test_the_sentence_says_how_much_is_there():
    data = encode(FIVE_SECONDS)
    with pytest.raises(AudioFormatError, match=r"\(50 % of it is readable\)"):
        read_audio(data[: 44 + 80_000])
    flac = encode(speech_like(60.0), format="FLAC")
    with pytest.raises(AudioFormatError, match=r"only \d+\.\d s of 60\.0 s"):
        read_audio(flac[: len(flac) // 2])


def test_too_long_is_refused_before_decoding(wav):
    path = wav(FIVE_SECONDS)
    with pytest.raises(AudioContentError, match="5 s long, longer than the limit of 4 s"):
        read_audio(path, max_seconds=4)
    assert read_audio(path, max_seconds=5).seconds == 5
    ten_hours = bytearray(encode(tone(seconds=0.1), 8_000, format="FLAC"))
    assert audio_io.MAX_SECONDS < 36_000
    struct.pack_into(">I", ten_hours, 22, 36_000 * 8_000)
    with pytest.raises(AudioContentError, match="36000 s long"):
        read_audio(bytes(ten_hours))


def test_a_length_that_the_header_hides_is_still_limited():
    data = bytearray(encode(FIVE_SECONDS))
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFF_FFFF)
    with pytest.raises(AudioContentError, match="longer than the limit of 2 s"):
        read_audio(bytes(data), max_seconds=2)


def test_a_header_with_absurd_numbers():
    data = bytearray(encode(FIVE_SECONDS))
    struct.pack_into("<I", data, 24, 7)
    with pytest.raises(AudioFormatError, match="1 channels at 7 Hz"):
        read_audio(bytes(data))


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=600),
    magic=st.sampled_from([b"RIFF", b"fLaC", b"OggS", b".snd", b"FORM", b""]),
)
def test_no_bytes_escape_the_error_tree(data, magic):
    try:
        read_audio(magic + data)
    except AudioError as error:
        assert_one_clear_sentence(error)


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["WAV", "FLAC", "AIFF", "AU", "W64", "CAF", "OGG", "MP3"]),
    places=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_no_damaged_header_escapes_the_error_tree(format, places):
    data = bytearray(encode(tone(seconds=0.05), format=format))
    for at, value in places:
        data[at] = value
    try:
        read_audio(bytes(data), sample_rate=16_000)
    except AudioError as error:
        assert_one_clear_sentence(error)


# Blocks


@pytest.mark.parametrize("rate", [None, 16_000, 48_000, 22_050])
@pytest.mark.parametrize("block_seconds", [0.1, 1.0, 7.3])
def test_blocks_joined_equal_the_whole(wav, rate, block_seconds):
    path = wav(np.stack([speech_like(9.7, 44_100), tone(200, 9.7, 44_100)], 1), 44_100)
    whole = read_audio(path, sample_rate=rate)
    blocks = list(iter_blocks(path, block_seconds, rate))
    size = round(block_seconds * whole.sample_rate)
    assert [len(block) for block in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert 0 < len(blocks[-1]) <= size
    np.testing.assert_array_equal(np.concatenate(blocks), whole.samples)
    if rate:
        plain = read_audio(path).samples
        np.testing.assert_allclose(whole.samples, resample(plain, 44_100, rate), atol=1e-5)


@pytest.mark.slow
def test_blocks_of_a_long_file_take_the_memory_of_one(tmp_path):
    minute = speech_like(60.0, 8_000)
    peaks = []
    for minutes in (2, 20):
        path = tmp_path / f"{minutes}.wav"
        with AudioWriter(path, 8_000) as writer:
            for _ in range(minutes):
                writer.write(minute)
        tracemalloc.start()
        total = sum(len(block) for block in iter_blocks(path, 5.0, 16_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == minutes * 60 * 16_000
    assert peaks[1] < 1.1 * peaks[0] + 100_000
    assert peaks[1] < 20e6


def test_blocks_check_their_input(wav):
    with pytest.raises(ValueError, match="positive"):
        next(iter_blocks(wav(tone()), 0))
    with pytest.raises(AudioNotFoundError):
        next(iter_blocks("nowhere.wav"))


def open_handles() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_no_file_handle_is_left_open(wav, tmp_path):
    path = wav(np.stack([tone(), tone()], 1))
    before = open_handles()
    read_audio(path)
    next(iter_blocks(path, 0.1)).sum()
    (tmp_path / "bad.wav").write_bytes(b"fLaC" + bytes(99))
    for bad in (tmp_path / "bad.wav", tmp_path):
        with pytest.raises(AudioFormatError):
            read_audio(bad)
    after = open_handles()
    assert before == after
