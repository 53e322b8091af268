"""The API over a real connection, mostly through the typed client."""

from __future__ import annotations

import io
import json
import time
import zipfile

import httpx2
import pytest
import soundfile

from auto_voice.client import Client
from auto_voice.errors import (
    AudioContentError,
    AudioFormatError,
    AudioNotFoundError,
    BusyError,
    ConfigError,
    JobStateError,
    NotPermittedError,
    ServerError,
    UnknownJobError,
    UnknownModelError,
    VoiceError,
)
from server_kit import mock_engine, until


@pytest.mark.slow
def test_convert_answers_with_the_sound_itself(client, talk, friend):
    made = client.convert(talk, references=[friend], semitones=-2, measure=True)
    assert made.name == "talk_as_friend.wav"
    sound = soundfile.info(io.BytesIO(made.content))
    assert (sound.frames, sound.samplerate, sound.subtype) == (3 * 22050, 22050, "PCM_16")
    assert made.account["mock"] is True
    assert made.account["models"]["vocoder"].startswith("mock")
    assert made.account["figures"]["words_kept"] == 1.0
    plain = client.convert(talk, references=[friend])
    assert plain.account["semitones"] - made.account["semitones"] == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize(
    ("format", "subtype", "container"),
    [("flac", "24", "FLAC"), ("mp3", "", "MP3"), ("ogg", "", "OGG"), ("opus", "", "OGG")],
)
def test_formats(client, talk, friend, format, subtype, container):
    made = client.convert(talk, references=[friend], format=format, subtype=subtype)
    sound = soundfile.info(io.BytesIO(made.content))
    assert sound.format == container
    assert sound.subtype == ("PCM_24" if subtype else sound.subtype)
    assert made.name.endswith(f".{format}")


def test_nothing_of_a_direct_request_stays_on_disk(live, client, talk, friend):
    client.convert(talk, references=[friend])
    root = live.context.files.root
    until(lambda: not any(root.iterdir()))


def test_a_job_over_two_recordings_one_of_them_bad(client, talk, friend, tmp_path):
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, [0.0] * 16000, 16000)
    told = []
    job = client.submit([talk, silent, friend], references=[friend], format="flac")
    done = client.wait(job, progress=told.append, within_seconds=120)
    assert done.state == "done"
    assert [item.state for item in done.items] == ["done", "failed", "done"]
    assert "silent.wav holds only silence" in done.items[1].error["message"]
    assert told == sorted(told)
    assert told[-1] == 1.0
    with zipfile.ZipFile(io.BytesIO(client.result(done).content)) as archive:
        assert archive.namelist() == ["000_talk_as_friend.flac", "002_friend_as_friend.flac"]
    one = client.result(done, 0)
    assert soundfile.info(io.BytesIO(one.content)).frames == 3 * 22050
    with pytest.raises(AudioContentError, match="silence"):
        client.result(done, 1)
    assert client.jobs()[0].id == done.id
    client.delete(done)
    with pytest.raises(UnknownJobError):
        client.job(done.id)


def test_uploads_are_deleted_when_their_job_is_over(live, client, talk, friend):
    job = client.wait(client.submit([talk], references=[friend]))
    folder = live.context.files.folder(job.id)
    until(lambda: [path.name for path in folder.iterdir()] == ["out-0.wav"])


def test_long_recordings_go_through_the_disk(live, client, talk, friend, monkeypatch):
    monkeypatch.setattr("auto_voice.server.tasks.IN_MEMORY_SECONDS", 1.0)
    job = client.wait(client.submit([talk], references=[friend]))
    assert job.items[0].error is None
    sound = soundfile.info(io.BytesIO(client.result(job).content))
    assert sound.frames == 3 * 22050


