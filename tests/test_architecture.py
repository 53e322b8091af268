"""The house rules that a reader relies on: imports go one way, and light imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "auto_voice"
FOUNDATION = {"types", "errors", "settings", "filesystem", "progress", "yaml_nodes", "events"}
# What each room may import besides itself.
MAY_IMPORT = {
    "audio": FOUNDATION,
    "models": FOUNDATION | {"audio"},
    "voices": FOUNDATION | {"audio", "models"},
    "inference": FOUNDATION | {"audio", "models", "voices"},
    "batch": FOUNDATION | {"audio", "models", "voices", "inference"},
    "training": FOUNDATION | {"audio", "models", "voices", "inference", "batch"},
    "evaluation": FOUNDATION | {"audio", "models", "voices", "inference", "batch"},
    "client": {"errors", "events"},
    "server": FOUNDATION | {"audio", "models", "voices", "inference", "batch"},
    "cli": FOUNDATION
    | {"audio", "models", "voices", "inference", "batch", "server", "training", "evaluation"},
}
HEAVY = ("torch", "onnxruntime", "transformers", "faster_whisper", "scipy", "pandas", "matplotlib")
TEST_ONLY = {"hypothesis", "playwright", "pytest", "schemathesis", "scipy"}


@cache
def syntax_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    """Rooms of auto_voice that a module imports, wherever in its code."""
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "auto_voice" and len(parts) > 1:
                yield parts[1]


def modules_imported_by(path: Path, modules: set[str]) -> set[str]:
    """Modules of auto_voice, by dotted name, that the module at ``path`` imports anywhere."""
    found = set()
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_two_modules_need_each_other() -> None:
    """Imports form no circle, inside rooms neither, those within functions included."""
    paths = {}
    for path in SOURCE.rglob("*.py"):
        parts = ("auto_voice", *path.relative_to(SOURCE).with_suffix("").parts)
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    left = {name: modules_imported_by(path, set(paths)) - {name} for name, path in paths.items()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_inward(room: str) -> None:
    allowed = MAY_IMPORT[room] | {room, "__version__"}
    wrong = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in sorted((SOURCE / room).rglob("*.py"))
        for name in imports_of(path)
        if name not in allowed
    ]
    assert not wrong


def test_what_only_the_tests_install_is_imported_nowhere() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(syntax_of(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & TEST_ONLY, path


def test_torch_is_imported_where_something_is_learnt_and_nowhere_else() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        if SOURCE / "training" in path.parents:
            continue
        for node in ast.walk(syntax_of(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "onnx"}, path


def test_the_foundation_imports_no_room() -> None:
    for name in FOUNDATION:
        assert set(imports_of(SOURCE / f"{name}.py")) <= FOUNDATION


def test_no_module_uses_relative_imports() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(syntax_of(path)):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = (
        f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import auto_voice",
        "from auto_voice.models import ModelRegistry; ModelRegistry()",
        "from auto_voice.models import ModelRegistry\n"
        "r = ModelRegistry(use_mock=True)\n"
        "r.load_hubert().extract_features([0.1] * 16000)\n"
        "r.load_hifigan().synthesize([[0.0] * 10] * 80)\n"
        "r.warmup_models(['speaker_encoder'])",
        "import auto_voice.cli.main",
    ],
    ids=["import", "registry", "mock", "cli"],
)
def test_light_use_loads_nothing_heavy(code: str) -> None:
    assert not loaded_after(code) & {*HEAVY, "pydantic", "huggingface_hub"}


def test_creating_a_registry_parses_no_yaml_and_touches_no_disk(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    code = f"from auto_voice.models import ModelRegistry; ModelRegistry({str(folder)!r})"
    assert not loaded_after(code) & {"yaml", "numpy", "filelock", "httpx2", "tqdm"}
    assert not folder.exists()
