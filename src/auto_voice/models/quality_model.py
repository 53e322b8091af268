"""Quality without a reference: DNSMOS P.835, three mean opinion scores of a recording.

Reddy, Gopal, Cutler: "DNSMOS P.835: a non-intrusive perceptual objective speech quality metric to
evaluate noise suppressors" (ICASSP 2022). The network hears 9.01 s at 16 kHz; a quadratic per
score maps its output to the scale of the listening test, 1 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from auto_voice.errors import AudioContentError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.sessions import Network, open_model
from auto_voice.types import SPEECH_RATE, FloatArray

# 9.01 s at 16 kHz, the length that DNSMOS was trained on, a second apart as its authors do it.
WINDOW_SAMPLES = 144_160
HOP_SAMPLES = SPEECH_RATE
# Published calibration, highest power first: rows speech, background, overall.
_CALIBRATION = np.array(
    [
        [-0.08397278, 1.22083953, 0.0052439],
        [-0.13166888, 1.60915514, -0.39604546],
        [-0.06766283, 1.11546468, 0.04602535],
    ]
)


@dataclass(frozen=True)
class Quality:
    """Mean opinion scores, 1 (bad) to 5 (excellent).

    Attributes:
        overall: OVRL. speech: SIG, how undistorted the voice is. background: BAK, how little else
            is heard.
    """

    overall: float
    speech: float
    background: float


class QualityModel:
    """DNSMOS P.835 of recordings.

    Args:
        network: with the input ``input_1`` ``(n, 144160)``; ``(n, 3)`` raw scores.
        name: ``name@version`` of the weights.
    """

    sample_rate = SPEECH_RATE

    def __init__(self, network: Network, name: str = "quality_dnsmos") -> None:
        self.name = name
        self._network = network

    def score(self, samples: FloatArray) -> Quality:
        """The scores of ``(samples,)`` at 16 kHz, averaged over 9.01 s windows one second apart.

        A shorter recording is doubled until it fills one window. Samples beyond full scale are
        limited to it, as a player would.

        Raises:
            AudioContentError: the recording is empty or not finite.
        """
        x = np.asarray(samples, dtype=np.float32).reshape(-1)
        if not len(x) or not np.isfinite(x).all():
            raise AudioContentError("The recording is empty or not finite; give audio to judge.")
        x = np.clip(x, -1, 1)
        while len(x) < WINDOW_SAMPLES:
            x = np.concatenate([x, x])
        # Whole seconds count: the published script scores floor(seconds) - 9 windows, at least one.
        windows = max(1, len(x) // SPEECH_RATE - 9)
        raw = [
            self._network(x[None, s : s + WINDOW_SAMPLES])[0]
            for s in range(0, windows * HOP_SAMPLES, HOP_SAMPLES)
        ]
        speech, background, overall = _calibrate(np.asarray(raw, dtype=np.float64)).mean(0)
        return Quality(overall=float(overall), speech=float(speech), background=float(background))


def _calibrate(raw: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``(windows, 3)`` network outputs to opinion scores."""
    a, b, c = _CALIBRATION.T
    return np.asarray((a * raw + b) * raw + c)


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> QualityModel:
    """The model of ``files[version.files[0].file]``, an ONNX graph; it runs on the CPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelLoadError: the file is no such graph.
    """
    network = open_model(files[version.files[0].file], version.key, inputs=("input_1",))
    return QualityModel(network, version.key)
