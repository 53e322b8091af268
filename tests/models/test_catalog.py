"""The catalog: what it accepts, what an overlay does, and the sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_voice.errors import CatalogError, UnknownModelError
from auto_voice.models.registry.architectures import ARCHITECTURES
from auto_voice.models.registry.catalog import (
    split_key,
    version_order,
)
from auto_voice.models.registry.catalog_schema import builtin_catalog, load_catalog

SHA = "ab" * 32
GOOD = f"""\
schema: 1
models:
  tone:
    kind: sample
    description: a tone
    default: "1.0"
    aliases: {{old: "1.0"}}
    versions:
      "1.0":
        architecture: sample
        licence: MIT
        file: tone.wav
        sha256: {SHA}
        bytes: 10
        sources:
          - https://example.org/tone.wav
          - [file:///tmp/a, file:///tmp/b]
        params: {{sample_rate: 16000}}
        needs: {{ram_mb: 3}}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_value_arrives(write) -> None:
    version = load_catalog([write(GOOD)]).version("tone")
    assert (version.key, version.kind, version.architecture) == ("tone@1.0", "sample", "sample")
    assert version.files[0].sha256 == SHA
    assert version.files[0].sources == (
        ("https://example.org/tone.wav",),
        ("file:///tmp/a", "file:///tmp/b"),
    )
    assert version.params == {"sample_rate": 16000}
    assert (version.needs.ram_mb, version.needs.gpu) == (3, "optional")


# What replaces what in GOOD, the line of the mistake, and what the message must say.
MISTAKES = [
    (SHA, "abc", 13, 'models.tone.versions."1.0".sha256 must be 64 hexadecimal digits'),
    (SHA, SHA.upper(), 13, "sha256 must be 64 hexadecimal digits in lower case"),
    ("sha256:", "sha265:", 13, "sha265 is not a known key; did you mean sha256?"),
    ("bytes: 10", "bytes: ten", 14, 'bytes must be a whole number, not text "ten"'),
    ("bytes: 10", "bytes: 0", 14, "bytes must be at least 1"),
    ("kind: sample", "kind: smaple", 4, "models.tone.kind must be one of content"),
    ("architecture: sample", "architecture: os.system", 10, "must be one of hubert"),
    ("architecture: sample", "architecture: hubert", 10, "makes a content, not a sample"),
    ('default: "1.0"', "default: 1.0", 6, "default must be text in quotes"),
    ('default: "1.0"', 'default: "1.1"', 6, 'is "1.1", which is no version here'),
    ('old: "1.0"', 'old: "9"', 7, "aliases.old"),
    ('      "1.0":', "      1.0:", 9, 'must be text; write "1.0" in quotes'),
    ('      "1.0":', "      latest:", 9, "is an alias"),
    ("file: tone.wav", "file: ../tone.wav", 12, "must be a bare file name"),
    ("file: tone.wav", "file: metadata.json", 12, "keeps for itself"),
    ("https://example.org", "ftp://example.org", 16, 'starts with "ftp://"'),
    ("https://example.org/tone.wav", "hf://a/b@main/tone.wav", 16, "40 hex digits of a commit"),
    ("https://example.org/tone.wav", "pypi://a==1/b", 16, "must look like pypi://name==version"),
    ("ram_mb: 3", "ram_mb: -1", 19, "needs.ram_mb must be at least 0"),
    ("ram_mb: 3", "gpu: maybe", 19, "needs.gpu must be one of required, optional"),
    ("licence: MIT", "licence: [MIT]", 11, "licence must be text, not a list"),
    ("schema: 1", "schema: 2", 1, "schema must be 1"),
    ("    description: a tone", "    descripton: a tone", 5, "did you mean description?"),
    ("models:\n", "modles:\n", 2, "modles is not a known key; did you mean models?"),
    ("  tone:", "  Tone!:", 3, "is no model name"),
    ("versions:\n", "versions: nothing\n#", 8, 'versions must be a mapping, not text "nothing"'),
]


@pytest.mark.parametrize(("old", "new", "line", "says"), MISTAKES)
def test_a_mistake_is_named_with_file_line_and_key(write, old, new, line, says) -> None:
    path = write(GOOD.replace(old, new, 1) if "#" not in new else GOOD[: GOOD.index(old)] + new)
    with pytest.raises(CatalogError) as caught:
        load_catalog([path])
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: "), message
    assert says in message, message


def test_a_missing_key_is_named_at_its_owner(write) -> None:
    with pytest.raises(
        CatalogError, match=r'mine.yaml:9: models.tone.versions."1.0" lacks licence'
    ):
        load_catalog([write(GOOD.replace("        licence: MIT\n", ""))])


def test_a_duplicate_name_is_refused_with_both_lines(write) -> None:
    twice = GOOD + GOOD[GOOD.index("  tone:") :]
    with pytest.raises(CatalogError, match=r"mine.yaml:20: models.tone is there twice; .* line 3"):
        load_catalog([write(twice)])


@pytest.mark.parametrize(
    ("text", "line"),
    [("models: [", 1), ("models:\n  a: {\n", 2), ("a: b: c\n", 1), ("\tmodels:", 1)],
)
def test_what_is_not_yaml_is_named_with_its_line(write, text, line) -> None:
    with pytest.raises(CatalogError, match=r"mine.yaml:\d: is not valid YAML") as caught:
        load_catalog([write(text)])
    assert int(str(caught.value).split(":")[1]) >= line


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 100_000 + "]" * 100_000, "a: " + "{b: " * 900 + "}" * 900, "- " * 9000]
)
def test_nesting_that_would_overflow_the_stack_is_refused(write, text) -> None:
    with pytest.raises(CatalogError, match=r"mine.yaml:1: is nested more than \d+ levels deep"):
        load_catalog([write(text)])


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="there is no such file"):
        load_catalog([tmp_path / "none.yaml"])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogError, match="is not UTF-8"):
        load_catalog([tmp_path / "binary.yaml"])
    with pytest.raises(CatalogError, match="cannot be read"):
        load_catalog([tmp_path])


