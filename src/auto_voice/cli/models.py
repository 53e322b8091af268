"""``autovoice models``: list, fetch, verify and manage models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from auto_voice.cli.calibrate import calibrate
from auto_voice.errors import ConfigError, ModelError, UnknownModelError

if TYPE_CHECKING:
    from auto_voice.models.catalog import ModelVersion
    from auto_voice.models.model_registry import ModelRegistry

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--config", type=click.Path(path_type=Path), help="YAML of settings and models."),
    click.option("--model-dir", type=click.Path(path_type=Path), help="Where models are kept."),
    click.option("--offline", is_flag=True, default=None, help="Open no network connection."),
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def registry_options(command: F) -> F:
    """Options that choose the registry; the command takes them as ``**where``."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def open_registry(**where: Any) -> ModelRegistry:
    """The registry that the options choose."""
    from auto_voice.models.model_registry import ModelRegistry

    return ModelRegistry(**where)


@click.group()
def models() -> None:
    """List, fetch, verify and manage models.

    A model is named NAME or NAME@VERSION; a version may be an alias such as latest.
    """


models.add_command(calibrate)


@models.command("list")
@click.option("--installed", is_flag=True, help="Only what is on this machine.")
@click.option("--kind", help="Only models of this kind.")
@as_json_option
@registry_options
def list_(installed: bool, kind: str | None, as_json: bool, **where: Any) -> None:
    """Every model and version, and whether it is here."""
    rows = [
        row
        for row in open_registry(**where).status()
        if (row.installed or not installed) and (kind is None or row.kind == kind)
    ]
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    table = [("MODEL", "KIND", "SIZE", "STATE", "DESCRIPTION")]
    for row in rows:
        state = "installed" if row.installed else "-"
        marks = ("pinned",) if row.pinned else ()
        table.append(
            (
                f"{row.name}@{row.version}" + ("" if row.default else " (not default)"),
                row.kind,
                _size(row.bytes),
                ", ".join((state, *marks)),
                row.description,
            )
        )
    _print_table(table)


@models.command()
@click.argument("name")
@as_json_option
@registry_options
def show(name: str, as_json: bool, **where: Any) -> None:
    """Everything the catalog and the model folder say about NAME."""
    registry = open_registry(**where)
    version = registry.version(name)
    entry = registry.catalog.entry(version.name)
    facts: dict[str, Any] = {
        "name": version.name,
        "version": version.version,
        "kind": version.kind,
        "description": entry.description,
        "licence": version.licence,
        "architecture": version.architecture,
        "installed": registry.is_installed(version),
        "folder": str(registry.store.folder(version.name, version.version)),
        "versions": list(entry.versions),
        "aliases": dict(entry.aliases),
        "params": dict(version.params),
        "needs": asdict(version.needs),
        "files": [asdict(file) for file in version.files],
        "metadata": registry.store.metadata(version.name, version.version),
    }
    if as_json:
        _print_json(facts)
        return
    for key in ("description", "kind", "licence", "architecture", "installed", "folder"):
        click.echo(f"{key:<13}{facts[key]}")
    click.echo(f"{'versions':<13}{', '.join(facts['versions'])}")
    click.echo(f"{'aliases':<13}{', '.join(f'{k} = {v}' for k, v in facts['aliases'].items())}")
    for file in version.files:
        click.echo(f"{'file':<13}{file.file}, {_size(file.bytes)}, sha256 {file.sha256}")
        for uris in file.sources:
            click.echo(f"{'  from':<13}{' + '.join(uris)}")


@models.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every model of the catalog.")
@click.option("--force", is_flag=True, help="Fetch again what is already here.")
@registry_options
def pull(names: tuple[str, ...], everything: bool, force: bool, **where: Any) -> None:
    """Fetch and verify NAMES."""
    registry = open_registry(**where)
    if not names and not everything:
        raise ConfigError("name the models to fetch, or give --all; see: autovoice models list")
    pull_models(registry, names or tuple(registry.catalog.models), force=force)


