"""A vocoder of fewer operations comes near to the whole one, and is published as it was judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from auto_voice.audio.mel import HIFIGAN_MEL, log_mel  # noqa: E402
from auto_voice.audio.resample import resample  # noqa: E402
from auto_voice.errors import ModelLoadError, TrainingError  # noqa: E402
from auto_voice.models import ModelRegistry  # noqa: E402
from auto_voice.models.hifigan_model import HiFiGANShape  # noqa: E402
from auto_voice.models.mock_models import mock_sample  # noqa: E402
from auto_voice.models.runtime.weights import STEP, read_weights  # noqa: E402
from auto_voice.training.data import Utterance, hold_out, scan  # noqa: E402
from auto_voice.training.export_graphs import export, weights_of  # noqa: E402
from auto_voice.training.networks.generators import HiFiGANNet  # noqa: E402
from auto_voice.training.publish import _record, _write  # noqa: E402
from auto_voice.training.recipes import load_recipe  # noqa: E402
from auto_voice.training.trainer import Schedule, Trainer  # noqa: E402
from auto_voice.training.vocoder import VocoderTask, mels, pruned  # noqa: E402
from auto_voice.training.workflow import Workflow  # noqa: E402

WHOLE = HiFiGANShape(channels=32)
HALF = replace(WHOLE, hidden_share=0.5)


def teacher(seed: int = 0) -> HiFiGANNet:
    """A small vocoder that gives something for any mel."""
    torch.manual_seed(seed)
    net = HiFiGANNet(WHOLE).eval().requires_grad_(False)
    for name, values in net.named_parameters():
        if name.startswith("ups"):
            values.mul_(3)
    net.conv_post.weight.mul_(0.3)
    return net


def speech(seconds: float = 1.5, f0_hz: float = 120.0) -> Any:
    return log_mel(mock_sample(seconds, 22050, f0_hz=f0_hz).samples, HIFIGAN_MEL).astype(np.float16)


def crops(count: int = 6) -> torch.Tensor:
    found = [speech(1.0, 90.0 + 30 * n)[:, :40] for n in range(count)]
    return torch.from_numpy(np.stack(found).astype(np.float32))


def error(net: HiFiGANNet, whole: HiFiGANNet, mel: torch.Tensor) -> float:
    with torch.no_grad():
        true = whole(mel)
        return float((net(mel) - true).square().mean() / true.var())


def test_channels_that_did_nothing_are_not_missed() -> None:
    whole = teacher()
    for block in whole.resblocks:
        for number, conv in enumerate(block.convs2):
            # Other ones in each step: which they are is found out.
            conv.weight[:, number % 2 :: 2] = 0
    small = pruned(whole, HALF, crops())
    assert error(small, whole, crops()) < 1e-3
    assert sum(v.numel() for v in small.parameters()) < sum(v.numel() for v in whole.parameters())


def test_least_squares_make_up_for_most_of_what_is_left_out() -> None:
    whole, mel = teacher(), crops()
    small = pruned(whole, HALF, mel)
    bare = HiFiGANNet(HALF).eval()
    bare.load_state_dict(small.state_dict())
    for ours, theirs in zip(bare.resblocks, whole.resblocks, strict=True):
        for first, second, known, full in zip(
            ours.convs1, ours.convs2, theirs.convs1, theirs.convs2, strict=True
        ):
            # The same channels with the weights that they had.
            kept = [
                int((known.weight - row).abs().sum((1, 2)).argmin()) for row in first.weight.data
            ]
            second.load_state_dict({"weight": full.weight[:, kept], "bias": full.bias})
    other = crops(9)[6:]  # Voices that nothing was fitted on.
    assert error(small, whole, other) < 0.5 * error(bare, whole, other)


def task(**changes: Any) -> VocoderTask:
    known = [speech(1.5, f0) for f0 in (100, 130, 160, 190)]
    options = {"batch": 2, "frames": 24, **changes}
    return VocoderTask(known[:3], known[3:], teacher(), WHOLE, **options)


def test_training_brings_it_nearer_and_leaves_the_first_stage(tmp_path: Path) -> None:
    taught = task()
    fixed = {
        name: values.clone()
        for name, values in taught.model.state_dict().items()
        if name.startswith(("conv_pre", "ups.0", "resblocks.0.", "resblocks.1.", "resblocks.2."))
    }
    before = taught.validate()
    schedule = Schedule(steps=60, learning_rate=1e-3, warmup=5, weight_decay=0.0, validate_every=60)
    after = Trainer(taught, schedule, tmp_path).run()
    assert taught.score(after) < 0.95 * taught.score(before)
    assert after["wave"] < before["wave"]
    for name, values in fixed.items():
        assert torch.equal(taught.model.state_dict()[name], values)
    free = [p.requires_grad for p in task(fixed_stages=0).model.parameters()]
    assert all(free)


def test_a_live_crop_shows_its_last_frame_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    taught, seen = task(live=1.0), {}
    for name, net in (("student", taught.model), ("teacher", taught.teacher)):
        states = net.states

        def listen(mel: torch.Tensor, name: str = name, states: Any = states) -> Any:
            seen[name] = mel.clone()
            return states(mel)

        monkeypatch.setattr(net, "states", listen)
    terms = taught.loss(np.random.default_rng(0))
    assert float(terms["loss"].detach()) > 0
    changed = (seen["student"] != seen["teacher"]).any(1)
    for given, whole, row in zip(seen["student"], seen["teacher"], changed, strict=True):
        first = int(row.nonzero()[0])  # Of those that are hidden.
        assert 24 + 3 <= first < 24 + WHOLE.context_frames
        assert torch.equal(given[:, :first], whole[:, :first])
        assert torch.equal(
            given[:, first:], given[:, first - 1 : first].expand_as(given[:, first:])
        )


def test_recordings_that_are_too_short_are_told() -> None:
    with pytest.raises(TrainingError, match=r"recordings of 0\.4 s and more"):
        VocoderTask([speech(0.2)], [speech()], teacher(), WHOLE, batch=2, frames=24)


@pytest.fixture
def own_vocoder(tmp_path: Path) -> Path:
    """A catalog that offers the small teacher."""
    _write(weights_of(teacher()), tmp_path / "small.safetensors", "1")
    (tmp_path / "small.onnx").write_bytes(export("hifigan", WHOLE))
    files = [_record(tmp_path / name) for name in ("small.safetensors", "small.onnx")]
    version = {
        "architecture": "hifigan", "licence": "MIT", "files": files,
        "params": {"sample_rate": 22050, "hop_samples": 256, "bands": 80, "channels": 32},
    }  # fmt: skip
    models = {"small": {"kind": "vocoder", "versions": {"1.0": version}}}
    catalog = tmp_path / "models.yaml"
    catalog.write_text(yaml.safe_dump({"schema": 1, "models": models}))
    return catalog


def test_a_recipe_becomes_a_vocoder_of_a_catalog(tmp_path: Path, own_vocoder: Path) -> None:
    for speaker in range(3):
        folder = tmp_path / "speech" / f"speaker{speaker}"
        folder.mkdir(parents=True)
        sample = mock_sample(2.0, 16000, f0_hz=100.0 + 40 * speaker)
        soundfile.write(folder / "1.wav", sample.samples, 16000)
    (tmp_path / "speech" / "speaker0" / "broken.wav").write_bytes(b"RIFF and nothing more")
    recipe = tmp_path / "recipe.yaml"
    stage = {
        "task": {"batch": 1, "frames": 16, "hidden_share": 0.25},
        "schedule": {"steps": 2, "validate_every": 2},
    }
    plain = {"name": "tiny", "data": {"hold_out": 0.4}, "vocoder_from": "small@1.0"}
    recipe.write_text(yaml.safe_dump({**plain, "vocoder": stage}))
    registry = ModelRegistry(tmp_path / "store", config=own_vocoder, progress=False)
    out = tmp_path / "out"
    run = Workflow(
        load_recipe(recipe), [tmp_path / "speech"], out, registry, say=lambda _: None
    ).run()
    assert run.figures["vocoder.published_wave"] > 0
    published = ModelRegistry(tmp_path / "store", config=run.catalog, progress=False)
    vocoder = published.load("vocoder_compact@tiny")
    assert vocoder.shape == replace(WHOLE, hidden_share=0.25)
    path = published.path("vocoder_compact", "tiny")
    assert path.stat().st_size < 0.5 * sum(4 * v.size for v in read_weights(path).values())
    # What is published is what the figures are of, and what the graph computes, in parts as well.
    net = HiFiGANNet(vocoder.shape).eval()
    known = {name: np.array(values, np.float32) for name, values in read_weights(path).items()}
    net.load_state_dict({name: torch.from_numpy(values) for name, values in known.items()})
    utterances = scan([tmp_path / "speech"])
    parts = [mels(part)[0] for part in hold_out(utterances, 0.4)]
    judged = VocoderTask(*parts, teacher(), WHOLE, **stage["task"])
    judged.model.load_state_dict(net.state_dict())
    for name, value in judged.validate().items():
        assert run.figures[f"vocoder.published_{name}"] == pytest.approx(value, rel=1e-5)
    mel = speech()[:, :50].astype(np.float32)
    with torch.no_grad():
        wanted = net(torch.from_numpy(mel)[None])[0].numpy()
    np.testing.assert_allclose(vocoder.synthesize(mel), wanted, atol=1e-5)
    part = vocoder.synthesize_part(mel, 20, 30)
    np.testing.assert_allclose(part, wanted[:, 20 * 256 : 30 * 256], atol=1e-5)
    assert [failed.name for failed in run.failures] == ["broken.wav"]
    assert "broken.wav" in (out / "failures.csv").read_text()
    recipe.write_text(yaml.safe_dump({**plain, "vocoder_from": "griffin_lim", "vocoder": stage}))
    with pytest.raises(TrainingError, match="no HiFi-GAN of whole precision"):
        Workflow(load_recipe(recipe), [tmp_path / "speech"], out, registry).run()


@pytest.mark.parametrize(
    "steps",
    [None, np.ones(3), np.array([1.0, 0.0]), np.array([np.nan, 1.0]), np.array([1e300, 1.0])],
)
def test_whole_numbers_without_fitting_steps_are_refused(tmp_path: Path, steps: Any) -> None:
    arrays = {"a.weight": np.ones((2, 2), np.int8)}
    save_file(arrays | ({} if steps is None else {f"a.weight{STEP}": steps}), tmp_path / "x")
    with pytest.raises(ModelLoadError, match="steps that do not fit"):
        read_weights(tmp_path / "x")
    assert read_weights(tmp_path / "x", select=lambda name: None) == {}


def test_whole_numbers_are_times_the_steps_of_their_rows(tmp_path: Path) -> None:
    arrays = {
        "a.weight": np.full((2, 2), 3, np.int8), f"a.weight{STEP}": np.float32([1, 2]),
        f"b{STEP}": np.float32([1]),
    }  # fmt: skip
    save_file(arrays, tmp_path / "x")
    found = read_weights(tmp_path / "x")
    np.testing.assert_array_equal(found["a.weight"], [[3, 3], [6, 6]])
    # What belongs to nothing stays, for the network to refuse.
    assert sorted(found) == ["a.weight", f"b{STEP}"]


def test_mels_are_those_that_the_converter_gives_its_vocoder(tmp_path: Path) -> None:
    sample = mock_sample(1.5, 22050, f0_hz=120.0)
    soundfile.write(tmp_path / "a.wav", sample.samples, 22050)
    listed = [Utterance(tmp_path / name, "a", "b") for name in ("a.wav", "none.wav")]
    (found,), failures = mels(listed)
    assert [path.name for path in failures] == ["none.wav"]
    assert found.shape[0] == HIFIGAN_MEL.bands
    true = log_mel(sample.samples, HIFIGAN_MEL)
    frames = min(found.shape[1], true.shape[1])
    # The level is that of speech, and 16 kHz cut off what lies above 8 kHz.
    apart = found[5:70, 5 : frames - 5].astype(np.float32) - true[5:70, 5 : frames - 5]
    assert apart.std() < 0.3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"frames": 7}, "frames is 7; make it 8 or more"),
        ({"hidden_share": 0.0}, "choose a share above 0 and up to 1.0"),
        ({"hidden_share": 1.5}, "choose a share above 0"),
    ],
)
def test_numbers_that_cannot_be_are_told(changes: dict[str, float], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        task(**changes)


@pytest.mark.weights
def test_the_bundled_vocoder_sounds_like_the_whole_one(weights_registry: ModelRegistry) -> None:
    recording = weights_registry.load("sample_clone_test")
    samples = resample(recording.samples, recording.sample_rate, HIFIGAN_MEL.sample_rate)
    mel = log_mel(samples, HIFIGAN_MEL)
    whole, small = (
        weights_registry.load(name).synthesize(mel)[0]
        for name in ("hifigan_universal", "vocoder_compact")
    )
    # The waves are nearly the same, which no other vocoder's are, and the mels are.
    assert np.square(whole - small).mean() < 0.5 * np.square(whole).mean()
    again = [log_mel(sound, HIFIGAN_MEL)[:, 5:-5] for sound in (whole, small)]
    assert np.abs(again[0] - again[1]).mean() < 0.35
