"""The model folder: present or absent, never half; damaged files found, set aside, replaced."""

from __future__ import annotations

import builtins
import errno
import hashlib
import importlib.resources
import io
import json
import lzma
import os
import socket
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from auto_voice import filesystem as disk
from auto_voice.errors import (
    DiskSpaceError,
    IntegrityError,
    ModelUnavailableError,
    OfflineError,
    StoreError,
    UnknownModelError,
    UnsafeFileError,
)
from auto_voice.filesystem import check_name, holder_of
from auto_voice.models.model_loader import ModelLoader
from auto_voice.models.registry import archive as archive_module
from auto_voice.models.registry.archive import export_versions, import_archive
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.registry.maintenance import partials, prune, remove, verify
from auto_voice.models.registry.store import ModelStore
from fault_server import model_file, model_version, random_bytes

DATA = random_bytes(200_000)
NEWER = random_bytes(200_000, seed=1)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    path = tmp_path / "original.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def version(original: Path) -> ModelVersion:
    return model_version(model_file(DATA, original.as_uri()))


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[ModelLoader]:
    with ModelLoader(ModelStore(tmp_path / "models", lock_timeout_s=20)) as running:
        yield running


@pytest.fixture
def installed(loader: ModelLoader, version: ModelVersion) -> Path:
    return loader.ensure(version)["weights.bin"]


def test_an_install_is_described_by_its_completion_record(
    installed: Path, loader: ModelLoader, version: ModelVersion, original: Path
) -> None:
    assert installed == loader.store.root / "toy" / "1.0" / "weights.bin"
    record = loader.store.metadata("toy", "1.0")
    assert record is not None
    entry = record["files"]["weights.bin"]
    assert entry["sha256"] == hashlib.sha256(DATA).hexdigest()
    assert entry["bytes"] == len(DATA)
    assert entry["source"] == original.as_uri()
    assert (record["kind"], record["licence"], record["name"]) == ("vocoder", "MIT", "toy")
    assert loader.store.installed() == [("toy", "1.0")]


