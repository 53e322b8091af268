"""Batches on a real Ray cluster of two nodes on this machine, one of which sees none of the files
that the driver sees."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from auto_voice import events
from auto_voice.batch import ray_executor
from auto_voice.batch.executors import InlineExecutor, WorkerSpec
from auto_voice.batch.jobs import BatchJob
from auto_voice.batch.manifest import Manifest, run_batch
from auto_voice.batch.ray_executor import MARKER, RayExecutor, parse_resources
from auto_voice.errors import AutoVoiceError, CatalogError, ConfigError, MissingDependencyError
from auto_voice.evaluation.pairs import read_test_set
from auto_voice.evaluation.scoring import evaluate_on, pair_spec
from auto_voice.inference.result import OutputSpec
from evaluation_kit import RATE, sing
from hand_made_stages import speech_like
from ray_kit import BLINDFOLD, wait_for, without_models

STORE = 80 << 20
ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "src", ROOT / "tests" / "kits"]
DEPLOY = ROOT / "deploy" / "ray"


@pytest.fixture(scope="module")
def short() -> Iterator[Path]:
    """A folder of a short name: Ray's sockets lie in it, and theirs must not be long."""
    folder = Path(tempfile.mkdtemp(prefix="avr"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(short: Path) -> Iterator[SimpleNamespace]:
    """Two nodes of one core: ``a`` with the driver's files, ``b`` without those of ``hidden``."""
    folder, hidden = short, short / "hidden"
    hidden.mkdir()
    (folder / "ray").mkdir()
    (folder / "sitecustomize.py").write_text(BLINDFOLD)
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, [folder, *PATHS])),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HOME": str(folder),
        "HELD_BY": str(folder / "hold"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)  # Ray reads them when it is imported.
        pytest.importorskip("ray", reason="needs the extra ray")
        from ray.cluster_utils import Cluster

        def node(name: str) -> dict[str, object]:
            blind = {"BLIND_TO": str(hidden)} if name == "b" else {}
            return {
                "num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False,
                "env_vars": {**variables, "AUTOVOICE_NODE": name, **blind},
            }  # fmt: skip

        made = Cluster(initialize_head=True, head_node_args=node("a"))
    found = SimpleNamespace(address=made.address, hidden=hidden, variables=variables, b=None)
    found.hold = folder / "hold"

    def add() -> None:
        if found.b is None:
            found.b = made.add_node(**node("b"))
            made.wait_for_nodes()

    def kill() -> None:
        made.remove_node(found.b, allow_graceful=False)
        found.b = None

    found.add, found.kill = add, kill
    try:
        yield found
    finally:
        made.shutdown()


