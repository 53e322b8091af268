"""Content from a recogniser: hidden states of a Whisper encoder in a whitened subspace.

Whisper (Radford et al. 2022) was trained to write down words in any voice, so the middle of its
encoder holds what is said with little of who says it. It teaches the compact content encoder, and
serves as a content encoder itself. Only the encoder's first layers are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.mel import CONTENT_MEL, MelSpec, log_mel, with_envelope
from auto_voice.errors import ModelLoadError
from auto_voice.models.content_model import CentredEncoder
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.checkpoints import read_ctranslate2
from auto_voice.models.runtime.graphs import (
    FOLDER,
    SUFFIX,
    bound_network,
    graph_name,
    read_graph,
)
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.runtime.weights import (
    Array,
    in_whole_numbers,
    is_safetensors,
    map_safetensors,
    whole_numbers_widened,
)
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
# Frames of a stream that are remembered. Against the features of the whole recording, those of the
# next 160 ms have an error of 0.12 of their variance then, with half as many 0.20, with all 0.11.
REMEMBERED_FRAMES = 400
# Frames after which a stream begins anew at the first position, and those after which what began
# takes over. Both together stay below Whisper's 1500 with the longest block and look-ahead.
RUN_FRAMES, SETTLED_FRAMES = 900, 300
# Frames before new ones that the convolutions and the spectra see.
CONTEXT_FRAMES = 2
# Positions that every size of Whisper knows, and values of a frame in the largest.
POSITION_COUNT, WIDEST = 1500, 1280
# Values of a head of attention, in every size of Whisper.
HEAD = 64
ARCHITECTURE, LIVE = "whisper_content", "whisper_live"
PREFIX = "encoder/"
POSITIONS = "position_encodings/encodings"


@dataclass(frozen=True)
class WhisperShape:
    """Sizes of the encoder; the defaults are those of Whisper base with its first four layers."""

    width: int = 512
    layers: int = 4
    bands: int = 80
    positions: int = 1500
    hidden: int = 2048

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> WhisperShape:
        """The sizes that a catalog's version has."""
        return cls(layers=params["layers"], hidden=params.get("hidden", cls.hidden))

    @classmethod
    def of(cls, arrays: Mapping[str, Array], layers: int) -> WhisperShape:
        """The sizes of an encoder of which ``layers`` layers are run."""
        sizes = []
        for name in ("conv1/weight", POSITIONS, "layer_0/ffn/linear_0/bias"):
            if name not in arrays:
                raise ModelLoadError(f"The Whisper encoder lacks {name!r}; fetch it again.")
            sizes.append(arrays[name].shape)
        try:
            (_, bands, _), (positions, width), (hidden,) = sizes
        except ValueError as error:
            raise ModelLoadError(
                "The Whisper encoder has arrays of other shapes; fetch it again."
            ) from error
        return cls(width, layers, bands, positions, hidden)


