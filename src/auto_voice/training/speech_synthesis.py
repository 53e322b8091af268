"""Aligned parallel speech: one sentence in several timbres, with the same durations and F0.

Kokoro (StyleTTS 2) speaks from phonemes and a style vector whose first half shapes the timbre and
whose second half the prosody. With the prosody of one voice and the timbre of another the result
has the durations and the F0 of the first and the vocal tract of the second, sample for sample, so
a sentence in K timbres is K recordings that are aligned frame by frame.

A corpus folder holds one folder a sentence with its recordings and ``manifest.json``, written
last: a sentence is whole or is made again. ``speech.csv`` lists what is whole, for training.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile as sf

from auto_voice.batch.executors import (
    Executor,
    ProcessExecutor,
    Record,
    Worker,
    WorkerSpec,
    limit_threads,
)
from auto_voice.errors import ModelLoadError, TrainingError
from auto_voice.filesystem import atomic_write
from auto_voice.models.model_registry import ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.sessions import open_model
from auto_voice.training.data import write_csv
from auto_voice.types import FloatArray

# Of Kokoro: Hz of its output, numbers of a style, of which the first half is the timbre, and most
# tokens of a sentence, of the 510 for which it has styles.
SAMPLE_RATE = 24000
STYLE_SIZE = 256
TIMBRE_SIZE = 128
MAX_TOKENS = 480
# Written last: a sentence without it is made again.
MANIFEST = "manifest.json"
SEXES = "fm"
SAME_SEX, OTHER_SEX = 4, 2
"""Timbres of a sentence: of the sex of its prosody, and of the other."""
BLOCK_SENTENCES, BLOCK_TIMBRES = 40, 80
"""Each timbre of a block speaks three of its sentences, so that every recording has others of its
timbre to serve as reference, however far the corpus has been made."""
GIVEN_MIXTURE_SHARE = 0.4
BEYOND = 1.35
"""How far some mixtures lie outside what lies between their voices."""
# Least and largest factor of speed; and the peak of a recording, where full scale is 1.
SPEED = (0.88, 1.25)
PEAK = 0.95

# Phonemes of espeak-ng, and how Kokoro writes them; longer ones first.
IPA = (
    ("eɪ", "A"), ("oʊ", "O"), ("aɪ", "I"), ("aʊ", "W"), ("ɔɪ", "Y"), ("tʃ", "ʧ"), ("dʒ", "ʤ"),
    ("ɚ", "əɹ"), ("ː", ""), ("\u200d", ""), ("_", ""),
)  # fmt: skip


class Synthesiser(Protocol):
    """Speech from phoneme tokens; anything that keeps timing and F0 apart from timbre."""

    def speak(self, tokens: Sequence[int], style: FloatArray, speed: float) -> FloatArray:
        """``(samples,)`` at ``SAMPLE_RATE`` from a style ``(STYLE_SIZE,)``."""
        ...


@dataclass(frozen=True)
class Timbre:
    """A speaker of the corpus.

    Attributes:
        index: even indices are female, odd ones male.
        sex: ``f`` or ``m``.
        weights: of the given voices that it is mixed from; they sum to one.
    """

    index: int
    sex: str
    weights: Mapping[str, float]


def sex_of(voice: str) -> str:
    """Kokoro names its voices ``<language><sex>_<name>``."""
    return voice[1]


def draw_timbre(index: int, voices: Sequence[str], seed: int = 23) -> Timbre:
    """The timbre that an index always has: the given voices first, then mixtures of two or three,
    some beyond what lies between them, and draws with the covariance of all voices of the sex."""
    sex = SEXES[index % 2]
    names = sorted(v for v in voices if sex_of(v) == sex)
    if not names:
        raise TrainingError(f"There is no voice of the sex {sex!r} among {', '.join(voices)}.")
    if index // 2 < len(names):
        return Timbre(index, sex, {names[index // 2]: 1.0})
    rng = np.random.default_rng((seed, index))
    if len(names) > 2 and rng.random() >= GIVEN_MIXTURE_SHARE:
        chosen = names
        normal = rng.standard_normal(len(names))
        normal -= normal.mean()
        # The sum over voices of normal_i * voice_i / sqrt(n - 1) has the voices' covariance.
        spread = rng.uniform(0.8, 1.15)
        weights = 1 / len(names) + spread * normal / np.sqrt(len(names) - 1)
    else:
        count = min(len(names), int(rng.integers(2, 4)))
        chosen = [str(name) for name in rng.choice(names, count, replace=False)]
        weights = rng.dirichlet(np.full(count, 0.7))
        if rng.random() < 0.5:
            weights = BEYOND * weights - (BEYOND - 1) / count
    pairs = zip(chosen, weights, strict=True)
    return Timbre(index, sex, {name: round(float(weight), 5) for name, weight in pairs})


def plan_block(block: int, seed: int = 31) -> list[tuple[str, list[int]]]:
    """For each sentence of a block the sex of its prosody and the indices of its timbres."""
    rng = np.random.default_rng((seed, block))
    first = block * BLOCK_TIMBRES
    sexes = [SEXES[i % 2] for i in range(BLOCK_SENTENCES)]
    decks = {
        sex: _deal(
            rng,
            [first + i for i in range(BLOCK_TIMBRES) if SEXES[i % 2] == sex],
            [SAME_SEX if prosody == sex else OTHER_SEX for prosody in sexes],
        )
        for sex in SEXES
    }
    return [(sex, [*decks["f"][i], *decks["m"][i]]) for i, sex in enumerate(sexes)]


def _deal(rng: np.random.Generator, cards: Sequence[int], hands: Sequence[int]) -> list[list[int]]:
    """Hands of these sizes, no card twice in a hand, each card dealt equally often."""
    while True:
        pack = [int(c) for _ in range(sum(hands) // len(cards)) for c in rng.permutation(cards)]
        ends = np.cumsum([0, *hands])
        dealt = [pack[a:b] for a, b in itertools.pairwise(ends)]
        if all(len(set(hand)) == len(hand) for hand in dealt):
            return dealt


def style_of(
    weights: Mapping[str, float], voices: Mapping[str, FloatArray], tokens: int
) -> FloatArray:
    """``(STYLE_SIZE,)``: a voice's table has a row for each number of tokens."""
    rows = [w * voices[v][min(max(tokens - 1, 0), len(voices[v]) - 1)] for v, w in weights.items()]
    return np.asarray(np.sum(rows, axis=0), np.float32)


