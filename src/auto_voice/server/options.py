"""The options of a conversion as form fields, checked before anything is queued."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import Form

from auto_voice.audio.encoding import choose_encoding
from auto_voice.inference.controls import controls_from
from auto_voice.server.schemas import Format


class ConvertOptions:
    """Fields that ``POST /v1/convert`` and ``POST /v1/jobs`` share."""

    def __init__(
        self,
        voice: Annotated[
            str,
            Form(max_length=80, description="A stored voice; or send `reference` instead."),
        ] = "",
        semitones: Annotated[
            float, Form(ge=-36, le=36, allow_inf_nan=False, description="Transpose further.")
        ] = 0.0,
        keep_pitch: Annotated[
            bool, Form(description="Do not move the pitch to the voice's.")
        ] = False,
        singing: Annotated[bool, Form(description="Keep pitch classes: move by octaves.")] = False,
        pitch_range: Annotated[
            str,
            Form(pattern=r"^(voice|\d(\.\d{1,4})?)$", description="0 monotone to 4; or voice."),
        ] = "1",
        formants: Annotated[
            float,
            Form(ge=-12, le=12, allow_inf_nan=False, description="Semitones of the resonances."),
        ] = 0.0,
        strength: Annotated[
            float,
            Form(ge=0, le=1, allow_inf_nan=False, description="How far towards the voice."),
        ] = 1.0,
        energy: Annotated[
            float, Form(ge=0, le=1, allow_inf_nan=False, description="Loudness kept of the source.")
        ] = 1.0,
        breathiness: Annotated[
            float, Form(ge=0, le=1, allow_inf_nan=False, description="Breath kept of the source.")
        ] = 0.0,
        loudness: Annotated[
            str,
            Form(
                pattern=r"^(source|-\d{1,2}(\.\d{1,2})?)?$",
                description="LUFS, -70 to -5; or source.",
            ),
        ] = "",
        denoise_db: Annotated[
            float,
            Form(ge=0, le=60, allow_inf_nan=False, description="Turn steady noise down first."),
        ] = 0.0,
        trim: Annotated[bool, Form(description="Leave out what surrounds the speech.")] = False,
        format: Annotated[Format, Form(description="Of the result.")] = "wav",
        subtype: Annotated[
            str, Form(max_length=20, description="Sample coding, e.g. pcm_24; or bits: 16, 24, 32f")
        ] = "",
        measure: Annotated[
            bool, Form(description="Also measure the likeness, and the words that were kept.")
        ] = False,
    ) -> None:
        self.voice = voice
        self.format = format
        self.subtype = subtype or None
        self.measure = measure
        chosen: dict[str, Any] = {
            "semitones": semitones,
            "match_pitch": not keep_pitch,
            "singing": singing,
            "pitch_range": pitch_range,
            "formants": formants,
            "strength": strength,
            "energy": energy,
            "breathiness": breathiness,
            "denoise_db": denoise_db,
            "trim": trim,
        }
        self.controls = chosen | ({"loudness": loudness} if loudness else {})

    def request(self) -> dict[str, Any]:
        """What a worker needs to know.

        Raises:
            AudioOutputError: the format has no such coding.
            ConfigError: a control that cannot be.
        """
        controls_from(self.controls)
        choose_encoding(Path("result"), self.format, self.subtype)
        return {
            "voice": self.voice,
            "controls": self.controls,
            "format": self.format,
            "subtype": self.subtype,
            "measure": self.measure,
        }
