"""A voice as one safetensors file: arrays of numbers and a line of JSON, nothing that executes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import AudioOutputError, VoiceError
from auto_voice.models.disk import fsync_file, move_into_place, temporary_beside
from auto_voice.types import Voice

SUFFIX = ".safetensors"
FORMAT = "auto_voice.voice/1"


def save_voice(path: str | os.PathLike[str], voice: Voice) -> Path:
    """Write ``voice`` to ``path``, whole or not at all."""
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
        "consent": voice.consent,
    }
    arrays: dict[str, NDArray[Any]] = {"embedding": voice.embedding}
    if voice.speech is not None:
        arrays["speech"] = voice.speech
    arrays |= {f"frames.{name}": values for name, values in voice.frames.items()}
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    data = save(contiguous, metadata={"format": FORMAT, "voice": json.dumps(about)})
    try:
        temporary = temporary_beside(target)
        try:
            temporary.write_bytes(data)
            fsync_file(temporary)
            move_into_place(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise AudioOutputError(f"the voice cannot be written to {target}: {error}.") from error
    return target


def load_voice(path: str | os.PathLike[str]) -> Voice:
    """Read what :func:`save_voice` wrote.

    Raises:
        VoiceError: the file is missing, damaged, or no voice.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise VoiceError(f"there is no voice file {source}; make one with `autovoice clone`.")
    try:
        with safe_open(str(source), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise VoiceError(f"{source} is not a voice file; make one with `autovoice clone`.")
        about = json.loads(metadata["voice"])
        speech = arrays.pop("speech", None)
        voice = Voice(
            embedding=arrays.pop("embedding").astype(np.float32),
            log_f0_mean=_number(about["log_f0_mean"]),
            log_f0_std=_number(about["log_f0_std"]),
            frames={name.removeprefix("frames."): value for name, value in arrays.items()},
            name=str(about["name"]),
            speech_seconds=float(about["speech_seconds"]),
            encoder=str(about["encoder"]),
            content_space=str(about["content_space"]),
            notes=tuple(str(note) for note in about["notes"]),
            # Files of the first release hold none of these.
            quality={str(k): _number(v) for k, v in about.get("quality", {}).items()},
            consent=str(about.get("consent", "")),
            speech=None if speech is None else speech.astype(np.int16).reshape(-1),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, VoiceError):
            raise
        raise VoiceError(f"{source} is damaged or no voice file; clone the voice again.") from error
    finite = all(np.isfinite(values).all() for values in (voice.embedding, *voice.frames.values()))
    if voice.embedding.ndim != 1 or not finite:
        raise VoiceError(f"{source} holds damaged numbers; clone the voice again.")
    return voice


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
