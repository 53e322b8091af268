"""``autovoice voices``: the library of stored voices; and ``inspect``, which says what a recording
would give one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import make_pipeline, model_options, truncation_option

if TYPE_CHECKING:
    from auto_voice.types import Voice
    from auto_voice.voices.inspection import Inspection
    from auto_voice.voices.library import VoiceLibrary


PATH = click.Path(path_type=Path)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what has that name.")


@click.group()
def voices() -> None:
    """Keep voices under a name and use them wherever a voice is asked for.

    \b
    autovoice voices add ann ann1.wav ann2.wav --consent "agreed by mail, 3 May"
    autovoice convert talk.wav --voice ann
    autovoice voices blend anna-ben ann=0.7 ben=0.3
    """


def library() -> VoiceLibrary:
    """The user's voices."""
    from auto_voice.voices.library import VoiceLibrary

    return VoiceLibrary()


@voices.command()
@click.argument("name")
@click.argument("references", nargs=-1, required=True, type=PATH)
@click.option(
    "--consent", default="", metavar="TEXT", help="What the owner of the voice agreed to."
)
@click.option(
    "--no-recording",
    is_flag=True,
    help="Do not keep the speech; the voice cannot be encoded again when models change.",
)
@overwrite_option
@truncation_option
@as_json_option
@model_options
def add(
    name: str,
    references: tuple[Path, ...],
    consent: str,
    no_recording: bool,
    overwrite: bool,
    as_json: bool,
    mock: bool,
    **models: Any,
) -> None:
    """Store the voice of the recordings REFERENCES as NAME.

    All recordings must be of one person; 5 to 30 seconds of clean speech are enough. Notes say what
    is wrong with a recording and what to record instead.

    \b
    autovoice voices add ann ann.wav
    autovoice voices add ben ben1.flac ben2.flac --consent "signed form of 3 May"
    """
    from auto_voice.errors import VoiceError

    stored = library()
    if stored.path(name).exists() and not overwrite:
        raise VoiceError(f"there is a voice {name!r} already; add --overwrite or choose another.")
    pipeline = make_pipeline(mock, as_json, **models)
    voice = pipeline.clone(
        list(references), name=name, consent=consent, keep_recording=not no_recording
    )
    path = stored.add(name, voice, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps({**describe(voice), "file": str(path)}))
        return
    click.echo(f"stored {name}: {_line(voice)}")
    for note in voice.notes:
        click.echo(f"  note       {note}")


@voices.command("list")
@as_json_option
def list_(as_json: bool) -> None:
    """List the stored voices.

    \b
    autovoice voices list
    autovoice voices list --json
    """
    stored = library()
    found, damaged = stored.facts()
    for text in damaged:
        click.echo(f"autovoice: {text}", err=True)
    if as_json:
        facts = [_described(name, known) for name, known in found.items()]
        click.echo(json.dumps({"folder": str(stored.folder), "voices": facts}, indent=2))
        return
    for name, known in found.items():
        click.echo(f"{name:<20} {_summed_up(known)}")
    if not stored.names():
        click.echo("no voice is stored yet; add one: autovoice voices add NAME RECORDING", err=True)
    click.echo(f"kept in {stored.folder}", err=True)


@voices.command()
@click.argument("name")
@as_json_option
def show(name: str, as_json: bool) -> None:
    """Show everything known of the voice NAME.

    \b
    autovoice voices show ann
    """
    stored = library()
    voice = stored.get(name)
    facts = {**describe(voice), "file": str(stored.path(name))}
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if key == "notes":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {'-' if v is None else v}" for k, v in value.items()) or "-"
        click.echo(f"{key:<16} {'-' if value in (None, '') else value}")
    for note in voice.notes:
        click.echo(f"{'note':<16} {note}")


@voices.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(names: tuple[str, ...], yes: bool) -> None:
    """Delete the voices NAMES.

    \b
    autovoice voices remove ann --yes
    """
    stored = library()
    for name in names:
        stored.require(name)
    if not yes:
        click.confirm(f"delete {', '.join(names)} for good?", abort=True)
    for name in names:
        stored.remove(name)
        click.echo(f"removed {name}")


