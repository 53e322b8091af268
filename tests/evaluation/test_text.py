"""Error rates on transcripts with known edits, normalised as Whisper's own evaluation does."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_voice.errors import MissingDependencyError
from auto_voice.evaluation import metrics
from auto_voice.evaluation.metrics import (
    aligned_words,
    character_errors,
    normalise_text,
    word_errors,
)

words = st.lists(st.sampled_from(["red", "green", "blue", "cat", "dog"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("Don't STOP!", "do not stop"),
        ("It’s twenty-one.", "it is 21"),
        ("Mr. and Mrs. Smith", "mister and missus smith"),
        ("the twenty first of May", "the 21st of may"),
        ("in nineteen eighty seven", "in 1987"),
        ("twenty pounds", "£20"),
        ("fifty percent", "50%"),
        ("naïve café", "naive cafe"),
        ("um, the colour grey", "the color gray"),
        ("  a\n\tb  ", "a b"),
        ("—!", ""),
    ],
)
def test_two_ways_to_write_a_text_become_one(written: str, compared: str) -> None:
    assert normalise_text(written) == compared


def test_agrees_with_the_normaliser_of_transformers() -> None:
    """The same published code, carried by another package."""
    module = pytest.importorskip("transformers.models.whisper.english_normalizer")
    from whisper_normalizer.english import EnglishTextNormalizer

    spellings = EnglishTextNormalizer().standardize_spellings.mapping
    theirs = module.EnglishTextNormalizer(spellings)
    for text in ("He's gone, isn't he?", "one hundred and two", "3.14 m", "[noise] honour (sic)"):
        assert normalise_text(text) == " ".join(theirs(text).split())


def test_known_edits_are_counted_by_kind() -> None:
    reference = "the quick brown fox jumps over the lazy dog"
    found = word_errors(reference, "both the quick red fox jumps over the lazy")
    assert (found.substitutions, found.deletions, found.insertions) == (1, 1, 1)
    assert found.reference == 9
    assert found.rate == pytest.approx(3 / 9)


def test_case_punctuation_and_contractions_are_no_errors() -> None:
    assert word_errors("Hello, world! It's me.", "hello world it is me").rate == 0.0


def test_characters_are_finer_than_words() -> None:
    assert word_errors("kitten", "sitting").rate == 1.0
    assert character_errors("kitten", "sitting").rate == pytest.approx(3 / 6)


def test_nothing_heard_is_all_lost_and_babble_can_exceed_one() -> None:
    assert word_errors("cat dog", "").rate == 1.0
    assert word_errors("cat", "cat dog red green").rate == 3.0


def test_without_reference_there_is_no_rate() -> None:
    assert math.isnan(word_errors("", "hello").rate)
    assert word_errors("", "").edits == 0


@given(words, words)
@settings(deadline=None)
def test_distance_is_symmetric_and_bounded(a: list[str], b: list[str]) -> None:
    forth, back = word_errors(" ".join(a), " ".join(b)), word_errors(" ".join(b), " ".join(a))
    assert forth.edits == back.edits
    assert abs(len(a) - len(b)) <= forth.edits <= max(len(a), len(b))
    assert forth.insertions - forth.deletions == len(b) - len(a)


@given(words, words)
@settings(deadline=None)
def test_aligned_runs_hold_both_texts_in_order(a: list[str], b: list[str]) -> None:
    runs = list(aligned_words(" ".join(a), " ".join(b)))
    assert " ".join(x for _, x, _ in runs if x) == " ".join(a)
    assert " ".join(y for _, _, y in runs if y) == " ".join(b)
    assert all((x == y) == same for same, x, y in runs)


@pytest.mark.parametrize("package", ["whisper_normalizer", "jiwer"])
def test_a_missing_extra_is_named_with_its_install_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    metrics._whisper_normaliser.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"auto-voice\[eval\]"):
        word_errors("a", "b")
