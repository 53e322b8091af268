"""One source on its way through content encoder, converter and vocoder, piece by piece.

Everything that a stage would take from the whole recording (level, the mean of the content, the
melody) is given to it, so that a piece comes out as it would in the whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice import events
from auto_voice.audio.loudness import without_rumble
from auto_voice.errors import ModelLoadError
from auto_voice.inference.analysis import Analysis, noise_floor, pauses
from auto_voice.inference.chunking import (
    CONTEXT_SECONDS,
    HOP,
    Chunk,
    ContentWindows,
    common_period,
    halved,
    hop_size,
    out_of_memory,
    plan_chunks,
    release_memory,
    with_context,
)
from auto_voice.inference.controls import Controls
from auto_voice.inference.effects import (
    SourceShape,
    aperiodicity,
    cut,
    fill_pauses,
    filled,
    follow_level,
    scatter,
    source_shape,
    warp_formants,
)
from auto_voice.inference.inputs import SampleSource
from auto_voice.models.base import (
    ContentEncoder,
    Converter,
    CorrectingConverter,
    PartVocoder,
    RevoicingConverter,
    Vocoder,
)
from auto_voice.types import Content, FloatArray, Mel, Pitch, Voice

log = logging.getLogger(__name__)

# Mel frames that the vocoder hears on each side of a core: twice what HiFi-GAN looks at. It is by
# far the slowest stage, so it is spared the rest of the context.
VOCODER_CONTEXT_FRAMES = 32
SHORTEST_PIECE_SECONDS = 1.0
# Of content, long enough for every model.
REHEARSED_FRAMES = 8
# Pieces are this much shorter than what is converted whole: allocators cannot reuse all that
# pieces of other lengths left, and the peak over hours shall be that of the whole.
SMALLER = 0.8


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a source, ready for converter and vocoder; all tracks begin where it begins.

    Attributes:
        speech: ``(samples,)`` at the networks' level.
        sample_rate: of ``speech``, Hz.
        pitch: the melody that is to be spoken.
        own_pitch: the track of the source.
        pauses: ``(frames,)``, see :func:`auto_voice.inference.analysis.pauses`; one value for each
            mel frame of the piece.
        noise: ``(frames,)``, see :func:`auto_voice.inference.analysis.noise_floor`.
        low, high: mel frames that audio is made of; those around are context of the converter.
        first_frame: place of the piece in the whole, in mel frames.
    """

    speech: FloatArray
    sample_rate: int
    content: Content
    pitch: Pitch
    own_pitch: Pitch
    pauses: FloatArray
    noise: FloatArray
    low: int
    high: int
    first_frame: int


def spoken(
    piece: Piece,
    voice: Voice,
    controls: Controls,
    converter: Converter,
    vocoder: Vocoder,
    timings: dict[str, float],
    own: Voice | None = None,
) -> FloatArray:
    """``((high - low) * hop_samples,)`` of ``piece`` in ``voice``, as loud as its speech.

    Args:
        own: see :func:`drawn`.
        timings: seconds by step; grows.

    Raises:
        ModelLoadError: the vocoder gives another number of samples.
    """
    mel, source = drawn(piece, voice, controls, converter, timings, own)
    audio = vocoded(vocoder, mel, piece.low, piece.high, 0, timings)
    return finished(piece, audio, source, controls, vocoder, timings)


def drawn(
    piece: Piece,
    voice: Voice,
    controls: Controls,
    converter: Converter,
    timings: dict[str, float],
    own: Voice | None = None,
) -> tuple[Mel, SourceShape]:
    """The mel of all of ``piece`` in ``voice``, and what the result takes from the source.

    Args:
        own: the source's own voice, where it is known: see :func:`guidance`.
    """
    ratio, pitch = controls.formant_ratio, piece.pitch
    lower = Pitch(pitch.f0_hz / np.float32(ratio), pitch.voiced, pitch.frame_rate)
    with timed(timings, "convert"):
        frames = len(piece.pauses)
        mel = mel_in(voice, piece.content, lower, frames, converter, controls, own)
        mel = warp_formants(mel, ratio)
    with timed(timings, "level"):
        source = source_shape(piece.speech, piece.sample_rate, piece.pauses, piece.noise)
        return fill_pauses(mel, source), source