def test_a_yaml_tag_builds_nothing(write) -> None:
    evil = GOOD.replace("sample_rate: 16000", "x: !!python/object/apply:os.getpid []")
    with pytest.raises(CatalogError, match="cannot be read"):
        load_catalog([write(evil)])


def test_a_custom_file_without_hash_is_told_what_to_write(write, tmp_path: Path) -> None:
    (tmp_path / "tone.wav").write_bytes(b"0123456789")
    text = GOOD.replace(f"        sha256: {SHA}\n", "").replace(
        "https://example.org/tone.wav", "tone.wav"
    )
    with pytest.raises(
        CatalogError, match=r"lacks sha256; of .*tone.wav they are: sha256: 84d89877"
    ):
        load_catalog([write(text)])


def test_a_plain_path_counts_from_the_file_that_says_it(write, tmp_path: Path) -> None:
    text = GOOD.replace("https://example.org/tone.wav", "weights/tone.wav")
    files = load_catalog([write(text)]).version("tone").files
    assert files[0].sources[0] == (str(tmp_path / "weights" / "tone.wav"),)


def test_an_overlay_replaces_keys_adds_versions_and_models(write) -> None:
    overlay = f"""\
models:
  tone:
    description: my tone
    default: "1.10"
    versions:
      "1.0":
        sources: [https://mirror.example.org/tone.wav]
      "1.10":
        architecture: sample
        licence: CC0-1.0
        file: tone.flac
        sha256: {SHA}
        bytes: 5
        sources: [https://example.org/tone.flac]
  other:
    kind: vocoder
    versions:
      "1": {{architecture: griffin_lim, licence: MIT, files: []}}
"""
    catalog = load_catalog([write(GOOD, "base.yaml"), write(overlay)])
    entry = catalog.entry("tone")
    assert (entry.description, entry.default_version) == ("my tone", "1.10")
    assert entry.versions["1.0"].files[0].sha256 == SHA
    assert entry.versions["1.0"].files[0].sources == (("https://mirror.example.org/tone.wav",),)
    assert catalog.version("tone").licence == "CC0-1.0"
    assert catalog.version("tone", "old").version == "1.0"
    assert catalog.version("other").files == ()


def test_an_overlays_mistake_is_named_in_the_overlay(write) -> None:
    base = write(GOOD, "base.yaml")
    mine = write('models:\n  tone:\n    default: "7"\n')
    with pytest.raises(CatalogError, match=r"mine.yaml:3: models.tone.default"):
        load_catalog([base, mine])