@voices.command()
@click.argument("name")
@click.argument("to")
@overwrite_option
def rename(name: str, to: str, overwrite: bool) -> None:
    """Call the voice NAME TO from now on.

    \b
    autovoice voices rename ann anna
    """
    library().rename(name, to, overwrite=overwrite)
    click.echo(f"{name} is now {to}")


@voices.command("export")
@click.argument("name")
@click.option("-o", "--output", type=PATH, help="File to write [default: NAME.safetensors].")
@click.option("--no-recording", is_flag=True, help="Leave the speech out of the file.")
@overwrite_option
def export(name: str, output: Path | None, no_recording: bool, overwrite: bool) -> None:
    """Write the voice NAME as a file that others can import, or use as it is.

    \b
    autovoice voices export ann -o ann.safetensors --no-recording
    """
    from dataclasses import replace

    from auto_voice.audio.io import ensure_writable
    from auto_voice.voices.voice_file import SUFFIX, save_voice

    voice = library().get(name)
    target = ensure_writable(output or Path(name + SUFFIX), overwrite=overwrite)
    save_voice(target, replace(voice, speech=None) if no_recording else voice)
    click.echo(f"wrote {target}")


@voices.command("import")
@click.argument("file", type=PATH)
@click.option("--name", help="What to call it [default: the name in the file].")
@overwrite_option
def import_(file: Path, name: str | None, overwrite: bool) -> None:
    """Store the voice of FILE, which `export` or `autovoice clone` wrote.

    \b
    autovoice voices import ann.safetensors --name anna
    """
    from auto_voice.voices.voice_file import load_voice

    voice = load_voice(file)
    chosen = name or voice.name or file.stem
    library().add(chosen, voice, overwrite=overwrite)
    click.echo(f"stored {chosen}: {_line(voice)}")


@voices.command()
@click.argument("name")
@click.argument("parts", nargs=-1, required=True, metavar="VOICE=WEIGHT...")
@overwrite_option
@truncation_option
@model_options
def blend(name: str, parts: tuple[str, ...], overwrite: bool, mock: bool, **models: Any) -> None:
    """Store a voice between others as NAME; a part is a stored voice, a voice file or a recording.

    \b
    autovoice voices blend calm ann=0.7 ben=0.3
    autovoice voices blend mix ann=1 stranger.wav=1
    """
    from auto_voice.types import Voice
    from auto_voice.voices.blending import blend_voices, fine_tuned_alike
    from auto_voice.voices.library import resolve_voice

    stored = library()
    pipeline = cache(lambda: make_pipeline(mock, **models))
    pairs = []
    for part in parts:
        label, weight = _weighted(part)
        found = resolve_voice(label)
        pairs.append((found if isinstance(found, Voice) else pipeline().voice(found), weight))
    pairs = fine_tuned_alike(pairs, lambda voice: pipeline().voice(voice))
    voice = blend_voices(pairs, name=name)
    stored.add(name, voice, overwrite=overwrite)
    click.echo(f"stored {name}: {_line(voice)}")
    for note in voice.notes:
        click.echo(f"  note       {note}")


