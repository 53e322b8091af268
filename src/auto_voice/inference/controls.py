"""What a user may choose about a conversion, as one checked value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from auto_voice.errors import ConfigError

MOST_SEMITONES = 36.0
SOURCE = "source"
VOICE = "voice"


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
        strength: how far towards the voice, from 0 (the source's own) to 1.
        energy: how much of the source's loudness from syllable to syllable is kept, 0 to 1.
        breathiness: how much of the source's breath noise is kept, 0 to 1.
        loudness: LUFS of the result, ``"source"`` for the source's; None for the source's
            speech level.
        denoise_db: steady noise of the source is first turned down by up to this much.
        trim: leave out what lies before the first and after the last speech.
    """

    semitones: float = 0.0
    match_pitch: bool = True
    singing: bool = False
    pitch_range: float | str = 1.0
    formants: float = 0.0
    strength: float = 1.0
    energy: float = 1.0
    breathiness: float = 0.0
    loudness: float | str | None = None
    denoise_db: float = 0.0
    trim: bool = False

    def __post_init__(self) -> None:
        _within("semitones", self.semitones, -MOST_SEMITONES, MOST_SEMITONES, "±36")
        _within("formants", self.formants, -12, 12, "±12")
        _within("denoise_db", self.denoise_db, 0, 60, "0 and 60 dB")
        for name in ("strength", "energy", "breathiness"):
            _within(name, getattr(self, name), 0, 1, "0 and 1")
        if self.pitch_range != VOICE:
            _within("pitch_range", self.pitch_range, 0, 4, "0 and 4 (or voice)")
        if self.loudness not in (None, SOURCE):
            _within("loudness", self.loudness, -70, -5, "-70 and -5 LUFS (or source)")

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


def controls_from(values: dict[str, Any]) -> Controls:
    """``Controls`` from names and values as a job file or a request holds them.

    Raises:
        ConfigError: an unknown name, or a value that cannot be; numbers may be text.
    """
    known = {field.name: field for field in fields(Controls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"there is no control {unknown[0]}; known: {', '.join(known)}.")
    return Controls(**{name: _value(known[name].default, name, v) for name, v in values.items()})


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


def _within(name: str, value: object, low: float, high: float, shown: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]  # False for NaN
        joint = "within" if shown.startswith("±") else "between"
        raise ConfigError(f"{name} must lie {joint} {shown}, not {value}.")