def test_new_bytes_in_an_overlay_do_not_inherit_the_old_hash(write) -> None:
    mine = write('models:\n  tone:\n    versions:\n      "1.0": {file: other.wav}\n')
    with pytest.raises(CatalogError, match=r"mine.yaml:4: .* lacks sha256"):
        load_catalog([write(GOOD, "base.yaml"), mine])


def test_files_and_file_exclude_each_other_and_names_are_unique(write) -> None:
    file = f"{{file: a.bin, sha256: {SHA}, bytes: 1, sources: [x]}}"
    both = GOOD.replace("        params:", f"        files: [{file}]\n        params:")
    with pytest.raises(CatalogError, match="stands beside files"):
        load_catalog([write(both)])
    twice = f"""\
models:
  a:
    kind: sample
    versions:
      "1": {{architecture: sample, licence: MIT, files: [{file}, {file}]}}
"""
    with pytest.raises(CatalogError, match=r"names a.bin twice"):
        load_catalog([write(twice)])


def test_names_versions_and_aliases_resolve(write) -> None:
    catalog = load_catalog([write(GOOD)])
    for name, version in [
        ("tone", None),
        ("tone@1.0", None),
        ("tone@latest", None),
        ("tone", "stable"),
    ]:
        assert catalog.version(name, version).key == "tone@1.0"
    with pytest.raises(UnknownModelError, match=r"there is no model tune; did you mean tone\?"):
        catalog.version("tune")
    with pytest.raises(
        UnknownModelError, match=r"tone has no version 2.0; .*known: 1.0, latest, old"
    ):
        catalog.version("tone@2.0")
    with pytest.raises(UnknownModelError, match="contradict"):
        split_key("tone@1.0", "2.0")


def test_versions_are_ordered_by_number() -> None:
    assert sorted(["1.10", "1.9", "1.9rc1", "2"], key=version_order) == [
        "1.9",
        "1.9rc1",
        "1.10",
        "2",
    ]


def test_latest_is_the_highest_version_and_stable_the_default(write) -> None:
    text = GOOD.replace('default: "1.0"', 'default: "1.9"').replace('old: "1.0"', 'old: "1.9"')
    text = text.replace('"1.0":', '"1.9":')
    more = text[text.index('      "1.9":') :].replace("1.9", "1.10")
    catalog = load_catalog([write(text + more)])
    assert catalog.version("tone@latest").version == "1.10"
    assert catalog.version("tone@stable").version == "1.9"
    assert catalog.version("tone").version == "1.9"


def test_the_built_in_catalog_is_complete_and_pinned() -> None:
    catalog = load_catalog()
    assert catalog.files == (builtin_catalog(),)
    expected = {
        "hubert_base": "content",
        "hifigan_universal": "vocoder",
        "griffin_lim": "vocoder",
        "speaker_encoder": "speaker",
        "speaker_dvector": "speaker",
        "recogniser_base": "recogniser",
        "recogniser_tiny_en": "recogniser",
        "quality_dnsmos": "quality",
        "sample_two_cities": "sample",
        "sample_clone_test": "sample",
        "sample_beckett": "sample",
    }
    assert expected.items() <= {name: e.kind for name, e in catalog.models.items()}.items()
    for version in catalog.versions():
        assert version.architecture in ARCHITECTURES
        assert version.licence
        for file in version.files:
            assert all(uris for uris in file.sources)
    vocoder = catalog.compact("vocoder")
    assert vocoder is not None
    assert vocoder.name == "vocoder_compact"
    assert catalog.compact("speaker") is None


def test_every_source_of_the_built_in_catalog_is_understood_by_the_fetchers() -> None:
    from auto_voice.models.registry.sources import parse_source

    for version in load_catalog().versions():
        for file in version.files:
            for uri in (uri for uris in file.sources for uri in uris):
                parse_source(uri)


def test_an_empty_overlay_changes_nothing(write) -> None:
    base = write(GOOD, "base.yaml")
    for text in ("", "# nothing\n", "models:\n", "settings: {device: cpu}\n"):
        assert list(load_catalog([base, write(text)]).models) == ["tone"]
