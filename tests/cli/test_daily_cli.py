"""``autovoice voices | batch | inspect | completion`` from outside, with mock models."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile

from auto_voice.audio.pitch import extract_pitch
from auto_voice.cli import main
from auto_voice.models.mock_models import mock_sample
from auto_voice.voices.inspection import plot_pitch
from auto_voice.voices.library import VoiceLibrary, load_voice


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, f0_hz in (("talk", 120.0), ("friend", 210.0)):
        soundfile.write(f"{name}.wav", mock_sample(4.0, f0_hz=f0_hz).samples, 16000)
    Path("text.wav").write_text("This is no recording, whatever its name says.\n")
    yield tmp_path
    logging.getLogger("auto_voice").handlers.clear()


def test_the_life_of_a_voice(run):
    assert run("voices", "list")[0] == 0
    code, out, err = run("voices", "add", "ann", "friend.wav", "--consent", "yes", "--mock")
    assert (code, err) == (0, "")
    assert "stored ann: " in out
    assert re.search(r"2[01]\d Hz", out)
    assert run("voices", "add", "ann", "friend.wav", "--mock")[0] == 2
    facts = json.loads(run("voices", "show", "ann", "--json")[1])
    assert (facts["name"], facts["consent"], facts["recording_kept"]) == ("ann", "yes", True)
    assert facts["quality"]["snr_db"] > 5
    assert "consent          yes" in run("voices", "show", "ann")[1]
    assert run("voices", "rename", "ann", "anna")[0] == 0
    assert run("voices", "export", "anna", "--no-recording")[1] == "wrote anna.safetensors\n"
    assert run("voices", "remove", "anna", "--yes")[0] == 0
    assert run("voices", "import", "anna.safetensors", "--name", "again")[0] == 0
    assert VoiceLibrary().names() == ["again"]
    (listed,) = json.loads(run("voices", "list", "--json")[1])["voices"]
    assert (listed["name"], listed["recording_kept"]) == ("again", False)
    code, out, _ = run("convert", "talk.wav", "--voice", "again", "--mock", "-o", "x.wav")
    assert code == 0
    assert soundfile.info("x.wav").frames == 4 * 22050


def test_listing_voices_reads_no_array(run, monkeypatch):
    from safetensors import safe_open

    run("voices", "add", "ann", "friend.wav", "--mock")
    shown = json.loads(run("voices", "show", "ann", "--json")[1])

    class HeaderOnly:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def metadata(self):
            return self.file.metadata()

        def keys(self):
            return self.file.keys()

    monkeypatch.setattr("safetensors.safe_open", HeaderOnly)
    (listed,) = json.loads(run("voices", "list", "--json")[1])["voices"]
    assert listed.items() <= shown.items()
    assert run("voices", "list")[1].startswith("ann                  ")
    assert run("voices", "show", "ann")[0] != 0


def test_inspect_goes_on_after_a_file_that_is_no_recording(run):
    code, out, err = run("inspect", "talk.wav", "text.wav", "friend.wav", "--no-speakers", "--json")
    assert code == 2
    assert [json.loads(line)["file"] for line in out.splitlines()] == ["talk.wav", "friend.wav"]
    assert err.startswith("autovoice: error: text.wav")
    assert len(err.splitlines()) == 1


def test_an_option_before_the_command_says_where_it_belongs(run):
    code, _, err = run("--offline", "convert", "talk.wav", "--voice", "friend.wav")
    assert code == 2
    assert "autovoice COMMAND --offline" in err
    assert len(err.splitlines()) == 1


def test_what_doctor_finds_missing_and_optional_is_not_called_ok(run, monkeypatch):
    from importlib import metadata

    known = metadata.version

    def version(name):
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    _, out, _ = run("doctor")
    (line,) = [line for line in out.splitlines() if " torch: " in line]
    assert line.startswith("absent  torch: not installed")
    assert "CPU build of PyTorch" in line
    found = {row["what"]: row for row in json.loads(run("doctor", "--json")[1])}
    assert (found["torch"]["ok"], found["torch"]["here"]) == (True, False)
    assert not any(line.startswith("ok") and "not " in line for line in out.splitlines())


def test_voices_are_blended_and_compared(run):
    for name, file in (("a", "talk.wav"), ("b", "friend.wav")):
        run("voices", "add", name, file, "--mock")
    code, out, _ = run("voices", "blend", "mix", "a=0.7", "friend.wav=0.3", "--mock")
    assert code == 0
    assert "A blend of a (0.70), friend (0.30)." in out
    rows = json.loads(run("voices", "compare", "a", "b", "mix", "--json")[1])["similarity"]
    assert rows[0][2] > rows[0][1]
    assert rows[0][0] == pytest.approx(1, abs=1e-3)
    assert "121 Hz" in run("voices", "compare", "a", "b")[1]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no recording"])
def test_a_blend_makes_fittings_of_other_converters_anew_where_it_can(run, recorded):
    for name, file in (("a", "talk.wav"), ("b", "friend.wav")):
        run("voices", "add", name, file, "--mock")
    voice = load_voice(VoiceLibrary().require("a"))
    learnt = {"weight": np.ones(3, np.float16)}
    old = replace(voice, fine_tuning=learnt, fine_tuned_converter="old@1")
    VoiceLibrary().add("old", old if recorded else replace(old, speech=None))
    code, out, err = run("voices", "blend", "mix", "old=1", "b=1", "--mock")
    assert code == 0
    mix = load_voice(VoiceLibrary().require("mix"))
    assert mix.fine_tuned_converter == ("" if recorded else "old@1")
    code, out, err = run("convert", "talk.wav", "--voice", "mix", "--mock", "-o", "x.wav")
    assert code == 0
    assert ("was fine-tuned with old@1" in out + err) == (not recorded)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["voices", "show", "nobody"], "none is stored yet"),
        (["voices", "blend", "x", "ann"], "'ann' is no voice and weight"),
        (["voices", "compare", "ann"], "at least two voices"),
        (["voices", "add", "../x", "friend.wav"], "cannot name a voice"),
        (["convert", "talk.wav", "--voice", "nobody"], "neither a recording nor a stored voice"),
        (["convert", "talk.wav", "--voice", "friend.wav", "--strength", "2"], "between 0 and 1.5"),
        (["batch", "nothing", "--voice", "friend.wav"], "no file or folder nothing"),
        (["batch", "talk.wav"], "has no voice"),
        (["batch", "talk.wav", "--voice", "friend.wav", "--format", "mp5"], "no output format"),
        (["inspect", "text.wav", "--no-speakers"], "text.wav"),
        (["inspect", "talk.wav", "friend.wav", "--png", "x.png"], "give one file"),
    ],
)
def test_what_cannot_be_is_one_line(run, args, expected):
    code, _, err = run(*args)
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) == 1


def test_a_batch_reports_bad_files_and_goes_on(run):
    args = ["batch", "talk.wav", "text.wav", "--voice", "friend.wav", "-o", "out", "--mock"]
    code, out, err = run(*args, "--dry-run")
    assert code == 0
    assert "talk.wav -> out/talk.wav  voice=friend.wav" in out
    assert not Path("out").exists()
    code, out, err = run(*args, "--workers", "1", "--semitones", "2")
    assert code == 2
    assert "1 done, 0 done before, 1 failed" in out
    assert "text.wav: " in err
    assert soundfile.info("out/talk.wav").frames == 4 * 22050
    code, out, _ = run(*args, "--workers", "1", "--semitones", "2", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line.get("status") for line in lines[:2]] == ["skipped", "failed"]
    assert lines[2]["skipped"] == 1


@pytest.mark.slow
def test_inspect_says_what_is_in_a_recording(run):
    run("voices", "add", "ann", "friend.wav", "--mock")
    code, out, _ = run("inspect", "friend.wav", "--mock")
    assert code == 0
    for expected in ("0:04 (4.00 s)", "16000 Hz, mono", "LUFS", "SNR", "ann: similarity 1.00", "•"):
        assert expected in out
    facts = json.loads(run("inspect", "talk.wav", "--json", "--no-speakers")[1])
    assert facts["f0_hz"]["median"] == pytest.approx(120, rel=0.03)
    assert (facts["seconds"], facts["speakers"], facts["similarity"]) == (4.0, None, {})
    assert run("inspect", "talk.wav", "--no-speakers", "--png", "x.png")[0] == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_the_drawing_follows_the_melody():
    t = np.arange(32000) / 16000
    rising = np.sin(2 * np.pi * np.cumsum(120 * 2**t) / 16000).astype(np.float32)
    rising += 0.5 * np.sin(4 * np.pi * np.cumsum(120 * 2**t) / 16000).astype(np.float32)
    lines = plot_pitch(extract_pitch(0.2 * rising, 16000), rows=6, columns=40)
    rows = [row for line in lines[:6] for row in [line.split("│")[1]]]
    first = [min((i for i, c in enumerate(row) if c == "•"), default=None) for row in rows]
    columns = [column for column in first if column is not None]
    assert len(columns) >= 4
    assert columns == sorted(columns, reverse=True)


@pytest.mark.slow
def test_shells_complete_commands_options_and_voices(run):
    for shell in ("bash", "zsh", "fish"):
        code, out, _ = run("completion", shell)
        assert code == 0
        assert "_AUTOVOICE_COMPLETE" in out
    assert "~/.bashrc" in run("completion", "bash", "--how")[1]
    run("voices", "add", "annabel", "friend.wav", "--mock")
    words = {
        "autovoice con": "convert",
        "autovoice convert --stren": "--strength",
        "autovoice convert --voice anna": "annabel",
    }
    for line, expected in words.items():
        environment = os.environ | {
            "_AUTOVOICE_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        code = "import sys; from auto_voice.cli.main import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )
        assert expected in done.stdout, (line, done)


def test_every_command_has_help_with_an_example():
    def commands(group: click.Group, path: str):
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            if isinstance(command, click.Group):
                yield from commands(command, f"{path} {name}")
            else:
                yield f"{path} {name}", command

    for path, command in commands(main.cli, "autovoice"):
        assert command.help, path
        # `evaluate PATH` means `evaluate files PATH`, and the example says what people type.
        shown = path.removesuffix(" files")
        lines = [line.strip() for line in command.help.splitlines()]
        assert any(line.startswith(shown) for line in lines), f"{path} has no example"
