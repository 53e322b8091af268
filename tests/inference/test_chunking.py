from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_voice.inference.chunking import (
    Chunk,
    common_period,
    hop_energies,
    plan_chunks,
    quiet_hops,
)
from auto_voice.inference.voice_conversion_pipeline import PipelineConfig
from auto_voice.types import Waveform
from hand_made_stages import join

MEL = Fraction(22050, 256)


def plan(samples, **options):
    frames = int(len(samples) / 16000 * MEL)
    settings = {"frames": frames, "frame_rate": MEL, "grid_frames": 441, "longest_seconds": 10.0}
    energies = hop_energies(samples, 16000)
    return plan_chunks(energies, len(samples) / 16000, **settings | options), frames


def test_every_stage_has_a_frame_boundary_on_the_common_period():
    period = common_period(MEL, Fraction(50), Fraction(125, 2), Fraction(16000))
    assert period == Fraction(512, 100)
    assert common_period(Fraction(50), Fraction(100)) == Fraction(1, 50)


@settings(max_examples=40, deadline=None)
@given(seconds=st.floats(0.2, 120), longest=st.floats(2, 40), seed=st.integers(0, 99))
def test_cores_cover_the_whole_once_and_are_short_enough(seconds, longest, seed):
    samples = np.random.default_rng(seed).standard_normal(int(seconds * 16000)).astype(np.float32)
    chunks, frames = plan(samples, longest_seconds=longest)
    assert chunks[0].start == 0
    assert chunks[-1].stop == frames
    for before, after in pairwise(chunks):
        assert before.stop == after.start
    for chunk in chunks:
        assert 0 < chunk.stop - chunk.start <= longest * MEL + 1
        assert chunk.context_start % 441 == 0
        assert 0 <= chunk.context_start <= chunk.start
        assert chunk.stop <= chunk.context_stop <= frames
        enough = int(1.5 * MEL)
        assert chunk.context_start == 0 or chunk.start - chunk.context_start >= enough
        assert chunk.context_stop == frames or chunk.context_stop - chunk.stop >= enough


def test_cuts_fall_into_the_pause():
    rng = np.random.default_rng(0)
    samples = rng.standard_normal(16000 * 14).astype(np.float32)
    samples[int(7.9 * 16000) : int(8.3 * 16000)] *= 0.01
    (cut,) = quiet_hops(hop_energies(samples, 16000), 14.0, 10.0)
    assert 7.9 < cut / 100 < 8.3


def test_a_short_recording_is_one_piece():
    chunks, frames = plan(np.ones(16000 * 10, np.float32))
    assert chunks == [Chunk(0, frames, 0, frames)]


@pytest.mark.parametrize("samples", [100_000, 99_841, 99_999, 51_201])
def test_equal_audio_on_both_sides_of_a_cut_comes_out_unchanged(samples):
    whole = np.random.default_rng(1).standard_normal(-(-samples // 256) * 256).astype(np.float32)
    frames = len(whole) // 256
    edges = [0, 50, 120, frames - 1, frames]
    chunks = [Chunk(a, b, max(0, a - 30), min(frames, b + 30)) for a, b in pairwise(edges)]
    pieces = [(c, whole[c.context_start * 256 : c.context_stop * 256]) for c in chunks]
    np.testing.assert_allclose(join(pieces, 256, samples), whole[:samples], atol=1e-6)


def test_a_level_jump_between_pieces_becomes_a_fade():
    chunks = [Chunk(0, 20, 0, 25), Chunk(20, 40, 15, 40)]
    pieces = [(chunks[0], np.zeros(25 * 256)), (chunks[1], np.ones(25 * 256))]
    out = join(pieces, 256, 40 * 256)
    assert np.all(np.diff(out) >= 0)
    assert np.max(np.diff(out)) < 0.003
    assert out[19 * 256 - 1] == 0
    assert out[21 * 256] == 1


@pytest.mark.slow
def test_pieces_give_what_the_whole_gives(hand_made, speech, reference):
    source = Waveform(speech(60.0, 130.0), 16000)
    whole_pipeline, _ = hand_made(PipelineConfig(chunk_seconds=1000))
    piece_pipeline, piece_stages = hand_made(PipelineConfig(chunk_seconds=10))
    voice = whole_pipeline.clone(reference)
    whole = whole_pipeline.convert(source, voice)
    pieces = piece_pipeline.convert(source, voice)
    assert whole.chunks == 1
    assert pieces.chunks >= 6
    error = np.asarray(whole) - np.asarray(pieces)
    assert 20 * np.log10(np.linalg.norm(error) / np.linalg.norm(whole)) < -60
    # However it is cut, content is heard in windows of its own, of at most 24 s.
    lengths = piece_stages.stages["content_whisper"].lengths
    assert max(lengths) == 24 * 16000
    assert len(lengths) == 3
