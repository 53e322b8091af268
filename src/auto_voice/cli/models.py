"""``autovoice models``: list, fetch, verify and manage models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.derived import map_content, quantize
from auto_voice.cli.options import chosen, name_and_version, open_registry, registry_options
from auto_voice.cli.showing import print_json, print_table, sized
from auto_voice.errors import AutoVoiceError, ConfigError, ModelError

if TYPE_CHECKING:
    from auto_voice.models.model_registry import ModelRegistry
    from auto_voice.models.registry.catalog import ModelVersion

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """List, fetch, verify and manage models.

    A model is named NAME or NAME@VERSION; a version may be an alias such as latest.
    """


models.add_command(map_content)
models.add_command(quantize)


@models.command("list")
@click.option("--installed", is_flag=True, help="Only what is on this machine.")
@click.option("--kind", help="Only models of this kind.")
@as_json_option
@registry_options
def list_(installed: bool, kind: str | None, as_json: bool, **where: Any) -> None:
    """Every model and version, and whether it is here.

    \b
    autovoice models list
    autovoice models list --installed --kind vocoder
    """
    registry = open_registry(**where)
    kinds = sorted({entry.kind for entry in registry.catalog.models.values()})
    if kind is not None and kind not in kinds:
        raise ConfigError(f"there is no model of kind {kind}; the kinds are {', '.join(kinds)}")
    rows = [
        row
        for row in registry.status()
        if (row.installed or not installed) and (kind is None or row.kind == kind)
    ]
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = [("MODEL", "KIND", "SIZE", "MEMORY", "STATE", "DESCRIPTION")]
    for row in rows:
        state = "installed" if row.installed else "-"
        marks = ["pinned"] * row.pinned + ["stale pin"] * bool(row.problem)
        table.append(
            (
                f"{row.name}@{row.version}" + ("" if row.default else " (not default)"),
                row.kind,
                sized(row.bytes),
                f"{row.ram_mb} MB" if row.ram_mb else "-",
                ", ".join((state, *marks)),
                row.description + (f", in {row.quantised}" if row.quantised else ""),
            )
        )
    print_table(table)
    for row in rows:
        if row.problem:
            click.echo(f"autovoice: warning: {row.problem}", err=True)


@models.command()
@click.argument("name")
@as_json_option
@registry_options
def show(name: str, as_json: bool, **where: Any) -> None:
    """Everything the catalog and the model folder say about NAME.

    \b
    autovoice models show hifigan_universal
    """
    registry = open_registry(**where)
    entry = registry.catalog.entry(name.partition("@")[0])
    stale = "" if "@" in name else registry.pins.problem(registry.catalog, entry.name)
    version = registry.catalog.version(name) if stale else registry.version(name)
    metadata = registry.store.metadata(version.name, version.version) or {}
    pin = registry.pins.records().get(entry.name, {}).get("version")
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
        "metadata": metadata or None,
        "pin": pin,
        "problem": stale,
    }
    if as_json:
        print_json(facts)
        return
    ram_mb, vram_mb, gpu = version.needs.ram_mb, version.needs.vram_mb, version.needs.gpu
    needs = f"{ram_mb} MB of memory; GPU {gpu}" + (f" with {vram_mb} MB" if vram_mb else "")
    lines = [("name", version.key)]
    lines += [
        (key, str(facts[key]))
        for key in ("description", "kind", "licence", "architecture", "installed", "folder")
    ]
    lines += [
        ("completed", metadata.get("completed", "-")),
        ("versions", ", ".join(entry.versions)),
        ("aliases", ", ".join(f"{k} = {v}" for k, v in entry.aliases.items())),
        ("pin", pin or "-"),
        ("params", ", ".join(f"{k} = {v}" for k, v in version.params.items()) or "-"),
        ("needs", needs),
    ]
    for file in version.files:
        served = metadata.get("files", {}).get(file.file, {}).get("source")
        lines.append(("file", f"{file.file}, {sized(file.bytes)}, sha256 {file.sha256}"))
        lines += [("  from", " + ".join(uris)) for uris in file.sources]
        lines += [("  served by", str(served))] if served else []
    for key, value in lines:
        click.echo(f"{key:<13}{value}")
    if stale:
        click.echo(f"autovoice: warning: {stale}", err=True)


@models.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every model of the catalog.")
@click.option("--force", is_flag=True, help="Fetch again what is already here.")
@registry_options
def pull(names: tuple[str, ...], everything: bool, force: bool, **where: Any) -> None:
    """Fetch and verify NAMES.

    \b
    autovoice models pull content_whisper hifigan_universal
    autovoice models pull --all
    """
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
    failures: list[AutoVoiceError] = []
    for version in wanted:
        try:
            registry.pull(version.name, version.version, force=force)
        except ModelError as error:
            failures.append(error)
            if len(wanted) > 1:  # The end tells why.
                click.echo(f"{version.key}: failed", err=True)
        else:
            click.echo(f"{version.key}: {_whereabouts(registry, version)}")
    _raise_problems(failures, "had")


def _raise_problems(problems: Sequence[AutoVoiceError], done: str) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        told = " ".join(str(error) for error in problems)
        raise ModelError(f"{len(problems)} models could not be {done}: {told}")


@models.command()
@click.argument("name")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--kind", help="What it does, e.g. vocoder; an ONNX file needs no architecture then.")
@click.option("--architecture", help="What the files are weights of, e.g. hifigan.")
@click.option("--licence", help="Under which they may be used, e.g. MIT.")
@click.option("--description", help="One line for the list.")
@click.option(
    "--param", "params", multiple=True, metavar="KEY=VALUE", help="Read by the architecture."
)
@click.option("--in-place", is_flag=True, help="Use the files where they lie, without a copy.")
@registry_options
def add(
    name: str,
    sources: tuple[str, ...],
    kind: str | None,
    architecture: str | None,
    licence: str | None,
    description: str | None,
    params: tuple[str, ...],
    in_place: bool,
    **where: Any,
) -> None:
    """Take a model of your own into the model folder as NAME[@VERSION], version 1.0 if not given.

    SOURCE is a file, an address (https://, hf://, pypi://) or, for HuBERT, a folder of
    transformers. Its files are hashed and tried once, and described in the catalog of the model
    folder. In hf://owner/repo@revision/file a branch or tag is pinned to its commit.
    hf://owner/repo[@revision] alone brings the models that `autovoice models push` put there.

    \b
    autovoice models add hf://owner/repo@v1.0
    autovoice models add my_vocoder generator.pth --architecture hifigan --licence MIT
    autovoice models add other_vocoder vocoder.onnx --kind vocoder --licence MIT
    autovoice models add hubert_base@mine hubert/ --architecture hubert --licence MIT --in-place
    """
    from auto_voice.models.additions import Addition

    if name.startswith("hf://"):
        if sources or kind or architecture or licence or description or params or in_place:
            raise ConfigError(f"{name} says itself what it holds; give nothing else with it")
        _add_repository(name, where)
        return
    if not sources or not licence:
        raise ConfigError("give the files of the model and --licence")
    registry = open_registry(**where)
    if any(source.startswith("hf://") for source in sources):
        from auto_voice.models.registry.hub import pinned

        transfer, offline = registry.loader.downloader.context.transfer, registry.settings.offline
        sources = tuple(pinned(source, transfer, offline=offline) for source in sources)
    given = Addition(
        name, sources, licence, kind or "", architecture or "", description or "",
        dict(map(_param, params)), in_place,
    )  # fmt: skip
    version = registry.add(given)
    click.echo(f"{version.key}: {_whereabouts(registry, version)}")


def _add_repository(address: str, where: dict[str, Any]) -> None:
    from auto_voice.models.registry.hub import Repository, add_repository

    registry = open_registry(**where)
    added = add_repository(
        registry.model_dir,
        registry.catalog,
        Repository.of(address),
        registry.loader.downloader.context.transfer,
        offline=registry.settings.offline,
    )
    registry = open_registry(**where)
    for version in added:
        registry.pull(version.name, version.version)
        click.echo(f"{version.key}: {_whereabouts(registry, version)}")


@models.command()
@click.argument("name")
@click.argument("address", metavar="hf://OWNER/REPO")
@click.option(
    "--card",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Markdown on its data and figures, for the model card [default: card.md beside the "
    "weights, as `autovoice train` writes it].",
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded, and connect to nobody.")
@registry_options
def push(
    name: str, address: str, card: Path | None, private: bool, dry_run: bool, **where: Any
) -> None:
    """Publish NAME[@VERSION] as a repository of the Hugging Face Hub.

    It gets the weights as safetensors or ONNX, a catalog entry and a model card, in one commit.
    Versions that are there already stay. Others take it with `autovoice models add`.

    \b
    autovoice models push my_vocoder hf://me/my-vocoder --card card.md --dry-run
    """
    from auto_voice.models.registry.architectures import with_safetensors
    from auto_voice.models.registry.hub import Repository, prepare, publish

    registry = open_registry(**where)
    repository = Repository.of(address)
    if repository.revision != "main":
        raise ConfigError("a model is published on the branch main; leave @REVISION out")
    version = registry.version(name)
    files = with_safetensors(version, registry.pull(version.name, version.version), registry.store)
    entry = registry.catalog.entry(version.name)
    made = prepare(entry, version, files, repository.repo, _about(version, card))
    if dry_run:
        for place, path in made.files.items():
            click.echo(f"{place}  {sized(path.stat().st_size)}  from {path}")
        click.echo(f"\nautovoice.yaml\n{made.catalog}\nREADME.md\n{made.card}")
        click.echo("nothing was uploaded", err=True)
        return
    if registry.settings.offline:
        raise ConfigError("the network is switched off; nothing can be published")
    commit = publish(made, private=private)
    click.echo(f"{version.key}: {address} at commit {commit}")


def _about(version: ModelVersion, card: Path | None) -> str:
    """What a model card says of data and figures; "" if nothing is known."""
    places = [card] if card is not None else []
    if card is None:
        uris = (uri for file in version.files for uris in file.sources for uri in uris)
        places = [Path(uri).parent / "card.md" for uri in uris if "://" not in uri]
    for place in places:
        try:
            return place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if card is not None:
                raise ConfigError(f"the card {card} cannot be read ({error})") from error
    return ""


def _param(text: str) -> tuple[str, Any]:
    import yaml

    key, sign, value = text.partition("=")
    if not (key and sign):
        raise ConfigError(f"--param {text} is no KEY=VALUE")
    return key, yaml.safe_load(value)


@models.command()
@click.argument("names", nargs=-1)
@as_json_option
@registry_options
def verify(names: tuple[str, ...], as_json: bool, **where: Any) -> int:
    """Hash every byte of NAMES (default: all that is installed); exits with 2 on damage.

    \b
    autovoice models verify
    autovoice models verify hifigan_universal --json
    """
    from auto_voice.models.registry.maintenance import verify as verify_version

    registry = open_registry(**where)
    versions = chosen(registry, names)
    reports = [verify_version(registry.store, version) for version in versions if version.files]
    if as_json:
        print_json([{**asdict(report), "ok": report.ok} for report in reports])
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
    """Verify NAMES (default: all that is installed) and fetch again what is damaged.

    \b
    autovoice models repair
    """
    from auto_voice.models.registry.maintenance import verify

    registry = open_registry(**where)
    wanted = [version for version in chosen(registry, names) if version.files]
    failures: list[AutoVoiceError] = []
    for version in wanted:
        try:
            # What is whole needs no lock, which the folder of another user does not give.
            if not verify(registry.store, version).ok:
                registry.loader.repair(version)
        except ModelError as error:
            failures.append(error)
            if len(wanted) > 1:  # The end tells why.
                click.echo(f"{version.key}: failed", err=True)
        else:
            click.echo(f"{version.key}: ok")
    _raise_problems(failures, "repaired")


@models.command()
@click.argument("names", nargs=-1, required=True)
@registry_options
def remove(names: tuple[str, ...], **where: Any) -> None:
    """Delete NAMES from the model folder.

    \b
    autovoice models remove hubert_base
    """
    from auto_voice.models.registry import maintenance as store_maintenance
    from auto_voice.models.registry.catalog_schema import shrink_folder_catalog

    registry = open_registry(**where)
    for name, version in [name_and_version(registry, name) for name in names]:
        freed = store_maintenance.remove(registry.store, name, version)
        known = registry.catalog.models.get(name)
        made = known.versions.get(version) if known is not None else None
        if made is not None and made.quantised is not None and not registry.is_obtainable(made):
            shrink_folder_catalog(registry.model_dir, name, version)
        click.echo(f"{name}@{version}: removed, {sized(freed)}")
        if registry.pins.records().get(name, {}).get("version") == version:
            click.echo(
                f"autovoice: warning: {name} is pinned to this version and fetches it again when "
                f"it is used; run `autovoice models pin --remove {name}` to let it mean the "
                "default version.",
                err=True,
            )


@models.command()
@click.option("--older-than", "days", type=click.FloatRange(min=0), default=7.0, show_default=True)
@registry_options
def prune(days: float, **where: Any) -> None:
    """Delete broken-off transfers and set-aside files older than so many days.

    \b
    autovoice models prune --older-than 30
    """
    from auto_voice.models.registry import maintenance as store_maintenance

    if math.isnan(days):
        raise click.BadParameter("nan is no number of days", param_hint="--older-than")
    report = store_maintenance.prune(open_registry(**where).store, days * 86400)
    for path in report.removed:
        click.echo(str(path))
    click.echo(f"{len(report.removed)} removed, {sized(report.freed_bytes)}")


@models.command()
@click.argument("names", nargs=-1)
@click.option("--remove", "unpin", is_flag=True, help="Let NAMES follow the catalog again.")
@as_json_option
@registry_options
def pin(names: tuple[str, ...], unpin: bool, as_json: bool, **where: Any) -> None:
    """Make bare names mean a version: NAME@VERSION, or NAME for what it means now.

    Without NAMES the pins are listed. They stand in models.lock.json in the model folder.

    \b
    autovoice models pin converter_compact@2.0
    autovoice models pin --remove converter_compact
    """
    registry = open_registry(**where)
    pinned = registry.pins.records()
    for given in names:
        name, _, number = given.partition("@")
        if not unpin:
            registry.catalog.version(given)  # All are known before the first is written.
        elif name not in pinned or number not in ("", pinned[name]["version"]):
            raise ConfigError(f"{given} is not pinned; see: autovoice models pin")
    for given in names:
        if unpin:
            registry.unpin(given.partition("@")[0])
        else:
            registry.pin(given)
    pins = {name: record["version"] for name, record in registry.pins.records().items()}
    if as_json:
        print_json(pins)
        return
    for name, number in pins.items():
        click.echo(f"{name}@{number}")
        if problem := registry.pins.problem(registry.catalog, name):
            click.echo(f"autovoice: warning: {problem}", err=True)


@models.command()
@click.argument("names", nargs=-1)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The archive to write."
)
@registry_options
def export(names: tuple[str, ...], output: Path, **where: Any) -> None:
    """Pack NAMES (default: all that is installed) for a machine without a network.

    What the catalog says of them and their pins go along. What is damaged is left out.

    \b
    autovoice models export -o models.tar
    """
    from auto_voice.models.registry.archive import export_versions

    registry = open_registry(**where)
    versions = [version for version in chosen(registry, names) if version.files]
    if not versions:
        raise ConfigError("nothing is installed that could be exported; run: autovoice models pull")
    report = export_versions(
        registry.store,
        versions,
        output,
        entries=registry.catalog.models,
        pins=registry.pins.records(),
    )
    click.echo(f"{output}: {', '.join(version.key for version in report.versions)}")
    _raise_problems(report.problems, "exported")


@models.command("import")
@click.argument("archive", type=click.Path(path_type=Path))
@registry_options
def import_(archive: Path, **where: Any) -> None:
    """Install the models of an archive that export made; hashes must be the catalog's.

    Models that only the archive describes are added to the catalog of the model folder. Its pins
    hold here, too, where none stands yet.

    \b
    autovoice models import models.tar
    """
    from auto_voice.models.registry.archive import import_archive

    registry = open_registry(**where)
    report = import_archive(registry.store, archive, registry.catalog.version)
    registry = open_registry(**where)  # Its catalog may know more now.
    for name, number in (report.pins or {}).items():
        if name not in registry.pins.records():
            registry.pin(name, number)
            click.echo(f"{name}@{number}: pinned")
    for version in report.versions:
        added = ", new in the catalog of this folder" if version in report.new else ""
        click.echo(f"{version.key}: {_whereabouts(registry, version)}{added}")
    _raise_problems(report.problems, "imported")


@models.command()
@click.argument("name")
@click.option("--file", help="One of its files; by default the first.")
@registry_options
def path(name: str, file: str | None, **where: Any) -> None:
    """Print where a file of NAME lies, fetching it if need be.

    \b
    autovoice models path hifigan_universal
    """
    click.echo(str(open_registry(**where).path(name, file=file)))


@models.command()
@as_json_option
@registry_options
def status(as_json: bool, **where: Any) -> None:
    """The model folder: what is in it, what broke off, how much room is left.

    \b
    autovoice models status
    """
    from auto_voice.filesystem import free_bytes
    from auto_voice.models.registry.maintenance import partials

    registry = open_registry(**where)
    root = registry.model_dir
    installed = [f"{name}@{version}" for name, version in registry.store.installed()]
    facts: dict[str, Any] = {
        "model_dir": str(root),
        "installed": installed,
        "used_bytes": sum(p.stat().st_size for p in root.rglob("*") if p.is_file()),
        "free_bytes": free_bytes(root),
        "partials": [asdict(info) for info in partials(registry.store)],
        "pins": {name: record["version"] for name, record in registry.pins.records().items()},
        "offline": registry.settings.offline,
        "catalogs": [str(file) for file in registry.catalog.files],
    }
    if as_json:
        print_json(facts)
        return
    click.echo(f"model_dir  {root}")
    click.echo(f"installed  {', '.join(installed) or 'nothing'}")
    click.echo(f"used       {sized(facts['used_bytes'])}, {sized(facts['free_bytes'])} free")
    for info in facts["partials"]:
        click.echo(f"broken off {_broken_off(registry, info)}")
    for name, number in facts["pins"].items():
        click.echo(f"pinned     {name}@{number}")
    click.echo(f"catalogs   {', '.join(facts['catalogs'])}")


@models.command()
@as_json_option
@registry_options
def stats(as_json: bool, **where: Any) -> None:
    """What was used when, and how long loads and downloads took; from a record in the model folder.

    It is short (about 1500 loads) and never leaves this machine.

    \b
    autovoice models stats
    """
    from datetime import datetime

    from auto_voice.models.registry.maintenance import usage

    found = usage(open_registry(**where).store)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        click.echo("nothing was used yet")
        return
    table = [("MODEL", "LAST USED", "LOADS", "LAST LOAD", "LONGEST", "DEVICE", "FETCHED", "IN")]
    for one in found:
        size, took = sized(one.fetched_bytes), f"{one.fetch_s:.1f} s"
        fetched = (size, took) if one.fetched_bytes else ("-", "-")
        load, longest = (_seconds(s) for s in (one.load_s, one.longest_load_s))
        last = datetime.fromtimestamp(one.last).strftime("%Y-%m-%d %H:%M")
        about = (one.model, last, str(one.loads), load, longest, one.device or "-")
        table.append(about + fetched)
    print_table(table)


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"


def _broken_off(registry: ModelRegistry, info: dict[str, Any]) -> str:
    """How far an interrupted transfer came, of what, and from where."""
    sizes = {
        file.sha256: (f"{file.file} of {version.key}, ", file.bytes)
        for version in registry.catalog.versions()
        for file in version.files
    }
    what, total = sizes.get(info["sha256"], ("", info["total"]))
    of = f" of {sized(total)}" if total >= 0 else ", size unknown"
    return f"{what}{sized(info['bytes'])}{of}{', ' if info['url'] else ''}{info['url']}"


def _whereabouts(registry: ModelRegistry, version: ModelVersion) -> str:
    if not version.files:
        return "needs no files"
    return str(registry.path(version.name, version.version).parent)
