"""What a conversion keeps while it runs: in memory, or in a folder beside the output.

The folder ``<output>.partial`` is a checkpoint: an interrupted conversion goes on from its last
piece when the same command runs again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import AudioOutputError, AutoVoiceError, OutputBusyError, reason
from auto_voice.filesystem import atomic_write, free_bytes, fsync_file
from auto_voice.inference.analysis import Analysis
from auto_voice.inference.controls import Controls
from auto_voice.inference.inputs import (
    BYTES_PER_SAMPLE,
    FileSamples,
    MemorySamples,
    SampleStore,
    SourceFacts,
    disk_errors,
)
from auto_voice.types import FloatArray, Pitch, Voice

log = logging.getLogger(__name__)

# Layout of a checkpoint; one of another layout is begun anew.
FORMAT = 4
SUFFIX = ".partial"
# Of disk for each second of the source: float32 of both, at 16 and 22.05 kHz, and what is known
# about every hundredth of a second.
BYTES_PER_SECOND = 4 * (16000 + 22050) + 8000


@dataclass(frozen=True, eq=False)
class Position:
    """Where the rendering of a source stands.

    Attributes:
        edges: mel frames between which the pieces lie.
        frame: up to which pieces are done.
        samples: of the result that are finished and kept.
        pieces: that are done.
        pending: ``(samples,)`` that fade into the next piece.
        mean: of the content of the whole; None where no stage needs it.
    """

    edges: list[int]
    frame: int
    samples: int
    pieces: int
    pending: FloatArray
    mean: FloatArray | None


class Workspace:
    """Keeps the source and the result in memory, and nothing for a later run.

    Attributes:
        facts: of the source, once it is read to its end.
        position: of the rendering, once it has begun.
    """

    def __init__(self) -> None:
        self.facts: SourceFacts | None = None
        self.position: Position | None = None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Keep what is done for a later run, or delete it."""

    def finish(self) -> None:
        """Nothing has to be kept on leaving: the result is where it belongs."""

    def source(self, rate: int) -> SampleStore:
        """The source at ``rate`` Hz, as far as it is read."""
        return MemorySamples(np.zeros(0, np.float32), rate)

    def result(self, rate: int, length: int) -> SampleStore:
        """The result at ``rate`` Hz, of which the first ``length`` samples are finished."""
        return MemorySamples(np.zeros(0, np.float32), rate)

    def make_room(self, seconds: float | None) -> None:
        """Called before a source of so many seconds is read.

        Raises:
            AudioOutputError: there is no room for it.
        """

    def source_is_complete(self, facts: SourceFacts) -> None:
        self.facts = facts

    def load_analysis(self) -> Analysis | None:
        """What an earlier run found out about the source."""
        return None

    def save_analysis(self, analysis: Analysis) -> None:
        """Keep it for a later run."""

    def save_position(self, position: Position) -> None:
        """Make it the state that a later run starts from."""
        self.position = position


