from __future__ import annotations

import stat
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from audio_signals import speech_like as syllables
from auto_voice.audio.io import probe, read_audio
from auto_voice.audio.pitch import extract_pitch
from auto_voice.errors import VoiceError
from auto_voice.types import Voice, Waveform
from auto_voice.voices.blending import blend_voices
from auto_voice.voices.inspection import clusters, count_speakers, inspect_file
from auto_voice.voices.library import VoiceLibrary, resolve_voice
from auto_voice.voices.voice_file import load_voice, load_voice_facts, save_voice
from hand_made_stages import Speaker, speech_like
from media_files import media


def voice(seed=0, frames=50, **fields):
    rng = np.random.default_rng(seed)
    embedding = np.abs(rng.standard_normal(256)).astype(np.float32)
    mel = rng.standard_normal((frames, 80)).astype(np.float32)
    content = rng.standard_normal((frames, 2)).astype(np.float32)
    return Voice(
        embedding / np.linalg.norm(embedding),
        log_f0_mean=5.0 + 0.1 * seed,
        log_f0_std=0.2,
        frames={"mel": mel, "content": content},
        name=f"v{seed}",
        encoder="speaker@1",
        content_space="local",
        **fields,
    )


@pytest.fixture
def library(tmp_path):
    return VoiceLibrary(tmp_path / "voices")


def test_a_stored_voice_comes_back_whole(library):
    kept = voice(
        quality={"snr_db": 31.5, "speakers": None},
        consent="agreed on 3 May",
        speech=np.arange(-5, 5, dtype=np.int16),
    )
    library.add("Ann K.", kept)
    again = library.get("Ann K.")
    assert library.names() == ["Ann K."]
    assert (again.name, again.consent, again.quality) == ("Ann K.", kept.consent, kept.quality)
    np.testing.assert_array_equal(again.speech, kept.speech)
    np.testing.assert_array_equal(again.frames["mel"], kept.frames["mel"])


def test_a_consent_is_kept_whole_or_refused(library, hand_made, reference):
    agreed = "Ann agreed:\n" + "to this use, " * 700
    library.add("ann", voice(consent=agreed))
    assert library.get("ann").consent == agreed
    assert load_voice_facts(library.path("ann"))["consent"] == agreed
    long = "x" * 10_001
    with pytest.raises(VoiceError, match=r"has 10001 characters.* at most 10000; shorten it"):
        library.add("ben", voice(consent=long))
    with pytest.raises(VoiceError, match="at most 10000"):
        hand_made()[0].clone(reference, consent=long)


def test_a_library_keeps_names_apart(library):
    library.add("ann", voice(1))
    with pytest.raises(VoiceError, match="there is a voice 'ann' already"):
        library.add("ann", voice(2))
    library.add("ann", voice(2), overwrite=True)
    library.rename("ann", "anna")
    assert "ann" not in library
    assert library.names() == ["anna"]
    library.remove("anna")
    with pytest.raises(VoiceError, match="none is stored yet"):
        library.get("anna")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\\b", "x" * 80, "a\0b", "a "])
def test_names_cannot_leave_the_folder(library, name):
    with pytest.raises(VoiceError, match="cannot name a voice"):
        library.add(name, voice())
    assert name not in library


def test_the_folder_is_the_owners_alone(library):
    library.add("ann", voice())
    assert stat.S_IMODE(library.folder.stat().st_mode) == 0o700


