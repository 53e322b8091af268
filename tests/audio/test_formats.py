from __future__ import annotations

import io
import socket
import struct
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import encode, speech_like, tone
from auto_voice.audio.decoding import Decoder
from auto_voice.audio.formats import AUDIO_SUFFIXES, AudioFormat, list_folder
from auto_voice.audio.io import iter_blocks, probe, read_audio
from auto_voice.errors import AudioError, AudioFormatError
from media_files import media

SPEECH = speech_like(5.0)
RATE = 16_000
SPEECH_44K = speech_like(5.0, 44_100)


def correlation(a, b):
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def delay(got, wanted, most=4000):
    """Samples by which ``got`` lags behind ``wanted``."""
    size = 1 << (len(got) + len(wanted)).bit_length()
    product = np.fft.rfft(got, size) * np.conj(np.fft.rfft(wanted, size))
    lags = np.fft.irfft(product, size)
    return int(np.argmax(np.concatenate([lags[-most:], lags[:most]]))) - most


# What phones, cameras and messengers write


@pytest.mark.parametrize(
    ("codec", "container", "name", "subtype"),
    [
        ("alac", "ipod", "mp4", "alac"),
        ("flac", "matroska", "matroska", "flac"),
        ("flac", "ogg", "ogg", "flac"),
        ("pcm_s16le", "mov", "mp4", "pcm_16"),
        ("pcm_s16le", "avi", "avi", "pcm_16"),
        ("pcm_s16be", "caf", "caf", "pcm_16"),
    ],
)
def test_lossless_sound_in_any_container_is_exact(codec, container, name, subtype):
    data = media((codec, SPEECH), container=container)
    got = read_audio(data)
    assert len(got.samples) == len(SPEECH)
    np.testing.assert_allclose(got.samples, SPEECH, atol=1e-4)
    info = probe(data)
    assert (info.format, info.subtype, info.sample_rate) == (name, subtype, RATE)


@pytest.mark.parametrize(
    ("codec", "container", "rate", "frame"),
    [
        ("aac", "ipod", 44_100, 1024),
        ("aac", "mp4", 44_100, 1024),
        ("aac", "mov", 44_100, 1024),
        ("libopus", "webm", 48_000, 960),
        ("libmp3lame", "mp3", 44_100, 0),
        ("libopus", "ogg", 48_000, 0),
    ],
)
def test_delay_and_padding_of_the_encoder_are_cut_off(codec, container, rate, frame):
    wanted = speech_like(5.0, rate)
    got = read_audio(media((codec, wanted), container=container, rate=rate))
    assert got.sample_rate == rate
    assert 0 <= len(got.samples) - len(wanted) <= frame
    assert delay(got.samples, wanted) == 0
    assert correlation(got.samples, wanted) > 0.95


@pytest.mark.parametrize(
    ("codec", "container", "rate"),
    [
        ("aac", "adts", 44_100),
        ("wmav2", "asf", 44_100),
        ("libopencore_amrnb", "amr", 8_000),
        ("libopencore_amrnb", "3gp", 8_000),
        ("mp2", "mp2", 44_100),
        ("ac3", "mpegts", 48_000),
    ],
)
def test_other_codings_keep_the_wave_with_the_delay_that_their_files_do_not_name(
    codec, container, rate
):
    wanted = speech_like(5.0, rate)
    got = read_audio(media((codec, wanted), container=container, rate=rate))
    late = delay(got.samples, wanted)
    # Two frames at most.
    assert abs(late) <= 2600
    assert correlation(got.samples[max(0, late) :], wanted[max(0, -late) :]) > 0.75
    assert len(got.samples) >= len(wanted) - 2048


@pytest.mark.parametrize("channels", [7, 8])
def test_many_channels_of_a_coding_that_keeps_them_apart(channels):
    sound = np.stack([tone(200 + 100 * i, 2.0, 48_000) for i in range(channels)], 1)
    got = read_audio(encode(sound, 48_000, format="OGG")).samples
    assert correlation(got, sound.mean(axis=1)) > 0.98


def test_the_sound_of_a_video_is_read_and_pictures_are_not():
    data = media(("pcm_s16le", SPEECH), container="mov", picture=True)
    np.testing.assert_allclose(read_audio(data).samples, SPEECH, atol=1e-4)


def test_of_several_sound_tracks_one_is_read_and_that_is_noted():
    data = media(("flac", SPEECH), ("flac", 0.5 * SPEECH[:-1]), container="matroska")
    got = read_audio(data)
    assert got.notes[0] == "only one of 2 sound tracks was used"
    assert len(got.samples) in (len(SPEECH), len(SPEECH) - 1)


