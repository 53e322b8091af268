"""Isolation for every test: no variable, home, cache or .env of the developer reaches it.

Tests marked ``weights`` share the user's real model folder (or ``AUTOVOICE_TEST_MODEL_DIR``), so
that real weights are fetched once per machine and not once per test.
"""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from auto_voice import settings

if TYPE_CHECKING:
    from auto_voice.models import ModelRegistry

# The same examples in every run: a failure in CI is that of the commit, and what native decoders do
# with a random file is found by a longer search (`--hypothesis-profile=search`), not by chance.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("repeatable")

HAS_TORCH = find_spec("torch") is not None
_IMPORTS_TORCH = re.compile(r"^(import torch|from torch|from auto_voice\.training)\b", re.M)

pytest_plugins = ["pipeline_fixtures"]

HOME_VARIABLES = (
    "HOME",
    "USERPROFILE",
    "LOCALAPPDATA",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "HF_HOME",
)


@pytest.fixture(scope="session")
def weights_dir() -> Path:
    """The model folder that tests of real weights share, taken before the isolation below."""
    given = os.environ.get("AUTOVOICE_TEST_MODEL_DIR")
    return Path(given) if given else settings.get_settings().model_dir


@pytest.fixture(scope="session")
def weights_registry(weights_dir: Path) -> ModelRegistry:
    """A registry on ``weights_dir``; what one test loaded the next finds loaded."""
    from auto_voice.models import ModelRegistry

    return ModelRegistry(weights_dir, device="cpu", fallback="none", progress=False)


@pytest.fixture(autouse=True)
def _isolated(
    weights_dir: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    # pip must keep the index of the user's own configuration, which it looks up under the home.
    for pip_file in (".config/pip/pip.conf", ".pip/pip.conf"):
        if "PIP_CONFIG_FILE" not in os.environ and (Path.home() / pip_file).is_file():
            monkeypatch.setenv("PIP_CONFIG_FILE", str(Path.home() / pip_file))
    for name in [n for n in os.environ if n.startswith(("AUTOVOICE_", "HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    for name in HOME_VARIABLES:
        monkeypatch.setenv(name, str(home / name.lower()))
    monkeypatch.setattr(settings, "DOTENV", home / ".env")


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """Commands of a server send all logs to a stream of their own."""
    loggers = [logging.getLogger(name) for name in ("auto_voice", "uvicorn", "psycopg")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def pytest_collection_finish() -> None:
    """What the collected tests hold is never looked through for garbage again: conversions collect
    it after every piece, which took a tenth of a second each time."""
    gc.freeze()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where torch is not installed, files that import it are left out."""
    if HAS_TORCH or collection_path.suffix != ".py":
        return None
    return bool(_IMPORTS_TORCH.search(collection_path.read_text(encoding="utf-8"))) or None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    """Where torch is not installed, a test that ends because of that counts as skipped."""
    report = yield
    if not HAS_TORCH and report.failed and "torch" in report.longreprtext:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, "torch is not installed")
    return report
