"""Networks from outside as single ONNX files: content encoders, speaker encoders and vocoders.

Whatever has the right inputs and outputs does the work of a stage without a line of code:

    content    samples (batch, n) at 16 kHz    ->  features (batch, about n / 320, dims)
    speaker    samples (batch, n) at 16 kHz    ->  embedding (batch, dims)
    vocoder    mel (batch, 80, frames)         ->  samples (batch, 256 * frames) at 22 050 Hz

All are float32, the time axis is of any size, and a vocoder may have an axis of one channel before
its samples. A model has one input, by any name; of several outputs the first counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.errors import AudioContentError, ModelLoadError, first_line
from auto_voice.models.base import cosine
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import check_foreign
from auto_voice.models.runtime.sessions import Network, open_model
from auto_voice.models.runtime.weights import as_batch
from auto_voice.types import SPEECH_RATE, Content, FloatArray

# Of content features, and the samples between them: what converters are trained on.
FRAME_RATE = 50
HOP_SAMPLES = SPEECH_RATE // FRAME_RATE
# Samples on each side of an utterance: an encoder whose frames see 400 samples then has its frames
# in the middle of their 20 ms, and none is missing at the end.
MARGIN_SAMPLES = 40
# Seconds of noise that a model gets when it is added; two lengths show what a second gives.
TRIED_SECONDS = (1, 2)
# Frames by which the content of a second may differ from 50: the edges of its convolutions.
EDGE_FRAMES = 2
FLOAT32 = "tensor(float)"


@dataclass(frozen=True)
class Contract:
    """What a network of a kind takes and gives.

    Attributes:
        takes: its input in words.
        axes: sizes of the input; None for the batch and for time, which must be of any size.
        gives: its output in words.
        ranks: axes that the output may have.
    """

    takes: str
    axes: tuple[int | None, ...]
    gives: str
    ranks: tuple[int, ...]


CONTRACTS: Mapping[str, Contract] = {
    "content": Contract(
        "samples (batch, n) at 16 kHz", (None, None), "features (batch, frames, dims)", (3,)
    ),
    "speaker": Contract(
        "samples (batch, n) at 16 kHz", (None, None), "an embedding (batch, dims)", (2,)
    ),
    "vocoder": Contract(
        f"mel (batch, {HIFIGAN_MEL.bands}, frames)", (None, HIFIGAN_MEL.bands, None),
        "samples (batch, n) or (batch, 1, n)", (2, 3),
    ),
}  # fmt: skip


class OnnxContentEncoder:
    """A content encoder; see ``models.base.ContentEncoder``.

    Args:
        network: of the kind ``content``.
        name: ``name@version``.
        space: of its features; a converter of another space needs a map to it.
    """

    sample_rate = SPEECH_RATE
    frame_rate = float(FRAME_RATE)

    def __init__(self, network: Network, name: str, space: str = "") -> None:
        self.network = network
        self.name = name
        self.space = space or name
        self.device = network.device
        self.dims = _size(network, name)

    def extract_features(
        self, audio: ArrayLike, lengths: NDArray[np.int64] | None = None
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` to ``(batch, frames, dims)``; each row alone.

        Raises:
            AudioContentError: empty, not finite, or shorter than the network takes.
        """
        batch = as_batch(audio, 2, "audio")
        sizes = [batch.shape[1]] * len(batch) if lengths is None else [int(n) for n in lengths]
        found = [self._frames(row[:size]) for row, size in zip(batch, sizes, strict=True)]
        features = np.zeros((len(batch), max(map(len, found)), self.dims), np.float32)
        for row, frames in zip(features, found, strict=True):
            row[: len(frames)] = frames
        return features

    def encode(self, samples: FloatArray) -> Content:
        """One utterance ``(samples,)`` at 16 kHz to ``samples // 320`` frames."""
        padded = np.pad(as_batch(samples, 2, "audio")[0], MARGIN_SAMPLES)
        frames = len(padded[MARGIN_SAMPLES:-MARGIN_SAMPLES]) // HOP_SAMPLES
        found = self._frames(padded)[:frames]
        # An encoder that gives less than its samples hold has lost its edges.
        features = np.pad(found, ((0, frames - len(found)), (0, 0)), mode="edge")
        return Content(features, self.frame_rate, self.space)

    def _frames(self, samples: FloatArray) -> FloatArray:
        frames: FloatArray = _run(self.network, samples[None], self.name)[0]
        if not len(frames):
            raise AudioContentError(f"{len(samples)} samples are too short for {self.name}.")
        return frames