# Lengths that headers do not know, or know wrongly


def without_length(flac: bytes) -> bytes:
    """The count of samples in STREAMINFO as encoders write it to a pipe: 0."""
    data = bytearray(flac)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def test_flac_without_length_is_read_whole():
    data = without_length(encode(SPEECH, format="FLAC"))
    assert probe(data).frames is None
    got = read_audio(data)
    np.testing.assert_allclose(got.samples, SPEECH, atol=1e-4)
    assert got.notes == ("the header does not say how long the recording is",)


@pytest.mark.parametrize("change", [-2, -1, 1, 2, 40])
def test_a_size_that_is_off_by_some_bytes_is_no_truncation(change):
    data = bytearray(encode(SPEECH))
    at = data.index(b"data") + 4
    struct.pack_into("<I", data, at, 2 * len(SPEECH) + change)
    got = read_audio(bytes(data)).samples
    assert abs(len(got) - len(SPEECH)) <= 1
    np.testing.assert_allclose(got, SPEECH[: len(got)], atol=1e-4)


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_F000, 0x7F00_0024])
def test_wav_and_aiff_of_crashed_recorders_and_pipes_are_read_whole(size):
    data = bytearray(encode(SPEECH))
    struct.pack_into("<I", data, data.index(b"data") + 4, size)
    assert len(read_audio(bytes(data)).samples) == len(SPEECH)


def mp3(samples, *, header: bool, variable: bool = False) -> bytes:
    """44.1 kHz, with or without a Xing/Info frame, of constant or variable bit rate."""
    quality = {"global_quality": 5 * 118, "qscale": True} if variable else {}
    options = {"write_xing": "1" if header else "0", "id3v2_version": "0"}
    return media(("libmp3lame", samples), container="mp3", rate=44_100, options=options, **quality)


def frames_of(data: bytes) -> int:
    """How many MPEG frames there are, counted by their headers (MPEG-1, 44.1 kHz, layer III)."""
    rates = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    at, count = 0, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        at += 144_000 * rates[data[at + 2] >> 4] // 44_100 + (data[at + 2] >> 1 & 1)
        count += 1
    return count


@pytest.mark.parametrize("variable", [False, True])
def test_mp3_without_a_header_gives_every_frame(variable):
    # Silence first: its frames are small in VBR, so that an estimate by the first goes wrong.
    wanted = np.concatenate([np.zeros(44_100, np.float32), SPEECH_44K])
    data = mp3(wanted, header=False, variable=variable)
    assert b"Xing" not in data[:200]
    assert b"Info" not in data[:200]
    got = read_audio(data)
    assert len(got.samples) == 1152 * frames_of(data)
    assert got.notes == ()
    assert probe(data).frames is None
    late = delay(got.samples, wanted)
    assert correlation(got.samples[late:], wanted) > 0.95


@pytest.mark.parametrize("header", [True, False])
def test_joined_mp3_files_are_read_to_the_end(header):
    one, other = mp3(SPEECH_44K, header=header), mp3(SPEECH_44K[::-1].copy(), header=header)
    got = read_audio(one + other)
    assert len(got.samples) >= len(read_audio(one).samples) + len(SPEECH_44K)
    second = got.samples[len(read_audio(one).samples) :]
    late = delay(second, SPEECH_44K[::-1])
    assert correlation(second[late:], SPEECH_44K[::-1]) > 0.95


def test_tags_between_joined_mp3_files_are_left_out_with_a_note():
    one = mp3(SPEECH_44K, header=False)
    tag = b"TAG" + bytes(125)
    got = read_audio(one + tag + b"ID3\x04\0\0\0\0\0\x40" + b"\x01" * 64 + one)
    assert len(got.samples) >= 2 * 1152 * (frames_of(one) - 1)
    assert all("truncated" not in note for note in got.notes)


def test_zeros_before_the_first_frame_are_skipped():
    one = mp3(SPEECH_44K, header=False)
    assert len(read_audio(bytes(3000) + one).samples) == len(read_audio(one).samples)


@pytest.mark.parametrize("padding", [1, 300, 200_000])
def test_padding_behind_an_opus_file_is_no_damage(padding):
    data = encode(SPEECH, format="OGG", subtype="OPUS")
    got = read_audio(data + bytes(padding), sample_rate=RATE)
    assert len(got.samples) == len(SPEECH)


