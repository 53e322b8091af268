"""Where the package index keeps a wheel: pip's settings go in, addresses come out.

pip can neither resume a download nor say how far it is, so the bytes come through our own
transfer. What the user has set for pip holds as it does for pip: indexes, links, proxy,
certificates, trusted hosts, time limit and credentials (in addresses, in ``.netrc``, in a keyring
where one is asked for), from its files and from its variables. Nothing of pip runs.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urljoin, urlsplit, urlunsplit

from auto_voice.errors import DownloadError, DownloadStatusError, MissingDependencyError
from auto_voice.models.registry.sources import public_url
from auto_voice.models.registry.transfer import HttpOptions, HttpTransfer, RetryPolicy

# PEP 691 first, since it tells hashes and sizes; every index speaks HTML.
_ACCEPT = (
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, "
    "text/html;q=0.1"
)
_JSON = "application/vnd.pypi.simple.v1+json"
_TRUE = frozenset({"1", "true", "yes", "y", "t", "on"})


@dataclass(frozen=True)
class IndexSettings:
    """What pip's settings say about where wheels come from.

    Attributes:
        indexes: base addresses, the most important first.
        links: further pages, folders and files that hold or list wheels.
        trusted_hosts: may be asked without TLS, or with a certificate that proves nothing.
        keyring: ``disabled``, ``auto``, ``import`` or ``subprocess``.
        timeout_s: without a byte; 0 if not set.
    """

    indexes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    proxy: str = ""
    cert: str = ""
    client_cert: str = ""
    keyring: str = "auto"
    timeout_s: float = 0.0


@dataclass(frozen=True)
class WheelLink:
    """A wheel that an index names.

    Attributes:
        url: ``https://…``, ``http://…`` or ``file://…``, without credentials.
        sha256: as the index says; empty if it does not.
        headers: to send with the request.
    """

    url: str
    filename: str
    sha256: str = ""
    headers: Mapping[str, str] | None = None

    @property
    def local_path(self) -> Path | None:
        """Where it lies on this machine; None if it must be fetched."""
        return _local_path(self.url)


def pip_settings(environ: Mapping[str, str] = os.environ) -> IndexSettings:
    """The settings that ``pip download`` would use.

    Raises:
        DownloadError: a settings file cannot be read.
        MissingDependencyError: no setting names an index, and pip is not there to name its own.
    """
    values = {**_file_values(environ), **_environment_values(environ)}
    without_index = values.get("no-index", "").strip().lower() in _TRUE
    first = "" if without_index else values.get("index-url", "").strip() or default_index()
    more = () if without_index else values.get("extra-index-url", "").split()
    bundle = environ.get("REQUESTS_CA_BUNDLE") or environ.get("CURL_CA_BUNDLE") or ""
    try:
        timeout_s = float(values.get("timeout") or values.get("default-timeout") or 0)
    except ValueError:
        timeout_s = 0.0
    return IndexSettings(
        indexes=(*([first] if first else []), *more),
        links=tuple(values.get("find-links", "").split()),
        trusted_hosts=tuple(values.get("trusted-host", "").split()),
        proxy=values.get("proxy", "").strip(),
        cert=values.get("cert", "").strip() or bundle,
        client_cert=values.get("client-cert", "").strip(),
        keyring=values.get("keyring-provider", "auto").strip(),
        timeout_s=timeout_s,
    )


def default_index() -> str:
    """The index that pip asks where no setting names one; pip is asked which that is.

    Raises:
        MissingDependencyError: there is no pip.
    """
    question = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        uv = shutil.which("uv")
        command = [uv or "", "tool", "run", "--from", "pip", "python", "-c", question]
        answer = (
            subprocess.run(command, capture_output=True, text=True, check=False) if uv else None
        )
        if answer is not None and answer.returncode == 0:
            return answer.stdout.strip()
        raise MissingDependencyError(
            "pip is needed to know the package index: run `python -m ensurepip`, install uv, or "
            "set PIP_INDEX_URL."
        ) from None
    address: str = PyPI.simple_url
    return address


class PackageIndex:
    """Finds wheels by name, version and hash. Making one reads nothing.

    Args:
        policy: retries and timeouts.
        transfer: used instead of one that pip's settings configure.
        settings: used instead of pip's.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        transfer: HttpTransfer | None = None,
        settings: IndexSettings | None = None,
    ) -> None:
        self._policy = policy or RetryPolicy()
        self._transfer = transfer
        self._settings = settings

    @property
    def settings(self) -> IndexSettings:
        if self._settings is None:
            self._settings = pip_settings()
        return self._settings

    @property
    def transfer(self) -> HttpTransfer:
        """With pip's proxy, certificates and time limit."""
        if self._transfer is None:
            settings, policy = self.settings, self._policy
            if settings.timeout_s:
                policy = replace(policy, read_timeout_s=settings.timeout_s)
            hosts = tuple(host.partition(":")[0] for host in settings.trusted_hosts)
            options = HttpOptions(settings.proxy, settings.cert, settings.client_cert, hosts)
            self._transfer = HttpTransfer(policy, options=options)
        return self._transfer

    def close(self) -> None:
        if self._transfer is not None:
            self._transfer.close()

    def find(self, project: str, version: str, sha256: str, platform: str = "") -> list[WheelLink]:
        """Where the wheel with this hash may be had, files of this machine first.

        Where an index tells no hashes, every wheel of the name, version and platform is listed;
        the hash of the bytes decides.

        Raises:
            DownloadError: nowhere; the message says what each index answered.
        """
        answers: list[str] = []
        found: list[WheelLink] = []
        others = 0
        for link in self._links(project, answers):
            if not _is_wheel_of(link.filename, project, version, platform):
                continue
            if link.sha256 in ("", sha256):
                found.append(link)
            else:
                others += 1
        if not found:
            if others:
                answers.append(f"the index names {others} with another sha256")
            raise DownloadError(
                f"the package index has no wheel {project} {version} with sha256 {sha256[:12]}…: "
                f"{'; '.join(answers) or 'it lists no such version'}"
            )
        return sorted(found, key=lambda link: (link.local_path is None, not link.sha256))

    def _links(self, project: str, answers: list[str]) -> Iterator[WheelLink]:
        for place in self.settings.links:
            yield from self._page(place, answers)
        name = quote(re.sub(r"[-_.]+", "-", project).lower())
        for index in self.settings.indexes:
            yield from self._page(f"{index.rstrip('/')}/{name}/", answers)

    def _page(self, place: str, answers: list[str]) -> list[WheelLink]:
        """The wheels of a page or folder; what went wrong is added to ``answers``."""
        local = _local_path(place)
        if local is not None:
            return _local_links(local, answers)
        if not self._is_secure(place):
            answers.append(f"{public_url(place)} is neither https nor a trusted-host of pip")
            return []
        url, headers = self._with_credentials(place)
        try:
            page = self.transfer.read(url, {"Accept": _ACCEPT, **headers})
        except DownloadStatusError as error:
            hint = "; check the credentials for it" if error.status in (401, 403) else ""
            answers.append(f"{error}{hint}")
            return []
        except DownloadError as error:
            answers.append(str(error))
            return []
        links = _json_links if page.content_type == _JSON else _html_links
        try:
            listed = links(page.body, page.url)
        except DownloadError as error:
            answers.append(str(error))
            return []
        found = []
        for link in listed:
            if link.local_path is not None:
                continue  # a page of another machine says nothing of the files of this one
            address, headers = self._with_credentials(link.url)
            found.append(replace(link, url=address, headers=headers))
        return found

    def _is_secure(self, url: str) -> bool:
        parts = urlsplit(url)
        host = parts.hostname or ""
        trusted = {name.lower() for name in self.settings.trusted_hosts}
        return (
            parts.scheme == "https"
            or host in ("localhost", "::1")
            or host.startswith("127.")
            or host in trusted
            or parts.netloc.rpartition("@")[2].lower() in trusted
        )

    def _with_credentials(self, url: str) -> tuple[str, dict[str, str]]:
        """``url`` without user and password, and the header that carries them.

        They come from the address, from the address of an index on the same host with the same
        scheme, from ``.netrc``, or from a keyring, in this order, as in pip. An address that
        anybody on the way could read along gets none.
        """
        parts = urlsplit(url)
        userinfo, _, host = parts.netloc.rpartition("@")
        bare = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        if not self._is_secure(bare):
            return bare, {}
        for index in (*self.settings.indexes, *self.settings.links):
            theirs, _, their_host = urlsplit(index).netloc.rpartition("@")
            same = (urlsplit(index).scheme, their_host) == (parts.scheme, host)
            if not userinfo and same:
                userinfo = theirs
        user, _, password = userinfo.partition(":")
        login = (unquote(user), unquote(password)) if user else _netrc_login(parts.hostname or "")
        if login is None or not login[1]:
            login = _keyring_login(self.settings.keyring, bare, login[0] if login else "") or login
        if login is None:
            return bare, {}
        token = base64.b64encode(":".join(login).encode()).decode()
        return bare, {"Authorization": f"Basic {token}"}


