"""Speech to text with Whisper weights in CTranslate2 form, run by faster-whisper."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from auto_voice.errors import AudioContentError, MissingDependencyError, ModelLoadError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.types import SPEECH_RATE, FloatArray

# At 16 kHz, one frame of Whisper's mel; less has no spectrum.
MIN_SAMPLES = 400
# Text that compresses further than this says the same over and over: Whisper's own sign that it
# lost the thread (Radford et al. 2022).
LOOPING = 2.4
# Word pieces that may be said twice when a text is looked for anew.
LONGEST_REPEAT = 4


class Recogniser:
    """Transcribes speech, the same each time: beam of five, no sampling, no carried context.

    Where the text goes round in circles, it is looked for anew without repeats.

    Args:
        model: a ``faster_whisper.WhisperModel``.
        name: ``name@version`` of the weights.
        language: two-letter code, told to the model so that it need not guess.
    """

    sample_rate = SPEECH_RATE

    def __init__(self, model: Any, name: str = "recogniser", language: str = "en") -> None:
        self.name = name
        self.language = language
        self._model = model
        self._lock = threading.Lock()

    def transcribe(self, samples: FloatArray) -> str:
        """The words of ``(samples,)`` at 16 kHz; an empty string where none are heard.

        Raises:
            AudioContentError: the recording is empty or not finite.
        """
        x = np.asarray(samples, dtype=np.float32).reshape(-1)
        if len(x) < MIN_SAMPLES or not np.isfinite(x).all():
            raise AudioContentError(
                "The recording is empty or not finite; give speech to transcribe."
            )
        with self._lock:
            segments = self._segments(x)
            if any(s.compression_ratio > LOOPING for s in segments):
                segments = self._segments(x, no_repeat_ngram_size=LONGEST_REPEAT)
            return " ".join(s.text.strip() for s in segments).strip()

    def _segments(self, samples: FloatArray, **more: Any) -> list[Any]:
        segments, _ = self._model.transcribe(
            samples,
            language=self.language,
            task="transcribe",
            beam_size=5,
            # No fallback temperatures: they sample, so two runs could differ.
            temperature=0.0,
            condition_on_previous_text=False,
            vad_filter=False,
            **more,
        )
        return list(segments)


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> Recogniser:
    """The recogniser whose folder holds ``model.bin``, ``config.json`` and the tokenizer.

    ``version.params`` may set ``language`` (default ``en``) and ``compute_type`` (default
    ``float32``: the same text on every processor).

    Raises:
        MissingDependencyError: faster-whisper is not installed.
        ModelLoadError: the folder holds no such model.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise MissingDependencyError(
            f"{version.key} needs faster-whisper; install it with: pip install 'auto-voice[eval]'"
        ) from error
    folder = files["model.bin"].parent
    try:
        model = WhisperModel(
            str(folder),
            device="cuda" if device.startswith("cuda") else "cpu",
            compute_type=str(version.params.get("compute_type", "float32")),
            local_files_only=True,
        )
    except Exception as error:  # ctranslate2 and tokenizers raise RuntimeError and bare Exception
        raise ModelLoadError(
            f"{version.key} cannot be loaded ({error}); fetch it again with: "
            f"autovoice models pull {version.name} --force"
        ) from error
    return Recogniser(model, version.key, str(version.params.get("language", "en")))
