"""Every exception that auto_voice raises on purpose.

    AutoVoiceError
    ├── AudioError                 the recording
    │   ├── AudioNotFoundError
    │   ├── AudioFormatError       not audio, truncated, unsupported
    │   ├── AudioContentError      empty, silent, NaN, too short, no speech
    │   ├── AudioOutputError       cannot or must not write there
    │   └── AudioDeviceError       a microphone or loudspeaker is missing, taken or unplugged
    ├── ConfigError                a setting, an option, a YAML key
    │   └── CatalogError           models.yaml: carries file and line
    ├── ModelError                 a model of the registry
    │   ├── UnknownModelError      name or version that the catalog lacks
    │   ├── ModelUnavailableError  no source could serve it
    │   │   └── OfflineError       it would need the network, which is switched off
    │   ├── IntegrityError         bytes that do not match their sha256
    │   ├── UnsafeFileError        pickles that would run code, archive members that climb out
    │   ├── StoreError             the model folder: not writable, damaged, locked
    │   │   └── DiskSpaceError
    │   ├── MissingDependencyError an extra that is not installed
    │   └── ModelLoadError         weights that do not fit the architecture, memory, device
    ├── DownloadError              one transfer (the registry tries the next source)
    │   ├── DownloadStatusError    an HTTP status; ``status`` holds it
    │   └── DownloadStalledError
    ├── VoiceError                 a voice: damaged, made by another encoder
    │   └── UnknownVoiceError      no voice of that name is stored
    ├── TrainingError              data or recipe that cannot be trained on
    ├── EvaluationError            inputs that cannot be scored
    ├── ServerError                the server and what clients ask of it
    │   ├── NotPermittedError      no token, a wrong one, another web site, a foreign host name
    │   ├── UnknownJobError
    │   ├── JobStateError          not finished yet, cancelled, expired
    │   ├── UploadError            too large, too slow, broken
    │   └── BusyError              the queue is full; ``retry_after`` holds seconds
    └── MockAudioError             mock output where real audio was asked for

Each message is one sentence that says what is wrong and what to do. The command line prints it
and exits with 2; the server answers ``http_status`` with the same sentence.
"""

from __future__ import annotations

from collections.abc import Mapping


def reason(error: BaseException) -> str:
    """What the system says, without its number and the path: ``No space left on device``."""
    return getattr(error, "strerror", None) or str(error)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def install_hint(extra: str) -> str:
    """How to install an extra of the package, for the end of a sentence."""
    hint = f'pip install "auto-voice[{extra}]"'
    if "train" not in extra.split(","):
        return hint
    return (
        f"{hint} (in a checkout: pip install -c constraints.txt -e '.[{extra}]'); where no NVIDIA "
        "GPU is, install the CPU build of PyTorch first, which is gigabytes smaller: "
        "https://pytorch.org/get-started/locally"
    )


class AutoVoiceError(Exception):
    """Root of the tree."""

    http_status = 400


class AudioError(AutoVoiceError):
    """Something about a recording."""

    http_status = 422


class AudioNotFoundError(AudioError, FileNotFoundError):
    """The file does not exist."""

    http_status = 404


class AudioFormatError(AudioError):
    """The file is not audio, is truncated, or has an unsupported format."""

    http_status = 415


class AudioContentError(AudioError, ValueError):
    """The audio is empty, silent, not finite, too short, or holds no speech."""


class AudioOutputError(AudioError):
    """The output cannot or must not be written there."""


class OutputBusyError(AudioOutputError):
    """Another process is writing that output."""


class AudioDeviceError(AudioError):
    """A microphone or loudspeaker is missing, taken or unplugged."""


class ConfigError(AutoVoiceError, ValueError):
    """A setting, an option or a configuration file is wrong."""


class CatalogError(ConfigError):
    """A catalog file is wrong; the message starts with ``file:line:``."""


class ModelError(AutoVoiceError):
    """Something about a model."""

    http_status = 503


class UnknownModelError(ModelError, KeyError):
    """The catalog has no such model or version; the message lists the known ones."""

    http_status = 404

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ModelUnavailableError(ModelError):
    """No source could serve the model; the message says what each one answered."""


class OfflineError(ModelUnavailableError):
    """The model is not in the store and the network is switched off."""


class IntegrityError(ModelError):
    """Bytes do not match the sha256 of the catalog."""


class UnsafeFileError(ModelError):
    """A file tried to do more than carry numbers."""

    http_status = 400


class StoreError(ModelError):
    """The model folder cannot be used."""


class DiskSpaceError(StoreError):
    """There is not enough room for the model."""

    http_status = 507


class MissingDependencyError(ModelError, ImportError):
    """An optional dependency is missing; the message holds the install command."""


class ModelLoadError(ModelError):
    """The weights do not fit the architecture, the memory or the device."""


class DownloadError(AutoVoiceError):
    """One transfer failed."""

    http_status = 502


class DownloadStatusError(DownloadError):
    """The server answered with another status than that of a file.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, message: str, status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


class DownloadStalledError(DownloadError):
    """The transfer fell below the minimum speed."""


class VoiceError(AutoVoiceError):
    """A stored voice is unknown, damaged, or made by another encoder."""


class UnknownVoiceError(VoiceError):
    """No voice of that name is stored."""

    http_status = 404


class TrainingError(AutoVoiceError):
    """The data or the recipe cannot be trained on."""


class EvaluationError(AutoVoiceError):
    """The inputs cannot be scored."""


class ServerError(AutoVoiceError):
    """The server refused; ``status`` is what it answers where that differs from the class's."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.http_status = status


class NotPermittedError(ServerError):
    """The caller may not do this; the message says how to be allowed."""

    http_status = 403


class UnknownJobError(ServerError):
    """There is no such job, or no longer."""

    http_status = 404

    def __init__(
        self,
        message: str = "There is no such job; it may have expired.",
        status: int | None = None,
    ) -> None:
        super().__init__(message, status)


class JobStateError(ServerError):
    """The job is not in the state that the request needs."""

    http_status = 409


class UploadError(ServerError):
    """The upload is too large, too slow or broken."""

    http_status = 413


class BusyError(ServerError):
    """More is asked for than can be queued; try again after ``retry_after`` seconds."""

    http_status = 503

    def __init__(self, message: str, retry_after: int = 1, status: int | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class MockAudioError(AutoVoiceError):
    """Mock models made this audio and it was not asked for."""
