"""``autovoice serve`` as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from auto_voice.cli import main
from auto_voice.cli.serve import read_tokens
from auto_voice.client import Client
from auto_voice.errors import ConfigError
from server_kit import until


@pytest.fixture
def server(tmp_path):
    """Starts the command: ``(process, address, log)``."""
    running = []

    def start(*args: str):
        log = tmp_path / "log.txt"
        command = [sys.executable, "-m", "auto_voice.cli", "serve", "--mock", "--port", "0"]
        command += ["--data-dir", str(tmp_path / "data"), "--voice-dir", str(tmp_path / "voices")]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*command, *args], stderr=stderr, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        running.append(process)

        def address():
            assert process.poll() is None, log.read_text()
            return re.search(r"listens on (http://\S+)/", log.read_text())

        return process, until(address)[1], log

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_one_command_serves_and_sigterm_ends_it_after_its_work(server, talk, friend):
    process, address, log = server("--log-format", "json")
    with Client(address) as client:
        assert client.convert(talk, references=[friend]).account["mock"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert '"message": "POST /v1/convert 200"' in log.read_text()
    assert "Traceback" not in log.read_text()


def test_another_address_needs_a_token(tmp_path, capsys):
    args = ["serve", "--mock", "--host", "0.0.0.0", "--data-dir", str(tmp_path)]
    assert main.main(args) == 2
    assert "a token is needed" in capsys.readouterr().err


def test_a_taken_port_is_one_sentence(tmp_path, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main.main(["serve", "--mock", "--port", port, "--data-dir", str(tmp_path)]) == 2
    assert "is taken" in capsys.readouterr().err


def test_token_files(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("a-token-of-the-tests\nanother-token-of-them\n")
    assert read_tokens([path]) == ["a-token-of-the-tests", "another-token-of-them"]
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_tokens([path])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tokens([tmp_path / "none"])