def test_chained_ogg_files_are_read_to_the_end():
    one = encode(SPEECH, format="OGG", subtype="VORBIS")
    got = read_audio(one + one).samples
    assert 0 <= len(got) - 2 * len(SPEECH) < 1024
    assert correlation(got[-len(SPEECH) :], SPEECH) > 0.95


def test_a_change_of_rate_and_channels_inside_is_brought_to_the_first():
    mono = mp3(SPEECH_44K, header=False)
    stereo = encode(np.stack([tone(300, 2.0), tone(300, 2.0)], 1), 32_000, format="MP3")
    got = read_audio(mono + stereo)
    seconds = len(read_audio(mono).samples) / 44_100 + 64_000 / 32_000 / 2
    assert got.seconds == pytest.approx(seconds, abs=0.1)
    assert any("change inside" in note for note in got.notes)


# What is missing is still found


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("aac", "mp4", {}),
        ("flac", "matroska", {}),
        ("libopus", "webm", {}),
        ("wmav2", "asf", {}),
        ("pcm_s16le", "avi", {}),
    ],
)
@pytest.mark.parametrize("share", [0.98, 0.5, 0.1])
def test_a_truncated_container_is_refused_and_taken_on_request(codec, container, options, share):
    rate = 48_000 if codec == "libopus" else 44_100
    data = media((codec, speech_like(5.0, rate)), container=container, rate=rate, options=options)
    cut = data[: int(len(data) * share)]
    with pytest.raises(AudioFormatError, match="truncated"):
        read_audio(cut)
    if options or container != "mp4":  # The index of a plain MP4 file stands at its end.
        got = read_audio(cut, allow_truncated=True, allow_silence=True)
        assert 0 < got.seconds <= 5.0
        assert any("truncated" in note for note in got.notes)


# Hostile and foreign files


@pytest.mark.parametrize("demuxer", ["hls", "concat", "dash", "sdp", "image2"])
def test_no_file_or_address_is_opened_from_inside_a_file(tmp_path, monkeypatch, demuxer):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(encode(SPEECH))
    texts = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{secret}\n"
        "#EXTINF:5,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{secret}'\n",
        "dash": '<?xml version="1.0"?><MPD><Period><AdaptationSet><Representation id="0">'
        f"<BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        "m=audio 9 RTP/AVP 0\n",
        "image2": str(secret),
    }
    data = texts[demuxer].encode()

    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(AudioFormatError, match="not a recording"):
        read_audio(data)
    # Even if such a text were taken for a recording, FFmpeg could open nothing else.
    with pytest.raises(AudioFormatError):
        Decoder(io.BytesIO(data), AudioFormat("wav", demuxer, ()), "in.wav")


def test_an_encrypted_recording_is_named_as_such():
    options = {
        "encryption_scheme": "cenc-aes-ctr",
        "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
        "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
    }
    data = media(("aac", SPEECH_44K), container="mp4", rate=44_100, options=options)
    with pytest.raises(AudioFormatError, match="is encrypted"):
        read_audio(data)
    asf = bytearray(media(("wmav2", SPEECH_44K), container="asf", rate=44_100))
    asf[200:216] = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e")
    with pytest.raises(AudioFormatError, match="encrypted"):
        read_audio(bytes(asf))


def test_a_video_without_sound_and_an_unknown_coding_are_named_as_such():
    with pytest.raises(AudioFormatError, match="holds no sound"):
        read_audio(media(container="mp4", picture=True))
    with pytest.raises(AudioFormatError, match="sound coded as wavpack"):
        read_audio(media(("wavpack", SPEECH), container="matroska"))


@pytest.mark.parametrize(
    ("where", "form", "value"),
    [(24, "<I", 4_000_000_000), (24, "<I", 0), (22, "<H", 65_535), (22, "<H", 0)],
)
def test_absurd_rates_and_channels_are_refused(where, form, value):
    data = bytearray(encode(SPEECH))
    struct.pack_into(form, data, where, value)
    with pytest.raises(AudioFormatError):
        read_audio(bytes(data))


