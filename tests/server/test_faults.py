"""Faults that users and hostile clients met, each over a real connection."""

from __future__ import annotations

import contextlib
import errno
import io
import shutil
import socket
import subprocess
import sys
import threading
import time

import av
import httpx2
import numpy as np
import pytest
import soundfile

from auto_voice.client import Client
from auto_voice.errors import AudioFormatError, DiskSpaceError, ServerError, UploadError, VoiceError
from auto_voice.types import Voice
from auto_voice.voices.voice_file import save_voice
from server_kit import Gated, until

TOKEN = "a-token-of-the-tests"
BOUNDARY = "frontier"


def other_client(live, token=None):
    """Another loopback address is another client."""
    return Client(
        live.url,
        token,
        transport=httpx2.HTTPTransport(local_address="127.0.0.2"),
        timeout_seconds=60,
    )


@contextlib.contextmanager
def slow_requests(live, path, count, length=1000, kind="application/json", begun="-"):
    """Connections that have sent the header of a POST and the first byte of its body."""
    host, _, port = live.url.removeprefix("http://").partition(":")
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            one.sendall(
                f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
                f"Content-Type: {kind}\r\n\r\n{begun}".encode()
            )
            found.append(one)
        yield found


# Slow connections


def test_slow_connections_without_a_token_stop_nobody(serve, talk, friend):
    live = serve(tokens=(TOKEN,), uploads_at_once=3)
    with slow_requests(live, "/v1/session", 6), other_client(live, TOKEN) as client:
        time.sleep(0.3)
        assert client.convert(talk, references=[friend]).content


def test_slow_uploads_of_one_client_leave_room_for_another(serve, talk, friend):
    live = serve(uploads_at_once=8)
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    with slow_requests(live, "/v1/convert", 8, kind=kind), other_client(live) as client:
        time.sleep(0.3)
        assert client.convert(talk, references=[friend]).content


def test_an_upload_that_trickles_is_given_up(serve):
    live = serve(upload_stall_seconds=0.6)
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="source"; filename="a"\r\n\r\n'
    with slow_requests(live, "/v1/convert", 1, 1_000_000, kind, head) as (slow,):
        answered = threading.Event()

        def trickle():
            while not answered.wait(0.1):
                with contextlib.suppress(OSError):
                    slow.sendall(b"x")

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            slow.settimeout(8.0)
            answer = slow.recv(65536)
        except TimeoutError:
            answer = b""
        finally:
            answered.set()
            sender.join()
    assert b" 408 " in answer.split(b"\r\n")[0]


# Who speaks


class Heard(Gated):
    """Remembers the voices that were converted to."""

    def __init__(self, folder):
        super().__init__(folder)
        self.voices_heard: list[Voice] = []

    def convert(self, source, voice, controls, progress):
        self.voices_heard.append(voice)
        return super().convert(source, voice, controls, progress)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["deleted", "renamed", "overwritten"])
def test_an_accepted_job_keeps_its_voice(serve, tmp_path, talk, friend, change):
    engine = Heard(tmp_path)
    live = serve(engine)
    with Client(live.url) as client:
        client.enrol("friend", [friend])
        wanted = live.context.engine.voices.get("friend")
        client.submit([talk], references=[friend])
        until(lambda: engine.running)
        job = client.submit([talk, talk], voice="friend")
        if change == "deleted":
            client.delete_voice("friend")
        elif change == "renamed":
            client.rename_voice("friend", "enemy")
        else:
            client.delete_voice("friend")
            other = np.zeros(256, np.float32)
            other[3] = 1.0
            path = save_voice(tmp_path / "o.safetensors", Voice(other, 5.0, speech_seconds=5.0))
            client.import_voice(("o.safetensors", path.read_bytes()), "friend")
        engine.open.set()
        done = client.wait(job)
        assert [item.state for item in done.items] == ["done", "done"]
        assert done.items[0].result["name"] == "talk_as_friend.wav"
    for heard in engine.voices_heard[1:]:
        assert np.array_equal(heard.embedding, wanted.embedding)
    until(lambda: not list(live.context.files.folder(job.id).glob("*voice*")))


# Damaged recordings


@pytest.fixture
def cut(talk, tmp_path):
    """A recording that ends before its header says."""
    path = tmp_path / "cut.wav"
    path.write_bytes(talk.read_bytes()[:60_000])
    return path


