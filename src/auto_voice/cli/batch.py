"""``autovoice batch``: many recordings at once."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import (
    REGISTRY_NAMES,
    control_options,
    control_values,
    executor_options,
    model_options,
    output_options,
    plain,
    ray_executor,
    truncation_option,
)
from auto_voice.filesystem import shown_url

if TYPE_CHECKING:
    from auto_voice.batch.executors import WorkerSpec
    from auto_voice.batch.jobs import BatchJob
    from auto_voice.batch.manifest import JobOutcome

# Exit code; the same as for other things that the user can change, such as a bad recording.
NOT_ALL_DONE = 2


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option(
    "--voice",
    "voices",
    multiple=True,
    metavar="VOICE",
    help="A stored voice, a voice file or a recording; rows of a table may name their own.",
)
@click.option(
    "-o",
    "--output",
    "folder",
    default="converted",
    metavar="FOLDER",
    show_default=True,
    help="Folder for the results and the manifest; made if it does not exist.",
)
@click.option(
    "--manifest",
    "account",
    type=click.Path(path_type=Path),
    help="The manifest [default: manifest.jsonl in the output folder].",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.option("--overwrite", is_flag=True, help="Do again what is done; replace what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per file.")
@click.option("-q", "--quiet", is_flag=True, help="Print failures and the summary alone.")
@executor_options("one per two cores, and at least one per device")
@output_options
@truncation_option
@control_options
@model_options
def batch(
    inputs: tuple[str, ...],
    voices: tuple[str, ...],
    folder: str,
    account: Path | None,
    executor: str,
    address: str | None,
    workers: int | None,
    resources: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    format_: str | None,
    subtype: str | None,
    rate: int | None,
    mock: bool,
    **options: Any,
) -> int:
    """Convert many recordings: files, folders, glob patterns, CSV or JSONL tables.

    The shape of a folder is kept. A table has a column source and may have voice, output and any
    option. manifest.jsonl in the output folder says what came of each file; the same command goes
    on where a stopped one was. Files that cannot be converted are reported and left out. Exits
    with 2 if there were any.

    \b
    autovoice batch lectures/ --voice ann -o out/
    autovoice batch 'talks/*.mp3' more.wav --voice ann.wav -o out/ --format flac --workers 4
    autovoice batch jobs.csv -o out/ --dry-run
    autovoice batch s3://talks/2026/ --voice ann -o s3://talks/ann/ --manifest ann.jsonl
    autovoice batch jobs.csv -o out/ --executor ray --address ray://head:10001 --resources gpu=0.5
    """
    from auto_voice.batch.executors import Executor, InlineExecutor, ProcessExecutor, is_url
    from auto_voice.batch.jobs import Defaults, collect, stored_or_file
    from auto_voice.batch.manifest import MANIFEST, Manifest, run_batch
    from auto_voice.errors import ConfigError
    from auto_voice.inference.result import OutputSpec

    values = control_values(options)
    defaults = Defaults(
        voice=tuple(stored_or_file(voice) for voice in voices),
        output=OutputSpec(folder, format_, subtype, rate, allow_mock=mock),
        controls=values.account(),
    )
    if account is None and is_url(folder):
        raise ConfigError(
            f"{shown_url(folder)} cannot hold the manifest; name a file here with --manifest."
        )
    account = account or Path(folder, MANIFEST)
    jobs = collect(inputs, defaults)
    _check_formats(jobs, account)
    if dry_run:
        _show(jobs, as_json)
        return 0
    runs: Executor | None = ray_executor(executor, address, workers, resources)
    spec = _spec(mock, workers, options, here=runs is None)
    if runs is None:
        runs = InlineExecutor() if workers == 1 else ProcessExecutor(len(spec.places))
    started = time.perf_counter()
    counts = {"done": 0, "skipped": 0, "failed": 0, "lost": 0}
    seconds = 0.0
    with Manifest(account) as manifest:
        outcomes = run_batch(jobs, runs, spec, manifest, overwrite=overwrite)
        for number, outcome in enumerate(outcomes, 1):
            counts[outcome.status] += 1
            seconds += outcome.seconds
            tried = number - counts["skipped"]
            left = (len(jobs) - number) * (time.perf_counter() - started) / tried if tried else 0.0
            _report(outcome, f"{number}/{len(jobs)}", left, as_json, quiet)
    took = time.perf_counter() - started
    failed = counts["failed"] + counts["lost"]
    summary = {
        **counts, "audio_seconds": round(seconds, 1), "seconds": round(took, 1),
        "audio_seconds_per_second": round(seconds / took, 2), "manifest": str(account),
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(
            f"{counts['done']} done, {counts['skipped']} done before, {failed} failed: "
            f"{seconds:.0f} s of audio in {took:.0f} s ({seconds / took:.2f} s per second); "
            f"see {account}"
        )
    return NOT_ALL_DONE if failed else 0


def _spec(
    mock: bool, workers: int | None, options: dict[str, Any], here: bool = True
) -> WorkerSpec:
    """How each worker makes its pipeline: the options as JSON values, and, of processes ``here``,
    its share of devices."""
    from auto_voice.batch.executors import WorkerSpec, cores
    from auto_voice.cli.options import open_registry
    from auto_voice.inference.voice_conversion_pipeline import PipelineConfig
    from auto_voice.models.runtime.devices import parse_devices, plan_workers

    registry = {n: plain(options[n]) for n in REGISTRY_NAMES if options.get(n) is not None}
    chosen = (
        "content_encoder", "converter", "vocoder", "fine_tune", "fine_tune_steps",
        "allow_truncated",
    )  # fmt: skip
    models = {n: options[n] for n in chosen if options.get(n) is not None}
    made = WorkerSpec(
        "auto_voice.batch.manifest:worker",
        {"mock": mock, "registry": registry, "pipeline": models},
        reads=("source",), shared=("voice", "config"), writes=("output",),
    )  # fmt: skip
    if not here:
        return made
    opened = open_registry(**{n: options.get(n) for n in REGISTRY_NAMES})
    device, config = opened.settings.device, PipelineConfig(**models)
    usual = max(cores() // 2, len(parse_devices(device).general))
    devices = plan_workers(
        device, lambda: [opened.version(name) for name in config.models.values()], workers or usual
    )
    places = tuple({"registry": {**registry, "device": device}} for device in devices)
    return replace(made, places=places)


def duration(seconds: float) -> str:
    """How long something takes, as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _check_formats(jobs: list[BatchJob], manifest: Path) -> None:
    """A format that cannot be is the user's slip: better said before the first file than after."""
    from auto_voice.audio.io import choose_encoding
    from auto_voice.errors import ConfigError

    for job in jobs:
        if Path(job.target).name == manifest.name:
            raise ConfigError(
                f"{shown_url(job.target)} is the name of the manifest; choose another output."
            )
    for suffix, format_, subtype in {
        (Path(job.target).suffix, job.output.format, job.output.subtype) for job in jobs
    }:
        choose_encoding(Path(f"x{suffix}"), format_, subtype)


