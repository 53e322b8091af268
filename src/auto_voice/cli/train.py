"""``autovoice train``: a recipe and speech to published models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from auto_voice.cli.options import executor_options, open_registry, ray_executor, registry_options
from auto_voice.cli.showing import DefaultGroup


@click.group(cls=DefaultGroup, default="recipe")
def train() -> None:
    """Train models by a recipe, and make speech to train them on.

    \b
    autovoice train recipes/own-speech.yaml --data speech/ --out runs/mine
    autovoice train corpus sentences.txt --voices voices/ --out parallel/ --hours 10
    autovoice train back-translation speech.csv --out made/
    """


@train.command("recipe")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--data", "sources", type=click.Path(path_type=Path), multiple=True, required=True,
    help="Folder with one subfolder per speaker, or a CSV with path,speaker"
    "[,corpus,parallel,role]; repeatable.",
)  # fmt: skip
@click.option("--name", help="Version that the result becomes; default: the recipe's name.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/<name>.")
@click.option("--from", "start", metavar="NAME@VERSION", help="Converter to start from.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@executor_options("one per core", cores=1)
@registry_options
def recipe_(
    recipe: Path,
    sources: tuple[Path, ...],
    name: str | None,
    out: Path | None,
    start: str | None,
    device: str,
    executor: str,
    address: str | None,
    workers: int | None,
    resources: tuple[str, ...],
    **where: Any,
) -> None:
    """Train the content encoder and the converter, or a vocoder, by RECIPE.

    Features are computed by --workers here or on a Ray cluster (the mels of a vocoder by this
    process), and networks trained in this process. Stops with Ctrl-C and goes on with the same
    command. Recordings that cannot be used are listed in failures.csv and left out.

    \b
    Example:
      autovoice train recipes/own-speech.yaml --data speech/ --out runs/mine
    """
    from dataclasses import replace

    from auto_voice.errors import MissingDependencyError, install_hint

    try:
        from auto_voice.training.recipes import load_recipe
        from auto_voice.training.workflow import Workflow
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"Training needs {error.name}; run: {install_hint('train')}"
        ) from error

    loaded = load_recipe(recipe)
    if name is not None:
        loaded = replace(loaded, name=name)
    if start:
        loaded = replace(loaded, converter=None, converter_from=start)
    folder = out or Path("runs") / loaded.name
    elsewhere = ray_executor(executor, address, workers, resources, cores=1)
    given = {name: value for name, value in where.items() if value is not None}
    workflow = Workflow(
        loaded, sources, folder, open_registry(**where), device=device, workers=workers,
        executor=elsewhere, where=given,
        say=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    outcome = workflow.run()
    for name, value in sorted(outcome.figures.items()):
        click.echo(f"{name:32} {value:.4g}")
    click.echo(f"Published: {outcome.catalog}")
    made = {
        "content-encoder content_compact": loaded.content,
        "converter converter_compact": loaded.vocoder is None,
        "vocoder vocoder_compact": loaded.vocoder,
    }
    options = " ".join(f"--{option}@{loaded.name}" for option, new in made.items() if new)
    click.echo(
        f"Use it: AUTOVOICE_CONFIG={outcome.catalog} autovoice convert SOURCE --voice REFERENCE "
        f"{options}"
    )


@train.command("corpus")
@click.argument("sentences", type=click.Path(path_type=Path))
@click.option(
    "--voices", type=click.Path(path_type=Path), required=True,
    help="Folder of Kokoro's voices (*.bin), which the catalog does not hold.",
)  # fmt: skip
@click.option(
    "--synthesiser", metavar="MODEL", default="kokoro", show_default=True, help="NAME[@VERSION].",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option("--hours", type=click.FloatRange(0), default=10.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=11, show_default=True)
@executor_options("1", cores=1)
@click.option("-q", "--quiet", is_flag=True, help="Draw no progress.")
@registry_options
def corpus(
    sentences: Path,
    voices: Path,
    synthesiser: str,
    out: Path,
    hours: float,
    seed: int,
    executor: str,
    address: str | None,
    workers: int | None,
    resources: tuple[str, ...],
    quiet: bool,
    **where: Any,
) -> None:
    """Speak SENTENCES (a text file, one a line) in many timbres, aligned frame by frame.

    Each sentence is said in six timbres with the same timing and melody. The folder gets a
    manifest for each sentence and speech.csv, which --data of a training reads. It is the same
    whatever the number of workers, and goes on where it stopped. Needs espeak-ng wherever they are.

    \b
    autovoice train corpus sentences.txt --voices voices/ --out parallel/ --hours 10
    """
    from auto_voice.cli.showing import shown_progress
    from auto_voice.progress import tell
    from auto_voice.training.speech_synthesis import make, sources_of

    sources = sources_of(open_registry(**where), synthesiser, voices, sentences)

    def told(done: int, total: int) -> None:
        tell("speak", done, total)

    with shown_progress(hidden=quiet):
        recordings, made = make(
            sources, out, hours, seed=seed, workers=workers or 1, progress=told,
            executor=ray_executor(executor, address, workers, resources, cores=1),
        )  # fmt: skip
    click.echo(f"{recordings} recordings, {made:.2f} h: {out / 'speech.csv'}")


@train.command("back-translation")
@click.argument(
    "sources", metavar="DATA...", type=click.Path(path_type=Path), nargs=-1, required=True
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option(
    "--per-speaker", type=click.IntRange(1), default=2, show_default=True,
    help="Recordings of each speaker that are converted.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=9, show_default=True)
def back_translation(sources: tuple[Path, ...], out: Path, per_speaker: int, seed: int) -> None:
    """Choose recordings of DATA to be said in other voices, for crops that are back_translated.

    DATA are folders with one subfolder per speaker and CSV lists, as --data of a training. Writes
    jobs.csv, which autovoice batch converts, and speech.csv, which lists DATA and what is made of
    it for --data of a training.

    \b
    autovoice train back-translation speech.csv --out made/
    autovoice batch made/jobs.csv -o made/ --prefer fastest --workers 2
    autovoice train recipe.yaml --data made/speech.csv
    """
    from auto_voice.training.back_translation import plan
    from auto_voice.training.data import scan

    count, table, speech = plan(scan(sources), out, per_speaker, seed)
    click.echo(f"{count} conversions to make: autovoice batch {table} -o {out} --prefer fastest")
    click.echo(f"Then train with: --data {speech}")
