"""Sessions: threads that sleep, weights that are handed over, work that can be stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auto_voice.errors import MissingDependencyError, ModelLoadError
from auto_voice.models.runtime import devices, graphs, sessions
from auto_voice.models.runtime.sessions import Interrupted, Interruption, Network

GE2E = graphs.FOLDER / "ge2e.onnx"


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = graphs.initialisers(GE2E.read_bytes())
    return {n: (0.05 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def network() -> Network:
    return graphs.bound_network(GE2E.read_bytes(), weights(), "weights", "ge2e")


def mels(rows: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 160, 40), np.float32)


def test_the_same_graph_serves_other_weights(network: Network) -> None:
    other = graphs.bound_network(GE2E.read_bytes(), weights(5), "weights", "ge2e")
    assert network.inputs == ("mels",)
    assert network(mels()).shape == (2, 256)
    assert not np.allclose(network(mels()), other(mels()))


def test_half_precision_is_widened(network: Network) -> None:
    halves = {name: values.astype(np.float16) for name, values in weights().items()}
    low = graphs.bound_network(GE2E.read_bytes(), halves, "weights", "ge2e")
    assert np.abs(low(mels()) - network(mels())).max() < 1e-2


def test_many_threads_get_what_one_gets(network: Network) -> None:
    inputs = [mels(seed=seed) for seed in range(12)]
    alone = [network(values) for values in inputs]
    with ThreadPoolExecutor(6) as pool:
        for found, expected in zip(pool.map(network, inputs), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_weights_live_as_long_as_the_network() -> None:
    """The session uses their memory, which nobody else holds here."""
    made = graphs.bound_network(GE2E.read_bytes(), weights(), "weights", "ge2e")
    before = made(mels())
    _ = [np.full(300_000, 7.0, np.float32) for _ in range(50)]
    np.testing.assert_array_equal(made(mels()), before)


def test_idle_threads_of_a_session_sleep() -> None:
    options = sessions.session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("1", 1), ("0", None), ("many", None)])
def test_threads_are_those_of_the_environment_or_the_cores(
    asked: str, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert sessions.threads() == (count or len(os.sched_getaffinity(0)))
    assert sessions.session_options().intra_op_num_threads == sessions.threads()


def test_a_provider_that_fails_leaves_the_work_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a full GPU does: the runtime offers the provider, and the session cannot be made."""
    for module in (sessions, devices):
        monkeypatch.setattr(module, "available_providers", lambda: ("CUDAExecutionProvider",))
    made = graphs.bound_network(GE2E.read_bytes(), weights(), "weights", "ge2e@1.0", "cuda:0")
    assert made.device == "cpu"
    assert "ge2e@1.0 cannot run on cuda:0" in caplog.text
    assert made(mels()).shape == (2, 256)


def test_what_is_no_graph_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"junk")
    with pytest.raises(ModelLoadError, match=r"m\.onnx is not an ONNX model"):
        sessions.open_model(path, "judge", inputs=("x",))
    with pytest.raises(ModelLoadError, match="judge cannot be run"):
        sessions.open_network(b"junk", {}, name="judge")


def test_without_the_runtime_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    devices.onnx_runtime.cache_clear()
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        devices.onnx_runtime()
    devices.available_providers.cache_clear()
    assert devices.available_providers() == ()
    devices.available_providers.cache_clear()


class FullSession:
    """A session whose allocator has nothing left."""

    def get_inputs(self) -> list[Any]:
        return []

    get_outputs = get_inputs

    def run(self, *_: Any) -> Any:
        raise RuntimeError("bfc_arena.cc Failed to allocate memory for requested buffer of size 8")


def test_a_full_memory_is_a_memory_error() -> None:
    network = Network(FullSession())
    network.outputs = ("x",)
    with pytest.raises(MemoryError, match="buffer of size 8"):
        network()


