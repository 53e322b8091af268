"""Other web sites, wrong names, missing tokens, hostile uploads: refused, with a clean disk."""

from __future__ import annotations

import json
import logging
import socket
import struct
import time

import httpx2
import numpy as np
import pytest
import soundfile

from auto_voice.client import Client
from auto_voice.errors import BusyError, ConfigError, NotPermittedError, UploadError
from auto_voice.server import ServerSettings
from auto_voice.server.security import (
    HEADERS,
    Sessions,
    check_host,
    check_origin,
    client_of,
    session_cookie,
    token_of,
)
from auto_voice.server.telemetry import JsonFormatter, request_id
from auto_voice.server.uploads import display_name
from server_kit import until

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def settings(tmp_path):
    return lambda **more: ServerSettings(data_dir=tmp_path, **more)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.5.5.5"])
def test_loopback_needs_no_token(settings, host):
    assert settings(host=host).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "voice.example.org"])
def test_any_other_address_needs_one(settings, host):
    with pytest.raises(ConfigError, match="a token is needed"):
        settings(host=host)
    assert not settings(host=host, tokens=(TOKEN,)).is_loopback


@pytest.mark.parametrize("token", ["short", "sixteen chars \n here", "ünsafe-because-not-ascii"])
def test_weak_tokens_are_refused(settings, token):
    with pytest.raises(ConfigError, match="at least 16 printable"):
        settings(tokens=(token,))


def test_settings_do_not_show_their_tokens(settings):
    assert TOKEN not in repr(settings(tokens=(TOKEN,)))


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "[::1]:80", "LOCALHOST:1"])
def test_own_names(settings, host):
    check_host(settings(), host)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "10.0.0.1", "a:b:c"]
)
def test_foreign_names_are_a_sign_of_rebinding(settings, host):
    with pytest.raises(NotPermittedError):
        check_host(settings(), host)
    check_host(settings(allow_hosts=(host,)), host)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example", "host": "127.0.0.1:8000"},
        {"origin": "null", "host": "127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:9999", "host": "127.0.0.1:8000"},
        {"sec-fetch-site": "cross-site", "host": "127.0.0.1:8000"},
        {"sec-fetch-site": "same-site", "host": "127.0.0.1:8000"},
    ],
)
def test_foreign_pages_are_refused(settings, headers):
    with pytest.raises(NotPermittedError, match="other web sites"):
        check_origin(settings(), "http", headers)


def test_own_page_and_listed_origins_are_not(settings):
    own = {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}
    assert check_origin(settings(), "http", own) == ""
    assert check_origin(settings(), "http", {"host": "x"}) == ""
    listed = settings(allow_origins=("https://app.example",))
    foreign = {"origin": "https://app.example", "sec-fetch-site": "cross-site", "host": "x"}
    assert check_origin(listed, "http", foreign) == "https://app.example"


def test_sessions_prove_the_token_without_carrying_it(settings):
    given = settings(tokens=(TOKEN, "another-token-of-them"))
    value = session_cookie(TOKEN)
    assert TOKEN not in value
    assert token_of(given, {"cookie": f"x=1; autovoice_session={value}"}) == TOKEN
    for wrong in (
        session_cookie(TOKEN, now=time.time() - 8 * 86400),
        value[:-1] + ("0" if value[-1] != "0" else "1"),
        "99999999999." + value.partition(".")[2],
        session_cookie("a-token-nobody-gave"),
        "",
        "x.y",
        "1.y",
        "٣.y.z",
    ):
        with pytest.raises(NotPermittedError):
            token_of(given, {"cookie": f"autovoice_session={wrong}"})


def test_clients_are_told_apart_by_token_and_network():
    assert client_of("", "127.0.0.1") == "127.0.0.1"
    assert client_of(TOKEN, "10.1.1.1") != client_of("another", "10.1.1.1")
    assert TOKEN not in client_of(TOKEN, "10.1.1.1")
    assert client_of("", "2001:db8::1") == client_of("", "2001:db8::ffff")
    assert client_of("", "2001:db8::1") != client_of("", "2001:db8:0:1::1")


def test_every_answer_carries_the_headers(live):
    for path in ("/", "/page/app.js", "/v1/server", "/nothing", "/v1/jobs/x"):
        answer = httpx2.get(live.url + path)
        assert {name: answer.headers.get(name) for name in HEADERS} == dict(HEADERS)
        assert "server" not in answer.headers
    assert httpx2.get(f"{live.url}/v1/server").headers["cache-control"] == "no-store"