CONTAINERS = {
    "mp4": media(("aac", SPEECH_44K[:9000]), container="mp4", rate=44_100),
    "webm": media(("libopus", speech_like(0.3, 48_000)), container="webm", rate=48_000),
    "asf": media(("wmav2", SPEECH_44K[:9000]), container="asf", rate=44_100),
    "adts": media(("aac", SPEECH_44K[:9000]), container="adts", rate=44_100),
    "avi": media(("pcm_s16le", SPEECH[:3000]), container="avi"),
    "mpegts": media(("ac3", speech_like(0.3, 48_000)), container="mpegts", rate=48_000),
    "caf": media(("pcm_s16be", SPEECH[:3000]), container="caf"),
    "flac": encode(SPEECH[:9000], format="FLAC"),
    "ogg": encode(SPEECH[:9000], format="OGG"),
}
if "libopencore_amrnb" in av.codec.codecs_available:
    AMR = speech_like(0.3, 8_000)
    CONTAINERS["amr"] = media(("libopencore_amrnb", AMR), container="amr", rate=8_000)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(CONTAINERS)),
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    kept=st.floats(0.05, 1.0),
)
def test_no_damaged_container_escapes_the_error_tree(name, places, kept):
    data = bytearray(CONTAINERS[name])
    for at, value in places:
        data[int(at * (len(data) - 1))] = value
    data = data[: int(kept * len(data))]
    sentences = []
    for truncated in (False, True):
        try:
            read_audio(bytes(data), sample_rate=RATE, allow_truncated=truncated)
        except AudioError as error:
            sentences.append(str(error))
    assert "\n" not in "".join(sentences)


def test_decoding_is_silent_and_starts_no_threads(capfd):
    folder = Path("/proc/self/task")

    def threads() -> int:
        return len(list(folder.iterdir())) if folder.is_dir() else threading.active_count()

    data = bytearray(mp3(SPEECH_44K, header=False))
    data[4000:4400] = bytes(400)
    before = threads()
    most = max(
        threads()
        for source in (bytes(data), *CONTAINERS.values())
        for _ in iter_blocks(source, 0.2)
    )
    assert most == before
    assert capfd.readouterr() == ("", "")


# Folders


def test_every_file_of_a_folder_is_a_recording_or_listed_as_ignored(tmp_path):
    for name in ("b.M4A", "a.aifc", "sub/c.webm", "sub/notes.txt", "cover.jpg", ".hidden.wav",
                 ".git/x.wav"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dead.wav").symlink_to("nowhere.wav")
    (tmp_path / "linked").symlink_to("sub")
    (tmp_path / "folder.wav").mkdir()
    listing = list_folder(tmp_path)
    assert [p.name for p in listing.recordings] == ["a.aifc", "b.M4A", "dead.wav", "c.webm"]
    assert [p.name for p in listing.ignored] == ["cover.jpg", "notes.txt"]
    assert [p.name for p in listing.skipped] == ["linked"]
    flat = list_folder(tmp_path, deep=False)
    assert [p.name for p in flat.recordings] == ["a.aifc", "b.M4A", "dead.wav"]
    assert not flat.skipped
    assert {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".mka", ".aifc"} <= AUDIO_SUFFIXES


def test_the_documents_name_every_ending():
    text = (Path(__file__).parents[2] / "docs" / "batch.md").read_text(encoding="utf-8")
    words = set(text.replace(",", " ").replace(".", " ").split())
    assert {suffix[1:] for suffix in AUDIO_SUFFIXES} <= words


# Lengths that FFmpeg misjudges


@pytest.mark.parametrize("samples", [100, 700, 1000, 5000, 30_000])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_short_vorbis_is_as_long_as_its_own_decoder_says(samples, rate):
    """All of it lies in one page of Ogg."""
    data = encode(speech_like(5.0, rate)[1000 : 1000 + samples], rate, "OGG", "VORBIS")
    wanted, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    got = read_audio(data)
    assert len(wanted) == samples
    np.testing.assert_allclose(got.samples, wanted, atol=1e-4)
    assert probe(data).frames == samples


def test_vorbis_of_several_pages_and_joined_streams_are_read_to_the_end():
    long = encode(SPEECH_44K, 44_100, "OGG", "VORBIS")
    assert len(read_audio(long).samples) == len(SPEECH_44K)
    short = encode(SPEECH_44K[:9000], 44_100, "OGG", "VORBIS")
    assert len(read_audio(short + short).samples) > 17_000


# Packets hold 4096 samples; libsndfile says of a full last one that it lacks as many.
@pytest.mark.parametrize("samples", [100, 4096, 4097, 8192, 44_100, 100_123])
@pytest.mark.parametrize("subtype", ["ALAC_16", "ALAC_24"])
def test_lossless_sound_in_caf_keeps_its_last_packet(samples, subtype):
    speech = speech_like(5.0, 44_100)[:samples]
    got = read_audio(encode(speech, 44_100, "CAF", subtype), allow_silence=True)
    assert len(got.samples) == samples
    np.testing.assert_allclose(got.samples, speech, atol=1e-4)
