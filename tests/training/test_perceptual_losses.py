"""What a recogniser and a speaker encoder hear in a mel, and that a converter learns from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from auto_voice.audio.mel import GE2E_MEL, HIFIGAN_MEL, log_mel
from auto_voice.audio.resample import resample
from auto_voice.errors import TrainingError
from auto_voice.models.mock_models import mock_sample
from auto_voice.models.whisper_encoder import (
    OUTLIER,
    ContentSpace,
    WhisperEncoder,
    WhisperShape,
    log_energies,
    scaled,
)
from auto_voice.training.corpus import Corpus
from auto_voice.training.losses import PerceptualLosses, fit_maps, stored_maps
from auto_voice.training.networks.encoders import SpeakerNet, WhisperNet
from auto_voice.training.networks.loading import with_weights
from auto_voice.training.tasks import ConverterTask, _unlike
from auto_voice.types import FloatArray
from graph_kit import network
from speech_kit import DIMS, corpus, item

WIDTH = 64


def recording(seed: int, seconds: float = 3.0) -> FloatArray:
    return mock_sample(seconds, 16000, f0_hz=100.0 + 17 * seed, seed=seed).samples


def vocoder_mel(samples: FloatArray) -> torch.Tensor:
    mel = log_mel(resample(samples, 16000, HIFIGAN_MEL.sample_rate), HIFIGAN_MEL)
    return torch.from_numpy(mel.T.copy())[None]


@pytest.fixture(scope="module")
def perceptual() -> PerceptualLosses:
    """With networks that have learnt nothing, behind maps that have."""
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> FloatArray:
        scale = 1 / np.sqrt(np.prod(shape[1:]) or 1)
        return (scale * rng.normal(size=shape)).astype(np.float32)

    ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)

    arrays = {
        "conv1/weight": weights(WIDTH, 80, 3), "conv1/bias": weights(WIDTH),
        "conv2/weight": weights(WIDTH, WIDTH, 3), "conv2/bias": weights(WIDTH),
        "position_encodings/encodings": 0.1 * weights(1500, WIDTH),
        "layer_0/self_attention/layer_norm/gamma": ones,
        "layer_0/self_attention/layer_norm/beta": zeros,
        "layer_0/self_attention/linear_0/weight": weights(3 * WIDTH, WIDTH),
        "layer_0/self_attention/linear_0/bias": np.zeros(3 * WIDTH, np.float32),
        "layer_0/self_attention/linear_1/weight": weights(WIDTH, WIDTH),
        "layer_0/self_attention/linear_1/bias": zeros,
        "layer_0/ffn/layer_norm/gamma": ones,
        "layer_0/ffn/layer_norm/beta": zeros,
        "layer_0/ffn/linear_0/weight": np.pad(weights(WIDTH, WIDTH), ((0, 3 * WIDTH), (0, 0))),
        "layer_0/ffn/linear_0/bias": np.zeros(4 * WIDTH, np.float32),
        "layer_0/ffn/linear_1/weight": np.pad(weights(WIDTH, WIDTH), ((0, 0), (0, 3 * WIDTH))),
        "layer_0/ffn/linear_1/bias": zeros,
    }  # fmt: skip
    shape = WhisperShape.of(arrays, layers=1)
    recogniser = with_weights(lambda: WhisperNet(shape), arrays, "arrays").requires_grad_(False)
    encoder = WhisperEncoder(network("whisper_content", shape, recogniser), WIDTH)
    heard = [encoder.features(recording(seed)) for seed in range(4)]
    torch.manual_seed(0)
    maps = fit_maps(recording(seed) for seed in range(12))
    return PerceptualLosses(recogniser, ContentSpace.fit(heard, 8), SpeakerNet().eval(), maps)


@pytest.mark.parametrize("name", ["words", "voice"])
def test_the_maps_lead_to_the_mel_that_they_were_fitted_to(
    perceptual: PerceptualLosses, name: str
) -> None:
    samples = recording(20)
    mapped = perceptual._mapped(vocoder_mel(samples), name)[0].numpy()
    if name == "words":
        energies = log_energies(samples)
        wanted = 4 * scaled(energies, energies.max()).T - 4
    else:
        wanted = np.log(log_mel(samples, GE2E_MEL).T + 1e-7)[1:]
    frames = min(len(mapped), len(wanted))
    assert frames > 0.97 * len(wanted)
    error = (mapped[:frames] - wanted[:frames]).var() / wanted[:frames].var()
    assert error < 0.15
    # A frame late or early fits worse: the map's clock is that of the other mel.
    for lag in (-2, 2):
        moved = np.roll(wanted[:frames], lag, axis=0)
        assert (mapped[:frames] - moved).var() / wanted[:frames].var() > 1.5 * error


def test_the_same_sound_says_the_same_and_another_does_not(perceptual: PerceptualLosses) -> None:
    mel = vocoder_mel(recording(30))
    words, loudest = perceptual.words(mel)
    again, _ = perceptual.words(mel.clone(), loudest)
    other, _ = perceptual.words(vocoder_mel(recording(31)), loudest)
    assert torch.equal(words, again)
    assert words.shape == (1, 149, 8)
    assert words.mean(1).abs().max() < 1e-4
    assert (other - words).square().sum() > 0.1 * words.square().sum()


def test_components_weigh_what_they_weigh_in_the_recogniser(
    perceptual: PerceptualLosses, monkeypatch: pytest.MonkeyPatch
) -> None:
    mels = [vocoder_mel(recording(seed)) for seed in (34, 35)]
    _, loudest = perceptual.words(mels[0])
    heard: list[torch.Tensor] = []
    hidden = perceptual.recogniser.forward

    def overheard(mel: torch.Tensor) -> torch.Tensor:
        heard.append(hidden(mel))
        return heard[-1]

    monkeypatch.setattr(perceptual.recogniser, "forward", overheard)
    words = [perceptual.words(mel, loudest)[0] for mel in mels]
    space = perceptual.space
    unit = [np.clip((h[0].numpy() - space.mean) / space.scale, -OUTLIER, OUTLIER) for h in heard]
    apart = unit[0] - unit[1]
    apart -= apart.mean(0)
    directions = space.projection / np.linalg.norm(space.projection, axis=0)
    wanted = ((apart @ directions) ** 2).sum(1)
    found = (words[0] - words[1])[0].square().sum(-1).numpy()
    assert np.allclose(found / found.mean(), wanted / wanted.mean(), rtol=0.02, atol=1e-3)


def test_a_voice_on_the_side_of_the_source_is_farther_off() -> None:
    target, source = torch.eye(3)[:1], torch.tensor([[0.6, 0.8, 0.0]])
    near, away = torch.tensor([[0.8, 0.6, 0.0]]), torch.tensor([[0.8, -0.6, 0.0]])
    assert _unlike(target, target, source) == 0
    assert torch.allclose(_unlike(away, target, source), torch.tensor([0.2]))
    # As near to the target, but 0.96 to the source, which the target is 0.6 to.
    assert torch.allclose(_unlike(near, target, source), torch.tensor([0.2 + 0.36]))


def test_what_is_far_below_the_loudest_is_not_heard(perceptual: PerceptualLosses) -> None:
    mel = vocoder_mel(recording(32))
    _, loudest = perceptual.words(mel)
    far = 2 * 8 * np.log(10.0)
    words, _ = perceptual.words(mel - far, loudest)
    others, _ = perceptual.words(vocoder_mel(recording(33)) - far, loudest)
    assert torch.equal(words, others)


@pytest.mark.slow
def test_gradients_reach_the_mel(perceptual: PerceptualLosses) -> None:
    mel = vocoder_mel(recording(33)).requires_grad_(True)
    words, _ = perceptual.words(mel)
    (words.square().sum() + perceptual.voice(mel).sum()).backward()
    assert mel.grad is not None
    assert (mel.grad.abs().sum(-1) > 0).float().mean() > 0.95
    assert not any(parameter.requires_grad for parameter in perceptual.speaker.parameters())
    # cuDNN gives an LSTM's gradients in no other mode.
    assert perceptual.speaker.lstm.training


def test_maps_are_fitted_once(tmp_path: Path) -> None:
    asked = []

    def recordings() -> Iterable[FloatArray]:
        for seed in range(2):
            asked.append(seed)
            yield recording(seed)

    first = stored_maps(tmp_path / "perceptual_maps.safetensors", recordings())
    again = stored_maps(tmp_path / "perceptual_maps.safetensors", recordings())
    assert asked == [0, 1]
    assert all(np.array_equal(first[name], again[name]) for name in ("words", "voice"))
    assert [path.name for path in tmp_path.iterdir()] == ["perceptual_maps.safetensors"]


@pytest.mark.slow
def test_a_converter_learns_to_be_understood_in_other_voices(perceptual: PerceptualLosses) -> None:
    small = {"dims": DIMS, "width": 32, "blocks": 2}
    sizes = {"batch": 4, "frames": 64, "reference_frames": 96}
    speech = corpus()

    def missed(said: float) -> tuple[float, float]:
        torch.manual_seed(0)
        task = ConverterTask(
            speech,
            speech,
            small,
            **sizes,
            content_loss=said,
            speaker_loss=said / 4,
            perceptual=perceptual,
        )
        optimizer = torch.optim.Adam(task.model.parameters(), 3e-3)
        for step in range(60):
            rng = np.random.default_rng(step)
            optimizer.zero_grad()
            task.loss(rng)["loss"].backward()
            optimizer.step()
        task.perceptual, task.content_loss = perceptual, 1.0
        figures = task.validate()
        return figures["content"], figures["l1_teacher"]

    plainly, asked = missed(0.0), missed(0.3)
    assert asked[0] < 0.97 * plainly[0]
    assert asked[1] < 1.5 * plainly[1]


def test_nobody_is_asked_where_nothing_is_wanted_of_them(perceptual: PerceptualLosses) -> None:
    speech = corpus(speakers=2, each=1)
    small = {"dims": DIMS, "width": 16, "blocks": 1}
    task = ConverterTask(speech, speech, small, 2, 32, 48, perceptual=perceptual)
    assert "content" not in task.loss(np.random.default_rng(0))


def test_what_lies_behind_a_short_crop_does_not_count(perceptual: PerceptualLosses) -> None:
    speech = Corpus([item(0, 0, 0.9), item(1, 0, 3.0), item(2, 0, 0.9)])
    small = {"dims": DIMS, "width": 16, "blocks": 1}
    task = ConverterTask(
        speech, speech, small, 3, 128, 48, content_loss=1.0, speaker_loss=1.0, perceptual=perceptual
    )
    made: list[torch.Tensor] = []

    def keep(_: object, __: object, out: torch.Tensor) -> None:
        out.retain_grad()
        made.append(out)

    task.model.register_forward_hook(keep)
    mel, missed, unlike = task._cross_speaker_crops(speech, np.random.default_rng(3), 6)
    (missed + unlike + mel.sum()).backward()
    gradient = made[0].grad
    assert gradient is not None
    short = (mel[:, 80:].std(1).sum(-1) == 0).nonzero().flatten()
    assert 0 < len(short) < 6
    assert gradient[short, 80:].abs().max() == 0
    assert gradient[short, :70].abs().min(1).values.max() > 0


def test_the_voice_that_is_asked_for_is_the_others(
    perceptual: PerceptualLosses, monkeypatch: pytest.MonkeyPatch
) -> None:
    speech = corpus(speakers=2, each=2)
    mine, yours = speech.items[0], speech.items[-1]
    assert mine.utterance.speaker != yours.utterance.speaker
    monkeypatch.setattr(speech, "draw", lambda rng, count: [mine] * count)
    monkeypatch.setattr(speech, "other_speaker", lambda rng, item: yours)
    small = {"dims": DIMS, "width": 16, "blocks": 1}
    task = ConverterTask(
        speech, speech, small, 2, 64, 48, content_loss=0.0, speaker_loss=1.0, perceptual=perceptual
    )
    voices = {mine: np.eye(2, dtype=np.float32)[0], yours: np.eye(2, dtype=np.float32)[1]}
    monkeypatch.setattr(task, "_own_voice", voices.__getitem__)
    for heard, wanted in ((yours, 0.0), (mine, 2.0)):
        voice = torch.from_numpy(voices[heard])
        monkeypatch.setattr(perceptual, "voice", lambda mel, voice=voice: voice.expand(len(mel), 2))
        assert task._cross_speaker_crops(speech, np.random.default_rng(0), 3)[2] == wanted


def test_crops_are_swapped_among_speakers(perceptual: PerceptualLosses) -> None:
    speech = corpus(speakers=2, each=2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        (drawn,) = speech.draw(rng, 1)
        assert speech.other_speaker(rng, drawn).utterance.speaker != drawn.utterance.speaker
    lonely = corpus(speakers=1, each=2)
    assert lonely.other_speaker(rng, lonely.items[0]) is lonely.items[0]
    small = {"dims": DIMS, "width": 16, "blocks": 1}
    task = ConverterTask(
        lonely, lonely, small, 2, 64, 48, content_loss=1.0, speaker_loss=1.0, perceptual=perceptual
    )
    assert torch.isfinite(task.loss(rng)["loss"])


def test_the_edges_of_a_crop_are_no_bang(perceptual: PerceptualLosses) -> None:
    mel = vocoder_mel(recording(40, 2.0))
    inside = perceptual._mapped(mel, "words")[0, 40:90]
    crop = perceptual._mapped(mel[:, 34:80], "words")[0]
    assert crop.max() < inside.max() + 0.3


def test_damaged_maps_are_fitted_again_and_none_are_made_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "perceptual_maps.safetensors"
    path.write_bytes(b"")
    assert set(stored_maps(path, [recording(0)])) == {"words", "voice"}
    path.unlink()
    with pytest.raises(TrainingError, match="None of the recordings can be read"):
        stored_maps(path, [])
    assert not list(tmp_path.iterdir())
