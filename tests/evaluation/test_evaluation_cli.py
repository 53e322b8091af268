"""The commands end to end on computed voices, with judges whose verdicts are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from auto_voice.cli.main import main
from auto_voice.errors import MissingDependencyError
from auto_voice.evaluation import judges as judges_module
from auto_voice.evaluation.judges import Judges
from evaluation_kit import RATE, TableRecogniser, sing

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _known_judges(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges_module, "load_judges", lambda *_, **__: judges)


@pytest.mark.slow
def test_one_command_scores_a_folder_and_writes_every_form(
    make_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder("mine")
    out = {kind: tmp_path / f"r.{kind}" for kind in ("html", "json", "csv", "markdown", "jsonl")}
    arguments = [
        x for kind in ("html", "json", "csv", "markdown") for x in (f"--{kind}", str(out[kind]))
    ]
    assert main(["evaluate", str(root), *arguments, "--history", str(out["jsonl"])]) == 0
    said = capsys.readouterr().out
    assert "mine: 4 conversions" in said
    assert "SECS ↑" in said
    assert "recogniser table@1" in said
    assert all(path.stat().st_size for path in out.values())
    assert len(json.loads(out["json"].read_text())["pairs"]) == 4
    assert len(out["csv"].read_text().splitlines()) == 5


@pytest.mark.slow
def test_json_to_stdout_is_json_alone(
    make_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(make_folder()), "--json", "-", "--name", "n"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "n"
    assert main(["evaluate", str(make_folder("b")), "--markdown", "-", "--resample", "target"]) == 0
    assert capsys.readouterr().out.startswith("### b: 4 conversions")


@pytest.mark.slow
def test_compare_scores_folders_and_reads_results(
    make_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, copy = make_folder("good", pairs=11), make_folder("copy", pairs=11, quality=0.0)
    saved = tmp_path / "copy.json"
    assert main(["evaluate", str(copy), "-q", "--json", str(saved)]) == 0
    assert capsys.readouterr().out == ""
    page = tmp_path / "c.html"
    assert main(["compare", str(saved), str(good), "--html", str(page)]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("SECS ↑"))
    assert line.endswith("better")
    assert "better" in page.read_text(encoding="utf-8")
    assert main(["compare", str(saved), str(good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pairs"] == 11
    assert main(["compare", str(saved), str(saved), "--markdown"]) == 0
    assert "| SECS ↑ |" in capsys.readouterr().out


@pytest.mark.slow
def test_strict_comparison_refuses_other_judges(
    make_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert main(["evaluate", str(make_folder()), "-q", "--json", str(a)]) == 0
    b.write_text(a.read_text().replace("table@1", "table@2"))
    assert main(["compare", str(a), str(b)]) == 0
    assert "not comparable" in capsys.readouterr().out
    assert main(["compare", str(a), str(b), "--strict"]) == 2
    assert "table@1 and table@2" in capsys.readouterr().err
    assert main(["compare", str(a)]) == 2


def test_trials_give_an_equal_error_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, formant in (("a1", 500), ("a2", 520), ("b1", 1500), ("b2", 1530)):
        soundfile.write(tmp_path / f"{name}.wav", sing(150, formant_hz=formant).samples, RATE)
    rows = [("a1", "a2", 1), ("b1", "b2", 1), ("a1", "b1", 0), ("a2", "b2", 0)]
    (tmp_path / "t.csv").write_text(
        "a,b,same\n" + "".join(f"{a}.wav,{b}.wav,{same}\n" for a, b, same in rows)
    )
    assert main(["evaluate", "trials", str(tmp_path / "t.csv")]) == 0
    assert "equal error rate 0.00 %" in capsys.readouterr().out
    assert main(["evaluate", "trials", str(tmp_path / "t.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["speaker"]["eer"] == 0.0


def test_what_cannot_be_scored_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "does not exist" in error
    assert len(error.splitlines()) == 1


def test_a_missing_extra_is_answered_with_the_command(
    make_folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise MissingDependencyError("faster-whisper is missing; pip install 'auto-voice[eval]'")

    monkeypatch.setattr(judges_module, "load_judges", missing)
    assert main(["evaluate", str(make_folder())]) == 2
    assert "pip install 'auto-voice[eval]'" in capsys.readouterr().err


def test_a_silent_recogniser_is_total_loss(
    make_folder: Folder, recogniser: TableRecogniser, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(pairs=1)
    (root / "transcripts").mkdir()
    (root / "transcripts/p0.txt").write_text("two words")
    recogniser.otherwise = ""
    assert main(["evaluate", str(root), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["estimates"]["wer"]["value"] == 1.0
