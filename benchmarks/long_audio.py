"""Peak memory and speed over the length of a recording: a table, not a test.

    python benchmarks/long_audio.py [--seconds 30 600 10800] [--vocoder NAME] [--mock-vocoder]

Each length runs in a fresh process through ``convert_file``. What counts is that the peak of the
longest lies within 100 MB of that of 30 s. ``--mock-vocoder`` leaves out the slowest stage, whose
memory is that of one piece by construction, so that hours can be measured in minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys, time
from pathlib import Path
from auto_voice import PipelineConfig, VoiceConversionPipeline
from auto_voice.inference.result import OutputSpec
folder, vocoder, mock_vocoder, mock = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
config = PipelineConfig(use_mock_models=bool(mock), vocoder=vocoder)
class Pipeline(VoiceConversionPipeline):
    @property
    def vocoder(self):
        if mock_vocoder:
            from auto_voice.models.mock_models import MockVocoder
            return MockVocoder()
        return super().vocoder
pipeline = Pipeline(config)
started = time.perf_counter()
result = pipeline.convert_file(
    folder / "source.wav", folder / "voice.wav",
    OutputSpec(folder / "out.wav", allow_mock=True))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1),
    "took": round(time.perf_counter() - started, 1),
    "per_second": round(result.seconds_per_second, 4),
    "pieces": result.chunks, "samples": result.length}))
"""


def make_source(path: Path, seconds: float) -> None:
    """So many seconds of babble, written block by block."""
    import soundfile

    from auto_voice.models.mock_models import mock_sample

    block = mock_sample(59.0, f0_hz=130.0).samples
    left = round(seconds * 16000)
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        while left > 0:
            file.write(block[:left])
            left -= len(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[30, 600, 10800])
    parser.add_argument("--vocoder", default="hifigan_universal")
    parser.add_argument("--mock-vocoder", action="store_true")
    parser.add_argument("--mock", action="store_true", help="all models are mocks")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for seconds in options.seconds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_source(folder / "source.wav", seconds)
            make_source(folder / "voice.wav", 8.0)
            flags = [options.vocoder, str(int(options.mock_vocoder)), str(int(options.mock))]
            done = subprocess.run(
                [sys.executable, "-c", CHILD, name, *flags],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
        row = {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}
        assert row["samples"] == round(seconds * 22050), "the length is kept to the sample"
        rows.append(
            row | {"over_first_mb": round(row["peak_mb"] - (rows or [row])[0]["peak_mb"], 1)}
        )
    if options.json:
        print(json.dumps(rows))
        return
    titles = ("seconds", "peak MB", "over the first", "took s", "s per s", "pieces")
    print("".join(f"{t:>{w}}" for t, w in zip(titles, (8, 9, 16, 8, 9, 8), strict=True)))
    for r in rows:
        print(f"{r['seconds']:>8.0f}{r['peak_mb']:>9}{r['over_first_mb']:>+16.1f}"
              f"{r['took']:>8}{r['per_second']:>9}{r['pieces']:>8}")  # fmt: skip


if __name__ == "__main__":
    main()
