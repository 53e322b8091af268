"""The documents about models stay true: code runs, commands exist, tables hold."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import click
import pytest

from auto_voice.cli.main import cli
from auto_voice.models import load_catalog
from auto_voice.models.registry.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "docs" / "MODEL_INTEGRATION.md",
    ROOT / "docs" / "models" / "README.md",
    ROOT / "docs" / "models" / "IMPLEMENTATION_SUMMARY.md",
]
EXAMPLE = ROOT / "examples" / "model_integration_example.py"


def blocks(language: str) -> list[pytest.param]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 2
            found.append(pytest.param(match[1], id=f"{path.name}:{line}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "document", "exec"), {})


@pytest.mark.weights
@pytest.mark.parametrize("code", blocks("python weights"))
def test_blocks_with_real_weights_run(
    code: str, weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOVOICE_MODEL_DIR", str(weights_dir))
    exec(compile(code, "document", "exec"), {})


@pytest.mark.parametrize("text", blocks("console"))
def test_commands_and_their_options_exist(text: str) -> None:
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "autovoice"
        command: click.Command = cli
        context = click.Context(cli)
        rest = words[1:]
        while isinstance(command, click.Group):
            found = command.get_command(context, rest.pop(0))
            assert found is not None, line
            command = found
        options = {option for param in command.params for option in param.opts}
        assert {word for word in rest if word.startswith("-")} <= options, line


def test_the_yaml_of_the_document_is_a_valid_overlay(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(str(block.values[0]))
    entry = load_catalog([path]).entry("my_vocoder")
    assert entry.aliases["production"] == entry.default_version == "1.1"


def test_the_table_of_models_is_the_catalog() -> None:
    text = (ROOT / "docs" / "models" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    catalog = load_catalog()
    assert set(rows) == set(catalog.models)
    for name, row in rows.items():
        version = catalog.version(name)
        size = f"{version.bytes / 1e6:.1f} MB" if version.files else "none"
        kind, *_, shown, licence = row.split(" | ")
        assert (kind, shown, licence) == (version.kind, size, version.licence), name


def test_the_module_table_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "models" / "IMPLEMENTATION_SUMMARY.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\.\./)?(?:registry/|runtime/)?\w+\.py)`", text):
        assert (ROOT / "src" / "auto_voice" / "models" / name).is_file(), name
    for name in re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_every_architecture_of_the_table_can_be_imported() -> None:
    from importlib import import_module

    for name, architecture in ARCHITECTURES.items():
        module = import_module(architecture.module)
        assert callable(module.build), name
        assert callable(getattr(module, "convert_checkpoint", None)) or not architecture.converts


def test_the_example_runs_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AUTOVOICE_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    for number in range(1, 7):
        assert f"\n{number}. " in out
    assert "mock: True" in out
