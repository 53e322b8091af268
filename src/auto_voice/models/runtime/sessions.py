"""ONNX Runtime sessions, built in one place: threads, providers, weights, interruption.

A graph comes without weights; the arrays of a verified file are handed over when the session is
made, so the same graph serves every weight file and every provider, and nothing is stored twice.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import ModelLoadError, first_line
from auto_voice.models.runtime.devices import (
    PROVIDERS,
    available_providers,
    onnx_runtime,
    provider_options,
)

log = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]

# ONNX Runtime's levels: 3 prints errors alone. What matters is raised, and raised once.
ERRORS_ONLY = 3
# What allocators of providers say when memory is full.
OUT_OF_MEMORY = (
    "Failed to allocate memory", "bad_alloc", "out of memory", "bad allocation", "OUTOFMEMORY",
    "STATUS_ALLOC_FAILED", "Not enough memory resources",
)  # fmt: skip


class Interrupted(BaseException):
    """A network was stopped in the middle of its work; no ``Exception``, so that no handler of
    errors keeps the work going."""


class Interruption:
    """Stops the networks that some work runs, within milliseconds and from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[Any] = set()
        self._stopped = False

    def stop(self) -> None:
        """Makes the networks that run and those that follow raise :class:`Interrupted`."""
        with self._lock:
            self._stopped = True
            for options in self._running:
                options.terminate = True

    @contextmanager
    def covers(self) -> Iterator[None]:
        """Every network that this thread runs inside is stopped by :meth:`stop`."""
        before = getattr(_covering, "interruption", None)
        _covering.interruption = self
        try:
            yield
        finally:
            _covering.interruption = before

    @contextmanager
    def _watches(self, options: Any) -> Iterator[None]:
        with self._lock:
            if self._stopped:
                raise Interrupted
            self._running.add(options)
        try:
            yield
        except Exception:
            if self._stopped:
                raise Interrupted from None
            raise
        finally:
            with self._lock:
                self._running.discard(options)


_covering = threading.local()


@contextmanager
def moves_noted() -> Iterator[list[str]]:
    """A list that fills with a sentence for each network of this thread that moves to the CPU."""
    before = getattr(_covering, "moves", None)
    moves: list[str] = []
    _covering.moves = moves
    try:
        yield moves
    finally:
        _covering.moves = before


