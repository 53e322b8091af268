"""From reference recordings to a voice, and converters fine-tuned to it."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.pitch import align_pitch, corrected, extract_pitch, log_f0_statistics
from auto_voice.audio.resample import resample
from auto_voice.audio.vad import trim_silence
from auto_voice.errors import AudioContentError, VoiceError
from auto_voice.models.base import (
    ContentEncoder,
    Converter,
    FineTunableConverter,
    SpeakerEncoderStage,
)
from auto_voice.progress import tell
from auto_voice.types import (
    EMBEDDING_DIMS,
    SPEECH_RATE,
    FloatArray,
    Pitch,
    Voice,
    Waveform,
)

log = logging.getLogger(__name__)

# Seconds of speech in a recording; a speaker embedding of less says little about who speaks.
LEAST_SECONDS = 0.5
# Seconds of speech in all; less is converted, with a warning that more comes closer.
GOOD_SECONDS = 4.0
# Seconds of speech that are used; more changes a voice little and costs time.
MOST_SECONDS = 60.0
# Seconds of a pause that stay in the speech.
LONGEST_PAUSE_SECONDS = 0.3
# Fine-tunings that are remembered, 6 MB each.
KEPT_VOICES = 8


def build_voice(
    references: Sequence[tuple[str, Waveform]],
    speaker_encoder: SpeakerEncoderStage,
    content_encoder: ContentEncoder,
    name: str = "",
    most_seconds: float = MOST_SECONDS,
) -> Voice:
    """The voice of all ``references``, pairs of a label and a recording.

    Silence is removed, each recording is brought to one level, and at most ``most_seconds`` of
    speech are used, shared evenly. The embedding is the mean over recordings; ``frames`` holds
    ``mel`` ``(frames, 80)``, ``content`` ``(frames, dims)`` and ``pitch`` ``(frames, 2)`` at
    HiFi-GAN's frame rate.

    Raises:
        AudioContentError: a recording holds no speech or less than half a second of it.
    """
    if not references:
        raise AudioContentError("no reference was given; pass at least one recording of the voice.")
    share = round(most_seconds * SPEECH_RATE / len(references))
    speech = [_speech(what, waveform) for what, waveform in references]
    used = [samples[:share] for samples in speech]
    embedding = np.mean([speaker_encoder.embed_utterance(samples) for samples in used], axis=0)
    seconds = sum(len(samples) for samples in speech) / SPEECH_RATE
    notes = [f"{what}: {note}" for what, wave in references for note in wave.notes]
    if seconds < GOOD_SECONDS:
        notes.append(f"The reference holds only {seconds:.1f} s of speech; 5 to 30 s come closer.")
    tracks = [extract_pitch(samples, SPEECH_RATE) for samples in used]
    statistics = log_f0_statistics(corrected(_joined(tracks)))
    if statistics is None:
        notes.append("No pitch was found in the reference, so the source keeps its own pitch.")
    mean, std = statistics or (None, None)
    contents = [content_encoder.encode(samples) for samples in used]
    mels = [log_mel(resample(s, SPEECH_RATE, HIFIGAN_MEL.sample_rate), HIFIGAN_MEL).T for s in used]
    pitches = [_aligned(track, len(mel)) for track, mel in zip(tracks, mels, strict=True)]
    aligned = [
        interpolate_frames(content.features, content.frame_rate, HIFIGAN_MEL.frame_rate, len(mel))
        for content, mel in zip(contents, mels, strict=True)
    ]
    return Voice(
        embedding=(embedding / np.linalg.norm(embedding)).astype(np.float32),
        log_f0_mean=mean,
        log_f0_std=std,
        frames={
            "mel": np.ascontiguousarray(np.concatenate(mels)),
            "content": np.concatenate(aligned),
            "pitch": np.concatenate(pitches),
        },
        name=name,
        speech_seconds=seconds,
        encoder=speaker_encoder.name,
        content_space=contents[0].space,
        notes=tuple(notes),
        speech=np.round(np.clip(np.concatenate(used), -1, 1) * 32767).astype(np.int16),
    )


def bare_voice(embedding: FloatArray) -> Voice:
    """A voice of which only the embedding is known: less alike, and without a pitch of its own."""
    values = np.asarray(embedding, dtype=np.float32).reshape(-1)
    norm = float(np.linalg.norm(values)) if np.isfinite(values).all() else 0.0
    if len(values) != EMBEDDING_DIMS or norm < 1e-6:
        sized = len(values) == EMBEDDING_DIMS
        found = "and these are zero or not finite" if sized else f"not {len(values)}"
        raise VoiceError(
            "a voice given as bare numbers must be a finite, non-zero embedding of "
            f"{EMBEDDING_DIMS} values, {found}; to clone from samples, pass a Waveform "
            "or a file."
        )
    note = (
        "The voice is a bare embedding: without a recording of it the pitch stays at the source's "
        "and the result is less like the voice."
    )
    return Voice(embedding=values / norm, notes=(note,))


def of_encoders(
    voice: Voice,
    speaker_encoder: str,
    content_encoder: ContentEncoder,
    content_space: str,
    load_speaker_encoder: Callable[[], SpeakerEncoderStage],
) -> Voice:
    """``voice`` as the models of a pipeline understand it: as it is, or encoded again.

    Args:
        speaker_encoder: ``name@version`` of the one that the pipeline uses.
        content_encoder: of the pipeline.
        content_space: that its converter takes.
        load_speaker_encoder: gives that encoder, which is only needed to encode again.

    Raises:
        VoiceError: a voice of other encoders that kept no recording to encode again.
    """
    encoder, made_with = speaker_encoder, voice.encoder
    of_space = not (voice.content_space and voice.frames) or voice.content_space == content_space
    if made_with in ("", encoder) and not of_space:
        encoder, made_with = content_space, voice.content_space
    if made_with in ("", encoder):
        content = voice.frames.get("content")
        if content is not None and content.shape[1] != content_encoder.dims:
            raise VoiceError(
                f"the voice {voice.name or '(unnamed)'} holds content of {content.shape[1]} "
                f"numbers a frame, and this pipeline has {content_encoder.dims}; clone it "
                "again from its recordings."
            )
        return voice
    if voice.speech is None:
        raise VoiceError(
            f"the voice {voice.name or '(unnamed)'} was made with {made_with}, and this "
            f"pipeline uses {encoder}; clone it again from its recordings."
        )
    speech = Waveform(voice.speech.astype(np.float32) / np.float32(32768), SPEECH_RATE)
    again = build_voice(
        [("the reference", speech)], load_speaker_encoder(), content_encoder, voice.name
    )
    note = f"The voice was made with {made_with} and encoded again with {encoder}."
    log.info(note)
    return replace(
        again,
        notes=(*again.notes, note),
        consent=voice.consent,
        quality=voice.quality,
    )


def _without_fine_tuning(voice: Voice, converter: str) -> Voice:
    """``voice`` with a note where another converter was fine-tuned to it."""
    if not voice.fine_tuning:
        return voice
    note = (
        f"The voice was fine-tuned with {voice.fine_tuned_converter} and is spoken by {converter} "
        "without that; clone it again from its recordings to come closer."
    )
    return replace(voice, fine_tuning={}, fine_tuned_converter="", notes=(*voice.notes, note))


def _speech(what: str, waveform: Waveform) -> FloatArray:
    samples = resample(waveform.samples, waveform.sample_rate, SPEECH_RATE)
    speech = trim_silence(samples, SPEECH_RATE, max_pause_seconds=LONGEST_PAUSE_SECONDS)
    seconds = len(speech) / SPEECH_RATE
    if seconds < LEAST_SECONDS:
        found = f"only {seconds:.1f} s of speech" if len(speech) else "no speech"
        raise AudioContentError(
            f"{what} holds {found}; give 5 to 30 s in which only the wanted person speaks."
        )
    return (speech * gain_to_speech_level(speech, SPEECH_RATE)).astype(np.float32)


def _aligned(pitch: Pitch, frames: int) -> FloatArray:
    """``(frames, 2)`` log-F0 and voicing at HiFi-GAN's frame rate."""
    return np.stack(align_pitch(pitch, HIFIGAN_MEL.frame_rate, frames), axis=1).astype(np.float32)


