"""A recipe from speech to published models, step by step; each step goes on where it stopped.

Output folder::

    training.json               what is trained here, so that nothing else is
    content_space.safetensors   the teacher's whitened subspace
    features/                   one file an utterance
    perceptual_maps.safetensors maps to the mels of recogniser and speaker encoder, where needed
    content/ converter/ tune/   run folders: checkpoint.pt, log.jsonl, curves.png
    published/                  weights, models.yaml that a registry reads, card.md
    failures.csv                recordings that were left out, and why
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from tqdm import tqdm

from auto_voice.audio.mel import HIFIGAN_MEL, envelope_size
from auto_voice.batch.executors import Executor
from auto_voice.errors import TrainingError
from auto_voice.filesystem import read_json, write_json
from auto_voice.models.base import DRAWING
from auto_voice.models.hifigan_model import HiFiGANShape
from auto_voice.models.model_registry import PIPELINE_MODELS, ModelRegistry
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.registry.catalog_schema import builtin_catalog, load_catalog
from auto_voice.models.runtime.quantise import published
from auto_voice.models.whisper_encoder import (
    ARCHITECTURE,
    ContentSpace,
    WhisperContentEncoder,
    WhisperEncoder,
    scaled,
)
from auto_voice.training import features, losses, vocoder
from auto_voice.training.corpus import Corpus
from auto_voice.training.data import Utterance, hold_out, scan
from auto_voice.training.export_graphs import as_network
from auto_voice.training.networks.encoders import ContentNet
from auto_voice.training.networks.generators import ConverterNet
from auto_voice.training.networks.loading import (
    GROWS,
    content_net,
    converter_net,
    grow_converter,
    speaker_net,
    vocoder_net,
    whisper_net,
)
from auto_voice.training.publish import (
    Teacher,
    publish,
    publish_vocoder,
    round_as_published,
    round_vocoder,
)
from auto_voice.training.recipes import Recipe, StageRecipe
from auto_voice.training.tasks import ContentTask, ConverterTask, NetT, Task
from auto_voice.training.trainer import Trainer, plot_curves
from auto_voice.training.vocoder import VocoderTask
from auto_voice.types import FloatArray

# Name of the feature that holds the content encoder's own output.
STUDENT = "student"
# The maps of ``PerceptualLosses`` are fitted on so many recordings.
MAP_RECORDINGS = 100
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a training left.

    Attributes:
        catalog: the ``models.yaml`` to name in ``AUTOVOICE_CONFIG`` or ``--config``.
        figures: last held-out figures, ``<stage>.<figure>``.
        failures: recordings that were left out, and why.
    """

    catalog: Path
    figures: dict[str, float]
    failures: dict[Path, str]


