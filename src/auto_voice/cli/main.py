"""``autovoice``: the group, whose commands are imported only when they run, and its edge, where
exceptions become one line on stderr and an exit code.

0    done
1    a defect of auto_voice: one line and how to see the traceback
2    something the user can change: an AutoVoiceError or a wrong option
130  Ctrl-C
141  whoever read our output has stopped reading (as the shell reports SIGPIPE)
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import click

from auto_voice import __version__, events
from auto_voice.errors import AutoVoiceError, ConfigError
from auto_voice.settings import get_settings

# Command to where it lives and what ``--help`` says of it.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "convert": ("auto_voice.cli.convert:convert", "Re-speak a recording in another voice."),
    "live": ("auto_voice.cli.live:live", "Speak in another voice: microphone to loudspeaker."),
    "batch": ("auto_voice.cli.batch:batch", "Convert many recordings, resumably."),
    "voices": ("auto_voice.cli.voices:voices", "Keep voices: add, list, blend, compare."),
    "inspect": ("auto_voice.cli.voices:inspect", "Say what is in a recording."),
    "clone": ("auto_voice.cli.convert:clone", "Save the voice of recordings as one file."),
    "demo": ("auto_voice.cli.convert:demo", "Convert a sample recording and show what happened."),
    "evaluate": ("auto_voice.cli.evaluate:evaluate", "Measure how good conversions are."),
    "compare": ("auto_voice.cli.judging:compare", "Compare systems on the same pairs."),
    "train": ("auto_voice.cli.train:train", "Train models by a recipe and publish them."),
    "serve": ("auto_voice.cli.serve:serve", "Answer an HTTP API and show a web page."),
    "worker": ("auto_voice.cli.serve:worker", "Do the jobs of servers on other machines."),
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


# Exit codes; what they say stands at the top.
DEFECT, USER, INTERRUPTED, NO_READER = 1, 2, 130, 141

# What libraries say, in whatever exception, where the system gives them no more memory.
_NO_MEMORY = (
    "cannot allocate memory",
    "can't allocate memory",
    "failed to map segment",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "can't start new thread",
)

# A command group without a command: its message is its help. Older click prints that itself.
_ONLY_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def run_guarded(action: Callable[[], object], *, debug: bool) -> int:
    """The exit code of ``action``; what went wrong is said in one line."""
    try:
        outcome = action()
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except AutoVoiceError as error:
        return _report(str(error), USER, debug)
    except _ONLY_HELP as error:
        click.echo(error.format_message(), err=True)
        return USER
    except click.UsageError as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        return _report(error.format_message().rstrip(".") + hint, USER, debug)
    except click.ClickException as error:
        return _report(error.format_message(), USER, debug)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nautovoice: stopped", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return NO_READER
    except _StdoutError as error:
        _forget_stdout()
        if error.nobody_reads:
            return NO_READER
        return _report(f"standard output cannot be written ({error})", USER, debug)
    except Exception as error:
        if _is_memory(error):
            return _report("the memory is full; close other programs and try again", USER, debug)
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "" if debug else " (run `autovoice --debug …` for the traceback and report it)"
        return _report(text + hint, DEFECT, debug)


def _forget_stdout() -> None:
    """Lose what is left in the buffer of stdout: Python would complain when it flushes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_memory(error: BaseException | None) -> bool:
    """Whether the memory was full, however deep in a library."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if any(words in str(error).lower() for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


class _StdoutError(Exception):
    """Standard output cannot be written; no OSError, which click would turn into exit code 1."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.nobody_reads = isinstance(error, BrokenPipeError)


class _Stdout(io.FileIO):
    """Says by the type of the error that it was standard output and not another file."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            raise _StdoutError(error) from error


class _Stderr(io.FileIO):
    """A stream of remarks: where it cannot be written, they are lost and the work goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def open_standard_streams() -> None:
    """Make the standard streams of this process usable, however it was started.

    A stream that is closed is opened on nothing: otherwise the next file that is opened takes its
    number, and what is meant for the stream lands in that file. Standard error forgives a full
    disk, because remarks are no reason to stop.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The system gives it the lowest free number.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    for name, raw in (("stdout", _Stdout(1, "w", closefd=False)),
                      ("stderr", _Stderr(2, "w", closefd=False))):  # fmt: skip
        given = getattr(sys, name)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="utf-8" if given is None else given.encoding,
            errors="backslashreplace" if given is None else given.errors,
            line_buffering=name == "stderr" or raw.isatty(),
        )
        setattr(sys, name, stream)


def _report(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(text.split())
    click.echo(f"autovoice: error: {line}", err=True)
    return code
