"""The edge where exceptions become one line on stderr and an exit code.

0    done
1    a defect of auto_voice: one line and how to see the traceback
2    something the user can change: an AutoVoiceError or a wrong option
130  Ctrl-C
141  whoever read our output has stopped reading (as the shell reports SIGPIPE)
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from auto_voice.errors import AutoVoiceError

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
