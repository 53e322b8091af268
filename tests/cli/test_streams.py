"""Standard input and output as every audio tool has them, and streams that are closed or full."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from auto_voice.cli.main import run_guarded
from auto_voice.cli.showing import ProgressDisplay
from auto_voice.progress import Progress
from hand_made_stages import speech_like

COMMAND = [sys.executable, "-m", "auto_voice.cli", "convert"]
OPTIONS = ["--voice", "friend.wav", "--mock"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("talk.wav", speech_like(2.0, 120.0), 16000)
    soundfile.write("friend.wav", speech_like(4.0, 200.0, seed=1), 16000)
    return tmp_path


def run(*args: str, **streams):
    return subprocess.run([*COMMAND, *args, *OPTIONS], check=False, **streams)


@pytest.mark.slow
def test_a_recording_goes_from_standard_input_to_standard_output():
    data = Path("talk.wav").read_bytes()
    done = run("-", "-o", "-", "--format", "flac", input=data, capture_output=True)
    assert done.returncode == 0
    audio, rate = soundfile.read(io.BytesIO(done.stdout))
    assert (len(audio), rate) == (44100, 22050)
    assert b"wrote -" in done.stderr
    # Nothing but the folder's own two recordings is left.
    assert sorted(path.name for path in Path().iterdir()) == ["friend.wav", "talk.wav"]


@pytest.mark.slow
def test_quiet_is_quiet():
    done = run("talk.wav", "-o", "out.wav", "-q", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="closes file descriptors as POSIX shells do")
def test_closed_streams_do_not_lend_their_numbers_to_files():
    command = " ".join([*COMMAND, "talk.wav", "-o", "out.wav", *OPTIONS])
    done = subprocess.run(f"{command} <&- >&- 2>&-", shell=True, check=False)
    assert done.returncode == 0
    assert soundfile.info("out.wav").frames == 44100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("output", ["out.wav", "-"])
def test_a_full_standard_output_is_one_sentence(output):
    with Path("/dev/full").open("wb") as full:
        done = run("talk.wav", "-o", output, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last == "autovoice: error: standard output cannot be written (No space left on device)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_error_does_not_stop_the_work():
    with Path("/dev/full").open("wb") as full:
        assert (
            run("talk.wav", "-o", "out.wav", stdout=subprocess.DEVNULL, stderr=full).returncode == 0
        )
    assert Path("out.wav").exists()


def test_a_reader_that_leaves_is_no_error():
    command = [*COMMAND, "talk.wav", "-o", "-", *OPTIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert b"error" not in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libx.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_full_memory_is_one_sentence_wherever_it_shows(error, capsys):
    def fail():
        try:
            raise error
        except Exception as inner:
            raise ValueError("a library failed") from inner

    assert run_guarded(fail, debug=False) == 2
    assert "the memory is full; close other programs" in capsys.readouterr().err


@pytest.mark.slow
def test_what_comes_out_of_a_pipe_is_what_a_file_holds():
    run("talk.wav", "-o", "out.wav", "-q")
    with Path("talk.wav").open("rb") as file:
        piped = run("-", "-o", "-", stdin=file, capture_output=True).stdout
    np.testing.assert_array_equal(
        soundfile.read(io.BytesIO(piped))[0], soundfile.read("out.wav")[0]
    )


class Watched(io.StringIO):
    def isatty(self):
        return True


def test_every_stage_is_shown_where_somebody_watches(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Watched())
    show = ProgressDisplay()
    for progress in [
        Progress("download", 0, 1_000_000, "model@1"),
        Progress("download", 1_000_000, 1_000_000, "model@1"),
        Progress("load", 0, 1, "model"),
        Progress("fine-tune", 20, 40, "ann"),
        Progress("fine-tune", 40, 40, "ann"),
        Progress("convert", 100, 200),
        Progress("convert", 200, 200),
    ]:
        show(progress)
    shown = sys.stderr.getvalue()
    for label in ("fetching model@1", "fine-tuning the converter", "converting:"):
        assert label in shown
    assert "1.00M/1.00M" in shown


def test_elsewhere_only_the_wait_for_fine_tuning_is_told_once(capsys):
    show = ProgressDisplay()
    for step in range(41):
        show(Progress("fine-tune", step, 40, "ann"))
    show(Progress("convert", 1, 2))
    assert capsys.readouterr().err == (
        "fine-tuning the converter to the voice: some seconds, once\n"
    )