class Workflow:
    """One recipe in one output folder.

    Args:
        recipe: what to do.
        sources: folders and CSV lists of speech.
        folder: where everything goes.
        registry: serves the teacher, the speaker encoder and the models to start from.
        device: of the networks: ``cpu`` or ``cuda``.
        workers: processes that compute features.
        executor: computes features in their place.
        where: keyword arguments of the registry that its workers open, beyond what is set there.
        say: is told of each step.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Path],
        folder: Path,
        registry: ModelRegistry,
        *,
        device: str = "cpu",
        workers: int | None = None,
        executor: Executor | None = None,
        where: Mapping[str, Any] | None = None,
        say: Say = print,
    ) -> None:
        self.recipe, self.sources, self.folder = recipe, sources, folder
        self.registry, self.device, self.workers, self.say = registry, device, workers, say
        self.executor, self.where = executor, where or {}
        self.figures: dict[str, float] = {}

    def run(self) -> Outcome:
        """All steps.

        Raises:
            TrainingError: no usable speech, or nobody to hold out.
            TrainingError: networks of sizes that do not fit, or a folder of another training.
            ModelError: the teacher or the speaker encoder cannot be had.
        """
        torch.manual_seed(0)
        _check_device(self.device)
        utterances = scan(self.sources)
        parts = self._split(utterances)
        self._check_weights(utterances, parts)
        if not all(parts):
            what = self.recipe.data.hold_out_by
            count = len({u.speaker for u in utterances} if what == "speaker" else utterances)
            raise TrainingError(
                f"{count} {what}{'s are' if count != 1 else ' is'} too few to hold one out; add "
                f"{what}s, or change data.hold_out in the recipe."
            )
        if self.recipe.vocoder is not None:
            return self._vocoder(self.recipe.vocoder, *parts)
        start, content_start = self._start(), self._content_start()
        self._claim()
        failures = self._features(utterances)
        train, held = self._corpora(utterances)
        content, net = self._content(train, held, content_start)
        if self.recipe.tune is not None:
            self._encode(content, [train, held])
        converter = self._converter(train, held, start)
        catalog = publish(
            self.recipe, self.folder / "published", content, converter, content_net=net,
            figures=self.figures, speakers=len(train.by_speaker), hours=_hours(train),
            teacher=self._teacher(content.space), drawing=self._drawing(),
        )  # fmt: skip
        return Outcome(catalog, dict(self.figures), failures)

    def _check_weights(
        self, utterances: Sequence[Utterance], parts: Sequence[Sequence[Utterance]]
    ) -> None:
        """The recipe weighs speech that is there.

        Raises:
            TrainingError: nothing of a corpus that it names is, or nothing of what is there counts.
        """
        weights = self.recipe.data.weights
        there = {u.corpus for u in utterances}
        known = ", ".join(sorted(there))
        if missing := sorted(weights.keys() - there):
            raise TrainingError(
                f"The recipe's data.weights name {missing[0]}, of which there is no recording; "
                f"there are {known}."
            )
        for part in parts:
            if part and not any(weights.get(u.corpus, 1.0) for u in part):
                raise TrainingError(
                    "The recipe's data.weights leave nothing to train on, or nothing to hold out; "
                    f"there are {known}."
                )

    def _claim(self) -> None:
        """Notes what is trained in the folder; how long may change.

        Raises:
            TrainingError: something else is, whose checkpoints would pass for this one's.
        """
        mine = {"features": features.VERSION, **asdict(self.recipe)}
        # Neither changes what is trained.
        del mine["description"], mine["kept_change"]
        for stage in ("content", "converter", "tune", "vocoder"):
            if mine[stage] is not None:
                del mine[stage]["schedule"]
        if self._has_perceptual_losses():
            mine["perceptual"] = losses.VERSION
        mine["speech"] = [str(source.resolve()) for source in self.sources]
        mine = json.loads(json.dumps(mine))  # As it reads in the file: tuples are lists.
        note = self.folder / "training.json"
        theirs = read_json(note)
        if theirs is not None:
            if other := [key for key in mine if mine[key] != theirs.get(key)]:
                raise TrainingError(
                    f"{self.folder} holds another training (its {other[0]} differs); give another "
                    "folder with --out, or remove it."
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(note, mine)
        except OSError as error:
            reason = error.strerror or str(error)
            raise TrainingError(
                f"{self.folder} cannot be written to ({reason}); give another folder with --out."
            ) from error

    def _vocoder(
        self, stage: StageRecipe, train: Sequence[Utterance], held: Sequence[Utterance]
    ) -> Outcome:
        """A recipe's vocoder, taught on mels of the recordings that can be read."""
        name = self.recipe.vocoder_from or PIPELINE_MODELS["vocoder"]
        version = published(self.registry, name)
        if version.architecture != "hifigan" or version.quantised is not None:
            raise TrainingError(
                f"vocoder_from is {version.key}, which is no HiFi-GAN of whole precision; name "
                "hifigan_universal@1.0."
            )
        shape = HiFiGANShape.from_params(version.params)
        teacher = vocoder_net(self.registry, version.key, shape).to(self.device)
        self._claim()
        (mels, failures), (others, more) = (vocoder.mels(part) for part in (train, held))
        failures |= more
        self._tell(failures)
        task = VocoderTask(mels, others, teacher, shape, **stage.task)
        net = self._train("vocoder", stage, task)
        round_vocoder(net)
        self.figures |= {f"vocoder.published_{k}": v for k, v in task.validate().items()}
        hours = sum(mel.shape[1] for mel in task.train) / HIFIGAN_MEL.frame_rate / 3600
        catalog = publish_vocoder(
            self.recipe, self.folder / "published", net, task.shape, version, figures=self.figures,
            speakers=len({u.speaker for u in train if u.path not in failures}), hours=hours,
        )  # fmt: skip
        return Outcome(catalog, dict(self.figures), failures)

    def _features(self, utterances: Sequence[Utterance]) -> dict[Path, str]:
        wanted = self.recipe.content_space
        target = self.folder / "content_space.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self._kept() if self.recipe.keeps_space else None
        shape = kept or wanted
        if kept is not None:
            target.write_bytes(self._stored_space(kept).read_bytes())
        elif not target.exists():
            self.say("Fitting the content space")
            features.fit_content_space(
                utterances, features.load_teacher(self.registry, wanted.layers), target,
                wanted.dims, wanted.sample,
            )  # fmt: skip
        self.say(f"Features of {len(utterances)} recordings")
        own = self.registry.settings
        here = {"config": own.config, "offline": own.offline, "model_dir": self.registry.model_dir}
        models = features.Models(**{
            "content_space": target, "layers": self._layers(), "envelope": shape.envelope,
            "cepstra": shape.cepstra, "pauses": self.recipe.data.pauses,
            "perturbed": self.recipe.data.perturbed,
            **(here if self.executor is None else {"model_dir": None, **self.where}),
        })  # fmt: skip
        self.registry.pull("speaker_encoder")
        failures = features.extract(
            utterances, self.folder / "features", models, self.workers, self.executor
        )
        self._tell(failures)
        return failures

    def _tell(self, failures: Mapping[Path, str]) -> None:
        if failures:
            self.say(f"{len(failures)} recordings were left out; see failures.csv")
        with (self.folder / "failures.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["path", "reason"], *sorted(failures.items())])

    def _split(self, utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
        data = self.recipe.data
        return hold_out(utterances, data.hold_out, data.hold_out_by)

    def _corpora(self, utterances: Sequence[Utterance]) -> tuple[Corpus, Corpus]:
        train, held = self._split(utterances)
        weights = dict(self.recipe.data.weights)
        folder = self.folder / "features"
        return Corpus.load(train, folder, weights), Corpus.load(held, folder, weights)

    def _teacher(self, space: str) -> Teacher | None:
        """What serves the content space, unless every registry knows it."""
        version = space.partition("@")[2]
        if version in _known_spaces():
            return None
        file = self.folder / "content_space.safetensors"
        record = self.registry.version("content_whisper")
        return Teacher(record, file, version, self._layers())

    def _layers(self) -> int:
        """Of the teacher."""
        if not self.recipe.keeps_space:
            return self.recipe.content_space.layers
        layers: int = self._space_record(self._kept()).params["layers"]
        return layers

    @property
    def _kept_name(self) -> str:
        return self.recipe.content_from or "content_compact"

    def _kept(self) -> WhisperContentEncoder:
        # Told before anything is fetched.
        if self.registry.version(self._kept_name).architecture != ARCHITECTURE:
            raise TrainingError(
                f"content_from is {self._kept_name}, in whose space nothing can be trained; name "
                "content_whisper, or an encoder that was trained here."
            )
        encoder: WhisperContentEncoder = self.registry.load(self._kept_name)
        return encoder

    def _space_record(self, encoder: WhisperContentEncoder) -> ModelVersion:
        """A space has the version of the teacher that serves it; its components may be older."""
        teacher = self.registry.version("content_whisper", encoder.space.partition("@")[2])
        if len(teacher.files) < 2:
            raise TrainingError(f"{teacher.key} names no file with a content space.")
        return teacher

    def _stored_space(self, encoder: WhisperContentEncoder) -> Path:
        teacher = self._space_record(encoder)
        return self.registry.path(teacher.name, teacher.version, file=teacher.files[1].file)

    def _content_start(self) -> ContentNet | None:
        """The content encoder to train, of the teacher's own layers.

        Raises:
            TrainingError: the teacher has no such, or crops would be longer than it can hear.
        """
        stage = self.recipe.content
        if stage is None:
            return None
        if not self.recipe.keeps_space and self.recipe.name in _known_spaces():
            raise TrainingError(
                f"There is a content space of the name {self.recipe.name} already; give the recipe "
                "another name, or content_from to train in that space."
            )
        keeps = self.recipe.keeps_space
        dims = self._kept().components if keeps else self.recipe.content_space.dims
        path = self.registry.path(features.TEACHER, file="model.bin")
        net = content_net(path, dims, **stage.net)
        if stage.task["frames"] > net.shape.positions:
            raise TrainingError(
                f"content.task.frames is {stage.task['frames']}, and the teacher hears "
                f"{net.shape.positions} frames at once; make it less."
            )
        return net

    def _content(
        self, train: Corpus, held: Corpus, start: ContentNet | None
    ) -> tuple[WhisperContentEncoder, ContentNet | None]:
        """The content encoder, and its network where that is new."""
        stage, kept = self.recipe.content, self._kept() if self.recipe.keeps_space else None
        if stage is None or start is None:
            assert kept is not None  # A recipe without a stage keeps an encoder.
            return kept, None
        task = ContentTask(train, held, start, **stage.task)
        net, wanted = self._train("content", stage, task), self.recipe.content_space
        round_as_published(net)
        self.figures |= {f"content.published_{k}": v for k, v in task.validate().items()}
        encoder = WhisperEncoder(
            as_network(ARCHITECTURE, net.shape, net, self.device), net.shape.width
        )
        version, shape = self.recipe.name, kept or wanted
        return WhisperContentEncoder(
            encoder, net.subspace(), f"content_compact@{version}",
            kept.space if kept else f"content_space@{version}", shape.envelope, shape.cepstra,
        ), net  # fmt: skip

    def _encode(self, encoder: WhisperContentEncoder, corpora: Sequence[Corpus]) -> None:
        """Adds the content encoder's output to every item, as inference computes it."""
        self.say("Content of all recordings")
        items = [item for corpus in corpora for item in corpus.items]
        for item in tqdm(items, desc="content", unit="file", disable=None):
            energies = item.features[features.WHISPER_ENERGIES].astype(np.float32)
            states = encoder.encoder.states(scaled(energies, energies.max()))
            learned = encoder.subspace.project(states)
            # What follows is computed from the sound, so it is the teacher's.
            further = item.features["teacher"][:, learned.shape[1] :]
            content = np.concatenate([learned - learned.mean(0), further], axis=1)
            item.features[STUDENT] = content.astype(np.float16)

    def _start(self) -> ConverterNet:
        """The converter to train, new or from where it goes on.

        Raises:
            TrainingError: it does not fit the content, told before hours of work and not after.
        """
        recipe, wanted = self.recipe, self.recipe.content_space
        if recipe.keeps_space:
            dims, cepstra = self._kept().dims, self._kept().cepstra
        else:
            dims = wanted.dims + envelope_size(wanted.envelope, wanted.cepstra)
            cepstra = wanted.cepstra
        if recipe.converter is not None and recipe.converter_from is None:
            net = ConverterNet(**recipe.converter.net)
            whose = "The recipe's converter"
            remedy = f"set converter.net.dims to {dims}"
        else:
            whose = recipe.converter_from or "converter_compact"
            net = converter_net(self.registry, whose)
            whose = self.registry.version(whose).key
            remedy = "name two of one space in content_from and converter_from"
        if net.cepstra != cepstra and net.arguments["dims"] == dims:
            what = "that ends with cepstra" if cepstra else "without cepstra"
            raise TrainingError(
                f"{whose} was not made for content {what}; set converter.net.cepstra to "
                f"{str(cepstra).lower()}, or start from another."
            )
        if net.arguments["dims"] != dims:
            raise TrainingError(
                f"{whose} speaks from {net.arguments['dims']} features and the content encoder "
                f"gives {dims}; {remedy}."
            )
        return self._grown(net, whose)

    def _drawing(self) -> dict[str, float]:
        """How the converter that the training starts from draws its mels, see ``DRAWING``."""
        if self.recipe.converter is not None and self.recipe.converter_from is None:
            return {}
        params = self.registry.version(self.recipe.converter_from or "converter_compact").params
        return {key: params[key] for key in DRAWING if key in params}

    def _grown(self, net: ConverterNet, whose: str) -> ConverterNet:
        """``net`` as large as the recipe wants it.

        Raises:
            TrainingError: it is larger.
        """
        stage = self.recipe.converter
        wanted = stage.net if stage is not None else {}
        sizes = {}
        for name, what in GROWS.items():
            own = net.arguments[name]
            sizes[name] = wanted.get(name, own)
            if sizes[name] < own:
                raise TrainingError(
                    f"{whose} has {what.format(own)}, and nothing can be taken away; set "
                    f"converter.net.{name} to {own} or more."
                )
        if any(sizes[name] > net.arguments[name] for name in sizes):
            return grow_converter(net, **sizes)
        return net

    def _has_perceptual_losses(self) -> bool:
        stages = [stage for stage in (self.recipe.converter, self.recipe.tune) if stage is not None]
        return any(
            stage.task.get("content_loss") or stage.task.get("speaker_loss") for stage in stages
        )

    def _perceptual_losses(self, train: Corpus) -> losses.PerceptualLosses | None:
        """Recogniser and speaker encoder, where the recipe asks them."""
        if not self._has_perceptual_losses():
            return None
        maps = losses.stored_maps(
            self.folder / "perceptual_maps.safetensors", _some_recordings(train)
        )
        arrays = load_file(self.folder / "content_space.safetensors")
        teacher = whisper_net(
            self.registry.path(features.TEACHER, file="model.bin"), self._layers(), self.device,
        )  # fmt: skip
        net = speaker_net(self.registry).to(self.device)
        return losses.PerceptualLosses(teacher, ContentSpace(**arrays), net, maps)

    def _converter(self, train: Corpus, held: Corpus, start: ConverterNet) -> ConverterNet:
        model = start
        perceptual = self._perceptual_losses(train)
        discriminator: dict[str, Any] = {}
        task: ConverterTask | None = None
        for name, stage, content in (
            ("converter", self.recipe.converter, ("teacher",)),
            ("tune", self.recipe.tune, ("teacher", STUDENT)),
        ):
            if stage is None:
                continue
            task = ConverterTask(
                train, held, model.arguments, content=content, perceptual=perceptual, **stage.task
            )
            task.model.load_state_dict(model.state_dict())
            task.load_state_dict(discriminator)
            model = self._train(name, stage, task)
            discriminator = task.state_dict()
        if task is not None and self.recipe.kept_change < 1:
            _go_back(model, start, self.recipe.kept_change)
            self.figures |= {f"published.{k}": v for k, v in task.validate().items()}
        return model

    def _train(self, name: str, stage: StageRecipe, task: Task[NetT]) -> NetT:
        self.say(f"Training: {name}")
        folder = self.folder / name
        trainer = Trainer(task, stage.schedule, folder, self.device)
        figures = trainer.figures(trainer.run())
        self.figures |= {f"{name}.{key}": value for key, value in figures.items()}
        self.figures[f"{name}.minutes"] = round(trainer.seconds / 60, 1)
        plot_curves(folder)
        task.model.load_state_dict(trainer.weights())
        return task.model.eval()


def _known_spaces() -> Collection[str]:
    """Names of the content spaces that every registry serves."""
    return load_catalog([builtin_catalog()]).models["content_whisper"].versions


@torch.no_grad()
def _go_back(trained: ConverterNet, start: ConverterNet, share: float) -> None:
    """Leaves ``trained`` only ``share`` of what it differs by from ``start``."""
    before = start.state_dict()
    for name, value in trained.state_dict().items():
        value.copy_(torch.lerp(before[name].to(value.device), value, share))


def _check_device(device: str) -> None:
    """Tells before hours of features what would fail after them.

    Raises:
        TrainingError: there is no such device here.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(
            f"Training cannot use the device {device!r} on this machine; choose --device cpu, or "
            "install a build of torch for this GPU."
        ) from error


def _some_recordings(corpus: Corpus) -> Iterator[FloatArray]:
    """``MAP_RECORDINGS`` of them, spread over all."""
    count = min(MAP_RECORDINGS, len(corpus.items))
    chosen = np.linspace(0, len(corpus.items) - 1, count).round().astype(int)
    utterances = [corpus.items[index].utterance for index in chosen]
    return features.prepared(utterances, "maps of words and voice")


def _hours(corpus: Corpus) -> float:
    return sum(item.frames for item in corpus.items) * 256 / 22050 / 3600
