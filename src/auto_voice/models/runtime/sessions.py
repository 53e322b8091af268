"""ONNX Runtime sessions, built in one place: threads, providers, weights, interruption.

A graph comes without weights; the arrays of a verified file are handed over when the session is
made, so the same graph serves every weight file and every provider, and nothing is stored twice.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from auto_voice.errors import ModelLoadError
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
OUT_OF_MEMORY = ("Failed to allocate memory", "bad_alloc", "out of memory", "bad allocation")


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


class Network:
    """A graph with its weights. Many threads may call it at once.

    Args:
        session: an ``onnxruntime.InferenceSession``.
        device: where it really runs.
        weights: arrays whose memory the session uses.
        refusal: why it is not on the device that was wanted, in words of the runtime.
    """

    def __init__(
        self,
        session: Any,
        device: str = "cpu",
        weights: Mapping[str, Array] | None = None,
        refusal: str = "",
    ) -> None:
        self._session = session
        self._weights = weights
        self.device = device
        self.refusal = refusal
        gpu = f";gpu:{device.partition(':')[2]}" if device.startswith("cuda") else ""
        self._arenas = f"cpu:0{gpu}"
        self.inputs = tuple(value.name for value in session.get_inputs())
        self.outputs = tuple(value.name for value in session.get_outputs())

    def __call__(self, *inputs: Array, output: str | None = None) -> Array:
        """The output of that name, the first one by default.

        Args:
            inputs: in the order of :attr:`inputs`.
            output: what else the graph could give is not computed.

        Raises:
            Interrupted: see :class:`Interruption`.
            MemoryError: the memory of the device does not suffice.
        """
        from onnxruntime import RunOptions

        options = RunOptions()
        options.only_execute_path_to_fetches = True
        # Each session would keep what its longest input needed, beside all the others.
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", self._arenas)
        wanted = [output or self.outputs[0]]
        named = dict(zip(self.inputs, inputs, strict=True))
        interruption: Interruption | None = getattr(_covering, "interruption", None)
        with interruption._watches(options) if interruption else nullcontext():
            try:
                found: Array = self._session.run(wanted, named, options)[0]
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
    return Network(session, device, weights, refusal)


def release_pages(arrays: Iterable[Array]) -> None:
    """Lets go of the memory of files that are mapped; what is touched again is read again.

    A session has packed most weights for its kernels and reads few of the originals any more.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for mapping in {id(m): m for m in map(_mapping_of, arrays) if m is not None}.values():
        mapping.madvise(mmap.MADV_DONTNEED)


def _mapping_of(array: Any) -> mmap.mmap | None:
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    return array


def open_model(path: Path, name: str, *, inputs: Sequence[str], device: str = "cpu") -> Network:
    """An ONNX file that holds its own weights; its inputs are checked by name.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ModelLoadError: the file is no ONNX graph, or one with other inputs.
    """
    try:
        session, device, refusal = _session(str(path), session_options(), device, name)
    except ModelLoadError as error:
        raise ModelLoadError(
            f"{name}: {path.name} is not an ONNX model that onnxruntime can run; fetch it again "
            f"with: autovoice models pull {name} --force"
        ) from error
    network = Network(session, device, refusal=refusal)
    if network.inputs != tuple(inputs):
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
                    providers=[(provider, provider_options(device)), PROVIDERS["cpu"]],
                )  # fmt: skip
                if session.get_providers()[0] == provider:
                    return session, device, ""
                refusal = "its provider does not start"
            except Exception as error:  # A full or missing GPU, in classes of a C++ module.
                refusal = _first_line(error)
        log.warning("%s cannot run on %s here (%s), so it runs on the CPU", name, device, refusal)
    try:
        session = runtime.InferenceSession(graph, options, providers=[PROVIDERS["cpu"]])
    except Exception as error:  # onnxruntime raises classes of its own C++ module
        if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            raise MemoryError(name) from error
        raise ModelLoadError(
            f"{name} cannot be run by onnxruntime ({_first_line(error)}); fetch it again."
        ) from error
    return session, "cpu", refusal


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def float32(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays as networks take them: float32 and C-ordered; those that are so are not copied."""
    return {name: np.ascontiguousarray(values, np.float32) for name, values in arrays.items()}
