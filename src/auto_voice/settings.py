"""Settings: argument > environment > .env > file > default, read when asked, never at import.

The file is the user's YAML that ``AUTOVOICE_CONFIG`` or ``config=`` names; its ``settings`` section
holds the keys below. Every value remembers its origin, which ``autovoice config show`` prints.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_voice.errors import ConfigError, reason

if TYPE_CHECKING:
    from auto_voice.yaml_nodes import Node

FALLBACKS = ("none", "compact", "mock")
PREFERENCES = ("exact", "fastest", "smallest")
# Read from the current folder.
DOTENV = Path(".env")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True)
class Setting:
    """One setting: its key, its variable ``AUTOVOICE_<KEY>``, how text becomes a value."""

    key: str
    parse: Callable[[Any], Any]
    default: Callable[[], Any]
    help: str
    # A variable of another program that switches it on, too.
    also: str = ""
    # Shown as set or not, never by its value.
    secret: bool = False

    @property
    def variable(self) -> str:
        return f"AUTOVOICE_{self.key.upper()}"


@dataclass(frozen=True)
class Settings:
    """The settings that hold, with ``origins[key]`` saying where each one comes from.

    Attributes:
        config: the user's YAML, which overlays the built-in catalog; None for the catalog alone.
        model_dir: where models are kept.
        offline: no socket is opened.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``directml``, ``coreml``, ``openvino`` or
            ``openvino:bf16``. Several, joined by commas, are what workers are spread over; among
            them ``vocoder=cuda:1`` is for the models of a kind or for one model.
        fallback: ``none``, ``compact`` or ``mock``.
        memory_budget_mb: loaded models stay under it, least recently used first out; 0 is no limit.
        prefer: ``exact``, ``fastest`` or ``smallest``: which version a model's bare name means.
        voice_dir: where stored voices are.
        mirrors: base URLs of servers that are asked for a model's files before anybody else.
        mirror_token: bearer token for them, sent to nobody else.
        otlp_endpoint: where traces and metrics go; "" sends none.
        database: PostgreSQL database that servers and workers share; "" for a server alone.
        files: folder or URL of their uploads, results and voices; "" for the data folder.
    """

    config: Path | None
    model_dir: Path
    offline: bool
    device: str
    fallback: str
    memory_budget_mb: int
    prefer: str
    voice_dir: Path
    mirrors: tuple[str, ...]
    mirror_token: str = field(repr=False)
    otlp_endpoint: str
    database: str = field(repr=False)
    files: str = field(repr=False)
    origins: Mapping[str, str]


def get_settings(**arguments: Any) -> Settings:
    """The settings as they stand now.

    Args:
        arguments: by key of ``SETTINGS``; None means not given.

    Raises:
        ConfigError: a value that cannot be; the message names where it stands.
    """
    unknown = sorted(set(arguments) - set(SETTINGS))
    if unknown:
        raise ConfigError(f"there is no setting {unknown[0]}; known: {', '.join(SETTINGS)}")
    dotenv, dotenv_path = _read_dotenv()
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    in_file: Mapping[str, Node] = {}
    for setting in SETTINGS.values():
        if arguments.get(setting.key) is not None:
            raw, origin = arguments[setting.key], "argument"
        elif os.environ.get(setting.variable):
            raw, origin = os.environ[setting.variable], f"environment {setting.variable}"
        elif setting.also and os.environ.get(setting.also, "").lower() in _TRUE:
            raw, origin = "1", f"environment {setting.also}"
        elif dotenv.get(setting.variable):
            raw, origin = dotenv[setting.variable], f"{dotenv_path} {setting.variable}"
        elif setting.key in in_file:
            node = in_file[setting.key]
            raw, origin = _from_file(setting, node), f"file {node.place}"
        else:
            raw, origin = setting.default(), "default"
        values[setting.key] = _parsed(setting, raw, origin)
        origins[setting.key] = origin
        if setting.key == "config" and values["config"] is not None:
            in_file = _settings_section(values["config"])
    return Settings(**values, origins=origins)


def unknown_variables() -> list[str]:
    """``AUTOVOICE_*`` names in the environment or ``.env`` that nothing reads: likely slips."""
    known = {setting.variable for setting in SETTINGS.values()}
    names = set(os.environ) | set(_read_dotenv()[0])
    return sorted(n for n in names if n.startswith("AUTOVOICE_") and n not in known)


def _parsed(setting: Setting, raw: Any, origin: str) -> Any:
    try:
        return setting.parse(raw)
    except (TypeError, ValueError) as error:
        shown = "what was given" if setting.secret else _quoted(raw)
        where = setting.key if origin == "argument" else f"{setting.key} ({origin})"
        raise ConfigError(f"{where} must be {error}, not {shown}") from error


def _quoted(raw: Any) -> str:
    return f'"{raw}"' if isinstance(raw, str) else repr(raw)


def _from_file(setting: Setting, node: Node) -> Any:
    value = node.plain()
    if setting.parse is _path and isinstance(value, str):
        # Relative to the file that says it: a YAML must mean the same wherever it is used from.
        return node.path.parent / Path(value).expanduser()
    return value


def _settings_section(path: Path) -> Mapping[str, Node]:
    if not path.is_file():
        raise ConfigError(
            f"{path}: there is no such file; AUTOVOICE_CONFIG or config must name one"
        )
    if b"settings" not in path.read_bytes():
        return {}  # Spares the YAML parser where only models are declared.
    from auto_voice import yaml_nodes

    root = yaml_nodes.read(path)
    section = root.mapping().get("settings") if root is not None else None
    if section is None or section.is_a("null"):
        return {}
    return section.mapping([key for key in SETTINGS if key != "config"])


def _read_dotenv() -> tuple[Mapping[str, str | None], Path]:
    path = DOTENV
    # Not ``Path.is_file``, which raises in a folder that this user may not enter.
    if not os.path.isfile(path):  # noqa: PTH113
        return {}, path
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8") as stream:
            lines = list(parse_stream(stream))
        for line in lines:
            if line.error:
                raise ConfigError(f"{path.absolute()}:{line.original.line} is not NAME=value")
        return {line.key: line.value for line in lines if line.key is not None}, path
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.absolute()} cannot be read ({reason(error)})") from error


def _boolean(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower()
    if text not in _TRUE | _FALSE:
        raise ValueError("1 or 0 (true, yes, on; false, no, off)")
    return text in _TRUE


def _path(raw: Any) -> Path:
    if not isinstance(raw, (str, os.PathLike)) or not os.fspath(raw):
        raise TypeError("a path")
    try:
        return Path(raw).expanduser()
    except RuntimeError as error:
        raise ValueError("a path whose ~ names a user of this machine") from error


def _optional_path(raw: Any) -> Path | None:
    return None if raw is None else _path(raw)


def _fallback(raw: Any) -> str:
    if raw not in FALLBACKS:
        raise ValueError("one of none, compact, mock")
    return str(raw)


def _preference(raw: Any) -> str:
    if raw not in PREFERENCES:
        raise ValueError(f"one of {', '.join(PREFERENCES)}")
    return str(raw)


# A device alone, or after the name of a kind, of a model or of a version of one.
_DEVICE = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9_.@+-]*=)?(?:auto|cpu|directml|coreml|openvino(?::bf16)?|cuda(?::\d+)?)"
)
# Key of a mapping for models that no other key names.
DEFAULT_DEVICE = "default"


def _device(raw: Any) -> str:
    """The one spelling, e.g. ``cuda:0,cuda:1,vocoder=cpu``, of a text, a list or a mapping."""
    if isinstance(raw, Mapping):
        named = {str(name): str(device) for name, device in raw.items()}
        general = named.pop(DEFAULT_DEVICE, "")
        raw = [*filter(None, [general]), *(f"{name}={device}" for name, device in named.items())]
    if isinstance(raw, (list, tuple)):
        raw = ",".join(map(str, raw))
    parts = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else []
    if not parts or not all(_DEVICE.fullmatch(part) for part in parts):
        raise ValueError(
            "one of auto, cpu, cuda, cuda:0, cuda:1, directml, coreml, openvino, openvino:bf16, or "
            "several with commas, such as cuda:0,cuda:1 or auto,vocoder=cuda:1"
        )
    return ",".join(dict.fromkeys(parts))


def _megabytes(raw: Any) -> int:
    wanted = "a whole number of MB, 0 for no limit"
    if isinstance(raw, (bool, float)) or not re.fullmatch(r"\d+", str(raw).strip()):
        raise ValueError(wanted)
    return int(raw)


def _mirrors(raw: Any) -> tuple[str, ...]:
    found = [raw] if isinstance(raw, str) else list(raw)
    urls = [url.rstrip("/") for text in found for url in str(text).replace(",", " ").split()]
    for url in urls:
        if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", url):
            raise ValueError("addresses such as http://10.0.0.5:8000, without a password")
    return tuple(dict.fromkeys(urls))


def _address(raw: Any) -> str:
    if not isinstance(raw, str) or not re.fullmatch(r"(https?://[^\s@]+)?", raw):
        raise ValueError("an address such as http://127.0.0.1:4318")
    return raw


def _token(raw: Any) -> str:
    text = str(raw).strip()
    if not (text.isascii() and text.isprintable()):
        raise ValueError("printable ASCII characters")
    return text


def user_folder(name: str, *, cache: bool = False) -> Path:
    """Where the platform keeps what a program made for its user and the user would miss.

    Args:
        name: of the folder inside ours.
        cache: it can be fetched again, so it belongs where caches are.
    """
    # A few lines of platformdirs, whose import alone would take as long as creating a registry.
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        base = (Path(local) if local else Path.home() / "AppData/Local") / "auto_voice"
        return base / "Cache" / name if cache else base / name
    if sys.platform == "darwin":
        library = Path.home() / "Library"
        return library / ("Caches" if cache else "Application Support") / "auto_voice" / name
    given = Path(os.environ.get("XDG_CACHE_HOME" if cache else "XDG_DATA_HOME", ""))
    # A relative XDG path is invalid by its specification and must be ignored.
    base = given if given.is_absolute() else Path.home() / (".cache" if cache else ".local/share")
    return base / "auto_voice" / name


SETTINGS: Mapping[str, Setting] = {
    setting.key: setting
    for setting in (
        Setting("config", _optional_path, lambda: None, "your YAML: settings and further models"),
        Setting(
            "model_dir", _path, lambda: user_folder("models", cache=True), "where models are kept"
        ),
        Setting("offline", _boolean, lambda: False, "1: never open a connection", "HF_HUB_OFFLINE"),
        Setting(
            "device",
            _device,
            lambda: "auto",
            "auto, cpu, cuda, cuda:N, directml, coreml, openvino or openvino:bf16; several with "
            "commas; vocoder=cuda:1 for one kind or model",
        ),
        Setting(
            "fallback",
            _fallback,
            lambda: "none",
            "when a model cannot be had: none, compact or mock",
        ),
        Setting(
            "memory_budget_mb", _megabytes, lambda: 0, "limit for loaded models in MB, 0 for none"
        ),
        Setting(
            "prefer",
            _preference,
            lambda: "exact",
            "which version of a model runs: exact, fastest or smallest",
        ),
        Setting("voice_dir", _path, lambda: user_folder("voices"), "where stored voices are"),
        Setting("mirrors", _mirrors, lambda: (), "servers asked first for a model's files"),
        Setting("mirror_token", _token, lambda: "", "bearer token for the mirrors", secret=True),
        Setting("otlp_endpoint", _address, lambda: "", "where telemetry is sent; none by default"),
        Setting(
            "database", _token, lambda: "", "PostgreSQL of servers on several machines", secret=True
        ),
        Setting("files", _token, lambda: "", "folder or URL that they share", secret=True),
    )
}