def test_too_long_for_a_direct_answer_names_the_way(serve, talk, friend):
    live = serve(direct_seconds=2.0)
    with Client(live.url) as client:
        with pytest.raises(AudioContentError, match=r"talk.wav is 3 s long, longer than the 2 s"):
            client.convert(talk, references=[friend])
        assert client.wait(client.submit([talk], references=[friend])).state == "done"


def test_voices_from_enrolment_to_deletion(client, talk, friend):
    voice = client.enrol("my friend", [friend], consent="she said yes")
    assert (voice.name, voice.consent) == ("my friend", "she said yes")
    assert voice.speech_seconds > 3
    with pytest.raises(VoiceError, match="already"):
        client.enrol("my friend", [friend])
    assert client.convert(talk, voice="my friend").name == "talk_as_my friend.wav"
    assert client.rename_voice("my friend", "Jürgen").name == "Jürgen"
    exported = client.export_voice("Jürgen")
    client.delete_voice("Jürgen")
    assert client.voices() == []
    assert client.import_voice(("x.safetensors", exported), "back").name == "back"
    assert [found.name for found in client.voices()] == ["back"]
    with pytest.raises(VoiceError, match="no voice"):
        client.import_voice(("x.safetensors", b"\x80\x04cos\nsystem\n"))
    with pytest.raises(VoiceError, match="there is no voice 'nobody'"):
        client.convert(talk, voice="nobody")


@pytest.mark.slow
def test_inspect_and_evaluate(client, talk, friend):
    client.enrol("friend", [friend])
    found = client.inspect(friend)
    assert found["file"] == "friend.wav"
    assert found["seconds"] == pytest.approx(6.0)
    assert found["f0_hz"]["median"] == pytest.approx(210, rel=0.05)
    assert found["similarity"]["friend"] > 0.9
    made = client.convert(talk, references=[friend])
    figures = client.evaluate(talk, [friend], (made.name, made.content))
    assert figures["mock"] is True
    assert figures["figures"]["duration_ratio"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("status", "wait", "slept"), [(507, "60", 60), (429, "0", 1), (503, "x", 1)]
)
def test_a_client_waits_while_the_server_is_busy_or_full(monkeypatch, status, wait, slept):
    """Never without a pause, and for as long as it was given patience."""
    answers, pauses = [0, 0, 1], []

    def answer(request):
        if answers.pop(0):
            return httpx2.Response(200, json={"voices": []})
        body = {"error": {"type": "BusyError", "message": "Full.", "status": status}}
        return httpx2.Response(status, json=body, headers={"retry-after": wait})

    monkeypatch.setattr("auto_voice.client.client.time.sleep", pauses.append)
    patient = Client(transport=httpx2.MockTransport(answer), patience_seconds=1000)
    assert patient.voices() == []
    assert pauses == [slept, slept]
    answers[:] = [0]
    with pytest.raises(BusyError) as refused, Client(transport=httpx2.MockTransport(answer)) as one:
        one.voices()
    assert (refused.value.http_status, refused.value.retry_after) == (status, slept)


def test_a_server_without_the_evaluation_says_what_to_install(serve, tmp_path, talk):
    engine = mock_engine(tmp_path)
    engine._evaluator = None
    with Client(serve(engine).url) as client, pytest.raises(Exception, match="pip install"):
        client.evaluate(talk, [talk], talk)


def test_models_are_listed_and_only_a_token_may_change_them(client):
    names = {model.name for model in client.models()}
    assert {"hifigan_universal", "speaker_encoder"} <= names
    for change in (client.pull_model, client.warm_model, client.unload_model):
        with pytest.raises(NotPermittedError, match="token"):
            change("hifigan_universal")


def test_models_warm_and_unload(serve):
    live = serve(tokens=("a-token-of-the-tests",))
    with Client(live.url, "a-token-of-the-tests") as client:
        job = client.wait(client.warm_model("hifigan_universal"))
        assert job.state == "done"
        assert live.context.engine.registry.loaded()
        client.unload_model("hifigan_universal")
        assert not live.context.engine.registry.loaded()
        with pytest.raises(UnknownModelError, match="known:"):
            client.warm_model("nothing")


