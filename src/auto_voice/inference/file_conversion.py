"""From file to file: hours in the memory of half a minute, and resumable.

A long source and its result lie on disk in a checkpoint beside the output, a short one in memory;
the way through the stages is the same. The output itself appears only when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from auto_voice.errors import AudioOutputError, AutoVoiceError
from auto_voice.inference.checkpoint import Checkpoint, Workspace, fingerprint
from auto_voice.inference.conversion import ConversionSetup, run
from auto_voice.inference.result import FileResult, Output

# Seconds; longer recordings go through the disk.
LONG_SECONDS = 300.0


def convert_into(conversion: ConversionSetup, output: Output) -> FileResult:
    """Write the result of ``conversion`` to ``output``.

    Raises:
        AutoVoiceError: the source cannot be used, or another process is at work on the same
            output, or there is too little room on the disk.
    """
    with _disk_errors(output.path), _workspace(conversion, output.path) as workspace:
        resumed = workspace.position is not None
        rendered = run(conversion, workspace)
        rate = rendered.samples.sample_rate
        notes = output.write(rendered.blocks(), rate)
        workspace.finish()
    account = rendered.account
    account["notes"] = (*account["notes"], *notes)
    return FileResult(
        output=output.path,
        file_rate=output.file_rate(rate),
        length=len(rendered.samples),
        sample_rate=rate,
        resumed=resumed,
        **account,
    )


def _workspace(conversion: ConversionSetup, output: Path) -> Workspace:
    """Memory for a source that is decoded already, else a checkpoint beside the output."""
    if conversion.source.in_memory:
        return Workspace()
    key = fingerprint(
        conversion.source.identity,
        conversion.voice,
        conversion.controls,
        conversion.models,
        conversion.chunk_seconds,
    )
    return Checkpoint(output, key)


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except AutoVoiceError:
        raise
    except OSError as error:
        raise AudioOutputError(
            f"{output} cannot be written ({error.strerror or error}); what is done is kept where "
            "there was room for it, and the same command goes on from there."
        ) from error
