"""Word and character error rates: jiwer counts the edits of texts that Whisper normalises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from auto_voice.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Callable

    import jiwer


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
    """The text as it is compared: Whisper's English normaliser (Radford et al. 2022, appendix C).

    It writes lower case without marks and fillers, contractions in full, numbers as digits and
    British spellings as American ones. Typographic apostrophes, which it would part words at, are
    made plain first.

    Raises:
        MissingDependencyError: the extra ``eval`` is not installed.
    """
    return " ".join(_whisper_normaliser()(text.replace("’", "'")).split())


def word_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Word edits from ``reference`` to ``hypothesis``, both normalised."""
    return _count(_aligned(reference, hypothesis))


def character_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Character edits, both texts normalised; spaces between words count as characters."""
    texts = normalise_text(reference), normalise_text(hypothesis)
    return _count(_jiwer().process_characters(*texts))


def aligned_words(reference: str, hypothesis: str) -> Iterator[tuple[bool, str, str]]:
    """Runs of words of both normalised texts, in order, and whether they are the same."""
    found = _aligned(reference, hypothesis)
    for chunk in found.alignments[0]:
        yield (
            chunk.type == "equal",
            " ".join(found.references[0][chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(found.hypotheses[0][chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )


def _aligned(reference: str, hypothesis: str) -> jiwer.WordOutput:
    texts = normalise_text(reference), normalise_text(hypothesis)
    return cast("jiwer.WordOutput", _jiwer().process_words(*texts))


def _count(found: jiwer.WordOutput | jiwer.CharacterOutput) -> ErrorCount:
    reference = found.hits + found.substitutions + found.deletions
    return ErrorCount(found.substitutions, found.deletions, found.insertions, reference)


@cache
def _whisper_normaliser() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise _missing("whisper-normalizer") from error
    return cast("Callable[[str], str]", EnglishTextNormalizer())


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise _missing("jiwer") from error
    return jiwer


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"{package} is not installed, so words cannot be compared; install it with: "
        "pip install 'auto-voice[eval]', or leave them out with --without words"
    )
