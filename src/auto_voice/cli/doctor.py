"""``autovoice doctor`` and ``autovoice config``: what is in place, and which settings hold."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from auto_voice.cli.showing import config_option
from auto_voice.errors import AutoVoiceError, install_hint
from auto_voice.models.model_registry import LIVE_VOCODER, PIPELINE_MODELS, ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.devices import (
    PROVIDERS,
    WHEELS,
    available_providers,
    change_wheel,
    gpu_memory_mb,
    installed_wheels,
    why_not,
)
from auto_voice.settings import SETTINGS, Setting, get_settings, unknown_variables

NEEDED = ("numpy", "onnxruntime", "soundfile", "soxr", "swift-f0", "safetensors", "httpx2", "av")
OPTIONAL = {
    "torch": "train",
    "matplotlib": "plot",
    "faster-whisper": "eval",
    "fastapi": "server",
    "sounddevice": "live",
}
# dB; below it a device computes something else than the CPU does. What has single precision leaves
# 90 and more, and shorter mantissas of GPUs must not cost more than can be heard.
LEAST_SNR_DB = 30.0
# Room for all default models and their converted forms, in bytes.
ROOMY_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        ok: false only for what stops a conversion.
        here: false for what is missing, needed or not.
    """

    what: str
    ok: bool
    detail: str
    here: bool = True

    @property
    def state(self) -> str:
        return "MISSING" if not self.ok else "ok" if self.here else "absent"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--devices",
    "compare",
    is_flag=True,
    help="Run the default models on every device that is here and compare them with the CPU.",
)
def doctor(as_json: bool, compare: bool) -> int:
    """Check that everything a conversion needs is in place.

    Exits with 2 if something is missing. Opens no network connection; with --devices, models that
    are not here yet are fetched first.

    \b
    autovoice doctor
    autovoice doctor --devices
    """
    if compare:
        return _compare(as_json)
    findings = [*_packages(), *_devices(), *_store(), *_models()]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{finding.state:<7} {finding.what}: {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 2


def _packages() -> Iterator[Finding]:
    yield Finding("python", sys.version_info >= (3, 10), platform.python_version())
    for name in NEEDED:
        yield _package(name, f"run: pip install {name}", needed=True)
    for name, extra in OPTIONAL.items():
        yield _package(name, f"run: {install_hint(extra)}", needed=False)


def _package(name: str, hint: str, *, needed: bool) -> Finding:
    if name == "onnxruntime" and (wheels := installed_wheels()):
        return _runtime(wheels)
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, not needed, f"not installed; {hint}", here=False)


def _runtime(wheels: dict[str, str]) -> Finding:
    """Which build of the runtime is there: they are one package by several names."""
    told = ", ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        # The one that was installed last has overwritten the others' files.
        last = next((wheel for wheel in WHEELS.values() if wheel in wheels), "onnxruntime")
        return Finding("onnxruntime", False, f"{told} overwrite each other; {change_wheel(last)}")
    return Finding(next(iter(wheels)), True, next(iter(wheels.values())))


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", True, f"{cores} cores")
    from auto_voice.models.runtime.graphs import why_it_fails

    for kind in PROVIDERS:
        if problem := why_not(kind):
            yield Finding(f"device {kind}", kind != "cpu", problem, here=False)
    for device in _present():
        failure = why_it_fails(device)
        detail = f"does not run a test network: {failure}" if failure else "runs a test network"
        if device.startswith("cuda"):
            detail += f", {gpu_memory_mb()[int(device[5:])]} MB"
        yield Finding(f"device {device}", not failure or device != "cpu", detail)
    for provider in available_providers():
        if provider not in PROVIDERS.values():
            yield Finding(f"provider {provider}", True, "of the runtime; nothing here uses it")


def _present() -> list[str]:
    """The devices whose providers the installed runtime has."""
    kinds = [kind for kind in PROVIDERS if not why_not(kind)]
    gpus = [f"cuda:{index}" for index in range(len(gpu_memory_mb()))] if "cuda" in kinds else []
    return [*(kind for kind in kinds if kind != "cuda"), *gpus]


# Seconds of sound that each model gets, and runs of which the fastest counts.
COMPARED_SECONDS, COMPARED_RUNS = 5.0, 3


def _compare(as_json: bool) -> int:
    """Each default model on each device against the CPU; 2 where one differs or does not run."""
    from auto_voice.cli.showing import print_json, print_table
    from auto_voice.models.registry.loading import run_once

    names = [*PIPELINE_MODELS.values(), "content_compact", LIVE_VOCODER]
    rows: list[dict[str, Any]] = []
    expected: dict[str, Any] = {}
    present = _present()
    for device in present + ["openvino:bf16"] * ("openvino" in present):
        # A registry of its own for each, so that no model of one is taken for another's.
        registry = ModelRegistry(device=device)
        for name in names:
            model, version = registry.load(name), registry.version(name)
            took = []
            for _ in range(COMPARED_RUNS):
                started = time.perf_counter()
                made = np.asarray(run_once(model, version, COMPARED_SECONDS), np.float64)
                took.append(time.perf_counter() - started)
            reference, cpu_s = expected.setdefault(name, (made, min(took)))
            error = made - reference
            power = float(np.mean(error**2))
            rows.append({
                "model": version.key,
                "device": device,
                "runs_on": getattr(model, "device", "cpu"),
                "max_error": float(np.abs(error).max()),
                "snr_db": 10 * math.log10(float(np.mean(reference**2)) / power) if power else None,
                "seconds": min(took),
                "speed": cpu_s / min(took),
            })  # fmt: skip
        registry.unload()
    if as_json:
        print_json(rows)
    else:
        table = [("MODEL", "DEVICE", "MAX ERROR", "SNR", "SECONDS", "SPEED")]
        for row in rows:
            there = row["runs_on"] == row["device"]
            snr = "equal" if row["snr_db"] is None else f"{row['snr_db']:.0f} dB"
            table.append((
                row["model"],
                row["device"] if there else f"{row['device']} (ran on {row['runs_on']})",
                f"{row['max_error']:.1e}", snr, f"{row['seconds']:.3f}", f"{row['speed']:.2f} x",
            ))  # fmt: skip
        print_table(table)
    exact = [row for row in rows if row["snr_db"] is not None and row["device"] != "openvino:bf16"]
    differs = any(row["snr_db"] < LEAST_SNR_DB for row in exact)
    return 2 if differs or any(row["runs_on"] != row["device"] for row in rows) else 0


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
@config_option
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
        value = json.dumps(value) if isinstance(value, bool) else value
        shown = "-" if value in (None, "") else value
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