def _config_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's settings files from the least to the most important, as its manual lists them."""
    home, windows = Path.home(), sys.platform == "win32"
    name = "pip.ini" if windows else "pip.conf"
    own = environ.get("PIP_CONFIG_FILE")
    if own == os.devnull:
        return []
    if windows:
        shared = [Path(environ.get("PROGRAMDATA", "C:/ProgramData")) / "pip"]
        user = [home / "pip", Path(environ.get("APPDATA", home / "AppData/Roaming")) / "pip"]
    else:
        xdg = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip"
        folders = (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
        shared = [*(Path(folder) / "pip" for folder in folders if folder), Path("/etc")]
        user = [home / ".pip", xdg]
        if sys.platform == "darwin":
            shared = [Path("/Library/Application Support/pip")]
            library = home / "Library/Application Support/pip"
            user[1] = library if library.is_dir() else xdg
    files = [folder / name for folder in shared]
    if not (own and Path(own).exists()):
        files += [folder / name for folder in user]
    files.append(Path(sys.prefix) / name)
    return [*files, Path(own)] if own else files


def _file_values(environ: Mapping[str, str]) -> dict[str, str]:
    sections: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    for path in _config_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, configparser.Error) as error:
            raise DownloadError(f"pip's settings in {path} cannot be read ({error})") from error
        for section, values in sections.items():
            if parser.has_section(section):
                values.update({_key(key): value for key, value in parser.items(section)})
    return {**sections["global"], **sections["download"]}


