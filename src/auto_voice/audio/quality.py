"""How good a recording is as a reference: speech, noise, clipping, bandwidth, reverberation; and
steady noise turned down.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import framed, runs, spectra
from auto_voice.audio.loudness import integrated_loudness
from auto_voice.audio.resample import resample
from auto_voice.audio.vad import speech_segments
from auto_voice.types import BoolArray, FloatArray

# dB; what is cleaner is digital silence between the words, no room has it.
MAX_SNR_DB = 80.0
# Below these a reference gives a worse voice: seconds of speech, dB, share of samples, Hz.
MIN_SPEECH_SECONDS = 3.0
LOW_SNR_DB = 15.0
HIGH_CLIPPING = 1e-3
# Above the telephone band (3.4 kHz) and its codecs' roll-off, below the 8 kHz of 16 kHz audio.
NARROW_BANDWIDTH_HZ = 5000.0
# Share of the time between the speech in which tones change, from which on it is taken for music:
# clean and noisy speech has none; music 20 dB below it has 0.14 in a noisy recording and 0.6 else.
MUSIC_SHARE = 0.12
# Seconds of :func:`decay_time`; close speech gives up to 0.25, a room of 0.8 s 0.5 to 0.7.
LONG_DECAY_SECONDS = 0.45

# Two periods of the lowest voice.
_FRAME_SECONDS = 0.016


@dataclass(frozen=True)
class RecordingQuality:
    """Attributes:
    seconds: length.
    speech_seconds: of it speech.
    speech_ratio: ``speech_seconds / seconds``.
    peak: largest magnitude.
    loudness_lufs: integrated loudness; -inf for silence.
    snr_db: speech over background, up to 80; None without speech.
    clipping_ratio: share of samples on a flat top.
    bandwidth_hz: up to where there is sound.
    decay_seconds: how fast sound dies away at best, as seconds for 60 dB; see
        :func:`decay_time`. None if there are too few decays.
    """

    seconds: float
    speech_seconds: float
    speech_ratio: float
    peak: float
    loudness_lufs: float
    snr_db: float | None
    clipping_ratio: float
    bandwidth_hz: float
    decay_seconds: float | None

    def advice(self) -> tuple[str, ...]:
        """The faults it has as a reference and what to do about each, one sentence each."""
        found = []
        if self.speech_seconds == 0:
            found.append("no speech was found: record someone talking")
        elif self.speech_seconds < MIN_SPEECH_SECONDS:
            found.append(
                f"only {self.speech_seconds:.1f} s of speech: 5 to 30 s give a better likeness"
            )
        if self.snr_db is not None and self.snr_db < LOW_SNR_DB:
            found.append(
                f"noisy ({self.snr_db:.0f} dB SNR): record in a quiet room, near the microphone"
            )
        if self.clipping_ratio > HIGH_CLIPPING:
            found.append(
                f"clipped ({100 * self.clipping_ratio:.1f} % of the samples): "
                "record again at a lower level"
            )
        if self.speech_seconds and self.bandwidth_hz < NARROW_BANDWIDTH_HZ:
            found.append(
                f"narrow band (nothing above {self.bandwidth_hz / 1000:.1f} kHz): "
                "use the original rather than a telephone recording"
            )
        if self.decay_seconds is not None and self.decay_seconds > LONG_DECAY_SECONDS:
            found.append(
                f"reverberant (the room rings for about {self.decay_seconds:.1f} s): "
                "record in a furnished room, near the microphone"
            )
        return tuple(found)

    def as_dict(self) -> dict[str, float | None]:
        """Plain numbers for JSON; infinite values become None."""
        return {
            key: value if value is not None and math.isfinite(value) else None
            for key, value in asdict(self).items()
        }


def measure_quality(samples: FloatArray, sample_rate: int) -> RecordingQuality:
    """All measures of ``(samples,)``."""
    spans = speech_segments(samples, sample_rate, padding_seconds=0.0)
    seconds = len(samples) / sample_rate
    speech = sum(end - start for start, end in spans) / sample_rate
    return RecordingQuality(
        seconds=seconds,
        speech_seconds=speech,
        speech_ratio=speech / seconds if seconds else 0.0,
        peak=float(np.max(np.abs(samples), initial=0.0)),
        loudness_lufs=integrated_loudness(samples, sample_rate),
        snr_db=signal_to_noise(samples, sample_rate, spans),
        clipping_ratio=clipping_ratio(samples),
        bandwidth_hz=bandwidth(samples, sample_rate),
        decay_seconds=decay_time(samples, sample_rate),
    )


def signal_to_noise(
    samples: FloatArray, sample_rate: int, spans: list[tuple[int, int]]
) -> float | None:
    """Speech over background in dB, at most 80; None without speech.

    The background is what sounds at least 0.1 s away from the speech in ``spans``. Where there
    is less than a quarter of a second of that, the quietest 5 % of the frames stand for it: an
    upper bound of the noise, so the figure is then a lower bound.
    """
    power, size = _frame_power(samples, sample_rate)
    if not spans or len(power) == 0:
        return None
    speech = np.zeros(len(power), np.bool_)
    near = np.zeros(len(power), np.bool_)
    margin = round(0.1 * sample_rate)
    for start, end in spans:
        speech[start // size : end // size] = True
        near[max(0, start - margin) // size : (end + margin) // size + 1] = True
    if not speech.any():
        return None
    background = power[~near]
    if len(background) * size < 0.25 * sample_rate:
        background = np.sort(power)[: max(1, len(power) // 20)]
    # The loudest tenth is left out: a cough between two sentences is not the noise floor.
    noise = float(np.sort(background)[: max(1, math.ceil(0.9 * len(background)))].mean())
    clean = max(float(power[speech].mean()) - noise, 1e-3 * noise)
    if clean <= 0:
        return None
    return min(MAX_SNR_DB, 10 * math.log10(clean / max(noise, 1e-20)))


def clipping_ratio(samples: FloatArray) -> float:
    """Share of the samples that lie on a flat top: four or more in a row at the extreme.

    The extreme is that of the recording itself, so clipping is found after a change of level.
    """
    x = np.asarray(samples)
    flat = 0
    for side in (x, -x):
        top = float(np.max(side, initial=0.0))
        if top <= 1e-3:
            continue
        at = side >= top * (1 - 1e-4)
        lengths = np.diff(runs(at), axis=1).reshape(-1)
        # One run is what the crest of a slow wave makes; a limit is met again and again.
        long = lengths[lengths >= 4]
        flat += int(long.sum()) if len(long) > 1 else 0
    return flat / len(x) if len(x) else 0.0


def bandwidth(samples: FloatArray, sample_rate: int) -> float:
    """Highest frequency in Hz with sound less than 60 dB below the strongest, in 125 Hz steps.

    Taken from the loud frames, so that a hiss in the pauses does not count as treble; 0 for
    silence.
    """
    size = 1 << round(math.log2(0.032 * sample_rate))
    if len(samples) < size:
        return 0.0
    frames = framed(samples, size, size // 2)
    frames = frames[:: max(1, len(frames) // 4000)]
    # Blackman: its side lobes stay below what is looked for.
    power = np.square(np.abs(np.fft.rfft(frames * np.blackman(size))))
    total = power.sum(axis=1)
    spectrum = np.quantile(power[total >= np.quantile(total, 0.5)], 0.95, axis=0)
    width = max(1, round(125 * size / sample_rate))
    bands = np.add.reduceat(spectrum, np.arange(0, len(spectrum), width))
    if bands.max() <= 1e-12:
        return 0.0
    highest = int(np.flatnonzero(bands > 1e-6 * bands.max())[-1])
    return float(min((highest + 1) * width * sample_rate / size, sample_rate / 2))


def decay_time(samples: FloatArray, sample_rate: int) -> float | None:
    """Seconds in which sound dies away by 60 dB, judged by the fastest decays of the recording.

    A voice can stop at once, a room cannot: it sets the limit of how fast the level falls.
    Straight 128 ms stretches of the falling log level (500 to 4000 Hz) are fitted with lines, and
    the steep end of their slopes is taken (the idea of Ratnam et al. 2003). A hint, not the
    reverberation time: close speech gives 0.15 to 0.25, in a room of 0.4 s about 0.4, of 0.8 s
    0.5 to 0.7, of 1.5 s 0.5 to 1.0, because the direct sound falls first and pauses are short.
    None if there are too few decays.
    """
    at_16k = resample(samples, sample_rate, 16_000)
    hop, size, span = 64, 512, 32
    if len(at_16k) < size * span:
        return None
    window = np.hanning(size)
    level = np.concatenate(
        [
            np.square(np.abs(spectrum[:, 16:128])).sum(axis=1)
            for _, spectrum in spectra(framed(at_16k, size, hop), window)
        ]
    )
    db = 10 * np.log10(level + 1e-12)
    slopes, straight = _line_fits(db, span)
    starts = db[: len(slopes)]
    ends = db[span - 1 : span - 1 + len(slopes)]
    noise, loud = np.quantile(db, 0.02), np.quantile(db, 0.95)
    falling = straight & (ends > noise + 3) & (starts > loud - 20) & (starts - ends > 3)
    if int(falling.sum()) < 10:
        return None
    steep = -float(np.quantile(slopes[falling], 0.1)) * 16_000 / hop
    return 60 / steep


def tonal_background(
    samples: FloatArray, sample_rate: int, spans: list[tuple[int, int]]
) -> float | None:
    """Share of the time between the speech in ``spans`` in which tones sound that change.

    Music and other voices do; noise has no tones, and the tones of mains hum and machines stay
    what they are. Frames more than 45 dB below the speech do not count as sound, nor does the tenth
    of a second beside the speech, and less than a tenth of a second of tones may be the end of a
    vowel. None where there is less than a quarter of a second between the speech, or none of that.
    """
    at_16k = resample(samples, sample_rate, 16_000)
    size, hop, margin = 2048, 512, 1600
    if not spans or len(at_16k) < size:
        return None
    starts = np.arange(0, len(at_16k) - size + 1, hop)
    outside, inside = np.ones(len(starts), np.bool_), np.zeros(len(starts), np.bool_)
    for start, end in ((a * 16_000 / sample_rate, b * 16_000 / sample_rate) for a, b in spans):
        outside &= (starts + size < start - margin) | (starts > end + margin)
        inside |= (starts >= start) & (starts + size <= end)
    if outside.sum() * hop < 4000 or not inside.any():
        return None
    frames = np.lib.stride_tricks.sliding_window_view(at_16k, size)[::hop]
    speech = float(np.square(frames[inside]).mean())
    power = np.square(np.abs(np.fft.rfft(frames[outside] * np.hanning(size))))[:, 20:640]
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(power, ((0, 0), (10, 10)), mode="edge"), 21, axis=1
    )
    # 16 dB above its surroundings: one bin of noise in a million is.
    tones = power > 40 * np.median(around, axis=2)
    tonal = (power * tones).sum(axis=1) > 0.3 * power.sum(axis=1)
    sound = np.square(frames[outside]).mean(axis=1) > speech * 10**-4.5
    lasting = tones[tonal & sound].mean(axis=0) if (tonal & sound).any() else np.zeros(620)
    changing = (power * tones * (lasting < 0.9)).sum(axis=1) > 0.3 * power.sum(axis=1)
    heard = changing & sound
    return float(heard.mean()) if heard.sum() * hop >= 1600 else 0.0


def _line_fits(db: NDArray[np.float64], span: int) -> tuple[NDArray[np.float64], BoolArray]:
    """Slope per step of every ``span``-long stretch, and whether a line explains 85 % of it."""
    stretches = np.lib.stride_tricks.sliding_window_view(db, span)
    time = np.arange(span) - (span - 1) / 2
    slopes = stretches @ time / np.square(time).sum()
    variance = stretches.var(axis=1)
    explained = np.square(slopes) * time.var()
    return slopes, explained > 0.85 * np.maximum(variance, 1e-12)


def _frame_power(samples: FloatArray, sample_rate: int) -> tuple[NDArray[np.float64], int]:
    """Mean square of 16 ms frames without their mean, and the frame size in samples."""
    size = max(1, round(_FRAME_SECONDS * sample_rate))
    whole = len(samples) // size * size
    frames = np.asarray(samples[:whole], np.float64).reshape(-1, size)
    return frames.var(axis=1), size


# Long enough to part the harmonics of a low voice, short enough for consonants.
FRAME_SECONDS = 0.032
# Frames that cover each sample.
OVERLAP = 4
# Quantile of the power over time: speech leaves at least so many of the frames to the noise.
NOISE_QUANTILE = 0.15
# Share of the estimate that comes from the frame before (Ephraim and Malah use 0.98).
SMOOTHING = 0.97


def denoise(samples: FloatArray, sample_rate: int, *, reduction_db: float = 15.0) -> FloatArray:
    """The recording with steady noise (hiss, hum, fans) lower by up to ``reduction_db``.

    A Wiener gain per frequency with the decision-directed estimate of Ephraim and Malah (1984),
    which keeps residual noise from tinkling. The noise spectrum is one for the whole recording,
    taken from its quietest frames, so what comes and goes (music, voices, knocks) stays, and a
    clean recording, whose quietest frames are far below its speech, hardly changes.

    Args:
        samples: ``(samples,)`` at any rate.
        reduction_db: the most that any frequency is turned down; 0 changes nothing.

    Returns:
        ``(samples,)`` float32 of the same length, without delay.

    Raises:
        ValueError: ``reduction_db`` is negative.
    """
    if not reduction_db >= 0:
        raise ValueError(f"reduction_db must be 0 or more, not {reduction_db}")
    x = np.asarray(samples, np.float32)
    size = 1 << max(6, round(np.log2(FRAME_SECONDS * sample_rate)))
    if len(x) < 4 * size or reduction_db == 0:
        return np.array(x, np.float32)
    hop = size // OVERLAP
    padded = np.pad(x, (size, size + -len(x) % hop))
    window = np.sqrt(np.hanning(size + 1)[:-1])
    frames = framed(padded, size, hop)
    noise = _noise_spectrum(frames, window)
    floor = 10 ** (-reduction_db / 20)
    out = np.zeros(len(padded), np.float64)
    prior = np.ones(len(noise))
    for block, spectrum in spectra(frames, window):
        gains, prior = _wiener_gains(np.square(np.abs(spectrum)) / noise, floor, prior)
        shaped = np.fft.irfft(spectrum * gains, size) * window
        for index, frame in enumerate(shaped, block.start):
            out[index * hop : index * hop + size] += frame
    # Hann windows a quarter apart add up to OVERLAP / 2.
    out *= 2 / OVERLAP
    return out[size : size + len(x)].astype(np.float32)


def _noise_spectrum(
    frames: NDArray[np.float32], window: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean noise power per frequency, from a low quantile over (up to 20 000) frames.

    The power of a noise bin is exponentially distributed; its p-quantile lies at
    ``-ln(1 - p)`` of its mean, and that factor turns one into the other.
    """
    chosen = frames[:: max(1, len(frames) // 20_000)]
    power = np.square(np.abs(np.fft.rfft(chosen * window))).astype(np.float32)
    # Speech fills a part of the frames and pushes the quantile up, padding with zeros down.
    audible = power.sum(axis=1) > 1e-12
    power = power[audible] if audible.any() else power
    low = np.quantile(power, NOISE_QUANTILE, axis=0)
    return np.asarray(low / -np.log1p(-NOISE_QUANTILE), np.float64) + 1e-14


def _wiener_gains(
    posterior: NDArray[np.float64], floor: float, prior: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gains of one block and the clean-to-noise ratio that the next one continues from.

    Args:
        posterior: ``(frames, bins)`` observed power over noise power.
        prior: ``(bins,)`` estimate of clean power over noise power in the frame before.
    """
    gains = np.empty_like(posterior)
    for index, observed in enumerate(posterior):
        ratio = SMOOTHING * prior + (1 - SMOOTHING) * np.maximum(observed - 1, 0)
        gain = np.maximum(ratio / (1 + ratio), floor)
        gains[index] = gain
        prior = np.square(gain) * observed
    return gains, prior
