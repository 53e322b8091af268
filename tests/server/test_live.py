"""``/v1/live``: what comes back equals the stream's own, and the server's rules hold."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from threading import Thread

import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from auto_voice.client import Client
from auto_voice.errors import BusyError, ConfigError, NotPermittedError, ServerError
from auto_voice.inference.controls import Controls
from auto_voice.models.mock_models import mock_sample
from auto_voice.server import Engine, ServerSettings, create_app
from auto_voice.server.security import session_cookie
from auto_voice.voices.library import VoiceLibrary
from server_kit import Live, mock_engine

TOKEN = "a-token-of-the-tests"
RATE = 16000
START = {"voice": "friend", "sample_rate": RATE, "format": "float32", "drop": False}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    engine = mock_engine(folder)
    for name, f0_hz in (("friend", 210.0), ("other", 150.0)):
        voice = engine.pipeline.clone(mock_sample(6.0, f0_hz=f0_hz), name=name)
        VoiceLibrary(folder / "voices").add(name, voice)
    return engine


@pytest.fixture
def connect(engine, tmp_path):
    """Opens connections to one app: ``connect(settings…)(headers)``."""

    @contextmanager
    def start(**settings):
        app = create_app(ServerSettings(data_dir=tmp_path / "data", **settings), engine)
        with TestClient(app) as client:
            address = "ws://localhost/v1/live"
            yield lambda **headers: client.websocket_connect(address, headers=headers)

    return start


@pytest.fixture
def spoken():
    return mock_sample(1.0, f0_hz=120.0).samples


def converse(socket, samples, start=START, dtype="<f4", size=1600):
    """Everything that comes back: samples, and the messages by type."""
    socket.send_text(json.dumps(start))
    messages = {"ready": socket.receive_json()}
    for at in range(0, len(samples), size):
        socket.send_bytes(samples[at : at + size].tobytes())
    socket.send_text(json.dumps({"end": True}))
    parts = []
    while "report" not in messages:
        got = socket.receive()
        if got.get("bytes") is not None:
            parts.append(np.frombuffer(got["bytes"], dtype))
        else:
            found = json.loads(got["text"])
            messages[found["type"]] = found
    return np.concatenate(parts), messages


def test_what_comes_back_is_what_the_stream_gives(connect, engine, spoken):
    with connect() as open_, open_() as socket:
        result, messages = converse(socket, spoken)
    stream = engine.pipeline.stream(engine.voices.get("friend"), sample_rate=RATE)
    expected = np.concatenate([stream.push(spoken), stream.flush()])
    np.testing.assert_array_equal(result, expected)
    assert messages["ready"]["latency_ms"] == stream.latency_ms
    assert messages["ready"]["models"]["vocoder"]
    assert messages["report"]["blocks"] == stream.report().blocks


def test_whole_numbers_at_another_rate(connect, spoken):
    start = START | {"format": "pcm16", "output_rate": 22050, "controls": {"semitones": 2}}
    whole = np.round(spoken * 32767).astype("<i2")
    with connect() as open_, open_() as socket:
        result, _ = converse(socket, whole, start, "<i2")
    assert len(result) == 22050
    assert np.abs(result).max() > 100


def test_voice_and_controls_change_on_the_way(connect, spoken):
    with connect() as open_, open_() as socket:
        socket.send_text(json.dumps(START))
        assert socket.receive_json()["type"] == "ready"
        change = {"voice": "other", "controls": {"semitones": 3}}
        socket.send_text(json.dumps(change))
        socket.send_text(json.dumps({"end": True}))
        assert socket.receive_json()["type"] == "report"


def test_what_comes_faster_than_it_is_converted_is_dropped_and_said(connect, spoken):
    with connect() as open_, open_() as socket:
        result, messages = converse(socket, np.tile(spoken, 8), START | {"drop": True}, size=800)
    assert messages["dropped"]["samples"] > 0
    assert messages["report"]["dropped_blocks"] > 0
    assert len(result) < 8 * len(spoken)


def refused(socket):
    """The message and the close code with which the server ends a connection."""
    message = socket.receive_json()
    assert message["type"] == "error"
    with pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_json()
    return message["message"], closed.value.code


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("no json", "JSON object"),
        ("[1]", "JSON object"),
        ("[" * 100_000, "JSON object"),
        ("{}", "stored voice"),
        (START | {"voice": "nobody"}, "nobody"),
        (START | {"voice": "../friend"}, "friend"),
        (START | {"sample_rate": "fast"}, "sample_rate"),
        (START | {"sample_rate": 5}, "sample_rate"),
        (START | {"format": "mp3"}, "pcm16"),
        (START | {"blocks": 1}, "no field"),
        (START | {"block_ms": 1e9}, "block_ms"),
        (START | {"controls": {"semitones": 99}}, "semitones"),
        (START | {"controls": {"trim": True}}, "trim"),
        (START | {"controls": []}, None),
    ],
)
def test_first_messages_that_cannot_be_are_refused_with_a_sentence(connect, text, word):
    with connect() as open_, open_() as socket:
        socket.send_text(text if isinstance(text, str) else json.dumps(text))
        if word is None:
            assert socket.receive_json()["type"] == "ready"
            return
        message, code = refused(socket)
    assert word in message
    assert code == 1008


@pytest.mark.parametrize(
    ("send", "word"),
    [
        (lambda s: s.send_bytes(b"123"), "whole samples"),
        (lambda s: s.send_bytes(bytes(1 << 21)), "at most"),
        (lambda s: s.send_text('{"gain": 1}'), "no field"),
        (lambda s: s.send_text('{"voice": "nobody"}'), "nobody"),
    ],
)
def test_later_messages_that_cannot_be_end_the_connection(connect, send, word):
    with connect() as open_, open_() as socket:
        socket.send_text(json.dumps(START))
        socket.receive_json()
        send(socket)
        message, code = refused(socket)
    assert word in message
    assert code == 1008


def test_a_token_is_asked_for(connect, spoken):
    with connect(tokens=(TOKEN,)) as open_:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            with pytest.raises(WebSocketDisconnect), open_(**headers):
                pass
        for headers in (
            {"authorization": f"Bearer {TOKEN}"},
            {"cookie": f"autovoice_session={session_cookie(TOKEN)}"},
        ):
            with open_(**headers) as socket:
                assert len(converse(socket, spoken[:3200])[0]) == 3200


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"host": "evil.example"}])
def test_foreign_sites_and_names_are_refused(connect, headers):
    with connect() as open_, pytest.raises(WebSocketDisconnect), open_(**headers):
        pass


def test_our_own_page_may_connect(connect):
    with connect() as open_, open_(origin="http://localhost") as socket:
        socket.send_text(json.dumps(START))
        assert socket.receive_json()["type"] == "ready"


def test_where_every_place_is_taken_the_next_is_told_to_come_later(connect):
    with connect(live_streams=2, live_streams_client=2) as open_:
        with open_() as one, open_() as two:
            for socket in (one, two):
                socket.send_text(json.dumps(START))
                assert socket.receive_json()["type"] == "ready"
            with open_() as three:
                message, code = refused(three)
            assert "try again later" in message or "too many" in message
            assert code == 1013
        with open_() as four:  # A place is free again.
            four.send_text(json.dumps(START))
            assert four.receive_json()["type"] == "ready"


@pytest.mark.skipif(find_spec("websockets") is None, reason="websockets is not installed")
def test_the_client_converts_live_over_a_socket(engine, tmp_path, spoken):
    settings = ServerSettings(data_dir=tmp_path / "data", tokens=(TOKEN,))
    server = Live(create_app(settings, engine))
    try:
        with Client(server.url) as client, pytest.raises(NotPermittedError, match="token"):
            client.live("friend", sample_rate=RATE)
        with Client(server.url, token=TOKEN) as client:
            with client.live("friend", sample_rate=RATE, drop=False) as conversion:
                assert conversion.ready["latency_ms"] > 100
                with pytest.raises(BusyError, match="too many"):
                    client.live("friend", sample_rate=RATE)
                conversion.change(controls={"semitones": 0})
                for at in range(0, len(spoken), 1600):
                    conversion.send(spoken[at : at + 1600])
                result = np.concatenate([conversion.receive(60), conversion.finish()])
                assert conversion.report["seconds"] == pytest.approx(1.0, abs=0.02)
            with pytest.raises(ServerError, match="nobody"):
                client.live("nobody", sample_rate=RATE)
    finally:
        server.stop()
    stream = engine.pipeline.stream(engine.voices.get("friend"), sample_rate=RATE)
    expected = np.concatenate([stream.push(spoken), stream.flush()])
    np.testing.assert_array_equal(result, expected)


@pytest.mark.skipif(find_spec("websockets") is None, reason="websockets is not installed")
def test_several_clients_to_the_limit_and_one_beyond(engine, tmp_path):
    """Each gets its own result, as if it were alone, and the one too many is told so."""
    settings = ServerSettings(data_dir=tmp_path / "data", live_streams=3, live_streams_client=3)
    sounds = [mock_sample(1.0, f0_hz=f0_hz).samples for f0_hz in (110.0, 140.0, 180.0)]
    server, results = Live(create_app(settings, engine)), {}
    try:
        with Client(server.url) as client, ExitStack() as held:
            open_ = [
                held.enter_context(client.live("friend", sample_rate=RATE, drop=False))
                for _ in sounds
            ]
            with pytest.raises(BusyError, match="live conversions"):
                client.live("friend", sample_rate=RATE)

            def talk(number):
                for at in range(0, RATE, 800):
                    open_[number].send(sounds[number][at : at + 800])
                results[number] = open_[number].finish()

            threads = [Thread(target=talk, args=(number,)) for number in range(len(sounds))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with client.live("friend", sample_rate=RATE) as after:
                assert after.ready["latency_ms"] > 0
    finally:
        server.stop()
    for number, spoken in enumerate(sounds):
        stream = engine.pipeline.stream(engine.voices.get("friend"), sample_rate=RATE)
        expected = np.concatenate([stream.push(spoken), stream.flush()])
        np.testing.assert_array_equal(results[number], expected)


def test_every_set_of_models_converts_live(engine, tmp_path):
    other = mock_engine(tmp_path).pipeline
    both = Engine(engine.pipeline, tmp_path / "voices", others=[other])
    VoiceLibrary(tmp_path / "voices").add("friend", engine.voices.get("friend"))

    def opened():
        return both.live("friend", Controls(), sample_rate=RATE)

    with opened() as one:
        with opened() as two:
            assert {one.pipeline, two.pipeline} == {engine.pipeline, other}
        with opened() as three:  # The set that is free again.
            assert three.pipeline is two.pipeline
    with pytest.raises(ConfigError, match="sample_rate"):
        both.live("friend", Controls(), sample_rate=1).__enter__()
    with opened() as one, opened() as two:  # What failed occupies nothing.
        assert one.pipeline is not two.pipeline
