"""From reference recordings to a voice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from auto_voice.audio.frames import interpolate_frames
from auto_voice.audio.level import gain_to_speech_level
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.pitch import align_pitch, extract_pitch, log_f0_statistics
from auto_voice.audio.pitch_octaves import repaired
from auto_voice.audio.resample import resample
from auto_voice.audio.vad import trim_silence
from auto_voice.errors import AudioContentError, VoiceError
from auto_voice.models.base import ContentEncoder, SpeakerEncoderStage
from auto_voice.types import EMBEDDING_DIMS, FloatArray, Pitch, Voice, Waveform

SAMPLE_RATE = 16000
LEAST_SECONDS = 1.0
GOOD_SECONDS = 4.0
# Speech that is used; more changes a voice little and costs time.
MOST_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 0.3


def build_voice(
    references: Sequence[tuple[str, Waveform]],
    speaker_encoder: SpeakerEncoderStage,
    content_encoder: ContentEncoder,
    name: str = "",
    most_seconds: float = MOST_SECONDS,
) -> Voice:
    """The voice heard in all of ``references``, pairs of what to call it and the recording.

    Silence is removed, each recording is brought to one level, and at most ``most_seconds`` of
    speech are used, shared evenly. The embedding is the mean over recordings; ``frames`` holds
    ``mel`` ``(frames, 80)``, ``content`` ``(frames, dims)`` and ``pitch`` ``(frames, 2)`` at
    HiFi-GAN's frame rate.

    Raises:
        AudioContentError: a recording holds no speech or less than a second of it.
    """
    if not references:
        raise AudioContentError("no reference was given; pass at least one recording of the voice.")
    share = round(most_seconds * SAMPLE_RATE / len(references))
    speech = [_speech(what, waveform) for what, waveform in references]
    used = [samples[:share] for samples in speech]
    embedding = np.mean([speaker_encoder.embed_utterance(samples) for samples in used], axis=0)
    seconds = sum(len(samples) for samples in speech) / SAMPLE_RATE
    notes = [note for what, wave in references for note in (f"{what}: {n}" for n in wave.notes)]
    if seconds < GOOD_SECONDS:
        notes.append(f"The reference holds only {seconds:.1f} s of speech; 5 to 30 s come closer.")
    tracks = [extract_pitch(samples, SAMPLE_RATE) for samples in used]
    statistics = log_f0_statistics(repaired(_joined(tracks)))
    if statistics is None:
        notes.append("No pitch was found in the reference, so the source keeps its own pitch.")
    mean, std = statistics or (None, None)
    contents = [content_encoder.encode(samples) for samples in used]
    mels = [log_mel(resample(s, SAMPLE_RATE, HIFIGAN_MEL.sample_rate), HIFIGAN_MEL).T for s in used]
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
    """A voice of which only the embedding is known: less likeness, and the source's own pitch."""
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
        "and the likeness is lower."
    )
    return Voice(embedding=values / norm, notes=(note,))


def _speech(what: str, waveform: Waveform) -> FloatArray:
    samples = resample(waveform.samples, waveform.sample_rate, SAMPLE_RATE)
    speech = trim_silence(samples, SAMPLE_RATE, max_pause_seconds=LONGEST_PAUSE_SECONDS)
    seconds = len(speech) / SAMPLE_RATE
    if seconds < LEAST_SECONDS:
        found = f"only {seconds:.1f} s of speech" if len(speech) else "no speech"
        raise AudioContentError(
            f"{what} holds {found}; give 5 to 30 s in which only the wanted person speaks."
        )
    return (speech * gain_to_speech_level(speech, SAMPLE_RATE)).astype(np.float32)


def _aligned(pitch: Pitch, frames: int) -> FloatArray:
    """``(frames, 2)`` log-F0 and voicing at HiFi-GAN's frame rate."""
    return np.stack(align_pitch(pitch, HIFIGAN_MEL.frame_rate, frames), axis=1).astype(np.float32)


def _joined(tracks: Sequence[Pitch]) -> Pitch:
    return Pitch(
        np.concatenate([track.f0_hz for track in tracks]),
        np.concatenate([track.voiced for track in tracks]),
        tracks[0].frame_rate,
    )