def test_errors_are_the_sentences_of_the_command_line(client, talk, friend, tmp_path):
    text = tmp_path / "talk.wav"
    text.write_text("no sound")
    with pytest.raises(AudioFormatError, match=r"talk\.wav is text and not a recording") as error:
        client.convert(text, references=[friend])
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(ConfigError, match="whose voice"):
        client.convert(talk)
    with pytest.raises(ConfigError, match="whose voice"):
        client.convert(talk, voice="x", references=[friend])
    with pytest.raises(ConfigError, match=r"semitones must lie within ±36, not 99"):
        client.convert(talk, references=[friend], semitones=99)
    with pytest.raises(Exception, match="mp3 cannot be written as"):
        client.convert(talk, references=[friend], format="mp3", subtype="24")
    with pytest.raises(AudioNotFoundError, match="nowhere"):
        client.convert("nowhere.wav", voice="x")
    with pytest.raises(JobStateError):
        client.result(client.wait(client.submit([talk], references=[friend])), 5)


def test_a_reference_without_speech_is_told_by_its_name(client, talk, tmp_path):
    quiet = tmp_path / "quiet.wav"
    soundfile.write(quiet, [0.0] * 32000, 16000)
    with pytest.raises(AudioContentError, match=r"quiet\.wav holds only silence"):
        client.convert(talk, references=[quiet])


def test_client_says_when_no_server_is_there():
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServerError, match="running"):
        client.voices()


def test_the_same_idempotency_key_queues_once(client, talk, friend):
    first = client.submit([talk], references=[friend], key="k")
    assert client.submit([talk], references=[friend], key="k").id == first.id


def test_openapi_has_examples_and_every_route(live):
    document = httpx2.get(f"{live.url}/openapi.json", timeout=60).json()
    assert {
        "/v1/convert",
        "/v1/jobs",
        "/v1/voices",
        "/v1/models",
        "/v1/inspect",
        "/v1/evaluate",
    } <= {*document["paths"]}
    assert "examples" in json.dumps(document["components"])


def test_operations(live, client, talk, friend):
    client.convert(talk, references=[friend])
    assert httpx2.get(f"{live.url}/healthz").json() == {"status": "ok"}
    assert httpx2.get(f"{live.url}/readyz").json() == {"status": "ready"}
    figures = httpx2.get(f"{live.url}/metrics").text
    for expected in (
        'autovoice_requests_total{method="POST",route="/v1/convert",status="200"} 1.0',
        'autovoice_rtf_count{stage="all"} 1.0',
        'autovoice_work_total{how="done",kind="convert"} 1.0',
        "autovoice_audio_seconds_total 3.0",
        'autovoice_queue_items{state="running"} 0.0',
        "autovoice_model_cache_hits_total",
        "autovoice_memory_bytes",
    ):
        assert expected in figures


def test_warm_start_is_told_by_readyz(serve):
    live = serve(warm=True)
    until(lambda: httpx2.get(f"{live.url}/readyz").status_code == 200)
    assert live.context.engine.registry.loaded()


def test_a_request_id_is_taken_over_and_answered(live):
    answer = httpx2.get(f"{live.url}/v1/voices/x", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["request_id"] == "mine-1"
    strange = httpx2.get(f"{live.url}/healthz", headers={"x-request-id": 'a"b'})
    assert strange.headers["x-request-id"] != 'a"b'


def test_results_expire(serve, talk, friend):
    live = serve(keep_hours=0)
    with Client(live.url) as client:
        job = client.wait(client.submit([talk], references=[friend]))
        time.sleep(0.01)
        assert live.context.workers.sweep() == 1
        with pytest.raises(UnknownJobError):
            client.job(job.id)
        assert not any(live.context.files.root.iterdir())
