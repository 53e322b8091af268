"""The engine over HTTP: an API under ``/v1``, and a page.

from auto_voice.server import Engine, ServerSettings, create_app
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auto_voice.server.app import create_app
    from auto_voice.server.engine import Engine
    from auto_voice.server.settings import ServerSettings

_HOMES = {"Engine": "engine", "ServerSettings": "settings", "create_app": "app"}

__all__ = ["Engine", "ServerSettings", "create_app"]


def __getattr__(name: str) -> Any:
    """Names are imported when first used, so that settings need no web framework."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"auto_voice.server.{_HOMES[name]}"), name)
