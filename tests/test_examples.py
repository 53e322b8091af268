"""Every example runs, from another folder, with warnings as errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def run(script: Path, folder: Path, *args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *args],
        cwd=folder,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples():
    assert "model_integration_example.py" in {path.name for path in EXAMPLES}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_examples_run_with_mock_models_and_leave_nothing_behind(script, tmp_path):
    assert run(script, tmp_path).strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.weights
def test_the_model_example_runs_with_real_models(tmp_path, weights_dir):
    script = next(path for path in EXAMPLES if path.name == "model_integration_example.py")
    out = run(script, tmp_path, "--real", AUTOVOICE_MODEL_DIR=str(weights_dir))
    assert "hifigan_universal@1.0" in out
    assert "mock: False" in out
