"""An offline conversion, seen by the operating system: no socket, no file outside our folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from auto_voice.models.mock_models import mock_sample

# ONNX Runtime looks up its telemetry host about nine seconds after it was imported.
WAIT_S = 12
SCRIPT = """
import sys, time
def heard(event, arguments):
    if event == "socket.__new__":
        print("socket(", arguments, file=sys.stderr)
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        print(f'openat(AT_FDCWD, "{arguments[0]}", O_CREAT', file=sys.stderr)
if %(audit)r:
    sys.addaudithook(heard)
from auto_voice.cli.main import main
code = main(["convert", "source.wav", "--voice", "voice.wav", "-o", "out.wav", "--mock",
             "--offline", "--quiet"])
import onnxruntime
time.sleep(%(wait)d)
sys.exit(code)
"""


@pytest.mark.slow
def test_an_offline_conversion_opens_no_socket_and_no_file_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with strace where there is one, which sees C++ as well; else by Python's own hook."""
    pytest.importorskip("onnxruntime")
    for name, seconds in (("source", 3.0), ("voice", 5.0)):
        sample = mock_sample(seconds)
        soundfile.write(tmp_path / f"{name}.wav", sample.samples, sample.sample_rate)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    trace = tmp_path / "trace.txt"
    strace = shutil.which("strace")
    works = (
        strace and subprocess.run([strace, "-o", os.devnull, "true"], check=False).returncode == 0
    )
    command = [sys.executable, "-c", SCRIPT % {"wait": WAIT_S, "audit": not works}]
    if works:
        calls = "trace=%network,openat,open,creat,mkdir,mkdirat,rename,renameat2"
        command = [str(strace), "-f", "-qq", "-s", "500", "-e", calls, "-o", str(trace), *command]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = (trace.read_text() if works else run.stderr).splitlines()
    assert not [line for line in lines if re.search(r"\bsocket\(|\bconnect\(", line)]
    written = [
        Path(tmp_path, match[1])
        for line in lines
        if re.search(r"O_CREAT|O_WRONLY|O_RDWR|mkdir|creat\(|rename", line)
        if not re.search(r"= -1 E", line)
        for match in re.finditer(r'"([^"]+)"', line)
    ]
    assert tmp_path / "out.wav" in written or not works
    outside = [
        path for path in written
        if tmp_path not in (path, *path.parents) and path.parts[1] not in ("dev", "proc")
    ]  # fmt: skip
    assert not outside
    assert not [path for path in home.rglob("*") if path.is_file()]
