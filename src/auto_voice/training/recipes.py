"""Recipes: YAML files that say what a training does, so that it can be done again."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from auto_voice.errors import TrainingError
from auto_voice.models.registry.catalog_schema import version_problem
from auto_voice.training.networks.generators import ConverterNet, HiFiGANNet
from auto_voice.training.networks.loading import GROWS, content_net
from auto_voice.training.tasks import ContentTask, ConverterTask
from auto_voice.training.trainer import Schedule
from auto_voice.training.vocoder import VocoderTask

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataRecipe:
    """Which speech counts how much.

    Attributes:
        hold_out: share that is validated on and never trained on.
        hold_out_by: ``speaker``, or ``recording`` where one speaker is learnt.
        weights: how often a corpus is drawn, relative to its size; missing: 1.
        pauses: share of recordings that get silence around them and a noise floor under them.
        perturbed: copies with other formants whose content is computed, too; see
            ``ConverterTask``.
    """

    hold_out: float = 0.04
    hold_out_by: str = "speaker"
    weights: Mapping[str, float] = field(default_factory=dict)
    pauses: float = 0.0
    perturbed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.pauses <= 1:
            raise TrainingError(f"data.pauses is a share from 0 to 1, not {self.pauses!r}.")
        if isinstance(self.perturbed, bool) or not isinstance(self.perturbed, int):
            raise TrainingError(f"data.perturbed is a whole number, not {self.perturbed!r}.")
        if self.hold_out_by not in ("speaker", "recording"):
            raise TrainingError(
                f"data.hold_out_by is speaker or recording, not {self.hold_out_by!r}."
            )
        if not 0 <= self.hold_out < 1:
            raise TrainingError(
                f"data.hold_out is a share from 0 to below 1, not {self.hold_out!r}."
            )
        for corpus, weight in self.weights.items():
            if not isinstance(corpus, str):
                raise TrainingError(f"data.weights: put the name {corpus} in quotes.")
            if not _is_number(weight) or weight < 0:
                raise TrainingError(
                    f"data.weights: {corpus} must be a number, 0 or more, not {weight!r}."
                )


@dataclass(frozen=True)
class ContentSpaceRecipe:
    """The space that content lies in.

    With ``content_from`` it is that of an existing content encoder.

    Attributes:
        dims: principal components of the teacher.
        sample: utterances that they are fitted on.
        layers: of the teacher.
        envelope: whether ``band_envelope`` follows them.
        cepstra: whether, with the envelope, ``cepstra`` follow, too.
    """

    dims: int = 64
    sample: int = 240
    layers: int = 4
    envelope: bool = False
    cepstra: bool = False

    def __post_init__(self) -> None:
        if self.cepstra and not self.envelope:
            raise TrainingError(
                "content_space.cepstra follow the envelope; set envelope: true, too."
            )


@dataclass(frozen=True)
class StageRecipe:
    """One network's training.

    Attributes:
        schedule: how long and how fast.
        net: arguments of the network; see ``content_net`` and ``ConverterNet``.
        task: arguments of the task; see ``ContentTask``, ``ConverterTask`` and ``VocoderTask``.
    """

    schedule: Schedule
    net: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole training.

    Attributes:
        name: version that the result is published as.
        description: one line, for the card.
        data, content_space: see there.
        content: the content encoder, in a new space or in that of ``content_from``; None keeps
            that one as it is.
        converter: on the teacher's features, from scratch or from ``converter_from``; None leaves
            this step out.
        tune: the converter on the teacher's features and on the content encoder's own output, so
            that it understands both.
        vocoder: a vocoder of fewer operations, made of ``vocoder_from``; a recipe that has it
            trains nothing else.
        vocoder_from: ``name@version`` of the HiFi-GAN that the vocoder is made of; by default that
            of the catalog.
        content_from, converter_from: ``name@version`` to start from; ``converter.net`` can then
            only give it more of ``GROWS``.
        kept_change: share of the change from ``converter_from`` that is published. A converter
            between the two often keeps more of what the first could and little less of what the
            second learnt (Wortsman et al. 2022).
    """

    name: str
    description: str = ""
    data: DataRecipe = field(default_factory=DataRecipe)
    content_space: ContentSpaceRecipe = field(default_factory=ContentSpaceRecipe)
    content: StageRecipe | None = None
    converter: StageRecipe | None = None
    tune: StageRecipe | None = None
    content_from: str | None = None
    converter_from: str | None = None
    vocoder: StageRecipe | None = None
    vocoder_from: str | None = None
    kept_change: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.kept_change <= 1:
            raise TrainingError(
                f"kept_change is a share above 0 and up to 1, not {self.kept_change!r}."
            )
        if self.kept_change < 1 and self.converter_from is None:
            raise TrainingError(
                "kept_change says how far to go from converter_from, which is missing; name it, or "
                "leave kept_change out."
            )
        if not isinstance(self.name, str):
            raise TrainingError(f"The recipe's name must be a text: put {self.name} in quotes.")
        if wrong := version_problem(self.name):
            raise TrainingError(f"The name {self.name!r} {wrong}.")
        if self.converter is not None and self.converter_from is not None:
            given = sorted(set(self.converter.net) - set(GROWS))
            if given:
                raise TrainingError(
                    f"converter.net.{given[0]} is that of {self.converter_from}, and only "
                    f"{' and '.join(GROWS)} can grow; leave it out, or leave out converter_from."
                )
        self._check_vocoder()
        if self.tune is not None and self.tune.net:
            raise TrainingError("tune goes on with the converter as it is; leave tune.net out.")
        if self.keeps_space and self.content_space != ContentSpaceRecipe():
            raise TrainingError(
                "the content lies in the space of content_from; leave content_space out, or leave "
                "out content_from and train a content encoder."
            )

    def _check_vocoder(self) -> None:
        if self.vocoder is None:
            if self.vocoder_from is not None:
                raise TrainingError(
                    "vocoder_from is what a vocoder is made of, and the recipe trains none; leave "
                    "it out."
                )
            return
        if self.vocoder.net:
            raise TrainingError(
                "the vocoder has the sizes of vocoder_from, with vocoder.task.hidden_share of its "
                "channels; leave vocoder.net out."
            )
        known = {"name", "description", "data", "vocoder", "vocoder_from"}
        plain = vars(Recipe(self.name))
        data = vars(plain["data"])
        given = [n for n, value in vars(self).items() if n not in known and value != plain[n]]
        given += [
            f"data.{n}"
            for n, value in vars(self.data).items()
            if not n.startswith("hold_out") and value != data[n]
        ]
        if given:
            raise TrainingError(
                f"a recipe with a vocoder trains nothing else, from all of the speech alike; leave "
                f"{given[0]} out."
            )

    @property
    def keeps_space(self) -> bool:
        """Whether content lies in the space of an existing encoder."""
        return self.content is None or self.content_from is not None


