"""``autovoice`` from outside: files, exit codes, what is printed where."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile

from auto_voice import __version__
from auto_voice.cli import main
from auto_voice.errors import ModelUnavailableError
from auto_voice.models.mock_models import mock_sample


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with ``talk.wav``, ``friend.wav`` and what can be wrong with a file."""
    monkeypatch.chdir(tmp_path)
    for name, f0_hz in (("talk", 120.0), ("friend", 210.0)):
        soundfile.write(f"{name}.wav", mock_sample(f0_hz=f0_hz).samples, 16000)
    Path("empty.wav").touch()
    Path("text.wav").write_text("This is no recording, whatever its name says.\n")
    soundfile.write("silent.wav", np.zeros(16000), 16000)
    soundfile.write("short.wav", mock_sample().samples[4000:9000], 16000)
    soundfile.write("noise.wav", 0.01 * np.random.default_rng(0).standard_normal(48000), 16000)
    Path("folder").mkdir()
    yield tmp_path
    logging.getLogger("auto_voice").handlers.clear()


CONVERT = ("convert", "talk.wav", "--voice", "friend.wav", "--mock")


def test_convert_writes_a_recording_as_long_as_the_source(run):
    code, out, err = run(*CONVERT, "-o", "out.wav")
    assert (code, err) == (0, "")
    assert "wrote out.wav: 6.00 s at 22050 Hz" in out
    assert "the output is noise, not speech" in out
    assert "moved by +9.7 semitones" in out
    assert soundfile.info("out.wav").frames == 6 * 22050


def test_the_default_output_is_named_after_both(run):
    assert run(*CONVERT)[0] == 0
    assert Path("talk_as_friend.wav").exists()


@pytest.mark.parametrize(
    ("options", "name", "subtype"),
    [
        (["-o", "x.flac"], "x.flac", "PCM_16"),
        (["-o", "x.wav", "--subtype", "24"], "x.wav", "PCM_24"),
        (["--format", "ogg"], "talk_as_friend.ogg", "VORBIS"),
        (["-o", "x.mp3"], "x.mp3", "MPEG_LAYER_III"),
    ],
)
def test_formats(run, options, name, subtype):
    assert run(*CONVERT, *options)[0] == 0
    assert soundfile.info(name).subtype == subtype


def test_json_is_one_object_and_nothing_else(run):
    code, out, err = run(*CONVERT, "-o", "out.wav", "--json")
    about = json.loads(out)
    assert (code, err) == (0, "")
    assert about["output"] == "out.wav"
    assert about["samples"] == 6 * 22050
    assert about["mock"] is True
    assert set(about["models"]) == {"content", "speaker", "converter", "vocoder"}


def test_quiet_prints_nothing(run):
    assert run(*CONVERT, "-o", "out.wav", "-q") == (0, "", "")


def test_an_existing_output_is_kept_unless_asked(run):
    Path("out.wav").write_bytes(b"precious")
    code, _, err = run(*CONVERT, "-o", "out.wav")
    assert code == 2
    assert "out.wav exists already; add --overwrite" in err
    assert Path("out.wav").read_bytes() == b"precious"
    assert run(*CONVERT, "-o", "out.wav", "--overwrite")[0] == 0
    assert soundfile.info("out.wav").frames == 6 * 22050


@pytest.mark.slow
def test_several_references_and_a_voice_file(run):
    assert run(*CONVERT, "--voice", "talk.wav", "-o", "both.wav")[0] == 0
    code, out, _ = run("clone", "friend.wav", "--mock", "--name", "Ann")
    assert code == 0
    assert "wrote friend.safetensors: voice 'Ann'" in out
    code, _, err = run(
        "convert", "talk.wav", "--voice", "friend.safetensors", "--mock", "-o", "f.wav"
    )
    assert (code, err) == (0, "")
    assert run(*CONVERT, "-o", "g.wav")[0] == 0
    np.testing.assert_array_equal(soundfile.read("f.wav")[0], soundfile.read("g.wav")[0])


