"""Live conversion: what a block costs, what the latency costs in quality, and whether it lasts.

    python benchmarks/live.py speed [--blocks 20 40 80 160 320] [--lookahead 110] [--seconds 5]
    python benchmarks/live.py quality PAIRS.csv [--settings 80/80 160/110 320/320] [--seconds 8]
    python benchmarks/live.py soak --minutes 30 [--block 160]
    python benchmarks/live.py connections [--most 3] [--seconds 20]

``speed`` gives seconds of work for a second of sound by step, and percentiles of the work of a
block, idle and beside a process that does nothing but count. ``quality`` converts each pair as a
file and live with every setting (block/look-ahead in ms) and lets the judges of ``autovoice
evaluate`` measure them; each source is one speaker's beginning, of whom nothing is known yet, or
with ``--own-voice`` is. ``soak`` runs at the pace of real time and fails where memory grows or
sound is lost. ``connections`` lets one client after the other more speak to a server at the pace of
real time, to its limit and one beyond. ``--mock`` runs the scaffolding without models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from engine import neighbour

from auto_voice import PipelineConfig, VoiceConversionPipeline
from auto_voice.audio.io import read_audio
from auto_voice.audio.writing import write_audio
from auto_voice.inference.streaming import BLOCK_MS, LOOKAHEAD_MS, LiveSession, StreamReport
from auto_voice.models.mock_models import mock_sample
from auto_voice.types import Waveform

# Columns of the table of quality and what they are called in a score.
FIGURES = {
    "SECS": "secs", "SECS2": "secs2", "WER": "wer", "DNSMOS": "dnsmos",
    "F0 corr.": "f0_correlation",
}  # fmt: skip
# Growth in memory over a soak that is no leak: what allocators keep.
SOAK_MB = 30.0


def talk(seconds: float, f0_hz: float = 120.0) -> Waveform:
    return mock_sample(seconds, f0_hz=f0_hz)


def speed(pipeline: VoiceConversionPipeline, options: argparse.Namespace) -> None:
    voice, source = pipeline.clone(talk(8.0, 210.0)), talk(options.seconds)
    print("block  beside  latency     RTF  CPU RTF   median    p95  worst  late  steps")
    for busy in (False, True):
        for block in options.blocks:
            stream = pipeline.stream(
                voice, sample_rate=16000, output_rate=22050,
                block_ms=block, lookahead_ms=options.lookahead,
            )  # fmt: skip
            with neighbour(busy):
                cpu = time.process_time()
                stream.push(source.samples)
                cpu = time.process_time() - cpu
            report = stream.report()
            steps = "  ".join(f"{k} {v:.3f}" for k, v in report.stages.items() if v >= 0.005)
            median, high, worst = report.block_ms
            print(
                f"{1000 * stream.block_seconds:4.0f}ms {'busy' if busy else 'idle':>7} "
                f"{stream.latency_ms:6.0f}ms {report.rtf:7.2f} {cpu / report.seconds:8.2f} "
                f"{median:6.0f}ms {high:5.0f} {worst:6.0f} {report.late_blocks:3}/{report.blocks}"
                f"  {steps}",
                flush=True,
            )


def quality(pipeline: VoiceConversionPipeline, options: argparse.Namespace) -> None:
    from auto_voice.evaluation import Scorer, read_pairs
    from auto_voice.evaluation.judges import load_judges

    pairs = read_pairs(options.pairs)
    scorer = Scorer(load_judges(pipeline.registry))
    settings = [None, *options.settings]
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number, pair in enumerate(pairs):
            audio = read_audio(pair.source)
            cut = audio.samples[: round(options.seconds * audio.sample_rate)]
            sources.append(Path(folder) / f"source-{number}.wav")
            write_audio(sources[-1], Waveform(cut, audio.sample_rate))
        voices = [pipeline.clone(list(pair.targets)) for pair in pairs]
        print(f"{'block/look-ahead':<17} latency " + " ".join(f"{n:>8}" for n in FIGURES))
        for setting in settings:
            scores, latency = [], 0.0
            for number, pair in enumerate(pairs):
                made = Path(folder) / f"made-{number}-{str(setting).replace('/', '-')}.wav"
                source = read_audio(sources[number])
                if setting is None:
                    result = pipeline.convert(source, voices[number])
                    made_audio = Waveform(result.samples, result.sample_rate)
                else:
                    block, ahead = map(float, setting.split("/"))
                    stream = pipeline.stream(
                        voices[number], sample_rate=source.sample_rate, output_rate=22050,
                        block_ms=block, lookahead_ms=ahead,
                        own_voice=sources[number] if options.own_voice else None,
                    )  # fmt: skip
                    latency = stream.latency_ms
                    parts = [stream.push(source.samples), stream.flush()]
                    made_audio = Waveform(np.concatenate(parts), 22050)
                write_audio(made, made_audio)
                scores.append(
                    scorer.score(
                        replace(pair, source=sources[number], converted=made, transcript="")
                    ).values
                )
            shown = [
                statistics.mean([s[key] for s in scores if key in s] or [float("nan")])
                for key in FIGURES.values()
            ]
            name = "file" if setting is None else setting
            print(
                f"{name:<17} {latency:5.0f}ms " + " ".join(f"{value:8.3f}" for value in shown),
                flush=True,
            )


def memory_mb() -> float:
    """Of this process, as it is now (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def soak(pipeline: VoiceConversionPipeline, options: argparse.Namespace) -> int:
    stream = pipeline.stream(
        pipeline.clone(talk(8.0, 210.0)), sample_rate=48_000,
        block_ms=options.block, lookahead_ms=options.lookahead,
    )  # fmt: skip
    stream.warm_up()
    session, ended = LiveSession(stream), threading.Event()
    worker = threading.Thread(target=_work, args=(session, ended))
    spoken = np.tile(mock_sample(20.0, 48_000, f0_hz=120.0).samples, 2)
    worker.start()
    started, place, settled, next_line = time.monotonic(), 0, 0.0, 60.0
    try:
        while place < options.minutes * 60 * 48_000:
            time.sleep(max(0.0, started + place / 48_000 - time.monotonic()))
            at = place % (len(spoken) // 2)
            session.feed(spoken[at : at + 480])
            session.take(480)
            place += 480
            seconds = place / 48_000
            if not settled and seconds >= min(60.0, options.minutes * 30):
                settled = memory_mb()
            if seconds >= next_line:
                next_line += 60
                print(_line(session.report(), session.delay_ms), flush=True)
    finally:
        ended.set()
        worker.join()
    report = session.report()
    grown = memory_mb() - settled
    print(_line(report, session.delay_ms), f"grown by {grown:.1f} MB since the first minute")
    lost = report.dropped_blocks or report.dropouts
    return 1 if lost or grown > SOAK_MB else 0


def connections(pipeline: VoiceConversionPipeline, options: argparse.Namespace) -> None:
    """From one client to as many as the server takes, and one more, which is refused."""
    import uvicorn

    from auto_voice.client import Client
    from auto_voice.errors import BusyError
    from auto_voice.server import Engine, ServerSettings, create_app
    from auto_voice.voices.library import VoiceLibrary

    rate, spoken = 48_000, mock_sample(options.seconds, 48_000, f0_hz=120.0).samples
    with tempfile.TemporaryDirectory() as folder:
        voices = Path(folder) / "voices"
        VoiceLibrary(voices).add("friend", pipeline.clone(talk(8.0, 210.0)))
        settings = ServerSettings(
            data_dir=Path(folder) / "data", live_streams=options.most,
            live_streams_client=options.most,
        )  # fmt: skip
        app = create_app(settings, Engine(pipeline, voices))
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
        server, listening = uvicorn.Server(config), config.bind_socket()
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        print("clients  delay median    p95  left out   RTF")
        try:
            for count in range(1, options.most + 1):
                with Client(url) as client, ExitStack() as held:
                    open_ = [
                        held.enter_context(client.live("friend", sample_rate=rate))
                        for _ in range(count)
                    ]
                    delays: list[float] = []
                    talking = [
                        threading.Thread(target=_converse, args=(one, spoken, rate, delays))
                        for one in open_
                    ]
                    if count == options.most:
                        try:
                            client.live("friend", sample_rate=rate)
                        except BusyError as error:
                            print(f"one more: {error}")
                    for one in talking:
                        one.start()
                    for one in talking:
                        one.join()
                    reports = [one.report for one in open_]
                    left = sum(r["dropped_blocks"] for r in reports)
                    rtf = statistics.mean(r["rtf"] for r in reports)
                    print(
                        f"{count:7} {np.median(delays):10.0f}ms {np.percentile(delays, 95):6.0f} "
                        f"{left:8} {rtf:6.2f}",
                        flush=True,
                    )
        finally:
            server.should_exit = True
            thread.join()


def _converse(conversion: Any, spoken: Any, rate: int, delays: list[float]) -> None:
    """Speaks at the pace of real time and notes how much of it has no result yet, in ms."""
    started, back = time.monotonic(), 0
    for at in range(0, len(spoken), rate // 50):
        time.sleep(max(0.0, started + at / rate - time.monotonic()))
        conversion.send(spoken[at : at + rate // 50])
        while len(found := conversion.receive(0)):
            back += len(found)
        if at > rate:
            delays.append(1000 * (at + rate // 50 - back) / rate)
    conversion.finish()


def _work(session: LiveSession, ended: threading.Event) -> None:
    while not ended.is_set():
        session.step(0.05)


def _line(report: StreamReport, delay_ms: float) -> str:
    return (
        f"{report.seconds / 60:5.1f} min  RTF {report.rtf:.2f}  delay {delay_ms:.0f} ms  late "
        f"{report.late_blocks}/{report.blocks}  dropped {report.dropped_blocks}  drop-outs "
        f"{report.dropouts}  memory {memory_mb():.0f} MB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mock", action="store_true")
    parser.add_argument("--config", type=json.loads, default={}, help="of PipelineConfig, as JSON")
    what = parser.add_subparsers(dest="what", required=True)
    command = what.add_parser("speed")
    command.add_argument("--blocks", type=float, nargs="+", default=[20, 40, 80, 160, 320])
    command.add_argument("--lookahead", type=float, default=LOOKAHEAD_MS)
    command.add_argument("--seconds", type=float, default=5.0)
    command = what.add_parser("quality")
    command.add_argument("pairs", type=Path)
    settings = ["160/80", "160/110", "160/160", "160/320"]
    command.add_argument("--settings", nargs="+", default=settings)
    command.add_argument("--seconds", type=float, default=8.0)
    command.add_argument("--own-voice", action="store_true")
    command = what.add_parser("soak")
    command.add_argument("--minutes", type=float, default=30)
    command.add_argument("--block", type=float, default=BLOCK_MS)
    command.add_argument("--lookahead", type=float, default=LOOKAHEAD_MS)
    command = what.add_parser("connections")
    command.add_argument("--most", type=int, default=3)
    command.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    config: dict[str, Any] = {"use_mock_models": options.mock, **options.config}
    pipeline = VoiceConversionPipeline(PipelineConfig(**config))
    run = {"speed": speed, "quality": quality, "soak": soak, "connections": connections}[
        options.what
    ]
    return run(pipeline, options) or 0


if __name__ == "__main__":
    sys.exit(main())
