"""The wheel as a user installs it: in a virtual environment where ``src`` cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import soundfile

from auto_voice import __version__
from auto_voice.models.mock_models import mock_sample

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True, env=environment)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The ``bin`` folder of a virtual environment that holds the wheel.

    Its dependencies are those of the running one: the folder is put on the path by a ``.pth`` file,
    and ``.pth`` files inside that folder, such as the one of an editable install, are not read.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    # Python 3.10 has no scheme of that name; there, that of a venv is the platform's own.
    own = "nt" if sys.platform == "win32" else "posix_prefix"
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else own
    site = Path(sysconfig.get_path("purelib", scheme, vars=paths))
    scripts = Path(sysconfig.get_path("scripts", scheme, vars=paths))
    command = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install"]
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *options, str(wheel)], check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


@pytest.fixture
def run(installed, tmp_path):
    def call(program: str, *args: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
        command = [str(installed / program), *args]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_the_wheel_holds_what_belongs_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "auto_voice/py.typed" in names
    assert "auto_voice/config/models.yaml" in names
    info = f"auto_voice-{__version__}.dist-info/"
    assert all(name.startswith(("auto_voice/", info)) for name in names)
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".pth", ".wav"))]
    assert wheel.stat().st_size < 40e6


def test_the_installed_package_is_the_wheels_and_complete(run):
    code = (
        "import json, pathlib, auto_voice\n"
        "from auto_voice.models import ModelRegistry\n"
        "registry = ModelRegistry('models', offline=True)\n"
        "bundled = [v for v in registry.catalog.versions() if v.files and all(\n"
        "    f.sources[0][0].startswith('package://') for f in v.files)]\n"
        "for version in bundled: registry.pull(version.name, version.version)\n"
        "print(json.dumps({'file': auto_voice.__file__, 'version': auto_voice.__version__,\n"
        "    'bundled': sorted(v.key for v in bundled), 'models': len(registry.catalog.models)}))"
    )
    found = json.loads(run("python", "-c", code))
    assert Path(found["file"]).is_relative_to(Path(sys.prefix)) is False
    assert ROOT not in Path(found["file"]).parents
    assert found["version"] == __version__
    assert found["models"] >= 10
    assert {key.partition("@")[0] for key in found["bundled"]} >= {
        "content_compact",
        "converter_compact",
    }


def test_the_installed_command_converts(run, tmp_path):
    for name, f0_hz in (("talk", 120.0), ("friend", 210.0)):
        soundfile.write(tmp_path / f"{name}.wav", mock_sample(f0_hz=f0_hz).samples, 16000)
    assert run("autovoice", "--version") == f"autovoice {__version__}\n"
    out = run("autovoice", "convert", "talk.wav", "--voice", "friend.wav", "--mock", "--json")
    assert json.loads(out)["samples"] == 6 * 22050


def test_changelog_and_package_agree_on_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [line.split()[1] for line in changelog.splitlines() if line.startswith("## ")]
    released = headings[1:] if headings[0] == "Unreleased" else headings
    assert released[0] == __version__
    assert "Unreleased" not in released