@pytest.fixture
def folder(cluster: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the driver and node ``a`` see, and not ``b``, which lives."""
    cluster.add()
    place = Path(tempfile.mkdtemp(dir=cluster.hidden))
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """A folder that everybody sees."""
    return tmp_path


def jobs(*words: str) -> list[BatchJob]:
    Path("v.txt").write_text("ann")
    Path("in").mkdir(exist_ok=True)
    made = []
    for number, text in enumerate(words):
        source = Path(f"in/{number}.txt")
        source.write_text(text)
        made.append(BatchJob(str(source), OutputSpec(f"out/{number}.txt"), ("v.txt",)))
    return made


def spec(signs: Path, factory: str = "copying") -> WorkerSpec:
    return WorkerSpec(
        f"ray_kit:{factory}", {"signs": str(signs)},
        reads=("source",), shared=("voice",), writes=("output",),
    )  # fmt: skip


def run(executor: RayExecutor, made: list[BatchJob], how: WorkerSpec) -> dict[str, str]:
    with Manifest(Path("out/manifest.jsonl")) as manifest:
        outcomes = run_batch(made, executor, how, manifest)
        return {Path(o.job.source).stem: o.status for o in outcomes}


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]


def done() -> dict[str, dict[str, Any]]:
    """The lines of what is done, of which nothing may be done twice."""
    found = [line for line in lines() if line.get("status") == "done"]
    by_name = {Path(line["source"]).stem: line for line in found}
    assert len(by_name) == len(found)
    return by_name


@pytest.mark.slow
def test_a_node_that_sees_no_file_is_sent_them_and_its_results_come_back(cluster, folder, signs):
    made = jobs("meet", "meet", "three", "fail", "raise")
    Path(signs, "far.txt").write_text("far")
    far = f"file://{signs}/far"
    made.append(BatchJob(f"{far}.txt", OutputSpec(f"{far}.out"), ("v.txt",)))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with events.continued(trace):
        statuses = run(RayExecutor(cluster.address), made, spec(signs))
    assert statuses.pop("far") == "done"
    assert Path(signs, "far.out").read_text() == "ann far"
    assert statuses == {"0": "done", "1": "done", "2": "done", "3": "failed", "4": "lost"}
    texts = [Path(job.target).read_text() for job in made[:3]]
    assert texts == ["ann meet", "ann meet", "ann three"]
    found = done()
    assert {found["0"]["node"], found["1"]["node"]} == {"a", "b"}
    for line in found.values():
        # Sentences and facts name files as the user does, wherever the work was done.
        assert line["read"] == line["source"]
        assert line["trace"] == trace
    errors = {Path(line["source"]).stem: line["error"] for line in lines() if "error" in line}
    assert errors["3"] == "in/3.txt is bad"
    assert errors["4"] == "the worker failed (ValueError: it is bad)"
    assert not list(Path("out").glob(f"{MARKER}*"))
    assert set(run(RayExecutor(cluster.address), made[:3], spec(signs)).values()) == {"skipped"}


@pytest.mark.slow
def test_a_killed_driver_costs_what_was_in_work_and_the_same_command_goes_on(cluster, folder):
    names = ("talk0", "talk1", "talk2", "talk3", "talk4", "talk5_held")
    for number, name in enumerate(names):
        soundfile.write(f"{name}.wav", speech_like(1.5, 110.0 + 10 * number), 16000)
    soundfile.write("voice.wav", speech_like(3.0, 200.0), 16000)
    command = [
        sys.executable, "-m", "auto_voice.cli", "batch", "talk*.wav", "--voice", "voice.wav",
        "-o", "out", "--mock", "--executor", "ray", "--address", cluster.address,
        "--num-workers", "2",
    ]  # fmt: skip
    variables = {**os.environ, **cluster.variables}
    cluster.hold.touch()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        assert "1/6 done" in (process.stdout.readline())
        process.kill()
    assert done()
    assert "talk5_held" not in done()
    cluster.hold.unlink()
    again = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert again.returncode == 0, again.stderr
    assert len(done()) == 6
    assert all(soundfile.info(f"out/{name}.wav").frames == 33075 for name in names)
    left = {p.name for p in Path("out").iterdir()} - {f"{name}.wav" for name in names}
    assert left <= {"manifest.jsonl", ".manifest.jsonl.lock"}


@pytest.mark.slow
def test_what_no_worker_can_do_ends_the_run_in_one_sentence(cluster, folder, signs, monkeypatch):
    with pytest.raises(CatalogError, match=r"^models\.yaml:3: there is no key modles"):
        run(RayExecutor(cluster.address), jobs("a", "b"), spec(signs, "unmakeable"))
    with pytest.raises(ConfigError, match=r"has gpu=0\.5, cpu=1 for a worker; there is gpu=0, cpu"):
        run(RayExecutor(cluster.address, resources={"gpu": 0.5}), jobs("a"), spec(signs))
    monkeypatch.setattr(ray_executor, "__version__", "0.0.1")
    with pytest.raises(AutoVoiceError, match=r"and this is 0\.0\.1; install the same version"):
        run(RayExecutor(cluster.address), jobs("a"), spec(signs))
    assert not done()


@pytest.mark.slow
def test_pairs_are_converted_and_judged_where_their_files_are_not_seen(cluster, folder):
    for speaker, f0_hz in (("x", 120), ("y", 180), ("z", 150)):
        Path("set", speaker).mkdir(parents=True)
        for take in range(2):
            soundfile.write(f"set/{speaker}/{speaker}{take}.wav", sing(f0_hz).samples, RATE)
    pairs = read_test_set("set")
    how = replace(pair_spec({}), factory="evaluation_kit:judging")
    for place in ("here", "there"):
        Path(place).mkdir()
    here = evaluate_on(InlineExecutor(), how, pairs, Path("here"), name="x")
    there = evaluate_on(RayExecutor(cluster.address), how, pairs, Path("there"), name="x")
    assert there.estimates == here.estimates
    assert there.verification == here.verification
    assert [p.targets for p in there.pairs] == [p.targets for p in here.pairs]
    assert contents("there") == contents("here")


def contents(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_features_and_parallel_speech_are_made_where_their_files_are_not_seen(
    cluster, folder, monkeypatch
):
    pytest.importorskip("torch", reason="needs the extra train")
    from auto_voice.training import features
    from auto_voice.training import speech_synthesis as speech
    from auto_voice.training.data import Utterance

    without_models(monkeypatch.setattr)
    for kind, factory in ((features.Models, "extracting"), (speech.Sources, "speaking")):
        monkeypatch.setattr(kind, "spec", factory_of(kind.spec, f"ray_kit:{factory}"))

    Path("space").write_text("space")
    Path("voices").mkdir()
    for number, name in enumerate(("af_one", "am_two", "bf_three", "bm_four")):
        np.full((4, speech.STYLE_SIZE), number, np.float32).tofile(f"voices/{name}.bin")
    Path("graph").write_text("graph")
    Path("text").write_text("a cat sat.\na dog ran.\na bird flew.\n")
    utterances = []
    for number in range(40):
        path = Path(f"{number}.wav")
        path.write_text("bad" if number == 7 else str(number))
        utterances.append(Utterance(path, "x", "x", parallel="p"))
    models = features.Models(None, Path("space"))
    files = (Path(name) for name in ("graph", "vocabulary", "voices", "text"))
    sources = speech.Sources(*files, "kokoro@1")
    for place, executor in (("here", InlineExecutor()), ("there", RayExecutor(cluster.address))):
        failures = features.extract(utterances, Path(place), models, executor=executor)
        assert failures == {Path("7.wav"): "7.wav is bad"}
        made = speech.make(sources, Path(f"{place}-speech"), 1.0, executor=executor)
        assert made[0] == 18
    assert len(contents("here")) == 39
    assert contents("there") == contents("here")
    assert contents("there-speech") == contents("here-speech")


def factory_of(own: Callable[..., WorkerSpec], factory: str) -> Callable[..., WorkerSpec]:
    return lambda *given: replace(own(*given), factory=factory)


@pytest.mark.slow
def test_a_killed_node_and_killed_workers_lose_nothing(cluster, folder, signs):
    made = jobs("hang-on-b:sign", "hang-on-b:sign", "word", "word", "die-once:died", "die")

    def kill() -> None:
        wait_for(signs / "sign")
        cluster.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    statuses = run(RayExecutor(cluster.address), made, spec(signs))
    killer.join()
    assert statuses.pop("5") == "lost"
    assert set(statuses.values()) == {"done"}
    assert set(done()) == {"0", "1", "2", "3", "4"}
    assert {line["node"] for line in done().values()} == {"a"}


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch):
    pytest.importorskip("ray", reason="needs the extra ray")
    with socket.socket() as taken:  # Bound and never listening.
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for form in (address, f"ray://{address}"):
            with pytest.raises(ConfigError, match=f"no Ray cluster answers at {form} .*--address"):
                list(RayExecutor(form).run(WorkerSpec("ray_kit:copying"), [{}]))
        # A head that was killed leaves the file with its address.
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray_executor, "_last_started", lambda: address)
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at {address}"):
            list(RayExecutor("auto").run(WorkerSpec("ray_kit:copying"), [{}]))
    with pytest.raises(ConfigError, match="'head' is no address of a Ray cluster; give auto"):
        list(RayExecutor("head").run(WorkerSpec("ray_kit:copying"), [{}]))


def test_a_file_that_cannot_be_sent_fails_its_job_and_not_the_run(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(ray_executor, "_bytes_of", refuse)
    monkeypatch.chdir(tmp_path)
    (job,) = jobs("word")
    crew = ray_executor._Crew(SimpleNamespace(put=None), spec(tmp_path), {"CPU": 1.0}, 1)
    hand = ray_executor._Hand(None, 0, blind={str(tmp_path / "in")})
    ((record, outcome),) = crew._give(hand, ray_executor._Task(job.record()))
    assert record == job.record()
    text = f"{tmp_path}/in/0.txt cannot be read (Permission denied)."
    assert outcome == {"status": "failed", "error": text}
    assert crew.idle == [hand]


def test_what_a_killed_worker_leaves_on_its_node_is_deleted_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    living, lock = ray_executor._own_folder()
    killed = tmp_path / f"{ray_executor.SCRATCH}killed"
    (killed / "job").mkdir(parents=True)
    (killed / "job" / "talk.wav").touch()
    (killed / "lock").touch()
    mine, own = ray_executor._own_folder()
    assert set(tmp_path.iterdir()) == {living, mine}
    lock.release()
    own.release()


def test_locks_of_other_users_and_links_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder, elsewhere = tmp_path / f"{ray_executor.SCRATCH}link", tmp_path / "elsewhere"
    for made in (folder, elsewhere):
        made.mkdir()
    (folder / "lock").symlink_to(precious)
    (elsewhere / "lock").write_text("theirs")
    (tmp_path / f"{ray_executor.SCRATCH}folder").symlink_to(elsewhere)
    mine, own = ray_executor._own_folder()
    own.release()
    assert precious.read_text() == "mine"
    assert (folder / "lock").is_symlink()
    assert (elsewhere / "lock").read_text() == "theirs"
    monkeypatch.setattr(os, "getuid", lambda: mine.stat().st_uid + 1)
    assert not ray_executor._mine(mine / "lock")


def test_a_batch_leaves_the_markers_of_others_that_are_running(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    here, old = ray_executor._here(), ray_executor.MARKER_SECONDS + 60
    running, killed, elsewhere, forgotten = (
        tmp_path / f"{MARKER}{name}"
        for name in (f"{here}-{os.getppid()}-x", f"{here}-{ended.pid}-x", "far-1-x", "far-2-x")
    )
    for marker in (running, killed, elsewhere, forgotten):
        marker.touch()
    os.utime(forgotten, (time.time() - old,) * 2)
    first, second = (
        ray_executor._Parcels(SimpleNamespace(put=None), spec(tmp_path)) for _ in range(2)
    )
    mine = [Path(each._marker(str(tmp_path))) for each in (first, second)]
    assert set(tmp_path.iterdir()) == {running, elsewhere, *mine}
    first.end()
    assert set(tmp_path.iterdir()) == {running, elsewhere, mine[1]}


def test_without_ray_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"ray is not installed; .*auto-voice\[ray\]"):
        list(RayExecutor().run(WorkerSpec("ray_kit:copying"), [{}]))
    # Where nothing is left to do, nothing is asked for.
    assert list(RayExecutor().run(WorkerSpec("ray_kit:copying"), [])) == []


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def test_the_examples_run_the_ray_that_is_pinned():
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    image = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert re.search(rf"^ARG RAY={re.escape(pinned)}-py3\d+$", image, re.M)
    assert f"'ray[default]=={pinned}'" in (DEPLOY / "cluster.yaml").read_text(encoding="utf-8")
    assert example("kuberay.yaml")["spec"]["rayVersion"] == pinned


def test_the_example_for_ray_up_is_one_that_ray_takes():
    pytest.importorskip("ray", reason="needs the extra ray")
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = example("cluster.yaml")
    made = prepare_config(given)
    validate_config(made)
    workers = made["available_node_types"]["worker"]
    # A worker's needs are compared with living nodes, and the head is to convert nothing.
    assert workers["min_workers"] >= 1
    assert made["available_node_types"][made["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("--ray-client-server-port=10001" in c for c in made["head_start_ray_commands"])


def test_the_example_for_kuberay_has_what_its_schema_and_its_comments_say():
    made = example("kuberay.yaml")
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayCluster")
    spec, name = made["spec"], made["metadata"]["name"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"containerPort": 10001, "name": "client"} in head["ports"]
    (group,) = spec["workerGroupSpecs"]
    assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["image"] == head["image"]
    assert worker["resources"]["requests"] == worker["resources"]["limits"]
    assert spec["authOptions"]["mode"] == "token"
    text = (DEPLOY / "kuberay.yaml").read_text(encoding="utf-8")
    assert f"service/{name}-head-svc 10001" in text
    assert f"get secret {name} " in text


def test_resources_are_amounts_by_name():
    assert parse_resources(["gpu=0.5,cpu=4", "a100=1"]) == {"gpu": 0.5, "cpu": 4.0, "a100": 1.0}
    for text in ("gpu", "gpu=some", "gpu=0", "=1", "gpu=-1", "gpu=inf"):
        with pytest.raises(ConfigError, match="is no resource; write NAME=AMOUNT"):
            parse_resources([text])
