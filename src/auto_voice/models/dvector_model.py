"""An independent speaker encoder: LSTM d-vectors that no converter of this project is trained on.

Conditioning a converter on GE2E embeddings flatters a similarity measured with GE2E; this one
judges from outside. Three LSTM layers of 768 on 40 log-mel bands, 0.8 s windows every 0.4 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import framed, spectra
from auto_voice.audio.mel import MelSpec, mel_filters
from auto_voice.errors import AudioContentError
from auto_voice.models.base import cosine
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.sessions import Network, open_model
from auto_voice.types import SPEECH_RATE, FloatArray

# Mel frames of 10 ms that the network embeds at once, half of them new.
WINDOW_FRAMES = 80
STRIDE_FRAMES = 40
# Bounds memory on hour-long input; the LSTM is independent from window to window.
BATCH_WINDOWS = 64
# Added to the power, since zero has no logarithm.
LOG_OFFSET = 1e-10
DVECTOR_MEL = MelSpec(
    sample_rate=SPEECH_RATE,
    n_fft=512,
    win_samples=400,
    hop_samples=160,
    bands=40,
    f_min_hz=0.0,
    f_max_hz=8000.0,
    power=2,
    log_floor=None,
)


class DVectorModel:
    """Speech at 16 kHz to ``(256,)`` d-vectors of unit norm.

    Args:
        network: with the input ``mel_window`` ``(n, 80, 40)``; ``(n, 256)``.
        name: ``name@version`` of the weights.
    """

    sample_rate = SPEECH_RATE
    dims = 256

    def __init__(self, network: Network, name: str = "speaker_dvector") -> None:
        self.name = name
        self._network = network

    def embed_utterance(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(256,)`` float32: windows normalised, averaged, normalised.

        Raises:
            AudioContentError: the recording is empty, silent or not finite.
        """
        x = np.asarray(samples, dtype=np.float32).reshape(-1)
        if not len(x) or not np.isfinite(x).all() or not np.abs(x).max() > 0:
            raise AudioContentError(
                "The recording is empty, silent or not finite; give speech to compare voices."
            )
        windows = _windows(log_mel_frames(x))
        total = np.zeros(self.dims, dtype=np.float64)
        for start in range(0, len(windows), BATCH_WINDOWS):
            batch = np.ascontiguousarray(windows[start : start + BATCH_WINDOWS])
            raw = self._network(batch)
            total += (raw / (np.linalg.norm(raw, axis=1, keepdims=True) + 1e-12)).sum(0)
        unit: FloatArray = (total / (np.linalg.norm(total) + 1e-12)).astype(np.float32)
        return unit

    def similarity(self, a: FloatArray, b: FloatArray) -> float:
        """Cosine of two embeddings, in [-1, 1]."""
        return cosine(a, b)


def log_mel_frames(samples: FloatArray) -> FloatArray:
    """``(samples,)`` to ``(frames, 40)`` log10 mel: 25 ms Hamming, 10 ms hop, no padding."""
    x = np.pad(samples, (0, max(0, DVECTOR_MEL.n_fft - len(samples))))
    frames = framed(x, DVECTOR_MEL.n_fft, DVECTOR_MEL.hop_samples)
    bank = mel_filters(DVECTOR_MEL)
    mel = np.empty((len(frames), DVECTOR_MEL.bands), dtype=np.float32)
    for at, spectrum in spectra(frames, _hamming()):
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        mel[at] = power @ bank.T
    return np.asarray(np.log10(mel + np.float32(LOG_OFFSET)))


def _windows(frames: FloatArray) -> FloatArray:
    """``(frames, 40)`` to ``(windows, 80, 40)``; less than one window is padded by zeros."""
    if len(frames) < WINDOW_FRAMES:
        frames = np.pad(frames, ((0, WINDOW_FRAMES - len(frames)), (0, 0)))
    view = np.lib.stride_tricks.sliding_window_view(frames, WINDOW_FRAMES, axis=0)
    return np.asarray(view[::STRIDE_FRAMES].transpose(0, 2, 1))


@lru_cache(maxsize=1)
def _hamming() -> NDArray[np.float32]:
    """Periodic Hamming window of 400 samples in the middle of 512."""
    phase = 2 * np.pi * np.arange(DVECTOR_MEL.win_samples) / DVECTOR_MEL.win_samples
    window = (0.54 - 0.46 * np.cos(phase)).astype(np.float32)
    before = (DVECTOR_MEL.n_fft - DVECTOR_MEL.win_samples) // 2
    window = np.pad(window, (before, DVECTOR_MEL.n_fft - DVECTOR_MEL.win_samples - before))
    window.flags.writeable = False
    return window


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> DVectorModel:
    """The encoder of ``files[version.files[0].file]``, an ONNX graph; it runs on the CPU.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelLoadError: the file is no such graph.
    """
    network = open_model(files[version.files[0].file], version.key, inputs=("mel_window",))
    return DVectorModel(network, version.key)
