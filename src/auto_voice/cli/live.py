"""``autovoice live``: a microphone in, another voice out."""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import click
import numpy as np

from auto_voice.cli.options import (
    complete_voice,
    control_options,
    control_values,
    make_pipeline,
    model_options,
)
from auto_voice.errors import AudioDeviceError, ConfigError, MissingDependencyError, install_hint
from auto_voice.inference.result import HIGHEST_OUTPUT_RATE, LOWEST_OUTPUT_RATE
from auto_voice.types import FloatArray

if TYPE_CHECKING:
    from auto_voice.audio.writing import AudioWriter
    from auto_voice.inference.streaming import LiveSession, LiveStream, StreamReport

log = logging.getLogger(__name__)

# Samples ``(samples,)`` from the microphone in, as many for the loudspeaker out. Must not wait.
Exchange: TypeAlias = Callable[[FloatArray], FloatArray]

# Hz; what sound cards of today run at, so that the system does not resample once more.
RATE = 48_000
# Seconds between two looks at the devices, at the keyboard, and between two status lines.
LOOK_SECONDS, STATUS_SECONDS = 0.05, 0.25
# Seconds without any sound from a device after which it counts as unplugged, and between attempts
# to open it again.
LOST_SECONDS, AGAIN_SECONDS = 2.0, 1.0
# Seconds of zeros from a microphone after which it is opened again, at first and at most: behind a
# sound server, one that is unplugged gives them. So do some that are muted.
ZERO_SECONDS, MOST_ZERO_SECONDS = 10.0, 60.0
# Samples that a file gives at once: a hundredth of a second, as devices do.
FILE_BLOCKS_PER_SECOND = 100
# The chirp of the loopback test: from and to Hz, its seconds, seconds of the pause after it, how
# often, and the correlation from which on it was heard.
CHIRP_HZ, CHIRP_SECONDS, PAUSE_SECONDS, CHIRPS = (500.0, 4000.0), 0.2, 0.8, 5
HEARD_CORRELATION = 0.3
# dBFS at the ends of a level meter, and its width in characters.
METER_DB, METER_WIDTH = (-60.0, 0.0), 12
# Share of a block's length that its conversion may take before it is said that the machine is too
# slow: a block now and then takes longer. And the block that costs less, ms.
SLOW_SHARE, CHEAPER_BLOCK_MS = 0.9, 320.0
HELP = "keys: b bypass, + and - a semitone up and down, q quit"


class LiveDevice(Protocol):
    """What gives sound and takes sound at one rate."""

    name: str
    sample_rate: int

    def play(self, exchange: Exchange, stop: threading.Event) -> None:
        """Passes sound through ``exchange`` until ``stop`` is set or there is no more.

        Raises:
            AudioDeviceError: the device is gone.
        """
        ...


class FileDevice:
    """A recording in place of the microphone and a file in place of the loudspeaker.

    Args:
        samples: ``(samples,)`` of the recording.
        write: is given the sound that comes out.
        after_seconds: of silence that follow the recording, so that its end comes out, too.
    """

    name = "the file"

    def __init__(
        self,
        samples: FloatArray,
        sample_rate: int,
        write: Callable[[FloatArray], None],
        after_seconds: float,
    ) -> None:
        self.sample_rate = sample_rate
        self._samples = np.pad(samples, (0, round(after_seconds * sample_rate)))
        self._write = write

    def play(self, exchange: Exchange, stop: threading.Event) -> None:
        size = self.sample_rate // FILE_BLOCKS_PER_SECOND
        started = time.monotonic()
        for start in range(0, len(self._samples), size):
            early = started + start / self.sample_rate - time.monotonic()
            if stop.wait(max(0.0, early)):
                return
            self._write(exchange(self._samples[start : start + size]))


