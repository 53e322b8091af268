"""Live conversion: samples in, converted samples out, a fixed time later.

The models were trained on whole recordings, so each block is computed anew from a window of the
past: the content encoder is given ``PAST_SECONDS`` of it, converter and vocoder what their
receptive fields reach. A block is rendered when the source is known some time beyond its end, the
look-ahead; every stage uses as much of that as there is. Blocks cover fixed mel frames of the
stream, so the result does not depend on how the samples arrive, and neighbours fade into each
other within one frame.

What the conversion of a file takes from the whole recording (level, mean of the content, mean and
spread of the pitch) is estimated from what was heard so far.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.loudness import CEILING_DBTP, SPEECH_DBFS, active_level, limited
from auto_voice.audio.pitch import (
    FRAME_RATE,
    OCTAVE,
    PitchStream,
    corrected_by_sound,
    log_f0_statistics,
)
from auto_voice.audio.reading import HIGHEST_RATE, LOWEST_RATE
from auto_voice.audio.resample import part_needed, resampled_length, resampled_part
from auto_voice.errors import ConfigError
from auto_voice.inference.analysis import noise_floor, pauses
from auto_voice.inference.chunking import HOP, hop_energies, hop_size
from auto_voice.inference.controls import SOURCE, Controls
from auto_voice.inference.effects import moved, without_creak
from auto_voice.inference.rendering import Piece, drawn, finished, rehearse, timed, vocoded
from auto_voice.models.base import (
    ContentEncoder,
    Converter,
    PieceEncoder,
    StreamingEncoder,
    Vocoder,
)
from auto_voice.types import Content, FloatArray, Pitch, Voice
from auto_voice.voices.blending import blend_voices

log = logging.getLogger(__name__)

# Milliseconds of a block and of the source beyond it that are used unless told otherwise. With 58
# ms of look-ahead DNSMOS falls by 0.07; blocks of 160 and 110 ms of it raise it by 0.03.
BLOCK_MS, LOOKAHEAD_MS = 140.0, 93.0
# What may be chosen. Above the last a file is converted better.
SHORTEST_BLOCK_MS, LONGEST_MS = 10.0, 2000.0
# Seconds of the past that the content encoder is given, and that the pitch detector is given.
PAST_SECONDS, PITCH_SECONDS = 2.0, 1.0
# Mel frames of the past that the converter and the vocoder look at. A converter's receptive field
# is wider, 38 frames: what lies beyond 12 changes a mel by less than 0.001 nats.
CONVERTER_FRAMES, VOCODER_FRAMES = 12, 14
# Seconds of content features that reach as far.
CONTEXT_SECONDS = 0.4
# Frames over which a block fades into the next.
FADE_FRAMES = 1
# Frames of its own result that a block is given: what the level of a frame is taken over, see
# effects.CONTOUR_FRAMES, and what the filter of rumble looks at. And frames that are made beyond
# the fade, for the same.
KEPT_FRAMES, EDGE_FRAMES = 8, 2
# Seconds after which what was heard of the speaker is forgotten.
MEMORY_SECONDS = 30.0
# Frames of the content whose mean is assumed before any is known: those of a second.
PRIOR_FRAMES = 50
# dB between loud and soft frames from which on somebody has spoken; before, the level of the
# networks is assumed.
SPOKEN_DB = 15.0
# Frames of content on each side of speech that count as speech for the mean.
AROUND_FRAMES = 10
# dB below the speech level down to where a frame counts as speech.
ACTIVE_DB = 30.0
# Milliseconds of finished sound that a session keeps against blocks that take longer than others.
MARGIN_MS = 30.0
# By how much that grows when it did not suffice, up to how much, and the seconds without drop-outs
# after which a tenth of it is tried less.
MARGIN_GROWTH, MOST_MARGIN_MS, CALM_SECONDS = 1.5, 200.0, 30.0
# By how much longer than the first block later ones take, as a share of it, and the seconds of
# which the times of blocks are remembered.
FIRST_GROWTH, TIMES_SECONDS = 0.6, 30.0
# Whole blocks that may wait while one is converted; what comes then is too late.
MOST_WAITING_BLOCKS = 2
# Seconds over which sound that is skipped fades into what follows, and over which a session looks
# how much finished sound it never needed.
SPLICE_SECONDS, LEVEL_SECONDS = 0.005, 3.0
# Seconds between two warnings.
SAY_SECONDS = 5.0
# Blocks that are converted before the first word, to make ready and to see how long one takes.
WARM_UP_BLOCKS = 4
# Durations of blocks that are kept for the report.
KEPT_BLOCKS = 1024


@dataclass(frozen=True)
class StreamReport:
    """How a stream has run.

    Attributes:
        seconds: of the source that were converted.
        rtf: seconds of work for a second of the source.
        stages: the same by step.
        blocks: that were converted.
        late_blocks: that took longer than they last.
        block_ms: median, 95th percentile and longest of the last thousand blocks' work.
        dropped_blocks: that were left out because the stream fell behind.
        dropouts: times that the output had nothing to play.
    """

    seconds: float
    rtf: float
    stages: Mapping[str, float]
    blocks: int
    late_blocks: int
    block_ms: tuple[float, float, float]
    dropped_blocks: int = 0
    dropouts: int = 0


class SpeakerEstimate:
    """Level, mean content and pitch of who speaks, from what was heard in the last half minute.

    Args:
        dims: of the content.
        known: who speaks, where a recording of them was given.
        known_mean: ``(dims,)`` mean of the content in it.
    """

    def __init__(self, dims: int, known: Voice | None, known_mean: FloatArray | None) -> None:
        self._powers: deque[float] = deque(maxlen=round(MEMORY_SECONDS / (2 * float(HOP))))
        self._log_f0: NDArray[np.float64] = np.zeros(0)
        self._most_frames = round(MEMORY_SECONDS * FRAME_RATE)
        self._total = np.zeros(dims) if known_mean is None else known_mean * float(PRIOR_FRAMES)
        self._weight = float(PRIOR_FRAMES)
        if known is not None and "pitch" in known.frames:
            log_f0, voiced = known.frames["pitch"].T
            self._log_f0 = log_f0[voiced > 0.5][-self._most_frames :].astype(np.float64)
        self._update_gain()

    def hear_level(self, powers: NDArray[np.float64]) -> None:
        """The mean squares of the next frames of 20 ms."""
        self._powers.extend(powers.tolist())
        self._update_gain()

    def hear_pitch(self, pitch: Pitch) -> None:
        """The next frames, without creak."""
        heard = np.log(pitch.f0_hz[pitch.voiced].astype(np.float64))
        self._log_f0 = np.concatenate([self._log_f0, heard])[-self._most_frames :]

    def hear_content(self, features: FloatArray, frame_rate: float) -> None:
        """``(frames, dims)`` of the next frames in which somebody speaks."""
        room = MEMORY_SECONDS * frame_rate
        kept = max(0.0, min(1.0, (room - len(features)) / self._weight))
        self._total = self._total * kept + features.sum(axis=0, dtype=np.float64)
        self._weight = self._weight * kept + len(features)

    def _update_gain(self) -> None:
        powers = np.array(self._powers or [1.0]) + 1e-12
        loud, soft = np.percentile(powers, (99, 10))
        spoken = loud > soft * 10 ** (SPOKEN_DB / 10)
        self.gain = float(10 ** ((SPEECH_DBFS - active_level(powers)) / 20)) if spoken else 1.0

    @property
    def content_mean(self) -> FloatArray:
        """``(dims,)``."""
        return np.asarray(self._total / self._weight, np.float32)

    @property
    def log_f0(self) -> tuple[float, float] | None:
        """Mean and spread of ln(F0 in Hz); None before anything voiced."""
        track = np.exp(self._log_f0).astype(np.float32)
        return log_f0_statistics(Pitch(track, np.ones(len(track), np.bool_), FRAME_RATE))


@dataclass(frozen=True, eq=False)
class StreamSetup:
    """Everything that a stream needs.

    Attributes:
        content_encoder, converter, vocoder: the loaded models.
        voice: the target.
        own_voice: of who speaks, where it is known: the result is right from the first word on,
            and the strength can be other than 1.
        sample_rate, output_rate: of what goes in and comes out, Hz.
        block_ms: how much is converted at once.
        lookahead_ms: how far beyond a block the source is known when it is converted.
    """

    content_encoder: ContentEncoder
    converter: Converter
    vocoder: Vocoder
    voice: Voice
    own_voice: Voice | None = None
    controls: Controls = field(default_factory=Controls)
    sample_rate: int = 48_000
    output_rate: int = 48_000
    block_ms: float = BLOCK_MS
    lookahead_ms: float = LOOKAHEAD_MS

    def __post_init__(self) -> None:
        for name in ("sample_rate", "output_rate"):
            rate = getattr(self, name)
            if not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise ConfigError(
                    f"{name} must lie between {LOWEST_RATE} and {HIGHEST_RATE} Hz, not {rate}."
                )
        for name, low in (("block_ms", SHORTEST_BLOCK_MS), ("lookahead_ms", 0.0)):
            if not low <= getattr(self, name) <= LONGEST_MS:
                raise ConfigError(
                    f"{name} must lie between {low:g} and {LONGEST_MS:g}, not "
                    f"{getattr(self, name)}."
                )
        check_live(self.controls, self.own_voice)


def check_live(controls: Controls, own_voice: Voice | None) -> None:
    """Raises ConfigError for controls that need the whole recording."""
    if controls.trim or controls.denoise_db:
        name = "trim" if controls.trim else "denoise_db"
        raise ConfigError(f"{name} needs the whole recording; leave it out of a live conversion.")
    if controls.loudness not in (None, SOURCE):
        raise ConfigError(
            "a live conversion is as loud as its source; leave loudness out, or set the level of "
            "the output device."
        )
    if controls.strength != 1 and own_voice is None:
        raise ConfigError(
            "a strength other than 1 needs to know your own voice; give a recording of it "
            "(own_voice, on the command line --own-voice)."
        )


class LiveStream:
    """One live conversion; :meth:`change` may be called from another thread than the rest.

    Every sample of the source comes out once and in its place: what :meth:`push` and :meth:`flush`
    return, joined, is as long as the source and lies where the source lies.

    Attributes:
        models: stage to the exact ``name@version`` that runs.
        notes: what there is to say of models and voice, one sentence each.
    """

    def __init__(
        self,
        setup: StreamSetup,
        models: Mapping[str, str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.models, self.notes = dict(models or {}), notes
        self._setup = setup
        self._encoder, self._vocoder = setup.content_encoder, setup.vocoder
        self._rate = setup.content_encoder.sample_rate
        self._hop_seconds = Fraction(setup.vocoder.hop_samples, setup.vocoder.sample_rate)
        self._block = max(1, round(setup.block_ms / 1000 / self._hop_seconds))
        self._lookahead = math.ceil(Fraction(setup.lookahead_ms) / 1000 / self._hop_seconds)
        self._content_frame = round(self._rate / self._encoder.frame_rate)
        self._detector = PitchStream()
        encoder = self._encoder
        self._remembering = encoder.stream() if isinstance(encoder, StreamingEncoder) else None
        # Content frames up to which the source is known for good, and the last features of them.
        self._known = 0
        self._features = np.zeros((0, encoder.dims), np.float32)
        self._speaker = SpeakerEstimate(
            self._encoder.dims, setup.own_voice, self._mean_content(setup.own_voice)
        )
        self._changing = threading.Lock()
        self._chosen = (setup.voice, setup.controls)
        self._voice = self._towards(*self._chosen)
        # Of the source at its own rate, and at the encoder's: samples, and the place of the first.
        self._raw, self._raw_first = np.zeros(0, np.float32), 0
        self._speech, self._first = np.zeros(0, np.float32), 0
        self._done = 0
        self._given = 0
        self._heard = 0
        self._fading = np.zeros(0, np.float32)
        # As the vocoder gave it: the last frames before the next block, and those of the fade.
        self._made = np.zeros(0, np.float32)
        # What the vocoder looks back at.
        self._mel = np.zeros((setup.vocoder.bands, 0), np.float32)
        self._ended = False
        self._timings: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=KEPT_BLOCKS)
        self._blocks = self._late = 0

    @property
    def sample_rate(self) -> int:
        """Of what is pushed, Hz."""
        return self._setup.sample_rate

    @property
    def output_rate(self) -> int:
        """Of what comes out, Hz."""
        return self._setup.output_rate

    @property
    def block_seconds(self) -> float:
        """Of the source in a block: the whole number of mel frames nearest to what was asked."""
        return float(self._block * self._hop_seconds)

    @property
    def latency_ms(self) -> float:
        """Milliseconds from a sample of the source to its result, without the time of computing."""
        return 1000 * self._needed(self._block) / self._setup.sample_rate

    def warm_up(self, blocks: int = WARM_UP_BLOCKS) -> float:
        """Seconds that a block takes on this machine now: the least of some after the first.

        They go through another stream of the same kind. What a model makes ready when it is first
        used is there afterwards, and not in the time of the first word.
        """
        rehearse(self._voice, self._encoder, self._setup.converter, self._setup.own_voice)
        setup = replace(self._setup, controls=Controls())
        trial = LiveStream(setup)
        seconds = trial.latency_ms / 1000 + (blocks - 1) * trial.block_seconds
        place = np.arange(math.ceil(seconds * setup.sample_rate)) / setup.sample_rate
        # Something that has a pitch, so that no stage has less to do than with speech.
        tone = sum(np.sin(2 * np.pi * 140 * n * place) / n for n in range(1, 9))
        trial.push(np.asarray(0.05 * tone, np.float32))
        return min(list(trial._durations)[1:] or trial._durations)

    def change(self, voice: Voice | None = None, controls: Controls | None = None) -> None:
        """From the next block on, speak as ``voice`` and by ``controls``; None keeps them.

        Raises:
            ConfigError: controls that a live conversion cannot follow.
        """
        with self._changing:
            chosen = (voice or self._chosen[0], controls or self._chosen[1])
            check_live(chosen[1], self._setup.own_voice)
            # What a voice needs before it can speak is made here and not in the time of a block.
            towards = self._towards(*chosen)
            rehearse(towards, self._encoder, self._setup.converter, self._setup.own_voice)
            self._chosen, self._voice = chosen, towards

    def push(self, samples: ArrayLike) -> FloatArray:
        """Takes the next ``(samples,)`` and gives those of the result that are ready.

        Args:
            samples: float in [-1, 1], or int16.

        Raises:
            ConfigError: the stream has ended, or the array is not one channel.
        """
        if self._ended:
            raise ConfigError("the stream has ended; open another one.")
        self._raw = np.concatenate([self._raw, as_samples(samples)])
        ready = []
        while self._raw_first + len(self._raw) >= self._needed(self._done + self._block):
            ready.append(self._convert(self._done + self._block))
        return np.concatenate(ready) if ready else np.zeros(0, np.float32)

    def flush(self) -> FloatArray:
        """Ends the stream and gives the rest of the result."""
        if self._ended:
            return np.zeros(0, np.float32)
        self._ended = True
        setup, total = self._setup, self._raw_first + len(self._raw)
        length = resampled_length(total, setup.sample_rate, setup.output_rate)
        frames = math.ceil(Fraction(total, setup.sample_rate) / self._hop_seconds)
        ready = []
        while self._done < frames:
            ready.append(self._convert(min(self._done + self._block, frames), frames))
        before = self._given - sum(map(len, ready))
        rest = np.concatenate(ready) if ready else np.zeros(0, np.float32)
        rest = rest[: length - before]
        return np.pad(rest, (0, length - before - len(rest)))

    def report(self) -> StreamReport:
        """How the stream has run so far."""
        seconds = float(self._done * self._hop_seconds)
        stages = {step: spent / max(seconds, 1e-9) for step, spent in self._timings.items()}
        times = 1000 * np.array(self._durations or [0.0])
        return StreamReport(
            seconds=seconds,
            rtf=sum(stages.values()),
            stages=stages,
            blocks=self._blocks,
            late_blocks=self._late,
            block_ms=(float(np.median(times)), float(np.percentile(times, 95)), float(times.max())),
        )

    def _needed(self, stop: int) -> int:
        """Samples of the source that must be there before frames up to ``stop`` are converted."""
        end = self._position(stop + self._lookahead)
        return part_needed(self._setup.sample_rate, self._rate, end, end)[1]

    def _position(self, frame: int) -> int:
        """The sample at the encoder's rate that is nearest to the start of a mel frame."""
        return round(frame * self._hop_seconds * self._rate)

    def _convert(self, stop: int, last: int | None = None) -> FloatArray:
        """The result up to frame ``stop``.

        Args:
            last: frames of the whole source, once it has ended.
        """
        started = time.perf_counter()
        with timed(self._timings, "resample"):
            self._read(stop + self._lookahead, last is not None)
        frames = stop + self._lookahead if last is None else min(stop + self._lookahead, last)
        audio, low = self._rendered(stop, frames)
        with timed(self._timings, "resample"):
            out = self._joined(audio, low, stop)
        self._done = stop
        spent = time.perf_counter() - started
        self._durations.append(spent)
        self._blocks += 1
        self._late += spent > self.block_seconds
        return out

    def _read(self, stop: int, ended: bool) -> None:
        """The source up to frame ``stop`` at the encoder's rate, and no more of it than needed."""
        from_hz, to_hz = self._setup.sample_rate, self._rate
        start, end = self._first + len(self._speech), self._position(stop)
        if ended:
            total = resampled_length(self._raw_first + len(self._raw), from_hz, to_hz)
            end = min(end, total)
        if end > start:
            low, high = part_needed(from_hz, to_hz, start, end)
            part = self._raw[low - self._raw_first : high - self._raw_first]
            new = resampled_part(part, low, from_hz, to_hz, start, end)
            self._speech = np.concatenate([self._speech, new])
        kept = max(0, part_needed(from_hz, to_hz, max(start, end), max(start, end))[0])
        unneeded = max(0, min(kept - self._raw_first, len(self._raw)))
        self._raw, self._raw_first = self._raw[unneeded:], self._raw_first + unneeded
        kept = self._position(self._done) - round(PAST_SECONDS * self._rate)
        unneeded = max(0, kept - self._first)
        self._speech, self._first = self._speech[unneeded:], self._first + unneeded

    def _rendered(self, stop: int, frames: int) -> tuple[FloatArray, int]:
        """Audio at the source's level of the frames around the block, and the first of these."""
        context = max(0, self._done - CONVERTER_FRAMES)
        low = max(0, self._done - KEPT_FRAMES)
        high = min(frames, stop + FADE_FRAMES + EDGE_FRAMES)
        at = self._position(context) - self._first
        self._hear_level()
        gain = np.float32(self._speaker.gain)
        speech = self._speech * gain
        first, pitch, melody = self._pitch(speech, stop)
        voice, controls = self._voice, self._chosen[1]
        known = self._speaker.log_f0 if melody.voiced.any() else None
        target, semitones, _ = moved(melody, voice, controls, known)
        pitch, target = (self._by_frame(track, first, context, frames) for track in (pitch, target))
        pause, noise, active = self._pauses(context, frames)
        with timed(self._timings, "content"):
            content = self._content(speech, context, stop, frames, active)
        piece = Piece(
            speech=speech[at:],
            sample_rate=self._rate,
            content=content,
            pitch=target,
            own_pitch=pitch,
            pauses=pause,
            noise=noise,
            low=low - context,
            high=high - context,
            first_frame=context,
        )
        voice = self._with_pitch(voice, semitones)
        converter, vocoder = self._setup.converter, self._vocoder
        own = self._setup.own_voice
        mel, source = drawn(piece, voice, controls, converter, self._timings, own)
        seen = np.concatenate([self._mel, mel.values[:, self._done - context :]], axis=1)
        before = self._mel.shape[1]
        self._mel = seen[:, : before + stop - self._done][:, -VOCODER_FRAMES:]
        mel, end = replace(mel, values=seen), before + high - self._done
        made = vocoded(vocoder, mel, before, end, VOCODER_FRAMES, self._timings)
        made = self._continued(made, stop - low)
        audio = finished(piece, made, source, controls, vocoder, self._timings) / gain
        with timed(self._timings, "level"):
            # True peaks lie at most a few dB above those of the samples.
            if np.abs(audio).max(initial=0) > 0.5 * 10 ** (CEILING_DBTP / 20):
                audio = limited(audio, vocoder.sample_rate, low * vocoder.hop_samples)
        return audio, low

    def _continued(self, made: FloatArray, frames: int) -> FloatArray:
        """``made`` after what was made before it, both as the vocoder gave them.

        Args:
            frames: of the result up to the end of the block.
        """
        hop = self._vocoder.hop_samples
        fade = min(len(made), len(self._made), FADE_FRAMES * hop)
        ramp = (np.arange(fade, dtype=np.float32) + 0.5) / max(1, fade)
        kept, ending = np.split(self._made, [len(self._made) - fade])
        begun = made[:fade] * ramp + ending * (1 - ramp)
        joined = np.concatenate([kept, begun, made[fade:]]).astype(np.float32)
        from_frame = max(0, frames - KEPT_FRAMES)
        self._made = joined[from_frame * hop : (frames + FADE_FRAMES) * hop]
        return joined

    def _joined(self, audio: FloatArray, low: int, stop: int) -> FloatArray:
        """The block out of ``audio``, faded into from the one before it, at the output's rate."""
        hop, rate = self._vocoder.hop_samples, self._vocoder.sample_rate
        out_rate = self._setup.output_rate
        end, faded = (f * hop * out_rate // rate for f in (stop, stop + FADE_FRAMES))
        made = resampled_part(audio, low * hop, rate, out_rate, self._given, faded)
        fade = len(self._fading)
        ramp = (np.arange(fade, dtype=np.float32) + 0.5) / max(1, fade)
        made[:fade] = made[:fade] * ramp + self._fading * (1 - ramp)
        ready = end - self._given
        self._fading, self._given = made[ready:], end
        return made[:ready]

    def _hear_level(self) -> None:
        """Tells the estimate of the samples that are new, in whole frames of 20 ms."""
        size = 2 * hop_size(self._rate)
        new = self._speech[max(0, self._heard - self._first) :]
        whole = len(new) // size * size
        self._speaker.hear_level(np.square(new[:whole], dtype=np.float64).reshape(-1, size).mean(1))
        self._heard += whole

    def _pitch(self, speech: FloatArray, stop: int) -> tuple[int, Pitch, Pitch]:
        """A frame of the track, and the track from there on, as it was found and as it was
        spoken."""
        size = round(self._rate / FRAME_RATE)
        earliest = self._position(self._done) - round(PITCH_SECONDS * self._rate)
        first = -(-max(self._first, earliest) // size)
        edge = -(-self._position(stop) // size)
        window = speech[first * size - self._first :]
        with timed(self._timings, "pitch"):
            found = self._detector.extract(window, first, edge)
            spoken = found
            if not self._chosen[1].singing:
                spoken = corrected_by_sound(found, lambda a, b: window[a:b], self._rate)
            level = without_creak(spoken, self._chosen[1])
        here = slice(-(-self._position(self._done) // size) - first, edge - first)
        self._speaker.hear_pitch(Pitch(level.f0_hz[here], level.voiced[here], FRAME_RATE))
        return first, found, spoken

    def _by_frame(self, pitch: Pitch, first: int, context: int, frames: int) -> Pitch:
        """A track from its frame ``first`` on as one of mel frames ``[context, frames)``, with a
        value in the middle of each and one between two."""
        rate = 2 / float(self._hop_seconds)
        places = np.arange(2 * context, 2 * frames) / rate * pitch.frame_rate - first
        known = np.flatnonzero(pitch.voiced)
        if len(known) == 0:
            return Pitch(np.zeros(len(places), np.float32), np.zeros(len(places), np.bool_), rate)
        log_f0 = np.interp(places, known, np.log(pitch.f0_hz[known]))
        nearest = np.clip(np.round(places).astype(np.int64), 0, len(pitch.voiced) - 1)
        return Pitch(np.exp(log_f0).astype(np.float32), pitch.voiced[nearest], rate)

    def _pauses(
        self, context: int, frames: int
    ) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
        """``(mel frames,)`` pauses and noise from frame ``context`` on, and ``(content frames,)``
        from :attr:`_first_content` on in which somebody speaks."""
        hop = hop_size(self._rate)
        begin = self._first_content * self._content_frame
        energies = hop_energies(self._speech[begin - self._first :], self._rate)
        found = pauses(energies, hop, self._speaker.gain)
        centres = np.arange(context, frames) + 0.5
        places = centres * float(self._hop_seconds / HOP) - begin / hop - 0.5
        pause, noise = np.zeros((2, len(places)), np.float32)
        if len(found):
            hops = np.arange(len(found))
            pause = np.interp(places, hops, found).astype(np.float32)
            floor = noise_floor(energies, hop, self._speaker.gain)
            noise = np.interp(places, hops, floor).astype(np.float32)
        least = 10 ** ((SPEECH_DBFS - ACTIVE_DB) / 10) / self._speaker.gain**2
        pairs = energies[: len(energies) // 2 * 2].reshape(-1, 2).sum(axis=1) / (2 * hop)
        if len(pairs) == 0:  # A stream of less than 20 ms.
            return pause, noise, np.zeros(0, np.bool_)
        padded = np.pad(pairs > least, AROUND_FRAMES)
        around = np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND_FRAMES + 1)
        return pause, noise, np.asarray(around.any(axis=1), np.bool_)

    @property
    def _first_content(self) -> int:
        """The first content frame of which all samples are there."""
        return -(-self._first // self._content_frame)

    def _content(
        self, speech: FloatArray, context: int, stop: int, frames: int, active: NDArray[np.bool_]
    ) -> Content:
        """The content features of mel frames ``[context, frames)``, one of each."""
        encoder, rate = self._encoder, float(1 / self._hop_seconds)
        edge = self._position(stop) // self._content_frame
        first, features = self._encoded(speech, edge)
        if isinstance(encoder, PieceEncoder):
            new = features[self._known - first : edge - first]
            spoken = active[self._known - self._first_content :][: len(new)]
            self._speaker.hear_content(new[: len(spoken)][spoken], encoder.frame_rate)
            features = encoder.centred(features, self._speaker.content_mean).features
        self._known = max(self._known, edge)
        later = float(context * self._hop_seconds) - first / encoder.frame_rate
        features = interpolate_frames(features, encoder.frame_rate, rate, frames - context, later)
        return Content(features, rate, encoder.space)

    def _encoded(self, speech: FloatArray, edge: int) -> tuple[int, FloatArray]:
        """The first of the content frames that are known, and the features from there on.

        Args:
            edge: the content frame from which on the source is look-ahead.
        """
        encoder, frame, first = self._encoder, self._content_frame, self._first_content
        window = speech[first * frame - self._first :]
        if len(window) < frame:  # The end of a stream of less than one frame.
            window = np.pad(window, (0, frame - len(window)))
        if not isinstance(encoder, PieceEncoder):
            return first, encoder.encode(window).features
        if self._remembering is None:
            return first, encoder.encode_piece(window)
        start = self._known
        skipped = min(self._remembering.context_frames, start - first)
        new = self._remembering.encode(
            window[(start - skipped - first) * frame :], skipped, start, max(start, edge)
        )
        features = np.concatenate([self._features, new])
        begun = start - len(self._features)
        final = features[: max(start, edge) - begun]
        self._features = final[-math.ceil(CONTEXT_SECONDS * encoder.frame_rate) :]
        return begun, features

    def _with_pitch(self, voice: Voice, semitones: float) -> Voice:
        """``voice`` with the pitch that it will speak at, where it has none of its own."""
        known = self._speaker.log_f0
        if voice.log_f0_mean is not None or known is None:
            return voice
        return replace(voice, log_f0_mean=known[0] + semitones * OCTAVE / 12, log_f0_std=known[1])

    def _towards(self, voice: Voice, controls: Controls) -> Voice:
        """Between the speaker's own voice and ``voice``, by the strength."""
        own = self._setup.own_voice
        if controls.strength >= 1 or own is None:
            return voice
        parts = [(voice, controls.strength), (own, 1 - controls.strength)]
        return blend_voices(parts, name=voice.name)

    def _mean_content(self, voice: Voice | None) -> FloatArray | None:
        """Of the speech that ``voice`` was made from; None where it was not kept."""
        if voice is None or voice.speech is None or not isinstance(self._encoder, PieceEncoder):
            return None
        speech = voice.speech[: round(MEMORY_SECONDS * self._rate)].astype(np.float32)
        speech = (speech / np.float32(32768)).astype(np.float32)
        return np.asarray(self._encoder.encode_piece(speech).mean(axis=0), np.float32)


def as_samples(samples: ArrayLike) -> FloatArray:
    """``(samples,)`` float32; what is not finite is silence.

    Raises:
        ConfigError: the array is not one channel, or not of samples.
    """
    array = np.asarray(samples)
    if array.ndim != 1 or array.dtype.kind not in "fi":
        raise ConfigError(
            f"a live stream takes one channel, an array (samples,) of float or int16, not "
            f"{array.dtype} {array.shape}."
        )
    if array.dtype.kind == "i":
        if array.dtype != np.int16:
            raise ConfigError(f"whole numbers must be int16, not {array.dtype}.")
        return np.asarray(array / np.float32(32768), np.float32)
    return np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


class LiveSession:
    """A stream between a source that does not wait and an output that does not wait.

    :meth:`feed` and :meth:`take` return at once and may be called by the threads of an audio
    device; one further thread calls :meth:`step`. What cannot be converted in time is left out, so
    that the delay does not grow: where the stream falls behind, the oldest block that waits is
    dropped, and what the output then holds too much of is skipped.

    Args:
        stream: whose input and output have the same rate.
        margin_ms: of finished sound that are kept, beyond what the slowest block of the last half
            minute took longer than most; more after drop-outs, until there are none for a while.

    Attributes:
        bypassed: what comes out is what came in, as late as the conversion would be.
    """

    def __init__(self, stream: LiveStream, margin_ms: float = MARGIN_MS) -> None:
        self.stream = stream
        self.sample_rate = stream.output_rate
        self.bypassed = False
        self._block = round(stream.block_seconds * self.sample_rate)
        self._margin = self._least = round(margin_ms / 1000 * self.sample_rate)
        self._calm = 0
        self._fade = round(SPLICE_SECONDS * self.sample_rate)
        self._lock = threading.Condition()
        self._waiting = _Samples()
        self._dry = _Samples()
        self._ready = _Samples()
        self._wet_share = 1.0
        self._levels: deque[int] = deque(maxlen=max(2, round(LEVEL_SECONDS / stream.block_seconds)))
        self._times: deque[float] = deque(
            maxlen=max(2, round(TIMES_SECONDS / stream.block_seconds))
        )
        self._playing = False
        # Silence that is still to come before what is ready.
        self._pause = 0
        # Samples that came in and were kept, and those of them whose result has gone out.
        self._taken_in = self._played = 0
        self._dropped = self._dropouts = 0
        self._said = -math.inf

    def feed(self, samples: FloatArray) -> None:
        """The next ``(samples,)`` of the source."""
        with self._lock:
            self._waiting.put(samples)
            self._taken_in += len(samples)
            if len(self._waiting) >= (MOST_WAITING_BLOCKS + 1) * self._block:
                self._taken_in -= len(self._waiting.take(self._block))
                self._dropped += 1
                self._say_dropped()
            self._lock.notify_all()

    def _say_dropped(self) -> None:
        now = time.monotonic()
        if now - self._said >= SAY_SECONDS:
            self._said = now
            log.warning(
                "the live conversion falls behind: %d blocks of %.0f ms were left out so far; "
                "longer blocks cost less",
                self._dropped,
                1000 * self.stream.block_seconds,
            )

    def take(self, count: int) -> FloatArray:
        """``(count,)`` for the output; silence where nothing is ready."""
        with self._lock:
            pause = min(count, self._pause)
            self._pause -= pause
            found = self._ready.take(count - pause)
            self._played += len(found)
            missing = count - pause - len(found)
            if missing and self._playing:
                self._playing = False
                self._dropouts += 1
                most = max(self._least, round(MOST_MARGIN_MS / 1000 * self.sample_rate))
                self._margin = min(most, round(MARGIN_GROWTH * self._margin))
                self._calm = 0
                fade = min(len(found), self._fade)
                found[len(found) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
            return np.pad(found, (pause, missing))

    def step(self, timeout: float = 0.0) -> bool:
        """Converts what waits, a block at most; false where nothing did for ``timeout`` seconds."""
        with self._lock:
            if not len(self._waiting):
                self._lock.wait(timeout)
            new = self._waiting.take(self._block)
        if not len(new):
            return False
        self._dry.put(new)
        began = time.monotonic()
        wet = self.stream.push(new)
        self._deliver(wet, time.monotonic() - began)
        return True

    def finish(self) -> None:
        """Converts everything that waits, to its end."""
        while self.step():
            pass
        self._deliver(self.stream.flush(), 0.0)
        with self._lock:
            self._playing = False  # What is missing from here on is no drop-out.

    @property
    def delay_ms(self) -> float:
        """Milliseconds from what comes in now to its result, as it is at this moment."""
        with self._lock:
            return 1000 * (self._taken_in - self._played + self._pause) / self.sample_rate

    def report(self) -> StreamReport:
        """How the stream has run, with what was lost on the way."""
        with self._lock:
            dropped, dropouts = self._dropped, self._dropouts
        return replace(self.stream.report(), dropped_blocks=dropped, dropouts=dropouts)

    def _deliver(self, wet: FloatArray, took: float) -> None:
        """``wet``, which it took so many seconds to make, and what it came from to the output."""
        if not len(wet):
            return
        self._times.append(took)
        out = self._bypass(wet, self._dry.take(len(wet)))
        with self._lock:
            held = len(self._ready)
            if not self._playing:
                # Silence to begin with, so that a later block may take this much longer. The first
                # ones have less of a past to look back at; what is never needed is skipped.
                out[: self._fade] *= np.linspace(0, 1, len(out[: self._fade]), dtype=np.float32)
                self._pause = max(0, self._margin + self._spread() - held)
                self._levels.clear()
                self._playing = True
            else:
                self._calm += len(out)
                if self._calm >= CALM_SECONDS * self.sample_rate:
                    self._margin, self._calm = max(self._least, round(0.9 * self._margin)), 0
                self._levels.append(held)
                surplus = min(self._levels) - self._margin - self._spread()
                if len(self._levels) == self._levels.maxlen and surplus > self._margin // 2:
                    skipped = min(surplus, len(out))
                    out = spliced(out, skipped, self._fade)
                    self._played += skipped
                    self._levels.clear()
            self._ready.put(out)

    def _spread(self) -> int:
        """Samples that the slowest block of late took longer than most; at first, that one may."""
        spread = max(self._times) - statistics.median(self._times)
        if len(self._times) < (self._levels.maxlen or 0):
            spread = max(spread, FIRST_GROWTH * self._times[0])
        return round(min(spread, MOST_MARGIN_MS / 1000) * self.sample_rate)

    def _bypass(self, wet: FloatArray, dry: FloatArray) -> FloatArray:
        wanted = 0.0 if self.bypassed else 1.0
        ramp = np.arange(1, len(wet) + 1, dtype=np.float32) / self._fade
        share = np.clip(self._wet_share + ramp * np.sign(wanted - self._wet_share), 0, 1)
        self._wet_share = float(share[-1]) if wanted != self._wet_share else wanted
        return np.asarray(wet * share + dry * (1 - share), np.float32)


def spliced(samples: FloatArray, skipped: int, fade: int) -> FloatArray:
    """``(samples - skipped,)``: the beginning fades into what lies ``skipped`` samples later."""
    kept = samples[skipped:].copy()
    fade = min(fade, len(kept), skipped)
    ramp = (np.arange(fade, dtype=np.float32) + 0.5) / max(1, fade)
    kept[:fade] = samples[:fade] * (1 - ramp) + kept[:fade] * ramp
    return np.asarray(kept, np.float32)


class _Samples:
    """Samples in the order in which they came."""

    def __init__(self) -> None:
        self._parts: deque[FloatArray] = deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def put(self, samples: FloatArray) -> None:
        if len(samples):
            self._parts.append(samples)
            self._length += len(samples)

    def take(self, count: int) -> FloatArray:
        """The oldest ``(count,)``, or all if there are fewer."""
        taken: list[FloatArray] = []
        missing = min(count, self._length)
        while missing:
            part = self._parts.popleft()
            if len(part) > missing:
                self._parts.appendleft(part[missing:])
                part = part[:missing]
            taken.append(part)
            missing -= len(part)
        self._length -= sum(map(len, taken))
        return np.concatenate(taken) if taken else np.zeros(0, np.float32)
