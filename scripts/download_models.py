#!/usr/bin/env python3
"""Fetch and verify models: a thin call into the registry, as ``autovoice models pull`` is."""

from __future__ import annotations

import argparse
import sys

from auto_voice.cli.main import run_guarded
from auto_voice.cli.models import pull_models
from auto_voice.models import ModelRegistry


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fetch and verify models (default: all).")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    parser.add_argument("--model", metavar="NAME", action="append", help="NAME or NAME@VERSION")
    parser.add_argument("--force", action="store_true", help="fetch again what is already here")
    options = parser.parse_args(args)
    return run_guarded(lambda: fetch_or_list(options), debug=False)


def fetch_or_list(options: argparse.Namespace) -> None:
    registry = ModelRegistry()
    if not options.list:
        pull_models(registry, options.model or registry.catalog.models, force=options.force)
        return
    for row in registry.status():
        state = "installed" if row.installed else "not installed"
        print(f"{row.name}@{row.version}  {row.kind}  {row.bytes / 1e6:.1f} MB  {state}")
        if row.problem:
            print(f"download_models: warning: {row.problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