def load_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe.

    Raises:
        TrainingError: missing file, wrong YAML, unknown or missing key; the message names it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The recipe {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"The recipe {path} is not valid YAML: {error}.") from error
    recipe = _build(Recipe, _with_new_keys(data, path), str(path))
    for name, stage, net, task in (
        ("content", recipe.content, content_net, ContentTask),
        ("converter", recipe.converter, ConverterNet, ConverterTask),
        ("tune", recipe.tune, ConverterNet, ConverterTask),
        ("vocoder", recipe.vocoder, HiFiGANNet, VocoderTask),
    ):
        if stage is not None:
            _check_arguments(net, stage.net, f"{path}: {name}.net")
            _check_arguments(task, stage.task, f"{path}: {name}.task")
    return recipe


_NESTED: Mapping[str, type] = {
    "data": DataRecipe, "content_space": ContentSpaceRecipe, "schedule": Schedule,
    "content": StageRecipe, "converter": StageRecipe, "tune": StageRecipe, "vocoder": StageRecipe,
}  # fmt: skip


def _with_new_keys(data: object, path: Path) -> object:
    """``data`` with today's names of the task's keys in place of older ones.

    Raises:
        TrainingError: a task gives a key under both names.
    """
    if not isinstance(data, Mapping):
        return data
    renamed = dict(data)
    for stage in ("content", "converter", "tune"):
        task = data[stage].get("task") if isinstance(data.get(stage), Mapping) else None
        if not isinstance(task, Mapping):
            continue
        for old in _OLD_KEYS.keys() & task.keys():
            if _OLD_KEYS[old] in task:
                raise TrainingError(
                    f"{path}: {stage}.task gives both {old} and {_OLD_KEYS[old]}, which is the "
                    f"same; leave {old} out."
                )
            log.warning("%s: %s.task.%s is now called %s", path, stage, old, _OLD_KEYS[old])
        renamed[stage] = {
            **data[stage],
            "task": {_OLD_KEYS.get(key, key): value for key, value in task.items()},
        }
    return renamed