def _joined(tracks: Sequence[Pitch]) -> Pitch:
    return Pitch(
        np.concatenate([track.f0_hz for track in tracks]),
        np.concatenate([track.voiced for track in tracks]),
        tracks[0].frame_rate,
    )


Key: TypeAlias = tuple[str, int, str]


class FineTunedVoices:
    """Fine-tunes converters to voices and remembers the last ones, so that each is done once.

    One object serves many threads.

    Args:
        most: fine-tunings that are remembered.
    """

    def __init__(self, most: int = KEPT_VOICES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._known: OrderedDict[Key, Mapping[str, NDArray[np.float16]]] = OrderedDict()
        self._running: dict[Key, threading.Lock] = {}

    def fine_tuned(
        self,
        converter: Converter,
        voice: Voice,
        steps: int,
    ) -> Voice:
        """``voice`` with ``converter`` fine-tuned to it in ``steps`` gradient steps, 0 for none.

        One that is fine-tuned already stays as it is, and so does one without its recording, which
        is a blend or was stored so: there is nothing to learn from.

        Threads that ask for the same voice at once wait for the first of them; where that one is
        stopped, the next goes on in its place.
        """
        if voice.fine_tuning and voice.fine_tuned_converter == converter.name:
            return voice
        if not steps or not isinstance(converter, FineTunableConverter) or voice.speech is None:
            return _without_fine_tuning(voice, converter.name)
        key = (converter.name, steps, _fingerprint(voice))
        with self._lock:
            turn = self._running.setdefault(key, threading.Lock())
        try:
            with turn:
                learnt = self._remembered(key)
                if learnt is None:
                    name = voice.name or "(unnamed)"
                    log.info("fine-tuning %s to the voice %s", converter.name, name)

                    def told(done: float) -> None:
                        tell("fine-tune", done * steps, steps, voice.name)

                    made = converter.fine_tune(voice, steps, told)
                    if made.fine_tuned_converter != converter.name:
                        return voice  # Too little speech to learn from.
                    learnt = made.fine_tuning
                    self._remember(key, learnt)
        finally:
            with self._lock:
                if self._running.get(key) is turn:
                    del self._running[key]
        return replace(voice, fine_tuning=learnt, fine_tuned_converter=converter.name)

    def _remembered(self, key: Key) -> Mapping[str, NDArray[np.float16]] | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _remember(self, key: Key, learnt: Mapping[str, NDArray[np.float16]]) -> None:
        with self._lock:
            self._known[key] = learnt
            while len(self._known) > self._most:
                self._known.popitem(last=False)


def _fingerprint(voice: Voice) -> str:
    """A hash of everything that a converter learns from."""
    digest = hashlib.sha256(repr((voice.log_f0_mean, voice.log_f0_std)).encode())
    arrays: dict[str, NDArray[Any]] = {"embedding": voice.embedding, **voice.frames}
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
