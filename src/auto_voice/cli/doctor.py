"""``autovoice doctor`` and ``autovoice config``: what is in place, and which settings hold."""

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
from typing import Any

import click

from auto_voice.errors import AutoVoiceError
from auto_voice.models.model_registry import PIPELINE_MODELS, ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.devices import PROVIDERS, WHEELS, why_not
from auto_voice.settings import SETTINGS, Setting, get_settings, unknown_variables

NEEDED = ("numpy", "onnxruntime", "soundfile", "soxr", "swift-f0", "safetensors", "httpx2", "av")
OPTIONAL = {
    "torch": "auto-voice[train]",
    "matplotlib": "auto-voice[plot]",
    "faster-whisper": "auto-voice[eval]",
    "fastapi": "auto-voice[server]",
}
# Room for all default models and their converted forms, in bytes.
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
    registry = ModelRegistry(progress=False)
    offline, fallback = registry.settings.offline, registry.settings.fallback
    for named in PIPELINE_MODELS.values():
        try:
            version = registry.version(named)
        except AutoVoiceError as error:
            yield Finding(named, False, str(error))
            continue
        here, allowed = registry.is_installed(version), True
        if here:
            state = "here"
        elif not offline:
            state = f"fetched on first use, or now: autovoice models pull {named}"
        elif stand_in := _stand_in(registry, version, fallback):
            state = f"not here; {stand_in} stands in, as the fallback {fallback} allows"
        else:
            allowed = False
            state = "not here; switch the network on, or see: autovoice models import --help"
        yield Finding(version.key, allowed, f"{version.bytes / 1e6:.0f} MB, {state}")


def _stand_in(registry: ModelRegistry, version: ModelVersion, fallback: str) -> str:
    """What would do the work of a version that is not here; empty if nothing would."""
    if fallback == "none":
        return ""
    others = registry.catalog.stand_ins(version, others=fallback == "compact")
    found = next((other.key for other in others if registry.is_installed(other)), "")
    return found or ("a mock" if fallback == "mock" else "")


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


@click.group()
def config() -> None:
    """Show the settings and where each comes from.

    An option wins over the environment, that over .env, that over the file that AUTOVOICE_CONFIG
    names, that over the default.
    """


@config.command()
@click.option("--config", type=click.Path(path_type=Path), help="YAML of settings and models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(config: Path | None, as_json: bool) -> None:
    """Every setting with its value and origin.

    \b
    autovoice config show
    autovoice config show --json
    """
    settings = get_settings(config=config)
    unknown = unknown_variables()
    if as_json:
        facts: dict[str, Any] = {
            key: {
                "value": _shown(setting, getattr(settings, key)),
                "origin": settings.origins[key],
                "variable": setting.variable,
            }
            for key, setting in SETTINGS.items()
        }
        click.echo(json.dumps({"settings": facts, "unknown": unknown}, indent=2))
        return
    for key, setting in SETTINGS.items():
        value = _shown(setting, getattr(settings, key))
        value = " ".join(value) if isinstance(value, list) else value
        shown = (
            "-" if value in (None, "") else json.dumps(value) if isinstance(value, bool) else value
        )
        click.echo(f"{key:<17} {shown!s:<40} {settings.origins[key]:<30} {setting.help}")
    for name in unknown:
        click.echo(f"{name} is set, but nothing reads it.", err=True)


def _shown(setting: Setting, value: Any) -> Any:
    """A setting's value as JSON has it; of a secret, whether there is one."""
    if setting.secret:
        return "(set)" if value else None
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
