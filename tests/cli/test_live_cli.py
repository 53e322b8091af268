"""``autovoice live`` from outside, with mock models and devices that are made here."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from auto_voice.cli import live
from auto_voice.errors import AudioDeviceError
from auto_voice.inference.controls import Controls
from auto_voice.inference.streaming import LiveSession
from auto_voice.models.mock_models import mock_sample

RATE = 16000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, f0_hz, seconds in (("talk", 120.0, 1.0), ("friend", 210.0, 6.0)):
        soundfile.write(f"{name}.wav", mock_sample(seconds, f0_hz=f0_hz).samples, 16000)
    yield tmp_path
    logging.getLogger("auto_voice").handlers.clear()


LIVE = ("live", "--voice", "friend.wav", "--mock", "--rate", str(RATE))
FILES = (*LIVE, "--input", "talk.wav", "--output", "out.wav")


class DelayLine:
    """A loudspeaker whose sound reaches the microphone ``delay`` samples later, in noise."""

    name, sample_rate = "a wire", RATE

    def __init__(self, delay: int, gain: float = 0.5, noise: float = 0.01) -> None:
        self._air = np.zeros(delay, np.float32)
        self._gain, self._rng, self._noise = gain, np.random.default_rng(0), noise

    def play(self, exchange, stop):
        while not stop.is_set():
            spoken, self._air = self._air[:160], self._air[160:]
            noise = self._noise * self._rng.standard_normal(160)
            out = exchange((self._gain * spoken + noise).astype(np.float32))
            self._air = np.concatenate([self._air, out])


class Stream:
    """Gives back what it is given, at once."""

    sample_rate = output_rate = RATE
    block_seconds, latency_ms = 0.01, 10.0

    def __init__(self):
        self.controls = None

    def push(self, samples):
        return samples

    def change(self, voice=None, controls=None):
        self.controls = controls

    def report(self):
        from auto_voice.inference.streaming import StreamReport

        return StreamReport(1.0, 0.1, {}, 1, 0, (1.0, 1.0, 1.0))


def test_a_file_is_converted_as_the_stream_converts_it(run, mock_pipeline):
    code, out, _ = run(*FILES, "--no-pace")
    assert code == 0
    assert "converted 1.0 s" in out
    samples, rate = soundfile.read("out.wav", dtype="float32")
    assert (rate, len(samples)) == (RATE, RATE)
    stream = mock_pipeline.stream("friend.wav", sample_rate=RATE)
    spoken, _ = soundfile.read("talk.wav", dtype="float32")
    expected = np.concatenate([stream.push(spoken), stream.flush()])
    np.testing.assert_allclose(samples, expected, atol=2e-4)


@pytest.mark.slow
def test_at_real_time_pace_it_takes_as_long_as_the_file_and_tells_how_it_went(run):
    started = time.monotonic()
    code, out, err = run(*FILES, "--json", "--record", "both.wav")
    assert (code, err) == (0, "")
    assert time.monotonic() - started > 1.0
    account = json.loads(out)
    assert account["latency_ms"] == pytest.approx(238, abs=10)
    assert {"rtf", "late_blocks", "dropped_blocks", "dropouts", "stages"} <= set(account)
    assert account["models"]["vocoder"]
    both, rate = soundfile.read("both.wav")
    assert (rate, both.shape[1]) == (RATE, 2)
    spoken, _ = soundfile.read("talk.wav")
    np.testing.assert_allclose(both[:RATE, 0], spoken, atol=1e-3)
    result, _ = soundfile.read("out.wav")
    np.testing.assert_allclose(both[:, 1], result, atol=1e-3)


@pytest.mark.parametrize(
    ("spent", "block", "words"),
    [
        (0.1, 0.16, ""),
        (0.2, 0.16, "--block-ms 320."),
        (0.4, 0.32, "close other programs"),
    ],
)
def test_a_machine_that_is_too_slow_is_said_with_what_helps(spent, block, words):
    stream = SimpleNamespace(warm_up=lambda: spent, block_seconds=block)
    warning = live.too_slow(stream)
    assert words in warning
    assert bool(warning) == bool(words)


@pytest.mark.slow
def test_the_warning_is_shown_before_it_begins(run, monkeypatch):
    monkeypatch.setattr("auto_voice.inference.streaming.LiveStream.warm_up", lambda self: 9.0)
    code, _, err = run(*FILES)
    assert code == 0
    assert "takes 9000 ms for a block of" in err
    assert err.index("9000 ms") < err.index("ms behind")


def test_the_help_names_the_defaults(run):
    from auto_voice.inference.streaming import BLOCK_MS, LOOKAHEAD_MS

    _, out, _ = run("live", "--help")
    shown = " ".join(out.split())
    assert f"converted at once [default: {BLOCK_MS:.0f}]" in shown
    assert f"beyond it first [default: {LOOKAHEAD_MS:.0f}]" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("live", "--mock"), "--voice"),
        ((*LIVE, "--input", "talk.wav"), "belong together"),
        ((*LIVE, "--no-pace"), "--no-pace needs"),
        ((*FILES, "--no-pace", "--strength", "0.5"), "own voice"),
        ((*FILES, "--no-pace", "--denoise"), "whole recording"),
        ((*FILES, "--no-pace", "--block-ms", "1"), "block_ms must lie"),
        ((*FILES, "--no-pace", "--block-ms", "nan"), "block_ms must lie"),
        ((*FILES, "--no-pace", "--rate", "0"), "--rate"),
        ((*LIVE, "--input", "talk.wav", "--output", "talk.wav", "--overwrite"), "also an input"),
        ((*LIVE, "--input", "talk.wav", "--output", "friend.wav", "--overwrite"), "also an input"),
        ((*FILES, "--own-voice", "talk.wav", "--record", "talk.wav", "--overwrite"), "an input"),
        ((*FILES, "--record", FILES[-1]), "one file"),
        ((*FILES, "--no-pace", "--record", "both.wav"), "leave --no-pace out"),
        ((*LIVE, "--input", "missing.wav", "--output", "out.wav"), "missing.wav"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_and_leaves_no_file(run, arguments, message):
    before = sorted(Path().iterdir())
    code, _, err = run(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err
    assert sorted(Path().iterdir()) == before


def test_without_sounddevice_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    code, _, err = run(*LIVE)
    assert code == 2
    assert 'pip install "auto-voice[live]"' in err


def test_what_is_played_comes_out_of_the_session_and_is_recorded():
    session, written = LiveSession(Stream(), margin_ms=0), []
    running = live.LiveRun(session, SimpleNamespace(write=written.append))

    class Ticking:
        name, sample_rate = "a clock", RATE

        def play(self, exchange, stop):
            for _ in range(50):
                exchange(np.full(160, 0.25, np.float32))
                time.sleep(0.002)

    running.run(Ticking())
    both = np.concatenate(written)
    assert len(both) == 50 * 160
    assert (both[:, 0] == 0.25).all()
    assert np.isclose(both[:, 1], 0.25).mean() > 0.3


def test_a_device_that_is_unplugged_is_opened_again(monkeypatch, caplog):
    monkeypatch.setattr(live, "AGAIN_SECONDS", 0.01)
    opened = []

    class Loose:
        name, sample_rate = "a loose plug", RATE

        def play(self, exchange, stop):
            opened.append(1)
            exchange(np.zeros(160, np.float32))
            if len(opened) < 3:
                raise AudioDeviceError("a loose plug gives no more sound.")

    live.LiveRun(LiveSession(Stream())).run(Loose())
    assert len(opened) == 3
    assert "Waiting until it is back" in caplog.text


def test_a_failure_of_the_conversion_ends_the_run_and_reaches_the_user():
    class Broken(Stream):
        def push(self, samples):
            raise MemoryError("full")

    running = live.LiveRun(LiveSession(Broken()))
    with pytest.raises(MemoryError, match="full"):
        running.run(DelayLine(1000))


@pytest.mark.parametrize("delay", [160, 1234, 7000])
def test_the_round_trip_is_found_in_noise(delay):
    milliseconds, spread = live.round_trip_ms(DelayLine(delay, gain=0.1))
    assert milliseconds == pytest.approx(1000 * delay / RATE, abs=0.1)
    assert spread < 0.2


def test_a_microphone_that_hears_nothing_is_said():
    with pytest.raises(AudioDeviceError, match="did not hear"):
        live.round_trip_ms(DelayLine(1000, gain=0.0))


def test_keys_bypass_transpose_and_quit():
    session = LiveSession(Stream())
    running = live.LiveRun(session)
    act = live.on_key(running, session.stream, Controls(semitones=1.0))
    act("b")
    assert session.bypassed
    assert "BYPASS" in running.status()
    act("b")
    assert not session.bypassed
    for key in "+=-+":
        act(key)
    assert session.stream.controls.semitones == 3.0
    act("q")
    assert running.stop.is_set()


def test_the_meter_shows_the_peak_since_it_was_last_read():
    meter = live.Meter()
    meter.hear(np.array([0.1, -1.0], np.float32))
    assert meter.take() == "█" * 12 + "    0 dB"
    assert "-60 dB" in meter.take()


class PortAudio:
    """What :mod:`sounddevice` looks like, over a wire of 800 samples."""

    class PortAudioError(Exception):
        pass

    class CallbackAbort(Exception):
        pass

    devices = (
        {"name": "mic", "max_input_channels": 1, "max_output_channels": 0},
        {"name": "cable", "max_input_channels": 0, "max_output_channels": 8},
    )
    default = SimpleNamespace(device=(0, 1))

    def __init__(self):
        self.started = 0
        self.fails = False

    def _terminate(self):
        self.started += 1

    def _initialize(self):
        pass

    def query_devices(self, device=None, kind=None):
        known = [{**d, "default_samplerate": 48000.0} for d in self.devices]
        if kind is None:
            return known
        place = ("input", "output").index(kind)
        if device is None:
            return known[place]
        found = [d for i, d in enumerate(known) if device in (i, d["name"])]
        if not found:
            raise ValueError(f"No {kind} device matching {device!r}")
        return found[0]

    def Stream(self, *, channels, callback, samplerate, **_):
        outer = self

        class Opened:
            active = True

            def __enter__(self):
                if outer.fails:
                    raise outer.PortAudioError("Invalid sample rate")
                self._end = threading.Event()
                self._thread = threading.Thread(target=self._run)
                self._thread.start()
                return self

            def _run(self):
                air = np.zeros((800, 1), np.float32)
                while not self._end.is_set():
                    out = np.zeros((160, channels[1]), np.float32)
                    try:
                        callback(np.repeat(air[:160], channels[0], axis=1), out, 160, None, None)
                    except outer.CallbackAbort:
                        self.active = False
                        return
                    air = np.concatenate([air[160:], 0.5 * out[:, :1]])

            def __exit__(self, *_):
                self._end.set()
                self._thread.join()

        return Opened()


@pytest.fixture
def portaudio(monkeypatch):
    fake = PortAudio()
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    return fake


def test_devices_are_listed(run, portaudio):
    code, out, _ = run("live", "--list-devices")
    assert code == 0
    assert "0  mic  (microphone*; 48000 Hz)" in out
    assert "1  cable  (loudspeaker*; 48000 Hz)" in out


def test_the_loopback_test_measures_the_devices(run, portaudio):
    code, out, _ = run("live", "--loopback-test", "--rate", str(RATE), "--loudspeaker", "1")
    assert code == 0
    assert "the devices take 50 ms" in out


def test_a_device_that_is_not_there_is_said(run, portaudio):
    code, _, err = run(*LIVE, "--microphone", "headset")
    assert code == 2
    assert "there is no microphone 'headset'" in err
    assert "--list-devices" in err


def test_a_device_that_cannot_be_opened_is_said(portaudio):
    portaudio.fails = True
    with pytest.raises(AudioDeviceError, match="cannot be opened at 16000 Hz"):
        live.SoundDevice(None, None, RATE).play(lambda x: x, threading.Event())


def test_an_error_in_the_exchange_reaches_the_caller(portaudio):
    def broken(samples):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        live.SoundDevice(None, None, RATE).play(broken, threading.Event())


def test_a_device_that_falls_silent_counts_as_unplugged(portaudio, monkeypatch):
    monkeypatch.setattr(live, "LOST_SECONDS", 0.0)
    with pytest.raises(AudioDeviceError, match="no more sound"):
        live.SoundDevice(None, None, RATE).play(lambda x: time.sleep(0.2) or x, threading.Event())


class Microphone:
    """Gives blocks of ``sounds``, one after the other, each time that it is opened."""

    name, sample_rate = "a microphone", RATE

    def __init__(self, *sounds):
        self.sounds, self.opened = list(sounds), 0

    def play(self, exchange, stop):
        if self.opened == len(self.sounds):
            stop.set()
            return
        self.opened += 1
        for level in self.sounds[self.opened - 1]:
            exchange(np.full(160, level, np.float32))
            time.sleep(0.01)


def test_a_microphone_that_gives_nothing_but_zeros_is_opened_again(monkeypatch, caplog):
    monkeypatch.setattr(live, "ZERO_SECONDS", 0.1)
    monkeypatch.setattr(live, "MOST_ZERO_SECONDS", 0.2)
    monkeypatch.setattr(live, "AGAIN_SECONDS", 0.0)
    # Gone, still gone, and back.
    device = Microphone([0.5] * 5 + [0.0] * 50, [0.0] * 50, [0.5, 0.0] * 20)
    live.LiveRun(LiveSession(Stream())).run(device)
    assert device.opened == 3
    assert caplog.text.count("no sound at all") == 2
    assert "muted, unplugged" in caplog.text


def test_pauses_and_recordings_may_hold_zeros(monkeypatch):
    monkeypatch.setattr(live, "ZERO_SECONDS", 0.1)
    # Sound comes back before the patience ends.
    live.LiveRun(LiveSession(Stream())).run(Microphone(([0.5] + [0.0] * 4) * 8))
    # A recording is as it is.
    live.LiveRun(LiveSession(Stream())).run(Microphone([0.0] * 30), reconnect=False)
