"""The record behind ``autovoice models stats``: what was used when, and how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from auto_voice import events
from auto_voice.cli.main import main
from auto_voice.models import ModelRegistry
from auto_voice.models.registry.maintenance import (
    MOST_USAGE_BYTES,
    USAGE,
    UsageRecord,
    recorded,
    usage,
)
from auto_voice.models.registry.store import ModelStore
from auto_voice.progress import told_to
from registry_kit import tone_catalog


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tone_catalog(tmp_path / "catalog", ["1", "2"])


def test_stats_say_what_was_used_when_and_how_long_it_took(config, tmp_path, capsys) -> None:
    folder = tmp_path / "models"
    registry = ModelRegistry(folder, config=config, progress=False)
    for _ in range(3):
        registry.load("tone@1")
        registry.unload()
    registry.load("tone@2")
    registry.load("tone@2")
    found = {one.model: one for one in usage(registry.store)}
    first, second = found["tone@1"], found["tone@2"]
    assert (first.loads, second.loads) == (3, 1)
    assert first.longest_load_s >= first.load_s > 0
    assert second.last >= first.last >= first.first > 0
    assert first.fetched_bytes == registry.version("tone@1").bytes
    assert first.source == str(tmp_path / "catalog" / "source-1" / "tone.wav")
    assert (first.device, first.fallbacks) == ("cpu", 0)

    where = ["--config", str(config), "--model-dir", str(folder)]
    assert main(["models", "stats", "--json", *where]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == ["tone@2", "tone@1"]
    assert main(["models", "stats", *where]) == 0
    assert "tone@1" in capsys.readouterr().out


def test_loads_side_by_side_are_recorded_and_told_like_others(config, tmp_path) -> None:
    registry = ModelRegistry(tmp_path / "models", config=config, progress=False)
    registry.pull("tone", "1")
    registry.pull("tone", "2")
    told: list[tuple[str, str]] = []
    with told_to(lambda progress: told.append((progress.stage, progress.item))):
        registry.load_installed(["tone@1", "tone@2"])
    assert {one.model: one.loads for one in usage(registry.store)} == {"tone@1": 1, "tone@2": 1}
    assert {("load", "tone@1"), ("load", "tone@2")} <= set(told)


def test_a_model_that_stays_loaded_is_noted_once_an_hour(tmp_path) -> None:
    store = ModelStore(tmp_path)
    record = UsageRecord(tmp_path)
    context = events.SpanContext("1" * 32, "1" * 16)
    for minute in range(0, 150, 10):
        record(events.Event(events.Reuse("a@1"), 1e9 + minute * 60, 0.0, context))
    assert len((tmp_path / USAGE).read_text().splitlines()) == 3
    assert usage(store)[0].last == 1e9 + 120 * 60


def test_the_record_stays_small_and_keeps_the_newest(tmp_path) -> None:
    record, context = UsageRecord(tmp_path), events.SpanContext("1" * 32, "1" * 16)
    for n in range(6000):
        record(events.Event(events.Load(f"m{n % 50}@1", "cpu"), float(n), 0.1, context))
    assert (tmp_path / USAGE).stat().st_size <= MOST_USAGE_BYTES
    assert usage(ModelStore(tmp_path))[0].last == 5999.0


def test_damaged_lines_and_strangers_cost_nothing(tmp_path) -> None:
    record, context = UsageRecord(tmp_path), events.SpanContext("1" * 32, "1" * 16)
    (tmp_path / USAGE).write_bytes(b'{"event": "load"}\nnonsense\n[]\n\xff\n{"model": 1}\n')
    record(events.Event(events.Load("a@1", "cpu"), 5.0, 0.1, context))
    record(events.Event(events.Load("b@1", "cpu"), 5.0, 0.1, context, error="MemoryError"))
    record(events.Event(events.Load("c@1 (mock)", "cpu"), 5.0, 0.1, context))
    assert [one.model for one in usage(ModelStore(tmp_path))] == ["a@1"]


def test_mocks_and_other_folders_are_not_recorded(config, tmp_path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    ModelRegistry(other, config=config, progress=False).load("tone@1")
    ModelRegistry(here, config=config, use_mock=True).load("tone@1")
    assert not here.exists()
    ModelRegistry(here, config=config, progress=False).load("tone@2")
    assert [one.model for one in usage(ModelStore(here))] == ["tone@2"]
    assert [one.model for one in usage(ModelStore(other))] == ["tone@1"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="folders cannot be locked here")
def test_a_folder_that_cannot_be_written_has_no_record(config, tmp_path) -> None:
    registry = ModelRegistry(tmp_path / "m", config=config, progress=False)
    registry.pull("tone@1")
    (tmp_path / "m" / USAGE).unlink()
    (tmp_path / "m").chmod(0o555)
    try:
        assert registry.load("tone@1")
        assert usage(registry.store) == []
    finally:
        (tmp_path / "m").chmod(0o755)


def test_a_record_that_is_not_writable_stops_nothing(tmp_path) -> None:
    (tmp_path / USAGE).mkdir()
    with recorded(UsageRecord(tmp_path)):
        events.emit(events.Load("a@1", "cpu"), 0.1)
    assert usage(ModelStore(tmp_path)) == []


@pytest.mark.slow
def test_several_processes_keep_one_record(tmp_path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom auto_voice import events\n"
        "from auto_voice.models.registry.maintenance import UsageRecord, recorded\n"
        "with recorded(UsageRecord(Path(sys.argv[1]))):\n"
        "    for n in range(200): events.emit(events.Load(f'p{sys.argv[2]}@{n}', 'cpu'), 0.1)\n"
    )
    several = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(4)
    ]
    assert [process.wait(60) for process in several] == [0] * 4
    assert len(usage(ModelStore(tmp_path))) == 800
    assert len((tmp_path / USAGE).read_bytes().splitlines()) == 800
