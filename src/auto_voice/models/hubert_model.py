"""HuBERT base (Hsu et al. 2021): self-supervised content features, 768 numbers, 50 Hz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.errors import AudioContentError, ConfigError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import load_network
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.runtime.weights import Array, as_batch, checkpoint_arrays
from auto_voice.types import SPEECH_RATE, Content, FloatArray

KERNELS = (10, 3, 3, 3, 3, 2, 2)
STRIDES = (5, 2, 2, 2, 2, 2, 2)
# Product of the strides: 20 ms at 16 kHz.
HOP_SAMPLES = 320
# Samples that one frame sees before the transformer; shorter audio has no frame.
FIELD_SAMPLES = 400
# Layer that ``encode`` reads: the upper middle of the network knows most about phones (Pasad et
# al. 2023), and the layers above it need not be computed.
CONTENT_LAYER = 9
# dBFS (RMS) that quieter speech is raised to. The first layer divides by the spread of its values
# plus a constant that speech of this level hides (0.4 % of the features); at -42 dBFS it changes
# them by 6 %, at -52 by a third.
LEAST_DBFS = -30.0
# dB; beyond it lies no speech, and its noise is not made any.
MOST_GAIN_DB = 40.0


@dataclass(frozen=True)
class HuBERTShape:
    """Sizes of the network; the defaults are those of HuBERT base (94.4 M parameters)."""

    dims: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward: int = 3072
    channels: int = 512
    position_kernel: int = 128
    position_groups: int = 16

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> HuBERTShape:
        """The entries of a catalog's ``params`` that are sizes; the others are left alone."""
        known = {name: int(params[name]) for name in cls.__dataclass_fields__ if name in params}
        return cls(**known)


