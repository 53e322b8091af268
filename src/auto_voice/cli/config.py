"""``autovoice config``: the settings and where each comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from auto_voice.settings import SETTINGS, get_settings, unknown_variables


@click.group()
def config() -> None:
    """Show the settings and where each comes from.

    An option wins over the environment, that over .env, that over the file that AUTOVOICE_CONFIG
    names, that over the default.
    """


@config.command()
@click.option("--config", type=click.Path(path_type=Path), help="YAML of settings and models.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(config: Path | None, as_json: bool) -> None:
    """Every setting with its value and origin.

    \b
    autovoice config show
    autovoice config show --json
    """
    settings = get_settings(config=config)
    unknown = unknown_variables()
    if as_json:
        facts: dict[str, Any] = {
            key: {
                "value": _plain(getattr(settings, key)),
                "origin": settings.origins[key],
                "variable": setting.variable,
            }
            for key, setting in SETTINGS.items()
        }
        click.echo(json.dumps({"settings": facts, "unknown": unknown}, indent=2))
        return
    for key, setting in SETTINGS.items():
        value = _plain(getattr(settings, key))
        shown = "-" if value is None else json.dumps(value) if isinstance(value, bool) else value
        click.echo(f"{key:<17} {shown!s:<40} {settings.origins[key]:<30} {setting.help}")
    for name in unknown:
        click.echo(f"{name} is set, but nothing reads it.", err=True)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
