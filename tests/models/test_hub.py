"""Models to and from the Hugging Face Hub, against a local server that speaks its API."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from auto_voice.cli.main import main
from auto_voice.models import ModelRegistry
from auto_voice.models.registry.hub import Repository, cache_folder
from auto_voice.models.registry.sources import HubSource
from hub_server import TOKEN, FakeHub, hub_server
from registry_kit import file_entry, model_entry, tone_catalog, write_catalog, write_tone

# The hub's own library does what its HTTP client advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/my-vocoder"
CARD = (
    "Trained on 12 hours of LibriTTS (CC BY 4.0).\n\n| figure | value |\n|---|---|\n| SECS | 0.8 |"
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Another protocol of its own.
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str) -> tuple[int, str, str]:
        code = main(list(args))
        return code, *capsys.readouterr()

    return run


def vocoder(folder: Path, version: str = "1.0", seed: int = 0) -> Path:
    """A catalog of one's own: a Griffin-Lim vocoder with a file, and a card beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    values = np.random.default_rng(seed).standard_normal((80, 513), np.float32)
    save_file({"basis": values}, weights)
    (folder / "card.md").write_text(CARD, encoding="utf-8")
    entry = {
        "architecture": "griffin_lim",
        "licence": "MIT",
        "params": {"sample_rate": 22050, "hop_samples": 256, "bands": 80},
        **file_entry(weights),
    }
    models = {"my_vocoder": model_entry({version: entry}, kind="vocoder")}
    return write_catalog(folder / "mine.yaml", models)


def push(run: Any, catalog: Path, *more: str) -> tuple[int, str, str]:
    command = ["models", "push", "my_vocoder", f"hf://{REPO}", "--config", str(catalog)]
    return run(*command, "--model-dir", str(catalog.parent / "models"), *more)


def add(run: Any, folder: Path, *args: str) -> tuple[int, str, str]:
    return run("models", "add", *args, "--model-dir", str(folder))


def test_what_one_publishes_another_takes_and_pins(hub, signed_in, run, tmp_path) -> None:
    catalog = vocoder(tmp_path / "mine")
    code, told, errors = push(run, catalog)
    assert code == 0, errors
    sha, files = hub.files(REPO, "main")
    assert f"at commit {sha}" in told
    assert set(files) == {"README.md", "autovoice.yaml", "1.0/weights.safetensors"}
    weights = (tmp_path / "mine" / "weights.safetensors").read_bytes()
    assert files["1.0/weights.safetensors"] == weights
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["library_name"]) == ("mit", "auto_voice")
    assert CARD in card
    assert f"autovoice models add hf://{REPO}" in card

    other = tmp_path / "other"
    code, told, errors = add(run, other, f"hf://{REPO}")
    assert code == 0, errors
    assert told == f"my_vocoder@1.0: {other / 'my_vocoder' / '1.0'}\n"
    version = ModelRegistry(other).version("my_vocoder")
    assert version.files[0].sources == ((f"hf://{REPO}@{sha}/1.0/weights.safetensors",),)
    assert version.files[0].sha256 == hashlib.sha256(weights).hexdigest()
    assert version.params == {"sample_rate": 22050, "hop_samples": 256, "bands": 80}
    assert add(run, other, f"hf://{REPO}")[0] == 0, "again it is known already"


def test_a_later_version_is_published_beside_the_first(hub, signed_in, run, tmp_path) -> None:
    assert push(run, vocoder(tmp_path / "a"))[0] == 0
    assert push(run, vocoder(tmp_path / "b", "1.1", seed=1))[0] == 0
    code, told, errors = add(run, tmp_path / "other", f"hf://{REPO}")
    assert code == 0, errors
    assert [line.partition(":")[0] for line in told.splitlines()] == [
        "my_vocoder@1.0", "my_vocoder@1.1",
    ]  # fmt: skip
    code, _, errors = push(run, vocoder(tmp_path / "c", "1.1", seed=2))
    assert code == 2
    assert "holds another my_vocoder@1.1 already" in errors


def test_a_dry_run_shows_all_and_connects_to_nobody(hub, run, tmp_path) -> None:
    code, told, errors = push(run, vocoder(tmp_path / "mine"), "--dry-run")
    assert (code, errors) == (0, "nothing was uploaded\n")
    assert "1.0/weights.safetensors" in told
    assert "license: mit" in told
    assert "architecture: griffin_lim" in told
    assert hub.asked == []


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_who_may_not_write_is_told(hub, signed_in, run, tmp_path, monkeypatch, token) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, errors = push(run, vocoder(tmp_path / "mine"))
    assert code == 2
    assert "token" in errors
    assert "Traceback" not in errors
    assert hub.files(REPO, "main") is None


