"""What the documents say is true: code runs; commands, options, files and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import soundfile

from auto_voice.cli.main import cli
from auto_voice.models import load_catalog
from auto_voice.models.mock_models import mock_sample

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(language: str, text: str = README) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


@pytest.mark.weights
def test_the_python_example_runs(tmp_path, monkeypatch, weights_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOVOICE_MODEL_DIR", str(weights_dir))
    for name, f0_hz in (("talk", 120.0), ("friend", 210.0)):
        soundfile.write(f"{name}.wav", mock_sample(f0_hz=f0_hz).samples, 16000)
    (example,) = fences("python")
    assert 5 <= len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert soundfile.info("talk_from_python.wav").frames == 6 * 22050


def commands(text: str) -> list[list[str]]:
    """Every ``autovoice …`` line of shell blocks and every inline one, as words."""
    shells = [*fences("sh", text), *fences("console", text)]
    lines = [line for body in shells for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(autovoice [^`]+)`", re.sub(FENCE, "", text))
    calls = [line.split("#")[0].strip() for line in lines]
    calls = [re.sub(r"^\S*/autovoice", "autovoice", call) for call in calls]
    return [shlex.split(call) for call in calls if call.startswith("autovoice ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_and_options_that_documents_name_exist(document):
    for words in commands(document.read_text(encoding="utf-8")):
        command: click.Command = cli
        context = click.Context(cli)
        rest = words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            name, *rest = rest
            for alternative in name.split("|"):
                found = command.get_command(context, alternative)
                if found is None and hasattr(command, "default"):
                    found = command.get_command(context, command.default)
                assert found is not None, f"{' '.join(words)}: no command {alternative}"
            command = found
        known = {opt for param in command.params for opt in (*param.opts, *param.secondary_opts)}
        known |= {"--help", "-h"}
        for word in rest:
            if word.startswith("-") and not re.fullmatch(r"-?[\d.]*", word):
                assert word.split("=")[0] in known, f"{' '.join(words)}: no option {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_and_pictures_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#", target):
            assert (document.parent / target.partition("#")[0]).exists(), target


def test_the_file_tree_is_the_real_one():
    (tree,) = [body for body in fences("text") if "src/auto_voice/" in body]
    stack: list[tuple[int, Path]] = []
    seen = 0
    for line in tree.splitlines():
        name = line.strip().split("  ")[0].strip()
        depth = len(line) - len(line.lstrip())
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parent = stack[-1][1] if stack else ROOT
        for part in name.split(", "):
            assert (parent / part).exists(), f"{parent / part} in the file tree"
            seen += 1
        if name.endswith("/"):
            stack.append((depth, parent / name))
    assert seen > 20


def test_the_model_table_is_the_catalogs():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", README, re.MULTILINE))
    catalog = load_catalog()
    assert set(rows) == set(catalog.models)
    for name, licence in rows.items():
        assert licence.strip() == catalog.version(name).licence


def test_the_command_table_is_complete():
    rows = re.findall(r"^\| `autovoice (\w+)", README, re.MULTILINE)
    assert set(rows) == set(cli.list_commands(click.Context(cli)))


def test_make_targets_that_documents_name_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(r"`?make (\w+)`", document.read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
