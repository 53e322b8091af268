"""HuBERT base (Hsu et al. 2021): self-supervised content features, 768 numbers, 50 Hz."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from auto_voice.errors import AudioContentError, ConfigError, ModelLoadError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import load_network, weight_file
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.runtime.weights import Array, as_batch, checkpoint_arrays, read_weights
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


# Classes that checkpoints of fairseq speak of beside their tensors: options, dictionaries of
# labels, the state of the training.
FAIRSEQ = frozenset({
    "argparse", "fairseq", "omegaconf", "enum", "typing", "numpy", "collections.defaultdict",
    "_codecs.encode",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__")
      for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")),
})  # fmt: skip


def convert_checkpoint(path: Path) -> dict[str, Array]:
    """A checkpoint of transformers or fairseq as arrays under this module's names.

    Raises:
        UnsafeFileError, ModelLoadError: see ``weights.checkpoint_arrays``.
    """
    arrays = checkpoint_arrays(path, under="model", ignored=FAIRSEQ)
    named = ((_select(key), value) for key, value in arrays.items())
    return {key: value for key, value in named if key is not None}


# In a folder of transformers, the safer first.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What the network is built for; a ``config.json`` that says otherwise is of another network.
_FIXED: Mapping[str, Any] = {
    "model_type": "hubert",
    "feat_extract_norm": "group",
    "do_stable_layer_norm": False,
    "conv_bias": False,
    "conv_kernel": list(KERNELS),
    "conv_stride": list(STRIDES),
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
}


def describe(
    paths: Sequence[Path], kind: str, params: Mapping[str, Any]
) -> tuple[list[Path], dict[str, Any]]:
    """The files of a HuBERT that is being added, and its sizes as they say them.

    Args:
        paths: a folder of transformers, or a file of weights by the names of transformers or
            fairseq, and a graph where the sizes are none of the package's.
        params: what the user says of it.

    Raises:
        ConfigError: the folder holds no such weights.
        ModelLoadError, UnsafeFileError: they are of another network.
    """
    files: list[Path] = []
    config: Mapping[str, Any] = {}
    for path in paths:
        files.append(_weights_in(path) if path.is_dir() else path)
        if path.is_dir():
            config = _config_of(path)
    weights = weight_file({path.name: path for path in files}, "HuBERT")
    sizes = _sizes(read_weights(weights, convert=convert_checkpoint, select=_select), weights)
    if "num_attention_heads" in config:
        sizes["heads"] = int(config["num_attention_heads"])
    defaults = HuBERTShape()
    known = {name: size for name, size in sizes.items() if size != getattr(defaults, name)}
    rates = {"sample_rate": SPEECH_RATE, "frame_rate": SPEECH_RATE // HOP_SAMPLES}
    return files, {**rates, "dims": sizes["dims"], **known, **params}


def _weights_in(folder: Path) -> Path:
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    parts = sorted(path.name for path in folder.glob("*.index.json"))
    told = f"it is split ({parts[0]}); save it as one file" if parts else "name the file itself"
    raise ConfigError(f"{folder} holds no {' or '.join(FOLDER_WEIGHTS)}: {told}")


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no settings of a model")
    for name, wanted in _FIXED.items():
        if config.get(name, wanted) != wanted:
            raise ModelLoadError(
                f"{path} says {name} {config[name]!r}, and HuBERT base has {wanted!r}; give a "
                "model of its kind"
            )
    return config


def _sizes(arrays: Mapping[str, Array], source: Path) -> dict[str, int]:
    """The sizes of a network with these arrays; heads of 64 numbers, as all published ones have."""
    try:
        dims, channels = arrays["feature_projection.projection.weight"].shape
        _, a_group, kernel = arrays["encoder.pos_conv_embed.conv.weight"].shape
        feed_forward = arrays["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelLoadError(
            f"{source} holds no HuBERT by the names of transformers or fairseq ({error})"
        ) from error
    layers = {int(key.split(".")[2]) for key in arrays if key.startswith("encoder.layers.")}
    return {
        "dims": dims, "layers": len(layers), "heads": max(1, dims // 64),
        "feed_forward": feed_forward, "channels": channels, "position_kernel": kernel,
        "position_groups": dims // a_group,
    }  # fmt: skip


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


# Names of fairseq by those of transformers, which the graph has.
_FAIRSEQ_PARTS = (
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"^(feature_extractor\.conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"^(feature_extractor\.conv_layers\.0)\.2\.", r"\1.layer_norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.layer_norm."),
    (r"^(encoder\.layers\.\d+)\.fc1\.", r"\1.feed_forward.intermediate_dense."),
    (r"^(encoder\.layers\.\d+)\.fc2\.", r"\1.feed_forward.output_dense."),
)


def _select(key: str) -> str | None:
    # Fine-tuned checkpoints prefix the encoder; what predicts labels and masks serves training.
    for prefix in ("hubert.", "w2v_encoder.w2v_model.", "encoder.w2v_model."):
        key = key.removeprefix(prefix)
    for pattern, ours in _FAIRSEQ_PARTS:
        key = re.sub(pattern, ours, key)
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