@pytest.mark.slow
def test_what_is_there_of_a_cut_recording_is_taken_when_asked(client, cut, friend, monkeypatch):
    with pytest.raises(AudioFormatError, match=r"truncated.*allow_truncated=true"):
        client.convert(cut, references=[friend])
    made = client.convert(cut, references=[friend], allow_truncated=True)
    assert any("truncated" in note for note in made.account["notes"])
    assert client.convert(friend, references=[cut], allow_truncated=True).content
    with pytest.raises(AudioFormatError, match="truncated"):
        client.enrol("cut", [cut])
    voice = client.enrol("cut", [cut], allow_truncated=True)
    assert any("truncated" in note for note in voice.notes)
    monkeypatch.setattr("auto_voice.server.tasks.IN_MEMORY_SECONDS", 1.0)
    job = client.wait(client.submit([cut], references=[friend], allow_truncated=True))
    assert job.state == "done", job.items[0].error
    assert any("truncated" in note for note in job.items[0].result["summary"]["notes"])


def test_a_cut_recording_is_inspected_and_evaluated_when_asked(client, cut, talk, friend):
    for ask in (
        lambda lenient: client.inspect(cut, allow_truncated=lenient),
        lambda lenient: client.evaluate(cut, [friend], talk, allow_truncated=lenient),
        lambda lenient: client.evaluate(talk, [cut], talk, allow_truncated=lenient),
    ):
        with pytest.raises(AudioFormatError, match="allow_truncated=true"):
            ask(False)
        assert any("truncated" in note for note in ask(True)["notes"])
    measured = client.convert(cut, references=[friend], allow_truncated=True, measure=True)
    assert measured.account["figures"]["words_kept"] == 1.0


