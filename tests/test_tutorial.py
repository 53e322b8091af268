"""The tutorial from its first line to its last, with mock models: it needs no weights."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import soundfile

from auto_voice.cli.main import cli, main
from auto_voice.models.mock_models import mock_sample

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    heights = {"talk": 120.0, "ann1": 210.0, "ann2": 205.0, "ben": 100.0}
    for seed, (name, f0_hz) in enumerate(heights.items()):
        samples = mock_sample(4.0, f0_hz=f0_hz, seed=seed).samples
        soundfile.write(f"{name}.wav", samples, 16000)
    yield
    logging.getLogger("auto_voice").handlers.clear()


def run(line: str) -> None:
    """One line of shell: ``mkdir``, ``cp`` or ``autovoice``, the latter with mock models."""
    program, *words = shlex.split(line)
    if program == "mkdir":
        Path(words[0]).mkdir()
    elif program == "cp":
        shutil.copy(*words)
    else:
        assert program == "autovoice", line
        command: click.Command | None = cli
        for word in words:
            if not isinstance(command, click.Group):
                break
            command = command.get_command(click.Context(command), word)
        assert command is not None
        mock = ["--mock"] if any("--mock" in p.opts for p in command.params) else []
        assert main([*words, *mock]) == 0, line


@pytest.mark.slow
def test_every_step_works(capsys):
    for language, body in FENCE.findall((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        if language == "python":
            mocked = body.replace("PipelineConfig()", "PipelineConfig(use_mock_models=True)")
            assert mocked != body
            exec(compile(mocked, "tutorial.md", "exec"), {})
            continue
        for line in body.splitlines():
            run(line)
    out = capsys.readouterr().out
    assert "0 done, 2 done before, 0 failed" in out
    assert "stored anna-ben" in out
    assert soundfile.info("broadcast.wav").samplerate == 48000
    assert soundfile.info("broadcast.wav").subtype == "PCM_24"
    made = {path.name for path in Path().glob("*.wav")}
    assert {"talk_as_ann.wav", "half_way.wav", "deeper.wav", "sung.wav", "blended.wav"} <= made


def test_the_example_of_an_executor_runs():
    (body,) = [b for lang, b in FENCE.findall((DOCS / "batch.md").read_text()) if lang == "python"]
    exec(compile(body, "batch.md", "exec"), {})