def _show(jobs: list[BatchJob], as_json: bool) -> None:
    from auto_voice.batch.executors import files_in, with_files

    for job in jobs:
        if as_json:
            names = ("source", "output", "voice")
            urls = {name: shown_url(name) for name in files_in(job.record(), names)}
            click.echo(json.dumps(with_files(job.record(), names, urls)))
            continue
        extra = "".join(f" {k}={v}" for k, v in job.controls.items())
        voices = "|".join(map(shown_url, job.voice))
        source, target = shown_url(job.source), shown_url(job.target)
        click.echo(f"{source} -> {target}  voice={voices}{extra}")
    click.echo(f"{len(jobs)} files; nothing was converted", err=True)


def _report(outcome: JobOutcome, place: str, left: float, as_json: bool, quiet: bool) -> None:
    """One line for a job; ``left`` are the seconds that the others will take."""
    source, target = shown_url(outcome.job.source), shown_url(outcome.job.target)
    if as_json:
        line = {"source": source, "output": target, "status": outcome.status}
        click.echo(json.dumps(line | ({"error": outcome.error} if outcome.error else {})))
    elif outcome.error:
        click.echo(f"autovoice: {place} {source}: {outcome.error}", err=True)
    elif not quiet:
        ends = f"  ({duration(left)} left)" if left else ""
        click.echo(f"{place} {outcome.status:<8} {target}{ends}")
    sys.stdout.flush()
