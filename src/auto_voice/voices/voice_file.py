"""A voice as one safetensors file: arrays of numbers and a line of JSON, nothing that executes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import AudioOutputError, VoiceError, reason
from auto_voice.filesystem import atomic_write
from auto_voice.types import EMBEDDING_DIMS, Voice

SUFFIX = ".safetensors"
FORMAT = "auto_voice.voice/1"
# Prefix of the arrays of a fine-tuning, and "adapted_to" of its converter: words of 0.1.
FINE_TUNING = "adaptation."
# Half a minute takes 3 MB, a fine-tuning 6 MB; what is far larger is no voice.
MOST_BYTES = 64 << 20
# Of any number but a weight: mels, features and statistics are of the order of 10.
LARGEST_VALUE = 1e4
# Of a weight; a thousand steps do not move one by 1, and far larger ones make no sound but NaN.
LARGEST_CHANGE = 100.0
# Notes of a voice that are told without loading it; enrolment writes a few for each recording.
MOST_LISTED_NOTES = 100
MOST_CHANGES, LONGEST_NAME = 1000, 200
# Of HiFi-GAN's mel, which every converter gives.
MEL_BANDS = 80
# Characters: what people agree to fits, and so do the agreements of a blend of many voices.
LONGEST_CONSENT = 10_000


def check_consent(consent: str) -> str:
    """``consent`` unchanged.

    Raises:
        VoiceError: it is longer than a voice file holds.
    """
    if len(consent) > LONGEST_CONSENT:
        raise VoiceError(
            f"the consent has {len(consent)} characters, and a voice holds at most "
            f"{LONGEST_CONSENT}; shorten it, or name the document that holds it."
        )
    return consent


def save_voice(path: str | os.PathLike[str], voice: Voice) -> Path:
    """Write ``voice`` to ``path``, whole or not at all.

    Raises:
        AudioOutputError: the file cannot be written.
        VoiceError: the consent is longer than a voice file holds.
    """
    from safetensors.numpy import save

    target = Path(path)
    about = {
        "log_f0_mean": voice.log_f0_mean,
        "log_f0_std": voice.log_f0_std,
        "name": voice.name,
        "speech_seconds": voice.speech_seconds,
        "encoder": voice.encoder,
        "content_space": voice.content_space,
        "notes": list(voice.notes),
        "quality": dict(voice.quality),
        "consent": check_consent(voice.consent),
        "adapted_to": voice.fine_tuned_converter,
    }
    arrays: dict[str, NDArray[Any]] = {"embedding": voice.embedding}
    if voice.speech is not None:
        arrays["speech"] = voice.speech
    arrays |= {f"frames.{name}": values for name, values in voice.frames.items()}
    arrays |= {f"{FINE_TUNING}{name}": values for name, values in voice.fine_tuning.items()}
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    data = save(contiguous, metadata={"format": FORMAT, "voice": json.dumps(about)})
    try:
        with atomic_write(target) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise AudioOutputError(
            f"the voice cannot be written to {target} ({reason(error)}); name another output."
        ) from error
    return target


_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def load_voice(path: str | os.PathLike[str]) -> Voice:
    """Read what :func:`save_voice` wrote.

    Raises:
        VoiceError: the file is missing, damaged, or no voice.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise VoiceError(f"there is no voice file {source}; make one with `autovoice clone`.")
    if source.stat().st_size > MOST_BYTES:
        raise VoiceError(f"{source} is too large for a voice; make one with `autovoice clone`.")
    try:
        with safe_open(str(source), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise VoiceError(f"{source} is not a voice file; make one with `autovoice clone`.")
        about = json.loads(metadata["voice"])
        speech = arrays.pop("speech", None)
        if speech is not None and (speech.dtype != np.int16 or speech.ndim != 1):
            raise ValueError("speech is (samples,) of 16 bits")
        voice = Voice(
            embedding=arrays.pop("embedding").astype(np.float32),
            log_f0_mean=_number(about["log_f0_mean"]),
            log_f0_std=_number(about["log_f0_std"]),
            frames={
                name.removeprefix("frames."): value.astype(np.float32)
                for name, value in arrays.items()
                if not name.startswith(FINE_TUNING)
            },
            name=_line(about["name"]),
            speech_seconds=float(about["speech_seconds"]),
            encoder=_line(about["encoder"]),
            content_space=_line(about["content_space"]),
            notes=tuple(_line(note) for note in about["notes"]),
            # Files of the first release hold none of these.
            quality={_line(k): _number(v) for k, v in about.get("quality", {}).items()},
            consent=_consent(about.get("consent", "")),
            speech=speech,
            fine_tuning={
                name.removeprefix(FINE_TUNING): _half(value)
                for name, value in arrays.items()
                if name.startswith(FINE_TUNING)
            },
            fine_tuned_converter=_line(about.get("adapted_to", "")),
        )
    except (SafetensorError, *_DAMAGE) as error:
        if isinstance(error, VoiceError):
            raise
        raise VoiceError(f"{source} is damaged or no voice file; clone the voice again.") from error
    if not _plausible(voice):
        raise VoiceError(f"{source} holds damaged numbers; clone the voice again.")
    return voice


def load_voice_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a voice file says of its voice, by the names of :class:`Voice`; no array is read.

    ``has_recording`` says whether the speech was kept.

    Raises:
        VoiceError: the file is missing, damaged, or no voice.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    try:
        with safe_open(str(source), framework="numpy") as file:
            metadata, arrays = file.metadata() or {}, set(file.keys())
        if metadata.get("format") != FORMAT:
            raise ValueError("no voice")
        about = json.loads(metadata["voice"])
        pitch, seconds = _number(about["log_f0_mean"]), float(about["speech_seconds"])
        spread = _number(about["log_f0_std"])
        if pitch is not None and not LOWEST_LOG_F0 < pitch < HIGHEST_LOG_F0:
            raise ValueError("no pitch")
        if not math.isfinite(seconds):
            raise ValueError("no length")
        return {
            "log_f0_mean": pitch,
            "log_f0_std": spread,
            "speech_seconds": seconds,
            "encoder": _line(about["encoder"]),
            "content_space": _line(about["content_space"]),
            "quality": {_line(k): _number(v) for k, v in about.get("quality", {}).items()},
            "notes": [_line(note) for note in about["notes"][:MOST_LISTED_NOTES]],
            "consent": _consent(about.get("consent", "")),
            "has_recording": "speech" in arrays,
        }
    except (SafetensorError, *_DAMAGE) as error:
        raise VoiceError(f"{source} is damaged or no voice file; clone the voice again.") from error


def _plausible(voice: Voice) -> bool:
    """Whether every array has its shape and every number can be what it says it is."""
    rows = {len(values) for values in voice.frames.values() if values.ndim == 2}
    shaped = all(values.ndim == 2 and values.size for values in voice.frames.values())
    shaped &= voice.embedding.shape == (EMBEDDING_DIMS,) and len(rows) <= 1
    if "mel" in voice.frames:
        shaped &= voice.frames["mel"].shape[-1] == MEL_BANDS
    if shaped and "pitch" in voice.frames:
        shaped &= voice.frames["pitch"].shape[-1] == 2
        shaped &= bool((np.abs(voice.frames["pitch"][:, 0]) < HIGHEST_LOG_F0).all())
    floats: list[NDArray[Any]] = [voice.embedding, *voice.frames.values()]
    changes = voice.fine_tuning
    shaped &= len(changes) <= MOST_CHANGES and all(len(name) <= LONGEST_NAME for name in changes)
    shaped &= all((np.abs(values) < LARGEST_CHANGE).all() for values in changes.values())
    shaped &= bool(0.5 < np.linalg.norm(voice.embedding) < 2)
    bounded = all((np.abs(values) < LARGEST_VALUE).all() for values in floats)  # False for NaN
    mean, std = voice.log_f0_mean, voice.log_f0_std
    melody = (mean is None or LOWEST_LOG_F0 < mean < HIGHEST_LOG_F0) and (
        std is None or 0 <= std < HIGHEST_LOG_F0
    )
    known = (voice.speech_seconds, *(v for v in voice.quality.values() if v is not None))
    return shaped and bounded and melody and all(math.isfinite(value) for value in known)


# ln(Hz) between which a mean pitch is plausible, far beyond any voice.
LOWEST_LOG_F0, HIGHEST_LOG_F0 = math.log(10.0), math.log(10_000.0)


def _line(value: Any) -> str:
    """Text of a file from elsewhere, without what could steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value)[:1000])


def _consent(value: Any) -> str:
    """The whole consent with its lines, without what could steer a terminal."""
    text = check_consent(str(value))
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _half(values: NDArray[Any]) -> NDArray[np.float16]:
    if values.dtype.kind != "f":
        raise TypeError(f"a fine-tuning is of floating point, not {values.dtype}")
    # What half precision cannot hold is far beyond the bound that is checked later.
    halves: NDArray[np.float16] = np.clip(values, -65504, 65504).astype(np.float16)
    return halves


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
