"""Recordings as a picture: log-mel spectrograms one above the other, on one time axis."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel, mel_filters
from auto_voice.audio.pitch import extract_pitch
from auto_voice.audio.resample import resample
from auto_voice.errors import AudioOutputError, MissingDependencyError, install_hint, reason
from auto_voice.types import Waveform

# Width and height of one spectrogram.
PANEL_INCHES = (9.0, 1.9)
# The upper half of the axis stays free, so that the melody lies over the lower bands.
F0_RANGE_HZ = (50.0, 2000.0)
F0_COLOUR = "cyan"


def draw_spectrograms(
    recordings: Mapping[str, Waveform], path: str | Path, *, seconds: float | None = None
) -> Path:
    """Write a PNG with one panel a recording: mel spectrogram in dB, and the F0 track over it.

    Args:
        recordings: title to recording, top to bottom.
        seconds: show no more than so much of each.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        AudioOutputError: ``path`` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"matplotlib is not installed; run: {install_hint('plot')}"
        ) from error
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width, height * len(recordings)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(recordings), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, recording) in zip(panels, recordings.items(), strict=True):
        _draw(panel, title, _head(recording, seconds))
    panels[-1].set_xlabel("time, s")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format="png")
    target = Path(path)
    try:
        target.write_bytes(picture.getvalue())
    except OSError as error:
        target.unlink(missing_ok=True)
        raise AudioOutputError(
            f"{target} cannot be written ({reason(error)}); name another output."
        ) from error
    return target


def _head(recording: Waveform, seconds: float | None) -> Waveform:
    stop = None if seconds is None else round(seconds * recording.sample_rate)
    return Waveform(recording.samples[:stop], recording.sample_rate)


def _draw(panel: Any, title: str, recording: Waveform) -> None:
    spec = HIFIGAN_MEL
    levelled = recording.samples * gain_to_speech_level(recording.samples, recording.sample_rate)
    mel = log_mel(resample(levelled, recording.sample_rate, spec.sample_rate), spec)
    decibels = mel * (20 / np.log(10))
    loudest = float(decibels.max())
    panel.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=loudest - 80,
        vmax=loudest,
        extent=(0, recording.seconds, -0.5, spec.bands - 0.5),
    )
    ticks_hz = np.array([500, 1000, 2000, 4000])
    panel.set_yticks(_mel_band(ticks_hz), [f"{hz / 1000:g}" for hz in ticks_hz])
    panel.set_ylabel("kHz")
    panel.set_title(title, loc="left", fontsize=10)
    pitch = extract_pitch(levelled, recording.sample_rate)
    track_hz = np.where(pitch.voiced, pitch.f0_hz, np.nan)
    melody = panel.twinx()
    melody.set_yscale("log")
    melody.set_ylim(*F0_RANGE_HZ)
    melody.set_yticks([100, 200, 400], ["100", "200", "400"])
    melody.set_yticks([], minor=True)
    melody.set_ylabel("F0, Hz", color=F0_COLOUR)
    melody.plot(np.arange(len(track_hz)) / pitch.frame_rate, track_hz, F0_COLOUR, linewidth=1.5)
    melody.set_xlim(0, recording.seconds)


def _mel_band(hz: ArrayLike) -> NDArray[np.float64]:
    """The place of a frequency on the axis of bands."""
    bank = mel_filters(HIFIGAN_MEL)
    bins_hz = np.linspace(0, HIFIGAN_MEL.sample_rate / 2, bank.shape[1])
    centres_hz = (bank @ bins_hz) / bank.sum(axis=1)
    return np.interp(np.asarray(hz, dtype=np.float64), centres_hz, np.arange(len(bank)))
