"""How several commands are called and show sizes, tables, JSON and progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from auto_voice.progress import Progress, ProgressCallback, told_to

# Stages that take long enough to be shown, and how a person calls them.
_SHOWN = {
    "download": "fetching {}",
    "fine-tune": "fine-tuning the converter to the voice",
    "convert": "converting",
    "pairs": "converting pairs",
    "judge": "judging {}",
    "speak": "speaking sentences",
    "quantise": "measuring the ranges of int8",
}


config_option = click.option(
    "--config", type=click.Path(path_type=Path), help="YAML of settings and models."
)


class DefaultGroup(click.Group):
    """A group whose command may be left out: ``evaluate PATH`` means ``evaluate files PATH``.

    Args:
        default: name of the command that is meant then.
    """

    def __init__(self, *args: Any, default: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def sized(count: int) -> str:
    """Bytes as people say them; negative where it is not known."""
    if count < 0:
        return "unknown"
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


@contextmanager
def shown_progress(hidden: bool, without: Sequence[str] = ()) -> Iterator[ProgressCallback | None]:
    """Everything that is done inside is shown on stderr as :class:`ProgressDisplay` says.

    Args:
        hidden: show nothing.
        without: stages that others contain, and that are not shown.
    """
    show = None if hidden else ProgressDisplay(without)
    with told_to(show):
        yield show


class ProgressDisplay:
    """Shows the progress of every stage on stderr: a bar where a person watches.

    Elsewhere it says once that a voice is being fine-tuned, because that wait is not expected.
    """

    def __init__(self, without: Sequence[str] = ()) -> None:
        self._labels = {stage: label for stage, label in _SHOWN.items() if stage not in without}
        self._watched = sys.stderr is not None and sys.stderr.isatty()
        self._stage: tuple[str, str] | None = None
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self._labels:
            return
        stage = (progress.stage, progress.item)
        if stage != self._stage:
            self._close()
            self._stage = stage
            self._open(progress)
        if self._bar is not None:
            self._bar.update(round(progress.done) - self._bar.n)
        if progress.total and progress.done >= progress.total:
            self._close()

    def _open(self, progress: Progress) -> None:
        label = self._labels[progress.stage].format(progress.item)
        if not self._watched:
            if progress.stage == "fine-tune":
                click.echo(f"{label}: some seconds, once", err=True)
            return
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # Its thread is of no use here, and decoders are quiet without.
        bytes_ = progress.stage == "download"
        shape = (
            {"unit": "B", "unit_scale": True}
            if bytes_
            else {"bar_format": "{l_bar}{bar}| {remaining} left"}
        )
        self._bar = tqdm(desc=label, total=progress.total or None, leave=bytes_, **shape)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, None
