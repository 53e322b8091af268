"""HiFi-GAN V1 (Kong et al. 2020): log-mel spectrogram to 22.05 kHz audio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from auto_voice.audio.frames import pieces
from auto_voice.audio.mel import HIFIGAN_MEL
from auto_voice.errors import AudioContentError
from auto_voice.models.registry.catalog import ModelVersion
from auto_voice.models.runtime.graphs import load_network, without_padding
from auto_voice.models.runtime.sessions import Network, trim_heap
from auto_voice.models.runtime.weights import Array, as_batch, checkpoint_arrays
from auto_voice.types import FloatArray

# Frames synthesised at once (6 s): bounds the memory to about 100 MB per row of the batch.
CHUNK_FRAMES = 512


@dataclass(frozen=True)
class HiFiGANShape:
    """Sizes of the generator; the defaults are those of V1 (13.9 M parameters).

    Attributes:
        hidden_share: share of a stage's channels that lie between the two convolutions of a
            residual step, above 0 and up to 1.
    """

    bands: int = 80
    channels: int = 512
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernels: tuple[int, ...] = (16, 16, 4, 4)
    block_kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)
    hidden_share: float = 1.0

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> HiFiGANShape:
        """The entries of a catalog's ``params`` that are sizes; the others are left alone."""
        known: dict[str, Any] = {
            field.name: tuple(value) if isinstance(value := params[field.name], list) else value
            for field in fields(cls)
            if field.name in params
        }
        return cls(**known)

    @property
    def hop_samples(self) -> int:
        return int(np.prod(self.upsample_rates))

    @property
    def context_frames(self) -> int:
        """Frames on each side of a frame that its samples depend on: 14 for V1.

        Walked backwards from the output: a convolution of kernel ``k`` and dilation ``d`` reaches
        ``d (k - 1) / 2`` samples, a transposed one of stride ``u`` maps a reach ``r`` to
        ``(r + overhang) / u`` of its input.
        """
        longest = max(self.block_kernels)
        blocks = sum((d + 1) * (longest - 1) // 2 for d in self.dilations)
        reach = 3
        for rate, kernel in reversed(
            list(zip(self.upsample_rates, self.upsample_kernels, strict=True))
        ):
            overhang = kernel - 1 - (kernel - rate) // 2
            reach = -(-(reach + blocks + overhang) // rate)
        return reach + 3


class HiFiGANModel:
    """HiFi-GAN as a vocoder. Loaded once, it may be called from many threads.

    Args:
        network: the generator, ``(batch, bands, frames)`` to ``(batch, 1, frames * hop)``.
        shape: its sizes.
        name: ``name@version`` of the weights.
        chunk_frames: frames synthesised at once; the result does not depend on it.
        open_part: makes the network of :meth:`synthesize_part`: the same without padding, see
            ``graphs.without_padding``.
    """

    sample_rate = HIFIGAN_MEL.sample_rate

    def __init__(
        self,
        network: Network,
        shape: HiFiGANShape | None = None,
        *,
        name: str = "hifigan",
        chunk_frames: int = CHUNK_FRAMES,
        open_part: Callable[[], Network] | None = None,
    ) -> None:
        self.network = network
        self._open_part = open_part
        self._part: Network | None = None
        self._opening = threading.Lock()
        self.shape = shape or HiFiGANShape()
        self.name = name
        self.device = network.device
        self.bands = self.shape.bands
        self.hop_samples = self.shape.hop_samples
        self.chunk_frames = chunk_frames

    def synthesize(self, mel: ArrayLike) -> FloatArray:
        """``(bands, frames)`` or ``(batch, bands, frames)`` to ``(batch, frames * hop_samples)``.

        Long input is synthesised in chunks that overlap by the network's receptive field, so the
        memory is bounded and the result is that of one pass.

        Args:
            mel: numpy or torch, as ``audio.mel.HIFIGAN_MEL`` defines it.

        Returns:
            float32 in [-1, 1] at 22 050 Hz.

        Raises:
            AudioContentError: empty, not finite, or another number of bands.
        """
        batch = as_batch(mel, 3, "mel")
        rows, bands, frames = batch.shape
        if bands != self.bands:
            raise AudioContentError(f"mel must have {self.bands} bands, not {bands}.")
        audio = np.empty((rows, frames * self.hop_samples), dtype=np.float32)
        hop = self.hop_samples
        for piece in pieces(frames, self.chunk_frames, self.shape.context_frames):
            if frames > self.chunk_frames:
                # Its arrays are the largest of all and would come on top of what others left free.
                trim_heap()
            samples = self.network(np.ascontiguousarray(batch[:, :, piece.low : piece.high]))[:, 0]
            audio[:, piece.start * hop : piece.stop * hop] = samples[:, piece.inside(hop)]
        return audio

    def synthesize_part(self, mel: FloatArray, start: int, stop: int) -> FloatArray:
        """Frames ``[start, stop)`` of what :meth:`synthesize` makes of ``(bands, frames)``.

        ``(1, (stop - start) * hop_samples)`` float32. Of the frames around them each layer computes
        those that the next one reads, and no more. What the mel lacks of its surroundings is more
        of its first and last frame. The network is opened when it is first needed and takes as much
        memory again.
        """
        hop, reach = self.hop_samples, self.shape.context_frames
        if self._open_part is None:
            return self.synthesize(mel)[:, start * hop : stop * hop]
        with self._opening:
            if self._part is None:
                self._part = self._open_part()
        low, high = start - reach, stop + reach
        lacking = (max(0, -low), max(0, high - mel.shape[1]))
        seen = np.pad(mel[:, max(0, low) : high], ((0, 0), lacking), mode="edge")
        samples: FloatArray = self._part(np.ascontiguousarray(seen[None], np.float32))[:, 0]
        more = (samples.shape[1] - (stop - start) * hop) // 2
        return samples[:, more : more + (stop - start) * hop]


def convert_checkpoint(path: Path) -> dict[str, Array]:
    """The published generator (key ``generator``) as arrays, weight normalisation folded.

    Raises:
        UnsafeFileError, ModelLoadError: see ``weights.checkpoint_arrays``.
    """
    return checkpoint_arrays(path, under="generator")


def build(files: Mapping[str, Path], version: ModelVersion, device: str) -> HiFiGANModel:
    """The vocoder whose weights are the one file of ``files``.

    ``version.params`` may hold the sizes of ``HiFiGANShape`` and ``chunk_frames``.

    Raises:
        ModelLoadError, UnsafeFileError: see ``graphs.load_network``.
    """
    shape = HiFiGANShape.from_params(version.params)
    load = partial(
        load_network, "hifigan", shape, files, version.key, device, convert=convert_checkpoint
    )
    return HiFiGANModel(
        load(),
        shape,
        name=version.key,
        chunk_frames=int(version.params.get("chunk_frames", CHUNK_FRAMES)),
        open_part=partial(load, edit=without_padding),
    )