def _build(kind: type[T], data: object, where: str) -> T:
    if not isinstance(data, Mapping):
        raise TrainingError(f"{where}: expected keys and values, found {type(data).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := [str(key) for key in data if key not in fields]:
        raise TrainingError(
            f"{where}: unknown key {unknown[0]}; known are {', '.join(sorted(fields))}."
        )
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in data]:
        raise TrainingError(f"{where}: the key {missing[0]} is missing.")
    values = {}
    for key, value in data.items():
        nested = _NESTED.get(key)
        place = f"{where}: {key}"
        if nested is not None and (value is not None or fields[key].default is not None):
            value = _build(nested, value, place)
        elif fields[key].default_factory is not dataclasses.MISSING:
            if not isinstance(value, Mapping):
                raise TrainingError(f"{place} must hold keys and values, not {value!r}.")
        elif isinstance(fields[key].default, bool):
            if not isinstance(value, bool):
                raise TrainingError(f"{place} must be true or false, not {value!r}.")
        elif isinstance(fields[key].default, int | float) and not _is_number(value):
            raise TrainingError(f"{place} must be a number, not {value!r}.")
        values[key] = value
    return kind(**values)


# Keys of a task as recipes up to 0.1 name them. They are read for one more release.
_OLD_KEYS = {
    "said": "content_loss", "alike": "speaker_loss", "real": "adversarial_loss",
    "texture": "feature_matching_loss", "bare": "embedding_only", "invented": "vtlp",
    "swapped": "cross_speaker", "warp": "cepstral_vtlp",
}  # fmt: skip
# Arguments of tasks that the workflow gives.
_GIVEN = {
    "corpus", "train", "held_out", "net", "content", "perceptual", "model", "path", "components",
    "teacher", "shape",
}  # fmt: skip
# Arguments of tasks of which there must be some.
_COUNTS = {"batch", "frames", "reference_frames", "references"}
# Arguments of tasks that are no larger than 1.
_SHARES = {"embedding_only", "vtlp", "dropout", "perturbed", "streamed", "hidden_share", "live"}


def _check_arguments(kind: Callable[..., Any], values: Mapping[str, Any], where: str) -> None:
    """What a network or task takes, told before hours of work.

    Raises:
        TrainingError: an unknown or missing key, or no number; the message names it.
    """
    taken = {k: p for k, p in inspect.signature(kind).parameters.items() if k not in _GIVEN}
    for key, value in values.items():
        if key not in taken:
            known = ", ".join(sorted(taken))
            raise TrainingError(f"{where}: unknown key {key}; known are {known}.")
        if key in _SHARES and (not _is_number(value) or not 0 <= value <= 1):
            raise TrainingError(f"{where}: {key} is a share, from 0 to 1, not {value!r}.")
        if value is not None and (not isinstance(value, int | float) or not value >= 0):
            raise TrainingError(f"{where}: {key} must be a number, 0 or more, not {value!r}.")
        wanted = taken[key].annotation
        if wanted == "int" and (isinstance(value, bool) or not isinstance(value, int)):
            raise TrainingError(f"{where}: {key} must be a whole number, not {value!r}.")
        if wanted == "float" and not _is_number(value):
            raise TrainingError(f"{where}: {key} must be a finite number, not {value!r}.")
        if key in _COUNTS and value is not None and value < 1:
            raise TrainingError(f"{where}: {key} must be 1 or more, not {value!r}.")
        if key == "dropout" and value == 1:
            raise TrainingError(f"{where}: a dropout of 1 leaves nothing to learn from.")
    if values.get("cross_speaker") == 0 and (
        values.get("content_loss") or values.get("speaker_loss")
    ):
        raise TrainingError(
            f"{where}: content_loss and speaker_loss are computed on cross_speaker crops, and "
            "cross_speaker is 0; leave it out."
        )
    if values.get("response_db") and not values.get("vtlp"):
        raise TrainingError(
            f"{where}: voices of another vocal tract length get response_db, and there is no "
            "vtlp; give a share, such as vtlp: 0.3, or leave response_db out."
        )
    for key, parameter in taken.items():
        if parameter.default is inspect.Parameter.empty and key not in values:
            raise TrainingError(f"{where}: the key {key} is missing.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