class WhisperEncoder:
    """The first layers of a Whisper encoder.

    Args:
        network: ``(batch, 80, 2 * frames)`` Whisper log-mel to ``(batch, frames, width)``.
        width: numbers that it gives for a frame.
        open_live: makes the network that remembers, see ``WhisperLiveNet``; None where there is
            none of these sizes.
    """

    def __init__(
        self, network: Network, width: int, open_live: Callable[[], Network] | None = None
    ) -> None:
        self.network, self.width = network, width
        self.device = network.device
        self._open_live = open_live
        self._live: Network | None = None
        self._opening = threading.Lock()

    @property
    def live(self) -> Network | None:
        """What is given a stream part by part; opened when it is first needed."""
        with self._opening:
            if self._live is None and self._open_live is not None:
                self._live = self._open_live()
            return self._live

    @classmethod
    def load(
        cls,
        path: Path,
        layers: int = 4,
        device: str = "cpu",
        graph: Callable[[WhisperShape], bytes] | None = None,
        live: Callable[[WhisperShape], bytes | None] | None = None,
    ) -> WhisperEncoder:
        """From a CTranslate2 file, or from safetensors made of one.

        Args:
            layers: how many to run.
            graph: gives the graph of a shape; by default one that the package holds.
            live: the same of the network that remembers.

        Raises:
            ModelLoadError: an array is missing, or no graph has its sizes.
        """
        arrays = read_arrays(path)
        shape = WhisperShape.of(arrays, layers)
        found = graph(shape) if graph else read_graph(ARCHITECTURE, shape, {}, str(path))
        known = encoder_arrays(arrays, layers)
        network = bound_network(found, known, str(path), str(path), device)
        remembering = (live or live_graph)(shape)
        if remembering is None:
            return cls(network, shape.width)
        opened = partial(bound_network, remembering, known, str(path), str(path), device)
        return cls(network, shape.width, opened)

    def features(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(samples // 320, width)`` float32, of any length.

        Whisper knows 30 s; a longer input passes in windows that overlap by two seconds, of which
        each gives its middle.
        """
        energies = log_energies(samples)
        return self.states(scaled(energies, energies.max()))

    def states(self, mel: FloatArray) -> FloatArray:
        """``(80, 2 * frames)`` of ``scaled`` to ``(frames, width)`` float32."""
        frames = mel.shape[1] // 2
        out = np.zeros((frames, self.width), np.float32)
        step = WINDOW_FRAMES - 2 * MARGIN_FRAMES
        for start in range(0, max(1, frames - 2 * MARGIN_FRAMES), step):
            stop = min(start + WINDOW_FRAMES, frames)
            seen = np.ascontiguousarray(mel[None, :, 2 * start : 2 * stop], np.float32)
            kept = 0 if start == 0 else MARGIN_FRAMES
            out[start + kept : stop] = self.network(seen)[0, kept : stop - start]
        return out


def live_graph(shape: WhisperShape) -> bytes | None:
    """Of the network of these sizes that remembers; None if the package holds none."""
    path = FOLDER / f"{graph_name(LIVE, shape)}{SUFFIX}"
    return path.read_bytes() if path.exists() else None


def encoder_arrays(arrays: Mapping[str, Array], layers: int) -> dict[str, Array]:
    """Those that the first ``layers`` layers of the encoder need."""
    return {name: values for name, values in arrays.items() if _runs(name, layers)}


def _runs(name: str, layers: int) -> bool:
    part = name.partition("/")[0]
    if part.startswith("layer_"):
        return part.removeprefix("layer_").isdecimal() and int(part[6:]) < layers
    return part in ("conv1", "conv2", "position_encodings")


def log_energies(samples: FloatArray) -> FloatArray:
    """``(samples,)`` at 16 kHz to ``(80, 2 * (samples // 320))``, decimal logarithm, where the
    project's content frames are."""
    shifted = np.pad(samples[SHIFT_SAMPLES:], (0, SHIFT_SAMPLES))
    energy = log_mel(shifted, WHISPER_MEL)[:, : len(samples) // 320 * 2]
    return np.asarray(np.log10(np.maximum(energy, 1e-10)))


def scaled(mel: FloatArray, peak: float | FloatArray) -> FloatArray:
    """``log_energies`` as Whisper takes them.

    Args:
        peak: the loudest of them that is known, one or for each frame.
    """
    return np.asarray((np.maximum(mel, peak - 8.0) + 4.0) / 4.0, np.float32)


@dataclass(frozen=True, eq=False)
class ContentSpace:
    """A subspace of states, of a teacher its whitened principal components: ``(frames, wide)`` to
    ``(frames, dims)``."""

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

    def project(self, features: FloatArray) -> FloatArray:
        """``(frames, wide)`` to ``(frames, dims)``; an utterance's mean is still to be removed."""
        return np.asarray(self.standardised(features) @ self.projection, np.float32)

    def standardised(self, features: FloatArray) -> FloatArray:
        """``(frames, wide)`` over their spread, without outliers."""
        return np.asarray(_standardised(features, self.mean, self.scale), np.float32)


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
        return self.features_of(self.encoder.features(samples), samples)

    def features_of(self, hidden: FloatArray, samples: FloatArray, skipped: int = 0) -> FloatArray:
        """``(frames, width)`` states of the network as ``(frames, dims)`` content features.

        Args:
            samples: the sound of these frames.
            skipped: frames at its beginning that are not among them.
        """
        features = self.subspace.project(hidden)
        if not self.envelope:
            return features
        mel = log_mel(samples, CONTENT_MEL)[:, 2 * skipped :]
        return with_envelope(features, mel, self.cepstra)

    def stream(self) -> WhisperStream | None:
        """Encodes one stream; None where the network for it is missing."""
        network = self.encoder.live
        return None if network is None else WhisperStream(self, network)


class WhisperStream:
    """The content of a stream, part by part; see ``models.base.ContentStream``.

    Each part is computed from its own frames and what the network remembers of those before, which
    costs a fraction of a window of the past and is nearer to the features of the whole recording.
    Whisper knows positions up to 30 s only, so that after some time a second run of the network
    begins at the first position beside the one that is used, and takes over once it remembers
    enough.
    """

    context_frames = CONTEXT_FRAMES

    def __init__(self, stage: WhisperContentEncoder, network: Network) -> None:
        self._stage, self._network = stage, network
        layers, heads = network.ports()[0][3].shape[0] or 0, stage.encoder.width // HEAD
        self._empty = np.zeros((layers, 2, 1, heads, 0, HEAD), np.float32)
        # First frame and memory of each run, the one that is used first.
        self._runs: list[tuple[int, Array]] = []
        self._next_run = 0
        # The loudest of each remembered frame.
        self._peaks = np.zeros(0, np.float32)

    def encode(self, samples: FloatArray, skipped: int, start: int, stop: int) -> FloatArray:
        """``(frames, dims)`` from frame ``start`` on; see ``models.base.ContentStream``."""
        frames, kept = len(samples) // 320 - skipped, stop - start
        if frames <= 0:
            return np.zeros((0, self._stage.dims), np.float32)
        mel = log_energies(samples)
        peaks = mel[:, 2 * skipped :].max(axis=0)
        loudest = float(max(peaks.max(), self._peaks.max(initial=-np.inf)))
        self._peaks = np.append(self._peaks, peaks[: 2 * kept])[-2 * REMEMBERED_FRAMES :]
        skip = min(1, skipped)
        mel = np.ascontiguousarray(scaled(mel[:, 2 * (skipped - skip) :], loudest)[None])
        if start >= self._next_run:
            self._runs.append((start, self._empty))
            self._next_run = start + RUN_FRAMES
        if len(self._runs) > 1 and start - self._runs[1][0] >= SETTLED_FRAMES:
            self._runs.pop(0)
        states = []
        for number, (first, memory) in enumerate(self._runs):
            places = (np.array([n], np.int64) for n in (skip, start - first))
            wanted = self._network.outputs
            hidden, held = self._network.outputs_of(wanted, mel, *places, memory)
            states.append(hidden[0])
            memory = np.concatenate([memory, held[:, :, :, :, :kept]], axis=4)
            self._runs[number] = first, memory[:, :, :, :, -REMEMBERED_FRAMES:]
        return self._stage.features_of(states[0], samples, skipped)


def read_arrays(path: Path) -> dict[str, Array]:
    """Encoder weights from a CTranslate2 file or from safetensors made of one."""
    if is_safetensors(path):
        return with_positions(whole_numbers_widened(map_safetensors(path), path))
    return {
        name.removeprefix(PREFIX): array
        for name, array in read_ctranslate2(path)
        if name.startswith(PREFIX)
    }


def with_positions(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """``arrays`` with the positions, if those that can be computed were left out."""
    known = dict(arrays)
    shape = known["conv1/weight"].shape if "conv1/weight" in known else ()
    if POSITIONS not in known and shape and 0 < shape[0] <= WIDEST and shape[0] % HEAD == 0:
        known[POSITIONS] = sinusoids(POSITION_COUNT, shape[0])
    return known


def sinusoids(count: int, width: int) -> FloatArray:
    """``(count, width)`` as Whisper tells positions (after Vaswani et al. 2017)."""
    slowness = np.log(10000) / (width // 2 - 1)
    angles = np.arange(count)[:, None] * np.exp(-slowness * np.arange(width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def as_stored(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """``arrays`` in whole numbers, a quarter of their size, and without positions that can be
    computed; ``read_arrays`` undoes it."""
    kept = dict(arrays)
    positions = kept.pop(POSITIONS, None)
    small = in_whole_numbers(kept)
    if positions is not None:
        computed = len(positions) == POSITION_COUNT and np.allclose(
            positions, sinusoids(*positions.shape), atol=1e-3
        )
        if not computed:
            small[POSITIONS] = positions.astype(np.float16)
    return small


def convert_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """The encoder's arrays of a CTranslate2 file, in half precision as they were published."""
    return {name: array.astype(np.float16) for name, array in read_arrays(path).items()}


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> WhisperContentEncoder:
    """From ``model.bin`` and ``content_space.safetensors``; ``params`` has ``layers``, ``space``,
    ``hidden`` if it is not Whisper base's, ``live``, the file that is the graph for streams, if the
    package has none, and, where they follow, ``envelope`` and ``cepstra``.

    Raises:
        ModelLoadError: the files do not fit.
    """
    names = (file.file for file in version.files if not file.file.endswith(SUFFIX))
    weights, subspace = (files[name] for name in names)
    # A version of other sizes than the package's brings its graphs.
    live = files.get(version.params.get("live", ""))
    others = {name: path for name, path in files.items() if path != live}
    encoder = WhisperEncoder.load(
        weights, version.params["layers"], device,
        lambda shape: read_graph(ARCHITECTURE, shape, others, version.key),
        (lambda _: live.read_bytes()) if live else None,
    )  # fmt: skip
    arrays = {name: np.float32(values) for name, values in map_safetensors(subspace).items()}
    return WhisperContentEncoder(
        encoder, ContentSpace(**arrays), version.key, version.params["space"],
        version.params.get("envelope", False), version.params.get("cepstra", False),
    )  # fmt: skip
