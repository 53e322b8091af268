"""What the tests of Ray need: workers whose steps a test can follow, and nodes that see no files.

Nodes import this module, so it imports nothing heavy. ``AUTOVOICE_NODE`` names the node that a
worker runs on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from auto_voice import events

# Seconds after which a test is stuck rather than slow.
PATIENCE = 120.0

# Put before everything else on the path of a node that does not see the folder BLIND_TO, and that
# looks at a file whose name ends with held.wav only once there is no file HELD_BY.
BLINDFOLD = """
import os, sys, time
held_by = os.environ.get("HELD_BY")
if held_by and os.environ.get("AUTOVOICE_NODE"):
    see = os.stat
    def patient_stat(path, *args, **options):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith("held.wav"):
            while os.path.lexists(held_by):
                time.sleep(0.02)
        return see(path, *args, **options)
    os.stat = patient_stat
hidden = os.environ.get("BLIND_TO")
if hidden:
    def check(path):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(hidden):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
    def hook(event, args):
        if event == "open":
            check(args[0])
    stat = os.stat
    def blind_stat(path, *args, **options):
        check(path)
        return stat(path, *args, **options)
    os.stat = blind_stat
    sys.addaudithook(hook)
"""


def wait_for(path: Path) -> None:
    """Returns once the file is there; it is an error where that takes for ever."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} never came")
        time.sleep(0.02)


def node() -> str:
    return os.environ.get("AUTOVOICE_NODE", "")


def copying(signs: str = "", **settings: Any) -> Any:
    """Writes what it reads, and tells where it did; the words of a source are what to do first.

    Args:
        signs: folder that all nodes and the test see.
    """

    def work(record: Mapping[str, Any]) -> dict[str, Any]:
        source = Path(record["source"])
        words = source.read_text().split()
        for word in words:
            do, _, what = word.partition(":")
            sign = Path(signs, what)
            if do == "meet":  # Whoever is on the other node.
                Path(signs, node()).touch()
                wait_for(Path(signs, {"a": "b", "b": "a"}[node()]))
            elif do == "hang-on-b":  # And on the other node wait until it does.
                if node() == "b":
                    sign.touch()
                    wait_for(Path(signs, "never"))
                wait_for(sign)
            elif do == "die" or (do == "die-once" and not sign.exists()):
                sign.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            elif do == "raise":
                raise ValueError("it is bad")
            elif do == "fail":
                return {"status": "failed", "error": f"{source} is bad"}
        voices = [Path(name).read_text() for name in record["voice"]]
        Path(record["output"]).write_text(" ".join([*voices, *words]))
        return {
            "status": "done",
            "seconds": 2.0,
            "node": node(),
            "read": os.fspath(source),
            "voices": [os.fspath(v) for v in record["voice"]],
            "trace": events.traceparent(),
            "settings": settings,
        }

    return work


def unmakeable(**_: Any) -> Any:
    from auto_voice.errors import CatalogError

    raise CatalogError("models.yaml:3: there is no key modles; write models.")


def without_models(patch: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Trainings that need no weights: features are what a file says, timbres are constants."""
    import numpy as np

    from auto_voice.errors import AutoVoiceError
    from auto_voice.training import features
    from auto_voice.training import speech_synthesis as s

    class Constant:
        def __init__(self, graph: Path) -> None:
            self.level = 0.01 * len(graph.read_bytes())

        def speak(self, tokens: Any, style: Any, speed: float) -> Any:
            length = int(100 * len(tokens) / speed)
            return np.full(length, self.level + 0.01 * float(style[0]), np.float32)

    def compute(utterance: Any, models: Any) -> dict[str, Any]:
        text = utterance.path.read_text() + utterance.parallel + models.content_space.read_text()
        if "bad" in text:
            raise AutoVoiceError(f"{utterance.path} is bad")
        return {"text": np.frombuffer(text.encode(), np.uint8)}

    def corpus(sources: Any, seed: int) -> Any:
        symbols = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}
        said, spoken = s.read_sentences(sources.sentences), s.read_voices(sources.voices)
        return s.ParallelCorpus(said, spoken, symbols, str.lower, seed)

    patch(s, "OnnxSynthesiser", Constant)
    patch(s.Sources, "corpus", corpus)
    patch(features, "compute", compute)
    patch(features, "_loaded", lambda models: None)
    for module in (s, features):
        patch(module, "limit_threads", lambda threads: None)


def extracting(models: Any) -> Any:
    from auto_voice.training import features

    without_models()
    return features.worker(models)


def speaking(**settings: Any) -> Any:
    from auto_voice.training import speech_synthesis

    without_models()
    return speech_synthesis.worker(**settings)
