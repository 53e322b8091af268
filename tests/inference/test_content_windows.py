from __future__ import annotations

import logging

import numpy as np
import pytest

from auto_voice.errors import ModelLoadError
from auto_voice.inference import PipelineConfig
from auto_voice.inference import chunking as listening
from auto_voice.inference.chunking import KEPT_WINDOWS, ContentWindows
from auto_voice.inference.inputs import MemorySamples
from auto_voice.types import Content, Waveform
from hand_made_stages import LocalContent


class Attending(LocalContent):
    """Each frame knows the loudest of all frames that are heard, as attention would."""

    def encode_piece(self, samples):
        features = super().encode(samples).features
        return features + 0.3 * features.max(0)

    def encode(self, samples):
        features = self.encode_piece(samples)
        return self.centred(features, features.mean(0))

    def centred(self, features, mean):
        return Content(features - mean, self.frame_rate, self.space)


class Tight(Attending):
    """Has memory for so many samples at once."""

    def __init__(self, most, error=None):
        super().__init__()
        self.most, self.error = most, error or MemoryError()

    def encode_piece(self, samples):
        if len(samples) > self.most:
            raise self.error
        return super().encode_piece(samples)


@pytest.fixture
def rising(speech):
    """A recording of 80 s that gets louder, so that every window differs."""
    samples = speech(80.0, 130.0)
    return (samples * np.linspace(0.2, 1, len(samples))).astype(np.float32)


def listener(encoder, samples):
    return ContentWindows(encoder, MemorySamples(samples, 16000), 1.0)


def test_any_part_is_that_part_of_the_whole(rising):
    whole = listener(Attending(), rising)
    features = whole.read(0, None).features
    assert len(features) == 4000
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    rng = np.random.default_rng(0)
    for start, stop in rng.integers(0, 4000, (12, 2)):
        part = listener(Attending(), rising).read(start, stop, whole.mean())
        np.testing.assert_array_equal(part.features, features[start:stop])


def test_a_short_recording_is_heard_at_once_as_it_always_was(speech):
    samples = speech(20.0)
    heard = listener(encoder := Attending(), samples)
    assert heard.mean() is None
    np.testing.assert_array_equal(
        heard.read(100, 500).features, Attending().encode(samples).features[100:500]
    )
    assert encoder.lengths == [len(samples)]


def test_windows_meet_where_each_has_heard_a_second_more():
    ramp = np.repeat(np.arange(3000, dtype=np.float32), 320)

    class Count(LocalContent):
        def encode(self, samples):
            self.lengths.append(len(samples))
            return Content(samples[::320, None], 50.0, self.space)

    heard = listener(encoder := Count(), ramp)
    np.testing.assert_array_equal(heard.read(0, None).features[:, 0], np.arange(3000))
    assert encoder.lengths == [1200 * 320, 1200 * 320, 800 * 320]


def read_in_parts(heard, frames):
    return [heard.read(max(0, start - 300), start + 275) for start in range(0, frames, 200)]


def test_no_window_is_heard_twice_where_the_memory_holds_all(rising):
    heard = listener(encoder := Attending(), rising)
    read_in_parts(heard, 4000)
    assert len(encoder.lengths) == 4


@pytest.mark.slow
def test_beyond_its_memory_windows_are_encoded_again(rising, monkeypatch):
    samples = np.concatenate([rising, rising, rising])
    all_kept = listener(Attending(), samples)
    wanted = read_in_parts(all_kept, 12000)
    window = max(features.nbytes for features in all_kept._encoded.values())
    for room, windows in ((0, 20), (3, 19), (6, 16), (11, 11)):
        monkeypatch.setattr(listening, "KEPT_BYTES", room * window)
        heard = listener(encoder := Attending(), samples)
        most = 0
        for start, other in zip(range(0, 12000, 200), wanted, strict=True):
            part = heard.read(max(0, start - 300), start + 275)
            np.testing.assert_array_equal(part.features, other.features)
            most = max(most, len(heard._encoded))
        assert len(encoder.lengths) == windows
        assert most <= max(KEPT_WINDOWS, room + 1)


def test_what_is_dropped_is_encoded_again_and_the_same(rising):
    heard = listener(encoder := Attending(), rising)
    wanted = heard.read(0, None).features
    assert len(encoder.lengths) == 4
    heard.forget()
    assert not heard._encoded
    np.testing.assert_array_equal(heard.read(0, None).features, wanted)
    assert len(encoder.lengths) == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")],
    ids=["numpy", "gpu"],
)
def test_where_memory_does_not_suffice_windows_are_shorter(rising, error, caplog):
    heard = listener(Tight(10 * 16000, error), rising)
    with caplog.at_level(logging.WARNING):
        features = heard.read(0, None).features
    assert len(features) == 4000
    assert "encoded in windows of 6.0 s" in caplog.text
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)


def test_memory_that_suffices_for_nothing_is_said(rising):
    with pytest.raises(ModelLoadError, match="even a few seconds"):
        listener(Tight(100), rising).read(0, 10)
    with pytest.raises(RuntimeError, match="a defect"):
        listener(Tight(100, RuntimeError("a defect")), rising).read(0, 10)


@pytest.mark.slow
def test_pieces_equal_the_whole_with_an_encoder_that_attends_to_all_it_hears(
    hand_made, rising, reference
):
    whole, _ = hand_made(PipelineConfig(chunk_seconds=1000), content_whisper=Attending())
    pieces, _ = hand_made(PipelineConfig(chunk_seconds=10), content_whisper=Attending())
    voice = whole.clone(reference)
    a, b = (p.convert(Waveform(rising, 16000), voice) for p in (whole, pieces))
    assert (a.chunks, b.chunks >= 8) == (1, True)
    error = a.samples - b.samples
    assert 20 * np.log10(np.linalg.norm(error) / np.linalg.norm(a.samples)) < -60