def test_clone_says_what_it_found(run):
    code, out, _ = run("clone", "friend.wav", "--mock", "--json", "-o", "v.safetensors")
    about = json.loads(out)
    assert code == 0
    assert about["pitch_hz"] == pytest.approx(210, rel=0.03)
    assert about["speech_seconds"] > 3
    assert run("clone", "friend.wav", "--mock", "-o", "v.safetensors")[0] == 2
    assert run("clone", "friend.wav", "--mock", "-o", "v.wav")[0] == 2


BAD = [
    (["convert", "none.wav", "--voice", "friend.wav"], "none.wav"),
    (["convert", "talk.wav", "--voice", "none.wav"], "none.wav"),
    (["convert", "empty.wav", "--voice", "friend.wav"], "empty"),
    (["convert", "text.wav", "--voice", "friend.wav"], "text.wav"),
    (["convert", "silent.wav", "--voice", "friend.wav"], "silen"),
    (["convert", "folder", "--voice", "friend.wav"], "folder"),
    (["convert", "talk.wav", "--voice", "text.wav"], "text.wav"),
    (["convert", "talk.wav", "--voice", "short.wav"], "only 0.3 s of speech"),
    (["convert", "talk.wav", "--voice", "noise.wav"], "speech; give 5 to 30 s"),
    (["convert", "talk.wav", "--voice", "friend.wav", "-o", "folder"], "is a folder"),
    (["convert", "talk.wav", "--voice", "friend.wav", "-o", "talk.wav"], "also an input"),
    (["convert", "talk.wav", "--voice", "friend.wav", "-o", "friend.wav"], "also an input"),
    (["convert", "talk.wav", "--voice", "friend.wav", "-o", "no/x.wav"], "does not exist"),
    (["convert", "talk.wav", "--voice", "friend.wav", "-o", "x.xyz"], "no output format"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--subtype", "7"], "use one of"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--semitones", "99"], "within ±36"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--vocoder", "nope"], "no model nope"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--device", "toaster"], "toaster"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--config", "text.wav"], "text.wav"),
    (["convert", "talk.wav", "--voice", "friend.safetensors"], "autovoice clone"),
    (["convert", "talk.wav"], "--voice"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--semitones", "high"], "high"),
    (["convert", "talk.wav", "--voice", "friend.wav", "--colour"], "--colour"),
    (["clone"], "REFERENCES"),
    (["clone", "text.wav"], "text.wav"),
    (["sing"], "no command 'sing'; the commands are convert"),
]