def frames_of(samples: int) -> int:
    """Frames that so many samples give: ``(samples - 400) // 320 + 1``, none below 400."""
    return max(0, (samples - FIELD_SAMPLES) // HOP_SAMPLES + 1)


class HuBERTModel:
    """HuBERT as a content encoder: 16 kHz speech to 768-d features at 50 Hz.

    Frame ``i`` is centred at sample ``320 i + 200``; ``n`` samples give
    ``(n - 400) // 320 + 1`` frames. Loaded once, it may be called from many threads.

    Args:
        network: ``(batch, samples)`` to the outputs ``hidden_0``, what enters the transformer, to
            ``hidden_<layers>``, what its last layer gives: ``(batch, frames, dims)`` each.
        shape: its sizes.
        name: ``name@version`` of the weights; with ``content_layer`` it names the space of
            ``encode``, e.g. ``hubert_base@1.0/layer9``.
        content_layer: hidden layer that ``encode`` returns, 0 to ``shape.layers``.
        normalise: bring each row to zero mean and unit variance first. The base model was
            trained without: rows are taken as they are, only that those below -30 dBFS are raised
            to it, so that the level of speech does not matter.
    """

    sample_rate = SPEECH_RATE
    frame_rate = SPEECH_RATE / HOP_SAMPLES

    def __init__(
        self,
        network: Network,
        shape: HuBERTShape | None = None,
        *,
        name: str = "hubert_base",
        content_layer: int | None = None,
        normalise: bool = False,
    ) -> None:
        self.network = network
        self.shape = shape or HuBERTShape()
        self.name = name
        self.dims = self.shape.dims
        self.device = network.device
        self.content_layer = min(CONTENT_LAYER, self.shape.layers)
        if content_layer is not None:
            self.content_layer = self._checked_layer(content_layer)
        # A map fitted on one layer must not be taken for another's.
        self.space = f"{name}/layer{self.content_layer}"
        self.normalise = normalise

    def extract_features(
        self,
        audio: ArrayLike,
        lengths: NDArray[np.int64] | None = None,
        layer: int | None = None,
    ) -> FloatArray:
        """``(samples,)`` or ``(batch, samples)`` to ``(batch, frames, dims)`` float32.

        Args:
            audio: numpy or torch, float in [-1, 1] at 16 kHz, rows padded at their end.
            lengths: valid samples of each row; None if all are full. Frames past a row's own
                length are zero; the others equal those of the row alone.
            layer: 0 for what enters the transformer, ``k`` for the output of its layer ``k``,
                None for the last.

        Raises:
            AudioContentError: empty, shorter than 400 samples, not finite, or wrong lengths.
            ConfigError: there is no such layer.
        """
        batch = as_batch(audio, 2, "audio")
        sizes = self._checked_lengths(batch, lengths)
        layers = self.shape.layers if layer is None else self._checked_layer(layer)
        levelled = _standardised if self.normalise else _raised
        batch = np.stack([levelled(row, n) for row, n in zip(batch, sizes, strict=True)])
        features = np.zeros((len(batch), frames_of(batch.shape[1]), self.dims), np.float32)
        # The first layer normalises over time, so a row is computed with rows of its own length.
        for size in set(sizes):
            rows = [row for row, own in enumerate(sizes) if own == size]
            alike = np.ascontiguousarray(batch[rows, :size])
            features[rows, : frames_of(size)] = self.network(alike, output=f"hidden_{layers}")
        return features

    def encode(self, samples: FloatArray) -> Content:
        """One utterance ``(samples,)`` at 16 kHz to ``samples // 320`` frames of ``content_layer``.

        40 samples of silence on each side centre frame ``i`` at sample ``320 i + 160``, the
        middle of its 20 ms, as the other content encoders have it.
        """
        margin = (FIELD_SAMPLES - HOP_SAMPLES) // 2
        padded = np.pad(as_batch(samples, 2, "audio")[0], margin)
        features = self.extract_features(padded, layer=self.content_layer)[0]
        return Content(features, self.frame_rate, self.space)

    def _checked_layer(self, layer: int) -> int:
        if not 0 <= layer <= self.shape.layers:
            raise ConfigError(f"{self.name} has layers 0 to {self.shape.layers}, not {layer}.")
        return layer

    def _checked_lengths(self, batch: FloatArray, lengths: NDArray[np.int64] | None) -> list[int]:
        rows, samples = batch.shape
        sizes = [samples] * rows if lengths is None else np.asarray(lengths).astype(int).tolist()
        if len(sizes) != rows or max(sizes) > samples:
            raise AudioContentError(
                f"lengths must give, for each of {rows} rows, at most {samples} samples."
            )
        if min(sizes) < FIELD_SAMPLES:
            raise AudioContentError(
                f"audio must be at least {FIELD_SAMPLES} samples (25 ms at 16 kHz) long, "
                f"not {min(sizes)}."
            )
        return sizes


HubertModel = HuBERTModel


def convert_checkpoint(path: Path) -> dict[str, Array]:
    """The published ``pytorch_model.bin`` as arrays under this module's names.

    Raises:
        UnsafeFileError, ModelLoadError: see ``weights.checkpoint_arrays``.
    """
    named = ((_select(key), value) for key, value in checkpoint_arrays(path).items())
    return {key: value for key, value in named if key is not None}


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> HuBERTModel:
    """The encoder whose weights are the one file of ``files``.

    ``version.params`` may hold the sizes of ``HuBERTShape``, ``content_layer`` and ``normalise``.

    Raises:
        ModelLoadError, UnsafeFileError: see ``graphs.load_network``.
    """
    shape = HuBERTShape.from_params(version.params)
    network = load_network(
        "hubert", shape, files, version.key, device, convert=convert_checkpoint, select=_select
    )
    return HuBERTModel(
        network,
        shape,
        name=version.key,
        content_layer=version.params.get("content_layer"),
        normalise=bool(version.params.get("normalise", False)),
    )


def _select(key: str) -> str | None:
    # Fine-tuned checkpoints prefix the encoder; the mask embedding serves training alone.
    key = key.removeprefix("hubert.")
    parts = ("feature_extractor.", "feature_projection.", "encoder.")
    return key if key.startswith(parts) else None


def _raised(row: FloatArray, length: int) -> FloatArray:
    """``row`` at ``LEAST_DBFS`` or above, over its first ``length`` samples."""
    rms = float(np.sqrt(np.mean(np.square(row[:length], dtype=np.float64))))
    gain = min(10 ** (LEAST_DBFS / 20) / max(rms, 1e-12), 10 ** (MOST_GAIN_DB / 20))
    return row if gain <= 1 else row * np.float32(gain)


def _standardised(row: FloatArray, length: int) -> FloatArray:
    speech = row[:length]
    out = np.zeros_like(row)
    out[:length] = (speech - speech.mean()) / np.sqrt(speech.var() + 1e-7)
    return out
