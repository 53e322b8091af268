from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray


@pytest.fixture
def wav(tmp_path: Path) -> Callable[..., Path]:
    """Write samples to a file and give its path; the format follows the name."""

    def write(
        samples: NDArray[np.float32],
        rate: int = 16_000,
        name: str = "in.wav",
        subtype: str | None = None,
        format: str | None = None,
    ) -> Path:
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype=subtype, format=format)
        return path

    return write
