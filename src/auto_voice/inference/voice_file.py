"""A voice as one safetensors file: arrays of numbers and a line of JSON, nothing that executes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from auto_voice.errors import AudioOutputError, VoiceError
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
    }
    arrays = {"embedding": voice.embedding}
    arrays |= {f"frames.{name}": values for name, values in voice.frames.items()}
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    data = save(contiguous, metadata={"format": FORMAT, "voice": json.dumps(about)})
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(target)
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