@voices.command()
@click.argument("names", nargs=-1, required=True, metavar="VOICE...")
@truncation_option
@as_json_option
@model_options
def compare(names: tuple[str, ...], as_json: bool, mock: bool, **models: Any) -> None:
    """Compare voices: speaker similarity (cosines of their embeddings) and pitch.

    About 0.85 for one person recorded twice, 0.55 for two people.

    \b
    autovoice voices compare ann ben
    autovoice voices compare ann stranger.wav
    """
    import numpy as np

    from auto_voice.errors import VoiceError
    from auto_voice.types import Voice
    from auto_voice.voices.library import resolve_voice

    if len(names) < 2:
        raise click.UsageError("give at least two voices to compare")
    found = []
    pipeline = None
    for name in names:
        voice = resolve_voice(name)
        if not isinstance(voice, Voice):
            pipeline = pipeline or make_pipeline(mock, as_json, **models)
            voice = pipeline.voice(voice)
        found.append(voice)
    encoders = sorted({voice.encoder for voice in found} - {""})
    if len(encoders) > 1:
        raise VoiceError(
            f"voices of different encoders cannot be compared ({', '.join(encoders)}); add them "
            "again from their recordings."
        )
    stacked = np.stack([voice.embedding for voice in found])
    similarity = stacked @ stacked.T
    if as_json:
        rows = [[round(float(v), 4) for v in row] for row in similarity]
        click.echo(json.dumps({"voices": list(names), "similarity": rows}))
        return
    titles = [Path(name).name for name in names]
    width = max(8, *(len(title) for title in titles))
    click.echo(" " * width + "".join(f"  {title:>{width}}" for title in titles) + "   pitch")
    for title, row, voice in zip(titles, similarity, found, strict=True):
        cells = "".join(f"  {value:{width}.2f}" for value in row)
        click.echo(f"{title:<{width}}{cells}  {_pitch(voice.log_f0_mean)}")


def describe(voice: Voice) -> dict[str, Any]:
    """The facts of a voice, ready for JSON."""
    return _described(voice.name, _facts(voice))


def _facts(voice: Voice) -> dict[str, Any]:
    """What the file of ``voice`` would say of it, see :meth:`VoiceLibrary.facts`."""
    return vars(voice) | {"has_recording": voice.speech is not None}


