"""Recordings into samples, and samples into files.

What FFmpeg decodes of a file is what comes out, to the sample. Every bad file ends in one typed
sentence. A file that is shorter than its own header says is refused, because converting half a
recording without a word is worse than asking for a complete copy (``allow_truncated=True`` takes
what is there and notes it). MP3 without a Xing/Info header, raw AAC and streams carry no length, so
that a cut cannot be told from a short recording there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from auto_voice.audio.encoding import choose_encoding, ensure_writable
from auto_voice.audio.reading import (
    SILENCE_PEAK,
    AudioInfo,
    AudioSource,
    RecordingReader,
    dbfs,
)
from auto_voice.audio.writing import AudioWriter, fit_to_output, write_audio
from auto_voice.errors import AudioContentError
from auto_voice.types import FloatArray, Waveform

__all__ = [
    "AudioInfo",
    "AudioSource",
    "AudioWriter",
    "choose_encoding",
    "ensure_writable",
    "fit_to_output",
    "iter_blocks",
    "probe",
    "read_audio",
    "write_audio",
]

# A recording that is read whole stays in memory: three hours are 2 GB at 48 kHz.
MAX_SECONDS = 3 * 3600.0
# Decoded at once: 1.5 s at 44.1 kHz.
_BLOCK_FRAMES = 1 << 16


def probe(source: AudioSource) -> AudioInfo:
    """Format, rate, channels and length without decoding the sound.

    Raises:
        AudioError: as :func:`read_audio`, where the header alone tells.
    """
    with RecordingReader(source, allow_truncated=True) as recording:
        return recording.info()


def read_audio(
    source: AudioSource,
    *,
    sample_rate: int | None = None,
    max_seconds: float | None = MAX_SECONDS,
    allow_truncated: bool = False,
    allow_silence: bool = False,
) -> Waveform:
    """The whole recording as one channel.

    Memory grows with the result alone: the file is decoded, mixed down and resampled in blocks.

    Args:
        source: a path, the bytes of a file, or a binary stream (read from where it stands; one
            that cannot seek is copied to memory first).
        sample_rate: Hz of the result; None keeps the file's.
        max_seconds: refuse longer recordings; None for no limit.
        allow_truncated: take what is there of a truncated file, with a note.
        allow_silence: accept a recording without sound.

    Returns:
        ``(samples,)`` float32 with notes on everything that was changed or looks wrong.

    Raises:
        AudioNotFoundError: no such file.
        AudioFormatError: not audio, truncated, damaged, not permitted, not a regular file.
        AudioContentError: empty, too long, not finite, silent.
    """
    with RecordingReader(source, allow_truncated=allow_truncated) as recording:
        blocks = list(recording.blocks(_BLOCK_FRAMES, sample_rate, max_seconds))
        samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        if not allow_silence and recording.peak < SILENCE_PEAK:
            raise AudioContentError(
                f"{recording.name} holds only silence (peak {dbfs(recording.peak)}); "
                "check the microphone or choose another recording."
            )
        return Waveform(samples, sample_rate or recording.sample_rate, recording.notes())


def iter_blocks(
    source: AudioSource,
    block_seconds: float = 10.0,
    sample_rate: int | None = None,
    *,
    max_seconds: float | None = None,
    allow_truncated: bool = False,
) -> Iterator[FloatArray]:
    """The recording as ``(samples,)`` float32 blocks of ``block_seconds`` (the last is shorter).

    Joined they equal :func:`read_audio` of the same file; memory is that of one block however
    long the recording is. Errors of the content (NaN, truncation that only decoding shows) come
    when their block is reached; silence is not refused.

    Raises:
        AudioError: as :func:`read_audio`.
        ValueError: ``block_seconds`` is not positive.
    """
    if not block_seconds > 0:
        raise ValueError(f"block_seconds must be positive, not {block_seconds}")
    with RecordingReader(source, allow_truncated=allow_truncated) as recording:
        size = max(1, round(block_seconds * (sample_rate or recording.sample_rate)))
        held: list[FloatArray] = []
        count = 0
        for block in recording.blocks(_BLOCK_FRAMES, sample_rate, max_seconds):
            held.append(block)
            count += len(block)
            if count >= size:
                joined = np.concatenate(held)
                whole = count - count % size
                yield from (joined[at : at + size] for at in range(0, whole, size))
                held, count = [joined[whole:]], count - whole
        if count:
            yield np.concatenate(held)
