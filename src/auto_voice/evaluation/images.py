"""Sound as data URIs for a self-contained page: spectrograms as PNG, audio as MP3 or WAV."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import soundfile

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.types import FloatArray, Waveform

RANGE_DB = 70.0
PLAYER_RATE = 22050
# Anchors of a perceptually rising colour map, dark violet to light yellow (RGB).
_COLOURS = np.array(
    [(8, 6, 28), (63, 20, 108), (142, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)],
    dtype=np.float64,
)


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
