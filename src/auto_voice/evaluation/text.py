"""Word and character error rates, and the normalisation that makes transcripts comparable."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TITLES = {
    "mr": "mister",
    "mrs": "missus",
    "ms": "miss",
    "dr": "doctor",
    "st": "saint",
    "prof": "professor",
    "vs": "versus",
    "etc": "et cetera",
    "ok": "okay",
}
_ONES: tuple[str, ...] = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
_ONES += ("eleven", "twelve", "thirteen", "fourteen", "fifteen")
_ONES += ("sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand"))
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_CURRENCY = {"$": ("dollar", "dollars"), "£": ("pound", "pounds"), "€": ("euro", "euros")}
_NUMBER = re.compile(
    r"(?P<currency>[$£€])?(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?:\.(?P<fraction>\d+))?"
    r"(?P<suffix>(?:st|nd|rd|th|s)(?![a-z]))?(?P<percent>%)?(?!\d)"
)


@dataclass(frozen=True)
class ErrorCount:
    """Edits between a reference and a hypothesis.

    Attributes:
        substitutions, deletions, insertions: of a cheapest edit script.
        reference: units (words or characters) in the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    reference: int

    @property
    def edits(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per reference unit; may exceed 1. NaN where the reference is empty."""
        return self.edits / self.reference if self.reference else float("nan")


def normalise_text(text: str) -> str:
    """Lower-case English words, single-spaced: what transcripts become before comparison.

    Compatibility forms and accents are folded, numbers are spelled out (``21st`` is "twenty
    first", ``$3.50`` "three point five zero dollars", ``50%`` "fifty percent", a bare year from
    1100 to 1999 by pairs), common titles are expanded, ``&`` is "and", apostrophes vanish
    (``don't`` is "dont") and every other mark, hyphens included, parts words.
    """
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c for c in text if not unicodedata.combining(c)).lower()
    text = text.replace("&", " and ").replace("’", "'")
    text = _NUMBER.sub(_spell_match, text)
    text = re.sub(r"(?<=\w)'(?=\w)|'", "", text)
    text = re.sub(r"[\W_]+", " ", text)
    return " ".join(_TITLES.get(word, word) for word in text.split())


def word_errors(reference: str, hypothesis: str, *, normalise: bool = True) -> ErrorCount:
    """Word edits from ``reference`` to ``hypothesis``."""
    a, b = _prepare(reference, normalise), _prepare(hypothesis, normalise)
    return count_edits(a.split(), b.split())


def character_errors(reference: str, hypothesis: str, *, normalise: bool = True) -> ErrorCount:
    """Character edits, single spaces between words counted as characters."""
    a, b = _prepare(reference, normalise), _prepare(hypothesis, normalise)
    return count_edits(list(a), list(b))


def word_error_rate(reference: str, hypothesis: str, *, normalise: bool = True) -> float:
    """Word edits per reference word."""
    return word_errors(reference, hypothesis, normalise=normalise).rate


def character_error_rate(reference: str, hypothesis: str, *, normalise: bool = True) -> float:
    """Character edits per reference character."""
    return character_errors(reference, hypothesis, normalise=normalise).rate


def count_edits(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCount:
    """Levenshtein distance with its three parts, by dynamic programming over the whole table."""
    ids = {token: i for i, token in enumerate(dict.fromkeys([*reference, *hypothesis]))}
    ref = np.array([ids[t] for t in reference], dtype=np.int64)
    hyp = np.array([ids[t] for t in hypothesis], dtype=np.int64)
    rows, columns = len(ref), len(hyp)
    cost = np.zeros((rows + 1, columns + 1), dtype=np.int32)
    cost[0] = steps = np.arange(columns + 1, dtype=np.int32)
    for i in range(1, rows + 1):
        best = np.empty(columns + 1, dtype=np.int32)
        best[0] = i
        best[1:] = np.minimum(cost[i - 1, :-1] + (hyp != ref[i - 1]), cost[i - 1, 1:] + 1)
        # An insertion costs one a column: a running minimum of (cost - column) does them all.
        cost[i] = np.minimum.accumulate(best - steps) + steps
    return _backtrace(cost, ref, hyp)


def _backtrace(
    cost: np.ndarray[tuple[int, int], np.dtype[np.int32]],
    ref: np.ndarray[tuple[int], np.dtype[np.int64]],
    hyp: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> ErrorCount:
    i, j = len(ref), len(hyp)
    substitutions = deletions = insertions = 0
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (ref[i - 1] != hyp[j - 1]):
            substitutions += int(ref[i - 1] != hyp[j - 1])
            i, j = i - 1, j - 1
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            deletions, i = deletions + 1, i - 1
        else:
            insertions, j = insertions + 1, j - 1
    return ErrorCount(substitutions, deletions, insertions, len(ref))


def _prepare(text: str, normalise: bool) -> str:
    return normalise_text(text) if normalise else text


def _spell_match(match: re.Match[str]) -> str:
    whole, fraction, suffix = match["whole"], match["fraction"], match["suffix"]
    digits = whole.replace(",", "")
    if len(digits) > 15:  # No number that anybody reads out, and int refuses thousands of digits.
        return f" {' '.join(_ONES[int(d)] for d in digits)} "
    number = int(digits)
    plain = not (fraction or suffix in ("st", "nd", "rd", "th") or match["currency"])
    if plain and len(whole) == 4 and 1100 <= number <= 1999:
        words = _spell_year(number)
    else:
        words = spell_number(number)
    if fraction:
        words += " point " + " ".join(_ONES[int(d)] for d in fraction)
    elif suffix in ("st", "nd", "rd", "th"):
        words = _ordinal(words)
    elif suffix == "s":
        words = words[:-1] + "ies" if words.endswith("y") else words + "s"
    if match["currency"]:
        one, many = _CURRENCY[match["currency"]]
        words += " " + (one if number == 1 and not fraction else many)
    if match["percent"]:
        words += " percent"
    return f" {words} "


def spell_number(number: int) -> str:
    """A whole number below 10^15 in English words, no "and", no hyphens; longer ones by digits."""
    if number >= 10**15:
        return " ".join(_ONES[int(d)] for d in str(number))
    words: list[str] = []
    for scale, name in _SCALES:
        if number >= scale:
            words += [spell_number(number // scale), name]
            number %= scale
    if number >= 100:
        words += [_ONES[number // 100], "hundred"]
        number %= 100
    if number >= 20:
        words.append(_TENS[number // 10])
        number %= 10
        if number:
            words.append(_ONES[number])
    elif number or not words:
        words.append(_ONES[number])
    return " ".join(words)


def _spell_year(year: int) -> str:
    century, rest = divmod(year, 100)
    if rest == 0:
        return f"{spell_number(century)} hundred"
    return f"{spell_number(century)} {'oh ' if rest < 10 else ''}{spell_number(rest)}"


def _ordinal(words: str) -> str:
    head, _, last = words.rpartition(" ")
    if last in _ORDINALS:
        last = _ORDINALS[last]
    elif last.endswith("y"):
        last = last[:-1] + "ieth"
    else:
        last += "th"
    return f"{head} {last}".strip()