@pytest.fixture
def mp3(talk):
    """Three seconds as MP3 without a frame count, as it is written to a pipe."""
    samples, rate = soundfile.read(talk, dtype="float32")
    data = io.BytesIO()
    with av.open(data, "w", format="mp3", options={"write_xing": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=rate)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return data.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("direct", [True, False])
def test_recordings_that_do_not_know_their_length_are_converted_whole(
    client, talk, friend, mp3, direct
):
    flac = io.BytesIO()
    samples, rate = soundfile.read(talk)
    soundfile.write(flac, samples, rate, format="FLAC")
    unknown = bytearray(flac.getvalue())
    unknown[21] &= 0xF0  # the 36 bits of total_samples in STREAMINFO
    unknown[22:26] = bytes(4)
    for name, data, seconds in (
        ("pipe.mp3", mp3, 3.0),
        ("joined.mp3", mp3 + mp3, 6.0),
        ("stream.flac", bytes(unknown), 3.0),
    ):
        if direct:
            made = client.convert((name, data), references=[friend])
        else:
            job = client.wait(client.submit([(name, data)], references=[friend]))
            assert job.state == "done", job.items[0].error
            made = client.result(job)
        found = soundfile.info(io.BytesIO(made.content))
        # An encoder pads each MP3 by up to two frames of 36 ms.
        assert found.duration == pytest.approx(seconds, abs=0.2), name


# Disks and databases


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_moment_delays_accepted_work(serve, gated, talk, friend):
    live = serve(gated)
    with Client(live.url) as client:
        first = client.submit([talk], references=[friend])
        until(lambda: gated.running)
        job = client.submit([talk, talk], references=[friend])
        room = live.context.files.has_room
        live.context.files.has_room = lambda wanted=0: False
        gated.open.set()
        assert client.wait(first).state == "done"
        ready = until(lambda: _unready(live))
        assert "disk" in ready["status"]
        assert client.job(job.id).state == "queued"
        live.context.files.has_room = room
        assert [item.state for item in client.wait(job, within_seconds=60).items] == ["done"] * 2
        until(lambda: httpx2.get(f"{live.url}/readyz", timeout=60).status_code == 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "full",
    [OSError(errno.ENOSPC, "No space left on device"), DiskSpaceError("the model needs 1 GB.")],
    ids=["data folder", "model folder"],
)
def test_work_that_fills_the_disk_is_done_again_when_there_is_room(
    serve, tmp_path, talk, friend, full
):
    class Full(Gated):
        tries = 0

        def convert(self, source, voice, controls, progress):
            self.tries += 1
            if self.tries == 1:
                raise full
            return super().convert(source, voice, controls, progress)

    engine = Full(tmp_path)
    engine.open.set()
    with Client(serve(engine).url) as client:
        job = client.wait(client.submit([talk], references=[friend]), within_seconds=60)
        assert job.state == "done"
    assert engine.tries == 2


def _unready(live):
    answer = httpx2.get(f"{live.url}/readyz", timeout=60)
    return answer.json() if answer.status_code == 503 else None


def test_a_data_folder_that_is_gone_is_one_sentence_and_the_server_is_not_ready(
    serve, talk, friend
):
    live = serve()
    shutil.rmtree(live.context.files.root)
    assert "data folder" in until(lambda: _unready(live))["status"]
    with Client(live.url) as client:
        for ask in (client.convert, lambda s, **k: client.submit([s], **k)):
            with pytest.raises(ServerError, match="data folder") as error:
                ask(talk, references=[friend])
            assert error.value.http_status == 503


def torn(path):
    """Overwrites the middle pages of a database."""
    data = bytearray(path.read_bytes())
    data[4096 : len(data) // 4096 * 4096] = bytes(b ^ 0xA5 for b in data[4096:])
    path.write_bytes(data)


@pytest.mark.slow
def test_a_torn_database_and_a_second_server_are_one_sentence(serve, tmp_path, talk, friend):
    live = serve()
    with Client(live.url) as client:
        for _ in range(20):
            client.wait(client.submit([talk], references=[friend]))
    command = [sys.executable, "-m", "auto_voice.cli", "serve", "--mock", "--port", "0"]
    command += ["--data-dir", str(tmp_path / "data")]

    def refused(text):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr

    refused("another server uses")
    live.stop()
    torn(tmp_path / "data" / "jobs.sqlite")
    refused("is damaged")


# Imported voices


def voice_bytes(tmp_path, **changes):
    embedding = np.zeros(256, np.float32)
    embedding[0] = 1.0
    given = {"embedding": embedding, "speech_seconds": 5.0, "log_f0_mean": 5.0, **changes}
    path = save_voice(tmp_path / "v.safetensors", Voice(**given))
    return path.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"notes": tuple(f"{n} " + 990 * "x" for n in range(5000))},
        {"consent": 900 * "x"},
        {"speech_seconds": 1e9},
        {"speech_seconds": -5.0},
        {"quality": {f"figure {n}": 1.0 for n in range(500)}},
        {
            "fine_tuning": {"no.such.weight": np.ones((3, 3), np.float16)},
            "fine_tuned_converter": "x@1",
        },
        {"fine_tuning": {"head": np.full((3, 3), 90, np.float16)}, "fine_tuned_converter": "x@1"},
        {"fine_tuning": {"head": np.ones((3, 3), np.float16)}},
    ],
)
def test_absurd_voices_are_refused(client, tmp_path, changes):
    with pytest.raises(VoiceError):
        client.import_voice(("x.safetensors", voice_bytes(tmp_path, **changes)), "odd")
    assert client.voices() == []


def test_listing_voices_reads_no_arrays(live, client, friend, monkeypatch):
    client.enrol("friend", [friend])
    monkeypatch.setattr(
        "auto_voice.voices.library.load_voice", lambda path: pytest.fail("the arrays were read")
    )
    (voice,) = client.voices()
    assert (voice.name, voice.speech_seconds > 3, voice.pitch_hz > 150) == ("friend", True, True)


def test_a_voice_kept_with_endless_notes_is_listed_in_a_few(live, client, tmp_path):
    folder = tmp_path / "voices"
    folder.mkdir(exist_ok=True)
    data = voice_bytes(tmp_path, notes=tuple(990 * "x" for _ in range(5000)))
    (folder / "old.safetensors").write_bytes(data)
    answer = httpx2.get(f"{live.url}/v1/voices", timeout=60)
    assert len(answer.content) < 20_000
    assert [voice["name"] for voice in answer.json()["voices"]] == ["old"]


# Requests that say something else than they mean


def post(live, path, fields=(), files=(), **headers):
    return httpx2.post(
        f"{live.url}{path}", data=dict(fields), files=list(files), headers=headers, timeout=60
    )


@pytest.fixture
def parts(talk, friend):
    return [
        ("source", ("talk.wav", talk.read_bytes())),
        ("reference", ("friend.wav", friend.read_bytes())),
    ]


def sentence(answer, status):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/convert", "/v1/jobs"])
def test_an_unknown_field_is_named_with_the_one_that_was_meant(live, parts, path):
    told = sentence(post(live, path, {"semitone": "-5"}, parts), 422)
    assert "semitone" in told
    assert "semitones" in told


