"""Values that travel between stages: frozen dataclasses of numpy arrays that carry their rates.

Nothing here imports torch, reads a file or knows a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

# Hz at which every network that analyses speech hears it.
SPEECH_RATE = 16_000
# Of a speaker embedding (GE2E).
EMBEDDING_DIMS = 256


@dataclass(frozen=True, eq=False, repr=False)
class Waveform:
    """One channel of audio.

    Attributes:
        samples: ``(samples,)`` float32, nominally in [-1, 1].
        sample_rate: Hz.
        notes: What was done to the recording on its way here (mixed down, resampled, clipped
            input…), one plain phrase each; results repeat them so that nothing is silent.
    """

    samples: FloatArray
    sample_rate: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    def with_note(self, note: str) -> Waveform:
        return replace(self, notes=(*self.notes, note))

    def __repr__(self) -> str:
        return f"Waveform({self.seconds:.2f} s at {self.sample_rate} Hz)"


@dataclass(frozen=True, eq=False)
class Content:
    """What is said, without who says it.

    Attributes:
        features: ``(frames, dims)`` float32.
        frame_rate: frames per second (50 for every encoder of the catalog).
        space: name of the feature space, e.g. ``content_space@1.0``; a converter accepts one space.
    """

    features: FloatArray
    frame_rate: float
    space: str


@dataclass(frozen=True, eq=False)
class Pitch:
    """Fundamental frequency.

    Attributes:
        f0_hz: ``(frames,)`` float32, Hz; the value is meaningless where ``voiced`` is false.
        voiced: ``(frames,)`` bool.
        frame_rate: frames per second (62.5 for SwiftF0); frame ``i`` is centred at
            ``i / frame_rate`` s.
    """

    f0_hz: FloatArray
    voiced: BoolArray
    frame_rate: float


@dataclass(frozen=True, eq=False)
class Mel:
    """Log-mel spectrogram, ``log(clamp(mel, 1e-5))`` as HiFi-GAN defines it.

    Attributes:
        values: ``(bands, frames)`` float32, natural log.
        sample_rate: Hz of the audio it describes.
        hop_samples: samples between frames.
    """

    values: FloatArray
    sample_rate: int
    hop_samples: int

    @property
    def frame_rate(self) -> float:
        return self.sample_rate / self.hop_samples


@dataclass(frozen=True, eq=False, repr=False)
class Voice:
    """Everything a converter may condition on to speak as one person.

    Attributes:
        embedding: ``(256,)`` float32, unit norm (GE2E, Wan et al. 2018).
        log_f0_mean: mean of ln(F0 in Hz) over voiced frames; None when only an embedding is known.
        log_f0_std: its standard deviation, same unit.
        frames: further conditioning by name, e.g. ``mel`` ``(frames, 80)``, ``content``
            ``(frames, dims)`` and ``pitch`` ``(frames, 2)`` (log-F0, voicing) of the reference at
            the mel frame rate; empty for a bare embedding.
        name: what the user calls it.
        speech_seconds: speech that the reference held after silence was removed.
        encoder: ``name@version`` of the speaker encoder that made ``embedding``.
        content_space: feature space of ``frames["content"]``.
        notes: warnings from enrolment, one sentence each.
        quality: figures of the reference by name, such as ``snr_db``, ``clipping_ratio`` and
            ``speakers``; None where one could not be had.
        consent: what the owner of the voice agreed to, in the user's words.
        speech: ``(samples,)`` int16 at 16 kHz, the speech that the voice was made from; None where
            it was not kept. With it a voice can be encoded again for other models.
        fine_tuning: what fine-tuning to this voice adds to the converter's weights, by parameter;
            empty where the converter speaks it as it is.
        fine_tuned_converter: ``name@version`` of the converter that ``fine_tuning`` belongs to.
    """

    embedding: FloatArray
    log_f0_mean: float | None = None
    log_f0_std: float | None = None
    frames: Mapping[str, FloatArray] = field(default_factory=dict)
    name: str = ""
    speech_seconds: float = 0.0
    encoder: str = ""
    content_space: str = ""
    notes: tuple[str, ...] = ()
    quality: Mapping[str, float | None] = field(default_factory=dict)
    consent: str = ""
    speech: NDArray[np.int16] | None = None
    fine_tuning: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)
    fine_tuned_converter: str = ""

    def __repr__(self) -> str:
        tuned = f", fine-tuned {self.fine_tuned_converter}" if self.fine_tuning else ""
        return f"Voice({self.name!r}, {self.speech_seconds:.1f} s of speech{tuned})"
