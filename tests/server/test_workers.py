"""Load, fairness, cancelling, stopping, and death by kill -9."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest

from auto_voice.client import Client
from auto_voice.errors import BusyError, ConfigError
from auto_voice.inference.voice_conversion_pipeline import (
    PipelineConfig,
    VoiceConversionPipeline,
)
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.server import Engine, ServerSettings, create_app
from auto_voice.server.jobs import CancellationToken, Stopped
from server_kit import reserved_ports, until


@pytest.mark.slow
def test_beyond_the_queue_is_refused_at_once_and_nothing_accepted_is_lost(
    serve, gated, talk, friend
):
    live = serve(gated, queue_items=6, queue_items_client=6)
    with Client(live.url) as client:
        accepted = [client.submit([talk], references=[friend])]
        until(lambda: gated.running)
        accepted += [client.submit([talk], references=[friend]) for _ in range(6)]
        with pytest.raises(BusyError) as refused:
            client.submit([talk], references=[friend])
        assert refused.value.http_status == 429
        assert refused.value.retry_after >= 1
        gated.open.set()
        assert [client.wait(job).state for job in accepted] == ["done"] * 7
    assert gated.most_running == 1


@pytest.mark.slow
def test_direct_requests_beyond_the_limit_get_503_with_retry_after(serve, gated, talk, friend):
    live = serve(gated, direct_waiting=2, direct_waiting_client=2, workers=1)

    def ask(_):
        with Client(live.url, timeout_seconds=120) as client:
            try:
                return len(client.convert(talk, references=[friend]).content)
            except BusyError as error:
                return error.http_status

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, 0)
        until(lambda: gated.running)
        rest = [pool.submit(ask, n) for n in range(6)]
        until(lambda: sum(future.done() for future in rest) == 4)
        assert {future.result() for future in rest if future.done()} == {429}
        gated.open.set()
        sizes = [f.result() for f in (first, *rest) if f.result() != 429]
    assert len(sizes) == 3
    assert min(sizes) > 1000


def test_cancel_frees_the_worker_and_keeps_what_was_done(serve, gated, talk, friend):
    live = serve(gated)
    with Client(live.url) as client:
        job = client.submit([talk, talk], references=[friend])
        until(lambda: gated.running)
        assert client.cancel(job).state == "cancelled"
        until(lambda: not gated.running, seconds=10)
        folder = live.context.files.folder(job.id)
        until(lambda: not folder.exists())
        gated.open.set()
        other = client.wait(client.submit([talk], references=[friend]))
        assert other.state == "done"


def test_a_client_that_goes_away_takes_its_direct_work_with_it(serve, gated, talk, friend):
    live = serve(gated)
    files = [("source", talk.read_bytes()), ("reference", friend.read_bytes())]
    request = httpx2.Request("POST", f"{live.url}/v1/convert", files=files)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection(("127.0.0.1", request.url.port), timeout=60) as connection:
        connection.sendall(f"POST /v1/convert HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        until(lambda: gated.running)
    until(lambda: not gated.running, seconds=20)
    until(lambda: live.context.store.depth().running == 0)


@pytest.mark.slow
def test_one_busy_client_does_not_starve_another(serve, gated, talk, friend):
    live = serve(gated)
    with Client(live.url) as greedy:
        greedy.submit([talk] * 8, references=[friend])
        until(lambda: gated.running)
        # Another loopback address is another client.
        transport = httpx2.HTTPTransport(local_address="127.0.0.2")
        with Client(live.url, transport=transport) as modest:
            job = modest.submit([friend], references=[friend])
            gated.open.set()
            assert modest.wait(job).state == "done"
    assert "6.0" in gated.started[:3]


def test_work_stops_within_a_network():
    graph_kit = pytest.importorskip("graph_kit")
    from auto_voice.training.networks.generators import HiFiGANNet

    control = CancellationToken()
    shape = HiFiGANShape(channels=64)
    vocoder = graph_kit.network("hifigan", shape, HiFiGANNet(shape).eval())
    mel = np.zeros((1, 80, 4000), np.float32)

    def run():
        with control.watching():
            vocoder(mel)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        until(lambda: control._networks._running)
        control.stop()
        with pytest.raises(Stopped):
            running.result()
    with pytest.raises(Stopped), control.watching():
        vocoder(mel[..., :9])
    assert vocoder(mel[..., :9]).shape == (1, 1, 9 * 256)  # nobody else is stopped


def test_learning_a_voice_is_a_part_of_the_progress_and_can_be_cancelled(serve, gated, talk):
    reached = threading.Event()

    def clone(references, name, progress):
        progress(0.5)
        reached.set()
        while True:
            time.sleep(0.02)
            progress(0.75)

    gated.clone = clone
    with Client(serve(gated).url) as client:
        job = client.submit([talk], references=[talk])
        until(reached.is_set)
        until(lambda: client.job(job.id).progress == pytest.approx(0.3))
        client.cancel(job)
        gated.open.set()
        del gated.clone
        assert client.wait(client.submit([talk], references=[talk])).state == "done"


@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_a_voice_whose_learning_is_cancelled_at_its_last_moment_is_not_kept(
    serve, gated, friend, way
):
    done, tried = gated.enrol, []
    live = serve(gated)

    def enrol(*given):
        found = done(*given)
        (running,) = live.context.store.listed("127.0.0.1", 10)
        live.context.workers.cancel(running.id)
        if way == "delete":
            live.context.workers.remove(running.id)
        tried.append(found)
        return found

    gated.enrol = enrol
    files = {"reference": ("friend.wav", friend.read_bytes())}
    fields = {"name": "late", "wait": "false"}
    answer = httpx2.post(f"{live.url}/v1/voices", data=fields, files=files, timeout=60)
    assert answer.status_code == 202
    until(lambda: tried and not live.context.engine.voices.listed())
    if way == "cancel":
        assert live.context.store.get(answer.json()["id"]).state == "cancelled"


@pytest.mark.slow
def test_stopping_puts_unfinished_work_back_and_a_new_server_does_it(
    serve, gated, tmp_path, talk, friend
):
    live = serve(gated, grace_seconds=0.2)
    with Client(live.url) as client:
        job = client.submit([talk], references=[friend])
        until(lambda: gated.running)
    live.stop()
    gated.open.set()
    again = serve(gated)
    with Client(again.url) as client:
        done = client.wait(job.id)
    assert (done.state, len(gated.started)) == ("done", 2)


@pytest.mark.slow
def test_two_servers_cannot_share_a_data_folder(serve, tmp_path):
    live = serve()
    settings = ServerSettings(data_dir=live.context.settings.data_dir)
    with pytest.raises(ConfigError, match="another server uses"):
        create_app(settings, live.context.engine)
    live.stop()
    serve()


SERVER = """
    import sys, time
    from pathlib import Path
    import uvicorn
    from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
    from auto_voice.server import Engine, ServerSettings, create_app

    class Slow(Engine):
        def convert(self, source, voice, controls, progress):
            with open(sys.argv[3], "a") as log:
                log.write(f"{source.seconds:.2f}\\n")
            time.sleep(0.3)
            return super().convert(source, voice, controls, progress)

    data = Path(sys.argv[1])
    engine = Slow(VoiceConversionPipeline(PipelineConfig(use_mock_models=True)), data / "voices")
    app = create_app(ServerSettings(data_dir=data), engine)
    config = uvicorn.Config(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
    uvicorn.Server(config).run()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no kill -9")
def test_kill_9_loses_no_accepted_job_and_repeats_none_that_finished(
    tmp_path, talk, friend, unused_port
):
    import soundfile

    script = tmp_path / "server.py"
    script.write_text(textwrap.dedent(SERVER))
    log = tmp_path / "converted.log"
    sources = []
    samples, rate = soundfile.read(talk)
    for n in range(6):
        sources.append(tmp_path / f"{n}.wav")
        soundfile.write(sources[-1], samples[: rate + rate // 4 * n], rate)

    def start():
        args = [sys.executable, str(script), str(tmp_path / "data"), str(unused_port), str(log)]
        return subprocess.Popen(args, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def done(job):
        return sum(item.state == "done" for item in job.items)

    process = start()
    try:
        with Client(f"http://127.0.0.1:{unused_port}") as client:
            until(lambda: _answers(client))
            batch = client.submit(sources, references=[friend])
            single = client.submit([talk], references=[friend])
            until(lambda: done(client.job(batch.id)) >= 2)
            process.kill()
            process.wait()
            began_before = log.read_text().split()
            process = start()
            until(lambda: _answers(client))
            finished = [client.wait(job.id, within_seconds=120) for job in (batch, single)]
            assert [done(job) for job in finished] == [6, 1]
            for n in range(6):
                sound = client.result(batch.id, n)
                assert len(sound.content) > 1000
    finally:
        process.kill()
        process.wait()
    began = log.read_text().split()
    # Only what ran at the moment of the kill, at most one item, was begun twice.
    assert len(began_before) <= len(began) <= 8
    assert len(set(began)) == 7


def _answers(client):
    try:
        return client.server()
    except Exception:
        time.sleep(0.1)
        return None


@pytest.fixture
def unused_port():
    with reserved_ports(1) as (port,):
        yield port


def test_threads_end_with_the_server(serve):
    before = {thread.name for thread in threading.enumerate()}
    live = serve(workers=3)
    live.stop()
    until(lambda: {t.name for t in threading.enumerate()} <= before, seconds=10)


def test_calls_are_spread_over_the_sets_of_models(tmp_path):
    """Two calls at once meet on two devices; one alone would wait for itself in the barrier."""
    both = threading.Barrier(2, timeout=30)
    used = []

    class Device(VoiceConversionPipeline):
        def similarity(self, audio, voice, **_):
            used.append(self)
            both.wait()
            return 1.0

    pipelines = [Device(PipelineConfig(use_mock_models=True)) for _ in range(2)]
    engine = Engine(pipelines[0], tmp_path, others=pipelines[1:])
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: engine.similarity(None, None), range(2))) == [1.0, 1.0]
    assert set(map(id, used)) == set(map(id, pipelines))
    engine.registry.load("griffin_lim")
    pipelines[1].registry.load("griffin_lim")
    engine.unload("griffin_lim", None)
    assert not any(pipeline.registry.loaded() for pipeline in pipelines)
