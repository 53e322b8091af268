#!/usr/bin/env python3
"""Six ways to use the models of auto_voice.

python examples/model_integration_example.py           # mock models: no network, no torch
python examples/model_integration_example.py --real    # real weights, fetched and verified
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from auto_voice import PipelineConfig, VoiceConversionPipeline
from auto_voice.errors import ModelUnavailableError
from auto_voice.models import ModelRegistry

RATE = 16000


def a_second_of_audio(pitch_hz: float = 140.0) -> np.ndarray:
    """``(16000,)`` float32: syllables of a harmonic tone, enough for every stage to work on."""
    seconds = np.arange(RATE) / RATE
    voice = sum(np.sin(2 * np.pi * pitch_hz * k * seconds) / k for k in range(1, 20))
    return (0.1 * voice * (1 + np.sin(2 * np.pi * 3 * seconds))).astype(np.float32)


def example_1_mock() -> None:
    """Numpy stand-ins: right shapes, no files, no torch, the same numbers each time."""
    registry = ModelRegistry(use_mock=True)
    features = registry.load_hubert().extract_features(a_second_of_audio())
    audio = registry.load_hifigan().synthesize(np.full((1, 80, 86), -4.0))
    embedding = registry.load_speaker_encoder().embed_utterance(a_second_of_audio())
    print(f"content   {features.shape}, 50 frames a second")
    print(f"audio     {audio.shape}, 22 050 samples a second")
    print(f"embedding {embedding.shape}, norm {np.linalg.norm(embedding):.3f}")


def example_2_real_loading(real: bool) -> None:
    """Real weights: fetched from the first source that serves the right bytes, loaded once."""
    registry = ModelRegistry(use_mock=not real)
    hifigan = registry.load_hifigan()
    assert registry.load_hifigan() is hifigan, "every caller and thread shares one object"
    mel = np.full((80, 86), -6.0, dtype=np.float32)
    print(f"{registry.resolved('hifigan_universal')} made {hifigan.synthesize(mel).shape}")
    encoder = registry.load_speaker_encoder()
    low, high = (encoder.embed_utterance(a_second_of_audio(hz)) for hz in (110, 220))
    print(f"similarity of a low and a high voice: {encoder.similarity(low, high):.2f}")
    if real:
        try:
            print(f"HuBERT: {registry.load_hubert().extract_features(a_second_of_audio()).shape}")
        except ModelUnavailableError as error:
            print(f"HuBERT cannot be had here: {error}")


def example_3_pipeline(real: bool) -> None:
    """A conversion into the voice behind a bare 256-d embedding."""
    pipeline = VoiceConversionPipeline(PipelineConfig(use_mock_models=not real))
    target_embedding = pipeline.speaker_encoder.embed_utterance(a_second_of_audio(220))
    result = pipeline.convert(a_second_of_audio(), target_embedding, sample_rate=RATE)
    print(f"{result.seconds:.2f} s at {result.sample_rate} Hz, mock: {result.mock}")
    for stage, model in result.models.items():
        print(f"  {stage}: {model}")
    for note in result.notes:
        print(f"  note: {note}")


def example_4_warm_up_and_cache(real: bool) -> None:
    """Warm-up runs each model once; afterwards a load is a dictionary look-up."""
    registry = ModelRegistry(use_mock=not real)
    for name, timing in registry.warmup_models(["hifigan_universal", "speaker_encoder"]).items():
        print(f"{name}: load {timing.load_s:.3f} s, first inference {timing.inference_s:.3f} s")
    start = time.perf_counter()
    registry.load_hifigan()
    print(f"loaded again in {1e6 * (time.perf_counter() - start):.0f} µs")
    registry.unload("hifigan_universal")
    print(f"still in memory: {', '.join(registry.loaded())}")


def example_5_custom_configuration(folder: Path) -> None:
    """A YAML of your own adds models and versions and changes settings, without code."""
    config = folder / "mine.yaml"
    config.write_text(
        """\
settings:
  memory_budget_mb: 2000
  fallback: compact
models:
  my_vocoder:
    kind: vocoder
    description: phase reconstruction under a name of mine
    versions:
      "1.0": {architecture: griffin_lim, licence: MIT, files: []}
      "2.0": {architecture: griffin_lim, licence: MIT, files: [], params: {iterations: 60}}
""",
        encoding="utf-8",
    )
    registry = ModelRegistry(folder / "models", config=config)
    print(f"memory budget {registry.settings.memory_budget_mb} MB")
    print(f"default {registry.version('my_vocoder').key}", end=", ")
    registry.pin("my_vocoder", "1.0")
    print(f"pinned {registry.version('my_vocoder').key}")
    print(f"audio {registry.load('my_vocoder').synthesize(np.full((80, 20), -5.0)).shape}")


def example_6_inspection() -> None:
    """What there is, where it lies and what it needs."""
    registry = ModelRegistry()
    print(f"models are kept in {registry.model_dir}")
    for row in registry.status():
        state = "installed" if row.installed else "not here"
        size = f"{row.bytes / 1e6:.1f} MB"
        print(
            f"  {row.name + '@' + row.version:24} {row.kind:10} {size:>9}  {state}, {row.licence}"
        )
    version = registry.version("hifigan_universal")
    print(f"{version.key}: {dict(version.params)}, needs {version.needs.ram_mb} MB of memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="fetch and run real weights")
    real = parser.parse_args().real
    with tempfile.TemporaryDirectory() as folder:
        examples = (
            ("1. Mock models", example_1_mock),
            ("2. Real loading", lambda: example_2_real_loading(real)),
            ("3. Pipeline", lambda: example_3_pipeline(real)),
            ("4. Warm-up and caching", lambda: example_4_warm_up_and_cache(real)),
            ("5. Custom configuration", lambda: example_5_custom_configuration(Path(folder))),
            ("6. Inspection", example_6_inspection),
        )
        for title, example in examples:
            print(f"\n{title}\n{'-' * len(title)}")
            example()


if __name__ == "__main__":
    main()