def mel_in(
    voice: Voice,
    content: Content,
    pitch: Pitch,
    frames: int,
    converter: Converter,
    controls: Controls,
    own: Voice | None,
) -> Mel:
    """``content`` in ``voice``, with guidance, second pass and correction where the converter asks
    for them.

    Args:
        frames: of the mel.
        own: see :func:`drawn`.
    """
    mel = converter.convert(content, pitch, voice, frames)
    share = guidance(converter, voice, controls)
    if own is None or not share:
        return corrected(converter, mel, voice)
    # At one pitch, known as well as each other, drawn by the same weights: they differ by nothing
    # but the voice.
    theirs = replace(
        own, log_f0_mean=voice.log_f0_mean, frames=own.frames if voice.frames else {},
        fine_tuning=voice.fine_tuning, fine_tuned_converter=voice.fine_tuned_converter,
    )  # fmt: skip
    start = converter.convert(content, pitch, theirs, frames)
    # A strength above 1 goes beyond the voice once, not with each pass.
    measured = guidance(converter, voice, Controls())
    if measured and isinstance(converter, RevoicingConverter) and converter.second_pass:
        first = corrected(converter, beyond(mel, start, measured), voice)
        again = converter.revoiced(content, first, start, voice, theirs)
        if again is not None:
            mel = converter.convert(again, pitch, voice, frames)
    return corrected(converter, beyond(mel, start, share), voice)


def rehearse(
    voice: Voice, content_encoder: ContentEncoder, converter: Converter, own: Voice | None
) -> None:
    """Lets the converter speak a few frames: it makes ready what it keeps for a voice.

    Args:
        own: see :func:`drawn`.
    """
    silence = np.zeros((REHEARSED_FRAMES, content_encoder.dims), np.float32)
    content = Content(silence, content_encoder.frame_rate, content_encoder.space)
    f0_hz, voiced = np.full(REHEARSED_FRAMES, 150, np.float32), np.ones(REHEARSED_FRAMES, np.bool_)
    pitch = Pitch(f0_hz, voiced, content_encoder.frame_rate)
    mel_in(voice, content, pitch, REHEARSED_FRAMES, converter, Controls(), own)


def corrected(converter: Converter, mel: Mel, voice: Voice) -> Mel:
    """``mel``, drawn in ``voice``, corrected where the converter knows how."""
    return converter.corrected(mel, voice) if isinstance(converter, CorrectingConverter) else mel


def guidance(converter: Converter, voice: Voice, controls: Controls) -> float:
    """How far the mel goes on past ``voice``, as a share of the way from the source's own voice.

    What the converter's record asks for, and what the strength exceeds 1 by. What the record says
    was measured with the converter as it is, so a voice that it was fine-tuned to gets none of it.
    """
    measured = 0.0 if voice.fine_tuning else float(getattr(converter, "guidance", 0.0))
    return measured + max(0.0, controls.strength - 1)


def beyond(mel: Mel, start: Mel, share: float) -> Mel:
    """``mel`` moved on by ``share`` of the way that led to it from ``start``.

    The converter draws the source's own voice from the same content, so what it could not help
    keeping of it is in both and what the voice changes is in the difference, of which a little more
    makes up for the rest (as classifier-free guidance does, Ho & Salimans 2022).
    """
    moved = mel.values + np.float32(share) * (mel.values - start.values)
    return replace(mel, values=moved.astype(np.float32))


def vocoded(
    vocoder: Vocoder, mel: Mel, low: int, high: int, context: int, timings: dict[str, float]
) -> FloatArray:
    """Audio of frames ``[low, high)``, made with ``context`` more on each side in sight.

    Raises:
        ModelLoadError: the vocoder gives another number of samples.
    """
    hop, values = vocoder.hop_samples, mel.values
    first, last = max(0, low - context), min(values.shape[1], high + context)
    seen = values[:, first:last]
    with timed(timings, "vocode"):
        if context and isinstance(vocoder, PartVocoder):
            audio = np.asarray(vocoder.synthesize_part(seen, low - first, high - first)[0])
        else:
            inside = slice((low - first) * hop, len(seen[0]) * hop - (last - high) * hop)
            audio = np.asarray(vocoder.synthesize(seen)[0][inside])
    if len(audio) != (high - low) * hop:
        raise ModelLoadError(
            f"{vocoder.name} gave {len(audio)} samples for {high - low} frames of "
            f"{hop}; the model is damaged or of another kind."
        )
    return audio


def finished(
    piece: Piece,
    audio: FloatArray,
    source: SourceShape,
    controls: Controls,
    vocoder: Vocoder,
    timings: dict[str, float],
) -> FloatArray:
    """``audio`` of the frames ``[low, high)`` of ``piece`` with breath, and as loud as ``source``.

    Args:
        source: of all of the piece.
    """
    if controls.breathiness:
        with timed(timings, "breath"):
            audio = _breathed(piece, audio, vocoder, controls.breathiness)
    with timed(timings, "level"):
        audio = without_rumble(audio, vocoder.sample_rate)
        part = source.part(piece.low, piece.high)
        return follow_level(audio, vocoder.hop_samples, part, controls.energy)


