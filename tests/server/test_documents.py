"""The lines of docs/api.md run against a server, and docs/serving.md names options that exist."""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from auto_voice.audio.formats import AUDIO_SUFFIXES
from auto_voice.cli import main
from auto_voice.settings import SETTINGS

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def folder(tmp_path, talk, friend):
    place = tmp_path / "user"
    place.mkdir()
    shutil.copy(talk, place / "talk.wav")
    shutil.copy(friend, place / "friend.wav")
    return place


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_the_curl_lines_work_one_after_the_other(live, folder):
    blocks = [body for language, body in FENCE.findall(API) if language == "sh"]
    assert len(blocks) >= 6
    script = "set -euo pipefail\n" + "\n".join(blocks).replace(ADDRESS, live.url)
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for made in ("talk_as_friend.wav", "out.flac", "converted.zip", "first.mp3", "as_friend.wav"):
        assert (folder / made).stat().st_size > 1000


@pytest.mark.slow
def test_the_python_lines_work(live, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (body,) = [body for language, body in FENCE.findall(API) if language == "python"]
    exec(compile(body.replace(ADDRESS, live.url), "api.md", "exec"), {})
    assert (folder / "first.wav").stat().st_size > 1000
    assert "100 %" in capsys.readouterr().out


def test_the_statuses_are_those_of_the_errors(live):
    document = live.app.openapi()
    named = set(re.findall(r"\b([45]\d\d)\b", API[API.index("## What can go wrong") :]))
    given = {
        status
        for path in document["paths"].values()
        for operation in path.values()
        for status in operation["responses"]
        if status[0] in "45"
    }
    assert given <= named


def test_the_page_offers_every_kind_of_recording():
    page = (ROOT / "src" / "auto_voice" / "server" / "page" / "index.html").read_text("utf-8")
    accepted = re.findall(r'accept="([^"]*audio[^"]*)"', page)
    assert len(accepted) == 2
    assert all(set(list_.split(",")) >= AUDIO_SUFFIXES for list_ in accepted)


SEVERAL = ROOT / "deploy" / "several"


def arguments_of(command: list[str]) -> dict[str, object]:
    """What `autovoice` understands of a container's command; raises for what it does not."""
    program, name, *rest = command
    assert program == "autovoice"
    found = main.cli.get_command(None, name)
    return found.make_context(name, rest).params


def test_the_compose_file_starts_what_there_is_and_mounts_what_it_names():
    read = yaml.safe_load((SEVERAL / "compose.yaml").read_text(encoding="utf-8"))
    services = read["services"]
    assert set(services) == {"database", "server", "worker", "balancer"}
    balancer = services["balancer"]
    address = balancer["networks"]["inside"]["ipv4_address"]
    (network,) = read["networks"]["inside"]["ipam"]["config"]
    subnet, dynamic = (ipaddress.ip_network(network[key]) for key in ("subnet", "ip_range"))
    assert dynamic.subnet_of(subnet)
    assert ipaddress.ip_address(address) in subnet
    assert ipaddress.ip_address(address) not in dynamic
    server = arguments_of(services["server"]["entrypoint"] + services["server"]["command"])
    assert server["trust_proxy"] == (address,)
    assert server["token_files"][0].name in services["server"]["secrets"]
    worker = arguments_of(services["worker"]["entrypoint"])
    assert (server["workers"], worker["workers"]) == (0, None)
    for service in (services["server"], services["worker"]):
        assert service["deploy"]["replicas"] >= 2
        assert service["build"]["args"]["EXTRAS"] in extras()
        assert service["environment"]["AUTOVOICE_FILES"] == "/shared"
        variables = set(service["environment"]) - {"PGPASSWORD"}
        assert variables <= {setting.variable for setting in SETTINGS.values()}
        assert set(service["depends_on"]) <= set(services)
    for service in services.values():
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            assert source in read["volumes"] or (SEVERAL / source).is_file()
    conf = (SEVERAL / "balancer.conf").read_text(encoding="utf-8")
    assert balancer["ports"][0].endswith(re.search(r"listen (\d+);", conf)[1])
    assert "server server:8000" in conf
    assert conf.count("{") == conf.count("}")


def test_the_kubernetes_example_fits_together():
    text = (SEVERAL / "kubernetes.yaml").read_text(encoding="utf-8")
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}
    pods = {
        name: one["spec"]["template"]
        for (kind, name), one in found.items()
        if kind in ("Deployment", "StatefulSet")
    }
    assert set(pods) == {"autovoice-database", "autovoice-server", "autovoice-worker"}
    settings = found["ConfigMap", "autovoice"]["data"]
    assert set(settings) <= {setting.variable for setting in SETTINGS.values()}
    database = settings["AUTOVOICE_DATABASE"]
    assert ("Service", database.partition("@")[2].partition(":")[0]) in found
    for (kind, name), one in found.items():
        if kind in ("Deployment", "StatefulSet"):
            labels = one["spec"]["selector"]["matchLabels"]
            assert labels == pods[name]["metadata"]["labels"]
        elif kind in ("Service", "PodDisruptionBudget"):
            selector = one["spec"]["selector"]
            chosen = selector.get("matchLabels", selector)
            assert any(pod["metadata"]["labels"] == chosen for pod in pods.values())
    for name in ("autovoice-server", "autovoice-worker"):
        pod = pods[name]["spec"]
        (container,) = pod["containers"]
        params = arguments_of(container["command"] + container["args"])
        mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert settings["AUTOVOICE_FILES"] == mounts["shared"]
        assert str(params["data_dir"]).startswith(mounts["data"])
        assert pod["terminationGracePeriodSeconds"] > params["grace"]
        for volume in pod["volumes"]:
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim is None or ("PersistentVolumeClaim", claim) in found
        if name == "autovoice-server":
            assert str(params["token_files"][0]).startswith(mounts["token"])
            assert params["allow_host"] == ("autovoice",)
    claim = found["PersistentVolumeClaim", "autovoice-shared"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def extras() -> set[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project[project.index("[project.optional-dependencies]") :]
    return set(re.findall(r"^([\w-]+) = \[", section[: section.index("[project.scripts]")], re.M))
