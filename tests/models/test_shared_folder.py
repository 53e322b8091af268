"""Model folders that several users share, and damage that size and time do not betray."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from auto_voice import settings
from auto_voice.errors import StoreError
from auto_voice.filesystem import atomic_write, write_json
from auto_voice.models import ModelRegistry
from auto_voice.models.registry.architectures import ARCHITECTURES, Architecture
from auto_voice.models.registry.catalog import Pins
from auto_voice.models.registry.maintenance import verify
from registry_kit import model_entry, version_entry, write_catalog

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
NOBODY = 65534
VALUES = np.arange(1000, dtype=np.float32)


@pytest.fixture(autouse=True)
def _toy_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture whose checkpoint is raw numbers that are converted to safetensors."""
    toy = ModuleType("toy_architecture")

    def convert_checkpoint(path: Path) -> dict[str, np.ndarray]:
        return {"values": np.frombuffer(path.read_bytes(), np.float32)}

    def build(files: dict[str, Path], version: object, device: str) -> np.ndarray:
        from safetensors.numpy import load_file

        path = files["numbers.bin"]
        foreign = path.suffix == ".bin"
        return (convert_checkpoint(path) if foreign else load_file(path))["values"]

    toy.convert_checkpoint = convert_checkpoint  # type: ignore[attr-defined]
    toy.build = build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_architecture", toy)
    table = {**ARCHITECTURES, "sample": Architecture("toy_architecture", "sample", converts=True)}
    for module in ("registry.architectures", "model_registry"):
        monkeypatch.setattr(f"auto_voice.models.{module}.ARCHITECTURES", table)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own is for its owner alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def umask() -> Iterator[None]:
    """What most systems give their users."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def registry(folder: Path) -> ModelRegistry:
    source, config = folder / "source" / "numbers.bin", folder / "mine.yaml"
    if not config.exists():
        source.parent.mkdir()
        source.write_bytes(VALUES.tobytes())
        write_catalog(config, {"numbers": model_entry({"1": version_entry(source)})})
    return ModelRegistry(folder / "models", config=config, progress=False)


@contextmanager
def as_another_user() -> Iterator[None]:
    """Permissions hold for the block: root is not asked for any."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        if not os.access(settings.__file__, os.R_OK, effective_ids=True):
            pytest.skip("another user cannot read the folder that this checkout lies in")
        yield
    finally:
        os.seteuid(0)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_whatever_the_writer_does_the_umask_decides(
    tmp_path: Path, mask: int, expected: int
) -> None:
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "private") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        write_json(tmp_path / "record.json", {})
    finally:
        os.umask(before)
    assert mode(tmp_path / "private") == mode(tmp_path / "record.json") == expected


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(target) as temporary:
        temporary.with_name("missing").rename(temporary)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("umask")
def test_every_file_of_the_model_folder_follows_the_umask(shared: Path) -> None:
    registry(shared).load("numbers")
    registry(shared).pin("numbers")
    files = [path for path in (shared / "models").rglob("*") if path.is_file()]
    assert shared / "models/numbers/1/numbers.bin.safetensors" in files
    assert {mode(path) for path in files} == {0o644}


@pytest.mark.usefixtures("umask")
def test_a_second_user_loads_what_the_first_one_installed(shared: Path) -> None:
    registry(shared).load("numbers")
    with as_another_user():
        second = registry(shared)
        np.testing.assert_array_equal(second.load("numbers"), VALUES)
        assert verify(second.store, second.version("numbers")).ok


@pytest.mark.usefixtures("umask")
def test_a_conversion_that_only_its_maker_can_read_is_made_anew_in_memory(shared: Path) -> None:
    registry(shared).load("numbers")
    made = shared / "models/numbers/1/numbers.bin.safetensors"
    made.chmod(0o600 if os.geteuid() == 0 else 0)
    with as_another_user():
        second = registry(shared)
        np.testing.assert_array_equal(second.load("numbers"), VALUES)
        report = verify(second.store, second.version("numbers"))
    assert not report.ok
    assert "cannot be read by this user (Permission denied)" in report.problems[0]


@pytest.mark.usefixtures("umask")
def test_an_original_that_cannot_be_read_is_one_sentence(shared: Path) -> None:
    found = registry(shared)
    found.pull("numbers").values()
    path = shared / "models/numbers/1/numbers.bin"
    path.chmod(0o600 if os.geteuid() == 0 else 0)
    with as_another_user(), pytest.raises(StoreError, match="Permission denied"):
        registry(shared).load("numbers")


# Damage


def flip_a_byte(path: Path) -> None:
    """Other content, same size, time and inode: what a bad disk does."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_damage_before_the_first_load_is_found_and_repaired_before_it_is_converted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = registry(tmp_path)
    flip_a_byte(found.path("numbers"))
    np.testing.assert_array_equal(found.load("numbers"), VALUES)
    assert "numbers.bin does not match its sha256" in caplog.text
    assert verify(found.store, found.version("numbers")).ok
    record = found.store.metadata("numbers", "1")
    assert record is not None
    entry = record["derived"]["numbers.bin.safetensors"]
    assert entry["made_from_sha256"] == record["files"]["numbers.bin"]["sha256"]


def test_damage_is_found_where_the_conversion_happens_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry(tmp_path)
    flip_a_byte(found.path("numbers"))

    def refuse(*_: object) -> None:
        raise StoreError("read-only")

    monkeypatch.setattr(found.store, "add_derived", refuse)
    np.testing.assert_array_equal(found.load("numbers"), VALUES)


@pytest.mark.parametrize("way", ["repair", "force"])
def test_a_damaged_conversion_is_found_by_verify_and_gone_after_repair(
    tmp_path: Path, way: str
) -> None:
    found = registry(tmp_path)
    found.load("numbers")
    version = found.version("numbers")
    flip_a_byte(tmp_path / "models/numbers/1/numbers.bin.safetensors")
    report = verify(found.store, version)
    assert "numbers.bin.safetensors, made from numbers.bin, does not match" in report.problems[0]
    if way == "repair":
        found.loader.repair(version)
    else:
        found.pull("numbers", force=True)
    assert verify(found.store, version).ok
    found.unload()
    np.testing.assert_array_equal(found.load("numbers"), VALUES)


def test_a_conversion_whose_origin_was_only_assumed_is_made_anew(tmp_path: Path) -> None:
    """Earlier versions recorded the hash that the original should have had."""
    found = registry(tmp_path)
    found.load("numbers")
    folder = tmp_path / "models/numbers/1"
    made = folder / "numbers.bin.safetensors"
    flip_a_byte(made)
    record = found.store.metadata("numbers", "1")
    assert record is not None
    entry = record["derived"][made.name]
    entry["of_sha256"] = entry.pop("made_from_sha256")
    write_json(folder / "metadata.json", record)
    found.unload()
    np.testing.assert_array_equal(found.load("numbers"), VALUES)


# Pins


def test_the_lock_file_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry(tmp_path)
    found.pin("numbers")
    reads: list[Path] = []
    real = Path.read_text

    def counted(path: Path, *args: object, **options: object) -> str:
        reads.append(path)
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", counted)
    fresh = registry(tmp_path)
    for _ in range(10):
        assert fresh.version("numbers").version == "1"
    assert reads.count(fresh.pins.path) == 1
    Pins(fresh.model_dir).write("numbers", None)
    assert fresh.pins.records() == {}
    assert reads.count(fresh.pins.path) == 3  # the writer's own, then ours of what changed
