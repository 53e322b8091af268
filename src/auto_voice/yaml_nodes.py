"""YAML that remembers where each value stands, so that an error names file, line and key.

PyYAML's node graph carries line marks that ``safe_load`` throws away; a schema check that walks
the nodes can say ``models.yaml:12: models.x.default must be text``. Only safe tags are built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_voice.errors import CatalogError, first_line

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
# Levels of nesting; libyaml's composer recurses in C and would overflow the stack.
MAX_DEPTH = 64
_TYPES = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "a whole number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:seq": "a list",
    "tag:yaml.org,2002:map": "a mapping",
}


@dataclass(frozen=True)
class Node:
    """One value of a YAML file with its place and its dotted key."""

    raw: Any
    path: Path
    key: str
    loader: Any
    line: int
    """Of its key, counted from 1: a block starts below the key that a reader looks for."""

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    def error(self, message: str) -> CatalogError:
        """An exception that starts with ``file:line: key``."""
        subject = f"{self.key} " if self.key else ""
        return CatalogError(f"{self.place}: {subject}{message}")

    def expected(self, wanted: str) -> CatalogError:
        return self.error(f"must be {wanted}, not {self.described()}")

    def described(self) -> str:
        """What stands there, short enough for a sentence."""
        kind = _TYPES.get(self.raw.tag, str(self.raw.tag))
        if isinstance(self.raw.value, str) and self.raw.value:
            value = self.raw.value if len(self.raw.value) <= 40 else self.raw.value[:37] + "…"
            return f'{kind} "{value}"' if kind == "text" else f"{kind} ({value})"
        return kind

    def child(self, raw: Any, name: str | int, at: Any = None) -> Node:
        """A part of this node; ``at`` is the YAML node whose line stands for it."""
        if isinstance(name, int):
            key = f"{self.key}[{name}]"
        else:
            part = name if _BARE.fullmatch(name) else f'"{name}"'
            key = f"{self.key}.{part}" if self.key else part
        return Node(raw, self.path, key, self.loader, _line(at or raw))

    def is_a(self, kind: str) -> bool:
        """Whether it is a ``map``, ``seq``, ``str``, ``int``, ``float``, ``bool`` or ``null``."""
        return bool(self.raw.tag == f"tag:yaml.org,2002:{kind}")

    def mapping(
        self, known: Iterable[str] | None = None, *, quoted: bool = False
    ) -> dict[str, Node]:
        """The children by key.

        Args:
            known: the allowed keys; None allows every text.
            quoted: the keys are versions, so a number must be quoted to survive (1.10 is not 1.1).

        Raises:
            CatalogError: not a mapping, a key that is unknown, not text, or there twice.
        """
        if not self.is_a("map"):
            raise self.expected("a mapping")
        allowed = None if known is None else list(known)
        found: dict[str, Node] = {}
        for key_raw, value in self.raw.value:
            at = self.child(key_raw, str(key_raw.value))
            if key_raw.tag != "tag:yaml.org,2002:str":
                hint = f'; write "{key_raw.value}" in quotes' if quoted else ""
                raise at.error(f"is a key that must be text{hint}")
            name = str(key_raw.value)
            if allowed is not None and name not in allowed:
                raise at.error(f"is not a known key; {closest(name, allowed)}")
            if name in found:
                raise at.error(f"is there twice; the first is in line {found[name].line}")
            found[name] = self.child(value, name, key_raw)
        return found

    def items(self) -> list[Node]:
        if not self.is_a("seq"):
            raise self.expected("a list")
        return [self.child(raw, i) for i, raw in enumerate(self.raw.value)]

    def text(self) -> str:
        if not self.is_a("str") or not self.raw.value:
            hint = "" if not (self.is_a("float") or self.is_a("int")) else " in quotes"
            raise self.expected(f"text{hint}")
        return str(self.raw.value)

    def matching(self, pattern: str, wanted: str) -> str:
        value = self.text()
        if not re.fullmatch(pattern, value):
            raise self.expected(wanted)
        return value

    def choice(self, options: Iterable[str]) -> str:
        known = list(options)
        value = self.text()
        if value not in known:
            raise self.error(f'must be one of {", ".join(known)}, not "{value}"')
        return value

    def integer(self, at_least: int = 0) -> int:
        if not self.is_a("int"):
            raise self.expected("a whole number")
        value = int(self.plain())
        if value < at_least:
            raise self.expected(f"at least {at_least}")
        return value

    def boolean(self) -> bool:
        if not self.is_a("bool"):
            raise self.expected("true or false")
        return bool(self.plain())

    def plain(self) -> Any:
        """The value as Python numbers, texts, lists and dicts."""
        from yaml import YAMLError

        try:
            return self.loader.construct_object(self.raw, deep=True)
        except (YAMLError, TypeError, ValueError) as error:
            raise self.error(f"cannot be read ({first_line(error)})") from error


def read(path: Path) -> Node | None:
    """The root of the first document of a YAML file; None if it is empty.

    Raises:
        CatalogError: missing, not UTF-8, or not YAML; the message starts with ``file:line:``.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CatalogError(f"{path}: there is no such file; give an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise CatalogError(f"{path}:1: is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise CatalogError(f"{path}: cannot be read ({error.strerror})") from error
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_deep(text, path, base)
        loader = base(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        if "nesting depth" in str(error.problem):  # Newer parsers refuse by themselves, deeper in.
            raise _too_deep(path, 1) from error
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise CatalogError(f"{path}:{line}: is not valid YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise CatalogError(f"{path}:1: is not valid YAML ({first_line(error)})") from error
    return None if root is None else Node(root, path, "", loader, _line(root))


def _refuse_deep(text: str, path: Path, loader: Any) -> None:
    """Raise CatalogError where the text nests deeper than ``MAX_DEPTH``."""
    import yaml

    # A level costs a bracket or a column, so a short look clears every ordinary file.
    columns = max((len(line) - len(line.lstrip(" -?:\t")) for line in text.splitlines()), default=0)
    if text.count("[") + text.count("{") + columns <= MAX_DEPTH:
        return
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _too_deep(path, _line(event))


def _too_deep(path: Path, line: int) -> CatalogError:
    return CatalogError(f"{path}:{line}: is nested more than {MAX_DEPTH} levels deep")


def closest(name: str, known: Iterable[str]) -> str:
    """``did you mean x?`` where something is near, then the list of what exists."""
    import difflib  # Only a mistake needs it.

    names = sorted(known)
    near = [n for n in names if name and n.startswith(name)] or difflib.get_close_matches(
        name, names, n=1, cutoff=0.6
    )
    listed = f"known: {', '.join(names)}" if names else "there are none"
    return f"did you mean {near[0]}? ({listed})" if near else listed


def require(fields: Mapping[str, Node], owner: Node, *keys: str) -> None:
    """Raise CatalogError for the first of ``keys`` that ``fields`` of ``owner`` lacks."""
    for key in keys:
        if key not in fields:
            raise owner.error(f"lacks {key}")


def _line(raw: Any) -> int:
    return int(raw.start_mark.line) + 1
