"""A recipe from recordings to a converter that speaks, on real speech and real teachers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.numpy import load_file

from auto_voice.errors import TrainingError
from auto_voice.inference.voice_conversion_pipeline import PipelineConfig, VoiceConversionPipeline
from auto_voice.models import ModelRegistry
from auto_voice.training.networks.generators import ConverterNet
from auto_voice.training.networks.loading import whisper_net
from auto_voice.training.recipes import load_recipe
from auto_voice.training.workflow import Workflow, _go_back

RECIPE = {
    "name": "tiny",
    "data": {"hold_out": 0.5},
    "content_space": {"dims": 16, "sample": 4, "layers": 3},
    "content": {
        "net": {"layers": 2, "hidden": 64},
        "task": {"batch": 2, "frames": 40},
        "schedule": {"steps": 3, "validate_every": 2},
    },
    "converter": {
        "net": {"dims": 16, "width": 16, "blocks": 1},
        "task": {"batch": 2, "frames": 40, "reference_frames": 80},
        "schedule": {"steps": 3, "validate_every": 2},
    },
    "tune": {
        "task": {
            "batch": 2, "frames": 40, "reference_frames": 80,
            "cross_speaker": 2, "content_loss": 0.3, "speaker_loss": 0.3,
        },
        "schedule": {"steps": 2, "validate_every": 2},
    },
}  # fmt: skip


def _recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def test_one_speaker_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "speech" / "anna").mkdir(parents=True)
    (tmp_path / "speech" / "anna" / "1.wav").write_bytes(b"")
    recipe = load_recipe(_recipe(tmp_path))
    workflow = Workflow(
        recipe, [tmp_path / "speech"], tmp_path / "out", ModelRegistry(tmp_path), say=lambda _: None
    )
    with pytest.raises(TrainingError, match="too few to hold one out"):
        workflow.run()
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_told_before_any_work(tmp_path: Path) -> None:
    recipe = load_recipe(_recipe(tmp_path))
    registry = ModelRegistry(tmp_path)
    for device in ("cuda:7", "toaster"):
        workflow = Workflow(recipe, [tmp_path], tmp_path / "out", registry, device=device)
        with pytest.raises(TrainingError, match=f"'{device}' on this machine; choose --device cpu"):
            workflow.run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "says"),
    [({"speeches": 1}, r"name speeches, .*; there are speech\."), ({"speech": 0}, "leave nothing")],
)
def test_weights_are_of_speech_that_is_there(
    tmp_path: Path, weights: dict[str, float], says: str
) -> None:
    for speaker in range(4):
        (tmp_path / "speech" / str(speaker)).mkdir(parents=True)
        (tmp_path / "speech" / str(speaker) / "1.wav").write_bytes(b"")
    recipe = load_recipe(_recipe(tmp_path, data={"hold_out": 0.5, "weights": weights}))
    workflow = Workflow(recipe, [tmp_path / "speech"], tmp_path / "out", ModelRegistry(tmp_path))
    with pytest.raises(TrainingError, match=says):
        workflow.run()
    assert not (tmp_path / "out").exists()


def test_a_converter_that_cannot_hear_the_content_is_refused_before_the_work(
    tmp_path: Path,
) -> None:
    for speaker in range(6):
        (tmp_path / "speech" / str(speaker)).mkdir(parents=True)
        (tmp_path / "speech" / str(speaker) / "1.wav").write_bytes(b"")
    wrong = {**RECIPE["converter"], "net": {"dims": 24}}  # type: ignore[dict-item]
    workflow = Workflow(
        load_recipe(_recipe(tmp_path, converter=wrong)), [tmp_path / "speech"], tmp_path / "out",
        ModelRegistry(tmp_path), say=lambda _: None,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"24 features .* gives 16; set converter\.net\.dims"):
        workflow.run()
    assert not (tmp_path / "out").exists()


def test_a_folder_belongs_to_one_training(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()

    def claim(**changes: object) -> None:
        recipe = load_recipe(_recipe(tmp_path, **changes))
        registry = ModelRegistry(tmp_path)
        Workflow(recipe, [tmp_path / "speech"], tmp_path / "out", registry)._claim()

    claim()
    longer = {**RECIPE["tune"], "schedule": {"steps": 99}}  # type: ignore[dict-item]
    claim(tune=longer, description="the same, for longer")
    with pytest.raises(TrainingError, match=r"another training \(its name differs\)"):
        claim(name="other")
    with pytest.raises(TrainingError, match="its content_space differs"):
        claim(content_space={**RECIPE["content_space"], "envelope": True})  # type: ignore[dict-item]


def test_a_share_of_the_change_is_kept() -> None:
    start, trained = (ConverterNet(dims=8, width=8, blocks=1) for _ in range(2))
    before = {name: value.clone() for name, value in start.state_dict().items()}
    after = {name: value.clone() for name, value in trained.state_dict().items()}
    _go_back(trained, start, 0.25)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
        assert torch.equal(start.state_dict()[name], before[name])
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.weights
@pytest.mark.slow
def test_recordings_become_a_model_that_converts(
    tmp_path: Path, weights_registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges: list[int] = []

    def judge(path: Path, layers: int, device: str) -> object:
        judges.append(layers)
        return whisper_net(path, layers, device)

    monkeypatch.setattr("auto_voice.training.workflow.whisper_net", judge)
    speech = tmp_path / "speech"
    source = weights_registry.load("sample_two_cities")
    rate = source.sample_rate
    for index in range(8):
        folder = speech / f"speaker{index // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        piece = source.samples[(4 * index + 1) * rate : (4 * index + 4) * rate]
        soundfile.write(folder / f"{index}.wav", piece, rate)
    (speech / "speaker0" / "broken.wav").write_bytes(b"RIFF and nothing more")
    soundfile.write(speech / "speaker1" / "silent.wav", np.zeros(rate * 2), rate)
    told: list[str] = []

    def run() -> Path:
        recipe = load_recipe(_recipe(tmp_path))
        out = tmp_path / "out"
        workflow = Workflow(recipe, [speech], out, weights_registry, workers=1, say=told.append)
        outcome = workflow.run()
        assert {path.name for path in outcome.failures} == {"broken.wav", "silent.wav"}
        assert outcome.figures["tune.l1_student"] > 0
        assert 0 < outcome.figures["tune.content"] < 2
        assert 0 < outcome.figures["tune.speaker"] < 1
        return outcome.catalog

    catalog = run()
    assert "broken.wav" in (tmp_path / "out" / "failures.csv").read_text()
    assert (tmp_path / "out" / "tune" / "curves.png").stat().st_size > 1000
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "features").iterdir()}
    assert len(stamps) == 8
    weights = (catalog.parent / "converter_compact-tiny.safetensors").read_bytes()
    run()
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "features").iterdir()}
    assert (catalog.parent / "converter_compact-tiny.safetensors").read_bytes() == weights

    registry = ModelRegistry(weights_registry.model_dir, config=catalog, progress=False)
    config = PipelineConfig(
        content_encoder="content_compact@tiny", converter="converter_compact@tiny"
    )
    pipeline = VoiceConversionPipeline(config, model_registry=registry)
    sample = weights_registry.load("sample_clone_test")
    result = pipeline.convert(sample, source)
    assert result.models["converter"] == "converter_compact@tiny"
    assert len(result.audio.samples) == round(len(sample.samples) * 22050 / sample.sample_rate)
    assert np.isfinite(result.audio.samples).all()

    # The teacher serves the new space too, and the next training can start from both.
    further = {
        "name": "further", "data": RECIPE["data"], "tune": RECIPE["tune"],
        "converter": {**RECIPE["converter"], "net": {"blocks": 2, "expansion": 3}},
        "content": RECIPE["content"],
        "content_from": "content_compact@tiny", "converter_from": "converter_compact@tiny",
        "kept_change": 0.5,
    }  # fmt: skip
    path = tmp_path / "further.yaml"
    path.write_text(yaml.safe_dump(further))
    outcome = Workflow(
        load_recipe(path), [speech], tmp_path / "further", registry, workers=1, say=told.append
    ).run()
    assert outcome.figures["published.l1_teacher"] > 0
    spaces = [
        load_file(folder / "content_space.safetensors")["projection"]
        for folder in (tmp_path / "out", tmp_path / "further")
    ]
    assert np.array_equal(*spaces)
    again = ModelRegistry(weights_registry.model_dir, config=outcome.catalog, progress=False)
    config = PipelineConfig(
        content_encoder="content_compact@further", converter="converter_compact@further"
    )
    pipeline = VoiceConversionPipeline(config, model_registry=again)
    made = pipeline.convert(sample, source)
    assert made.models["content"] == "content_compact@further"
    assert again.load("content_compact@further").space == "content_space@tiny"
    # Further trainings need nothing but what was published, and hear the teacher as it was heard.
    params = again.version("content_whisper", "tiny").params
    assert (params["space"], params["layers"]) == ("content_space@tiny", 3)
    assert set(judges) == {3}
    both = VoiceConversionPipeline(
        PipelineConfig(content_encoder="content_whisper@tiny", converter="converter_compact@tiny"),
        model_registry=registry,
    )
    assert both.convert(sample, source).models["content"] == "content_whisper@tiny"
    grown = again.load("converter_compact@further").shape
    assert (grown.blocks, grown.expansion) == (2, 3)
    for name, has in (("blocks", "2 blocks"), ("expansion", "an expansion of 3")):
        fewer = {**further, "converter_from": "converter_compact@further"}
        fewer |= {
            "content_from": "content_compact@further",
            "name": "fewer",
            "converter": {**RECIPE["converter"], "net": {name: 1}},
        }
        path.write_text(yaml.safe_dump(fewer))
        with pytest.raises(TrainingError, match=f"has {has}, and nothing can be taken away"):
            Workflow(
                load_recipe(path), [speech], tmp_path / "no", again, workers=1, say=told.append
            ).run()
    for changes, says in (
        ({"task": {"batch": 2, "frames": 1501}}, "hears 1500 frames at once"),
        ({"task": {"batch": 0, "frames": 40}}, "batch must be 1 or more"),
        ({"net": {"layers": 7}}, "asks for 7 layers"),
    ):
        wrong = {**further, "content": {**RECIPE["content"], **changes}}
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(TrainingError, match=says):
            Workflow(
                load_recipe(path), [speech], tmp_path / "no", registry, workers=1, say=told.append
            ).run()
    assert not (tmp_path / "no").exists()
    path.write_text(yaml.safe_dump({**further, "content_from": "hubert_base"}))
    with pytest.raises(TrainingError, match="in whose space nothing can be trained"):
        Workflow(load_recipe(path), [speech], tmp_path / "no", registry, say=told.append).run()
    narrow = {**further, "converter_from": "converter_compact@2.0"}
    path.write_text(yaml.safe_dump(narrow))
    with pytest.raises(TrainingError, match="name two of one space"):
        Workflow(
            load_recipe(path), [speech], tmp_path / "no", registry, workers=1, say=told.append
        ).run()