def espeak_phonemes(sentence: str, language: str = "en-us") -> str:
    """IPA as Kokoro writes it, by the program ``espeak-ng``, with the sentence's last mark.

    Raises:
        TrainingError: the program is missing or fails.
    """
    command = ["espeak-ng", "-q", "--ipa=3", "-v", language, sentence]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise TrainingError(
            "espeak-ng turns sentences into phonemes and could not be run "
            f"({error}); install the system package espeak-ng."
        ) from error
    return kokoro_phonemes(done.stdout, sentence)


def kokoro_phonemes(ipa: str, sentence: str) -> str:
    """espeak-ng's IPA in Kokoro's symbols, ended as the sentence ends."""
    out = " ".join(ipa.split())
    for theirs, ours in IPA:
        out = out.replace(theirs, ours)
    return out + (sentence[-1] if sentence[-1:] in (".", "!", "?", ",") else ".")


@dataclass(frozen=True)
class Prosody:
    """Whose melody and timing a sentence has, and how fast it is spoken."""

    weights: Mapping[str, float]
    speed: float


def draw_prosody(
    rng: np.random.Generator, voices: Sequence[str], sex: str, languages: str = "ab"
) -> Prosody:
    """Of one voice, or between two, of those that speak the sentences' language."""
    names = sorted(v for v in voices if sex_of(v) == sex and v[0] in languages)
    if not names:
        raise TrainingError(f"No voice of the sex {sex!r} speaks the sentences' language.")
    first, second = (str(names[i]) for i in rng.choice(len(names), 2, replace=len(names) < 2))
    share = round(float(rng.uniform(0.6, 1.0)), 4) if rng.random() < 0.5 else 1.0
    weights = {first: share}
    if share < 1:
        weights[second] = weights.get(second, 0.0) + round(1 - share, 4)
    return Prosody(weights, round(float(rng.uniform(*SPEED)), 4))


