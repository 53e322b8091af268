"""Content from a recogniser: hidden states of a Whisper encoder in a whitened subspace.

Whisper (Radford et al. 2022) was trained to write down words in any voice, so the middle of its
encoder holds what is said with little of who says it. It teaches the compact content encoder, and
serves as a content encoder itself. Only the encoder's first layers are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.mel import CONTENT_MEL, MelSpec, log_mel, with_envelope
from auto_voice.errors import ModelLoadError
from auto_voice.models.content_model import CentredEncoder
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.checkpoints import read_ctranslate2
from auto_voice.models.runtime.graphs import SUFFIX, bound_network, read_graph
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.runtime.weights import Array, is_safetensors, map_safetensors
from auto_voice.types import FloatArray

# As Whisper computes it (Radford et al. 2022): 25 ms windows every 10 ms.
WHISPER_MEL = MelSpec(
    sample_rate=16000, n_fft=400, win_samples=400, hop_samples=160, bands=80,
    f_min_hz=0.0, f_max_hz=8000.0, power=2, log_floor=None, pad_samples=200,
)  # fmt: skip
# Whisper's frame ``i`` is centred at ``20 i`` ms; without the first 10 ms it is ``20 i + 10``,
# the centre that every content frame of this project has.
SHIFT_SAMPLES = 160
# A transformer parks huge values in a few dimensions at frames of no meaning; they are clipped.
OUTLIER, MAD_TO_DEVIATION = 4.0, 1.4826
WINDOW_FRAMES, MARGIN_FRAMES = 1400, 50
ARCHITECTURE = "whisper_content"
PREFIX = "encoder/"
POSITIONS = "position_encodings/encodings"


@dataclass(frozen=True)
class WhisperShape:
    """Sizes of the encoder; the defaults are those of Whisper base with its first four layers."""

    width: int = 512
    layers: int = 4
    bands: int = 80
    positions: int = 1500

    @classmethod
    def of(cls, arrays: Mapping[str, Array], layers: int) -> WhisperShape:
        """The sizes of an encoder of which ``layers`` layers are run."""
        positions, bands = arrays.get(POSITIONS), arrays.get("conv1/weight")
        if positions is None or bands is None:
            raise ModelLoadError("The Whisper encoder lacks 'conv1/weight'; fetch it again.")
        return cls(positions.shape[1], layers, bands.shape[1], positions.shape[0])


class WhisperEncoder:
    """The first layers of a Whisper encoder.

    Args:
        network: ``(batch, 80, 2 * frames)`` Whisper log-mel to ``(batch, frames, width)``.
        width: numbers that it gives for a frame.
    """

    def __init__(self, network: Network, width: int) -> None:
        self.network, self.width = network, width
        self.device = network.device

    @classmethod
    def load(
        cls,
        path: Path,
        layers: int = 4,
        device: str = "cpu",
        graph: Callable[[WhisperShape], bytes] | None = None,
    ) -> WhisperEncoder:
        """From a CTranslate2 file, or from safetensors made of one.

        Args:
            layers: how many to run.
            graph: gives the graph of a shape; by default one that the package holds.

        Raises:
            ModelLoadError: an array is missing, or no graph has its sizes.
        """
        arrays = read_arrays(path)
        shape = WhisperShape.of(arrays, layers)
        found = graph(shape) if graph else read_graph(ARCHITECTURE, shape, {}, str(path))
        known = encoder_arrays(arrays, layers)
        return cls(bound_network(found, known, str(path), str(path), device), shape.width)

    def features(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(samples // 320, width)`` float32, of any length.

        Whisper knows 30 s; a longer input passes in windows that overlap by two seconds, of which
        each gives its middle.
        """
        frames = len(samples) // 320
        mel = whisper_log_mel(np.pad(samples[SHIFT_SAMPLES:], (0, SHIFT_SAMPLES)))
        out = np.zeros((frames, self.width), np.float32)
        step = WINDOW_FRAMES - 2 * MARGIN_FRAMES
        for start in range(0, max(1, frames - 2 * MARGIN_FRAMES), step):
            stop = min(start + WINDOW_FRAMES, frames)
            seen = np.ascontiguousarray(mel[None, :, 2 * start : 2 * stop], np.float32)
            kept = 0 if start == 0 else MARGIN_FRAMES
            out[start + kept : stop] = self.network(seen)[0, kept : stop - start]
        return out


def encoder_arrays(arrays: Mapping[str, Array], layers: int) -> dict[str, Array]:
    """Those that the first ``layers`` layers of the encoder need."""
    return {name: values for name, values in arrays.items() if _runs(name, layers)}


def _runs(name: str, layers: int) -> bool:
    part = name.partition("/")[0]
    if part.startswith("layer_"):
        return part.removeprefix("layer_").isdecimal() and int(part[6:]) < layers
    return part in ("conv1", "conv2", "position_encodings")


