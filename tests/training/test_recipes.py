"""Recipes say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_voice.errors import TrainingError
from auto_voice.models.registry.catalog_schema import builtin_catalog, load_catalog
from auto_voice.training.recipes import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_committed_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name
    assert recipe.content or recipe.converter or recipe.tune or recipe.vocoder
    catalog = load_catalog([builtin_catalog()])
    for name in (recipe.content_from, recipe.converter_from, recipe.vocoder_from):
        assert name is None or catalog.version(*name.split("@")).key == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "expected keys and values"),
        ("description: x\n", "name is missing"),
        ("name: x\nspeed: 1\n", "unknown key speed; known are"),
        ("name: x\ncontent: {net: {}}\n", "content: the key schedule is missing"),
        ("name: x\ncontent: {schedule: {steps: 5, learning_rate: fast}}\n", "must be a number"),
        ("name: [\n", "not valid YAML"),
        (
            "name: x\ncontent: {net: {width: 32}, schedule: {steps: 5}}\n",
            "content.net: unknown key width; known are hidden, layers",
        ),
        (
            "name: x\ncontent_from: a@1\ncontent_space: {dims: 16}\n"
            "content: {task: {batch: 2, frames: 9}, schedule: {steps: 5}}\n",
            "leave content_space out",
        ),
        ("name: x\ncontent: {net: , schedule: {steps: 5}}\n", "net must hold keys and values"),
        (
            "name: x\nconverter_from: a@1\nconverter: {net: {blocks: 9, width: 8}, "
            "task: {batch: 2, frames: 9, reference_frames: 9}, schedule: {steps: 5}}\n",
            "converter.net.width is that of a@1",
        ),
        ("name: x\ntune: {net: {blocks: 9}, schedule: {steps: 5}}\n", "leave tune.net out"),
        (
            "name: x\ntune: {task: {frame: 4}, schedule: {steps: 5}}\n",
            "tune.task: unknown key frame",
        ),
        (
            "name: x\ntune: {task: {batch: 4}, schedule: {steps: 5}}\n",
            "tune.task: the key .* missing",
        ),
        (
            "name: x\nconverter: {net: {width: wide}, schedule: {steps: 5}}\n",
            "converter.net: width must be a number, 0 or more, not 'wide'",
        ),
        (
            "name: x\nconverter: {net: {width: -1}, schedule: {steps: 5}}\n",
            "width must be a number",
        ),
        ("name: x\ndata: {weights: {a: much}}\n", "weights: a must be a number"),
        ("name: x\ndata: {weights: {a: .nan}}\n", "weights: a must be a number"),
        ("name: x\ndata: {weights: {2024: 1}}\n", "put the name 2024 in quotes"),
        ("name: x\ndata: {hold_out: 4}\n", "hold_out is a share"),
        ("name: x\ntune: {task: {dropout: }, schedule: {steps: 5}}\n", "dropout is a share"),
        ("name: x\ntune: {task: {dropout: true}, schedule: {steps: 5}}\n", "dropout is a share"),
        ("name: x\ntune: {task: {dropout: .nan}, schedule: {steps: 5}}\n", "dropout is a share"),
        ("name: x\ntune: {task: {dropout: 1}, schedule: {steps: 5}}\n", "nothing to learn from"),
        (
            "name: x\ntune: {task: {dropout: 50}, schedule: {steps: 5}}\n",
            "dropout is a share, from 0 to 1, not 50",
        ),
        (
            "name: x\ntune: {task: {content_loss: }, schedule: {steps: 5}}\n",
            "content_loss must be a finite number",
        ),
        ("name: x\ntune: {task: {said: .inf}, schedule: {steps: 5}}\n", "must be a finite number"),
        ("name: x\ntune: {task: {said: true}, schedule: {steps: 5}}\n", "must be a finite number"),
        (
            "name: x\ntune: {task: {swapped: 2.5}, schedule: {steps: 5}}\n",
            "a whole number, not 2.5",
        ),
        ("name: x\ntune: {task: {swapped: 0, said: 1}, schedule: {steps: 5}}\n", "leave it out"),
        ("name: 1.4\n", "put 1.4 in quotes"),
        ("name: ../x\n", "'../x' is no version; begin with a letter or digit"),
        ("name: latest\n", "is an alias"),
        ("name: con\n", "name of a device"),
        ("name: x\ncontent_space: {cepstra: true}\n", "set envelope: true"),
        ("name: x\ncontent_space:\n", "content_space: expected keys and values"),
        ("name: x\nconverter_from: a@1\nkept_change: 0\n", "kept_change is a share above 0"),
        ("name: x\nconverter_from: a@1\nkept_change: much\n", "must be a number"),
        ("name: x\nkept_change: 0.5\n", "from converter_from, which is missing"),
        ("name: x\nvocoder_from: a@1\n", "the recipe trains none; leave it out"),
        ("name: x\nvocoder: {net: {a: 1}, schedule: {steps: 5}}\n", "leave vocoder.net out"),
        (
            "name: x\nvocoder: {task: {batch: 1, frames: 9}, schedule: {steps: 5}}\n"
            "tune: {schedule: {steps: 5}}\n",
            "trains nothing else, .* leave tune out",
        ),
        (
            "name: x\nvocoder: {schedule: {steps: 5}}\ndata: {weights: {a: 0}}\n",
            r"leave data\.weights out",
        ),
        (
            "name: x\nvocoder: {task: {batch: 1, frames: 9, live: 2}, schedule: {steps: 5}}\n",
            "live is a share",
        ),
        (
            "name: x\nconverter:\n  schedule: {steps: 5}\n"
            "  task: {batch: 1, frames: 9, reference_frames: 9, response_db: 4}\n",
            "get response_db, and there is no vtlp",
        ),
        (
            "name: x\nconverter:\n  schedule: {steps: 5}\n"
            "  task: {batch: 1, frames: 9, reference_frames: 9, references: 0}\n",
            "references must be 1 or more",
        ),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=says):
        load_recipe(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nowhere\.yaml cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")


OLD = """
name: x
tune:
  task: {batch: 2, frames: 9, reference_frames: 9, said: 0.5, alike: 0.4, real: 0.05, texture: 0.5,
         bare: 0.2, invented: 0.3, swapped: 4, warp: 0.1}
  schedule: {steps: 5}
"""


def test_keys_of_earlier_recipes_are_read_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(OLD)
    recipe = load_recipe(path)
    assert recipe.tune is not None
    assert recipe.tune.task == {
        "batch": 2, "frames": 9, "reference_frames": 9, "content_loss": 0.5, "speaker_loss": 0.4,
        "adversarial_loss": 0.05, "feature_matching_loss": 0.5, "embedding_only": 0.2,
        "vtlp": 0.3, "cross_speaker": 4, "cepstral_vtlp": 0.1,
    }  # fmt: skip
    assert "tune.task.swapped is now called cross_speaker" in caplog.text


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(OLD.replace("warp: 0.1", "warp: 0.1, cepstral_vtlp: 0.2"))
    with pytest.raises(TrainingError, match="gives both warp and cepstral_vtlp"):
        load_recipe(path)
