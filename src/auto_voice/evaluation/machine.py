"""Where figures were taken: versions and hardware, without naming the host."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import Any

from auto_voice import __version__


def machine() -> dict[str, Any]:
    """Where and with what this runs, without naming the host."""
    return {
        "auto_voice": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
    }


def _commit() -> str:
    """Commit of the git checkout that the command runs in; empty outside of one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