class Port(NamedTuple):
    """An input or an output of a graph.

    Attributes:
        dtype: as the runtime writes it, e.g. ``tensor(float)``.
        shape: None stands for an axis of any size.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def _port(value: Any) -> Port:
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Port(value.name, value.type, sizes)


class Network:
    """A graph with its weights. Many threads may call it at once.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        device: where it really runs.
        weights: arrays whose memory the session uses.
        refusal: why it is not on the device that was wanted, in words of the runtime.
        on_cpu: makes a session of the same graph on the CPU, which takes over for good when the
            memory of another device fills up while it runs.
        name: of the model, for messages.
    """

    def __init__(
        self,
        session: Any,
        device: str = "cpu",
        weights: Mapping[str, Array] | None = None,
        refusal: str = "",
        on_cpu: Callable[[], Any] | None = None,
        name: str = "the model",
    ) -> None:
        self._session = session
        self._weights = weights
        self._on_cpu, self._name = on_cpu, name
        self._moving = threading.Lock()
        self.device = device
        self.refusal = refusal
        self._set_arenas(device)
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def _set_arenas(self, device: str) -> None:
        gpu = f";gpu:{device.partition(':')[2]}" if device.startswith("cuda") else ""
        self._arenas = f"cpu:0{gpu}"

    def ports(self) -> tuple[list[Port], list[Port]]:
        """What the graph takes, and what it gives."""
        takes, gives = self._session.get_inputs(), self._session.get_outputs()
        return [_port(value) for value in takes], [_port(value) for value in gives]

    def __call__(self, *inputs: Array, output: str | None = None) -> Array:
        """The output of that name, the first one by default; see :meth:`outputs_of`."""
        return self.outputs_of([output or self.outputs[0]], *inputs)[0]

    def outputs_of(self, wanted: Sequence[str], *inputs: Array) -> list[Array]:
        """The outputs of those names; what else the graph could give is not computed.

        Args:
            inputs: in the order of :attr:`inputs`.

        Raises:
            Interrupted: see :class:`Interruption`.
            MemoryError: the memory does not suffice; where the network was on another device than
                the CPU, that of the CPU does not either.
        """
        session = self._session
        try:
            return self._run(session, inputs, wanted)
        except MemoryError as error:
            if not self._move_to_cpu(session, error):
                raise
        return self._run(self._session, inputs, wanted)

    def _move_to_cpu(self, full: Any, error: MemoryError) -> bool:
        """Whether another session takes the place of ``full``, whose device has no room left."""
        with self._moving:
            if self._session is not full:  # Another thread has done it.
                return True
            if self.device == "cpu" or self._on_cpu is None:
                return False
            told = f"{self._name} went on running on the CPU: the memory of {self.device} is full"
            log.warning("%s (%s)", told, first_line(error))
            self._session = self._on_cpu()
            self.refusal, self.device = first_line(error), "cpu"
            self._set_arenas("cpu")
        moves = getattr(_covering, "moves", None)
        if moves is not None:
            moves.append(f"{told}.")
        return True

    def _run(self, session: Any, inputs: Sequence[Array], wanted: Sequence[str]) -> list[Array]:
        from onnxruntime import RunOptions

        options = RunOptions()
        options.only_execute_path_to_fetches = True
        # Each session would keep what its longest input needed, beside all the others.
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arenas)
        named = dict(zip(self.inputs, inputs, strict=True))
        interruption: Interruption | None = getattr(_covering, "interruption", None)
        with interruption._watches(options) if interruption else nullcontext():
            try:
                found: list[Array] = session.run(list(wanted), named, options)
            except Exception as error:  # onnxruntime raises classes of its own C++ module
                if any(sign in str(error) for sign in OUT_OF_MEMORY):
                    raise MemoryError(str(error)) from error
                raise
        return found


def open_network(
    graph: bytes, weights: Mapping[str, Array], device: str = "cpu", name: str = "the model"
) -> Network:
    """A graph that was exported without weights, with ``weights`` in their place.

    Args:
        graph: an ONNX model whose initialisers lie outside of it.
        weights: C-ordered arrays by the names of those initialisers. Mapped to a file they stay
            there until the session has packed them for its kernels.
        device: see ``devices.choose_device``. Where its provider fails, the CPU takes over.
        name: of the model, for messages.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelLoadError: the graph does not take these weights.
    """
    options = session_options()
    runtime = onnx_runtime()
    values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    if values:
        options.add_external_initializers(list(weights), values)
    session, device, refusal = _session(graph, options, device, name)
    release_pages(weights.values())
    trim_heap()
    on_cpu = _later_on_cpu(graph, options, name, device)
    return Network(session, device, weights, refusal, on_cpu, name)


def release_pages(arrays: Iterable[Array]) -> None:
    """Lets go of the memory of files that are mapped; what is touched again is read again.

    A session has packed most weights for its kernels and reads few of the originals any more.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for mapping in {id(m): m for m in map(_mapping_of, arrays) if m is not None}.values():
        mapping.madvise(mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Gives the system back what the C library keeps free for later.

    Making a session leaves holes as large as its weights, and inputs of other lengths leave others.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _mapping_of(array: Any) -> mmap.mmap | None:
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array


def open_model(
    path: Path, name: str, *, inputs: Sequence[str] | None = None, device: str = "cpu"
) -> Network:
    """An ONNX file that holds its own weights.

    Args:
        inputs: names that its inputs must have; None for any.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelLoadError: the file is no ONNX graph, or one with other inputs.
    """
    options = session_options()
    try:
        session, device, refusal = _session(str(path), options, device, name)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"{name}: {path.name} is not an ONNX model that onnxruntime can run; fetch it again "
            f"with: autovoice models pull {name} --force"
        ) from error
    on_cpu = _later_on_cpu(str(path), options, name, device)
    network = Network(session, device, refusal=refusal, on_cpu=on_cpu, name=name)
    if inputs is not None and network.inputs != tuple(inputs):
        raise ModelLoadError(
            f"{name}: {path.name} takes the inputs {network.inputs} instead of {tuple(inputs)}; "
            "give the model that the catalog names."
        )
    return network


def session_options() -> Any:
    """Options that every session of this project has."""
    options = onnx_runtime().SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads()
    # Idle threads that spin take the core that another process needs: 20 times slower beside one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Small blocks of work, so that a thread that was held up does not hold up the others.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    # A plan of memory for each length that was ever seen would never be used again.
    options.enable_mem_pattern = False
    return options


def threads() -> int:
    """Threads of one network: ``OMP_NUM_THREADS`` where that is set, else all usable cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _session(graph: bytes | str, options: Any, device: str, name: str) -> tuple[Any, str, str]:
    """A session, the device that it runs on, and why that is not the one that was wanted."""
    kind, refusal = device.partition(":")[0], ""
    runtime = onnx_runtime()
    if kind != "cpu":
        refusal = "the runtime has no provider for it"
        provider = PROVIDERS[kind]
        if provider in available_providers():
            try:
                session = runtime.InferenceSession(
                    graph, options,
                    providers=[(provider, provider_options(device, threads())), PROVIDERS["cpu"]],
                    enable_fallback=0,  # It would print why, and we tell it.
                )  # fmt: skip
                if session.get_providers()[0] == provider:
                    return session, device, ""
                refusal = "its provider does not start"
            except Exception as error:  # A full or missing GPU, in classes of a C++ module.
                refusal = first_line(error)
        log.warning("%s cannot run on %s here (%s), so it runs on the CPU", name, device, refusal)
    try:
        session = runtime.InferenceSession(graph, options, providers=[PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            raise MemoryError(name) from error
        raise ModelLoadError(
            f"{name} cannot be run by onnxruntime ({first_line(error)}); fetch it again."
        ) from error
    return session, "cpu", refusal


def _later_on_cpu(
    graph: bytes | str, options: Any, name: str, device: str
) -> Callable[[], Any] | None:
    """What makes the session anew on the CPU, for a network on another device.

    ``options`` hold the weights that were handed over.
    """
    return None if device == "cpu" else lambda: _session(graph, options, "cpu", name)[0]


def float32(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays as networks take them: C-ordered, and float32 where they are no whole numbers;
    those that are so are not copied."""
    return {
        name: np.asarray(
            values, values.dtype if values.dtype.kind in "iu" else np.float32, order="C"
        )
        for name, values in arrays.items()
    }