class OnnxSpeakerEncoder:
    """A speaker encoder; see ``models.base.SpeakerEncoderStage``."""

    sample_rate = SPEECH_RATE

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name
        self.device = network.device
        self.dims = _size(network, name)

    def embed_utterance(self, samples: FloatArray) -> FloatArray:
        """``(samples,)`` at 16 kHz to ``(dims,)`` of unit norm.

        Raises:
            AudioContentError: empty, silent or not finite.
        """
        batch = as_batch(samples, 2, "audio")
        if not np.abs(batch).max() > 0:
            raise AudioContentError("The recording is silent; give speech to compare voices.")
        raw = _run(self.network, batch[:1], self.name)[0]
        return np.asarray(raw / (np.linalg.norm(raw) + 1e-12), np.float32)

    def similarity(self, a: FloatArray, b: FloatArray) -> float:
        """Cosine of two embeddings, in [-1, 1]."""
        return cosine(a, b)


class OnnxVocoder:
    """A vocoder of the mel of HiFi-GAN universal; see ``models.base.Vocoder``."""

    sample_rate = HIFIGAN_MEL.sample_rate
    hop_samples = HIFIGAN_MEL.hop_samples
    bands = HIFIGAN_MEL.bands

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name
        self.device = network.device

    def synthesize(self, mel: ArrayLike) -> FloatArray:
        """``(80, frames)`` or ``(batch, 80, frames)`` to ``(batch, 256 * frames)``; each row alone.

        Raises:
            AudioContentError: empty, not finite, or another number of bands.
        """
        batch = as_batch(mel, 3, "mel")
        if batch.shape[1] != self.bands:
            raise AudioContentError(f"mel must have {self.bands} bands, not {batch.shape[1]}.")
        rows = [_run(self.network, row[None], self.name).reshape(-1) for row in batch]
        return np.stack(rows)


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> Any:
    """The stage of ``files[version.files[0].file]``; a content encoder's ``version.params`` may
    name the ``space`` of its features.

    Raises:
        UnsafeFileError: the file names other files or operations of other makers.
        ModelLoadError: it is no ONNX file, or not one of this kind.
    """
    path = files[version.files[0].file]
    network = _opened(path, version.kind, version.key, device)
    if version.kind == "content":
        return OnnxContentEncoder(network, version.key, str(version.params.get("space", "")))
    if version.kind == "speaker":
        return OnnxSpeakerEncoder(network, version.key)
    return OnnxVocoder(network, version.key)


def describe(
    paths: Sequence[Path], kind: str, params: Mapping[str, Any]
) -> tuple[list[Path], dict[str, Any]]:
    """The one file of a model that is being added, tried on two lengths of noise.

    Raises:
        UnsafeFileError, ModelLoadError: as :func:`build`; or what it computes is not what its kind
            promises, which the message says.
    """
    if len(paths) != 1 or paths[0].is_dir():
        raise ModelLoadError("an ONNX model is one file, with all of its numbers inside; name it")
    network = _opened(paths[0], kind, paths[0].name, "cpu")
    _TRIALS[kind](network, paths[0].name)
    return list(paths), dict(params)


