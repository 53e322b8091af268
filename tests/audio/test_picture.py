from __future__ import annotations

import sys

import numpy as np
import pytest

from auto_voice.audio.picture import draw_spectrograms
from auto_voice.errors import MissingDependencyError
from auto_voice.types import Waveform


def read_png(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def tone(hz: float, seconds: float = 2.0) -> Waveform:
    time_s = np.arange(int(seconds * 16000)) / 16000
    harmonics = sum(np.sin(2 * np.pi * hz * k * time_s) / k for k in range(1, 10))
    return Waveform((0.1 * harmonics).astype(np.float32), 16000)


def melody_height(picture) -> float:
    """Mean row of the cyan line, 0 at the top, 1 at the bottom; the label beside it left out."""
    inside = picture[:, 60:-120]
    cyan = (inside[..., 0] < 0.3) & (inside[..., 1] > 0.8) & (inside[..., 2] > 0.8)
    assert cyan.sum() > 100
    return float(np.nonzero(cyan)[0].mean() / len(picture))


@pytest.mark.slow
def test_a_higher_voice_is_drawn_higher(tmp_path):
    low = read_png(draw_spectrograms({"low": tone(110)}, tmp_path / "low.png"))
    high = read_png(draw_spectrograms({"high": tone(330)}, tmp_path / "high.png"))
    assert melody_height(high) < melody_height(low)


def test_one_panel_a_recording(tmp_path):
    one = read_png(draw_spectrograms({"a": tone(110)}, tmp_path / "1.png", seconds=1))
    two = {"a": tone(110), "b": tone(220, 1.0)}
    assert len(read_png(draw_spectrograms(two, tmp_path / "2.png"))) > 1.8 * len(one)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"auto-voice\[plot\]"):
        draw_spectrograms({"a": tone(110)}, tmp_path / "a.png")
