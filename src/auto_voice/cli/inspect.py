"""``autovoice inspect``: what is in a recording."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auto_voice.cli.options import make_pipeline, model_options

if TYPE_CHECKING:
    from auto_voice.voices.inspection import Inspection


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
            click.echo(describe(found, facts.get("text")))
    if png is not None:
        from auto_voice.audio.picture import draw_spectrograms

        draw_spectrograms({files[0].name: read_audio(files[0], allow_truncated=True)}, png)
        if not as_json:
            click.echo(f"look at {png}")
    return 2 if refused else 0


def describe(found: Inspection, text: str | None = None) -> str:
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
