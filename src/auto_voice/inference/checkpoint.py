"""The folder beside an output in which a long conversion keeps what it has done."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import AudioOutputError, AutoVoiceError
from auto_voice.filesystem import fsync_file, move_into_place, temporary_beside
from auto_voice.inference.analysis import Analysis
from auto_voice.inference.controls import Controls
from auto_voice.inference.sample_source import FileTape
from auto_voice.types import FloatArray, Pitch, Voice

log = logging.getLogger(__name__)

FORMAT = 3
SUFFIX = ".partial"


@dataclass(frozen=True, eq=False)
class Progress:
    """Attributes:
    edges: mel frames between which the pieces lie.
    frame: up to which pieces are done.
    samples: that are on disk.
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


@dataclass(frozen=True)
class SourceFacts:
    """Attributes:
    complete: whether the source's tape is.
    source_samples, source_rate: of the recording itself.
    notes: on the recording.
    """

    complete: bool = False
    source_samples: int = 0
    source_rate: int = 0
    notes: tuple[str, ...] = field(default=())


class Partial:
    """``<output>.partial``: held by one process at a time, kept when that is interrupted.

    Args:
        output: the file that is being made.
        key: of everything that the result depends on; a folder with another key starts anew.

    Raises:
        AudioOutputError: another process holds it, or it cannot be made.
    """

    def __init__(self, output: Path, key: str) -> None:
        self.folder = output.with_name(output.name + SUFFIX)
        self.key = key
        self.facts = SourceFacts()
        self.progress: Progress | None = None
        self.result: FileTape
        self._removed = False

    def __enter__(self) -> Partial:
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / "lock")
            self._lock.acquire(timeout=0)
        except Timeout:
            raise AudioOutputError(
                f"another process is writing {self.folder.with_suffix('')}; wait for it or name "
                "another output."
            ) from None
        except OSError as error:
            raise AudioOutputError(f"{self.folder} cannot be made: {error}.") from error
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._lock.release()
        if self._removed:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind is not None and self.facts.complete:
            # A server stops work whenever others wait, by an exception of its own.
            told = issubclass(kind, (KeyboardInterrupt, AutoVoiceError, OSError, MemoryError))
            log.log(
                logging.WARNING if told else logging.INFO,
                "stopped; %s holds what is done, and the same command goes on from there",
                self.folder,
            )
        elif kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the folder on leaving."""
        self._removed = True

    def source_tape(self, rate: int) -> FileTape:
        return FileTape(self.folder / "source.f32", rate)

    def result_tape(self, rate: int, length: int) -> FileTape:
        """The result so far, cut to what is known to be whole."""
        self.result = FileTape(self.folder / "result.f32", rate)
        self.result.truncate(length)
        return self.result

    def source_is_complete(self, samples: int, rate: int, notes: tuple[str, ...]) -> None:
        self.facts = SourceFacts(True, samples, rate, notes)
        self._write_state()

    def save_analysis(self, analysis: Analysis) -> None:
        path = self.folder / "analysis.npz"
        temporary = temporary_beside(path)
        with temporary.open("wb") as file:
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
        fsync_file(temporary)
        move_into_place(temporary, path)

    def load_analysis(self) -> Analysis | None:
        path = self.folder / "analysis.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as found:
            voiced, rate = found["voiced"], float(found["frame_rate"])
            tracks = (Pitch(found[name], voiced, rate) for name in ("f0_hz", "melody_hz"))
            return Analysis(int(found["samples"]), float(found["gain"]), found["energies"], *tracks)

    def save_progress(self, progress: Progress) -> None:
        """Make it the state that a later run starts from; the samples reach the disk first."""
        if progress.samples:
            fsync_file(self.folder / "result.f32")
        self.progress = progress
        self._write_state()

    def _read(self) -> None:
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            if state["format"] != FORMAT or state["key"] != self.key:
                raise ValueError("made by another command")
            source, done = state["source"], state["progress"]
            self.facts = SourceFacts(True, source[0], source[1], tuple(source[2]))
            if done is not None:
                self.progress = Progress(
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
        except (ValueError, KeyError, TypeError) as error:
            log.info("starting anew: what is in %s does not fit (%s)", self.folder, error)
            self.facts, self.progress = SourceFacts(), None
            self._clear()

    def _clear(self) -> None:
        for name in ("state.json", "source.f32", "result.f32", "analysis.npz"):
            (self.folder / name).unlink(missing_ok=True)

    def _write_state(self) -> None:
        facts, done = self.facts, self.progress
        progress: dict[str, Any] | None = None
        if done is not None:
            progress = {
                "edges": done.edges,
                "frame": done.frame,
                "samples": done.samples,
                "pieces": done.pieces,
                "pending": _text(done.pending),
                "mean": None if done.mean is None else _text(done.mean),
            }
        source = [facts.source_samples, facts.source_rate, list(facts.notes)]
        state = {"format": FORMAT, "key": self.key, "source": source, "progress": progress}
        path = self.folder / "state.json"
        temporary = temporary_beside(path)
        temporary.write_text(json.dumps(state), encoding="utf-8")
        fsync_file(temporary)
        move_into_place(temporary, path)


def fingerprint(
    source: Path,
    voice: Voice,
    controls: Controls,
    models: dict[str, str],
    chunk_seconds: float,
) -> str:
    """A hash of everything that a result depends on; the source by path, size and time."""
    stat = source.stat()
    digest = hashlib.sha256()
    facts = (
        os.fspath(source.resolve()), stat.st_size, stat.st_mtime_ns, sorted(models.items()),
        sorted(controls.account().items()), chunk_seconds, voice.log_f0_mean, voice.log_f0_std,
    )  # fmt: skip
    digest.update(repr(facts).encode())
    arrays: dict[str, NDArray[Any]] = {"embedding": voice.embedding, **voice.frames}
    if voice.adaptation:
        digest.update(voice.adapted_to.encode())
        arrays |= {f"adaptation.{name}": values for name, values in voice.adaptation.items()}
    for name, values in sorted(arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _text(values: FloatArray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


def _array(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
