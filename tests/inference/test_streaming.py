"""Live conversion: what comes out does not depend on how the samples came, and is on time."""

from __future__ import annotations

import logging
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import part_needed, resample, resampled_part
from auto_voice.errors import ConfigError
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.inference.controls import Controls
from auto_voice.inference.streaming import FIRST_GROWTH, LiveSession, as_samples, spliced
from auto_voice.types import Waveform
from hand_made_stages import HandMade, LocalConverter, LocalVocoder, speech_like


@pytest.fixture
def voice(hand_made):
    pipeline, _ = hand_made()
    return pipeline.clone(Waveform(speech_like(6.0, 210.0, seed=1), 16000))


@pytest.fixture
def opened(hand_made, voice):
    """Opens a stream over hand-made stages."""

    def make(controls=None, *, stages=None, **options):
        pipeline, _ = hand_made(**(stages or {}))
        return pipeline.stream(voice, controls, **{"sample_rate": 16000, **options})

    return make


def run(stream, samples, size):
    pushed = [stream.push(samples[i : i + size]) for i in range(0, len(samples), size)]
    return np.concatenate([*pushed, stream.flush()])


def level_db(samples):
    return 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-20)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_the_result_does_not_depend_on_how_the_samples_come(opened, rate):
    samples = resample(speech_like(1.5, 120.0), 16000, rate)
    whole = run(opened(sample_rate=rate), samples, len(samples))
    assert np.array_equal(run(opened(sample_rate=rate), samples, rate // 100), whole)
    stream, rng, place, parts = opened(sample_rate=rate), np.random.default_rng(0), 0, []
    while place < len(samples):
        size = int(rng.integers(0, 9000))
        parts.append(stream.push(samples[place : place + size]))
        place += size
    assert np.array_equal(np.concatenate([*parts, stream.flush()]), whole)


@pytest.mark.parametrize(
    ("rate", "output_rate"), [(8000, 48000), (16000, 22050), (44100, 16000), (44057, 44100)]
)
@pytest.mark.parametrize("seconds", [0.003, 0.05, 1.234])
def test_it_is_as_long_as_the_source(opened, rate, output_rate, seconds):
    samples = resample(speech_like(2.0, 120.0), 16000, rate)[: round(seconds * rate)]
    result = run(opened(sample_rate=rate, output_rate=output_rate), samples, 500)
    assert abs(len(result) / output_rate - len(samples) / rate) <= 1 / output_rate
    assert np.isfinite(result).all()


def test_it_lies_where_the_source_lies(opened):
    """Bursts come out in their places, whatever the rates."""
    rate = 44100
    burst = resample(speech_like(0.5, 120.0), 16000, rate)
    silence = np.zeros(rate // 2, np.float32)
    samples = np.concatenate([silence, burst, silence, silence, burst, silence])
    result = run(opened(sample_rate=rate), samples, 4410)
    envelopes = [
        np.convolve(np.square(x), np.ones(882) / 882, mode="same") for x in (samples, result)
    ]
    lags = np.arange(-2205, 2206, 21)
    found = [float(np.sum(np.roll(envelopes[1], -lag) * envelopes[0])) for lag in lags]
    assert abs(lags[int(np.argmax(found))]) < 0.012 * rate


@pytest.mark.parametrize("rate", [16000, 48000])
@pytest.mark.parametrize(("block_ms", "lookahead_ms"), [(20, 0), (80, 120), (320, 160)])
def test_the_latency_is_what_it_says(opened, rate, block_ms, lookahead_ms):
    stream = opened(sample_rate=rate, block_ms=block_ms, lookahead_ms=lookahead_ms)
    samples = np.zeros(rate, np.float32)
    step = rate // 1000
    given, worst = 0, 0
    for start in range(0, len(samples), step):
        worst = max(worst, start + step - given)  # The oldest sample that is still awaited.
        given += len(stream.push(samples[start : start + step]))
    assert stream.latency_ms == pytest.approx(1000 * worst / rate, abs=1.1)
    assert stream.latency_ms <= block_ms + lookahead_ms + 30


def test_blocks_join_without_a_click(opened):
    """A steady vowel has no larger step between samples at the edges of blocks than within."""
    time = np.arange(3 * 16000) / 16000
    tone = sum(np.sin(2 * np.pi * 140 * n * time) / n for n in range(1, 12)).astype(np.float32)
    stream = opened(output_rate=22050, block_ms=100)
    result = run(stream, 0.1 * tone, 1600)[22050:-11025]
    curvature = np.abs(np.diff(result, 3))
    block = round(stream.block_seconds * 22050)
    phase = (np.arange(len(curvature)) + 22050) % block
    near = (phase < 300) | (phase > block - 20)
    assert curvature[near].max() < 1.5 * curvature[~near].max()


@pytest.mark.slow
def test_it_equals_the_conversion_of_the_file_when_the_speaker_is_known(hand_made, voice):
    """Stages that look a few frames around give what they give on the whole."""
    pipeline, _ = hand_made()
    source = Waveform(speech_like(6.0, 120.0), 16000)
    whole = pipeline.convert(source, voice)
    stream = pipeline.stream(
        voice, sample_rate=16000, output_rate=22050, own_voice=source, lookahead_ms=500
    )
    live = run(stream, source.samples, 1600)
    assert len(live) == len(whole.samples)
    settled = slice(2 * 22050, 5 * 22050)
    # Loudness of a file is matched over all of it, of a stream moment by moment.
    a, b = live[settled], whole.samples[settled]
    factor = float(a @ b) / float(b @ b)
    assert level_db(a - factor * b) < level_db(a) - 20
    assert 20 * np.log10(factor) == pytest.approx(0, abs=1.5)


@pytest.mark.slow
def test_the_level_follows_the_source(hand_made, voice):
    """What is loud comes out as loud at once, and what is quiet after it as from a file."""
    pipeline, _ = hand_made()
    quiet, loud = (10 ** (db / 20) * speech_like(3.0, 120.0) for db in (-30, -6))
    samples = np.concatenate([quiet, loud, quiet]).astype(np.float32)
    whole = pipeline.convert(samples, voice, sample_rate=16000).samples
    stream = pipeline.stream(voice, sample_rate=16000, output_rate=22050)
    result = run(stream, samples, 1600)
    part = slice(round(6.5 * 22050), round(8.5 * 22050))
    assert level_db(result[part]) == pytest.approx(level_db(whole[part]), abs=1.5)
    loud_part = slice(4 * 16000, 6 * 16000)
    made = level_db(resample(result, 22050, 16000)[loud_part])
    assert made == pytest.approx(level_db(samples[loud_part]), abs=1)


def test_loud_sources_are_not_clipped(opened):
    samples = speech_like(3.0, 120.0)
    samples = samples / np.abs(samples).max()
    assert np.abs(run(opened(), samples, 1600)).max() < 1.0


def test_the_pitch_moves_to_the_voice_and_by_semitones_from_the_next_block_on(opened, voice):
    converter = LocalConverter()
    stream = opened(stages={"converter_compact": converter})
    samples = speech_like(4.0, 110.0)
    stream.push(samples[: 2 * 16000])
    before = len(converter.calls)
    stream.change(controls=Controls(semitones=7))
    stream.push(samples[2 * 16000 :])

    def mean(calls):
        tracks = [call.pitch.f0_hz[call.pitch.voiced] for call in calls]
        return 12 * np.log2(np.concatenate(tracks).mean() / np.exp(voice.log_f0_mean))

    assert mean(converter.calls[5:before]) == pytest.approx(0, abs=0.7)
    assert mean(converter.calls[before + 1 :]) == pytest.approx(7, abs=0.7)


def test_the_voice_changes_from_the_next_block_on(opened, voice):
    converter = LocalConverter()
    stream = opened(stages={"converter_compact": converter})
    stream.push(speech_like(1.0, 110.0))
    other = replace(voice, name="other")
    stream.change(other)
    before = len(converter.calls)
    stream.push(speech_like(1.0, 110.0))
    assert {call.voice.name for call in converter.calls[before:]} == {"other"}


def test_strength_lies_between_the_speaker_and_the_voice(opened, voice):
    converter = LocalConverter()
    own = Waveform(speech_like(6.0, 110.0, seed=3), 16000)
    options = {"stages": {"converter_compact": converter}, "own_voice": own}
    stream = opened(Controls(strength=0.25), **options)
    stream.push(speech_like(1.0, 110.0))
    stream.change(controls=Controls(strength=1.0))
    stream.push(speech_like(1.0, 110.0))
    alike = [float(call.voice.embedding @ voice.embedding) for call in converter.calls]
    assert alike[0] < 0.9999
    assert alike[-1] == pytest.approx(1)
    spoken = len(converter.calls)
    stream.change(controls=Controls(strength=1.2))
    stream.push(speech_like(1.0, 110.0))
    beside = {round(float(call.voice.embedding @ voice.embedding), 3) for call in
              converter.calls[spoken:]}  # fmt: skip
    assert max(beside) == 1
    assert min(beside) < 1


@pytest.mark.parametrize(
    ("controls", "word"),
    [
        ({"trim": True}, "trim"),
        ({"denoise_db": 10.0}, "denoise"),
        ({"loudness": -20.0}, "loud"),
        ({"strength": 0.5}, "own voice"),
        ({"strength": 1.2}, "own voice"),
    ],
)
def test_what_needs_the_whole_recording_is_refused(opened, controls, word):
    with pytest.raises(ConfigError, match=word):
        opened(Controls(**controls))
    stream = opened()
    with pytest.raises(ConfigError, match=word):
        stream.change(controls=Controls(**controls))


@pytest.mark.parametrize(
    "options",
    [{"block_ms": 1}, {"block_ms": float("nan")}, {"lookahead_ms": -1}, {"sample_rate": 100}],
)
def test_settings_that_cannot_be_are_refused(opened, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        opened(**options)


def test_arrays_that_are_no_samples_are_refused(opened):
    stream = opened()
    for wrong in (np.zeros((2, 10)), np.zeros(10, np.int32), np.array(["a"])):
        with pytest.raises(ConfigError, match="int16"):
            stream.push(wrong)
    stream.flush()
    with pytest.raises(ConfigError, match="ended"):
        stream.push(np.zeros(10))
    assert len(stream.flush()) == 0


def test_samples_that_are_not_finite_are_silence_and_whole_numbers_are_scaled():
    assert as_samples(np.array([np.nan, np.inf, 0.5])).tolist() == [0, 0, 0.5]
    assert as_samples(np.array([-32768, 16384], np.int16)).tolist() == [-1, 0.5]


@pytest.mark.slow
def test_its_memory_is_constant(opened, monkeypatch):
    """Once it remembers as much as it ever does, it keeps nothing of what comes further."""
    monkeypatch.setattr("auto_voice.inference.streaming.MEMORY_SECONDS", 3.0)
    stream = opened(sample_rate=48000, block_ms=300)
    samples = resample(speech_like(4.0, 120.0), 16000, 48000)
    kept = []
    tracemalloc.start()
    try:
        for _ in range(3):
            stream.push(samples)
            kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert kept[2] - kept[1] < samples.nbytes // 10


def test_a_live_conversion_has_a_faster_vocoder_unless_one_is_named(voice):
    class Counting(LocalVocoder):
        calls = 0

        def synthesize(self, mel):
            self.calls += 1
            return super().synthesize(mel)

    for named, used in ((None, "vocoder_compact"), ("hifigan_universal", "hifigan_universal")):
        vocoders = {name: Counting() for name in ("hifigan_universal", "vocoder_compact")}
        registry = HandMade(**vocoders)
        made = VoiceConversionPipeline(PipelineConfig(vocoder=named), model_registry=registry)
        run(made.stream(voice, sample_rate=16000), speech_like(0.5, 120.0), 4000)
        assert [name for name, vocoder in vocoders.items() if vocoder.calls] == [used]
        made.convert(Waveform(speech_like(0.5, 120.0), 16000), voice)
        assert vocoders["hifigan_universal"].calls


def test_it_tells_how_it_ran(opened):
    stream = opened(block_ms=160)
    run(stream, speech_like(1.0, 120.0), 1600)
    report = stream.report()
    assert report.seconds == pytest.approx(1.0, abs=0.02)
    assert report.blocks == pytest.approx(1.0 / stream.block_seconds, abs=1)
    assert {"content", "convert", "pitch", "vocode"} <= set(report.stages)
    assert report.rtf == pytest.approx(sum(report.stages.values()))
    assert 0 < report.block_ms[0] <= report.block_ms[1] <= report.block_ms[2]


def test_a_warm_up_leaves_the_stream_as_it_was(opened):
    samples = speech_like(1.0, 120.0)
    expected = run(opened(), samples, 1600)
    stream = opened()
    assert stream.warm_up() > 0
    assert stream.report().blocks == 0
    assert np.array_equal(run(stream, samples, 1600), expected)


@pytest.mark.slow
def test_hours_in_a_session_lose_nothing_and_keep_nothing(opened, monkeypatch):
    """A soak without the waiting: blocks of an hour's kind, as fast as they go."""
    monkeypatch.setattr("auto_voice.inference.streaming.MEMORY_SECONDS", 3.0)
    converter = LocalConverter()
    stream = opened(block_ms=320, stages={"converter_compact": converter})
    session = LiveSession(stream, margin_ms=20)
    spoken, rng = speech_like(4.0, 120.0), np.random.default_rng(0)
    heard, kept, place, missing = 0, [], 0, []
    tracemalloc.start()
    try:
        for _round in range(5):
            for _ in range(400):
                size = int(rng.integers(1, 320))  # Devices give some milliseconds at once.
                session.feed(np.resize(np.roll(spoken, -place), size))
                place = (place + size) % len(spoken)
                while session.step():
                    pass
                out = session.take(size)
                heard += len(out)
                missing.append(session.delay_ms)
            converter.calls.clear()  # It keeps what it was given.
            kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    report = session.report()
    assert (report.dropped_blocks, report.dropouts) == (0, 0)
    assert report.seconds == pytest.approx(heard / 16000, abs=1.0)
    assert kept[-1] - kept[1] < 100_000
    assert max(missing[len(missing) // 2 :]) <= max(missing[: len(missing) // 2]) + 1


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(48000, 16000), (44100, 16000), (22050, 48000), (8000, 16000)]
)
def test_a_part_is_resampled_as_the_whole_is(from_hz, to_hz):
    samples = np.random.default_rng(0).standard_normal(2 * from_hz).astype(np.float32)
    whole = resample(samples, from_hz, to_hz)
    for start, stop in ((0, 100), (to_hz, to_hz + 1001), (2 * to_hz - 3, 2 * to_hz)):
        low, high = part_needed(from_hz, to_hz, start, stop)
        found = resampled_part(samples[low:high], low, from_hz, to_hz, start, stop)
        np.testing.assert_allclose(found, whole[start:stop], atol=2e-3)


class Echo:
    """A stream that gives back what it was given, two blocks late."""

    sample_rate = output_rate = 16000
    block_seconds = 0.1

    def __init__(self):
        self._held = np.zeros(0, np.float32)

    def push(self, samples):
        self._held = np.concatenate([self._held, samples])
        ready = max(0, (len(self._held) - 1600) // 1600 * 1600)
        out, self._held = self._held[:ready], self._held[ready:]
        return out

    def flush(self):
        out, self._held = self._held, np.zeros(0, np.float32)
        return out


def ramp(seconds, first=0):
    return (first + np.arange(round(16000 * seconds), dtype=np.float32)) / 160000


def test_a_session_gives_everything_in_order_after_its_margin():
    session = LiveSession(Echo(), margin_ms=50)
    heard = []
    for start in range(0, 16000, 160):
        session.feed(ramp(0.01, start))
        session.step()
        heard.append(session.take(160))
    session.finish()
    heard.append(session.take(20000))
    joined = np.concatenate(heard)
    first = int(np.flatnonzero(joined)[0])
    late = first - 1  # The ramp begins with a zero.
    np.testing.assert_allclose(joined[late + 100 : late + 16000], ramp(1.0)[100:], atol=1e-6)
    assert not joined[late + 16000 :].any()


def test_a_session_waits_longer_at_first_where_blocks_take_long(monkeypatch):
    """Later blocks take longer than the first, and would come too late."""
    clock = 0.0
    monkeypatch.setattr("auto_voice.inference.streaming.time.monotonic", lambda: clock)

    class Slow(Echo):
        def push(self, samples):
            nonlocal clock
            clock += 0.05
            return super().push(samples)

    silent = []
    for stream in (Echo(), Slow()):
        session = LiveSession(stream, margin_ms=20)
        session.feed(ramp(0.3, 100))
        while session.step():
            pass
        silent.append(int(np.flatnonzero(session.take(4000))[0]))
    assert silent[1] - silent[0] == round(FIRST_GROWTH * 0.05 * 16000)


def test_a_session_that_falls_behind_drops_the_oldest_block_and_says_so(caplog):
    session = LiveSession(Echo())
    with caplog.at_level(logging.WARNING):
        for start in range(0, 16000, 1600):
            session.feed(ramp(0.1, start))
    assert caplog.text.count("left out") == 1  # Not at every block.
    session.finish()
    heard = session.take(16000)
    assert np.count_nonzero(heard) < 5000
    assert heard.max() == pytest.approx(ramp(1.0).max())  # The newest is there.


def test_a_session_recovers_its_latency_after_a_hold_up():
    """After blocks that came late, the sound that is held is no more than before."""
    session = LiveSession(Echo(), margin_ms=20)
    late = []
    for block in range(100):
        session.feed(ramp(0.1, 1600 * block))
        if not 20 <= block < 22:  # A hold-up of two blocks.
            while session.step():
                pass
        heard = session.take(1600)
        if heard.any():
            late.append((1600 * (block + 1) - 160000 * heard[-1]) / 16000)
    assert late[-1] == pytest.approx(late[5], abs=0.03)
    assert max(late) > late[5] + 0.1


def test_a_session_keeps_what_its_slowest_blocks_ask_for(monkeypatch):
    """After a hold-up, as much as before and as a slow block takes longer than most."""
    clock = 0.0
    monkeypatch.setattr("auto_voice.inference.streaming.time.monotonic", lambda: clock)
    kept = []
    for slowest in (0.01, 0.06):

        class Slow(Echo):
            blocks = 0

            def push(self, samples):
                nonlocal clock
                self.blocks += 1
                clock += slowest if self.blocks == 30 else 0.01  # noqa: B023
                return super().push(samples)

        session = LiveSession(Slow(), margin_ms=20)
        for block in range(100):
            session.feed(ramp(0.1, 1600 * block))
            if not 20 <= block < 22:
                while session.step():
                    pass
            session.take(1600)
        kept.append(session.delay_ms)
    assert kept[1] - kept[0] == pytest.approx(50, abs=10)


class Reported(Echo):
    def report(self):
        from auto_voice.inference.streaming import StreamReport

        return StreamReport(1.0, 0.1, {}, 10, 0, (1.0, 1.0, 1.0))


def test_a_session_counts_what_was_lost():
    session = LiveSession(Reported())
    for start in range(0, 16000, 1600):
        session.feed(ramp(0.1, start))
    while session.step():
        pass
    session.take(100_000)
    report = session.report()
    assert report.dropped_blocks == 8
    assert report.dropouts == 1


def test_a_session_keeps_more_after_drop_outs_and_less_when_there_are_none():
    """Every third block comes 60 ms late: that is heard at first, and then no more."""
    session, lost = LiveSession(Reported(), margin_ms=20), [0]

    def run(blocks, late):
        for part in range(10 * blocks):
            session.feed(ramp(0.01, 160 * part))
            if not (late and (part % 30 == 29 or part % 30 < 6)):
                while session.step():
                    pass
            session.take(160)
        lost.append(session.report().dropouts)

    run(9, late=False)
    for _ in range(4):
        run(60, late=True)
    assert lost[1] == 0
    assert lost[2] > 0
    assert lost[-1] == lost[-2] == lost[-3]
    delay = session.delay_ms
    run(3000, late=False)
    assert session.delay_ms < delay - 20


def test_bypassed_the_source_comes_out_as_late_and_without_a_click():
    class Silent(Echo):
        def push(self, samples):
            return 0 * super().push(samples)

    session, heard = LiveSession(Silent(), margin_ms=0), []
    place = np.arange(32000)
    tone = (np.sin(place / 20) * (1 - 0.3 * np.sin(place / 777))).astype(np.float32)
    for start in range(0, 32000, 160):
        session.bypassed = start >= 16000
        session.feed(tone[start : start + 160])
        session.step()
        heard.append(session.take(160))
    joined = np.concatenate(heard)
    assert not joined[:14000].any()
    assert np.abs(np.diff(joined)).max() < 0.08
    later = joined[24000:30000]

    def distance(lag):
        return np.abs(later - tone[24000 - lag : 30000 - lag]).max()

    match = min(range(1000, 4000), key=distance)
    np.testing.assert_allclose(later, tone[24000 - match : 30000 - match], atol=1e-5)


def test_what_is_skipped_leaves_no_step():
    tone = np.sin(np.arange(4000) / 30).astype(np.float32)
    kept = spliced(tone, 1000, 80)
    assert len(kept) == 3000
    assert np.abs(np.diff(kept)).max() < 0.08
    np.testing.assert_array_equal(kept[80:], tone[1080:])


@pytest.mark.weights
@pytest.mark.slow
def test_real_speech_comes_out_without_clicks_and_near_the_conversion_of_the_file(weights_registry):
    """At the edges of blocks the sound steps no further than within, and words lie in place."""
    pipeline = VoiceConversionPipeline(model_registry=weights_registry)
    source = weights_registry.load("sample_two_cities")
    samples = source.samples[: 4 * source.sample_rate]
    voice = pipeline.clone(weights_registry.load("sample_beckett"))
    whole = pipeline.convert(samples, voice, sample_rate=source.sample_rate)
    stream = pipeline.stream(
        voice, sample_rate=source.sample_rate, output_rate=22050, block_ms=320, lookahead_ms=320,
        own_voice=Waveform(source.samples, source.sample_rate),
    )  # fmt: skip
    live = run(stream, samples, 4410)
    assert len(live) == len(whole.samples)
    steps = np.abs(np.diff(live, 2))
    block = round(stream.block_seconds * 22050)
    edges = (np.arange(len(steps)) % block < 256) & (np.arange(len(steps)) >= block)
    assert np.percentile(steps[edges], 99.9) < 1.5 * np.percentile(steps[~edges], 99.9)
    mels = [log_mel(x, HIFIGAN_MEL)[:, 86:-86] for x in (live, whole.samples)]
    assert np.mean(np.abs(mels[0] - mels[1])) < 0.5
    assert np.corrcoef(mels[0].mean(0), mels[1].mean(0))[0, 1] > 0.9