@pytest.mark.parametrize(("args", "sentence"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_what_a_user_can_get_wrong_is_one_line_and_no_file(run, folder, args, sentence):
    before = sorted(folder.rglob("*"))
    code, out, err = run(*args, *(["--mock"] if args[0] in ("convert", "clone") else []))
    assert (code, out) == (2, "")
    assert err.startswith("autovoice: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert sorted(folder.rglob("*")) == before


def test_mock_audio_is_not_written_where_real_audio_was_asked_for(run, monkeypatch):
    from auto_voice.models.model_registry import ModelRegistry

    def unreachable(self, version):
        raise ModelUnavailableError("no source could serve it")

    monkeypatch.setattr(ModelRegistry, "_load", unreachable)
    code, _, err = run(*CONVERT[:-1], "--fallback", "mock", "-o", "out.wav")
    assert code == 2
    assert "out.wav was not written because mock models make noise" in err
    assert not Path("out.wav").exists()


def test_defects_are_one_line_with_a_hint_and_a_traceback_on_request(run, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("auto_voice.cli.convert.make_pipeline", broken)
    code, _, err = run(*CONVERT)
    assert code == 1
    assert err.count("\n") == 1
    assert "unexpected ZeroDivisionError: division by zero (run `autovoice --debug" in err
    code, _, err = run("--debug", *CONVERT)
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, click.Abort])
def test_ctrl_c_is_quiet(run, monkeypatch, interruption):
    def interrupted(*_, **__):
        raise interruption

    monkeypatch.setattr("auto_voice.cli.convert.make_pipeline", interrupted)
    code, _, err = run(*CONVERT)
    assert code == 130
    assert "Traceback" not in err


def test_other_ends_of_a_command(capsys):
    def full():
        raise MemoryError

    assert main.run_guarded(full, debug=False) == 2
    assert "memory is full" in capsys.readouterr().err
    assert main.run_guarded(lambda: 7, debug=False) == 7


def test_a_closed_pipe_is_no_error():
    code = (
        "import sys; from auto_voice.cli.main import run_guarded\n"
        "def write():\n"
        "    raise BrokenPipeError\n"
        "sys.exit(run_guarded(write, debug=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


def test_version_and_help(run):
    assert run("--version") == (0, f"autovoice {__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0
    for command, (_, text) in main.COMMANDS.items():
        assert command in out
        assert text in out
        assert run(command, "--help")[0] == 0


def test_help_imports_no_model_code():
    code = (
        "import sys; from auto_voice.cli.main import main; main(['--help']);"
        "print({'torch', 'numpy', 'soundfile', 'onnxruntime', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_doctor_finds_everything_in_place(run, monkeypatch):
    code, out, _ = run("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(out)}
    assert code == 0
    assert findings["torch"]["ok"]
    assert "model folder" in findings
    here = next(f for what, f in findings.items() if what.startswith("converter_compact@"))
    away = next(f for what, f in findings.items() if what.startswith("hifigan_universal@"))
    assert here["detail"].endswith("MB, here")
    assert away["detail"].endswith("autovoice models pull hifigan_universal")
    monkeypatch.setenv("AUTOVOICE_OFFLINE", "1")
    code, out, _ = run("doctor")
    assert code == 2
    assert "MISSING hifigan_universal@1.0: 56 MB, not here; switch the network on" in out
    monkeypatch.setenv("AUTOVOICE_FALLBACK", "mock")
    code, out, _ = run("doctor")
    assert code == 0
    assert "hifigan_universal@1.0: 56 MB, not here; a mock stands in, as the fallback mock" in out
    monkeypatch.setenv("AUTOVOICE_FALLBACK", "compact")
    code, out, _ = run("doctor")
    assert code == 2, "no compact speaker encoder stands in"
    assert "not here; vocoder_compact@1.0 stands in, as the fallback compact allows" in out
    monkeypatch.delenv("AUTOVOICE_OFFLINE")
    monkeypatch.setattr("auto_voice.cli.doctor.NEEDED", ("numpy", "no-such-package"))
    code, out, _ = run("doctor")
    assert code == 2
    assert "MISSING no-such-package: not installed; run: pip install no-such-package" in out


@pytest.mark.slow
def test_demo_with_mock_models(run):
    code, out, err = run("demo", "--mock", "-o", "here")
    assert (code, err) == (0, "")
    assert "similarity to the target voice" in out
    written = {path.name for path in Path("here").iterdir()}
    assert written == {"source.wav", "reference.wav", "converted.wav", "spectrograms.png"}
    code, out, _ = run("demo", "--mock", "-o", "here", "--json")
    about = json.loads(out)
    assert code == 0
    assert about["output"] == str(Path("here/converted.wav"))
    assert set(about["similarity"]) == {"source_to_target", "result_to_target", "result_to_source"}


@pytest.mark.slow
def test_the_demo_works_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("demo", "--mock", "-o", "here")[0] == 0
    assert not Path("here/spectrograms.png").exists()


@pytest.mark.parametrize("group", [(), ("voices",), ("models",), ("config",)], ids=str)
def test_a_group_without_a_command_shows_its_help_line_by_line(run, group):
    code, out, err = run(*group)
    assert code in (0, 2)
    shown = (out + err).splitlines()
    assert shown[0] == " ".join(("Usage: autovoice", *group, "[OPTIONS] COMMAND [ARGS]..."))
    assert "Commands:" in shown
    assert "error" not in shown[0]
