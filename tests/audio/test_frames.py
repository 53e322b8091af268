"""Stretches of frames in which something holds."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_voice.audio.frames import (
    filtered,
    framed,
    interpolate_frames,
    pieces,
    runs,
    spectra,
    sustained,
)


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6))
def test_runs_are_what_grouping_gives(flags: list[bool], length: int) -> None:
    expected, kept, at = [], [], 0
    for value, group in groupby(flags):
        size = len(list(group))
        expected += [[at, at + size]] if value else []
        kept += [value and size >= length] * size
        at += size
    given_flags = np.array(flags, np.bool_)
    assert runs(given_flags).tolist() == expected
    assert sustained(given_flags, length).tolist() == kept


@pytest.mark.parametrize("length", [1, 5])
def test_nothing_has_no_runs(length: int) -> None:
    assert runs(np.zeros(0, np.bool_)).shape == (0, 2)
    assert sustained(np.zeros(0, np.bool_), length).shape == (0,)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9))
def test_pieces_cover_everything_once_and_show_their_surroundings(total, size, margin):
    x = np.arange(total) ** 2
    assert list(pieces(0, size, margin)) == []
    wide = np.convolve(np.pad(x, margin), np.ones(2 * margin + 1, int), "valid")
    joined = []
    for piece in pieces(total, size, margin):
        seen = x[piece.low : piece.high]
        low, high = piece.low == 0, piece.high == total
        # Beyond the ends there is nothing; a cut in the middle must not matter.
        made = np.convolve(np.pad(seen, margin), np.ones(2 * margin + 1, int), "valid")
        assert low or piece.start - piece.low == margin
        assert high or piece.high - piece.stop == margin
        joined.append(np.repeat(made, 3)[piece.inside(3)])
    np.testing.assert_array_equal(np.concatenate(joined), np.repeat(wide, 3))


def test_spectra_in_blocks_are_those_of_all_frames():
    x = np.random.default_rng(0).standard_normal(4099 * 4 + 16).astype(np.float32)
    frames = framed(x, 16, 4)
    assert frames.shape == (4100, 16)
    window = np.hanning(16)
    got = np.concatenate([values for _, values in spectra(frames, window)])
    np.testing.assert_allclose(got, np.fft.rfft(frames * window))
    assert framed(x[:15], 16, 4).shape == (0, 16)


@given(st.integers(1, 300), st.integers(1, 20))
def test_filtering_in_blocks_is_convolution(samples, taps):
    rng = np.random.default_rng(samples)
    x, kernel = rng.standard_normal(samples), rng.standard_normal(taps)
    got = filtered(x, np.fft.rfft(kernel, 64), 64, taps - 1)
    np.testing.assert_allclose(got, np.convolve(x, kernel), atol=1e-9)


def test_a_later_beginning_gives_the_later_frames() -> None:
    values = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    whole = interpolate_frames(values, 50, 86, 80)
    found = interpolate_frames(values[10:], 50, 86, 50, later=26 / 86 - 10 / 50)
    np.testing.assert_allclose(found[:50], whole[26:76], atol=1e-5)
