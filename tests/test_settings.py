"""Settings: who wins, where a value comes from, and the sentence for a value that cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from auto_voice import settings
from auto_voice.errors import CatalogError, ConfigError
from auto_voice.settings import SETTINGS, get_settings, unknown_variables


@pytest.fixture
def dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / ".env"
    monkeypatch.setattr(settings, "DOTENV", path)
    return path


def config_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_each_level_wins_over_the_next_and_says_so(tmp_path, dotenv, monkeypatch) -> None:
    assert get_settings().device == "auto"
    assert get_settings().origins["device"] == "default"

    mine = config_file(tmp_path, "models: {}\nsettings:\n  device: coreml\n")
    from_file = get_settings(config=mine)
    assert (from_file.device, from_file.origins["device"]) == ("coreml", f"file {mine}:3")

    dotenv.write_text('AUTOVOICE_DEVICE="cuda:1"\n')
    from_dotenv = get_settings(config=mine)
    assert from_dotenv.device == "cuda:1"
    assert from_dotenv.origins["device"] == f"{dotenv} AUTOVOICE_DEVICE"

    monkeypatch.setenv("AUTOVOICE_DEVICE", "cuda")
    from_environment = get_settings(config=mine)
    assert from_environment.device == "cuda"
    assert from_environment.origins["device"] == "environment AUTOVOICE_DEVICE"

    from_argument = get_settings(config=mine, device="cpu")
    assert (from_argument.device, from_argument.origins["device"]) == ("cpu", "argument")


def test_an_empty_variable_is_not_set(monkeypatch) -> None:
    monkeypatch.setenv("AUTOVOICE_FALLBACK", "")
    assert get_settings().fallback == "none"


def test_the_environment_is_read_when_asked_and_never_changed(dotenv, monkeypatch) -> None:
    import os

    dotenv.write_text("AUTOVOICE_OFFLINE=yes\nOTHER=1\n")
    before = dict(os.environ)
    assert get_settings().offline is True
    assert dict(os.environ) == before
    dotenv.write_text("AUTOVOICE_OFFLINE=off\n")
    assert get_settings().offline is False


def test_the_config_file_may_be_named_by_a_variable(tmp_path, monkeypatch) -> None:
    mine = config_file(tmp_path, "settings: {memory_budget_mb: 300, model_dir: weights}\n")
    monkeypatch.setenv("AUTOVOICE_CONFIG", str(mine))
    found = get_settings()
    assert found.memory_budget_mb == 300
    assert found.model_dir == tmp_path / "weights", "a path counts from the file that says it"


def test_a_home_is_expanded(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("AUTOVOICE_MODEL_DIR", "~/models")
    assert get_settings().model_dir == tmp_path / "models"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("offline", "perhaps", "offline (environment AUTOVOICE_OFFLINE) must be 1 or 0"),
        ("device", "gpu", "device (environment AUTOVOICE_DEVICE) must be one of auto, cpu, cuda"),
        ("fallback", "big", 'must be one of none, compact, mock, not "big"'),
        ("model_dir", "~nobody_of_this_name/x", "must be a path whose ~ names a user"),
        ("memory_budget_mb", "-5", "must be a whole number of MB"),
        ("memory_budget_mb", "1.5", "must be a whole number of MB"),
    ],
)
def test_a_wrong_value_is_named_with_its_origin(monkeypatch, key, value, says) -> None:
    monkeypatch.setenv(SETTINGS[key].variable, value)
    with pytest.raises(ConfigError, match=re.escape(says)):
        get_settings()


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^fallback must be one of none, compact, mock"):
        get_settings(fallback="all")
    with pytest.raises(ConfigError, match=r"^model_dir must be a path"):
        get_settings(model_dir=3)
    with pytest.raises(ConfigError, match="there is no setting modeldir; known: config"):
        get_settings(modeldir="x")


def test_mistakes_in_the_file_are_named_with_their_line(tmp_path) -> None:
    with pytest.raises(
        CatalogError, match=r"mine.yaml:2: settings.devise .* did you mean device\?"
    ):
        get_settings(config=config_file(tmp_path, "settings:\n  devise: cpu\n"))
    with pytest.raises(ConfigError, match=r"offline \(file .*mine.yaml:3\) must be 1 or 0"):
        get_settings(config=config_file(tmp_path, "settings:\n  device: cpu\n  offline: maybe\n"))
    for spelling in ("{settings: {offline: maybe}}", '"settings":\n  offline: maybe\n'):
        with pytest.raises(ConfigError, match=r"offline \(file .*mine.yaml:\d\) must be 1 or 0"):
            get_settings(config=config_file(tmp_path, spelling))
    with pytest.raises(ConfigError, match="there is no such file"):
        get_settings(config=tmp_path / "none.yaml")


def test_an_unreadable_dotenv_is_named(dotenv) -> None:
    dotenv.write_bytes(b"AUTOVOICE_DEVICE=\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"\.env cannot be read"):
        get_settings()


def test_variables_that_nothing_reads_are_found(dotenv, monkeypatch) -> None:
    monkeypatch.setenv("AUTOVOICE_MODELDIR", "/x")
    dotenv.write_text("AUTOVOICE_OFLINE=1\n")
    assert unknown_variables() == ["AUTOVOICE_MODELDIR", "AUTOVOICE_OFLINE"]


def test_the_example_names_every_variable_and_no_other() -> None:
    example = Path(__file__).parents[1] / ".env.example"
    named = set(re.findall(r"^#?(AUTOVOICE_\w+)=", example.read_text(encoding="utf-8"), re.M))
    assert named == {setting.variable for setting in SETTINGS.values()}


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": ""}, "home/.cache/auto_voice/models"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "home/.cache/auto_voice/models"),
        ("linux", {"XDG_CACHE_HOME": "{root}/xdg"}, "xdg/auto_voice/models"),
        ("darwin", {}, "home/Library/Caches/auto_voice/models"),
        ("win32", {"LOCALAPPDATA": "{root}/local"}, "local/auto_voice/Cache/models"),
        ("win32", {"LOCALAPPDATA": ""}, "home/AppData/Local/auto_voice/Cache/models"),
    ],
)
def test_models_lie_in_the_platforms_user_cache(
    tmp_path, monkeypatch, platform, variables, expected
) -> None:
    monkeypatch.setattr(settings.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(root=tmp_path))
    assert get_settings().model_dir == tmp_path / expected


def test_a_line_of_dotenv_that_is_no_setting_is_named(dotenv) -> None:
    dotenv.write_text("AUTOVOICE_OFFLINE=1\nthis is = 'no line\n")
    with pytest.raises(ConfigError, match=r"\.env:2 is not NAME=value"):
        get_settings()


@pytest.mark.parametrize(
    ("hub", "own", "offline"),
    [("1", None, True), ("true", None, True), ("0", None, False), ("1", "0", False)],
)
def test_the_hubs_own_switch_counts_as_offline_unless_ours_says_otherwise(
    monkeypatch, hub, own, offline
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", hub)
    if own is not None:
        monkeypatch.setenv("AUTOVOICE_OFFLINE", own)
    found = get_settings()
    assert found.offline is offline
    if hub != "0" and own is None:
        assert found.origins["offline"] == "environment HF_HUB_OFFLINE"


def test_a_folder_that_may_not_be_entered_holds_no_dotenv(monkeypatch) -> None:
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.stat", refuse)
    assert get_settings(config=None).offline is False


def test_mirrors_are_addresses_in_a_row(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("AUTOVOICE_MIRRORS", "http://a:8000/, https://b/x  http://a:8000")
    assert get_settings().mirrors == ("http://a:8000", "https://b/x")
    mine = config_file(tmp_path, "settings: {mirrors: ['http://c']}\n")
    assert get_settings(config=mine, mirrors=["http://d"]).mirrors == ("http://d",)
    monkeypatch.delenv("AUTOVOICE_MIRRORS")
    assert get_settings(config=mine).mirrors == ("http://c",)
    for wrong in ("ftp://a", "a:8000", "http://user:secret@a", "http://a?x=1"):
        with pytest.raises(ConfigError, match="mirrors"):
            get_settings(mirrors=[wrong])


def test_a_secret_is_never_shown(monkeypatch, capsys) -> None:
    from auto_voice.cli.main import main

    monkeypatch.setenv("AUTOVOICE_MIRROR_TOKEN", "the-secret-itself")
    assert main(["config", "show"]) == 0
    assert main(["config", "show", "--json"]) == 0
    told = capsys.readouterr().out
    assert "the-secret-itself" not in told + repr(get_settings())
    assert "(set)" in told
    monkeypatch.setenv("AUTOVOICE_MIRROR_TOKEN", "the-sécret")
    with pytest.raises(ConfigError) as error:
        get_settings()
    assert "the-sécret" not in str(error.value)
