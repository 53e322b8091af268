"""The compact converter: content, pitch and a voice to a log-mel spectrogram.

The voice enters in two ways. A vector (speaker embedding, long-term spectrum, pitch range) steers
every block. And attention looks up, for each content frame, what the reference speaker's own
spectrum was when similar content was spoken, so that details no single vector holds come from the
reference itself. The pitch enters as the harmonics it makes, so that the network shapes them
rather than draws them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from auto_voice.audio.frames import interpolate_frames, stretches
from auto_voice.audio.mel import (
    CEPSTRA_SIZE,
    HIFIGAN_MEL,
    cepstral_change,
    harmonic_template,
)
from auto_voice.audio.pitch import NEUTRAL_LOG_F0, align_pitch
from auto_voice.errors import MissingDependencyError, ModelLoadError, VoiceError, install_hint
from auto_voice.models.base import DRAWING
from auto_voice.models.correction import Correction, estimate, loud
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import (
    bound_network,
    read_graph,
    shape_from,
    weight_file,
)
from auto_voice.models.runtime.sessions import Network
from auto_voice.models.runtime.weights import Array, read_weights
from auto_voice.types import Content, FloatArray, Mel, Pitch, Voice

# Mean and spread of ``HIFIGAN_MEL`` over training speech; networks see standardised mels.
MEL_MEAN, MEL_SCALE = -5.5, 2.2
LOG_F0_SCALE = 0.35
NEUTRAL_LOG_F0_STD = 0.2
# Frames of the reference that attention sees at most: about 18.6 s, evenly thinned beyond.
REFERENCE_FRAMES = 1600
PROFILE_SIZE = 2 * HIFIGAN_MEL.bands + 2
PITCH_SIZE = 3 + HIFIGAN_MEL.bands
# What the correction of a voice needs of its reference, and how much of it at most, 13.9 s.
CORRECTION_NEEDS = ("mel", "content", "pitch")
CORRECTION_FRAMES = 1200
# And to find by what voices differ on average, 2.3 s.
REVOICING_FRAMES = 200
# Sessions of fine-tuned voices that are kept, some 30 MB each, and corrections, 26 kB each.
FINE_TUNED_KEPT, CORRECTIONS_KEPT = 4, 64
FINE_TUNING = "auto_voice.training.fine_tuning"

T = TypeVar("T")


@dataclass(frozen=True)
class ConverterShape:
    """Sizes of ``ConverterNet``; see there."""

    dims: int = 64
    width: int = 224
    blocks: int = 8
    kernel: int = 7
    expansion: int = 2
    heads: int = 4
    use_profile: bool = True
    # Says what the content is, not how the network is built.
    cepstra: bool = field(default=False, metadata={"graph": False})


class Conditioning(NamedTuple):
    """A voice as the network takes it, float32 but for ``mask``.

    Attributes:
        embedding: ``(256,)`` of unit norm.
        profile: ``(PROFILE_SIZE,)``; zeros where only an embedding is known.
        keys: ``(frames, dims)`` content of the reference; may have no frames.
        values: ``(frames, bands)`` standardised mel of the reference.
        mask: ``(frames,)`` bool, true where a frame is real.
    """

    embedding: FloatArray
    profile: FloatArray
    keys: FloatArray
    values: FloatArray
    mask: NDArray[np.bool_]


class Spoken(NamedTuple):
    """Speech of a reference as a source, with its mel ``(frames, bands)``.

    Attributes:
        log_f0_mean, log_f0_std: None where nothing is voiced.
    """

    content: Content
    pitch: Pitch
    mel: FloatArray
    log_f0_mean: float | None
    log_f0_std: float | None


def pitch_inputs(log_f0: FloatArray, voiced: FloatArray, log_f0_mean: float) -> FloatArray:
    """What ``ConverterNet`` knows of the pitch: ``(frames, PITCH_SIZE)`` float32.

    Log-F0 against 150 Hz, log-F0 against the voice's mean, voicing, and the harmonics as the mel
    shows them.
    """
    absolute = (log_f0 - NEUTRAL_LOG_F0) / LOG_F0_SCALE
    relative = (log_f0 - log_f0_mean) / LOG_F0_SCALE
    numbers = np.stack([absolute, relative, voiced], axis=-1)
    template = harmonic_template(log_f0, voiced) / MEL_SCALE
    return np.concatenate([numbers, template], axis=-1).astype(np.float32)


def voice_profile(mel: FloatArray, log_f0_mean: float, log_f0_std: float) -> FloatArray:
    """``(PROFILE_SIZE,)`` from a reference mel ``(frames, bands)``, its natural log.

    Quiet frames are left out: they tell of the room.
    """
    values = (mel.astype(np.float32) - MEL_MEAN) / MEL_SCALE
    values = values[loud(values)]
    pitch = [(log_f0_mean - NEUTRAL_LOG_F0) / LOG_F0_SCALE, log_f0_std / LOG_F0_SCALE]
    return np.concatenate([values.mean(0), values.std(0), np.array(pitch)]).astype(np.float32)


def thin(frames: int, limit: int = REFERENCE_FRAMES) -> slice:
    """Every n-th frame, so that at most ``limit`` stay."""
    return slice(None, None, max(1, -(-frames // limit)))


class CompactConverter:
    """``ConverterNet`` as a stage. Many threads may use it at once.

    Args:
        graph: the network without weights.
        weights: its arrays by name; they may be mapped to a file and of half precision.
        shape: its sizes.
        name: ``name@version`` of the weights.
        content_space: that the network was trained on.
        device: where it shall run.
        fine_tuning_gain: what fine-tuning these weights to a voice was measured to gain, as a
            clause; empty where nobody measured it.
        guidance: how far a mel goes on past the voice, as a share of the way from the source's own
            voice, where that is known and these weights were measured to be better for it.
        correction: the ``ridge`` of :func:`auto_voice.models.correction.estimate`, where these
            weights were measured to be better for it; 0 for none.
        second_pass: by how much of what the voice changes the source's cepstra are moved before the
            mel is drawn again, where these weights were measured to be better for it; 0 for not.

    Raises:
        ModelLoadError: the weights do not fit the graph.
    """

    sample_rate = HIFIGAN_MEL.sample_rate
    hop_samples = HIFIGAN_MEL.hop_samples

    def __init__(
        self,
        graph: bytes,
        weights: Mapping[str, Array],
        shape: ConverterShape,
        name: str,
        content_space: str,
        device: str = "cpu",
        source: str = "",
        fine_tuning_gain: str = "",
        guidance: float = 0.0,
        correction: float = 0.0,
        second_pass: float = 0.0,
    ) -> None:
        self.graph, self.weights, self.shape = graph, weights, shape
        self.fine_tuning_gain = fine_tuning_gain
        self.guidance, self.correction, self.second_pass = guidance, correction, second_pass
        self.name = name
        self.content_space = content_space
        self.network = bound_network(graph, weights, source or name, name, device)
        self.device = self.network.device
        self._fine_tuned: OrderedDict[bytes, Network] = OrderedDict()
        self._corrections: OrderedDict[bytes, Correction] = OrderedDict()
        self._mean_changes: OrderedDict[bytes, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def convert(self, content: Content, pitch: Pitch, voice: Voice, frames: int) -> Mel:
        """The mel of ``content`` spoken by ``voice``: ``(80, frames)``.

        Args:
            pitch: already transposed to where the result should lie.
            frames: of the output, at 22 050 / 256 = 86.13 a second.

        Raises:
            ModelLoadError: ``content`` is in another space.
            VoiceError: the voice's reference frames were made in another space.
        """
        if content.space != self.content_space:
            raise ModelLoadError(
                f"{self.name} speaks from content in {self.content_space}, not {content.space}; "
                "choose the content encoder it was trained on or map yours to it."
            )
        if voice.frames and voice.content_space != self.content_space:
            raise VoiceError(
                f"The voice {voice.name or '(unnamed)'} was enrolled in {voice.content_space}, and "
                f"{self.name} needs {self.content_space}; enrol it again from its reference."
            )
        rate = self.sample_rate / self.hop_samples
        features = interpolate_frames(content.features, content.frame_rate, rate, frames)
        log_f0, voiced = align_pitch(pitch, rate, frames)
        mean = voice.log_f0_mean if voice.log_f0_mean is not None else float(log_f0.mean())
        inputs = pitch_inputs(log_f0, voiced.astype(np.float32), mean)
        arguments = (features.astype(np.float32), inputs, *self.conditioning(voice, mean))
        mel = self._network(voice)(*(np.ascontiguousarray(values[None]) for values in arguments))
        values = mel[0].T * MEL_SCALE + MEL_MEAN
        return Mel(values.astype(np.float32), self.sample_rate, self.hop_samples)

    def corrected(self, mel: Mel, voice: Voice) -> Mel:
        """``mel``, drawn in ``voice``, by the linear map of what it draws of the reference to the
        reference.

        Unchanged where the record asks for no correction, where the voice has no reference frames,
        and where a converter was fine-tuned to it.
        """
        frames = _reference_frames(voice)
        if not self.correction or voice.fine_tuning or frames is None:
            return mel
        values = self._correction(voice.embedding, frames)(mel.values.T).T
        return replace(mel, values=np.ascontiguousarray(values))

    def revoiced(
        self, content: Content, mel: Mel, start: Mel, voice: Voice, own: Voice
    ) -> Content | None:
        """``content`` with cepstra that are moved as ``mel``, drawn in ``voice``, differs from
        ``start``, drawn in ``own``: they tell of the voice's vocal tract then.

        Content has no mean over its speech, so what the voices differ by on average is left out.
        None where the content has no cepstra, and where a voice has no reference frames.
        """
        frames = _reference_frames(voice)
        if not self.shape.cepstra or frames is None or not len(own.frames.get("mel", ())):
            return None
        shown = {f"own.{name}": values[::16] for name, values in own.frames.items()}
        shown |= {name: values[::16] for name, values in frames.items()}
        shown |= {"embedding": voice.embedding, "own.embedding": own.embedding}
        mean = self._remembered(
            self._mean_changes, _digest(shown), lambda: self._mean_change(voice, own, frames)
        )
        # The mels of vocoder and content have the same bands, the former as magnitudes.
        change = 2 * (mel.values - start.values - mean[:, None])
        features = content.features.astype(np.float32)
        features[:, -CEPSTRA_SIZE:] += self.second_pass * cepstral_change(
            change, mel.frame_rate, content
        )
        return replace(content, features=features)

    def _mean_change(
        self, voice: Voice, own: Voice, frames: Mapping[str, FloatArray]
    ) -> FloatArray:
        """``(bands,)`` by which speech that is drawn in ``voice`` differs from the same in ``own``,
        found on the reference."""
        spoken = self._spoken(frames, REVOICING_FRAMES)
        mels = []
        for one in (voice, own):
            known = replace(one, log_f0_mean=spoken.log_f0_mean, log_f0_std=spoken.log_f0_std)
            mels.append(self.convert(spoken.content, spoken.pitch, known, len(spoken.mel)))
        speech = loud(spoken.mel)
        difference = self.corrected(mels[0], voice).values - mels[1].values
        return np.asarray(difference[:, speech].mean(1), np.float32)

    def _correction(self, embedding: FloatArray, frames: Mapping[str, FloatArray]) -> Correction:
        key = _digest({"embedding": embedding} | {n: v[::16] for n, v in frames.items()})
        return self._remembered(self._corrections, key, lambda: self._estimated(embedding, frames))

    def _remembered(self, known: OrderedDict[bytes, T], key: bytes, make: Callable[[], T]) -> T:
        """What ``known`` holds of ``key``, made where it is missing."""
        with self._lock:
            found = known.get(key)
        # Others need not wait; two that find it missing make the same.
        found = make() if found is None else found
        with self._lock:
            known[key] = found
            known.move_to_end(key)
            if len(known) > CORRECTIONS_KEPT:
                known.popitem(last=False)
        return found

    def _estimated(self, embedding: FloatArray, frames: Mapping[str, FloatArray]) -> Correction:
        """From the embedding and the reference alone: a voice without a pitch of its own is given
        that of each source."""
        spoken = self._spoken(frames, CORRECTION_FRAMES)
        voice = Voice(
            embedding, spoken.log_f0_mean, spoken.log_f0_std,
            {"mel": spoken.mel, "content": spoken.content.features},
            content_space=self.content_space,
        )  # fmt: skip
        drawn = self.convert(spoken.content, spoken.pitch, voice, len(spoken.mel))
        return estimate(drawn.values.T, spoken.mel, self.correction)

    def _spoken(self, frames: Mapping[str, FloatArray], most: int) -> Spoken:
        """At most ``most`` frames of the reference, as something to be converted."""
        length = min(len(values) for values in frames.values())
        kept = stretches(length, min(length, most))
        log_f0, voicing = frames["pitch"][kept].astype(np.float32).T
        voiced = voicing > 0.5
        rate = self.sample_rate / self.hop_samples
        f0_hz = np.where(voiced, np.exp(log_f0), 0).astype(np.float32)
        return Spoken(
            Content(frames["content"][kept].astype(np.float32), rate, self.content_space),
            # A mel frame lies half a hop behind the frame of a pitch track of its number.
            Pitch(np.repeat(f0_hz, 2), np.repeat(voiced, 2), 2 * rate),
            frames["mel"][kept].astype(np.float32),
            float(log_f0[voiced].mean()) if voiced.any() else None,
            float(log_f0[voiced].std()) if voiced.any() else None,
        )

    def fine_tune(
        self, voice: Voice, steps: int, progress: Callable[[float], None] | None = None
    ) -> Voice:
        """``voice`` with what the network learns from its speech in ``steps``.

        Args:
            progress: called with the fraction done, from 0 to 1.

        Returns:
            A voice fine-tuned to this converter, about 6 MB larger; ``voice`` itself where it holds
            no speech with known pitch, or less than 1.1 s.

        Raises:
            MissingDependencyError: torch is not installed.
        """
        try:
            # By name, as an architecture is: what learns is not needed by what converts.
            fine_tuning = import_module(FINE_TUNING)
        except ImportError as error:
            raise MissingDependencyError(
                f"Fine-tuning a voice needs {error.name}, which is not installed; run: "
                f"{install_hint('train')}. Or clone without fine-tuning."
            ) from error
        tuned: Voice = fine_tuning.fine_tune(self, voice, steps, progress)
        return tuned

    def conditioning(self, voice: Voice, log_f0_mean: float, thinned: bool = True) -> Conditioning:
        """``voice`` as the network takes it.

        Args:
            log_f0_mean: where the voice has none of its own.
            thinned: at most ``REFERENCE_FRAMES`` of its frames.
        """
        mel, keys = voice.frames.get("mel"), voice.frames.get("content")
        if mel is None or keys is None:
            mel = np.zeros((0, HIFIGAN_MEL.bands), np.float32)
            keys = np.zeros((0, self.shape.dims), np.float32)
        profile = np.zeros(PROFILE_SIZE, np.float32)
        if len(mel):
            std = voice.log_f0_std if voice.log_f0_std is not None else NEUTRAL_LOG_F0_STD
            profile = voice_profile(mel, log_f0_mean, std)
        kept = thin(len(mel)) if thinned else slice(None)
        values = (mel[kept].astype(np.float32) - np.float32(MEL_MEAN)) / np.float32(MEL_SCALE)
        return Conditioning(
            voice.embedding.astype(np.float32),
            profile,
            keys[kept].astype(np.float32),
            values,
            np.ones(len(values), np.bool_),
        )

    def _network(self, voice: Voice) -> Network:
        """The network with what it learnt of ``voice``, where that is known."""
        if not voice.fine_tuning or voice.fine_tuned_converter != self.name:
            return self.network
        key = _digest(voice.fine_tuning)
        with self._lock:
            if key not in self._fine_tuned:
                self._fine_tuned[key] = self._changed(voice)
                if len(self._fine_tuned) > FINE_TUNED_KEPT:
                    self._fine_tuned.popitem(last=False)
            self._fine_tuned.move_to_end(key)
            return self._fine_tuned[key]

    def _changed(self, voice: Voice) -> Network:
        weights = dict(self.weights)
        for name, difference in voice.fine_tuning.items():
            if name not in weights or weights[name].shape != difference.shape:
                raise VoiceError(
                    f"The voice {voice.name or '(unnamed)'} holds a fine-tuning that does not fit "
                    f"{self.name} ({name}); enrol it again from its reference."
                )
            weights[name] = weights[name].astype(np.float32) + difference.astype(np.float32)
        return bound_network(self.graph, weights, voice.name, self.name, self.device)


def _reference_frames(voice: Voice) -> dict[str, FloatArray] | None:
    """``CORRECTION_NEEDS`` of the voice; None where one is missing."""
    frames = {n: v for n, v in voice.frames.items() if n in CORRECTION_NEEDS and len(v)}
    return frames if len(frames) == len(CORRECTION_NEEDS) else None


def _digest(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.digest()


def build(
    files: Mapping[str, Path], version: ModelVersion, device: str = "cpu"
) -> CompactConverter:
    """From the catalog's record; ``params`` holds ``net`` (arguments of ``ConverterNet``),
    ``content_space`` and maybe ``fine_tuning_gain``, ``guidance``, ``correction`` and
    ``second_pass``.

    Raises:
        ModelLoadError: the weights do not fit the architecture.
    """
    path = weight_file(files, version.key)
    shape = shape_from(ConverterShape, version.params.get("net", {}), version.key)
    graph = read_graph("mel_converter", shape, files, version.key)
    return CompactConverter(
        graph, read_weights(path), shape, version.key, version.params["content_space"], device,
        str(path), str(version.params.get("fine_tuning_gain", "")),
        *(float(version.params.get(key, 0.0)) for key in DRAWING),
    )  # fmt: skip
