"""Error rates on transcripts with known edits, and agreement with jiwer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_voice.evaluation.text import (
    character_error_rate,
    count_edits,
    normalise_text,
    spell_number,
    word_error_rate,
    word_errors,
)

words = st.lists(st.sampled_from(["red", "green", "blue", "a", "an"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Don't STOP!", "dont stop"),
        ("It’s twenty-one.", "its twenty one"),
        ("Mr. and Mrs. Smith", "mister and missus smith"),
        ("salt & pepper", "salt and pepper"),
        ("the 21st of May", "the twenty first of may"),
        ("12th, 3rd, 30th", "twelfth third thirtieth"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("in 1987", "in nineteen eighty seven"),
        ("1905 and 1900", "nineteen oh five and nineteen hundred"),
        ("2005", "two thousand five"),
        ("the 1990s", "the nineteen nineties"),
        ("3.14", "three point one four"),
        ("$1 or £20", "one dollar or twenty pounds"),
        ("50%", "fifty percent"),
        ("at 3pm", "at three pm"),
        ("naïve café", "naive cafe"),
        ("  a\n\tb  ", "a b"),
        ("…—!", ""),
        ("0", "zero"),
    ],
)
def test_writing_becomes_speech(written: str, spoken: str) -> None:
    assert normalise_text(written) == spoken


@given(st.text(max_size=60))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once


def test_numbers_too_long_to_name_are_read_digit_by_digit() -> None:
    assert spell_number(10**15) == "one" + " zero" * 15


def test_known_edits_are_counted_by_kind() -> None:
    reference = "the quick brown fox jumps over the lazy dog"
    found = word_errors(reference, "oh the quick red fox jumps over the lazy")
    assert (found.substitutions, found.deletions, found.insertions) == (1, 1, 1)
    assert found.reference == 9
    assert found.rate == pytest.approx(3 / 9)


def test_case_and_punctuation_are_no_errors() -> None:
    assert word_error_rate("Hello, world!", "hello world") == 0.0
    assert word_error_rate("Hello, world!", "hello world", normalise=False) == 1.0


def test_characters_are_finer_than_words() -> None:
    assert word_error_rate("kitten", "sitting") == 1.0
    assert character_error_rate("kitten", "sitting") == pytest.approx(3 / 6)


def test_nothing_heard_is_all_lost_and_babble_can_exceed_one() -> None:
    assert word_error_rate("one two", "") == 1.0
    assert word_error_rate("one", "one two three four") == 3.0


def test_without_reference_there_is_no_rate() -> None:
    assert math.isnan(word_error_rate("", "hello"))


@given(words, words)
def test_distance_is_symmetric_and_bounded(a: list[str], b: list[str]) -> None:
    forth, back = count_edits(a, b), count_edits(b, a)
    assert forth.edits == back.edits
    assert abs(len(a) - len(b)) <= forth.edits <= max(len(a), len(b))
    assert forth.insertions - forth.deletions == len(b) - len(a)


@given(words, words)
@settings(deadline=None)
def test_agrees_with_jiwer(a: list[str], b: list[str]) -> None:
    jiwer = pytest.importorskip("jiwer")
    said, heard = " ".join(a), " ".join(b)
    ours = word_errors(said, heard, normalise=False)
    theirs = jiwer.process_words(said, heard)
    assert ours.rate == pytest.approx(theirs.wer)
    assert ours.edits == theirs.substitutions + theirs.deletions + theirs.insertions
    assert character_error_rate(said, heard, normalise=False) == pytest.approx(
        jiwer.cer(said, heard)
    )