@pytest.mark.slow
def test_without_the_token_nothing_but_health_and_the_page_is_shown(serve, caplog):
    live = serve(tokens=(TOKEN,))
    caplog.set_level(logging.DEBUG, "auto_voice")
    for path in ("/healthz", "/readyz", "/", "/page/app.js"):
        assert httpx2.get(live.url + path).status_code == 200
    for path in ("/v1/server", "/v1/voices", "/v1/jobs/x", "/metrics"):
        answer = httpx2.get(live.url + path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
    wrong = {"authorization": "Bearer " + TOKEN + "x"}
    assert httpx2.get(f"{live.url}/v1/server", headers=wrong).status_code == 401
    right = {"authorization": f"Bearer {TOKEN}"}
    assert httpx2.get(f"{live.url}/v1/server", headers=right).status_code == 200
    assert httpx2.get(f"{live.url}/metrics", headers=right).status_code == 200
    assert TOKEN not in caplog.text


def test_a_browser_session(serve):
    live = serve(tokens=(TOKEN,))
    with httpx2.Client(base_url=live.url) as browser:
        assert browser.post("/v1/session", json={"token": "no"}).status_code == 401
        answer = browser.post("/v1/session", json={"token": TOKEN})
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert browser.get("/v1/server").status_code == 200
        browser.delete("/v1/session")
        browser.cookies.clear()
        assert browser.get("/v1/server").status_code == 401


def test_cookies_of_no_session_leave_no_trace(tmp_path):
    sessions = Sessions(tmp_path / "sessions.json")
    for strange in ("", "x", "99999999999.a.b", session_cookie("a-token-nobody-gave")):
        sessions.end((TOKEN,), strange)
    assert not (tmp_path / "sessions.json").exists()
    cookie, other = session_cookie(TOKEN), session_cookie(TOKEN)
    sessions.end((TOKEN,), cookie)
    assert Sessions(tmp_path / "sessions.json").is_ended(cookie)
    assert not sessions.is_ended(other)


@pytest.mark.parametrize("zeros", ["0", "00"])
def test_an_ended_session_opens_nothing_however_its_expiry_is_spelt(settings, tmp_path, zeros):
    given, sessions = settings(tokens=(TOKEN,)), Sessions(tmp_path / "sessions.json")
    cookie = session_cookie(TOKEN)
    sessions.end((TOKEN,), cookie)
    for spelt in (cookie, zeros + cookie):
        with pytest.raises(NotPermittedError):
            token_of(given, {"cookie": f"autovoice_session={spelt}"}, sessions)


def test_listed_origins_get_their_preflight(serve):
    live = serve(allow_origins=("https://app.example",))
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    answer = httpx2.options(f"{live.url}/v1/convert", headers=headers)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    headers["origin"] = "https://evil.example"
    assert httpx2.options(f"{live.url}/v1/convert", headers=headers).status_code == 403


def test_log_lines_are_json_with_the_request_id():
    record = logging.makeLogRecord({"msg": "a %s", "args": ("b",), "levelname": "INFO", "job": "j"})
    token = request_id.set("r1")
    try:
        line = json.loads(JsonFormatter().format(record))
    finally:
        request_id.reset(token)
    assert (line["message"], line["job"], line["request_id"]) == ("a b", "j", "r1")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\temp\\talk.wav", "talk.wav"),
        ("..", "upload"),
        ("\x00a\nb\u202e.wav", "ab.wav"),
        ("x" * 500, "x" * 80),
        (None, "upload"),
    ],
)
def test_file_names_are_only_shown(given, shown):
    assert display_name(given, "upload") == shown


# Hostile uploads


def wav_header(data_bytes=2**31 - 1, rate=16000, channels=1, bits=16):
    fmt = struct.pack(
        "<HHIIHH", 1, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits
    )
    return (
        b"RIFF" + struct.pack("<I", 36 + data_bytes % 2**32) + b"WAVEfmt "
        + struct.pack("<I", 16) + fmt + b"data" + struct.pack("<I", data_bytes % 2**32)
    )  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    long = folder / "ten_hours.flac"
    with soundfile.SoundFile(long, "w", 8000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(8000 * 600, np.int16))
    rate = folder / "rate.wav"
    rate.write_bytes(wav_header(8000, rate=4_000_000) + bytes(8000))
    whole = folder / "whole.flac"
    soundfile.write(whole, rng.standard_normal(16000) * 0.1, 16000)
    nan = folder / "nan.wav"
    soundfile.write(nan, np.full(16000, np.nan), 16000, subtype="FLOAT")
    huge = folder / "huge_values.wav"
    soundfile.write(huge, np.full(16000, 3e38), 16000, subtype="FLOAT")
    silence = folder / "silence.wav"
    soundfile.write(silence, np.zeros(16000), 16000)
    many = folder / "channels.wav"
    soundfile.write(many, np.zeros((100, 32)) + 0.1, 16000)
    png = b"\x89PNG\r\n\x1a\n" + bytes(200)
    return {
        "ten hours of silence": long.read_bytes(),
        "silence": silence.read_bytes(),
        "a rate of 4 MHz": rate.read_bytes(),
        "32 channels": many.read_bytes(),
        "NaN": nan.read_bytes(),
        "samples of 1e38": huge.read_bytes(),
        "a header that promises 2 GB": wav_header() + bytes(1000),
        "a header alone": wav_header(0),
        "no channels": wav_header(100, channels=0) + bytes(100),
        "a cut file": whole.read_bytes()[:3000],
        "flipped bytes": bytes(
            b ^ 0x55 if i > 200 else b for i, b in enumerate(whole.read_bytes())
        ),
        "nothing": b"",
        "one byte": b"R",
        "a picture": png,
        "a web page that claims to be RIFF": b"RIFF<html><script>alert(1)</script>" + bytes(100),
        "a picture and a sound": png + whole.read_bytes(),
        "a zip bomb": b"PK\x03\x04" + bytes(100_000),
        "gzip": b"\x1f\x8b\x08" + bytes(1000),
        "an MP4": b"\x00\x00\x00\x20ftypisom" + bytes(100),
        "a pickle": b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.",
        "a program": b"\x7fELF" + bytes(500),
        "a playlist with an address": b"#EXTM3U\nhttp://169.254.169.254/latest/meta-data\n",
        "an ID3 tag that promises 256 MB": b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(500),
        "noise": rng.bytes(20_000),
        "a truncated Ogg page": b"OggS\x00\x02" + bytes(20),
    }