def _described(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    quality = {k: None if v is None else round(v, 4) for k, v in facts["quality"].items()}
    spread = facts["log_f0_std"]
    return {
        "name": name,
        "speech_seconds": round(facts["speech_seconds"], 2),
        "pitch_hz": _hz(facts["log_f0_mean"]),
        "pitch_spread_semitones": None if spread is None else round(12 * spread / math.log(2), 2),
        "quality": quality,
        "consent": facts["consent"],
        "encoder": facts["encoder"],
        "content_space": facts["content_space"],
        "recording_kept": facts["has_recording"],
        "notes": list(facts["notes"]),
    }


def _hz(log_f0_mean: float | None) -> float | None:
    return None if log_f0_mean is None else round(math.exp(log_f0_mean), 1)


def _pitch(log_f0_mean: float | None) -> str:
    pitch_hz = _hz(log_f0_mean)
    return "no pitch" if pitch_hz is None else f"{pitch_hz:.0f} Hz"


def _line(voice: Voice) -> str:
    return _summed_up(_facts(voice))


def _summed_up(facts: Mapping[str, Any]) -> str:
    snr = facts["quality"].get("snr_db")
    noise = "" if snr is None else f", SNR {snr:.0f} dB"
    count = len(facts["notes"])
    warned = f", {count} note{'s' if count > 1 else ''}" if count else ""
    pitch = _pitch(facts["log_f0_mean"])
    return f"{facts['speech_seconds']:.1f} s of speech, {pitch}{noise}{warned}"


def _weighted(part: str) -> tuple[str, float]:
    label, sign, number = part.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        sign = ""
    if not sign or not label or not 0 <= weight < math.inf:
        raise click.UsageError(f"{part!r} is no voice and weight; write for example ann=0.7")
    return label, weight


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one line per file.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw spectrogram and pitch to PNG.")
@click.option(
    "--no-speakers",
    is_flag=True,
    help="Do not count speakers or compare with stored voices; needs no model then.",
)
@click.option("--text", "transcribe", is_flag=True, help="Also write the transcript.")
@model_options
def inspect(
    files: tuple[Path, ...],
    as_json: bool,
    png: Path | None,
    no_speakers: bool,
    transcribe: bool,
    mock: bool,
    **models: Any,
) -> int:
    """Describe recordings: length, level, noise, speech, pitch, speakers and known voices.

    Only the first ten minutes of a recording are examined. Of several files, those that cannot be
    read are named and the others described; the exit code is 2 then.

    \b
    autovoice inspect talk.wav
    autovoice inspect *.wav --json --no-speakers
    autovoice inspect talk.mp3 --png talk.png
    """
    from auto_voice.audio.io import ensure_writable, read_audio
    from auto_voice.errors import AudioError
    from auto_voice.voices.inspection import inspect_file
    from auto_voice.voices.library import VoiceLibrary

    if png is not None:
        if len(files) != 1:
            raise click.UsageError("--png draws one recording; give one file")
        ensure_writable(png, files)
    pipeline = None
    if transcribe or not no_speakers:
        pipeline = make_pipeline(mock, as_json, **models)
    encoder = None if no_speakers or pipeline is None else pipeline.speaker_encoder
    voices, damaged = ({}, []) if encoder is None else VoiceLibrary().readable()
    for text in damaged:
        click.echo(f"autovoice: {text}", err=True)
    refused = False
    for path in files:
        try:
            found = inspect_file(path, encoder, voices)
        except AudioError as error:
            if len(files) == 1:
                raise
            click.echo(f"autovoice: error: {error}", err=True)
            refused = True
            continue
        facts = found.as_dict()
        if transcribe and pipeline is not None:
            facts["text"] = _transcript(pipeline.registry, path)
        if as_json:
            click.echo(json.dumps(facts, ensure_ascii=False))
        else:
            click.echo(inspection_lines(found, facts.get("text")))
    if png is not None:
        from auto_voice.audio.picture import draw_spectrograms

        draw_spectrograms({files[0].name: read_audio(files[0], allow_truncated=True)}, png)
        if not as_json:
            click.echo(f"look at {png}")
    return 2 if refused else 0


def inspection_lines(found: Inspection, text: str | None = None) -> str:
    """An inspection as lines of text."""
    from auto_voice.voices.inspection import plot_pitch

    info, quality = found.info, found.quality
    channels = {1: "mono", 2: "stereo"}.get(info.channels, f"{info.channels} channels")
    length = found.looked_at if info.seconds is None else info.seconds
    rows = [
        ("length", f"{_clock(length)} ({length:.2f} s)"),
        ("format", f"{info.format} {info.subtype}, {info.sample_rate} Hz, {channels}"),
        ("loudness", f"{quality.loudness_lufs:.1f} LUFS, peak {_decibels(quality.peak)}"),
        ("speech", f"{quality.speech_seconds:.1f} s ({100 * quality.speech_ratio:.0f} %)"),
        ("noise", "-" if quality.snr_db is None else f"SNR {quality.snr_db:.0f} dB"),
        ("clipping", f"{100 * quality.clipping_ratio:.2f} % of the samples"),
        ("bandwidth", f"{quality.bandwidth_hz / 1000:.1f} kHz"),
    ]
    if found.f0_hz is not None:
        low, median, high = found.f0_hz
        rows.append(("pitch", f"{median:.0f} Hz (from {low:.0f} to {high:.0f})"))
    if found.speakers is not None:
        rows.append(("speakers", f"{found.speakers} (estimate)"))
    rows += [("voice", f"{name}: similarity {v:.2f}") for name, v in found.similarity.items()]
    if text is not None:
        rows.append(("text", text))
    rows += [("note", note) for note in (*found.notes, *quality.advice())]
    lines = [info.name, *(f"  {key:<10} {value}" for key, value in rows)]
    return "\n".join([*lines, *(f"  {line}" for line in plot_pitch(found.pitch))])


def _transcript(registry: Any, path: Path) -> str:
    from auto_voice.audio.io import read_audio

    recogniser = registry.load("recogniser_base")
    samples = read_audio(path, sample_rate=recogniser.sample_rate, allow_truncated=True).samples
    text: str = recogniser.transcribe(samples)
    return text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _decibels(peak: float) -> str:
    from auto_voice.audio.reading import dbfs

    return dbfs(peak)
