"""What is measured of one conversion: plain functions from audio, pitch, embeddings and texts.

Nothing here loads a model; encoders, recogniser and quality model are handed in. Words are counted
by jiwer, in texts that Whisper's English normaliser has made comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.pitch import log_f0_statistics
from auto_voice.errors import EvaluationError, MissingDependencyError
from auto_voice.types import FloatArray, Pitch, Waveform

if TYPE_CHECKING:
    import jiwer

NAN = float("nan")
# A 16-bit sample at full scale reads 0.99997; anything from here up counts as clipped.
CLIPPED_AT = 0.999
# Two recordings whose durations differ by less than this share are compared second by second.
SAME_DURATION = 0.02
# Fewer frames voiced in both recordings say nothing about a melody.
MIN_VOICED_FRAMES = 10


class Embedder(Protocol):
    """The part of a speaker encoder that similarity needs."""

    sample_rate: int

    def embed_utterance(self, samples: FloatArray) -> FloatArray: ...


@dataclass(frozen=True)
class PitchAgreement:
    """How far the melody of a source survives in its conversion.

    Attributes:
        correlation: Pearson's r of log-F0 over frames voiced in both; blind to transposition.
        rmse_cents: root mean square difference after the mean shift is taken out.
        shift_cents: that mean shift, converted minus source; 1200 is an octave up.
        voicing_error: share of frames voiced in exactly one of the two.
        frames: frames voiced in both; the first three are NaN below ``MIN_VOICED_FRAMES``.
        stretched: durations differed, so the converted time axis was scaled linearly.
    """

    correlation: float
    rmse_cents: float
    shift_cents: float
    voicing_error: float
    frames: int
    stretched: bool = False


@dataclass(frozen=True)
class EqualError:
    """Equal error rate of a list of trials.

    Attributes:
        rate: where false acceptances and false rejections are equally frequent, in [0, 1].
        threshold: the score there.
        same, different: numbers of trials of either kind.
    """

    rate: float
    threshold: float
    same: int
    different: int


@dataclass(frozen=True)
class ErrorCount:
    """Edits between a reference and a hypothesis.

    Attributes:
        substitutions, deletions, insertions: of a cheapest edit script.
        reference: units (words or characters) in the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    reference: int

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per reference unit; may exceed 1. NaN where the reference is empty."""
        return self.edits / self.reference if self.reference else float("nan")


def samples_at(audio: Waveform | FloatArray, sample_rate: int) -> FloatArray:
    """``(samples,)`` float32 at ``sample_rate``; a bare array is taken to be at it already."""
    if not isinstance(audio, Waveform):
        return np.asarray(audio, dtype=np.float32)
    if audio.sample_rate == sample_rate:
        return audio.samples
    from auto_voice.audio.resample import resample

    return resample(audio.samples, audio.sample_rate, sample_rate)


def cosine(a: ArrayLike, b: ArrayLike) -> float:
    """Cosine of the angle between two vectors; 0 where one of them is zero."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.clip(x @ y / scale, -1, 1)) if scale else 0.0


def pitch_agreement(source: Pitch, converted: Pitch) -> PitchAgreement:
    """Compare two pitch tracks frame by frame at the source's frame rate.

    The converted track is read at the source's frame times (nearest frame). Where the durations
    differ by more than ``SAME_DURATION``, its time axis is first scaled linearly; otherwise the
    longer one is cut.
    """
    f0_a, voiced_a = np.asarray(source.f0_hz, dtype=np.float64), source.voiced
    seconds_a = len(f0_a) / source.frame_rate
    seconds_b = len(converted.f0_hz) / converted.frame_rate
    if not seconds_a or not seconds_b:
        raise EvaluationError("A pitch track is empty; give recordings that hold speech.")
    stretched = abs(seconds_b / seconds_a - 1) > SAME_DURATION
    times = np.arange(len(f0_a)) / source.frame_rate * (seconds_b / seconds_a if stretched else 1)
    index = np.rint(times * converted.frame_rate).astype(int)
    keep = index < len(converted.f0_hz)
    index = index[keep]
    f0_a, voiced_a = f0_a[keep], voiced_a[keep]
    f0_b, voiced_b = np.asarray(converted.f0_hz, dtype=np.float64)[index], converted.voiced[index]
    voicing_error = float(np.mean(voiced_a != voiced_b))
    both = voiced_a & voiced_b & (f0_a > 0) & (f0_b > 0)
    frames = int(both.sum())
    if frames < MIN_VOICED_FRAMES:
        return PitchAgreement(NAN, NAN, NAN, voicing_error, frames, stretched)
    a, b = 1200 * np.log2(f0_a[both]), 1200 * np.log2(f0_b[both])
    difference = b - a
    shift = float(difference.mean())
    flat = min(a.std(), b.std()) < 1e-6
    return PitchAgreement(
        correlation=NAN if flat else float(np.corrcoef(a, b)[0, 1]),
        rmse_cents=float(np.sqrt(np.mean((difference - shift) ** 2))),
        shift_cents=shift,
        voicing_error=voicing_error,
        frames=frames,
        stretched=stretched,
    )


