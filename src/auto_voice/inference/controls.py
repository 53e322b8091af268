"""What a user may choose about a conversion, as one checked value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from auto_voice.errors import ConfigError

SOURCE = "source"
VOICE = "voice"


@dataclass(frozen=True)
class ControlSpec:
    """What one control may be; the command line and the server build their options from it.

    Attributes:
        default: where it is not chosen.
        help: one line for the user.
        low, high: of the number; None for a switch.
        unit: of the number, for messages.
        word: a text that may stand in place of the number.
    """

    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    unit: str = ""
    word: str = ""

    @property
    def span(self) -> str:
        """The range in words."""
        if self.low is None or self.high is None:
            return "on or off"
        also = f" (or {self.word})" if self.word else ""
        if self.low == -self.high:
            return f"within ±{self.high:g}{also}"
        return f"between {self.low:g} and {self.high:g}{self.unit and ' '}{self.unit}{also}"

    def check(self, name: str, value: object) -> None:
        """Raises ConfigError where ``value`` is not in the range."""
        if self.low is None or self.high is None:
            if isinstance(self.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"{name} is true or false, not {value!r}.")
            return
        if value == self.default or (self.word and value == self.word):
            return
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:  # type: ignore[operator]  # False for NaN
            raise ConfigError(f"{name} must lie {self.span}, not {value}.")


def _control(default: Any, help: str, *limits: Any, **more: Any) -> Any:
    """A field of ``Controls`` that carries its specification."""
    return field(default=default, metadata={"spec": ControlSpec(default, help, *limits, **more)})


@dataclass(frozen=True)
class Controls:
    """How a conversion is shaped; the defaults shape nothing beyond the move to the voice's pitch.

    Attributes:
        semitones: transposition on top of the automatic one, within ±36.
        match_pitch: move the source's mean pitch to the voice's.
        singing: keep pitch classes: the automatic move is a whole number of octaves, and the
            melody is taken as it was sung.
        pitch_range: factor on the melody's distance from its mean: 0 is monotone, 1 keeps it, 2
            doubles it; ``"voice"`` gives it the voice's own spread.
        formants: semitones by which the resonances move, within ±12; the pitch stays.
        strength: how far towards the voice, from 0 (the source's own) to 1, and above, up to 1.5,
            further away from the source's own than the converter's record asks for.
        energy: how much of the source's loudness from syllable to syllable is kept, 0 to 1.
        breathiness: how much of the source's breath noise is kept, 0 to 1.
        loudness: LUFS of the result; ``"source"`` or None for that of the source's speech.
        denoise_db: steady noise of the source is first turned down by up to this much.
        trim: leave out what lies before the first and after the last speech.
    """

    semitones: float = _control(0.0, "Transpose further, in semitones, e.g. -2.5.", -36, 36)
    match_pitch: bool = _control(True, "Move the pitch to the voice's.")
    singing: bool = _control(False, "Keep pitch classes: move the pitch by whole octaves alone.")
    pitch_range: float | str = _control(
        1.0,
        "Factor on the melody: 0 is monotone, 1 keeps it, 2 doubles it; voice: as lively as the "
        "voice.",
        0,
        4,
        word=VOICE,
    )
    formants: float = _control(
        0.0,
        "Move the resonances by semitones, not the pitch: -3 sounds larger, +3 smaller.",
        -12,
        12,
    )
    strength: float = _control(
        1.0,
        "How far to go towards the voice: 0 is the source's own, 1 the voice, above 1 further away "
        "from the source's own.",
        0,
        1.5,
    )
    energy: float = _control(
        1.0, "How much of the source's loudness contour to keep, 0 to 1.", 0, 1
    )
    breathiness: float = _control(
        0.0, "How much of the source's breath noise to keep, 0 to 1.", 0, 1
    )
    loudness: float | str | None = _control(
        None, "Loudness of the result in LUFS, or source.", -70, -5, "LUFS", SOURCE
    )
    denoise_db: float = _control(
        0.0, "First turn steady noise of the source down by up to so many dB.", 0, 60, "dB"
    )
    trim: bool = _control(False, "Leave out silence before and after the speech.")

    def __post_init__(self) -> None:
        for name, spec in CONTROLS.items():
            spec.check(name, getattr(self, name))

    @property
    def formant_ratio(self) -> float:
        return float(2.0 ** (self.formants / 12.0))

    def account(self) -> dict[str, Any]:
        """What differs from the defaults, ready for JSON."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


CONTROLS: Mapping[str, ControlSpec] = {
    field.name: field.metadata["spec"] for field in fields(Controls)
}


def controls_from(values: Mapping[str, Any]) -> Controls:
    """``Controls`` from names and values as a job file or a request holds them.

    Raises:
        ConfigError: an unknown name, or a value that cannot be; numbers may be text.
    """
    unknown = sorted(set(values) - set(CONTROLS))
    if unknown:
        raise ConfigError(f"there is no control {unknown[0]}; known: {', '.join(CONTROLS)}.")
    return Controls(**{name: _value(CONTROLS[name].default, name, v) for name, v in values.items()})


def _value(default: object, name: str, value: Any) -> Any:
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        text = str(value).strip().lower()
        if text not in ("1", "0", "true", "false", "yes", "no"):
            raise ConfigError(f"{name} must be true or false, not {value!r}.")
        return text in ("1", "true", "yes")
    if isinstance(value, str) and value.strip() not in (VOICE, SOURCE):
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, not {value!r}.") from None
    return value.strip() if isinstance(value, str) else value