def test_building_a_store_touches_nothing(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models")
    assert store.installed() == []
    assert store.lookup(model_version(model_file(DATA))) is None
    assert not store.root.exists()


def test_a_hit_hashes_nothing_locks_nothing_writes_nothing_and_opens_no_socket(
    installed: Path, loader: ModelLoader, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_writes_below(loader.store.root, monkeypatch)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr("auto_voice.models.registry.store.sha256_file", refuse)
    monkeypatch.setattr("auto_voice.models.registry.store.file_lock", refuse)
    assert loader.ensure(version) == {"weights.bin": installed}


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("this must not happen on a cache hit")


def forbid_writes_below(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a read-only disk answers; permissions would not stop a test that runs as root."""
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    real_open, real_os_open, real_mkdir = builtins.open, os.open, os.mkdir

    def guarded_open(file, mode="r", *args, **options):  # type: ignore[no-untyped-def]
        if str(file).startswith(str(root)) and set(mode) & set("wax+"):
            raise read_only
        return real_open(file, mode, *args, **options)

    def guarded_os_open(path, flags, *args, **options):  # type: ignore[no-untyped-def]
        if str(path).startswith(str(root)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise read_only
        return real_os_open(path, flags, *args, **options)

    def guarded_mkdir(path, *args, **options):  # type: ignore[no-untyped-def]
        if str(path).startswith(str(root)):
            raise read_only
        return real_mkdir(path, *args, **options)

    monkeypatch.setattr(builtins, "open", guarded_open)
    monkeypatch.setattr(io, "open", guarded_open)
    monkeypatch.setattr(os, "open", guarded_os_open)
    monkeypatch.setattr(os, "mkdir", guarded_mkdir)


def test_a_copied_cache_is_hashed_once_and_then_trusted_even_read_only(
    installed: Path, version: ModelVersion, loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(installed, ns=(1, 1))
    forbid_writes_below(loader.store.root, monkeypatch)
    store = ModelStore(loader.store.root)
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return disk.sha256_file(path)

    monkeypatch.setattr("auto_voice.models.registry.store.sha256_file", counting)
    with ModelLoader(store) as reader:
        for _ in range(3):
            assert reader.ensure(version) == {"weights.bin": installed}
    assert hashed == [installed]


def test_a_read_only_folder_without_the_model_says_what_to_do(
    tmp_path: Path, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    root.mkdir()
    forbid_writes_below(root, monkeypatch)
    with (
        ModelLoader(ModelStore(root)) as loader,
        pytest.raises(StoreError, match=r"Read-only.*AUTOVOICE_MODEL_DIR"),
    ):
        loader.ensure(version)


def test_a_model_folder_that_is_a_file_says_what_to_do(
    original: Path, version: ModelVersion
) -> None:
    with (
        ModelLoader(ModelStore(original)) as loader,
        pytest.raises(StoreError, match="AUTOVOICE_MODEL_DIR"),
    ):
        loader.ensure(version)


@pytest.mark.parametrize("restore_time", [False, True], ids=["new mtime", "old mtime"])
def test_a_flipped_byte_is_found_set_aside_and_replaced(
    installed: Path, loader: ModelLoader, version: ModelVersion, restore_time: bool
) -> None:
    before = installed.stat()
    damaged = bytearray(DATA)
    damaged[1234] ^= 1
    installed.write_bytes(damaged)
    if restore_time:
        # Rot that leaves size, time and inode alone is what the full hash is for.
        os.utime(installed, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert verify(loader.store, version).problems[0].startswith("weights.bin does not match")
        loader.repair(version)
    assert loader.ensure(version)["weights.bin"].read_bytes() == DATA
    assert verify(loader.store, version).ok
    aside = list((loader.store.root / ".aside").iterdir())
    assert [path.read_bytes() for path in aside] == [bytes(damaged)]


@pytest.mark.parametrize("damage", ["truncated", "missing", "longer"])
def test_a_file_of_the_wrong_size_is_replaced(
    installed: Path, loader: ModelLoader, version: ModelVersion, damage: str
) -> None:
    if damage == "missing":
        installed.unlink()
    else:
        installed.write_bytes(DATA[:10] if damage == "truncated" else DATA + b"x")
    assert verify(loader.store, version).problems
    assert loader.ensure(version)["weights.bin"].read_bytes() == DATA


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "[" * 100_000, "\x00\xff",
        '{"format": 99, "files": {}}',
        '{"format": 1, "files": 3}',
        '{"format": 1, "files": {}, "derived": [1]}',
        '{"format": 1, "files": {}, "derived": {"x": 5}}',
        '{"format": 1, "files": {}, "derived": {"../../x": {"sha256": "0"}}}',
    ],
)  # fmt: skip
def test_damaged_metadata_is_set_aside_and_made_anew(
    installed: Path, loader: ModelLoader, version: ModelVersion, text: str, original: Path
) -> None:
    record = installed.with_name("metadata.json")
    record.write_text(text, encoding="utf-8")
    report = verify(loader.store, version)
    assert not report.ok
    assert "damaged" in report.problems[0]
    assert loader.store.installed() == []
    # The bytes are right, so they are kept: no source is needed.
    original.unlink()
    assert loader.ensure(version) == {"weights.bin": installed}
    assert json.loads(record.read_text())["files"]["weights.bin"]["bytes"] == len(DATA)
    assert len(list((loader.store.root / ".aside").iterdir())) == 1


def test_metadata_that_does_not_describe_the_file_is_not_believed(
    installed: Path, loader: ModelLoader, version: ModelVersion
) -> None:
    record_path = installed.with_name("metadata.json")
    record = json.loads(record_path.read_text())
    record["files"]["weights.bin"] = "yes"
    record_path.write_text(json.dumps(record))
    assert loader.store.lookup(version) is None
    assert loader.ensure(version) == {"weights.bin": installed}


def test_a_catalog_with_another_hash_makes_the_version_absent(
    installed: Path, loader: ModelLoader, original: Path
) -> None:
    original.write_bytes(NEWER)
    newer = model_version(model_file(NEWER, original.as_uri()))
    assert loader.store.lookup(newer) is None
    assert loader.ensure(newer)["weights.bin"].read_bytes() == NEWER


def test_a_mapped_reader_keeps_the_old_bytes_when_a_version_is_replaced(
    installed: Path, loader: ModelLoader, original: Path
) -> None:
    original.write_bytes(NEWER)
    with installed.open("rb") as reader:
        loader.ensure(model_version(model_file(NEWER, original.as_uri())), force=True)
        assert reader.read() == DATA


def test_versions_live_side_by_side(
    installed: Path, loader: ModelLoader, original: Path, version: ModelVersion
) -> None:
    original.write_bytes(NEWER)
    newer = model_version(model_file(NEWER, original.as_uri()), version="2.0")
    assert loader.ensure(newer)["weights.bin"].read_bytes() == NEWER
    assert loader.ensure(version)["weights.bin"].read_bytes() == DATA
    assert loader.store.installed() == [("toy", "1.0"), ("toy", "2.0")]


SHARED = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def sharing(loader: ModelLoader, installed: Path) -> tuple[ModelVersion, Path]:
    """Another version that holds the bytes of ``installed`` under another name, and its file."""
    version = model_version(model_file(DATA, "https://example.org/w", name="same.bin"), name="two")
    with ModelLoader(loader.store, offline=True) as offline:
        return version, offline.ensure(version)["same.bin"]


def test_two_versions_that_share_a_file_hold_it_once_even_if_one_came_offline(
    installed: Path, loader: ModelLoader, sharing: tuple[ModelVersion, Path]
) -> None:
    other, path = sharing
    assert path.read_bytes() == DATA
    assert path.samefile(installed)
    assert path.samefile(loader.store.root / ".blobs" / SHARED)
    assert loader.store.lookup(other) == {"same.bin": path}


@pytest.mark.parametrize("first", ["toy", "two"])
def test_what_one_version_gives_up_the_other_keeps_and_the_last_one_frees(
    installed: Path, loader: ModelLoader, sharing: tuple[ModelVersion, Path], first: str
) -> None:
    blob = loader.store.root / ".blobs" / SHARED
    left = sharing[1] if first == "toy" else installed
    assert remove(loader.store, first, "1.0") < len(DATA)
    assert left.read_bytes() == blob.read_bytes() == DATA
    assert prune(loader.store, older_than_s=-60).freed_bytes == 0
    assert remove(loader.store, "two" if first == "toy" else "toy", "1.0") >= len(DATA)
    assert not blob.exists()


@pytest.mark.parametrize("silent", [False, True], ids=["new mtime", "old mtime"])
@pytest.mark.parametrize("found_in", ["toy", "two"])
def test_damage_that_is_found_in_one_version_is_repaired_in_both(
    installed: Path,
    loader: ModelLoader,
    version: ModelVersion,
    sharing: tuple[ModelVersion, Path],
    found_in: str,
    silent: bool,
) -> None:
    other, path = sharing
    before = path.stat()
    installed.write_bytes(NEWER)
    if silent:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    near = model_version(
        model_file(DATA, version.files[0].sources[0][0], name="same.bin"), name="two"
    )
    first, second = (version, near) if found_in == "toy" else (near, version)
    assert not verify(loader.store, first).ok
    loader.repair(first)
    # The other one needs no source: it sees that its file changed and takes the new blob.
    with ModelLoader(loader.store, offline=True) as offline:
        offline.ensure(second)
    assert installed.read_bytes() == DATA
    assert path.samefile(installed)
    assert verify(loader.store, version).ok
    assert verify(loader.store, other).ok


def test_a_damaged_blob_is_not_taken(installed: Path, loader: ModelLoader, original: Path) -> None:
    installed.write_bytes(NEWER)
    wanted = model_version(model_file(DATA, original.as_uri()), version="1.1")
    assert loader.ensure(wanted)["weights.bin"].read_bytes() == DATA
    far = model_version(model_file(DATA, "https://example.org/w"), version="1.2")
    remove(loader.store, "toy", "1.1")
    with ModelLoader(loader.store, offline=True) as offline, pytest.raises(OfflineError):
        offline.ensure(far)
    assert installed.read_bytes() == NEWER


def test_bytes_that_no_version_names_any_more_go_with_the_install_that_replaced_them(
    installed: Path, loader: ModelLoader, original: Path
) -> None:
    original.write_bytes(NEWER)
    loader.ensure(model_version(model_file(NEWER, original.as_uri())), force=True)
    blobs = list((loader.store.root / ".blobs").iterdir())
    assert [path.name for path in blobs] == [hashlib.sha256(NEWER).hexdigest()]


def test_what_was_installed_without_blobs_is_shared_all_the_same(
    installed: Path, loader: ModelLoader, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 0.1 left a model folder, or a person who copied one."""
    blob = loader.store.root / ".blobs" / SHARED
    blob.unlink()
    blob.parent.rmdir()
    monkeypatch.setattr(socket, "socket", refuse)
    with ModelLoader(ModelStore(loader.store.root), offline=True) as offline:
        assert offline.ensure(version) == {"weights.bin": installed}
        assert not blob.parent.exists()
        far = model_version(model_file(DATA, "https://example.org/w"), version="1.1")
        assert offline.ensure(far)["weights.bin"].samefile(installed)


def test_a_blob_that_lost_its_versions_is_pruned(installed: Path, loader: ModelLoader) -> None:
    installed.unlink()
    assert prune(loader.store).freed_bytes == len(DATA)
    assert list((loader.store.root / ".blobs").iterdir()) == []


def test_without_hard_links_each_version_has_its_own_file(
    loader: ModelLoader, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    for number in ("1.0", "1.1"):
        files = [model_file(DATA, original.as_uri(), name=name) for name in ("a.bin", "b.bin")]
        loader.ensure(model_version(*files, version=number))
    held = [path for path in loader.store.root.rglob("*.bin") if path.read_bytes() == DATA]
    assert len(held) == 4
    assert list((loader.store.root / ".blobs").iterdir()) == []


def test_a_blob_of_somebody_else_is_copied(
    installed: Path, loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux lets nobody link another user's file that they cannot write."""

    def refused(*args: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    far = model_version(model_file(DATA, "https://example.org/w"), name="two")
    with ModelLoader(loader.store, offline=True) as offline:
        path = offline.ensure(far)["weights.bin"]
    assert path.read_bytes() == DATA
    assert not path.samefile(installed)


def test_an_import_shares_what_is_here_already(
    installed: Path, loader: ModelLoader, version: ModelVersion, tmp_path: Path
) -> None:
    export_versions(loader.store, [version], tmp_path / "models.tar")
    other = ModelStore(tmp_path / "elsewhere")
    two = model_version(version.files[0], name="two")
    with ModelLoader(other) as there:
        path = there.ensure(two)["weights.bin"]
    import_archive(other, tmp_path / "models.tar", lambda name, number: version)
    assert path.samefile(other.root / "toy" / "1.0" / "weights.bin")


def test_two_files_of_a_version_may_hold_the_same_bytes(
    loader: ModelLoader, original: Path
) -> None:
    files = [model_file(DATA, original.as_uri(), name=name) for name in ("a.bin", "b.bin")]
    paths = loader.ensure(model_version(*files))
    assert [paths[name].read_bytes() for name in ("a.bin", "b.bin")] == [DATA, DATA]
    assert paths["a.bin"].samefile(paths["b.bin"])


def test_a_version_is_absent_until_all_its_files_are_there(
    loader: ModelLoader, original: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.bin"
    files = (
        model_file(DATA, original.as_uri(), name="a.bin"),
        model_file(NEWER, second.as_uri(), name="b.bin"),
    )
    with pytest.raises(ModelUnavailableError, match=r"second\.bin cannot be read"):
        loader.ensure(model_version(*files))
    assert loader.store.installed() == []
    assert not (loader.store.root / "toy").exists()
    second.write_bytes(NEWER)
    original.unlink()
    # The first file was complete and hashed; it is not asked for again.
    assert set(loader.ensure(model_version(*files))) == {"a.bin", "b.bin"}


def test_force_fetches_again(
    installed: Path, loader: ModelLoader, version: ModelVersion, original: Path
) -> None:
    inode = installed.stat().st_ino
    installed.write_bytes(NEWER)
    assert loader.ensure(version, force=True)["weights.bin"].read_bytes() == DATA
    assert installed.stat().st_ino != inode


def test_offline_names_the_file_and_the_commands(
    loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    wanted = model_version(model_file(DATA, "https://example.org/w", "hf://a/b@" + "0" * 40 + "/w"))
    with ModelLoader(loader.store, offline=True) as offline, pytest.raises(OfflineError) as caught:
        offline.ensure(wanted)
    message = str(caught.value)
    assert "weights.bin (0.2 MB)" in message
    for command in ("pull toy@1.0", "export toy@1.0", "import models.tar"):
        assert f"autovoice models {command}" in message


def test_offline_uses_local_sources_and_skips_the_others(
    loader: ModelLoader, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", refuse)
    wanted = model_version(model_file(DATA, "https://example.org/w", str(original)))
    with ModelLoader(loader.store, offline=True) as offline:
        assert offline.ensure(wanted)["weights.bin"].read_bytes() == DATA


def test_offline_with_a_damaged_file_says_that_it_needs_the_network(
    installed: Path, loader: ModelLoader
) -> None:
    remote = model_version(model_file(DATA, "https://example.org/w"))
    installed.write_bytes(NEWER)
    with ModelLoader(loader.store, offline=True) as offline, pytest.raises(OfflineError):
        offline.ensure(remote)


def test_a_lock_names_its_holder_and_the_wait_is_bounded(
    loader: ModelLoader, version: ModelVersion
) -> None:
    with loader.store.lock("toy", "1.0"):
        impatient = ModelStore(loader.store.root, lock_timeout_s=0.1)
        with (
            ModelLoader(impatient) as second,
            pytest.raises(StoreError, match=f"locked by process {os.getpid()} on "),
        ):
            second.ensure(version)
    loader.ensure(version)
    assert holder_of(loader.store.root / ".locks" / "toy@1.0.lock") == "another process"


def test_a_wait_that_is_long_is_logged(
    loader: ModelLoader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("auto_voice.filesystem._SAY_AFTER_S", 0.05)
    with (
        loader.store.lock("toy", "1.0"),
        caplog.at_level("INFO", logger="auto_voice"),
        pytest.raises(StoreError),
        loader.store.lock("toy", "1.0", timeout_s=0.2),
    ):
        pass
    assert f"process {os.getpid()}" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "",
        "../x",
        "a/b",
        "a\\b",
        "C:x",
        "con",
        "NUL.txt",
        "Com1",
        "x.",
        ".x",
        "a b",
        "é",
        "x" * 121,
        "a\n",
        "-rf",
    ],
)
def test_names_that_are_not_plain_file_names_are_refused(name: str, loader: ModelLoader) -> None:
    with pytest.raises(UnsafeFileError, match="not a safe file name"):
        check_name(name, "file")
    with pytest.raises(UnsafeFileError):
        loader.store.folder(name, "1.0")
    with pytest.raises(UnsafeFileError):
        loader.store.folder("toy", name)


def test_a_hash_that_is_not_one_never_becomes_a_path(loader: ModelLoader) -> None:
    for text in ("../x", "A" * 64, "0" * 63):
        with pytest.raises(UnsafeFileError, match="hexadecimal"):
            loader.store.partial(text)


def test_a_file_named_like_the_record_is_refused(loader: ModelLoader, original: Path) -> None:
    with pytest.raises(UnsafeFileError):
        loader.ensure(model_version(model_file(DATA, str(original), name="metadata.json")))


def upper(store: ModelStore, version: ModelVersion) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(store.folder("toy", "1.0").joinpath("weights.bin").read_bytes()[::-1])

    return write


def test_a_derived_file_is_made_once_and_checked_like_the_others(
    installed: Path, loader: ModelLoader, version: ModelVersion
) -> None:
    store = loader.store
    assert store.derived(version, "w.safetensors") is None
    path = store.add_derived(version, "w.safetensors", "weights.bin", upper(store, version))
    assert path.read_bytes() == DATA[::-1]
    assert store.derived(version, "w.safetensors") == path
    assert store.add_derived(version, "w.safetensors", "weights.bin", refuse) == path
    # It outlives a repair of the sound original, and is dropped when it is damaged itself.
    loader.repair(version)
    assert store.derived(version, "w.safetensors") == path
    path.write_bytes(DATA)
    assert not verify(store, version).ok
    assert store.derived(version, "w.safetensors") is None
    loader.repair(version)
    assert verify(store, version).ok
    store.add_derived(version, "w.safetensors", "weights.bin", upper(store, version))
    assert path.read_bytes() == DATA[::-1]


def test_a_derived_file_of_another_original_is_not_current(
    installed: Path, loader: ModelLoader, version: ModelVersion, original: Path
) -> None:
    store = loader.store
    store.add_derived(version, "w.safetensors", "weights.bin", upper(store, version))
    original.write_bytes(NEWER)
    newer = model_version(model_file(NEWER, original.as_uri()))
    loader.ensure(newer)
    assert store.derived(newer, "w.safetensors") is None


def test_a_conversion_that_fails_leaves_nothing(
    installed: Path, loader: ModelLoader, version: ModelVersion
) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("broken checkpoint")

    with pytest.raises(ValueError, match="broken"):
        loader.store.add_derived(version, "w.safetensors", "weights.bin", half)
    assert sorted(path.name for path in installed.parent.iterdir()) == [
        "metadata.json",
        "weights.bin",
    ]


def test_nothing_is_derived_from_what_is_not_installed(
    loader: ModelLoader, version: ModelVersion
) -> None:
    with pytest.raises(StoreError, match="not installed"):
        loader.store.add_derived(version, "w.safetensors", "weights.bin", refuse)


def test_verify_of_an_absent_version_is_not_ok_and_has_no_problem(
    loader: ModelLoader, version: ModelVersion
) -> None:
    report = verify(loader.store, version)
    assert (report.present, report.ok, report.problems) == (False, False, ())


def test_remove_gives_the_room_back(
    installed: Path, loader: ModelLoader, version: ModelVersion
) -> None:
    assert remove(loader.store, "toy", "1.0") > len(DATA)
    assert not (loader.store.root / "toy").exists()
    assert loader.store.lookup(version) is None
    with pytest.raises(StoreError, match="nothing to remove"):
        remove(loader.store, "toy", "1.0")


def test_prune_removes_only_what_is_old_unlocked_and_not_installed(
    installed: Path, loader: ModelLoader, version: ModelVersion
) -> None:
    store = loader.store
    old, young, held = (store.partial(digit * 64) for digit in "abc")
    for partial in (old, young, held):
        partial.path.write_bytes(b"x" * 1000)
    piece = old.piece(0)
    piece.path.write_bytes(b"x")
    aside = store.set_aside(store.folder("toy", "1.0") / "metadata.json", "a test")
    loader.ensure(version)
    stray = installed.with_name(".weights.bin.1.abc.tmp")
    stray.write_bytes(b"x")
    user = installed.parent.parent.parent / "notes.txt"
    user.write_text("mine")
    past = time.time() - 30 * 86400
    for path in (old.path, held.path, piece.path, aside, stray, user, installed):
        os.utime(path, (past, past))
    with store.partial_lock("c" * 64):
        report = prune(store)
    assert set(report.removed) == {old.path, piece.path, aside, stray}
    assert report.freed_bytes > 1000
    assert young.path.exists()
    assert held.path.exists()
    assert user.exists()
    assert loader.ensure(version) == {"weights.bin": installed}
    assert [info.sha256 for info in partials(store)] == ["b" * 64, "c" * 64]


def test_an_export_is_installed_elsewhere_without_any_source(
    installed: Path, loader: ModelLoader, version: ModelVersion, tmp_path: Path
) -> None:
    tar = tmp_path / "models.tar"
    assert export_versions(loader.store, [version], tar).versions == (version,)
    with tarfile.open(tar) as archive:
        assert archive.getnames() == ["catalog.yaml", "toy/1.0/weights.bin"]
        assert str(tmp_path) not in archive.extractfile("catalog.yaml").read().decode()
    other = ModelStore(tmp_path / "elsewhere")
    report = import_archive(other, tar, lambda name, number: version)
    assert (report.versions, report.problems, report.new) == ((version,), (), ())
    with ModelLoader(other, offline=True) as offline:
        assert offline.ensure(version)["weights.bin"].read_bytes() == DATA
    record = other.metadata("toy", "1.0")
    assert record is not None
    assert record["files"]["weights.bin"]["source"] == "import models.tar"
    assert not list((other.root / ".partial").glob("import-*"))


def test_an_export_of_what_is_absent_or_damaged_is_refused(
    installed: Path, loader: ModelLoader, version: ModelVersion, tmp_path: Path
) -> None:
    stat = installed.stat()
    installed.write_bytes(NEWER)
    os.utime(installed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    target = tmp_path / "models.tar"
    with pytest.raises(IntegrityError, match="was not exported"):
        export_versions(loader.store, [version], target)
    remove(loader.store, "toy", "1.0")
    with pytest.raises(StoreError, match="models pull"):
        export_versions(loader.store, [version], target)
    assert not target.exists()
    assert not list(tmp_path.glob(".models.tar*"))


def test_a_damaged_version_is_left_out_of_an_export(
    installed: Path, loader: ModelLoader, version: ModelVersion, tmp_path: Path, original: Path
) -> None:
    original.write_bytes(NEWER)
    second = model_version(model_file(NEWER, original.as_uri()), name="second")
    loader.ensure(second)
    installed.write_bytes(NEWER)
    report = export_versions(loader.store, [version, second], tmp_path / "models.tar")
    assert report.versions == (second,)
    assert "models pull toy@1.0" in str(report.problems[0])


def test_a_bundled_version_is_exported_from_the_package(
    loader: ModelLoader, tmp_path: Path
) -> None:
    inside = importlib.resources.files("auto_voice").joinpath("errors.py").read_bytes()
    version = model_version(model_file(inside, "package://errors.py"), name="bundled")
    tar = tmp_path / "models.tar"
    export_versions(loader.store, [version], tar)
    other = ModelStore(tmp_path / "elsewhere")
    import_archive(other, tar, lambda name, number: version)
    assert other.lookup(version) is not None


def test_an_export_to_a_missing_folder_is_one_sentence(
    installed: Path, loader: ModelLoader, version: ModelVersion, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="could not be written"):
        export_versions(loader.store, [version], tmp_path / "none" / "models.tar")


def tar_of(path: Path, *members: tuple[str | tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


GOOD = ("toy/1.0/weights.bin", DATA)


@pytest.mark.parametrize(
    "bad",
    [
        "../../x",
        "toy/1.0/../../x",
        "toy/../x",
        "/etc/x/y",
        "toy/1.0/a/b",
        "toy/1.0/c:x",
        "x",
        "toy//1.0/x",
        "./1.0/x",
        "toy/1.0/.hidden",
        link("toy/1.0/l", tarfile.SYMTYPE),
        link("toy/1.0/l", tarfile.LNKTYPE),
        link("toy/1.0/l", tarfile.FIFOTYPE),
        link("toy/1.0/l", tarfile.DIRTYPE),
        "toy/1.0/unknown.bin",
        "toy/1.0/weights.bin",
    ],
    ids=lambda bad: bad if isinstance(bad, str) else f"{bad.name}-type-{bad.type.decode()}",
)
def test_an_archive_that_holds_anything_else_installs_nothing(
    bad: str | tarfile.TarInfo, tmp_path: Path, version: ModelVersion
) -> None:
    store = ModelStore(tmp_path / "elsewhere")
    data = b"" if isinstance(bad, tarfile.TarInfo) else b"evil"
    tar = tar_of(tmp_path / "bad.tar", GOOD, (bad, data))
    with pytest.raises(UnsafeFileError):
        import_archive(store, tar, lambda name, number: version)
    assert not store.root.exists()
    assert not (tmp_path / "x").exists()


def test_wrong_bytes_in_an_archive_are_left_out_and_the_rest_is_installed(
    tmp_path: Path, version: ModelVersion, original: Path
) -> None:
    fine = model_version(model_file(DATA, str(original)), name="fine")
    store = ModelStore(tmp_path / "elsewhere")
    known = {"toy": version, "fine": fine}
    tar = tar_of(tmp_path / "bad.tar", ("fine/1.0/weights.bin", DATA), (GOOD[0], NEWER))
    report = import_archive(store, tar, lambda name, number: known[name])
    assert report.versions == (fine,)
    assert "does not match the catalog's sha256: toy@1.0 was not" in str(report.problems[0])
    assert store.installed() == [("fine", "1.0")]
    with pytest.raises(IntegrityError, match=r"toy@1\.0 was not imported"):
        import_archive(store, tar_of(tmp_path / "one.tar", (GOOD[0], NEWER)), lambda n, v: version)
    short = tar_of(tmp_path / "short.tar", (GOOD[0], DATA[:-1]))
    with pytest.raises(IntegrityError, match="199999 bytes and not 200000"):
        import_archive(store, short, lambda name, number: version)


def test_an_archive_of_an_unknown_model_is_refused(tmp_path: Path) -> None:
    def find(name: str, number: str) -> ModelVersion:
        raise UnknownModelError(f"unknown model {name}")

    with pytest.raises(UnknownModelError):
        import_archive(ModelStore(tmp_path / "m"), tar_of(tmp_path / "x.tar", GOOD), find)


def test_archives_that_are_none_are_one_sentence(tmp_path: Path, version: ModelVersion) -> None:
    store = ModelStore(tmp_path / "elsewhere")
    for name, content in (("text", b"hello " * 200), ("empty", b"")):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"not a complete archive|holds no models"):
            import_archive(store, path, lambda name, number: version)
    with pytest.raises(StoreError, match="does not exist"):
        import_archive(store, tmp_path / "none", lambda name, number: version)
    with pytest.raises(StoreError, match="cannot be read"):
        import_archive(store, tmp_path, lambda name, number: version)
    whole = tar_of(tmp_path / "whole.tar", GOOD).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError, match="not a complete archive"):
        import_archive(store, cut, lambda name, number: version)
    packed = bytearray(lzma.compress(whole))
    packed[len(packed) // 2] ^= 0xFF
    cut.write_bytes(packed)
    with pytest.raises(StoreError, match="not a complete archive"):
        import_archive(store, cut, lambda name, number: version)
    assert store.installed() == []


def test_an_incomplete_version_in_an_archive_is_named(tmp_path: Path, original: Path) -> None:
    two = model_version(
        model_file(DATA, str(original)), model_file(NEWER, str(original), name="second.bin")
    )
    tar = tar_of(tmp_path / "x.tar", GOOD)
    with pytest.raises(StoreError, match=r"lacks second\.bin of toy@1\.0"):
        import_archive(ModelStore(tmp_path / "m"), tar, lambda name, number: two)


def test_an_import_that_would_not_fit_is_refused_beforehand(
    tmp_path: Path, version: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "free_bytes", lambda path: 1000)
    with pytest.raises(DiskSpaceError, match=r"needs 0\.2 MB"):
        import_archive(
            ModelStore(tmp_path / "m"), tar_of(tmp_path / "x.tar", GOOD), lambda n, v: version
        )


def test_a_folder_on_another_disk_still_gets_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(DATA)
    replace = Path.replace

    def across(self: Path, to: Path) -> Path:
        if self == source:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", across)
    disk.move_into_place(source, target)
    assert target.read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