def _environment_values(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        _key(name[len("PIP_") :]): value for name, value in environ.items()
        if name.startswith("PIP_") and value
    }  # fmt: skip


def _key(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("--")


def _local_path(place: str) -> Path | None:
    parts = urlsplit(place)
    if parts.scheme == "file":
        from urllib.request import url2pathname

        return Path(url2pathname(parts.path))
    # A drive letter of Windows looks like a scheme.
    return None if "://" in place else Path(place).expanduser()


def _local_links(path: Path, answers: list[str]) -> list[WheelLink]:
    page = path / "index.html" if (path / "index.html").is_file() else path
    if page.is_dir():
        return [WheelLink(file.absolute().as_uri(), file.name) for file in page.glob("*.whl")]
    if page.suffix == ".whl" and page.is_file():
        return [WheelLink(page.absolute().as_uri(), page.name)]
    try:
        return _html_links(page.read_bytes(), page.absolute().as_uri())
    except OSError as error:
        answers.append(f"{page} cannot be read ({error.strerror or error})")
        return []
    except DownloadError as error:
        answers.append(str(error))
        return []


def _json_links(body: bytes, base: str) -> list[WheelLink]:
    """The wheels of a page in JSON; an entry that cannot be understood is left out.

    Raises:
        DownloadError: the page is no list at all.
    """
    try:
        files = list(json.loads(body)["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DownloadError(f"{public_url(base)} is no list of packages") from error
    found = []
    for file in files:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            sha256 = str((file.get("hashes") or {}).get("sha256", ""))
            url = urljoin(base, str(file["url"]))
            urlsplit(url)
            found.append(WheelLink(url, str(file["filename"]), sha256))
    return found


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if address and tag == "a":
            self.links.append(address)
        elif address and tag == "base" and not self.base:
            self.base = address


def _html_links(body: bytes, base: str) -> list[WheelLink]:
    """The files that a page in HTML links to; a link that is no address is left out.

    Raises:
        DownloadError: the page cannot be taken apart.
    """
    parser = _Anchors()
    try:
        parser.feed(body.decode("utf-8", errors="replace"))
        start = urljoin(base, parser.base)
    except (ValueError, AssertionError) as error:
        raise DownloadError(f"{public_url(base)} is no list of packages") from error
    found = []
    for address in parser.links:
        with contextlib.suppress(ValueError):
            url = urljoin(start, address)
            parts = urlsplit(url)
            filename = unquote(parts.path.rpartition("/")[2])
            sha256 = parse_qs(parts.fragment).get("sha256", [""])[0]
            found.append(WheelLink(urlunsplit(parts._replace(fragment="")), filename, sha256))
    return found


def _is_wheel_of(filename: str, project: str, version: str, platform: str) -> bool:
    """Whether a file name is that of a wheel of this project, version and platform."""
    parts = filename.removesuffix(".whl").split("-")
    if not filename.endswith(".whl") or len(parts) not in (5, 6):
        return False
    same = (_plain(parts[0]), _plain(parts[1])) == (_plain(project), _plain(version))
    return same and (not platform or platform in parts[-1].split(".") or parts[-1] == "any")


def _plain(text: str) -> str:
    return re.sub(r"[-_.]+", ".", text.lower())


def _netrc_login(host: str) -> tuple[str, str] | None:
    import netrc

    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[0], found[2] or "") if found else None


def _keyring_login(provider: str, url: str, user: str) -> tuple[str, str] | None:
    """From the user's keyring, if a setting asks for it: ``auto`` never does without a prompt."""
    program = shutil.which("keyring")
    if provider == "import":
        try:
            import keyring  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            return None
        found = keyring.get_credential(url, user or None)
        return (found.username, found.password) if found else None
    if provider == "subprocess" and program and user:
        answer = subprocess.run(
            [program, "get", url, user], capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        return (user, answer.stdout.strip()) if answer.returncode == 0 else None
    return None