def test_a_file_wins_over_a_stored_voice_and_what_is_neither_is_said(
    library, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    library.add("ann", voice(1))
    assert resolve_voice("ann", lambda: library).name == "ann"
    (tmp_path / "ann").touch()
    assert resolve_voice("ann", lambda: library) == (tmp_path / "ann").relative_to(tmp_path)
    assert resolve_voice("voice:ann", lambda: library).name == "ann"
    assert resolve_voice("none.wav", lambda: library).name == "none.wav"
    with pytest.raises(VoiceError, match="neither a recording nor a stored voice; stored are: ann"):
        resolve_voice("ben", lambda: library)


def test_files_of_the_first_release_are_still_voices(tmp_path):
    import json

    from safetensors.numpy import save_file

    about = {
        "log_f0_mean": 5.0, "log_f0_std": 0.2, "name": "old", "speech_seconds": 4.0,
        "encoder": "speaker@1", "content_space": "local", "notes": [],
    }  # fmt: skip
    save_file(
        {"embedding": np.ones(256, np.float32) / 16},
        tmp_path / "old.safetensors",
        metadata={"format": "auto_voice.voice/1", "voice": json.dumps(about)},
    )
    old = load_voice(tmp_path / "old.safetensors")
    assert (old.name, old.consent, old.speech, dict(old.quality)) == ("old", "", None, {})


def test_a_blend_lies_between_in_everything():
    a, b = voice(1, frames=400), voice(2, frames=900)
    mixed = blend_voices([(a, 0.7), (b, 0.3)], name="mix")
    assert mixed.log_f0_mean == pytest.approx(0.7 * a.log_f0_mean + 0.3 * b.log_f0_mean)
    assert np.linalg.norm(mixed.embedding) == pytest.approx(1, abs=1e-5)
    near, far = float(mixed.embedding @ a.embedding), float(mixed.embedding @ b.embedding)
    assert near > far > float(a.embedding @ b.embedding)
    shares = [
        sum(bool((row == other.frames["mel"]).all(1).any()) for row in mixed.frames["mel"])
        for other in (a, b)
    ]
    assert shares[0] / sum(shares) == pytest.approx(0.7, abs=0.02)
    assert len(mixed.frames["mel"]) == len(mixed.frames["content"])
    # What was neighbours stays so but at the edges of stretches.
    places = [int((a.frames["mel"] == row).all(1).argmax()) for row in mixed.frames["mel"][:200]]
    assert (np.diff(places) == 1).mean() > 0.98
    assert blend_voices([(a, 1.0), (b, 0.0)]) is a


def test_voices_that_do_not_go_together_are_not_mixed():
    other = replace(voice(2), encoder="speaker@2")
    with pytest.raises(VoiceError, match=r"different encoders cannot be blended \(speaker@1"):
        blend_voices([(voice(1), 1.0), (other, 1.0)])
    with pytest.raises(VoiceError, match="weights of 0 or more"):
        blend_voices([(voice(1), 0.0)])
    opposite = replace(voice(1), embedding=-voice(1).embedding)
    with pytest.raises(VoiceError, match="cancel each other out"):
        blend_voices([(voice(1), 1.0), (opposite, 1.0)])


@pytest.mark.slow
def test_voices_of_another_encoder_are_encoded_again_or_refused(hand_made, source, reference):
    pipeline, _ = hand_made()
    now = pipeline.clone(reference, name="ann")
    old = replace(now, encoder="speaker@0", embedding=np.ones(256, np.float32) / 16, consent="yes")
    result = pipeline.convert(source, old)
    assert float(result.voice.embedding @ now.embedding) > 0.98
    assert result.voice.consent == "yes"
    assert any("made with speaker@0 and encoded again" in note for note in result.notes)
    moved = pipeline.convert(source, replace(now, content_space="content@0"))
    assert moved.voice.content_space == "local"
    with pytest.raises(VoiceError, match="made with speaker@0, and this pipeline uses speaker@1"):
        pipeline.convert(source, replace(old, speech=None))


def test_windows_of_two_people_make_two_clusters():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 64))
    groups = np.repeat([0, 1, 2], [20, 15, 6])
    points = centres[groups] + 0.25 * rng.standard_normal((41, 64))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    labels = clusters(points.astype(np.float32), 0.62)
    assert len(set(labels)) == 3
    assert all(len(set(labels[groups == g])) == 1 for g in range(3))