class Checkpoint(Workspace):
    """``<output>.partial``: held by one process at a time, kept when that is interrupted.

    Args:
        output: the file that is being made.
        key: of everything that the result depends on; a folder with another key starts anew.

    Raises:
        AudioOutputError: another process holds it, or it cannot be made.
    """

    def __init__(self, output: Path, key: str) -> None:
        super().__init__()
        self.folder = output.with_name(output.name + SUFFIX)
        self.key = key
        self._finished = False

    def __enter__(self) -> Checkpoint:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OutputBusyError(
                f"another process is writing {self.folder.with_suffix('')}; wait for it or name "
                "another output."
            ) from None
        except OSError as error:
            raise AudioOutputError(
                f"{self.folder} cannot be made ({reason(error)}); write to another folder."
            ) from error
        try:
            with disk_errors(self.folder):
                self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        over = self._finished or (kind is not None and self.facts is None)
        try:
            if over:  # While it is held: the next one's files must not be deleted.
                with suppress(OSError):
                    self._clear()
        finally:
            self._lock.release()
        if over:
            with suppress(OSError):  # Another process may hold it by now.
                (self.folder / "lock").unlink(missing_ok=True)
                self.folder.rmdir()
        elif kind is not None:
            # A server stops work whenever others wait, by an exception of its own.
            told = issubclass(kind, (KeyboardInterrupt, AutoVoiceError, OSError, MemoryError))
            log.log(
                logging.WARNING if told else logging.INFO,
                "stopped; %s holds what is done, and the same command goes on from there",
                self.folder,
            )

    def finish(self) -> None:
        self._finished = True

    def source(self, rate: int) -> FileSamples:
        samples = FileSamples(self.folder / "source.f32", rate)
        if self.facts is None:
            samples.truncate(0)
        return samples

    def result(self, rate: int, length: int) -> FileSamples:
        samples = FileSamples(self.folder / "result.f32", rate)
        samples.truncate(length)
        return samples

    def make_room(self, seconds: float | None) -> None:
        needed = BYTES_PER_SECOND * (seconds or 0.0)
        with disk_errors(self.folder):
            free = free_bytes(self.folder)
        if needed > free:
            raise AudioOutputError(
                f"converting {seconds or 0:.0f} s of audio needs {needed / 1e6:.0f} MB beside the "
                f"output, and {self.folder.parent} has {free / 1e6:.0f} MB; write to another disk."
            )

    def source_is_complete(self, facts: SourceFacts) -> None:
        # The samples reach the disk before the state that counts them.
        with disk_errors(self.folder):
            fsync_file(self.folder / "source.f32")
        super().source_is_complete(facts)
        self._write_state()

    def save_analysis(self, analysis: Analysis) -> None:
        path = self.folder / "analysis.npz"
        with (
            disk_errors(self.folder),
            atomic_write(path) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(
                file,
                samples=analysis.samples,
                gain=analysis.gain,
                energies=analysis.energies,
                f0_hz=analysis.pitch.f0_hz,
                melody_hz=analysis.melody.f0_hz,
                voiced=analysis.pitch.voiced,
                frame_rate=analysis.pitch.frame_rate,
            )

    def load_analysis(self) -> Analysis | None:
        path = self.folder / "analysis.npz"
        try:
            # Opened here: numpy leaves a damaged file open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
                voiced, rate = found["voiced"], float(found["frame_rate"])
                f0_hz, melody_hz = (Pitch(found[n], voiced, rate) for n in ("f0_hz", "melody_hz"))
                samples, gain = int(found["samples"]), float(found["gain"])
                return Analysis(samples, gain, found["energies"], f0_hz, melody_hz)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
            log.info("%s is damaged and made again (%s)", path, error)
            return None

    def save_position(self, position: Position) -> None:
        if position.samples:  # They reach the disk before the state that counts them.
            with disk_errors(self.folder):
                fsync_file(self.folder / "result.f32")
        super().save_position(position)
        self._write_state()

    def _read(self) -> None:
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            if state["format"] != FORMAT or state["key"] != self.key:
                raise ValueError("made by another command")
            source, done = state["source"], state["progress"]
            if self._kept("source.f32") != int(state["kept"]):
                raise ValueError("the source is not whole")
            self.facts = SourceFacts(source[0], source[1], tuple(source[2]))
            if done is not None:
                if self._kept("result.f32") < int(done["samples"]):
                    raise ValueError("the result is shorter than it was")
                self.position = Position(
                    edges=[int(edge) for edge in done["edges"]],
                    frame=int(done["frame"]),
                    samples=int(done["samples"]),
                    pieces=int(done["pieces"]),
                    pending=_array(done["pending"]),
                    mean=None if done["mean"] is None else _array(done["mean"]),
                )
                log.info("going on from %s", self.folder)
        except FileNotFoundError:
            self._clear()
        except (ValueError, KeyError, TypeError, IndexError) as error:
            log.info("starting anew: what is in %s does not fit (%s)", self.folder, error)
            self.facts, self.position = None, None
            self._clear()

    def _kept(self, name: str) -> float:
        """Samples in a file of the folder, 0 where it is missing."""
        path = self.folder / name
        return path.stat().st_size / BYTES_PER_SAMPLE if path.exists() else 0

    def _clear(self) -> None:
        for name in ("state.json", "source.f32", "result.f32", "analysis.npz"):
            (self.folder / name).unlink(missing_ok=True)
        for temporary in self.folder.glob(".*.tmp"):  # Of a process that was killed.
            temporary.unlink(missing_ok=True)

    def _write_state(self) -> None:
        facts, at = self.facts, self.position
        assert facts is not None
        progress: dict[str, Any] | None = None
        if at is not None:
            progress = {
                "edges": at.edges,
                "frame": at.frame,
                "samples": at.samples,
                "pieces": at.pieces,
                "pending": _text(at.pending),
                "mean": None if at.mean is None else _text(at.mean),
            }
        source = [facts.samples, facts.sample_rate, list(facts.notes)]
        kept = self._kept("source.f32")
        state = {
            "format": FORMAT, "key": self.key, "source": source, "kept": kept, "progress": progress,
        }  # fmt: skip
        with disk_errors(self.folder), atomic_write(self.folder / "state.json") as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")


def fingerprint(
    source: str,
    voice: Voice,
    controls: Controls,
    models: Mapping[str, str],
    chunk_seconds: float,
    drawing: Sequence[float] = (),
) -> str:
    """A hash of everything that a result depends on.

    Args:
        source: the identity of the recording, see :class:`~auto_voice.inference.inputs.Source`.
        drawing: how mels are drawn, beyond what the models' names tell: guidance, correction and
            second pass of the converter.
    """
    digest = hashlib.sha256()
    facts = (
        source, sorted(models.items()), sorted(controls.account().items()), chunk_seconds,
        voice.log_f0_mean, voice.log_f0_std, *drawing,
    )  # fmt: skip
    digest.update(repr(facts).encode())
    arrays: dict[str, NDArray[Any]] = {"embedding": voice.embedding, **voice.frames}
    if voice.fine_tuning:
        digest.update(voice.fine_tuned_converter.encode())
        arrays |= {f"fine_tuning.{name}": values for name, values in voice.fine_tuning.items()}
    for name, values in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _text(values: FloatArray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _array(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
