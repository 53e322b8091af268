"""What a hostile client, or an unlucky moment, could do to a server, and does not."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
import time

import httpx2
import numpy as np
import pytest
import soundfile
import uvicorn

from auto_voice.client import Client
from auto_voice.errors import AudioContentError, BusyError, UploadError, VoiceError
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.server import Engine
from auto_voice.server.admission import PatientProtocol
from auto_voice.server.files import JobFiles, new_id
from auto_voice.server.jobs import CancellationToken
from auto_voice.server.security import client_of
from auto_voice.server.uploads import Decoding, gathered
from auto_voice.types import Voice
from auto_voice.voices.voice_file import save_voice
from server_kit import Gated, mock_engine, until


class Stubborn(Gated):
    """Conversions that cannot be stopped until they are let through."""

    def convert(self, source, voice, controls, progress):
        self.started.append(f"{source.seconds:.1f}")
        if len(self.started) == 1:
            self.open.wait(60)
        return Engine.convert(self, source, voice, controls, progress)


def other_client(live):
    """Another loopback address is another client."""
    return Client(live.url, transport=httpx2.HTTPTransport(local_address="127.0.0.2"))


def test_deleting_a_job_that_runs_leaves_nothing_and_nobody_stumbles(
    serve, gated, talk, friend, caplog
):
    live = serve(gated)
    caplog.set_level(logging.INFO, "auto_voice.server")
    with Client(live.url) as client:
        job = client.submit([talk], references=[friend])
        until(lambda: gated.running)
        client.delete(job)
        gated.open.set()
        assert client.wait(client.submit([talk], references=[friend])).state == "done"
    assert not live.context.files.folder(job.id).exists()
    assert "could not go on" not in caplog.text
    assert "convert cancelled" in caplog.text


@pytest.mark.slow
def test_work_that_cannot_be_stopped_keeps_its_thread_but_not_the_queue(
    serve, tmp_path, talk, friend
):
    engine = Stubborn(tmp_path)
    live = serve(engine)
    with Client(live.url) as client:
        job = client.submit([talk], references=[friend])
        until(lambda: engine.started)
        client.cancel(job)
        assert client.wait(client.submit([friend], references=[friend])).state == "done"
        assert not engine.open.is_set()
        assert live.context.workers.alive
        engine.open.set()
        until(lambda: not live.context.files.folder(job.id).exists())
        assert client.job(job.id).state == "cancelled"


class Pieces(Engine):
    """Long conversions in pieces of two seconds, held up after the first."""

    def __init__(self, folder):
        config = PipelineConfig(use_mock_models=True, chunk_seconds=2.0)
        super().__init__(VoiceConversionPipeline(config), folder / "voices")
        self.open = threading.Event()
        self.pieces: list[float] = []

    def convert_file(self, source, voice, output, controls, progress, *, subtype, allow_truncated):
        def told(done):
            self.pieces.append(done)
            assert self.open.wait(60)
            progress(done)

        return super().convert_file(
            source, voice, output, controls, told, subtype=subtype, allow_truncated=allow_truncated
        )


@pytest.fixture
def pieces(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("auto_voice.server.tasks.IN_MEMORY_SECONDS", 4.0)
    engine = Pieces(tmp_path)
    return serve(engine), engine


@pytest.mark.slow
def test_a_long_recording_lets_others_go_first_and_goes_on_where_it_was(pieces, talk, friend):
    live, engine = pieces
    with Client(live.url) as client, other_client(live) as modest:
        long = client.submit([friend], references=[talk])
        until(lambda: engine.pieces)
        short = modest.submit([talk], references=[friend])
        engine.open.set()
        finished = [modest.wait(short), client.wait(long, within_seconds=60)]
        assert [job.state for job in finished] == ["done", "done"]
        assert finished[0].finished < finished[1].finished
        assert finished[1].items[0].result["resumed"] is True
        sound = client.result(long).content
    assert engine.pieces == sorted(set(engine.pieces))  # no piece was made twice
    alone = live.context.engine.pipeline.convert(friend, talk)
    made, _ = soundfile.read(io.BytesIO(sound))
    assert np.abs(made - alone.samples).max() < 1e-3


@pytest.mark.slow
def test_progress_of_a_long_recording_begins_with_its_decoding_and_never_falls(
    pieces, friend, talk, monkeypatch
):
    live, engine = pieces
    engine.open.set()
    seen = []
    plain = CancellationToken.progress
    monkeypatch.setattr(
        CancellationToken, "progress", lambda self, done: (seen.append(done), plain(self, done))[1]
    )
    with Client(live.url) as client:
        client.wait(client.submit([friend], references=[talk]))
    assert seen == sorted(seen)
    assert sum(0 < done <= 0.05 for done in seen) >= 2
    assert seen[-1] == pytest.approx(1.0)


def test_a_defect_is_answered_like_everything_else(live, monkeypatch, caplog):
    def defect():
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(live.context.engine, "models", defect)
    answer = httpx2.get(f"{live.url}/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text
    figures = httpx2.get(f"{live.url}/metrics").text
    assert 'route="/v1/models",status="500"} 1.0' in figures


def test_what_a_worker_logs_carries_the_id_of_the_request(live, talk, friend):
    from auto_voice.server.telemetry import JsonFormatter

    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(json.loads(JsonFormatter().format(record)))

    logger, handler = logging.getLogger("auto_voice.server.app"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        files = [("source", talk.read_bytes()), ("reference", friend.read_bytes())]
        httpx2.post(
            f"{live.url}/v1/convert", files=files, headers={"x-request-id": "id-7"}, timeout=60
        )
        (line,) = until(lambda: [found for found in lines if "job" in found])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert line["message"] == "convert done"
    assert line["request_id"] == "id-7"


def voice_bytes(tmp_path, **changes):
    embedding = np.zeros(256, np.float32)
    embedding[0] = 1.0
    given = {"embedding": embedding, "speech_seconds": 5.0, "log_f0_mean": 5.0, **changes}
    path = save_voice(tmp_path / "v.safetensors", Voice(**given))
    return path.read_bytes()


def shaped(mel, content):
    return {"mel": np.zeros(mel, np.float32), "content": np.zeros(content, np.float32)}


@pytest.mark.parametrize(
    "changes",
    [
        {"speech_seconds": float("nan")},
        {"log_f0_mean": 1e9},
        {"log_f0_std": float("inf")},
        {"quality": {"snr_db": float("nan")}},
        {"frames": {"mel": np.zeros((9, 80), np.float32)}},
        {"embedding": np.full(256, 3.0, np.float32)},
        {"frames": shaped((), ())},
        {"frames": shaped((0, 80), (0, 64))},
        {"frames": shaped((9, 80), (8, 64))},
    ],
)  # fmt: skip
def test_a_voice_file_with_absurd_numbers_is_refused(client, tmp_path, changes):
    with pytest.raises(VoiceError, match=r"no voice, or damaged|of other shapes|no voice has"):
        client.import_voice(("x.safetensors", voice_bytes(tmp_path, **changes)), "odd")
    assert client.import_voice(("x.safetensors", voice_bytes(tmp_path)), "fine").name == "fine"
    assert [voice.name for voice in client.voices()] == ["fine"]


def test_a_voice_file_that_is_too_large_is_refused_by_its_size(client):
    with pytest.raises(UploadError, match="larger than"):
        client.import_voice(("x.safetensors", bytes(21_000_000)))


def test_a_small_file_that_decodes_to_much_is_refused(serve, tmp_path, talk):
    live = serve(reference_seconds=30.0, direct_seconds=10.0)
    bomb = tmp_path / "bomb.flac"
    with soundfile.SoundFile(bomb, "w", 384_000, 1, format="FLAC") as file:
        for _ in range(20):
            file.write(np.full(384_000, 0.25))
    assert bomb.stat().st_size < 200_000
    with Client(live.url) as client:
        with pytest.raises(AudioContentError, match=r"bomb\.flac has more samples than 30 s"):
            client.convert(talk, references=[bomb])
        with pytest.raises(AudioContentError, match="longer than"):
            client.convert(bomb, references=[talk])
    assert not any(live.context.files.root.iterdir())


def test_high_rates_are_not_held_in_memory(tmp_path):
    path = tmp_path / "high.wav"
    t = np.arange(192_000) / 192_000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * t), 192_000)
    blocks = Decoding(
        path, "high.wav", most_seconds=9, within_seconds=9, token=CancellationToken(), to_hz=48_000
    )
    wave = gathered(blocks)
    assert (wave.sample_rate, len(wave.samples)) == (48_000, 48_000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    assert np.abs(wave.samples - expected)[500:-500].max() < 1e-3


def test_references_are_limited_together(serve, talk, friend):
    live = serve(reference_seconds=8.0, reference_items=3)
    with Client(live.url) as client:
        with pytest.raises(AudioContentError, match="longer than 8 s together"):
            client.convert(talk, references=[friend, talk])
        with pytest.raises(UploadError, match="4 references are more than the 3"):
            client.convert(talk, references=[talk] * 4)
        assert client.convert(talk, references=[talk, talk]).content


@pytest.mark.parametrize("counted", [True, False], ids=["by its header", "while it is decoded"])
def test_what_is_too_long_at_once_is_sent_to_the_jobs(serve, talk, friend, counted):
    live = serve(direct_seconds=2.0, reference_seconds=5.0)
    source = talk.read_bytes()
    if not counted:  # As programs write that stream to a pipe.
        at = source.index(b"data") + 4
        source = source[:at] + b"\xff\xff\xff\xff" + source[at + 4 :]
    with Client(live.url) as client:
        with pytest.raises(
            AudioContentError, match=r"2 s that are taken here; send it to POST /v1"
        ):
            client.convert(("talk.wav", source), references=[talk])
        with pytest.raises(AudioContentError, match=r"5 s that are taken here; cut it\."):
            client.inspect(friend)


def test_uploads_share_one_budget(serve):
    live = serve(upload_mb=4, uploads_mb=6, upload_stall_seconds=10.0)
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3900000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )

        def refused():
            with Client(live.url) as client:
                try:
                    client.inspect(("x.wav", bytes(3_000_000)))
                except BusyError as error:
                    return error
                except Exception:
                    return None

        found = until(refused)
    assert "Too much is being uploaded" in str(found)
    assert found.retry_after >= 1
    until(lambda: not refused())


def test_only_folders_called_like_jobs_are_ever_swept(tmp_path):
    (tmp_path / "my thesis").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    files = JobFiles(tmp_path)
    files.make(new_id())
    assert files.sweep(()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"my thesis", "notes.txt"}


def test_what_is_left_of_one_recording_goes_without_that_of_others(tmp_path):
    files = JobFiles(tmp_path)
    folder = files.make(new_id())
    kept = {"out-10.wav", "out-11-abc.wav", "in-10"}
    for name in (*kept, "out-1.wav", "out-1-abc.wav", "in-1", "in-1.checked"):
        (folder / name).touch()
    (folder / "out-1.wav.partial").mkdir()
    files.drop_results(folder.name, 1)
    files.drop_inputs(folder.name, 1)
    assert files.names(folder.name) == kept


def test_ipv4_clients_of_a_socket_for_both_families_are_told_apart():
    assert client_of("", "::ffff:10.0.0.1") == client_of("", "10.0.0.1")
    assert client_of("", "::ffff:10.0.0.1") != client_of("", "::ffff:10.0.0.2")


def test_connections_without_a_request_are_closed(serve, tmp_path):
    from auto_voice.server import ServerSettings, create_app

    class Impatient(PatientProtocol):
        header_seconds = 0.3

    app = create_app(ServerSettings(data_dir=tmp_path / "other"), mock_engine(tmp_path))
    config = uvicorn.Config(app, port=0, http=Impatient, ws="none", log_config=None)
    server, listening = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    until(lambda: server.started)
    address = listening.getsockname()
    try:
        with (
            socket.create_connection(address, timeout=20) as silent,
            socket.create_connection(address, timeout=20) as dribbling,
            socket.create_connection(address, timeout=20) as asking,
        ):
            dribbling.sendall(b"GET /healthz HTTP/1.1\r\nHost:")
            asking.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in asking.recv(65536)
            assert silent.recv(10) == b""
            assert dribbling.recv(10) == b""
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


def test_a_wakened_worker_does_not_sleep_through_what_came_meanwhile(serve, talk, friend):
    live = serve()
    store, seen = live.context.store, []
    plain = store.claim

    def claim(lane):
        found = plain(lane)
        if found is None and lane == "compute" and not seen:
            seen.append(lane)
            live.context.workers.wake()  # as if a job came between the look and the sleep
            seen.append(time.monotonic())
        elif len(seen) == 2 and lane == "compute":
            seen.append(time.monotonic())
        return found

    store.claim = claim
    live.context.workers.wake()
    until(lambda: len(seen) == 3)
    assert seen[2] - seen[1] < 1.5  # and not the two seconds of an idle look


@pytest.mark.slow
def test_a_patient_client_outlasts_a_restart(serve, gated, talk, friend):
    live = serve(gated, grace_seconds=0.2)
    port = int(live.url.rpartition(":")[2])
    with Client(live.url, patience_seconds=60) as client:
        job = client.submit([talk], references=[friend])
        until(lambda: gated.running)
        live.stop()
        gated.open.set()
        again = threading.Timer(0.5, lambda: serve(gated, on_port=port))
        again.start()
        assert client.wait(job).state == "done"
        again.join()