def _opened(path: Path, kind: str, name: str, device: str) -> Network:
    check_foreign(path, name)
    network = open_model(path, name, device=device)
    contract = CONTRACTS[kind]
    takes, gives = network.ports()
    if len(takes) != 1:
        named = ", ".join(port.name for port in takes) or "none"
        raise ModelLoadError(
            f"{name} has {len(takes)} inputs ({named}), and a {kind} takes one: {contract.takes}"
        )
    port = takes[0]
    where = f"the input {port.name} of {name}"
    if port.dtype != FLOAT32:
        raise ModelLoadError(f"{where} is {port.dtype}, and a {kind} takes float32")
    if len(port.shape) != len(contract.axes):
        raise ModelLoadError(
            f"{where} has {len(port.shape)} axes, and a {kind} takes {contract.takes}"
        )
    for axis, (size, wanted) in enumerate(zip(port.shape, contract.axes, strict=True)):
        # One recording at a time is all that is asked for.
        if size in (None, wanted) or (axis == 0 and size == 1):
            continue
        if wanted is not None:
            raise ModelLoadError(f"{where} has {size} bands, and converters give {wanted}")
        what = "batch" if axis == 0 else "time"
        raise ModelLoadError(
            f"{where} has a fixed {what} axis of {size}; export it with that axis dynamic"
        )
    if gives[0].dtype != FLOAT32 or len(gives[0].shape) not in (*contract.ranks, 0):
        raise ModelLoadError(
            f"the output {gives[0].name} of {name} is {gives[0].dtype} with {len(gives[0].shape)} "
            f"axes, and a {kind} gives {contract.gives} as float32"
        )
    return network


def _run(network: Network, values: FloatArray, name: str) -> FloatArray:
    """What the network makes of one row.

    Raises:
        ModelLoadError: it fails on this length, or gives what is not finite.
    """
    try:
        found = network(np.ascontiguousarray(values, np.float32))
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        raise ModelLoadError(
            f"{name} cannot compute {values.shape[-1]} steps: {first_line(error)}"
        ) from error
    if not np.isfinite(found).all():
        raise ModelLoadError(f"{name} gives NaN or infinity; export it again in float32")
    return np.asarray(found, np.float32)


def _size(network: Network, name: str) -> int:
    """The last axis of the output, which a model that leaves it open shows on noise."""
    known = network.ports()[1][0].shape
    return (known[-1] if known else None) or _run(network, _noise(1), name).shape[-1]


def _noise(seconds: int) -> FloatArray:
    rng = np.random.default_rng(seconds)
    noise: FloatArray = 0.1 * rng.standard_normal((1, seconds * SPEECH_RATE), np.float32)
    return noise


def _try_content(network: Network, name: str) -> None:
    short, long = (_run(network, _noise(seconds), name) for seconds in TRIED_SECONDS)
    _check_rank(short, "content", name)
    a_second = long.shape[1] - short.shape[1]
    if abs(a_second - FRAME_RATE) > EDGE_FRAMES or abs(short.shape[1] - FRAME_RATE) > EDGE_FRAMES:
        raise ModelLoadError(
            f"{name} gives {short.shape[1]} frames of one second and {long.shape[1]} of two; "
            f"content has {FRAME_RATE} a second"
        )


def _try_speaker(network: Network, name: str) -> None:
    short, long = (_run(network, _noise(seconds), name) for seconds in TRIED_SECONDS)
    _check_rank(short, "speaker", name)
    if short.shape != long.shape:
        raise ModelLoadError(
            f"{name} gives {short.shape[-1]} numbers of one second and {long.shape[-1]} of two; an "
            "embedding has one size"
        )


def _try_vocoder(network: Network, name: str) -> None:
    hop = HIFIGAN_MEL.hop_samples
    for frames in (40, 87):
        rng = np.random.default_rng(frames)
        mel = (rng.standard_normal((1, HIFIGAN_MEL.bands, frames)) - 4).astype(np.float32)
        found = _run(network, mel, name)
        _check_rank(found, "vocoder", name)
        if found.size != frames * hop:
            raise ModelLoadError(
                f"{name} gives {found.size} samples of {frames} frames; converters give mel of "
                f"{hop} samples a frame at {HIFIGAN_MEL.sample_rate} Hz, so they must be "
                f"{frames * hop}"
            )


def _check_rank(found: FloatArray, kind: str, name: str) -> None:
    if found.ndim not in CONTRACTS[kind].ranks:
        raise ModelLoadError(
            f"{name} gives {found.ndim} axes, and a {kind} gives {CONTRACTS[kind].gives}"
        )


_TRIALS: Mapping[str, Callable[[Network, str], None]] = {
    "content": _try_content,
    "speaker": _try_speaker,
    "vocoder": _try_vocoder,
}
