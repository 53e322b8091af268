"""The edge where exceptions become one line on stderr and an exit code.

0    done
1    a defect of auto_voice: one line and how to see the traceback
2    something the user can change: an AutoVoiceError or a wrong option
130  Ctrl-C
141  whoever read our output has stopped reading (as the shell reports SIGPIPE)
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from auto_voice.errors import AutoVoiceError

DEFECT, USER, INTERRUPTED, NO_READER = 1, 2, 130, 141

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
        # Python would complain again when it flushes stdout on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except MemoryError:
        return _report("the memory is full; close other programs and try again", USER, debug)
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "" if debug else " (run `autovoice --debug …` for the traceback and report it)"
        return _report(text + hint, DEFECT, debug)


def _report(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = " ".join(text.split())
    click.echo(f"autovoice: error: {line}", err=True)
    return code