def pull_models(registry: ModelRegistry, names: Iterable[str], *, force: bool = False) -> None:
    """Fetch each model, say where it lies, and go on past those that cannot be had.

    Raises:
        ModelError: at the end, if any could not be had; the message holds each reason.
    """
    wanted = [registry.version(name) for name in names]
    failures: list[ModelError] = []
    for version in wanted:
        try:
            registry.pull(version.name, version.version, force=force)
        except ModelError as error:
            failures.append(error)
            click.echo(f"{version.key}: failed", err=True)
        else:
            click.echo(f"{version.key}: {_whereabouts(registry, version)}")
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ModelError(
            f"{len(failures)} of {len(wanted)} models could not be had: "
            + " ".join(str(error) for error in failures)
        )


@models.command()
@click.argument("names", nargs=-1)
@as_json_option
@registry_options
def verify(names: tuple[str, ...], as_json: bool, **where: Any) -> int:
    """Hash every byte of NAMES (default: all that is installed); exits with 2 on damage."""
    from auto_voice.models.store_maintenance import verify as verify_version

    registry = open_registry(**where)
    versions = _chosen(registry, names)
    reports = [verify_version(registry.store, version) for version in versions if version.files]
    if as_json:
        _print_json([{**asdict(report), "ok": report.ok} for report in reports])
    else:
        for report in reports:
            told = "; ".join(report.problems) or ("ok" if report.ok else "not installed")
            click.echo(f"{report.key}: {told}")
        if not reports:
            click.echo("nothing is installed")
    return 0 if all(report.ok for report in reports) else 2


@models.command()
@click.argument("names", nargs=-1)
@registry_options
def repair(names: tuple[str, ...], **where: Any) -> None:
    """Verify NAMES (default: all that is installed) and fetch again what is damaged."""
    registry = open_registry(**where)
    for version in _chosen(registry, names):
        if version.files:
            registry.loader.repair(version)
            click.echo(f"{version.key}: ok")


@models.command()
@click.argument("names", nargs=-1, required=True)
@registry_options
def remove(names: tuple[str, ...], **where: Any) -> None:
    """Delete NAMES from the model folder."""
    from auto_voice.models import store_maintenance

    registry = open_registry(**where)
    for name, version in [_name_and_version(registry, name) for name in names]:
        freed = store_maintenance.remove(registry.store, name, version)
        click.echo(f"{name}@{version}: removed, {_size(freed)}")


@models.command()
@click.option("--older-than", "days", type=click.FloatRange(min=0), default=7.0, show_default=True)
@registry_options
def prune(days: float, **where: Any) -> None:
    """Delete broken-off transfers and set-aside files older than so many days."""
    from auto_voice.models import store_maintenance

    if math.isnan(days):
        raise click.BadParameter("nan is no number of days", param_hint="--older-than")
    report = store_maintenance.prune(open_registry(**where).store, days * 86400)
    for path in report.removed:
        click.echo(str(path))
    click.echo(f"{len(report.removed)} removed, {_size(report.freed_bytes)}")


@models.command()
@click.argument("names", nargs=-1)
@click.option("--remove", "unpin", is_flag=True, help="Let NAMES follow the catalog again.")
@as_json_option
@registry_options
def pin(names: tuple[str, ...], unpin: bool, as_json: bool, **where: Any) -> None:
    """Make bare names mean a version: NAME@VERSION, or NAME for what it means now.

    Without NAMES the pins are listed. They stand in models.lock.json in the model folder.
    """
    from auto_voice.models.pins import read_pins

    registry = open_registry(**where)
    wanted = [(name.partition("@")[0], None if unpin else registry.version(name)) for name in names]
    for name, version in wanted:
        if version is None:
            registry.unpin(name)
        else:
            registry.pin(version.name, version.version)
    pins = {name: record["version"] for name, record in read_pins(registry.model_dir).items()}
    if as_json:
        _print_json(pins)
    else:
        for name, number in pins.items():
            click.echo(f"{name}@{number}")