class ByHeight(Speaker):
    """Tells speakers apart by their median pitch."""

    def embed_utterance(self, samples):
        pitch = extract_pitch(samples, 16000)
        height = np.log2(np.median(pitch.f0_hz[pitch.voiced]) / 50) / 4
        bump = np.exp(-0.5 * ((np.linspace(0, 1, 256) - height) / 0.06) ** 2)
        return (bump / np.linalg.norm(bump)).astype(np.float32)


@pytest.mark.slow
def test_people_are_counted():
    one = Waveform(speech_like(10.0, 110.0), 16000)
    pause = np.zeros(16000, np.float32)
    two = Waveform(
        np.concatenate([speech_like(8.0, 110.0), pause, speech_like(8.0, 260.0, seed=1)]), 16000
    )
    assert count_speakers(one, ByHeight()) == 1
    assert count_speakers(two, ByHeight()) == 2
    assert count_speakers(Waveform(pause, 16000), ByHeight()) is None


def test_enrolment_says_what_is_wrong_and_what_to_do(hand_made, monkeypatch):
    pipeline, _ = hand_made()
    rng = np.random.default_rng(0)
    clean = speech_like(6.0, 140.0)
    noisy = np.clip(3 * clean + 0.05 * rng.standard_normal(len(clean)), -0.3, 0.3)
    good = pipeline.clone(Waveform(clean, 16000), labels=["a.wav"], name="ann", consent="yes")
    assert good.consent == "yes"
    assert good.quality["snr_db"] > 20
    assert good.speech is not None
    monkeypatch.setattr("auto_voice.voices.inspection.count_speakers", lambda *_: 2)
    bad = pipeline.clone(
        Waveform(noisy.astype(np.float32), 16000),
        labels=["b.wav"],
        name="ben",
        keep_recording=False,
    )
    said = " ".join(bad.notes)
    for expected in ("b.wav: noisy", "b.wav: clipped", "2 people seem to speak", "record"):
        assert expected in said
    assert bad.speech is None
    assert bad.quality["speakers"] == 2


@pytest.mark.slow
def test_a_recording_of_somebody_else_is_noticed(hand_made):
    pipeline, _ = hand_made(speaker_encoder=ByHeight())
    references = [
        Waveform(speech_like(5.0, 110.0), 16000),
        Waveform(speech_like(5.0, 112.0, seed=1), 16000),
        Waveform(speech_like(5.0, 270.0, seed=2), 16000),
    ]
    notes = pipeline.clone(references, labels=["a.wav", "b.wav", "c.wav"], name="ann").notes
    assert [note.partition(":")[0] for note in notes if "another person" in note] == ["c.wav"]


def test_inspection_keeps_the_notes_of_a_file_of_unknown_length(tmp_path, monkeypatch):
    clipped = np.clip(20 * speech_like(2.0, 140.0), -1, 1)
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([clipped, clipped], axis=1), 16000)
    whole = inspect_file(path).notes
    assert any("clipped" in note for note in whole)
    monkeypatch.setattr(
        "auto_voice.voices.inspection.probe", lambda path: replace(probe(path), frames=None)
    )
    assert inspect_file(path).notes == whole


def test_a_voice_file_without_speech_is_small(tmp_path):
    kept = replace(voice(), speech=np.zeros(480000, np.int16))
    big = save_voice(tmp_path / "a.safetensors", kept).stat().st_size
    small = save_voice(tmp_path / "b.safetensors", replace(kept, speech=None)).stat().st_size
    assert big - small == pytest.approx(960000, abs=200)
    assert SimpleNamespace(**vars(load_voice(tmp_path / "b.safetensors"))).speech is None


def test_the_length_of_an_inspection_is_that_of_the_sound(tmp_path):
    """Headers of MP4 count milliseconds, and padding of the codec that is played."""
    path = tmp_path / "memo.m4a"
    speech = syllables(2.0, 44_100)[:81_234]
    path.write_bytes(media(("aac", speech), container="ipod", rate=44_100))
    found = inspect_file(path)
    assert found.info.frames == len(read_audio(path).samples)
    assert found.as_dict()["seconds"] == pytest.approx(found.info.frames / 44_100, abs=1e-3)