def whisper_log_mel(samples: FloatArray) -> FloatArray:
    """``(samples,)`` at 16 kHz to ``(80, samples // 160)``, scaled as Whisper was trained."""
    energy = log_mel(samples, WHISPER_MEL)[:, : len(samples) // 160]
    mel = np.log10(np.maximum(energy, 1e-10))
    scaled: FloatArray = (np.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0
    return scaled


@dataclass(frozen=True, eq=False)
class ContentSpace:
    """A whitened principal subspace: ``(frames, wide)`` to ``(frames, dims)``."""

    mean: FloatArray
    scale: FloatArray
    projection: FloatArray

    @classmethod
    def fit(cls, features: Sequence[FloatArray], dims: int) -> ContentSpace:
        """From ``(frames, wide)`` of many utterances: standardise, rotate, keep, whiten."""
        x = np.concatenate(features).astype(np.float64)
        mean = np.median(x, axis=0)
        scale = np.median(np.abs(x - mean), axis=0) * MAD_TO_DEVIATION + 1e-6
        z = _standardised(x, mean, scale)
        values, vectors = np.linalg.eigh(np.cov(z, rowvar=False))
        largest = np.argsort(values)[::-1][:dims]
        projection = vectors[:, largest] / np.sqrt(values[largest])
        return cls(*(np.asarray(a, np.float32) for a in (mean, scale, projection)))

    def widened(self, features: Sequence[FloatArray], dims: int) -> ContentSpace:
        """This space, followed by the principal components of what it misses; ``dims`` in all."""
        x = np.concatenate(features).astype(np.float64)
        z = _standardised(x, self.mean, self.scale)
        covariance = np.cov(z, rowvar=False)
        known = self.projection.astype(np.float64)
        seen = known.T @ covariance @ known
        missed = np.eye(len(known)) - known @ np.linalg.solve(seen, known.T @ covariance)
        values, vectors = np.linalg.eigh(missed.T @ covariance @ missed)
        largest = np.argsort(values)[::-1][: dims - known.shape[1]]
        further = missed @ vectors[:, largest] / np.sqrt(values[largest])
        projection = np.concatenate([self.projection, further], axis=1)
        return ContentSpace(self.mean, self.scale, projection.astype(np.float32))

    def project(self, features: FloatArray) -> FloatArray:
        """``(frames, wide)`` to ``(frames, dims)``; an utterance's mean is still to be removed."""
        z = _standardised(features, self.mean, self.scale)
        return np.asarray(z @ self.projection, np.float32)


def _standardised(features: NDArray[Any], mean: NDArray[Any], scale: NDArray[Any]) -> NDArray[Any]:
    clipped: NDArray[Any] = np.clip((features - mean) / scale, -OUTLIER, OUTLIER)
    return clipped


class WhisperContentEncoder(CentredEncoder):
    """The hidden states of ``encoder`` in ``subspace``, as a stage."""

    def __init__(
        self,
        encoder: WhisperEncoder,
        subspace: ContentSpace,
        name: str,
        space: str,
        envelope: bool = False,
        cepstra: bool = False,
    ) -> None:
        dims = subspace.projection.shape[1]
        super().__init__(name, space, dims, encoder.device, envelope, cepstra)
        self.encoder = encoder
        self.subspace = subspace

    def encode_piece(self, samples: FloatArray) -> FloatArray:
        """``(samples // 320, dims)`` of a piece at the level of the whole, the mean left in."""
        if len(samples) < 320:
            return np.zeros((0, self.dims), np.float32)
        features = self.subspace.project(self.encoder.features(samples))
        if not self.envelope:
            return features
        return with_envelope(features, log_mel(samples, CONTENT_MEL), self.cepstra)


def read_arrays(path: Path) -> dict[str, Array]:
    """Encoder weights from a CTranslate2 file or from safetensors made of one."""
    if is_safetensors(path):
        return map_safetensors(path)
    return {
        name.removeprefix(PREFIX): array
        for name, array in read_ctranslate2(path)
        if name.startswith(PREFIX)
    }


def convert_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The encoder's arrays of a CTranslate2 file, in half precision as they were published."""
    return {name: array.astype(np.float16) for name, array in read_arrays(path).items()}


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> WhisperContentEncoder:
    """From ``model.bin`` and ``content_space.safetensors``; ``params`` has ``layers``, ``space``
    and, where they follow, ``envelope`` and ``cepstra``.

    Raises:
        ModelLoadError: the files do not fit.
    """
    names = (file.file for file in version.files if not file.file.endswith(SUFFIX))
    weights, subspace = (files[name] for name in names)
    encoder = WhisperEncoder.load(
        weights, version.params["layers"], device,
        lambda shape: read_graph(ARCHITECTURE, shape, files, version.key),
    )  # fmt: skip
    arrays = map_safetensors(subspace)
    return WhisperContentEncoder(
        encoder, ContentSpace(**arrays), version.key, version.params["space"],
        version.params.get("envelope", False), version.params.get("cepstra", False),
    )  # fmt: skip