@models.command()
@click.argument("names", nargs=-1)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The archive to write."
)
@registry_options
def export(names: tuple[str, ...], output: Path, **where: Any) -> None:
    """Pack NAMES (default: all that is installed) for a machine without a network."""
    from auto_voice.models.archive import export_versions

    registry = open_registry(**where)
    versions = [version for version in _chosen(registry, names) if version.files]
    if not versions:
        raise ConfigError("nothing is installed that could be exported; run: autovoice models pull")
    path = export_versions(registry.store, versions, output)
    click.echo(f"{path}: {', '.join(version.key for version in versions)}")


@models.command("import")
@click.argument("archive", type=click.Path(path_type=Path))
@registry_options
def import_(archive: Path, **where: Any) -> None:
    """Install the models of an archive that export made; hashes must be the catalog's."""
    from auto_voice.models.archive import import_archive

    registry = open_registry(**where)
    for version in import_archive(registry.store, archive, registry.catalog.version):
        click.echo(f"{version.key}: {_whereabouts(registry, version)}")


@models.command()
@click.argument("name")
@click.option("--file", help="One of its files; by default the first.")
@registry_options
def path(name: str, file: str | None, **where: Any) -> None:
    """Print where a file of NAME lies, fetching it if need be."""
    click.echo(str(open_registry(**where).path(name, file=file)))


@models.command()
@as_json_option
@registry_options
def status(as_json: bool, **where: Any) -> None:
    """The model folder: what is in it, what broke off, how much room is left."""
    from auto_voice.models.disk import free_bytes
    from auto_voice.models.pins import read_pins
    from auto_voice.models.store_maintenance import partials

    registry = open_registry(**where)
    root = registry.model_dir
    installed = [f"{name}@{version}" for name, version in registry.store.installed()]
    facts: dict[str, Any] = {
        "model_dir": str(root),
        "installed": installed,
        "used_bytes": sum(p.stat().st_size for p in root.rglob("*") if p.is_file()),
        "free_bytes": free_bytes(root),
        "partials": [asdict(info) for info in partials(registry.store)],
        "pins": {name: record["version"] for name, record in read_pins(root).items()},
        "offline": registry.settings.offline,
        "catalogs": [str(file) for file in registry.catalog.files],
    }
    if as_json:
        _print_json(facts)
        return
    click.echo(f"model_dir  {root}")
    click.echo(f"installed  {', '.join(installed) or 'nothing'}")
    click.echo(f"used       {_size(facts['used_bytes'])}, {_size(facts['free_bytes'])} free")
    for info in facts["partials"]:
        click.echo(f"broken off {_size(info['bytes'])} of {_size(info['total'])}, {info['url']}")
    for name, number in facts["pins"].items():
        click.echo(f"pinned     {name}@{number}")
    click.echo(f"catalogs   {', '.join(facts['catalogs'])}")


def _chosen(registry: ModelRegistry, names: Iterable[str]) -> list[ModelVersion]:
    """The versions that ``names`` mean, or else all that are installed."""
    wanted = list(names)
    if wanted:
        return [registry.version(name) for name in wanted]
    known = {version.key: version for version in registry.catalog.versions()}
    keys = [f"{name}@{version}" for name, version in registry.store.installed()]
    return [known[key] for key in keys if key in known]


def _name_and_version(registry: ModelRegistry, name: str) -> tuple[str, str]:
    """What ``name`` means; a version that only the folder knows may be named in full."""
    try:
        version = registry.version(name)
    except UnknownModelError:
        bare, _, number = name.partition("@")
        if (bare, number) not in registry.store.installed():
            raise
        return bare, number
    return version.name, version.version


def _whereabouts(registry: ModelRegistry, version: ModelVersion) -> str:
    if not version.files:
        return "needs no files"
    return str(registry.path(version.name, version.version).parent)


def _size(count: int) -> str:
    if count < 0:
        return "unknown"
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