def test_a_second_source_is_refused_where_one_is_taken(live, parts):
    told = sentence(post(live, "/v1/convert", {}, [*parts, parts[0]]), 422)
    assert "source" in told
    assert "/v1/jobs" in told


def test_an_idempotency_key_stands_for_one_request(live, parts, friend):
    key = {"idempotency-key": "monday"}
    first = post(live, "/v1/jobs", {}, parts, **key)
    assert post(live, "/v1/jobs", {}, parts, **key).json()["id"] == first.json()["id"]
    other = [("source", ("talk.wav", friend.read_bytes())), parts[1]]
    for changed in (
        post(live, "/v1/jobs", {"semitones": "3"}, parts, **key),
        post(live, "/v1/jobs", {}, other, **key),
    ):
        assert "Idempotency-Key" in sentence(changed, 422)


@pytest.mark.slow
def test_a_body_without_its_end_is_refused(live, talk, friend):
    def part(name, data):
        head = f'Content-Disposition: form-data; name="{name}"; filename="{name}.wav"'
        return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + data + b"\r\n"

    body = part("source", talk.read_bytes()) + part("reference", friend.read_bytes())
    body += part("reference", friend.read_bytes())
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    for end in (f"--{BOUNDARY}\r\n".encode(), b"", None):
        cut = body[:-50_000] if end is None else body + end
        answer = httpx2.post(f"{live.url}/v1/convert", content=cut, headers=headers, timeout=60)
        assert "end" in sentence(answer, 400)
    whole = body + f"--{BOUNDARY}--\r\n".encode()
    answer = httpx2.post(f"{live.url}/v1/convert", content=whole, headers=headers, timeout=60)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"semitones": "99"}, "semitones must"),
        ({"semitones": "much"}, "semitones must be a number"),
        ({"strength": "-1"}, "strength must"),
        ({"trim": "perhaps"}, "trim must be true or false"),
        ({"format": "mp5"}, "format must be one of wav, flac"),
        ({"pitch_range": "9"}, "pitch_range must"),
        ({"loudness": "loud"}, "loudness must"),
    ],
)
def test_refusals_are_sentences(live, parts, fields, expected):
    told = sentence(post(live, "/v1/convert", fields, parts), 422)
    assert expected in told
    assert "Input should" not in told


def test_a_missing_file_is_a_sentence(live, parts):
    told = sentence(post(live, "/v1/convert", {}, parts[1:]), 422)
    assert "source" in told
    assert "Field required" not in told


def test_an_unknown_voice_is_not_found(live, parts):
    for answer in (
        httpx2.get(f"{live.url}/v1/voices/nobody", timeout=60),
        httpx2.delete(f"{live.url}/v1/voices/nobody", timeout=60),
        post(live, "/v1/convert", {"voice": "nobody"}, parts[:1]),
    ):
        assert "there is no voice 'nobody'" in sentence(answer, 404)


def test_a_small_limit_is_told_in_kilobytes(live):
    answer = httpx2.patch(f"{live.url}/v1/voices/x", content=bytes(100_000), timeout=60)
    told = sentence(answer, 413)
    assert " kB" in told
    assert "0.0" not in told
    assert "FLAC" not in told


def test_leaving_ends_the_session_and_not_only_the_browsers_memory_of_it(serve):
    live = serve(tokens=(TOKEN,))
    with httpx2.Client(base_url=live.url, timeout=60) as browser:
        browser.post("/v1/session", json={"token": TOKEN})
        cookie = {"cookie": f"autovoice_session={browser.cookies['autovoice_session']}"}
        assert httpx2.get(f"{live.url}/v1/server", headers=cookie, timeout=60).status_code == 200
        assert browser.delete("/v1/session").status_code == 204
    assert httpx2.get(f"{live.url}/v1/server", headers=cookie, timeout=60).status_code == 401
    live.stop()
    again = serve(tokens=(TOKEN,))
    assert httpx2.get(f"{again.url}/v1/server", headers=cookie, timeout=60).status_code == 401


def test_the_client_says_that_an_upload_is_too_large(serve, friend):
    live = serve(upload_mb=1)
    with Client(live.url) as client, pytest.raises(UploadError, match="1 MB"):
        client.convert(("big.wav", bytes(60_000_000)), references=[friend])