class FillsUp:
    """A session of a GPU whose memory other programs fill after the first run."""

    def __init__(self, session: Any) -> None:
        self.session, self.runs = session, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, wanted: Any, named: Any, options: Any) -> Any:
        self.runs += 1
        if self.runs > 1:
            raise RuntimeError("CUDA failure 2: out of memory ; GPU=0")
        return self.session.run(wanted, named)


def test_a_network_whose_device_fills_up_goes_on_on_the_cpu(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Any] = []

    def on_cpu() -> Any:
        made.append(network._session)
        return network._session

    moved = Network(FillsUp(network._session), "cuda:0", None, "", on_cpu, "ge2e@1.0")
    wanted = network(mels())
    with sessions.moves_noted() as moves:
        np.testing.assert_array_equal(moved(mels()), wanted)
        assert not moves
        with ThreadPoolExecutor(4) as pool:  # Whoever meets the full device, one session is made.
            for got in pool.map(lambda _: moved(mels()), range(4)):
                np.testing.assert_array_equal(got, wanted)
    assert (len(made), moved.device) == (1, "cpu")
    assert "ge2e@1.0 went on running on the CPU: the memory of cuda:0 is full" in caplog.text
    again = Network(FillsUp(network._session), "cuda:0", None, "", on_cpu, "ge2e@1.0")
    with sessions.moves_noted() as moves:
        again(mels())
        again(mels())
    assert moves == ["ge2e@1.0 went on running on the CPU: the memory of cuda:0 is full."]


def test_an_interruption_stops_what_runs_and_nothing_else(network: Network) -> None:
    work = Interruption()
    entered = threading.Event()
    long = np.zeros((64, 20_000, 40), np.float32)

    def run() -> None:
        with work.covers():
            entered.set()
            network(long)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        assert entered.wait(30)
        work.stop()
        with pytest.raises(Interrupted):
            running.result()
    with work.covers(), pytest.raises(Interrupted):
        network(mels())
    assert network(mels()).shape == (2, 256)
    with Interruption().covers():
        assert network(mels()).shape == (2, 256)


def test_what_covers_within_what_covers_ends_with_it(network: Network) -> None:
    outer, inner = Interruption(), Interruption()
    with outer.covers():
        with inner.covers():
            inner.stop()
            with pytest.raises(Interrupted):
                network(mels())
        assert network(mels()).shape == (2, 256)


def test_the_telemetry_of_the_runtime_is_off_before_its_import() -> None:
    code = "import auto_voice, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    clean = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "1"


def test_threads_of_other_libraries_sleep_while_they_wait_unless_told_otherwise() -> None:
    code = "import auto_voice, os; print(os.environ['OMP_WAIT_POLICY'])"
    clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    for given, holds in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        answer = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | given, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert answer.stdout.strip() == holds


def test_arrays_of_half_precision_are_widened_by_the_session_to_the_same_numbers() -> None:
    halves = {name: values.astype(np.float16) for name, values in weights().items()}
    graph = GE2E.read_bytes()
    one = graphs.bound_network(graph, halves, "weights", "ge2e")
    other = {name: values.astype(np.float32) for name, values in halves.items()}
    np.testing.assert_array_equal(
        one(mels()), graphs.bound_network(graph, other, "weights", "ge2e")(mels())
    )
    mixed = other | {"linear.weight": halves["linear.weight"]}
    np.testing.assert_array_equal(
        one(mels()), graphs.bound_network(graph, mixed, "weights", "ge2e")(mels())
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's memory map list")
def test_a_mapped_file_takes_no_memory_once_its_session_is_made(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from auto_voice.models.runtime.weights import map_safetensors

    path = tmp_path / "weights.safetensors"
    save_file(weights(), path)

    def resident_kb() -> int:
        parts = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in parts)

    arrays = map_safetensors(path)
    assert sum(float(values.sum()) for values in arrays.values())
    assert resident_kb() > 4000
    made = graphs.bound_network(GE2E.read_bytes(), arrays, str(path), "ge2e")
    assert resident_kb() < 500
    expected = graphs.bound_network(GE2E.read_bytes(), weights(), "weights", "ge2e")
    np.testing.assert_array_equal(made(mels()), expected(mels()))