class SoundDevice:
    """A microphone and a loudspeaker, through PortAudio.

    Args:
        microphone, loudspeaker: number or part of the name; None for the system's own.
    """

    def __init__(
        self, microphone: int | str | None, loudspeaker: int | str | None, sample_rate: int
    ) -> None:
        self._chosen = (microphone, loudspeaker)
        self.sample_rate = sample_rate
        self._sound = sound_library()
        self.name = " → ".join(str(device["name"]) for device in self._devices())

    def _devices(self) -> list[Any]:
        found = []
        for device, kind in zip(self._chosen, ("input", "output"), strict=True):
            try:
                found.append(self._sound.query_devices(device, kind))
            except (ValueError, self._sound.PortAudioError) as error:
                what = "microphone" if kind == "input" else "loudspeaker"
                wanted = "" if device is None else f" {device!r}"
                raise AudioDeviceError(
                    f"there is no {what}{wanted} ({error}); see: autovoice live --list-devices"
                ) from error
        return found

    def play(self, exchange: Exchange, stop: threading.Event) -> None:
        heard = [time.monotonic()]
        failed: list[BaseException] = []
        # PortAudio looks for devices only when it starts.
        self._sound._terminate()
        self._sound._initialize()
        channels = [
            min(2, device[f"max_{kind}_channels"])
            for device, kind in zip(self._devices(), ("input", "output"), strict=True)
        ]

        def callback(mic: Any, speaker: Any, frames: int, times: Any, status: Any) -> None:
            heard[0] = time.monotonic()
            try:
                speaker[:] = exchange(mic.mean(axis=1, dtype=np.float32))[:, None]
            except BaseException as error:  # An exception here would only be printed.
                failed.append(error)
                raise self._sound.CallbackAbort from error

        try:
            with self._sound.Stream(
                samplerate=self.sample_rate, device=self._chosen, channels=channels,
                dtype="float32", latency="low", callback=callback,
            ) as stream:  # fmt: skip
                while not stop.wait(LOOK_SECONDS):
                    if failed:
                        raise failed[0]
                    if not stream.active or time.monotonic() - heard[0] > LOST_SECONDS:
                        raise AudioDeviceError(f"{self.name} gives no more sound.")
        except self._sound.PortAudioError as error:
            raise AudioDeviceError(
                f"{self.name} cannot be opened at {self.sample_rate} Hz ({error}); choose others "
                "of `autovoice live --list-devices`, or another --rate."
            ) from error


