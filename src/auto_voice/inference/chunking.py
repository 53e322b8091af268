"""Cutting a long recording into pieces that join again without a seam.

A piece is rendered with context on both sides and only its core is kept, so a network whose
receptive field is shorter than the context gives what it would have given on the whole. Cores meet
in the quietest spot near the longest allowed length, where a difference is heard least. Context
starts on a grid on which every stage has a frame boundary, so no stage sees its frames shifted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm

import numpy as np

from auto_voice.types import FloatArray

CONTEXT_SECONDS = 1.5
"""At least this much is rendered on each side of a core and thrown away."""
LEVEL_HOP_SECONDS = 0.01
LEVEL_WINDOW_HOPS = 11


@dataclass(frozen=True)
class Chunk:
    """A piece, in mel frames: ``[start, stop)`` is kept of ``[context_start, context_stop)``."""

    start: int
    stop: int
    context_start: int
    context_stop: int


def common_period(*rates_hz: Fraction) -> Fraction:
    """The shortest time, in seconds, that is a whole number of frames at each of the rates.

    Mel frames at 22 050 / 256 Hz, content at 50, pitch at 62.5 and samples at 16 000 Hz meet every
    5.12 s.
    """
    periods = [1 / rate for rate in rates_hz]
    # In lowest terms, the least common multiple of a/b and c/d is lcm(a, c) / gcd(b, d).
    numerator = lcm(*(period.numerator for period in periods))
    denominator = 0
    for period in periods:
        denominator = gcd(denominator, period.denominator)
    return Fraction(numerator, denominator)


def plan_chunks(
    samples: FloatArray,
    sample_rate: int,
    *,
    frames: int,
    frame_rate: Fraction,
    grid_frames: int,
    longest_seconds: float,
    context_seconds: float = CONTEXT_SECONDS,
) -> list[Chunk]:
    """The pieces of ``(samples,)``, whose cores cover ``[0, frames)`` once and in order.

    Args:
        frames: mel frames of the whole.
        grid_frames: context starts at multiples of it.
        longest_seconds: of a core; a shorter recording is one piece.
    """
    context = int(np.ceil(context_seconds * frame_rate))
    cuts = [round(Fraction(at, sample_rate) * frame_rate) for at in
            quiet_cuts(samples, sample_rate, longest_seconds)]  # fmt: skip
    edges = [0, *(cut for cut in cuts if 0 < cut < frames), frames]
    return [
        Chunk(
            start,
            stop,
            max(0, (start - context) // grid_frames * grid_frames),
            min(frames, stop + context),
        )
        for start, stop in pairwise(edges)
    ]


def quiet_cuts(samples: FloatArray, sample_rate: int, longest_seconds: float) -> list[int]:
    """Sample positions that cut ``(samples,)`` into pieces of at most ``longest_seconds``.

    Each lies at the quietest tenth of a second in the last third of what is allowed.
    """
    hop = max(1, round(LEVEL_HOP_SECONDS * sample_rate))
    longest = int(longest_seconds * sample_rate) // hop
    hops = len(samples) // hop
    if len(samples) <= longest_seconds * sample_rate or hops <= longest:
        return []
    framed = samples[: hops * hop].reshape(hops, hop)
    energy = np.einsum("ij,ij->i", framed, framed)
    level = np.convolve(energy, np.ones(LEVEL_WINDOW_HOPS) / LEVEL_WINDOW_HOPS, mode="same")
    cuts: list[int] = []
    done = 0
    while hops - done > longest:
        low = done + longest * 2 // 3
        done = low + int(np.argmin(level[low : done + longest]))
        cuts.append(done * hop)
    return cuts


def join(pieces: Iterable[tuple[Chunk, FloatArray]], hop_samples: int, samples: int) -> FloatArray:
    """Cross-fade rendered pieces into ``(samples,)`` float32.

    Each piece is the audio of its whole context, ``hop_samples`` a frame. Neighbours fade linearly
    over one frame before and one after the cut; equal audio on both sides comes out unchanged.
    """
    out = np.zeros(samples, dtype=np.float32)
    for chunk, audio in pieces:
        first, last = chunk.start == 0, chunk.stop * hop_samples >= samples
        low = 0 if first else (chunk.start - 1) * hop_samples
        high = samples if last else min(samples, (chunk.stop + 1) * hop_samples)
        offset = low - chunk.context_start * hop_samples
        core = np.array(audio[offset : offset + high - low], dtype=np.float32)
        fade = (np.arange(2 * hop_samples, dtype=np.float32) + 0.5) / (2 * hop_samples)
        if not first:
            core[: len(fade)] *= fade[: len(core)]
        if not last:
            # A cut less than a frame before the end leaves the fade unfinished; so does the piece
            # after it, and the two still add up to one.
            core[(chunk.stop - 1) * hop_samples - low :] *= fade[::-1][
                : high - (chunk.stop - 1) * hop_samples
            ]
        out[low : low + len(core)] += core
    return out