@pytest.mark.slow
def test_hostile_uploads_give_4xx_and_leave_nothing(live, hostile, friend):
    root = live.context.files.root
    answers = {}
    with httpx2.Client(base_url=live.url, timeout=60) as client:
        for what, data in hostile.items():
            for path, part in (("/v1/convert", "source"), ("/v1/inspect", "file")):
                files = [(part, ("talk.wav", data))]
                if path == "/v1/convert":
                    files.append(("reference", ("friend.wav", friend.read_bytes())))
                answer = client.post(path, files=files)
                answers[what, path] = answer
    wrong = {
        key: found.status_code for key, found in answers.items() if found.status_code // 100 != 4
    }
    assert not wrong
    assert all("talk.wav" in found.json()["error"]["message"] for found in answers.values())
    live.context.workers.sweep()
    left = [p for p in root.rglob("*") if p.is_file()]
    assert not left


def test_a_polyglot_is_only_ever_taken_as_sound(live, talk, friend):
    data = talk.read_bytes() + b"PK\x03\x04<script>alert(1)</script>"
    with Client(live.url) as client:
        made = client.convert(("talk.wav", data), references=[friend])
    assert b"script" not in made.content


BOUNDARY = "frontier"


def broken_bodies():
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="source"; filename="a.wav"\r\n'
    return {
        "no boundary": (b"whatever", "multipart/form-data"),
        "never closed": (part.encode() + b"\r\nRIFF", f"multipart/form-data; boundary={BOUNDARY}"),
        "no name": (
            f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nx\r\n--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
        ),
        "not multipart": (b'{"source": 1}', "application/json"),
        "a field of 2 MB": (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="voice"\r\n\r\n'.encode()
            + b"x" * 2_000_000 + f"\r\n--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
        ),
        "2000 fields": (
            b"".join(
                f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="f{n}"\r\n\r\nx\r\n'.encode()
                for n in range(2000)
            ) + f"--{BOUNDARY}--".encode(),
            f"multipart/form-data; boundary={BOUNDARY}",
        ),
    }  # fmt: skip


# The parser of forms leaves a part that never ends to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile")
@pytest.mark.filterwarnings("ignore:Unclosed file:ResourceWarning")
@pytest.mark.parametrize("what", broken_bodies())
def test_broken_multipart(live, what):
    body, kind = broken_bodies()[what]
    answer = httpx2.post(f"{live.url}/v1/convert", content=body, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert not any(live.context.files.root.iterdir())


def test_uploads_beyond_the_limit_are_refused_before_and_while_they_are_read(serve, talk):
    live = serve(upload_mb=1)
    big = ("big.wav", bytes(1_500_000))
    with Client(live.url) as client, pytest.raises(UploadError, match="takes 1 MB"):
        client.inspect(big)

    def chunks():
        head = 'Content-Disposition: form-data; name="file"; filename="a"'
        yield f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode()
        for _ in range(30):
            yield bytes(50_000)

    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    answer = httpx2.post(f"{live.url}/v1/inspect", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert httpx2.post(f"{live.url}/v1/session", content=bytes(100_000)).status_code == 413


def test_a_stalled_upload_is_given_up(serve):
    live = serve(upload_stall_seconds=0.3)
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as stalled:
        stalled.sendall(
            b"POST /v1/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )
        answer = stalled.recv(65536)
    assert b" 408 " in answer.split(b"\r\n")[0]


def test_too_many_uploads_at_once_are_refused(serve):
    live = serve(uploads_at_once=1, upload_stall_seconds=5.0)
    host, _, port = live.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
        )

        def refused():
            with Client(live.url) as client:
                try:
                    client.inspect(("x.wav", b"x"))
                except BusyError as error:
                    return error
                except Exception:
                    return None

        assert "Too many uploads" in str(until(refused))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/..%2f..%2fetc%2fpasswd/result",
        "/v1/jobs/%2e%2e/result",
        "/page/..%2f..%2fsettings.py",
        "/page/%2e%2e/app.py",
        "/v1/voices/..%2f..%2fx",
        "/v1/voices/..%5c..%5cx/file",
        "/v1/jobs/" + "a" * 22 + "/results/99999999",
        "/v1/models/..%2fx",
    ],
)
def test_no_name_in_an_address_becomes_a_path(live, path):
    assert 400 <= httpx2.get(live.url + path).status_code < 500