def test_a_hub_that_is_away_is_told(signed_in, run, tmp_path, monkeypatch) -> None:
    from auto_voice.models.registry.transfer import SystemClock

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(SystemClock, "sleep", lambda self, seconds: None)
    code, _, errors = push(run, vocoder(tmp_path / "mine"))
    assert code == 2
    assert "check the connection" in errors


def test_a_model_without_a_card_is_not_published(hub, signed_in, run, tmp_path) -> None:
    catalog = vocoder(tmp_path / "mine")
    (tmp_path / "mine" / "card.md").unlink()
    code, _, errors = push(run, catalog)
    assert code == 2
    assert "--card FILE" in errors
    (tmp_path / "text.md").write_text("Of nothing.", encoding="utf-8")
    assert push(run, catalog, "--card", str(tmp_path / "text.md"))[0] == 0


def test_checkpoints_are_published_as_safetensors(tmp_path) -> None:
    from auto_voice.models.registry.hub import prepare

    registry = ModelRegistry(tmp_path, config=tone_catalog(tmp_path / "c"))
    entry = registry.catalog.entry("hifigan_universal")
    version = entry.versions["1.0"]
    (file,) = version.files
    derived = tmp_path / f"{file.file}.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, derived)
    made = prepare(entry, version, {file.file: derived}, REPO, CARD)
    (place,) = made.files
    assert place == "1.0/generator_universal.safetensors"
    fields = made.models["hifigan_universal"]["versions"]["1.0"]["files"][0]
    assert fields["sha256"] == hashlib.sha256(derived.read_bytes()).hexdigest()
    raw = tmp_path / file.file
    raw.write_bytes(b"pickle")
    with pytest.raises(Exception, match="may hold code"):
        prepare(entry, version, {file.file: raw}, REPO, CARD)


# Revisions


def test_a_branch_or_tag_of_any_repository_is_pinned(hub, run, tmp_path) -> None:
    data = write_tone(tmp_path / "w.wav").read_bytes()
    first = hub.commit("some/repo", {"w.wav": data}, "v1", "feature")
    hub.commit("some/repo", {"w.wav": b"other"})
    options = ["--architecture", "sample", "--licence", "MIT"]
    code, _, errors = add(run, tmp_path / "m", "theirs", "hf://some/repo@v1/w.wav", *options)
    assert code == 0, errors
    version = ModelRegistry(tmp_path / "m").version("theirs")
    assert version.files[0].sources == ((f"hf://some/repo@{first}/w.wav",),)
    code, _, errors = add(run, tmp_path / "m", "more", "hf://some/repo@v9/w.wav", *options)
    assert code == 2
    assert "shows no v9 of some/repo" in errors


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf://me/nothing", "shows no main of me/nothing"),
        ("hf://some/repo@v9", "shows no v9 of some/repo"),
        ("hf://some/repo", "holds no autovoice.yaml"),
        ("hf://some", "is no repository"),
        ("hf://some/repo@../x", "is no repository"),
    ],
)
def test_what_cannot_be_added_is_told(hub, run, tmp_path, address, told) -> None:
    hub.commit("some/repo", {"w.safetensors": b"x"})
    code, _, errors = add(run, tmp_path, address)
    assert code == 2
    assert told in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "source",
    ["/etc/hostname", "../../../etc/hostname", "~/x", "file:///etc/hostname", "package://x"],
)
def test_a_repository_may_not_name_files_of_this_machine(hub, run, tmp_path, source) -> None:
    entry = {
        "architecture": "griffin_lim", "licence": "MIT", "file": "w.safetensors",
        "sha256": "0" * 64, "bytes": 5, "sources": [source],
    }  # fmt: skip
    models = {"theirs": model_entry({"1.0": entry}, kind="vocoder")}
    hub.commit("some/repo", {"autovoice.yaml": yaml.safe_dump({"models": models}).encode()})
    code, _, errors = add(run, tmp_path / "m", "hf://some/repo")
    assert code == 2
    assert "a file of this machine" in errors
    assert not (tmp_path / "m" / "catalog.yaml").exists()


