"""Maps of content features: any encoder's features into the space that a converter was trained on.

A ridge regression between two encoders of the same speech. The mean of each utterance is taken off
the source features first, as content encoders do with their own: it holds much of the speaker and
none of the words. What a content space computes from the sound itself (band envelopes, cepstra) is
computed here, too, and only the learned dimensions are mapped.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.loudness import gain_to_speech_level
from auto_voice.audio.mel import CONTENT_MEL, envelope_size, log_mel, with_envelope
from auto_voice.errors import AudioContentError, ConfigError, ModelLoadError
from auto_voice.filesystem import atomic_write
from auto_voice.models.base import ContentEncoder, Converter, PieceEncoder
from auto_voice.models.model_registry import PIPELINE_MODELS
from auto_voice.types import Content, FloatArray, Waveform

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry

log = logging.getLogger(__name__)

# Names within the file, which are those of 0.1.
FORMAT, FACTS = "auto_voice adapter 1", "adapter"
# Long recordings are cut into pieces of so many seconds, each an utterance with a mean of its own.
PIECE_SECONDS = 10.0
# One piece of so many measures R² on speech that the regression has not seen.
HOLD_OUT_EVERY = 5
# Seconds of speech: fewer frames than a few times the 768 dimensions that they are mapped from.
MIN_SECONDS = 10.0
# Penalties that are tried, in units of a standardised source dimension's energy.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, eq=False)
class ContentMap:
    """An affine map of features of one content space into another.

    Attributes:
        matrix: ``(source dims, target dims)`` float32, applied to features less their mean over
            the utterance.
        bias: ``(target dims,)`` float32.
        source, target: names of the two spaces.
        frame_rate: of both, frames per second.
        r2: share of the target's variance explained on speech that the fit had not seen; 1 is
            perfect, 0 no better than a constant.
        seconds: of speech that it was fitted on.
        envelope, cepstra: whether band envelopes and cepstra follow in the target space.
    """

    matrix: FloatArray
    bias: FloatArray
    source: str
    target: str
    frame_rate: float
    r2: float
    seconds: float
    envelope: bool = False
    cepstra: bool = False

    @property
    def dims(self) -> int:
        """Features of the target space."""
        return int(self.matrix.shape[1]) + envelope_size(self.envelope, self.cepstra)

    def apply_centred(self, features: FloatArray, mean: FloatArray) -> Content:
        """Features that ``MappedEncoder.encode_piece`` gave of an utterance with this mean."""
        centred, learned = features - mean, self.matrix.shape[0]
        mapped = centred[:, :learned] @ self.matrix + self.bias
        whole = np.concatenate([mapped, centred[:, learned:]], axis=1)
        return Content(whole.astype(np.float32, copy=False), self.frame_rate, self.target)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as safetensors, whole or not at all."""
        from safetensors.numpy import save

        facts = {
            "source": self.source,
            "target": self.target,
            "frame_rate": self.frame_rate,
            "r2": self.r2,
            "seconds": self.seconds,
            "envelope": self.envelope,
            "cepstra": self.cepstra,
        }
        data = save(
            {"matrix": self.matrix, "bias": self.bias},
            metadata={"format": FORMAT, FACTS: json.dumps(facts)},
        )
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as temporary:
            temporary.write_bytes(data)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ContentMap:
        """Read what ``save`` wrote.

        Raises:
            ModelLoadError: missing, damaged, or no content map.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                metadata = file.metadata() or {}
                matrix, bias = file.get_tensor("matrix"), file.get_tensor("bias")
            if metadata.get("format") != FORMAT:
                raise ValueError("another format")
            content_map = cls(matrix=matrix, bias=bias, **json.loads(metadata[FACTS]))
            if matrix.ndim != 2 or bias.shape != matrix.shape[1:]:
                raise ValueError("shapes that do not fit each other")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ModelLoadError(
                f"{path} is no content map ({error}); run `autovoice models map` again."
            ) from error
        return content_map


class MappedEncoder:
    """A content encoder whose features come out in the map's target space.

    Args:
        encoder: of the source space.
        content_map: from the space of ``encoder``.

    Raises:
        ConfigError: the map is of another space.
    """

    def __init__(self, encoder: ContentEncoder, content_map: ContentMap) -> None:
        if encoder.space != content_map.source:
            raise ConfigError(
                f"The map is of {content_map.source} and not of {encoder.space}; "
                f"run `autovoice models map {encoder.name.partition('@')[0]}`."
            )
        self.encoder = encoder
        self.content_map = content_map
        self.name = encoder.name
        self.space = content_map.target
        self.sample_rate = encoder.sample_rate
        self.frame_rate = encoder.frame_rate
        self.dims = content_map.dims

    @property
    def note(self) -> str:
        """For each result: how much of the content got through."""
        return (
            f"content: {self.name} is mapped into {self.space} and explains "
            f"{100 * self.content_map.r2:.0f} % of its learned features; words may get lost"
        )

    def encode(self, samples: FloatArray) -> Content:
        """One utterance ``(samples,)`` to its content in the map's target space."""
        level = np.float32(gain_to_speech_level(samples, self.sample_rate))
        features = self._with_computed(self.encoder.encode(samples).features, samples * level)
        return self.content_map.apply_centred(features, features.mean(axis=0))

    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """The wrapped encoder's features of a piece at the level of the whole, the mean left in.

        Band envelopes and cepstra follow where the target space has them.
        """
        if isinstance(self.encoder, PieceEncoder):
            features = self.encoder.encode_piece(samples)
        else:
            features = self.encoder.encode(samples).features
        return self._with_computed(features, samples)

    def _with_computed(self, features: FloatArray, samples: FloatArray) -> FloatArray:
        if not self.content_map.envelope:
            return features
        mel = log_mel(samples, CONTENT_MEL)
        frames = min(len(features), mel.shape[1] // 2)
        return with_envelope(features[:frames], mel, self.content_map.cepstra)

    def centred(self, features: FloatArray, mean: FloatArray) -> Content:
        """Features of a piece as the content of an utterance whose ``mean`` is ``(dims,)``."""
        return self.content_map.apply_centred(features, mean)

    def extract_features(
        self, audio: ArrayLike, lengths: NDArray[np.int64] | None = None
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` to ``(batch, time, dims)``, row by row."""
        batch = np.atleast_2d(np.asarray(audio, dtype=np.float32))
        sizes = [batch.shape[1]] * len(batch) if lengths is None else np.asarray(lengths).tolist()
        rows = [self.encode(row[:n]).features for row, n in zip(batch, sizes, strict=True)]
        frames = max(len(row) for row in rows)
        return np.stack([np.pad(row, ((0, frames - len(row)), (0, 0))) for row in rows])


@dataclass
class _Sums:
    """Running sums of a regression: one pass over the speech, memory for the covariance alone."""

    dims: tuple[int, int]
    frames: int = 0
    xx: NDArray[np.float64] = field(init=False)
    xy: NDArray[np.float64] = field(init=False)
    y: NDArray[np.float64] = field(init=False)
    yy: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        source, target = self.dims
        self.xx, self.xy = np.zeros((source, source)), np.zeros((source, target))
        self.y, self.yy = np.zeros(target), np.zeros(target)

    def add(self, x: FloatArray, y: FloatArray) -> None:
        wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
        self.frames += len(x)
        self.xx += wide_x.T @ wide_x
        self.xy += wide_x.T @ wide_y
        self.y += wide_y.sum(axis=0)
        self.yy += (wide_y**2).sum(axis=0)

    def plus(self, other: _Sums) -> _Sums:
        total = _Sums(self.dims, self.frames + other.frames)
        for name in ("xx", "xy", "y", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def solve(self, ridges: Sequence[float]) -> list[NDArray[np.float64]]:
        """One ``(source, target)`` matrix for each penalty; x has no mean, so the bias is y's."""
        scale = np.sqrt(np.maximum(np.diag(self.xx) / self.frames, 1e-12))
        values, vectors = np.linalg.eigh(self.xx / np.outer(scale, scale) / self.frames)
        rotated = vectors.T @ (self.xy / scale[:, None] / self.frames)
        shrunk = (np.maximum(values, 0.0)[:, None] + ridge for ridge in ridges)
        return [vectors @ (rotated / divisor) / scale[:, None] for divisor in shrunk]

    def r2(self, matrix: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
        """Share of the variance about the mean that ``x @ matrix + bias`` explains here."""
        error = (
            self.yy.sum()
            - 2 * (self.xy * matrix).sum()
            - 2 * (self.y * bias).sum()
            + (matrix * (self.xx @ matrix)).sum()
            + self.frames * (bias**2).sum()
        )
        variance = (self.yy - self.y**2 / self.frames).sum()
        return float(1 - error / max(variance, 1e-12))


def fit_map(
    source_encoder: ContentEncoder,
    target_encoder: ContentEncoder,
    waveforms: Iterable[Waveform],
) -> ContentMap:
    """The map that takes ``source_encoder``'s content closest to ``target_encoder``'s.

    Speech is cut into pieces of at most 10 s. Every fifth piece is held out to choose the
    penalty and to measure ``r2``; the final fit uses all of them.

    Args:
        source_encoder: whose features will be mapped.
        target_encoder: whose space the converter speaks.
        waveforms: speech of any rate, the more and the more varied the better (a minute at
            least; ten speakers are better than one).

    Raises:
        AudioContentError: less than 10 s of speech.
        ConfigError: the encoders have different frame rates.
    """
    if source_encoder.frame_rate != target_encoder.frame_rate:
        raise ConfigError(
            f"{source_encoder.name} has {source_encoder.frame_rate} frames a second and "
            f"{target_encoder.name} {target_encoder.frame_rate}; a map needs equal rates."
        )
    envelope = bool(getattr(target_encoder, "envelope", False))
    cepstra = bool(getattr(target_encoder, "cepstra", False))
    learned = target_encoder.dims - envelope_size(envelope, cepstra)
    fitted, held_out, seconds = _gather(source_encoder, target_encoder, waveforms, learned)
    total = fitted.plus(held_out)
    matrices = fitted.solve(RIDGES)
    scores = [held_out.r2(matrix, fitted.y / fitted.frames) for matrix in matrices]
    best = int(np.argmax(scores))
    matrix = total.solve(RIDGES[best : best + 1])[0]
    log.info(
        "content map %s to %s: R² %.3f on held-out speech, ridge %g, %.0f s",
        source_encoder.space,
        target_encoder.space,
        scores[best],
        RIDGES[best],
        seconds,
    )
    return ContentMap(
        matrix=matrix.astype(np.float32),
        bias=(total.y / total.frames).astype(np.float32),
        source=source_encoder.space,
        target=target_encoder.space,
        frame_rate=float(target_encoder.frame_rate),
        r2=scores[best],
        seconds=seconds,
        envelope=envelope,
        cepstra=cepstra,
    )


def _gather(
    source: ContentEncoder, target: ContentEncoder, waveforms: Iterable[Waveform], learned: int
) -> tuple[_Sums, _Sums, float]:
    fitted: _Sums | None = None
    held_out: _Sums | None = None
    seconds = 0.0
    for index, piece in enumerate(_pieces(waveforms)):
        x, y = _pair(source, target, piece)
        y = y[:, :learned]
        if fitted is None or held_out is None:
            fitted, held_out = (_Sums((x.shape[1], y.shape[1])) for _ in range(2))
        (held_out if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else fitted).add(x, y)
        seconds += piece.seconds
    if fitted is None or held_out is None or seconds < MIN_SECONDS or not held_out.frames:
        raise AudioContentError(
            f"{seconds:.1f} s of speech in too few pieces are not enough to map on; "
            "give at least a minute."
        )
    return fitted, held_out, seconds


def _pair(
    source: ContentEncoder, target: ContentEncoder, piece: Waveform
) -> tuple[FloatArray, FloatArray]:
    x = source.encode(_at(piece, source.sample_rate)).features
    y = target.encode(_at(piece, target.sample_rate)).features
    frames = min(len(x), len(y))
    return x[:frames] - x[:frames].mean(axis=0), y[:frames]


def _pieces(waveforms: Iterable[Waveform]) -> Iterator[Waveform]:
    for waveform in waveforms:
        # Equal pieces, so that no recording ends in a scrap.
        count = max(1, int(np.ceil(waveform.seconds / PIECE_SECONDS)))
        for samples in np.array_split(waveform.samples, count):
            if len(samples) >= waveform.sample_rate // 2:
                yield Waveform(samples, waveform.sample_rate)


def _at(piece: Waveform, sample_rate: int) -> FloatArray:
    if piece.sample_rate == sample_rate:
        return piece.samples
    from auto_voice.audio.resample import resample

    return resample(piece.samples, piece.sample_rate, sample_rate)


def map_path(registry: ModelRegistry, encoder: str, space: str) -> Path:
    """Where the map of ``encoder`` into ``space`` is kept: beside the encoder's weights."""
    version = registry.version(encoder)
    number = version.quantised.of if version.quantised is not None else version.version
    slug = re.sub(r"[^A-Za-z0-9._@-]+", "_", space)
    # Named as in 0.1.
    return registry.store.folder(version.name, number) / f"adapter-{slug}.safetensors"


def into_space_of(
    converter: Converter, encoder: ContentEncoder, registry: ModelRegistry, name: str
) -> ContentEncoder:
    """``encoder``, or its features mapped into the space of ``converter``.

    Args:
        name: of the encoder in the registry.

    Raises:
        ModelLoadError: it has another space and no map is here; the message names the version of it
            that has the converter's, or how to make one.
    """
    if encoder.space == converter.content_space:
        return encoder
    path = map_path(registry, name, converter.content_space)
    if not path.is_file():
        if other := registry.in_space(name, converter.content_space):
            raise ModelLoadError(
                f"{converter.name} speaks from {converter.content_space}, which {encoder.name} "
                f"does not give; choose the content encoder {other.key} with it."
            )
        raise ModelLoadError(
            f"{converter.name} was trained on {converter.content_space}, and {name} has not been "
            f"mapped to it; run `autovoice models map {name}` once."
        )
    return MappedEncoder(encoder, ContentMap.load(path))


def map_encoder(
    registry: ModelRegistry,
    name: str,
    speech: Iterable[Waveform],
    *,
    converter: str = PIPELINE_MODELS["converter"],
    own_encoder: str = PIPELINE_MODELS["content"],
) -> tuple[ContentMap, Path]:
    """Map the content encoder ``name`` to ``converter`` and keep the map for the pipeline.

    Args:
        speech: recordings that both encoders are run on; a minute at least, better ten speakers.
        own_encoder: the content encoder that ``converter`` was trained on.

    Raises:
        ConfigError: ``name`` needs no map, or ``own_encoder`` is not the converter's.
        AudioContentError: too little speech.
    """
    space = registry.load(converter).content_space
    target: ContentEncoder = registry.load(own_encoder)
    if target.space != space:
        raise ConfigError(
            f"{converter} speaks {space}, and {own_encoder} gives {target.space}; name the encoder "
            "that the converter was trained on."
        )
    source: ContentEncoder = registry.load(name)
    if source.space == space:
        raise ConfigError(f"{name} already gives {space}, which {converter} speaks: nothing to do.")
    content_map = fit_map(source, target, speech)
    return content_map, content_map.save(map_path(registry, name, space))
