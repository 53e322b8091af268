"""``autovoice``: the group, whose commands are imported only when they run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import click

from auto_voice import __version__, events
from auto_voice.cli.errors import open_standard_streams, run_guarded
from auto_voice.errors import ConfigError
from auto_voice.settings import get_settings

# Command to where it lives and what ``--help`` says of it.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "convert": ("auto_voice.cli.convert:convert", "Re-speak a recording in another voice."),
    "batch": ("auto_voice.cli.batch:batch", "Convert many recordings, resumably."),
    "voices": ("auto_voice.cli.voices:voices", "Keep voices: add, list, blend, compare."),
    "inspect": ("auto_voice.cli.inspect:inspect", "Say what is in a recording."),
    "clone": ("auto_voice.cli.convert:clone", "Save the voice of recordings as one file."),
    "demo": ("auto_voice.cli.convert:demo", "Convert a sample recording and show what happened."),
    "evaluate": ("auto_voice.cli.evaluate:evaluate", "Measure how good conversions are."),
    "compare": ("auto_voice.cli.judging:compare", "Compare systems on the same pairs."),
    "train": ("auto_voice.cli.train:train", "Train models by a recipe and publish them."),
    "serve": ("auto_voice.cli.serve:serve", "Answer an HTTP API and show a web page."),
    "models": ("auto_voice.cli.models:models", "List, fetch, verify and manage models."),
    "config": ("auto_voice.cli.doctor:config", "Show the settings and where each comes from."),
    "completion": ("auto_voice.cli.main:completion", "Complete commands in the shell."),
    "doctor": ("auto_voice.cli.doctor:doctor", "Check that everything needed is in place."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            raise click.UsageError(
                f"there is no option {name} before the command; options of a command stand behind "
                f"it: autovoice COMMAND {name}",
                ctx,
            ) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if args and not name.startswith("-") and name not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise click.UsageError(f"there is no command {name!r}; the commands are {known}.", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="autovoice", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks and everything that is logged.")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done to stderr.")
@click.option(
    "--otlp",
    metavar="URL",
    help="Send traces and metrics to this OpenTelemetry collector; none are sent otherwise.",
)
def cli(debug: bool, verbose: bool, otlp: str | None) -> None:
    """Clone a voice from a few seconds of speech and re-speak any recording in it.

    \b
    autovoice convert talk.wav --voice friend.wav -o talk_as_friend.wav
    autovoice clone friend1.wav friend2.wav -o friend.safetensors
    autovoice models list
    """
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    handler = _EchoHandler()
    handler.setFormatter(logging.Formatter("autovoice: %(levelname)s: %(message)s"))
    logger = logging.getLogger("auto_voice")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    _begin_telemetry(otlp)


def _begin_telemetry(otlp: str | None) -> None:
    """Export where that is asked for, as part of the trace that TRACEPARENT names."""
    try:
        settings = get_settings(otlp_endpoint=otlp)
    except ConfigError:
        if otlp:
            raise
        return  # The command itself says what is wrong.
    if settings.otlp_endpoint and settings.offline:
        logging.getLogger("auto_voice").warning("no telemetry is sent: the network is switched off")
    elif settings.otlp_endpoint:
        events.export_otlp(settings.otlp_endpoint)
    if header := os.environ.get("TRACEPARENT"):
        click.get_current_context().with_resource(events.continued(header))


# Shell to the file where its completion goes, and the line to put there.
SHELLS = {
    "bash": ("~/.bashrc", 'eval "$(autovoice completion bash)"'),
    "zsh": ("~/.zshrc", 'eval "$(autovoice completion zsh)"'),
    "fish": ("~/.config/fish/completions/autovoice.fish", "autovoice completion fish | source"),
}
# The variable by which a shell asks for completions.
COMPLETE_VARIABLE = "_AUTOVOICE_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.option("--how", is_flag=True, help="Say which line to put where.")
def completion(shell: str, how: bool) -> None:
    """Print the script that completes autovoice in SHELL.

    \b
    autovoice completion bash --how
    eval "$(autovoice completion bash)"
    """
    if how:
        file, line = SHELLS[shell]
        click.echo(f"add this line to {file} and open a new shell:\n{line}")
        return
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "autovoice", COMPLETE_VARIABLE).source())


class _EchoHandler(logging.Handler):
    """Lines to whatever stderr is when they are written."""

    def emit(self, record: logging.LogRecord) -> None:
        record.levelname = record.levelname.lower()
        click.echo(self.format(record), err=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run ``autovoice`` with ``args`` (the process's own if None) and return its exit code."""
    if args is None:
        open_standard_streams()
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    return run_guarded(
        lambda: cli.main(given, prog_name="autovoice", standalone_mode=False), debug=debug
    )