@dataclass(frozen=True)
class ParallelCorpus:
    """What a corpus is made of.

    Attributes:
        sentences: in a fixed order; more may be added at the end.
        voices: tables ``(rows, STYLE_SIZE)`` by name.
        symbols: token of each phoneme symbol.
        phonemes: sentence to phonemes.
        seed: of everything that is drawn.
        versions: of what speaks, for the manifests.
    """

    sentences: Sequence[str]
    voices: Mapping[str, FloatArray]
    symbols: Mapping[str, int]
    phonemes: Callable[[str], str] = espeak_phonemes
    seed: int = 11
    versions: Mapping[str, str] = field(default_factory=dict)

    def tokens(self, sentence: str) -> list[int]:
        """Of a sentence, without what the synthesiser has no symbol for."""
        known = [self.symbols[s] for s in self.phonemes(sentence) if s in self.symbols]
        return known[:MAX_TOKENS]

    def stored(self, index: int, folder: Path) -> dict[str, Any] | None:
        """The manifest of a sentence that is made.

        Raises:
            TrainingError: it is of another list.
        """
        target = place_of(index, folder)
        try:
            read: dict[str, Any] = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if read["text"] != self.sentences[index]:
            raise TrainingError(
                f"{target} holds another sentence than number {index} of the list; give "
                "another folder, or add sentences at the end of the list only."
            )
        return read

    def speak(self, index: int, folder: Path, synthesiser: Synthesiser) -> dict[str, Any]:
        """Makes one sentence, unless it is there; its manifest.

        Args:
            folder: of the corpus.
        """
        if (read := self.stored(index, folder)) is not None:
            return read
        target = place_of(index, folder)
        target.mkdir(parents=True, exist_ok=True)
        block, place = divmod(index, BLOCK_SENTENCES)
        sex, indices = plan_block(block)[place]
        rng = np.random.default_rng((self.seed, index))
        prosody = draw_prosody(rng, list(self.voices), sex)
        tokens = self.tokens(self.sentences[index])
        spoken = style_of(prosody.weights, self.voices, len(tokens))
        clips = []
        for timbre in (draw_timbre(i, list(self.voices)) for i in indices):
            style = spoken.copy()
            style[:TIMBRE_SIZE] = style_of(timbre.weights, self.voices, len(tokens))[:TIMBRE_SIZE]
            samples = synthesiser.speak(tokens, style, prosody.speed)
            loudest = float(np.abs(samples).max(initial=0.0))
            if not np.isfinite(loudest) or loudest == 0:
                continue
            path = target / f"{timbre.index:05d}{timbre.sex}.flac"
            sf.write(path, samples * min(1.0, PEAK / loudest), SAMPLE_RATE, subtype="PCM_16")
            clips.append(
                {"file": path.name, **asdict(timbre), "samples": len(samples),
                 "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            )  # fmt: skip
        manifest = {
            "sentence": index, "text": self.sentences[index], "sex": sex, **asdict(prosody),
            "tokens": len(tokens), "seed": self.seed, "versions": dict(self.versions),
            "clips": clips,
        }  # fmt: skip
        # What is lost in a power cut is spoken again.
        with atomic_write(target / MANIFEST, durable=False) as temporary:
            temporary.write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")
        return manifest


@dataclass(frozen=True)
class Sources:
    """Files that a corpus is made from, so that worker processes can read them themselves.

    Attributes:
        synthesiser: ONNX graph.
        vocabulary: JSON with ``vocab``, symbol to token.
        voices: folder of style tables.
        sentences: text file, one a line.
        model: name and version of the synthesiser, for the manifests.
    """

    synthesiser: Path
    vocabulary: Path
    voices: Path
    sentences: Path
    model: str

    def spec(self, seed: int) -> WorkerSpec:
        """How workers that speak them are made."""
        settings = {
            "synthesiser": str(self.synthesiser), "vocabulary": str(self.vocabulary),
            "voices": [str(path) for path in voice_files(self.voices)],
            "sentences": str(self.sentences), "model": self.model, "seed": seed,
        }  # fmt: skip
        return WorkerSpec(
            f"{__name__}:worker", settings,
            shared=("synthesiser", "vocabulary", "voices", "sentences"), writes=("place",),
        )  # fmt: skip

    def corpus(self, seed: int) -> ParallelCorpus:
        """What is to be made of them.

        Raises:
            TrainingError: a file cannot be read.
        """
        try:
            vocabulary = json.loads(self.vocabulary.read_text(encoding="utf-8"))["vocab"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"The symbols of {self.model} cannot be read from {self.vocabulary}: {error}."
            ) from error
        return ParallelCorpus(
            read_sentences(self.sentences), read_voices(self.voices), vocabulary, seed=seed,
            versions={"synthesiser": self.model},
        )  # fmt: skip


def sources_of(registry: ModelRegistry, synthesiser: str, voices: Path, sentences: Path) -> Sources:
    """What a corpus is made from, with a synthesiser of the catalog, fetched if need be.

    Args:
        synthesiser: ``NAME[@VERSION]``.

    Raises:
        TrainingError: it is another kind of model, or comes without symbols.
    """
    record = registry.version(synthesiser)
    if record.kind != "synthesiser" or len(record.files) < 2:
        raise TrainingError(
            f"{record.key} is no synthesiser with a graph and its symbols; name one that does, "
            "such as kokoro."
        )
    graph, symbols = (registry.path(record.key, file=f.file) for f in record.files[:2])
    return Sources(graph, symbols, voices, sentences, record.key)


def make(
    sources: Sources,
    folder: Path,
    hours: float,
    *,
    seed: int = 11,
    workers: int = 1,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, float]:
    """Makes sentences in their order until there are ``hours`` of recordings or no sentence is
    left, and writes ``speech.csv``; goes on where an earlier run stopped.

    Args:
        workers: processes of this machine.
        executor: who speaks instead of them.
        progress: is told the minutes that there are and those that are wanted.

    Returns:
        Recordings and hours that there are.

    Raises:
        TrainingError: a worker died, so that a sentence is missing.
    """
    corpus = sources.corpus(seed)
    folder.mkdir(parents=True, exist_ok=True)
    done, lost = 0.0, ""

    def told(more: float) -> None:
        nonlocal done
        done += more
        if progress:
            progress(round(60 * min(done, hours)), round(60 * hours))

    def jobs() -> Iterator[Record]:
        for number in range(len(corpus.sentences)):
            if done >= hours:
                return
            if (stored := corpus.stored(number, folder)) is not None:
                told(net_hours([stored]))
            else:
                yield {"number": number, "place": str(place_of(number, folder))}

    # Never more asked for than is being made, so that little is made beyond what is wanted.
    for _, outcome in (executor or ProcessExecutor(workers)).run(sources.spec(seed), jobs()):
        if outcome["status"] == "done":
            told(outcome["hours"])
        else:
            lost = outcome["error"]
    if lost:
        raise TrainingError(f"Some sentences are missing ({lost}); run the same command again.")
    return write_list(folder), done


def worker(
    synthesiser: str, vocabulary: str, voices: Sequence[str], sentences: str, model: str, seed: int
) -> Worker:
    """A worker that speaks sentences; see :meth:`Sources.spec`."""
    limit_threads(1)  # Workers share the cores.
    files = (Path(synthesiser), Path(vocabulary), Path(voices[0]).parent, Path(sentences))
    corpus = Sources(*files, model).corpus(seed)
    network = OnnxSynthesiser(files[0])

    def work(job: Record) -> dict[str, Any]:
        made = corpus.speak(job["number"], Path(job["place"]).parent, network)
        return {"status": "done", "hours": net_hours([made])}

    return work


def place_of(index: int, folder: Path) -> Path:
    """Folder of a sentence in that of the corpus."""
    return folder / f"{index:05d}"


def write_list(folder: Path) -> int:
    """Writes ``speech.csv`` of what is whole, with the columns of training lists and ``parallel``,
    which is the same for recordings that are aligned; returns how many there are."""
    rows = []
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        read = json.loads(manifest.read_text(encoding="utf-8"))
        name = manifest.parent.name
        rows += [
            (
                f"{name}/{clip['file']}",
                f"timbre{clip['index']:05d}",
                "parallel",
                name,
            )
            for clip in read["clips"]
        ]
    write_csv(folder / "speech.csv", [("path", "speaker", "corpus", "parallel"), *rows])
    return len(rows)


def net_hours(manifests: Iterable[Mapping[str, Any]]) -> float:
    """Hours of recordings."""
    samples = sum(clip["samples"] for m in manifests for clip in m["clips"])
    return float(samples / SAMPLE_RATE / 3600)


def read_sentences(path: Path) -> list[str]:
    """Non-empty lines.

    Raises:
        TrainingError: unreadable, or none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The sentences {path} cannot be read: {error}.") from error
    sentences = [line.strip() for line in lines if line.strip()]
    if not sentences:
        raise TrainingError(f"{path} holds no sentences; write one a line.")
    return sentences


def voice_files(folder: Path) -> list[Path]:
    """Files of style tables."""
    return sorted(folder.glob("*.bin"))


def read_voices(folder: Path) -> dict[str, FloatArray]:
    """Tables ``(rows, STYLE_SIZE)`` from ``*.bin`` files of float32, by name.

    Raises:
        TrainingError: there are none, or a file has another size.
    """
    voices = {}
    for path in voice_files(folder):
        values = np.fromfile(path, np.float32)
        if not len(values) or len(values) % STYLE_SIZE:
            raise TrainingError(f"{path} is no table of styles of {STYLE_SIZE} numbers.")
        voices[path.stem] = values.reshape(-1, STYLE_SIZE)
    if not voices:
        raise TrainingError(f"{folder} holds no voices (*.bin); name the folder of them.")
    return voices


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> OnnxSynthesiser:
    """Stage ``kokoro``; see ``registry.architectures``. It runs on the CPU."""
    return OnnxSynthesiser(files[version.files[0].file])


class OnnxSynthesiser:
    """Kokoro as an ONNX graph with the inputs ``tokens``, ``style`` and ``speed``.

    Raises:
        TrainingError: the file is no such graph.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._network = open_model(path, path.name, inputs=("tokens", "style", "speed"))
        except ModelLoadError as error:
            raise TrainingError(
                f"{path} is no synthesiser: give Kokoro as an ONNX graph with the inputs tokens, "
                "style and speed."
            ) from error

    def speak(self, tokens: Sequence[int], style: FloatArray, speed: float) -> FloatArray:
        """``(samples,)`` at ``SAMPLE_RATE``; see :class:`Synthesiser`."""
        spoken = self._network(
            np.array([[0, *tokens, 0]], np.int64),
            style[None].astype(np.float32),
            np.array([speed], np.float32),
        )
        return np.asarray(spoken, np.float32).ravel()