def register_error_cents(target: Pitch, converted: Pitch) -> float:
    """Mean log-F0 of ``converted`` minus that of ``target``, in cents; NaN without voice.

    Frames more than 0.6 octaves from the median are left out, so that neither creak nor octave
    errors of the tracker count.
    """
    if min(int(p.voiced.sum()) for p in (target, converted)) < MIN_VOICED_FRAMES:
        return NAN
    wanted, got = log_f0_statistics(target), log_f0_statistics(converted)
    if wanted is None or got is None:
        return NAN
    return float(1200 / np.log(2) * (got[0] - wanted[0]))


def mel_cepstrum(samples: FloatArray, sample_rate: int, order: int = 13) -> FloatArray:
    """``(order, frames)``: cepstral coefficients 1…order of the 80-band log-mel of HiFi-GAN.

    Scaled so that ``log_mel[n] = c0 + 2 * sum(c_k cos(pi k (n + 1/2) / 80))``. Coefficient 0,
    the level, is left out.
    """
    mel = log_mel(samples_at(Waveform(samples, sample_rate), HIFIGAN_MEL.sample_rate), HIFIGAN_MEL)
    bands = len(mel)
    k, n = np.arange(1, order + 1)[:, None], np.arange(bands)[None]
    basis = np.cos(np.pi * k * (n + 0.5) / bands) / bands
    return (basis @ mel).astype(np.float32)


def mel_cepstral_distance(
    a: Waveform, b: Waveform, *, order: int = 13, align: bool = True
) -> float:
    """Mean ``10 / ln 10 * sqrt(2 * sum(dc_k^2))`` in dB over the frames of two parallel recordings.

    Both say the same words; ``align`` warps their time axes onto each other (dynamic time
    warping), else frame ``i`` meets frame ``i`` and the longer one is cut. Level does not count.
    The cepstrum is that of a mel filterbank, so figures do not compare with WORLD's or SPTK's.
    """
    # One level for both: the floor of the log-mel would else make the louder one differ.
    x, y = (
        mel_cepstrum(
            w.samples * np.float32(gain_to_speech_level(w.samples, w.sample_rate)),
            w.sample_rate,
            order,
        )
        for w in (a, b)
    )
    if align:
        squares = (x**2).sum(0)[:, None] + (y**2).sum(0)[None] - 2 * x.T @ y
        distances = np.sqrt(2 * np.maximum(squares, 0))
        rows, columns = warping_path(distances.astype(np.float64))
        path = distances[rows, columns]
    else:
        frames = min(x.shape[1], y.shape[1])
        path = np.sqrt(2 * ((x[:, :frames] - y[:, :frames]) ** 2).sum(0))
    return float(10 / np.log(10) * path.mean())


