"""Access: host names, web sites, bearer tokens, sessions; and the headers of every answer."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from auto_voice.errors import NotPermittedError, ServerError
from auto_voice.filesystem import read_json, write_json
from auto_voice.server.settings import LOOPBACK_NAMES, ServerSettings

COOKIE = "autovoice_session"
# A week.
SESSION_SECONDS = 7 * 86400
HEADERS: Mapping[str, str] = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
EXPOSED = "content-disposition, location, retry-after, x-conversion, x-job-id, x-request-id"


def check_host(settings: ServerSettings, host: str) -> None:
    """Refuse names that are not this server's: a web site may point its own name at this address.

    Raises:
        NotPermittedError: 421.
    """
    name = _without_port(host)
    known = {*LOOPBACK_NAMES, *settings.allow_hosts, settings.host}
    if name in known:
        return
    # An address cannot be re-pointed as a name can.
    if not settings.is_loopback and _is_address(name):
        return
    raise NotPermittedError(
        f"This server does not answer to the name {name[:80]!r}; start it with --allow-host NAME "
        "if that is its name.",
        421,
    )


def check_origin(settings: ServerSettings, scheme: str, headers: Mapping[str, str]) -> str:
    """The allowed foreign origin that asks, or "" for our own page and for programs.

    Raises:
        NotPermittedError: another web site's page is asking.
    """
    origin = headers.get("origin", "")
    if origin and origin in settings.allow_origins:
        return origin
    host = headers.get("host", "")
    foreign = bool(origin) and origin not in (f"{scheme}://{host}", f"https://{host}")
    if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise NotPermittedError(
            "Pages of other web sites may not call this server; start it with --allow-origin "
            "ORIGIN to let one."
        )
    return ""


class Sessions:
    """The sessions that were ended before they expired, kept over a restart.

    Args:
        path: of a small JSON file, made when the first session is ended.
        shared: adds marks to those of all servers and gives these; None for a server alone.
    """

    def __init__(
        self,
        path: Path,
        shared: Callable[[Mapping[str, float]], dict[str, float]] | None = None,
    ) -> None:
        self._path, self._shared = path, shared
        self._untold: dict[str, float] = {}
        self._lock = threading.Lock()
        known = (read_json(path) or {}).get("ended", {})
        self._ended = {str(mark): float(until) for mark, until in known.items()}

    def end(self, tokens: Iterable[str], cookie: str) -> None:
        """Let the session of ``cookie`` open nothing any more; other cookies are ignored."""
        if not _by_cookie(tokens, cookie):
            return  # else anybody could fill the list
        until, now = cookie.partition(".")[0], time.time()
        with self._lock:
            kept = {mark: t for mark, t in self._ended.items() if t > now}
            kept[_mark(cookie)] = min(float(until), now + SESSION_SECONDS)
            self._ended = kept
            with contextlib.suppress(OSError):  # it holds until a restart even so
                write_json(self._path, {"ended": kept})
            self._untold[_mark(cookie)] = kept[_mark(cookie)]
        with contextlib.suppress(ServerError):  # the others are told as soon as that is possible
            self.refresh()

    def refresh(self) -> None:
        """Tell other servers of the sessions that were ended here, and take in theirs."""
        if self._shared is not None:
            with self._lock:
                self._ended = self._ended | self._shared(self._untold)
                self._untold.clear()

    def is_ended(self, cookie: str) -> bool:
        return _mark(cookie) in self._ended


def _mark(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def token_of(
    settings: ServerSettings, headers: Mapping[str, str], sessions: Sessions | None = None
) -> str:
    """The token that the request proves to know; "" where none is needed.

    Raises:
        NotPermittedError: 401.
    """
    if not settings.tokens:
        return ""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found = matching(settings.tokens, given.strip())
        if found:
            return found
        raise NotPermittedError("The token is wrong; ask whoever runs this server.", 401)
    cookie = cookie_of(headers)
    found = _by_cookie(settings.tokens, cookie)
    if found and not (sessions is not None and sessions.is_ended(cookie)):
        return found
    raise NotPermittedError(
        "This server needs a token; send the header Authorization: Bearer TOKEN.", 401
    )


def matching(tokens: Iterable[str], given: str) -> str:
    """The token that equals ``given``, found in constant time, or ""."""
    offered = given.encode("utf-8", "surrogateescape")
    found = ""
    for token in tokens:
        if hmac.compare_digest(token.encode(), offered):
            found = token
    return found


def session_cookie(token: str, now: float | None = None) -> str:
    """Proof of knowing ``token`` until it expires, from which the token cannot be told.

    Each is drawn anew, so that ending one session leaves the others of the same token.
    """
    until = int((time.time() if now is None else now) + SESSION_SECONDS)
    drawn = secrets.token_hex(8)
    return f"{until}.{drawn}.{_proof(token, until, drawn)}"


def _proof(token: str, until: int, drawn: str) -> str:
    text = f"autovoice session {until} {drawn}"
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def cookie_of(headers: Mapping[str, str]) -> str:
    """The session cookie of a request, or ""."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _by_cookie(tokens: Iterable[str], cookie: str) -> str:
    until, _, rest = cookie.partition(".")
    drawn, _, proof = rest.partition(".")
    if not (until + drawn + proof).isascii():
        return ""
    # One spelling alone, since a session is ended under the mark of its cookie.
    if not until.isdigit() or len(until) > 12 or until != str(int(until)):
        return ""
    if int(until) < time.time():
        return ""
    found = ""
    for token in tokens:
        if hmac.compare_digest(_proof(token, int(until), drawn), proof):
            found = token
    return found


def client_of(token: str, address: str) -> str:
    """The client that a request counts for: its token and address (of IPv6 the /64)."""
    try:
        ip = ipaddress.ip_address(address)
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            address = str(ip.ipv4_mapped)  # what a socket for both families calls IPv4
        elif ip.version == 6:
            address = str(ipaddress.ip_network((ip, 64), strict=False).network_address)
    except ValueError:
        address = "unknown"
    mark = hashlib.sha256(token.encode()).hexdigest()[:8] + "@" if token else ""
    return mark + address


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