def sound_library() -> Any:
    """The module ``sounddevice``.

    Raises:
        MissingDependencyError: it or PortAudio is not installed.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise MissingDependencyError(
            f"sounddevice is not installed; run: {install_hint('live')}"
        ) from error
    except OSError as error:
        raise MissingDependencyError(
            "PortAudio is not installed, which sounddevice needs; on Debian and Ubuntu run: "
            "sudo apt install libportaudio2"
        ) from error
    return sounddevice


@dataclass
class Meter:
    """The level of the last moments of one side."""

    peak: float = 0.0

    def hear(self, samples: FloatArray) -> None:
        """The next ``(samples,)``."""
        self.peak = max(self.peak, float(np.abs(samples).max(initial=0)))

    def take(self) -> str:
        """A bar and the peak in dBFS since the last call."""
        peak, self.peak = self.peak, 0.0
        db = max(METER_DB[0], 20 * np.log10(max(peak, 1e-9)))
        filled = round((db - METER_DB[0]) / (METER_DB[1] - METER_DB[0]) * METER_WIDTH)
        return f"{'█' * filled}{'·' * (METER_WIDTH - filled)} {db:4.0f} dB"


class LiveRun:
    """One live conversion between a device and a session, with what belongs to it.

    Args:
        session: converts.
        writer: of what was spoken (left) and what came out (right); None records nothing.
        show: is given the status line.
    """

    def __init__(
        self,
        session: LiveSession,
        writer: AudioWriter | None = None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        self.session = session
        self.stop = threading.Event()
        self._writer, self._show = writer, show
        self._meters = (Meter(), Meter())
        self._heard: queue.SimpleQueue[FloatArray] = queue.SimpleQueue()
        self._failed: list[BaseException] = []
        # When the last sound came, or the first zeros, and how long zeros may go on.
        self._sounded: float | None = None
        self._patience = ZERO_SECONDS

    def run(self, device: LiveDevice, *, reconnect: bool = True) -> None:
        """Until the device has no more sound or :attr:`stop` is set.

        A device that goes away is opened again as soon as it is back, where ``reconnect`` says so.
        """
        threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (self._convert, self._attend)
        ]
        for thread in threads:
            thread.start()
        try:
            while not self.stop.is_set():
                self._sounded = None
                try:
                    device.play(self._watched if reconnect else self._exchange, self.stop)
                    break
                except AudioDeviceError as error:
                    if not reconnect:
                        raise
                    log.warning("%s Waiting until it is back.", error)
                    self.stop.wait(AGAIN_SECONDS)
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()
        if self._failed:
            raise self._failed[0]

    def _watched(self, spoken: FloatArray) -> FloatArray:
        """:meth:`_exchange`; raises AudioDeviceError where a microphone seems to be gone."""
        now = time.monotonic()
        if spoken.any():
            self._sounded, self._patience = now, ZERO_SECONDS
        elif self._sounded is None:
            self._sounded = now
        elif now - self._sounded > self._patience:
            self._patience = min(2 * self._patience, MOST_ZERO_SECONDS)
            raise AudioDeviceError(
                f"the microphone has given no sound at all for {now - self._sounded:.0f} s: it may "
                "be muted, unplugged, or closed to this program."
            )
        return self._exchange(spoken)

    def _exchange(self, spoken: FloatArray) -> FloatArray:
        self.session.feed(spoken)
        out = self.session.take(len(spoken))
        self._meters[0].hear(spoken)
        self._meters[1].hear(out)
        if self._writer is not None:
            self._heard.put(np.stack([spoken, out], axis=1))
        return out

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failed.append(error)
            self.stop.set()

    def _convert(self) -> None:
        while not self.stop.is_set():
            self.session.step(LOOK_SECONDS)

    def _attend(self) -> None:
        """Writes the record and shows the status; neither may hold up the sound."""
        shown = 0.0
        while not self.stop.wait(LOOK_SECONDS):
            self._record()
            if self._show is not None and time.monotonic() - shown > STATUS_SECONDS:
                shown = time.monotonic()
                self._show(self.status())
        self._record()

    def _record(self) -> None:
        while self._writer is not None and not self._heard.empty():
            self._writer.write(self._heard.get())

    def status(self) -> str:
        """Levels, delay and losses in one line."""
        session = self.session
        report = session.report()
        spoken, out = (meter.take() for meter in self._meters)
        lost = f"dropped {report.dropped_blocks}  drop-outs {report.dropouts}"
        bypass = "  BYPASS" if session.bypassed else ""
        return f"in {spoken}  out {out}  delay {session.delay_ms:4.0f} ms  {lost}{bypass}"


def round_trip_ms(device: LiveDevice) -> tuple[float, float]:
    """Milliseconds from what a device is given to play until it comes back, and their spread.

    Several chirps are played and searched for in what the microphone hears.

    Raises:
        AudioDeviceError: the microphone does not hear the loudspeaker.
    """
    rate = device.sample_rate
    chirp = _chirp(rate)
    period = len(chirp) + round(PAUSE_SECONDS * rate)
    played = np.tile(np.pad(chirp, (0, period - len(chirp))), CHIRPS)
    heard: list[FloatArray] = []
    place = 0
    ended = threading.Event()

    def exchange(spoken: FloatArray) -> FloatArray:
        nonlocal place
        heard.append(spoken)
        out = played[place : place + len(spoken)]
        place += len(spoken)
        if place >= len(played) + period:
            ended.set()
        return np.pad(out, (0, len(spoken) - len(out)))

    device.play(exchange, ended)
    recorded = np.pad(np.concatenate(heard), (0, 2 * period))
    found = []
    for number in range(CHIRPS):
        part = recorded[number * period : (number + 1) * period + len(chirp)]
        similar = _similarity(part, chirp)
        best = int(np.argmax(similar))
        if similar[best] >= HEARD_CORRELATION:
            found.append(1000 * best / rate)
    if len(found) < CHIRPS // 2 + 1:
        raise AudioDeviceError(
            "the microphone did not hear the loudspeaker; put it near, turn the volume up and "
            "switch noise suppression off."
        )
    return float(np.median(found)), float(np.ptp(found))


def _chirp(rate: int) -> FloatArray:
    time = np.arange(round(CHIRP_SECONDS * rate)) / rate
    low, high = CHIRP_HZ
    phase = 2 * np.pi * (low * time + (high - low) * time**2 / (2 * CHIRP_SECONDS))
    return (0.5 * np.sin(phase) * np.hanning(len(time))).astype(np.float32)


def _similarity(recorded: FloatArray, chirp: FloatArray) -> FloatArray:
    """``(places,)`` normalised correlation of ``chirp`` with what begins at each place."""
    size = 1 << (len(recorded) + len(chirp)).bit_length()
    spectrum = np.fft.rfft(recorded, size) * np.conj(np.fft.rfft(chirp, size))
    places = len(recorded) - len(chirp) + 1
    product = np.fft.irfft(spectrum, size)[:places]
    total = np.concatenate(([0.0], np.cumsum(np.square(recorded, dtype=np.float64))))
    power = np.maximum(total[len(chirp) :] - total[: -len(chirp)], 1e-9)
    return np.asarray(np.abs(product) / np.sqrt(power * float(chirp @ chirp)), np.float32)


@contextmanager
def keyboard(act: Callable[[str], None], stop: threading.Event) -> Iterator[None]:
    """Calls ``act`` with each key that is pressed while inside; without a terminal with none."""
    if not sys.stdin.isatty():
        yield
        return
    if sys.platform == "win32":
        import msvcrt

        def read() -> str:
            return msvcrt.getwch() if msvcrt.kbhit() else ""

        restore: Callable[[], None] = lambda: None  # noqa: E731
    else:
        import select
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        tty.setcbreak(descriptor)

        def read() -> str:
            ready, _, _ = select.select([sys.stdin], [], [], 0)
            return sys.stdin.read(1) if ready else ""

        def restore() -> None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

    def listen() -> None:
        while not stop.wait(LOOK_SECONDS):
            if key := read():
                act(key)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        restore()


def on_key(run: LiveRun, stream: LiveStream, controls: Any) -> Callable[[str], None]:
    """What the keys of ``HELP`` do."""
    from auto_voice.inference.controls import CONTROLS

    chosen = [controls]

    def act(key: str) -> None:
        if key == "b":
            run.session.bypassed = not run.session.bypassed
        elif key in "+-=":
            step = -1.0 if key == "-" else 1.0
            limits = CONTROLS["semitones"]
            wanted = float(np.clip(chosen[0].semitones + step, limits.low, limits.high))
            chosen[0] = replace(chosen[0], semitones=wanted)
            stream.change(controls=chosen[0])
        elif key == "q":
            run.stop.set()

    return act


def device_lines() -> list[str]:
    """The devices of this machine, one a line."""
    sound = sound_library()
    defaults = list(sound.default.device)
    lines = []
    for number, device in enumerate(sound.query_devices()):
        kinds = [
            kind + ("*" if defaults[place] == number else "")
            for place, kind in enumerate(("microphone", "loudspeaker"))
            if device[f"max_{('input', 'output')[place]}_channels"]
        ]
        rate = f"{device['default_samplerate']:.0f} Hz"
        lines.append(f"{number:3}  {device['name']}  ({', '.join(kinds)}; {rate})")
    return lines


@click.command()
@click.option(
    "--voice",
    metavar="VOICE",
    shell_complete=complete_voice,
    help="A stored voice, a voice file, or a recording of the wanted voice.",
)
@click.option(
    "--own-voice",
    metavar="VOICE",
    shell_complete=complete_voice,
    help="A recording of yourself: the pitch is right from the first word on, and --strength can "
    "be other than 1.",
)
@click.option("--list-devices", is_flag=True, help="List microphones and loudspeakers.")
@click.option("--microphone", metavar="DEVICE", help="Its number or a part of its name.")
@click.option("--loudspeaker", metavar="DEVICE", help="Its number or a part of its name.")
@click.option(
    "--rate",
    type=click.IntRange(LOWEST_OUTPUT_RATE, HIGHEST_OUTPUT_RATE),
    default=RATE,
    show_default=True,
    help="Samples a second of the devices.",
)
@click.option("--block-ms", type=float, help="How much is converted at once [default: 140].")
@click.option("--lookahead-ms", type=float, help="How much is heard beyond it first [default: 93].")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help="A recording in place of the microphone.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="A file in place of the loudspeaker."
)
@click.option(
    "--no-pace", is_flag=True, help="Convert --input as fast as it goes, not at real time."
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="Record both sides: what was spoken on the left, what came out on the right.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.option("--loopback-test", is_flag=True, help="Measure the delay of the devices.")
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@control_options
@model_options
def live(
    voice: str | None,
    own_voice: str | None,
    list_devices: bool,
    microphone: str | None,
    loudspeaker: str | None,
    rate: int,
    block_ms: float | None,
    lookahead_ms: float | None,
    source: Path | None,
    output: Path | None,
    no_pace: bool,
    record: Path | None,
    overwrite: bool,
    loopback_test: bool,
    as_json: bool,
    quiet: bool,
    mock: bool,
    **options: Any,
) -> None:
    """Speak into the microphone and come out of the loudspeaker in another voice.

    Wear headphones, or the microphone hears the result. Keys: b bypasses the conversion, + and -
    move the pitch by a semitone, q quits.

    \b
    autovoice live --list-devices
    autovoice live --voice friend
    autovoice live --voice friend --own-voice me.wav --loudspeaker "CABLE Input"
    autovoice live --voice friend --input talk.wav --output talk_live.wav
    """
    if list_devices:
        click.echo("\n".join(device_lines()) or "there are no audio devices")
        return
    if (source is None) != (output is None):
        raise click.UsageError("--input and --output belong together")
    if no_pace and source is None:
        raise click.UsageError("--no-pace needs --input and --output")
    if no_pace and record is not None:
        raise click.UsageError(
            "--record keeps both sides as they were in time; leave --no-pace out"
        )
    if output is not None and record is not None and output.absolute() == record.absolute():
        raise click.UsageError("--output and --record name one file; give each its own")
    if loopback_test:
        milliseconds, spread = round_trip_ms(_sound_device(microphone, loudspeaker, rate))
        click.echo(f"the devices take {milliseconds:.0f} ms (within {spread:.1f} ms)")
        return
    if voice is None:
        raise click.UsageError("name the wanted voice with --voice")
    inputs = [Path(given) for given in (source, voice, own_voice) if given is not None]
    with (
        _file_writer(output, rate, overwrite, inputs) as out_file,
        _file_writer(record, rate, overwrite, inputs, channels=2) as recorder,
    ):
        spoken = None if source is None else _samples(source, rate)
        device = None if source is not None else _sound_device(microphone, loudspeaker, rate)
        stream, controls = _stream(
            voice, own_voice, rate, block_ms, lookahead_ms, mock, quiet or as_json, options
        )
        report = _play(
            stream, controls, device, spoken, out_file, recorder,
            pace=not no_pace, quiet=quiet or as_json,
        )  # fmt: skip
    if as_json:
        account = {"latency_ms": stream.latency_ms, "models": stream.models, **asdict(report)}
        click.echo(json.dumps(account))
    elif not quiet:
        click.echo(
            f"converted {report.seconds:.1f} s at {report.rtf:.2f} s per second, "
            f"{stream.latency_ms:.0f} ms behind and {report.block_ms[0]:.0f} ms of work a block; "
            f"{report.late_blocks} of {report.blocks} blocks late, {report.dropped_blocks} "
            f"dropped, {report.dropouts} drop-outs"
        )


def _sound_device(microphone: str | None, loudspeaker: str | None, rate: int) -> SoundDevice:
    def chosen(name: str | None) -> int | str | None:
        return int(name) if name is not None and name.isdecimal() else name

    return SoundDevice(chosen(microphone), chosen(loudspeaker), rate)


def _file_writer(
    path: Path | None, rate: int, overwrite: bool, inputs: Sequence[Path], channels: int = 1
) -> AbstractContextManager[AudioWriter | None]:
    from auto_voice.audio.writing import AudioWriter

    if path is None:
        return nullcontext()
    if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
        raise ConfigError(f"{path} is also an input; name another file to write.")
    return AudioWriter(path, rate, overwrite=overwrite, channels=channels)


def _samples(source: Path, rate: int) -> FloatArray:
    from auto_voice.audio.io import read_audio
    from auto_voice.audio.resample import resample

    recording = read_audio(source)
    return resample(recording.samples, recording.sample_rate, rate)


def _stream(
    voice: str,
    own_voice: str | None,
    rate: int,
    block_ms: float | None,
    lookahead_ms: float | None,
    mock: bool,
    quiet: bool,
    options: dict[str, Any],
) -> tuple[LiveStream, Any]:
    from auto_voice.voices.library import resolve_voice

    controls = control_values(options)
    target = resolve_voice(voice)
    own = None if own_voice is None else resolve_voice(own_voice)
    given = {"block_ms": block_ms, "lookahead_ms": lookahead_ms}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    pipeline = make_pipeline(mock, quiet, **options)
    stream = pipeline.stream(target, controls, sample_rate=rate, own_voice=own, **chosen)
    for note in () if quiet else stream.notes:
        click.echo(f"  note       {note}", err=True)
    return stream, controls


def _play(
    stream: LiveStream,
    controls: Any,
    device: LiveDevice | None,
    spoken: FloatArray | None,
    out_file: AudioWriter | None,
    recorder: AudioWriter | None,
    *,
    pace: bool,
    quiet: bool,
) -> StreamReport:
    from auto_voice.inference.streaming import LiveSession

    if spoken is not None:
        assert out_file is not None
        if not pace:
            for made in (stream.push(spoken), stream.flush()):
                out_file.write(made)
            return stream.report()
        after = 2 * stream.latency_ms / 1000
        device = FileDevice(spoken, stream.sample_rate, out_file.write, after)
    assert device is not None
    warning = too_slow(stream)
    session = LiveSession(stream)
    shown = not quiet and sys.stderr.isatty()
    run = LiveRun(session, recorder, _show if shown else None)
    if not quiet:
        if warning:
            click.echo(f"  warning    {warning}", err=True)
        behind = f"{stream.latency_ms:.0f} ms behind, {stream.models['vocoder']}"
        click.echo(f"{device.name}, {behind}; {HELP}", err=True)
    with keyboard(on_key(run, stream, controls), run.stop):
        try:
            run.run(device, reconnect=spoken is None)
        except KeyboardInterrupt:
            log.info("stopped by Ctrl-C")
    if shown:
        click.echo(err=True)
    return session.report()


def too_slow(stream: LiveStream) -> str:
    """What to do where this machine cannot keep up, in a sentence; empty where it can.

    The stream is ready for its first word afterwards.
    """
    spent, block = stream.warm_up(), stream.block_seconds
    if spent <= SLOW_SHARE * block:
        return ""
    if block < 0.95 * CHEAPER_BLOCK_MS / 1000:
        what = f"longer blocks cost less: --block-ms {CHEAPER_BLOCK_MS:.0f}"
    else:
        what = "close other programs, or choose longer blocks with --block-ms"
    return (
        f"this machine takes {1000 * spent:.0f} ms for a block of {1000 * block:.0f} ms now and "
        f"will leave blocks out; {what}."
    )


def _show(line: str) -> None:
    click.echo(f"\r{line}\x1b[K", nl=False, err=True)
