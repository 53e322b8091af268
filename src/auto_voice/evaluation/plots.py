"""Pictures and players of the page: SVG plots, spectrograms as PNG, audio as MP3 or WAV."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np
import soundfile

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.evaluation.results import Estimate, Metric
from auto_voice.evaluation.tables import figure, interval, title
from auto_voice.types import FloatArray, Pitch, Waveform

WIDTH = 320
RANGE_DB = 70.0
PLAYER_RATE = 22050
# Anchors of a perceptually rising colour map, dark violet to light yellow (RGB).
_COLOURS = np.array(
    [(8, 6, 28), (63, 20, 108), (142, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)],
    dtype=np.float64,
)


def strip_plot(metric: Metric, values: Sequence[float], estimate: Estimate) -> str:
    """Every pair as a dot on one axis, the figure as a line, its interval as a band."""
    known = [v for v in values if math.isfinite(v)]
    bounds = [b for b in (estimate.value, estimate.low, estimate.high) if math.isfinite(b)]
    low, high = _span([*known, *bounds])
    height, base = 74, 46

    def x(value: float) -> float:
        return 12 + (value - low) / (high - low) * (WIDTH - 24)

    parts = [f'<line class="axis" x1="12" y1="{base}" x2="{WIDTH - 12}" y2="{base}"/>']
    if math.isfinite(estimate.low):
        left, right = x(estimate.low), x(estimate.high)
        parts.append(
            f'<rect class="band" x="{left:.1f}" y="6" width="{max(right - left, 1.5):.1f}" '
            f'height="{base - 6}"/>'
        )
    # Dots of similar values are stacked by a fixed pattern, so the picture does not change.
    parts += [
        f'<circle class="dot" cx="{x(v):.1f}" cy="{12 + (i * 11) % 30}" r="2.6"/>'
        for i, v in enumerate(known)
    ]
    parts.append(
        f'<line class="mean" x1="{x(estimate.value):.1f}" y1="4" x2="{x(estimate.value):.1f}" '
        f'y2="{base}"/>'
    )
    for tick in _ticks(low, high):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{base + 18}" text-anchor="middle">'
            f"{figure(metric, tick)}</text>"
        )
    words = (
        f"{title(metric)}: {figure(metric, estimate.value)}, interval "
        f"{interval(metric, estimate)}, {len(known)} pairs"
    )
    return _svg(WIDTH, height, words, parts)


def scatter_plot(
    points: Sequence[tuple[float, float, str]], x_label: str, y_label: str, description: str
) -> str:
    """Pairs as dots with equal axes and the diagonal; dots carry their names as tooltips."""
    known = [p for p in points if math.isfinite(p[0]) and math.isfinite(p[1])]
    low, high = _span([v for p in known for v in p[:2]] or [0.0, 1.0])
    size, left, bottom = 330, 46, 40

    def x(v: float) -> float:
        return left + (v - low) / (high - low) * (size - left - 10)

    def y(v: float) -> float:
        return size - bottom - (v - low) / (high - low) * (size - bottom - 10)

    parts = [
        f'<line class="diagonal" x1="{x(low):.1f}" y1="{y(low):.1f}" x2="{x(high):.1f}" '
        f'y2="{y(high):.1f}"/>',
        f'<path class="axis" fill="none" d="M{left} 10V{size - bottom}H{size - 10}"/>',
    ]
    for tick in _ticks(low, high):
        below = f'y="{size - bottom + 16}" text-anchor="middle"'
        parts.append(f'<text x="{x(tick):.1f}" {below}>{tick:.2f}</text>')
        parts.append(
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>'
        )
    parts += [
        f'<circle class="dot" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.4">'
        f"<title>{escape(name)}: {a:.3f}, {b:.3f}</title></circle>"
        for a, b, name in known
    ]
    parts.append(
        f'<text x="{(size + left) / 2:.0f}" y="{size - 6}" text-anchor="middle">{escape(x_label)}'
        f'</text><text transform="translate(12 {(size - bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return _svg(size, size, description, parts)


def pitch_plot(source: Pitch, converted: Pitch) -> str:
    """Both melodies over time on a logarithmic axis; gaps are unvoiced."""
    width, height, left, bottom = 720, 150, 46, 24
    seconds = max(len(p.f0_hz) / p.frame_rate for p in (source, converted))
    voiced = [p.f0_hz[p.voiced] for p in (source, converted)]
    heard = np.concatenate(voiced)
    if not len(heard) or not seconds:
        return ""
    low, high = np.log(np.percentile(heard, 1)) - 0.1, np.log(np.percentile(heard, 99)) + 0.1

    def y(hz: float) -> float:
        position = (np.log(hz) - low) / (high - low)
        return float(8 + (1 - min(max(position, 0), 1)) * (height - bottom - 8))

    parts = []
    for hz in (60, 80, 100, 150, 200, 300, 400, 600, 800):
        if low < np.log(hz) < high:
            parts.append(
                f'<line class="rule" x1="{left}" y1="{y(hz):.1f}" x2="{width}" y2="{y(hz):.1f}"/>'
                f'<text x="{left - 6}" y="{y(hz) + 4:.1f}" text-anchor="end">{hz}</text>'
            )
    for pitch, name in ((source, "one under"), (converted, "two")):
        path, pen = [], False
        for i, (hz, on) in enumerate(zip(pitch.f0_hz, pitch.voiced, strict=True)):
            if on:
                at = left + i / pitch.frame_rate / seconds * (width - left)
                path.append(f"{'L' if pen else 'M'}{at:.1f} {y(float(hz)):.1f}")
            pen = bool(on)
        parts.append(f'<path class="track {name}" fill="none" d="{"".join(path)}"/>')
    step = _nice(seconds / 6)
    for k in range(int(seconds / step) + 1):
        at = left + k * step / seconds * (width - left)
        parts.append(
            f'<text x="{min(at, width - 14):.1f}" y="{height - 6}" text-anchor="middle">'
            f"{k * step:g} s</text>"
        )
    return _svg(width, height, "Pitch of source and conversion over time, Hz", parts)


def trend_plot(metric: Metric, estimates: Sequence[Estimate], labels: Sequence[str]) -> str:
    """A figure from run to run with its intervals; dots carry the run's label as tooltip."""
    bounds = [b for e in estimates for b in (e.value, e.low, e.high) if math.isfinite(b)]
    low, high = _span(bounds or [0.0, 1.0])
    width, height, left, bottom = 420, 150, 54, 20
    count = max(len(estimates) - 1, 1)

    def x(i: int) -> float:
        return left + 12 + i / count * (width - left - 24)

    def y(v: float) -> float:
        return 10 + (high - v) / (high - low) * (height - bottom - 10)

    parts = [f'<path class="axis" fill="none" d="M{left} 8V{height - bottom}H{width}"/>']
    for tick in _ticks(low, high):
        parts.append(
            f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{figure(metric, tick)}</text>"
        )
    known = [(i, e) for i, e in enumerate(estimates) if math.isfinite(e.value)]
    parts += [
        f'<line class="whisker" x1="{x(i):.1f}" y1="{y(e.low):.1f}" x2="{x(i):.1f}" '
        f'y2="{y(e.high):.1f}"/>'
        for i, e in known
        if math.isfinite(e.low)
    ]
    line = "".join(
        f"{'L' if k else 'M'}{x(i):.1f} {y(e.value):.1f}" for k, (i, e) in enumerate(known)
    )
    parts.append(f'<path class="track one" fill="none" d="{line}"/>')
    parts += [
        f'<circle class="dot" cx="{x(i):.1f}" cy="{y(e.value):.1f}" r="3.4"><title>'
        f"{escape(labels[i])}: {figure(metric, e.value)}</title></circle>"
        for i, e in known
    ]
    return _svg(width, height, f"{title(metric)} over {len(known)} runs", parts)


