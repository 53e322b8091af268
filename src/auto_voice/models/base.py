"""What each stage of a conversion promises: shapes, rates and units.

Stages speak numpy at their boundary, so real, compact and mock models are interchangeable and
nothing here imports torch. The registry builds them; the pipeline gets them injected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.types import Content, FloatArray, Mel, Pitch, Voice

# Numbers of a converter, given in its record, that say how mels are drawn with it.
DRAWING = ("guidance", "correction", "second_pass")


@runtime_checkable
class ContentEncoder(Protocol):
    """Speech at 16 kHz to features of what is said, 50 a second."""

    name: str
    """``name@version`` of the weights; ``mock`` for the mock."""
    space: str
    """Feature space that ``encode`` returns; a converter accepts one space."""
    sample_rate: int
    frame_rate: float
    dims: int

    def extract_features(
        self, audio: ArrayLike, lengths: NDArray[np.int64] | None = None
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` at ``sample_rate`` to ``(batch, time, dims)``.

        Args:
            audio: float samples in [-1, 1]; rows shorter than the batch are zero-padded.
            lengths: valid samples of each row; None if all are full. Frames past a row's own
                length are zero, and the others equal those of the row computed alone.
        """
        ...

    def encode(self, samples: FloatArray) -> Content:
        """One utterance ``(samples,)`` at ``sample_rate`` to its content, in ``space``."""
        ...


@runtime_checkable
class PieceEncoder(Protocol):
    """A content encoder that takes something of the whole utterance out of its features.

    A long recording comes in pieces. ``encode_piece`` of each, and ``centred`` with the mean over
    all of them, give what ``encode`` of the whole would.
    """

    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` of a piece, already at the level of the whole, to ``(frames, dims)``."""
        ...

    def centred(self, features: FloatArray, mean: FloatArray) -> Content:
        """What ``encode_piece`` gave, as content of a whole whose features have this mean."""
        ...


class ContentStream(Protocol):
    """The content of one stream, part by part; it remembers what came before."""

    context_frames: int
    """Frames before the new ones that must be given again, as far as there are any."""

    def encode(self, samples: FloatArray, skipped: int, start: int, stop: int) -> FloatArray:
        """``(frames, dims)`` from frame ``start`` of the stream on, the mean left in.

        Args:
            samples: at the level of the whole, up to beyond frame ``stop``: those of ``skipped``
                frames, which are context, then the new ones.
            start, stop: the frames that will not be given again but for context. The features
                beyond ``stop`` are the look-ahead.
        """
        ...


@runtime_checkable
class StreamingEncoder(Protocol):
    """A piece encoder that can remember the past of a stream."""

    def stream(self) -> ContentStream | None:
        """For one stream; None where this encoder cannot."""
        ...


def cosine(a: FloatArray, b: FloatArray) -> float:
    """Of the angle between two vectors ``(dims,)`` that are not zero, in [-1, 1]."""
    return float(np.clip(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))


@runtime_checkable
class SpeakerEncoderStage(Protocol):
    """Speech at 16 kHz to a unit vector of who speaks."""

    name: str
    sample_rate: int
    dims: int

    def embed_utterance(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at ``sample_rate`` to ``(dims,)`` float32 of unit norm."""
        ...

    def similarity(self, a: FloatArray, b: FloatArray) -> float:
        """Cosine of two embeddings, in [-1, 1]."""
        ...


@runtime_checkable
class Converter(Protocol):
    """Content, pitch and a voice to a log-mel spectrogram."""

    name: str
    content_space: str
    """The space that ``content`` must be in."""
    sample_rate: int
    hop_samples: int

    def convert(self, content: Content, pitch: Pitch, voice: Voice, frames: int) -> Mel:
        """The mel of ``content`` spoken by ``voice``: exactly ``frames`` frames.

        Args:
            pitch: already transposed to where the result should lie.
            frames: of the output, at ``sample_rate / hop_samples`` a second.
        """
        ...


@runtime_checkable
class FineTunableConverter(Protocol):
    """A converter that can be fitted to one voice."""

    name: str

    def fine_tune(
        self, voice: Voice, steps: int, progress: Callable[[float], None] | None = None
    ) -> Voice:
        """``voice`` with what this converter learnt in ``steps`` from its speech.

        A voice that holds too little to learn from comes back as it was.
        """
        ...


@runtime_checkable
class CorrectingConverter(Protocol):
    """A converter that corrects what it draws by what it misses of the reference."""

    def corrected(self, mel: Mel, voice: Voice) -> Mel:
        """``mel``, which it drew in ``voice``, nearer to the voice."""
        ...


@runtime_checkable
class RevoicingConverter(Protocol):
    """A converter whose content holds the spectral envelope of the source, which can be changed to
    that of the voice before the mel is drawn once more."""

    second_pass: float
    """By how much; 0 for not."""

    def revoiced(
        self, content: Content, mel: Mel, start: Mel, voice: Voice, own: Voice
    ) -> Content | None:
        """``content`` as ``voice`` would have said it; None where that cannot be told.

        Args:
            mel: drawn from it in ``voice``.
            start: drawn from it in ``own``, the source's voice, at the same pitch.
        """
        ...


@runtime_checkable
class Vocoder(Protocol):
    """Log-mel spectrogram to audio."""

    name: str
    sample_rate: int
    hop_samples: int
    bands: int

    def synthesize(self, mel: ArrayLike) -> FloatArray:
        """``([batch,] bands, frames)`` to ``(batch, frames * hop_samples)``."""
        ...


@runtime_checkable
class PartVocoder(Protocol):
    """A vocoder that makes a part of a spectrogram for less than the whole costs."""

    def synthesize_part(self, mel: FloatArray, start: int, stop: int) -> FloatArray:
        """Frames ``[start, stop)`` of what ``synthesize`` makes of ``(bands, frames)``.

        ``(1, (stop - start) * hop_samples)``. Near the ends of the mel it may differ from that.
        """
        ...
