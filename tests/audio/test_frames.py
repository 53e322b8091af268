"""Stretches of frames in which something holds."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_voice.audio.frames import runs, sustained


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