def warping_path(
    cost: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the cheapest monotone path through ``(n, m)`` costs, corner to corner.

    Steps are one row, one column, or both; computed by anti-diagonals, since all cells of one
    depend only on the two before it.
    """
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(2, n + m + 1):
        i = np.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1)
        j = diagonal - i
        before = np.minimum(np.minimum(total[i - 1, j], total[i, j - 1]), total[i - 1, j - 1])
        total[i, j] = cost[i - 1, j - 1] + before
    i_, j_ = n, m
    path = [(n - 1, m - 1)]
    while (i_, j_) != (1, 1):
        steps = ((i_ - 1, j_ - 1), (i_ - 1, j_), (i_, j_ - 1))
        i_, j_ = min(steps, key=lambda s: total[s])
        path.append((i_ - 1, j_ - 1))
    rows, columns = np.array(path[::-1], dtype=np.int64).T
    return rows, columns


def clipped_share(samples: ArrayLike) -> float:
    """Share of samples at or beyond full scale, in [0, 1]."""
    x = np.asarray(samples)
    return float(np.mean(np.abs(x) >= CLIPPED_AT)) if x.size else 0.0


def loudness_lufs(audio: Waveform) -> float:
    """Integrated loudness (ITU-R BS.1770), LUFS; NaN for a recording too quiet or short to gate."""
    from auto_voice.audio.loudness import integrated_loudness

    value = float(integrated_loudness(audio.samples, audio.sample_rate))
    return value if np.isfinite(value) else NAN


def equal_error_rate(same: ArrayLike, different: ArrayLike) -> EqualError:
    """Where a threshold on the score errs equally often on both kinds of trials.

    Args:
        same: scores of trials that should be accepted; higher means more alike.
        different: scores of trials that should be rejected.

    Between the two operating points around the crossing, both rates are taken to be linear.

    Raises:
        EvaluationError: one of the lists is empty.
    """
    a, b = np.sort(np.asarray(same, float)), np.sort(np.asarray(different, float))
    if not len(a) or not len(b):
        raise EvaluationError(
            "An equal error rate needs trials of both kinds; add same- or different-speaker trials."
        )
    thresholds = np.concatenate([np.unique(np.concatenate([a, b])), [np.inf]])
    rejected = np.searchsorted(a, thresholds, side="left") / len(a)
    accepted = 1 - np.searchsorted(b, thresholds, side="left") / len(b)
    # rejected rises from 0, accepted falls to 0: the crossing is where their difference turns.
    gap = rejected - accepted
    hi = int(np.argmax(gap >= 0))
    lo = max(hi - 1, 0)
    step = float(gap[hi] - gap[lo])
    weight = float(-gap[lo]) / step if step else 0.0
    rate = float(rejected[lo] + weight * (rejected[hi] - rejected[lo]))
    top = thresholds[hi] if np.isfinite(thresholds[hi]) else thresholds[lo]
    threshold = float(thresholds[lo] + weight * (top - thresholds[lo]))
    return EqualError(rate, threshold, len(a), len(b))


def normalise_text(text: str) -> str:
    """The text as it is compared: Whisper's English normaliser (Radford et al. 2022, appendix C).

    It writes lower case without marks and fillers, contractions in full, numbers as digits and
    British spellings as American ones. Typographic apostrophes, which it would part words at, are
    made plain first.

    Raises:
        MissingDependencyError: the extra ``eval`` is not installed.
    """
    return " ".join(_whisper_normaliser()(text.replace("’", "'")).split())


def word_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Word edits from ``reference`` to ``hypothesis``, both normalised."""
    return _count(_aligned(reference, hypothesis))


def character_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Character edits, both texts normalised; spaces between words count as characters."""
    texts = normalise_text(reference), normalise_text(hypothesis)
    return _count(_jiwer().process_characters(*texts))


def aligned_words(reference: str, hypothesis: str) -> Iterator[tuple[bool, str, str]]:
    """Runs of words of both normalised texts, in order, and whether they are the same."""
    found = _aligned(reference, hypothesis)
    for chunk in found.alignments[0]:
        yield (
            chunk.type == "equal",
            " ".join(found.references[0][chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(found.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )


def _aligned(reference: str, hypothesis: str) -> jiwer.WordOutput:
    texts = normalise_text(reference), normalise_text(hypothesis)
    return cast("jiwer.WordOutput", _jiwer().process_words(*texts))


def _count(found: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorCount:
    reference = found.hits + found.substitutions + found.deletions
    return ErrorCount(found.substitutions, found.deletions, found.insertions, reference)


@cache
def _whisper_normaliser() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise _missing("whisper-normalizer") from error
    return cast("Callable[[str], str]", EnglishTextNormalizer())


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise _missing("jiwer") from error
    return jiwer


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{package} is not installed, so words cannot be compared; install it with: "
        "pip install 'auto-voice[eval]', or leave them out with --without words"
    )
