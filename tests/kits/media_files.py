"""Recordings as phones, cameras, messengers and streams write them, made in memory."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

PICTURE = np.full((32, 32, 3), 128, np.uint8)


def media(
    *tracks: tuple[str, NDArray[np.float32]],
    container: str,
    rate: int = 16_000,
    options: dict[str, str] | None = None,
    picture: bool = False,
    **settings: Any,
) -> bytes:
    """One file with sound tracks of one channel.

    Args:
        tracks: FFmpeg's name of the coding, and ``(samples,)`` in [-1, 1], of each.
        container: FFmpeg's name of the file format.
        options: of the file format.
        picture: add a second of video.
        settings: set on each codec context.
    """
    for codec, _ in tracks:
        if codec not in av.codec.codecs_available:  # PyAV 19 has no encoder of AMR any more
            pytest.skip(f"this PyAV cannot write {codec}")
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=options or {}) as file:
        video = file.add_stream("mpeg4", rate=10) if picture else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        streams = []
        for codec, samples in tracks:
            stream = file.add_stream(codec, rate=rate, layout="mono")
            if codec.startswith("wma"):
                stream.bit_rate = 64_000
            for name, value in settings.items():
                setattr(stream.codec_context, name, value)
            streams.append((stream, samples))
        if video is not None:
            for _ in range(10):
                file.mux(video.encode(av.VideoFrame.from_ndarray(PICTURE)))
            file.mux(video.encode(None))
        for stream, samples in streams:
            for packet in _packets(stream, samples, rate):
                file.mux(packet)
    return out.getvalue()


def _packets(stream: Any, samples: NDArray[np.float32], rate: int) -> Any:
    stream.codec_context.open(strict=False)
    frame = av.AudioFrame.from_ndarray(samples[None, :].astype(np.float32), "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    resampler = av.AudioResampler(
        stream.codec_context.format, "mono", rate, stream.codec_context.frame_size or None
    )
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        yield from stream.encode(piece)
    yield from stream.encode(None)