def test_a_repository_cannot_replace_what_is_known(hub, run, tmp_path) -> None:
    entry = {
        "architecture": "hifigan", "licence": "MIT", "file": "w.safetensors",
        "sha256": "0" * 64, "bytes": 5, "sources": ["w.safetensors"],
    }  # fmt: skip
    models = {"hifigan_universal": model_entry({"1.0": entry}, kind="vocoder")}
    hub.commit("some/repo", {"autovoice.yaml": yaml.safe_dump({"models": models}).encode()})
    code, _, errors = add(run, tmp_path / "m", "hf://some/repo")
    assert code == 2
    assert "there is another hifigan_universal@1.0 already" in errors


# The hub's cache


def in_cache(repo: str, commit: str, file: str, data: bytes) -> Path:
    """A file as the hub's own library leaves it."""
    folder = cache_folder() / f"models--{repo.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link = folder / "snapshots" / commit / file
    link.parent.mkdir(parents=True, exist_ok=True)
    link.write_bytes(data)
    return link


def hub_catalog(folder: Path, commit: str, data: bytes) -> Path:
    entry = {
        "architecture": "griffin_lim", "licence": "MIT", "file": "w.safetensors",
        "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data),
        "sources": [f"hf://some/repo@{commit}/w.safetensors"],
    }  # fmt: skip
    models = {"theirs": model_entry({"1.0": entry}, kind="vocoder")}
    return write_catalog(folder / "mine.yaml", models)


@pytest.mark.parametrize("offline", [False, True])
def test_files_of_the_hubs_cache_are_used(hub, tmp_path, offline) -> None:
    data, commit = b"weights" * 1000, "1" * 40
    link = in_cache("some/repo", commit, "w.safetensors", data)
    registry = ModelRegistry(
        tmp_path / "m", config=hub_catalog(tmp_path, commit, data), offline=offline, progress=False
    )
    assert registry.pull("theirs")["w.safetensors"].read_bytes() == data
    assert hub.asked == []
    source = registry.store.metadata("theirs", "1.0")["files"]["w.safetensors"]["source"]
    assert source == str(link)


def test_a_damaged_file_of_the_cache_is_not_used(hub, tmp_path) -> None:
    data = b"weights" * 1000
    commit = hub.commit("some/repo", {"w.safetensors": data})
    link = in_cache("some/repo", commit, "w.safetensors", data)
    link.write_bytes(b"damaged")
    config = hub_catalog(tmp_path, commit, data)
    registry = ModelRegistry(tmp_path / "m", config=config, progress=False)
    assert registry.pull("theirs")["w.safetensors"].read_bytes() == data
    assert len(hub.asked) == 1


def test_the_cache_is_where_the_library_says(monkeypatch, tmp_path) -> None:
    library = pytest.importorskip("huggingface_hub")
    data, commit = b"weights", "1" * 40
    link = in_cache("some/repo", commit, "w.safetensors", data)
    found = library.try_to_load_from_cache(
        "some/repo", "w.safetensors", cache_dir=cache_folder(), revision=commit
    )
    assert Path(found) == link
    from auto_voice.models.registry.hub import cached_file

    assert cached_file(HubSource("some/repo", commit, "w.safetensors")) == link
    for name, folder in (("HF_HUB_CACHE", "a"), ("HF_HOME", "b")):
        monkeypatch.setenv(name, str(tmp_path / folder))
        assert tmp_path / folder in (cache_folder(), cache_folder().parent)
        monkeypatch.delenv(name)


def test_a_repository_is_added_offline_from_the_cache(hub, signed_in, run, tmp_path) -> None:
    assert push(run, vocoder(tmp_path / "mine"))[0] == 0
    sha, files = hub.files(REPO, "main")
    for name, data in files.items():
        in_cache(REPO, sha, name, data)
    refs = cache_folder() / "models--me--my-vocoder" / "refs"
    refs.mkdir()
    (refs / "main").write_text(sha)
    asked = len(hub.asked)
    code, _, errors = add(run, tmp_path / "other", f"hf://{REPO}", "--offline")
    assert code == 0, errors
    assert len(hub.asked) == asked
    code, _, errors = add(run, tmp_path / "other", f"hf://{REPO}@v7", "--offline")
    assert code == 2
    assert "the network is switched off" in errors


def test_addresses_of_repositories() -> None:
    assert Repository.of("hf://a/b") == Repository("a/b", "main")
    assert Repository.of("hf://a/b@refs/pr/1") == Repository("a/b", "refs/pr/1")
    assert json.dumps(vars(Repository.of("hf://a/b@v1.0"))) == '{"repo": "a/b", "revision": "v1.0"}'
