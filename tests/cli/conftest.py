"""How the tests of the command line call it."""

from __future__ import annotations

import pytest

from auto_voice.cli import main


@pytest.fixture
def run(capsys):
    """Runs ``autovoice ARGS``: ``(exit code, stdout, stderr)``."""

    def call(*args: str):
        code = main.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call
