"""Content encoders that a converter was not trained on: fitted once, then used like its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from auto_voice.errors import ConfigError, ModelLoadError
from auto_voice.models.base import ContentEncoder, Converter
from auto_voice.types import Waveform

if TYPE_CHECKING:
    from auto_voice.models.calibration import Adapter
    from auto_voice.models.model_registry import ModelRegistry


def adapter_path(registry: ModelRegistry, encoder: str, space: str) -> Path:
    """Where the adapter of ``encoder`` into ``space`` is kept: beside the encoder's weights."""
    version = registry.version(encoder)
    slug = re.sub(r"[^A-Za-z0-9._@-]+", "_", space)
    return registry.store.folder(version.name, version.version) / f"adapter-{slug}.safetensors"


def into_space_of(
    converter: Converter, encoder: ContentEncoder, registry: ModelRegistry, name: str
) -> ContentEncoder:
    """``encoder`` as ``converter`` understands it: itself, or through its adapter.

    Args:
        name: of the encoder in the registry.

    Raises:
        ModelLoadError: it speaks another space and no adapter was fitted; the message names the
            version of it that speaks the converter's, or how to fit one.
    """
    if encoder.space == converter.content_space:
        return encoder
    from auto_voice.models.calibration import AdaptedEncoder, Adapter

    path = adapter_path(registry, name, converter.content_space)
    if not path.is_file():
        if other := registry.in_space(name, converter.content_space):
            raise ModelLoadError(
                f"{converter.name} speaks from {converter.content_space}, which {encoder.name} "
                f"does not give; choose the content encoder {other.key} with it."
            )
        raise ModelLoadError(
            f"{converter.name} was trained on {converter.content_space}, and {name} has not been "
            f"fitted to it; run `autovoice models calibrate {name}` once."
        )
    return AdaptedEncoder(encoder, Adapter.load(path))


def calibrate(
    registry: ModelRegistry,
    name: str,
    speech: Iterable[Waveform],
    *,
    converter: str = "converter_compact",
    own_encoder: str = "content_whisper",
) -> tuple[Adapter, Path]:
    """Fit the content encoder ``name`` to ``converter`` and keep the adapter for the pipeline.

    Args:
        speech: that both encoders hear; a minute at least, better ten speakers.
        own_encoder: the content encoder that ``converter`` was trained on.

    Raises:
        ConfigError: ``name`` needs no adapter, or ``own_encoder`` is not the converter's.
        AudioContentError: too little speech.
    """
    from auto_voice.models.calibration import fit_adapter

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
    adapter = fit_adapter(source, target, speech)
    return adapter, adapter.save(adapter_path(registry, name, space))
