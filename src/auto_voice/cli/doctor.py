"""``autovoice doctor``."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from auto_voice.models.runtime.devices import PROVIDERS, WHEELS, why_not

NEEDED = (
    "numpy", "onnxruntime", "soundfile", "soxr", "swift-f0", "safetensors", "huggingface_hub",
)  # fmt: skip
OPTIONAL = {
    "torch": "auto-voice[train]",
    "matplotlib": "auto-voice[plot]",
    "faster-whisper": "auto-voice[eval]",
    "fastapi": "auto-voice[server]",
}
ROOMY_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``ok`` is false only for what stops a conversion."""

    what: str
    ok: bool
    detail: str


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> int:
    """Check that everything a conversion needs is in place.

    Exits with 2 if something is missing. Opens no network connection.

    \b
    autovoice doctor
    """
    findings = [*_packages(), *_devices(), *_store(), *_models()]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{'ok     ' if finding.ok else 'MISSING'} {finding.what}: {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 2


def _packages() -> Iterator[Finding]:
    yield Finding("python", sys.version_info >= (3, 10), platform.python_version())
    for name in NEEDED:
        yield _package(name, f"run: pip install {name}", needed=True)
    for name, extra in OPTIONAL.items():
        yield _package(name, f'run: pip install "{extra}"', needed=False)


def _package(name: str, hint: str, *, needed: bool) -> Finding:
    # Other builds of the runtime are the same package by another name.
    for installed in (name, *(WHEELS.values() if name == "onnxruntime" else ())):
        try:
            return Finding(installed, True, metadata.version(installed))
        except metadata.PackageNotFoundError:
            continue
    return Finding(name, not needed, f"not installed; {hint}")


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", True, f"{cores} cores")
    from auto_voice.models.runtime.graphs import runs_on

    for kind in PROVIDERS:
        problem = why_not(kind)
        if problem and kind != "cpu":
            yield Finding(f"device {kind}", True, f"not here: {problem}")
        elif runs_on("cuda:0" if kind == "cuda" else kind):
            yield Finding(f"device {kind}", True, "runs a test network")
        else:
            yield Finding(f"device {kind}", kind != "cpu", "does not run a test network")


def _store() -> Iterator[Finding]:
    from auto_voice.settings import get_settings, unknown_variables

    settings = get_settings()
    folder = settings.model_dir
    nearest = _nearest_existing(folder)
    writable = os.access(nearest, os.W_OK)
    detail = f"{folder} ({settings.origins['model_dir']})"
    yield Finding("model folder", writable, detail if writable else f"{detail} is not writable")
    free = shutil.disk_usage(nearest).free
    yield Finding("disk space", free > ROOMY_BYTES, f"{free / 1e9:.1f} GB free")
    yield Finding("network", True, "switched off" if settings.offline else "allowed")
    for name in unknown_variables():
        yield Finding(name, True, "is set but nothing reads it; see .env.example")


def _models() -> Iterator[Finding]:
    """What a conversion with the settings as they are loads, and what it would fetch first."""
    from auto_voice.errors import AutoVoiceError
    from auto_voice.inference import PipelineConfig
    from auto_voice.models import ModelRegistry

    config, registry = PipelineConfig(), ModelRegistry(progress=False)
    for named in (config.content_encoder, config.speaker_encoder, config.converter, config.vocoder):
        try:
            version = registry.version(named)
        except AutoVoiceError as error:
            yield Finding(named, False, str(error))
            continue
        here, offline = registry.is_installed(version), registry.settings.offline
        if here:
            state = "here"
        elif offline:
            state = "not here; switch the network on, or see: autovoice models import --help"
        else:
            state = f"fetched on first use, or now: autovoice models pull {named}"
        yield Finding(version.key, here or not offline, f"{version.bytes / 1e6:.0f} MB, {state}")


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