def _svg(width: float, height: float, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low < 1e-9:
        margin = abs(low) * 0.05 or 0.05
        return low - margin, high + margin
    margin = (high - low) * 0.04
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    step = _nice((high - low) / 5)
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def _nice(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 5, 10) if step <= m * power * (1 + 1e-9))


def spectrogram_png(audio: Waveform, *, max_width: int = 720) -> str:
    """Data URI of an 80-band mel spectrogram, low frequencies at the bottom, 70 dB deep."""
    samples = resample(audio.samples, audio.sample_rate, HIFIGAN_MEL.sample_rate)
    decibels = log_mel(samples, HIFIGAN_MEL) * (20 / np.log(10))
    merge = -(-decibels.shape[1] // max_width)
    if merge > 1:
        decibels = np.maximum.reduceat(decibels, np.arange(0, decibels.shape[1], merge), axis=1)
    level = np.clip((decibels - decibels.max()) / RANGE_DB + 1, 0, 1)
    image = np.rint(level[::-1] * 255).astype(np.uint8)
    return _uri("image/png", _indexed_png(image))


def player_audio(audio: Waveform, *, seconds: float) -> tuple[str, int]:
    """Data URI of the first ``seconds``, MP3 where the installed libsndfile writes it, else WAV.

    Returns:
        The URI and its number of characters.
    """
    samples = audio.samples[: round(seconds * audio.sample_rate)]
    samples = np.clip(resample(samples, audio.sample_rate, PLAYER_RATE), -1, 1)
    mp3 = "MP3" in soundfile.available_formats()
    uri = _uri("audio/mpeg" if mp3 else "audio/wav", _encoded(samples, "MP3" if mp3 else "WAV"))
    return uri, len(uri)


def _encoded(samples: FloatArray, kind: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, PLAYER_RATE, format=kind)
    return out.getvalue()


def _indexed_png(image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """``(rows, columns)`` of palette indices to a PNG file."""
    height, width = image.shape
    at = np.linspace(0, len(_COLOURS) - 1, 256)
    steps = np.arange(len(_COLOURS))
    palette = np.stack([np.interp(at, steps, c) for c in _COLOURS.T], axis=1)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image], axis=1)  # filter 0 in front
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", np.rint(palette).astype(np.uint8).tobytes()),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