def _breathed(piece: Piece, audio: FloatArray, vocoder: Vocoder, amount: float) -> FloatArray:
    """``audio``, which is that of frames ``[low, high)``, with as much breath as the source has."""
    low, high, pitch = piece.low, piece.high, piece.pitch
    rate = vocoder.sample_rate / vocoder.hop_samples
    wanted = aperiodicity(
        piece.speech, piece.sample_rate, piece.own_pitch, rate, len(piece.pauses)
    )[low:high]
    skipped = round(low / rate * pitch.frame_rate)
    later = Pitch(pitch.f0_hz[skipped:], pitch.voiced[skipped:], pitch.frame_rate)
    made = aperiodicity(audio, vocoder.sample_rate, later, rate, high - low)
    share = np.clip((wanted - made) / np.maximum(1 - made, 1e-3), 0, 1)
    scattered: FloatArray = (share * amount).astype(np.float32)
    first = piece.first_frame + low
    return scatter(audio, scattered, vocoder.sample_rate, vocoder.hop_samples, first)


@dataclass(frozen=True)
class Rendering:
    """One source on its way through the stages.

    Attributes:
        voice: with the pitch that it will speak at.
        recording: the source at the content encoder's rate, at its own level.
        analysis: of ``recording``.
        pitch: the melody that is to be spoken.
        samples: of the result, at the vocoder's rate.
        timings: seconds by step; grows.
        own_voice: of the source, where it is known and the mel is led away from it.
        log_f0: of ``pitch``, filled.
        content: the content features of any part.
        pauses, noise: of ``recording``, see :func:`auto_voice.inference.analysis.pauses` and
            :func:`auto_voice.inference.analysis.noise_floor`.
    """

    content_encoder: ContentEncoder
    converter: Converter
    vocoder: Vocoder
    voice: Voice
    recording: SampleSource
    analysis: Analysis
    pitch: Pitch
    controls: Controls
    samples: int
    timings: dict[str, float]
    own_voice: Voice | None = None
    log_f0: FloatArray | None = field(init=False)
    content: ContentWindows = field(init=False)
    pauses: FloatArray = field(init=False)
    noise: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_f0", filled(self.pitch))
        content = ContentWindows(self.content_encoder, self.recording, self.analysis.gain)
        object.__setattr__(self, "content", content)
        hop = hop_size(self.recording.sample_rate)
        found = pauses(self.analysis.energies, hop, self.analysis.gain)
        object.__setattr__(self, "pauses", found)
        noise = noise_floor(self.analysis.energies, hop, self.analysis.gain)
        object.__setattr__(self, "noise", noise)

    @property
    def frames(self) -> int:
        """Mel frames of the whole."""
        return -(-self.samples // self.vocoder.hop_samples)

    def plan(self, longest_seconds: float) -> list[Chunk]:
        """Pieces that hold, with all their context, less than ``longest_seconds``.

        So the memory for hours is that for one recording of this length.
        """
        context = 2 * CONTEXT_SECONDS + float(self._grid_frames / self._frame_rate)
        seconds = len(self.recording) / self.recording.sample_rate
        core_seconds = max(longest_seconds / 2, SMALLER * longest_seconds - context)
        if seconds <= longest_seconds:
            core_seconds = longest_seconds
        return plan_chunks(
            self.analysis.energies,
            seconds,
            frames=self.frames,
            frame_rate=self._frame_rate,
            grid_frames=self._grid_frames,
            longest_seconds=core_seconds,
        )

    def between(self, edges: Sequence[int]) -> list[Chunk]:
        """Pieces between the mel frames ``edges``."""
        context = int(np.ceil(CONTEXT_SECONDS * self._frame_rate))
        grid = self._grid_frames
        return with_context(list(edges), self.frames, grid_frames=grid, context=context)

    def content_mean(self) -> FloatArray | None:
        """``(dims,)`` mean of the content over the whole; None where no stage needs it."""
        with timed(self.timings, "content"):
            return self.content.mean()

    def render(
        self, chunks: Sequence[Chunk], mean: FloatArray | None = None
    ) -> Iterator[tuple[Chunk, FloatArray]]:
        """Each chunk with audio; the chunk's context is that of the audio.

        Where the memory does not suffice for a piece, it and all that follow are cut into halves.

        Args:
            mean: from :meth:`content_mean`.

        Raises:
            ModelLoadError: the memory does not suffice for a second either.
        """
        waiting = list(chunks)
        while waiting:
            try:
                piece = self._piece(waiting[0], mean)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                waiting = self._smaller(waiting, error)
                continue
            waiting.pop(0)
            yield piece
            if waiting:
                del piece
                release_memory()

    def _piece(self, chunk: Chunk, mean: FloatArray | None) -> tuple[Chunk, FloatArray]:
        low = max(chunk.context_start, chunk.start - VOCODER_CONTEXT_FRAMES)
        high = min(chunk.context_stop, chunk.stop + VOCODER_CONTEXT_FRAMES)
        speech = self._speech(chunk)
        with timed(self.timings, "content"):
            content = self._content(chunk, mean)
        piece = Piece(
            speech=speech,
            sample_rate=self.recording.sample_rate,
            content=content,
            pitch=self._pitch(chunk),
            own_pitch=self._cut(self.analysis.pitch, chunk),
            pauses=self._by_frame(self.pauses, chunk),
            noise=self._by_frame(self.noise, chunk),
            low=low - chunk.context_start,
            high=high - chunk.context_start,
            first_frame=chunk.context_start,
        )
        audio = spoken(
            piece, self.voice, self.controls, self.converter, self.vocoder, self.timings,
            self.own_voice,
        )  # fmt: skip
        return replace(chunk, context_start=low, context_stop=high), audio

    def _by_frame(self, hops: NDArray[Any], chunk: Chunk) -> FloatArray:
        """``(hops,)`` of the recording as ``(frames,)`` of the chunk's context."""
        centres = np.arange(chunk.context_start, chunk.context_stop) + 0.5
        at = centres / float(self._frame_rate * HOP) - 0.5
        if len(hops) == 0 or len(at) == 0:
            return np.zeros(len(at), np.float32)
        # Hours have a million hops, of which a chunk needs a few.
        first = min(max(0, int(at[0])), len(hops) - 1)
        near = hops[first : int(at[-1]) + 2]
        return np.asarray(np.interp(at, np.arange(first, first + len(near)), near), np.float32)

    def _content(self, chunk: Chunk, mean: FloatArray | None) -> Content:
        rate = Fraction(self.content_encoder.frame_rate) / self._frame_rate
        stop = None if chunk.context_stop >= self.frames else int(chunk.context_stop * rate)
        return self.content.read(int(chunk.context_start * rate), stop, mean)

    def _speech(self, chunk: Chunk) -> FloatArray:
        """The chunk's context at the networks' level."""
        rate = self.recording.sample_rate
        start, stop = (
            Fraction(edge) / self._frame_rate * rate
            for edge in (chunk.context_start, chunk.context_stop)
        )
        end = len(self.recording) if chunk.context_stop >= self.frames else -int(-stop // 1)
        samples = self.recording.read(int(start), end)
        leveled: FloatArray = (samples * np.float32(self.analysis.gain)).astype(np.float32)
        return leveled

    def _pitch(self, chunk: Chunk) -> Pitch:
        return self._cut(self.pitch, chunk, self.log_f0)

    def _cut(self, pitch: Pitch, chunk: Chunk, log_f0: FloatArray | None = None) -> Pitch:
        start, stop = (
            Fraction(edge) / self._frame_rate * Fraction(pitch.frame_rate)
            for edge in (chunk.context_start, chunk.context_stop)
        )
        whole = chunk.context_start == 0 and chunk.context_stop >= self.frames
        end = len(pitch.voiced) if chunk.context_stop >= self.frames else -int(-stop // 1) + 1
        return cut(pitch, None if whole else log_f0, int(start), end)

    def _smaller(self, waiting: list[Chunk], error: BaseException) -> list[Chunk]:
        edges = halved([waiting[0].start, *(chunk.stop for chunk in waiting)])
        longest = max(b - a for a, b in pairwise(edges))
        if longest / float(self._frame_rate) < SHORTEST_PIECE_SECONDS:
            raise ModelLoadError(
                "The memory does not suffice even for a second at a time; close other programs or "
                "choose --device cpu."
            ) from error
        seconds = longest / float(self._frame_rate)
        log.warning("the memory is full: going on in pieces of at most %.1f s", seconds)
        self.content.forget()
        release_memory()
        return self.between(edges)

    @property
    def _frame_rate(self) -> Fraction:
        return Fraction(self.vocoder.sample_rate, self.vocoder.hop_samples)

    @property
    def _grid_frames(self) -> int:
        grid = common_period(
            self._frame_rate,
            Fraction(self.recording.sample_rate),
            Fraction(self.content_encoder.frame_rate),
            Fraction(self.pitch.frame_rate),
        )
        return int(grid * self._frame_rate)


@contextmanager
def timed(timings: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        with events.span(events.Stage(step)):
            yield
    finally:
        timings[step] = timings.get(step, 0.0) + time.perf_counter() - started
