#!/usr/bin/env python3
"""Record what Resemblyzer 0.1.4 answers, for the tests of our speaker encoder to compare with.

Resemblyzer cannot be a dependency (it needs webrtcvad, which fails on a fresh setuptools), so it
is run once, in an environment of its own, on the recordings of the catalog:

    pip install "setuptools<81" "scipy<1.14" "numpy<2" librosa==0.10.1 torch soundfile soxr
    pip install webrtcvad
    pip install --no-deps resemblyzer==0.1.4
    python scripts/record_speaker_vectors.py \
        two_cities=$(autovoice models path sample_two_cities) \
        clone_test=$(autovoice models path sample_clone_test) \
        beckett=$(autovoice models path sample_beckett)

It writes tests/models/data/speaker_vectors.npz:
``<name>/<first>:<last>`` the embedding of those seconds of a recording at 16 kHz as Resemblyzer's
``embed_utterance`` gives it, ``<name>/<first>:<last>/prepared`` the same after its volume
normalisation, and ``windows/<samples>`` the first mel frames of the windows it cuts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).parents[1] / "tests" / "models" / "data" / "speaker_vectors.npz"
SAMPLE_RATE = 16000
EXCERPTS = {
    "two_cities": ((0.0, 44.0), (0.0, 8.0), (20.0, 27.3), (10.0, 11.0), (30.0, 33.17)),
    "clone_test": ((0.0, 4.0), (1.0, 3.4)),
    "beckett": ((0.0, 10.0), (2.0, 6.5)),
}
LENGTHS = (1, 8000, 25599, 25600, 25601, 31999, 32000, 37919, 37920, 37921, 48000, 100000, 700001)


def main(arguments: list[str]) -> int:
    import soundfile
    import soxr
    from resemblyzer import VoiceEncoder, normalize_volume

    encoder = VoiceEncoder("cpu", verbose=False)
    vectors = {}
    for argument in arguments:
        name, _, path = argument.partition("=")
        audio, rate = soundfile.read(path, dtype="float32")
        if rate != SAMPLE_RATE:
            audio = soxr.resample(audio, rate, SAMPLE_RATE, quality="VHQ")
        for first, last in EXCERPTS[name]:
            excerpt = audio[round(first * SAMPLE_RATE) : round(last * SAMPLE_RATE)]
            prepared = normalize_volume(excerpt, -30, increase_only=True)
            vectors[f"{name}/{first}:{last}"] = encoder.embed_utterance(excerpt)
            vectors[f"{name}/{first}:{last}/prepared"] = encoder.embed_utterance(prepared)
    for samples in LENGTHS:
        _, mel_slices = encoder.compute_partial_slices(samples, rate=1.3, min_coverage=0.75)
        vectors[f"windows/{samples}"] = np.array([piece.start for piece in mel_slices])
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUTPUT, **vectors)
    print(f"{len(vectors)} arrays in {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
