"""The lines of docs/api.md run against a server, and docs/serving.md names options that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from auto_voice.audio.formats import AUDIO_SUFFIXES

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path, talk, friend):
    place = tmp_path / "user"
    place.mkdir()
    shutil.copy(talk, place / "talk.wav")
    shutil.copy(friend, place / "friend.wav")
    return place


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_the_curl_lines_work_one_after_the_other(live, folder):
    blocks = [body for language, body in FENCE.findall(API) if language == "sh"]
    assert len(blocks) >= 6
    script = "set -euo pipefail\n" + "\n".join(blocks).replace(ADDRESS, live.url)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for made in ("talk_as_friend.wav", "out.flac", "converted.zip", "first.mp3", "as_friend.wav"):
        assert (folder / made).stat().st_size > 1000


@pytest.mark.slow
def test_the_python_lines_work(live, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (body,) = [body for language, body in FENCE.findall(API) if language == "python"]
    exec(compile(body.replace(ADDRESS, live.url), "api.md", "exec"), {})
    assert (folder / "first.wav").stat().st_size > 1000
    assert "100 %" in capsys.readouterr().out


def test_the_statuses_are_those_of_the_errors(live):
    document = live.app.openapi()
    named = set(re.findall(r"\b([45]\d\d)\b", API[API.index("## What can go wrong") :]))
    given = {
        status
        for path in document["paths"].values()
        for operation in path.values()
        for status in operation["responses"]
        if status[0] in "45"
    }
    assert given <= named


def test_the_page_offers_every_kind_of_recording():
    page = (ROOT / "src" / "auto_voice" / "server" / "page" / "index.html").read_text("utf-8")
    accepted = re.findall(r'accept="([^"]*audio[^"]*)"', page)
    assert len(accepted) == 2
    assert all(set(list_.split(",")) >= AUDIO_SUFFIXES for list_ in accepted)
