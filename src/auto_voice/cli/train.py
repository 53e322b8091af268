"""``autovoice train``: a recipe and speech to published models."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--data", "sources", type=click.Path(path_type=Path), multiple=True, required=True,
    help="Folder with one subfolder per speaker, or a CSV with path,speaker[,corpus]; repeatable.",
)  # fmt: skip
@click.option("--name", help="Version that the result becomes; default: the recipe's name.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: runs/<name>.")
@click.option("--from", "start", metavar="NAME@VERSION", help="Converter to start from.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--workers", type=click.IntRange(1), help="Processes that compute features.")
@click.option("--model-dir", type=click.Path(path_type=Path), help="Folder of the models.")
def train(
    recipe: Path,
    sources: tuple[Path, ...],
    name: str | None,
    out: Path | None,
    start: str | None,
    device: str,
    workers: int | None,
    model_dir: Path | None,
) -> None:
    """Train the content encoder and the converter by RECIPE.

    Stops with Ctrl-C and goes on with the same command. Recordings that cannot be used are listed
    in failures.csv and left out.

    \b
    Example:
      autovoice train recipes/own-speech.yaml --data speech/ --out runs/mine
    """
    from dataclasses import replace

    from auto_voice.models import ModelRegistry
    from auto_voice.training.recipes import load_recipe
    from auto_voice.training.workflow import Workflow

    loaded = load_recipe(recipe)
    if name is not None:
        loaded = replace(loaded, name=name)
    if start:
        loaded = replace(loaded, converter=None, converter_from=start)
    folder = out or Path("runs") / loaded.name
    workflow = Workflow(
        loaded, sources, folder, ModelRegistry(model_dir), device=device, workers=workers,
        say=lambda line: click.echo(line, err=True),
    )  # fmt: skip
    outcome = workflow.run()
    for name, value in sorted(outcome.figures.items()):
        click.echo(f"{name:32} {value:.4g}")
    click.echo(f"Published: {outcome.catalog}")
    click.echo(
        f"Use it: AUTOVOICE_CONFIG={outcome.catalog} autovoice convert SOURCE --voice REFERENCE "
        f"--converter converter_compact@{loaded.name}"
    )
