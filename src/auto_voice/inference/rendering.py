"""One source on its way through content encoder, converter and vocoder, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

from auto_voice.errors import ModelLoadError
from auto_voice.inference.chunking import Chunk, common_period, plan_chunks
from auto_voice.models.base import ContentEncoder, Converter, Vocoder
from auto_voice.types import FloatArray, Pitch, Voice


@dataclass(frozen=True)
class Rendering:
    """One source on its way through the stages."""

    content_encoder: ContentEncoder
    converter: Converter
    vocoder: Vocoder
    voice: Voice
    speech: FloatArray
    pitch: Pitch
    timings: dict[str, float]

    def plan(self, samples_out: int, longest_seconds: float) -> list[Chunk]:
        hop, rate = self.vocoder.hop_samples, self.content_encoder.sample_rate
        grid = common_period(
            self._frame_rate,
            Fraction(rate),
            Fraction(self.content_encoder.frame_rate),
            Fraction(self.pitch.frame_rate),
        )
        return plan_chunks(
            self.speech,
            rate,
            frames=-(-samples_out // hop),
            frame_rate=self._frame_rate,
            grid_frames=int(grid * self._frame_rate),
            longest_seconds=longest_seconds,
        )

    def render(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, FloatArray]]:
        """Each chunk with the audio of its whole context."""
        for chunk in chunks:
            start, stop = (
                Fraction(edge) / self._frame_rate
                for edge in (chunk.context_start, chunk.context_stop)
            )
            frames = chunk.context_stop - chunk.context_start
            with timed(self.timings, "content"):
                rate = self.content_encoder.sample_rate
                content = self.content_encoder.encode(
                    self.speech[int(start * rate) : -int(-stop * rate // 1)]
                )
            pitch = _from(self.pitch, int(start * Fraction(self.pitch.frame_rate)))
            with timed(self.timings, "convert"):
                mel = self.converter.convert(content, pitch, self.voice, frames)
            with timed(self.timings, "vocode"):
                audio = self.vocoder.synthesize(mel.values)[0]
            if len(audio) != frames * self.vocoder.hop_samples:
                raise ModelLoadError(
                    f"{self.vocoder.name} gave {len(audio)} samples for {frames} frames of "
                    f"{self.vocoder.hop_samples}; the model is damaged or of another kind."
                )
            yield chunk, audio

    @property
    def _frame_rate(self) -> Fraction:
        return Fraction(self.vocoder.sample_rate, self.vocoder.hop_samples)


def _from(pitch: Pitch, frame: int) -> Pitch:
    return Pitch(pitch.f0_hz[frame:], pitch.voiced[frame:], pitch.frame_rate)


@contextmanager
def timed(timings: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[step] = timings.get(step, 0.0) + time.perf_counter() - started
