"""The registry: names in, loaded models out; nobody else knows files or network.

registry = ModelRegistry()
hifigan = registry.load_hifigan()        # fetched and verified once, loaded once
audio = hifigan.synthesize(mel)
registry.resolved("hifigan_universal")   # "hifigan_universal@1.0"
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auto_voice import events
from auto_voice.errors import (
    AutoVoiceError,
    IntegrityError,
    ModelLoadError,
    UnknownModelError,
)
from auto_voice.models.registry.architectures import ARCHITECTURES
from auto_voice.models.registry.catalog import Catalog, ModelVersion, Pins, split_key
from auto_voice.models.registry.loading import (
    RECOVERABLE,
    ModelCache,
    Substitute,
    reason_of,
)
from auto_voice.settings import Settings, get_settings

if TYPE_CHECKING:
    from auto_voice.models.additions import Addition
    from auto_voice.models.base import ContentEncoder, SpeakerEncoderStage, Vocoder
    from auto_voice.models.model_loader import ModelLoader
    from auto_voice.models.registry.loading import WarmupTiming
    from auto_voice.models.registry.maintenance import UsageRecord
    from auto_voice.models.registry.store import ModelStore
    from auto_voice.progress import ProgressCallback

log = logging.getLogger(__name__)

# The model of each stage that a conversion uses unless told otherwise.
PIPELINE_MODELS: Mapping[str, str] = {
    "content": "content_whisper",
    "converter": "converter_compact",
    "speaker": "speaker_encoder",
    "vocoder": "hifigan_universal",
}
# The vocoder that a live conversion uses instead.
LIVE_VOCODER = "vocoder_compact"


# Loaded by ``load_hubert``; no conversion uses it unless told to.
HUBERT = "hubert_base"


@dataclass(frozen=True)
class ModelStatus:
    """Where one version stands on this machine.

    Attributes:
        default: whether its bare name means this version now, pins considered.
        installed: all its files are in the store or inside the package.
        loaded: it is in this registry's memory.
        problem: why the bare name of the model cannot be used: a pin that asks for what the
            catalog no longer has; empty if all is well.
        ram_mb: memory that it needs; 0 where that is not known.
        quantised: its precision where it was made of another version, such as ``int8``.
    """

    name: str
    version: str
    kind: str
    description: str
    licence: str
    bytes: int
    default: bool
    pinned: bool
    installed: bool
    loaded: bool
    problem: str = ""
    ram_mb: int = 0
    quantised: str = ""


class ModelRegistry:
    """Finds, fetches, verifies, loads and shares models; safe to use from many threads.

    Creating one reads settings and nothing else: no YAML, no torch, no network, no folder made.

    Args:
        model_dir: where models are kept; by default the setting, else the user's cache.
        use_mock: numpy stand-ins for everything, deterministic, no files.
        config: the user's YAML that overlays the built-in catalog and may hold settings.
        offline: never open a connection.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``directml``, ``coreml``, ``openvino``;
            ``"cuda:0,vocoder=cuda:1"`` or ``{"default": "cuda:0", "vocoder": "cuda:1"}`` gives the
            models of a kind, or one model, a device of their own.
        fallback: ``none``, ``compact`` or ``mock``: what may replace a model that cannot be had.
        memory_budget_mb: limit for loaded models; least recently used first out. 0 for none.
        mirrors: base URLs of servers that are asked first for files.
        prefer: which version a bare name means where there are quantised ones: ``exact`` takes the
            catalog's default, ``fastest`` and ``smallest`` what was made of it and is faster on
            a CPU or needs less memory.
        progress: whether downloads draw a bar; None draws it on a terminal; a function is told of
            each :class:`~auto_voice.progress.Progress`, and no bar is drawn. A call's own listener
            comes first.

    Raises:
        ConfigError: a setting that cannot be.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str] | None = None,
        use_mock: bool = False,
        *,
        config: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        device: str | Mapping[str, str] | None = None,
        fallback: str | None = None,
        memory_budget_mb: int | None = None,
        mirrors: Sequence[str] | None = None,
        prefer: str | None = None,
        progress: bool | ProgressCallback | None = None,
    ) -> None:
        self.settings: Settings = get_settings(
            config=config,
            model_dir=model_dir,
            offline=offline,
            device=device,
            fallback=fallback,
            memory_budget_mb=memory_budget_mb,
            mirrors=mirrors,
            prefer=prefer,
        )
        self.use_mock = use_mock
        self._progress = progress
        self._cache = ModelCache(self.settings.memory_budget_mb)
        self._lock = threading.RLock()
        # Of its own: deciding may load a model, and another thread's load needs the first lock.
        self._deciding = threading.Lock()
        self._catalog: Catalog | None = None
        self._loader: ModelLoader | None = None
        self._usage: UsageRecord | None = None
        self._substitutes: dict[str, Substitute] = {}
        # Keys of models that were loaded by their own names.
        self._by_name: set[str] = set()
        # Models that run on the CPU because the device asked for is missing, and why.
        self._on_cpu: dict[str, str] = {}
        self.pins = Pins(self.model_dir)

    # What there is

    @property
    def catalog(self) -> Catalog:
        """The built-in catalog under that of the model folder and the user's, read on first use.

        Raises:
            CatalogError: a file is wrong.
        """
        with self._lock:
            if self._catalog is None:
                from auto_voice.models.registry import catalog_schema as schema

                folder, own = self.model_dir / schema.FOLDER_CATALOG, self.settings.config
                files = [schema.builtin_catalog()]
                files += [folder] if folder.is_file() else []
                files += [own] if own is not None else []
                self._catalog = schema.load_catalog(files)
            return self._catalog

    @property
    def model_dir(self) -> Path:
        return self.settings.model_dir

    @property
    def store(self) -> ModelStore:
        """The model folder."""
        return self.loader.store

    @property
    def loader(self) -> ModelLoader:
        """What fetches files into the store."""
        with self._lock:
            if self._loader is None:
                from auto_voice.models.model_loader import ModelLoader
                from auto_voice.models.registry.fetchers import Mirrors
                from auto_voice.models.registry.store import ModelStore

                self._loader = ModelLoader(
                    ModelStore(self.model_dir),
                    offline=self.settings.offline,
                    mirrors=Mirrors(self.settings.mirrors, self.settings.mirror_token),
                    show_progress=None if callable(self._progress) else self._progress,
                    progress=self._progress if callable(self._progress) else None,
                )
            return self._loader

    def version(self, name: str, version: str | None = None) -> ModelVersion:
        """The record that a name means: the given version or alias, else the pin, else what the
        setting ``prefer`` makes of the default.

        Raises:
            UnknownModelError: no such model or version, or a pin asks for one that is gone.
            IntegrityError: a pin asks for other bytes than the catalog describes now.
        """
        name, version = split_key(name, version)
        pinned = self.pins.version(self.catalog, name) if version is None else None
        if pinned is not None or version is not None:
            return pinned or self.catalog.version(name, version)
        return self._preferred(self.catalog.version(name))

    def quickest(self, name: str) -> str:
        """``name@version`` of what a name means where time is short: the fastest version, unless a
        version, a pin or the setting ``prefer`` says which one.

        Raises:
            UnknownModelError, IntegrityError: see :meth:`version`.
        """
        meant = self.version(name)
        chosen = "@" in name or self.settings.origins["prefer"] != "default"
        if chosen or self.pins.version(self.catalog, meant.name) is not None:
            return meant.key
        return self._preferred(meant, "fastest").key

    def _preferred(self, default: ModelVersion, prefer: str = "") -> ModelVersion:
        """The version in place of ``default`` that ``prefer`` or the setting of it asks for."""
        prefer = prefer or self.settings.prefer
        if prefer == "exact":
            return default
        made = self.catalog.entry(default.name).quantised_of(default)
        choices = [default, *filter(self.is_obtainable, made)]
        if prefer == "smallest":
            return min(choices, key=lambda version: (version.needs.ram_mb, version.bytes))
        # Speeds are those of CPUs.
        if len(choices) == 1 or self._device(default) != "cpu":
            return default
        return max(choices, key=lambda v: v.quantised.speed if v.quantised is not None else 1.0)

    def in_space(self, name: str, space: str) -> ModelVersion | None:
        """The last version of a content encoder that speaks ``space``; None if none does.

        Raises:
            UnknownModelError: no such model.
        """
        return self.catalog.entry(split_key(name)[0]).in_space(space)

    def status(self) -> list[ModelStatus]:
        """Every version of the catalog and where it stands; a stale pin is a row's problem."""
        catalog, pins, loaded = self.catalog, self.pins.records(), set(self.loaded())
        rows = []
        for entry in catalog.models.values():
            problem = self.pins.problem(catalog, entry.name)
            meant = entry.default_version if problem else self.version(entry.name).version
            rows += [
                ModelStatus(
                    name=version.name,
                    version=version.version,
                    kind=version.kind,
                    description=entry.description,
                    licence=version.licence,
                    bytes=version.bytes,
                    default=version.version == meant,
                    pinned=pins.get(version.name, {}).get("version") == version.version,
                    installed=self.is_installed(version),
                    loaded=version.key in loaded,
                    problem=problem if version.version == meant else "",
                    ram_mb=version.needs.ram_mb,
                    quantised=version.quantised.to if version.quantised is not None else "",
                )
                for version in entry.versions.values()
            ]
        return rows

    # Files

    def is_installed(self, version: ModelVersion) -> bool:
        """Whether all files of a version are here, in the store or inside the package."""
        if not version.files or self.store.lookup(version) is not None:
            return True
        from auto_voice.models.registry.sources import bundled_files

        return bundled_files(version) is not None

    def is_obtainable(self, version: ModelVersion) -> bool:
        """Whether a version is here or has a source; one that was made here and removed has none
        any more."""
        from auto_voice.models.registry.sources import FileSource, parse_source

        def exists(uri: str) -> bool:
            source = parse_source(uri)
            return not isinstance(source, FileSource) or source.path.is_file()

        return self.is_installed(version) or all(
            any(all(map(exists, uris)) for uris in file.sources) for file in version.files
        )

    def pull(
        self, name: str, version: str | None = None, *, force: bool = False
    ) -> Mapping[str, Path]:
        """The files of a version by name, fetched and verified if they are not there.

        Args:
            force: fetch again even if they are.

        Raises:
            ModelUnavailableError: no source could serve them.
            IntegrityError: every source served other bytes.
            StoreError: the model folder cannot be used.
        """
        wanted = self.version(name, version)
        with self._recording():
            return self.loader.ensure(wanted, force=force) if wanted.files else {}

    def path(self, name: str, version: str | None = None, *, file: str | None = None) -> Path:
        """The path of a version's first file, or of ``file``; fetched if need be.

        Raises:
            UnknownModelError: the version has no such file.
        """
        wanted = self.version(name, version)
        names = [entry.file for entry in wanted.files]
        chosen = file if file is not None else next(iter(names), None)
        if chosen is None or chosen not in names:
            listed = f"its files: {', '.join(names)}" if names else "it has no files"
            raise UnknownModelError(f"{wanted.key} has no file {chosen or 'at all'}; {listed}")
        return self.pull(wanted.name, wanted.version)[chosen]

    def add(self, wanted: Addition) -> ModelVersion:
        """A model of one's own in the model folder: fetched, hashed, tried once and described.

        Raises:
            The same as ``additions.add_model``.
        """
        from auto_voice.models.additions import add_model

        added = add_model(wanted, self.catalog, self.loader)
        with self._lock:
            self._catalog = None
        self.pull(added.name, added.version)
        return added

    def pin(self, name: str, version: str | None = None) -> ModelVersion:
        """Make a bare ``name`` mean this version in this model folder, with these bytes.

        Raises:
            StoreError: the model folder cannot be written.
        """
        name, version = split_key(name, version)
        stale = version is None and self.pins.problem(self.catalog, name)
        wanted = self.catalog.version(name) if stale else self.version(name, version)
        self.pins.write(wanted.name, wanted)
        return wanted

    def unpin(self, name: str) -> None:
        """Let a bare ``name`` mean the catalog's default again."""
        self.pins.write(name, None)

    # Models

    def load(self, name: str, version: str | None = None) -> Any:
        """The loaded model, the same object for every caller; fetched first if need be.

        Args:
            name: ``name`` or ``name@version``.
            version: number or alias.

        Raises:
            UnknownModelError: no such model or version.
            ModelUnavailableError: it cannot be had and the fallback policy allows nothing else.
            ModelLoadError: its weights, the device or the memory do not fit.
            UnsafeFileError: a file would run code.
        """
        wanted = self.version(name, version)
        with self._recording():
            model = self._serve(wanted)
        events.emit(events.Resolve(name, self.resolved(wanted.key)))
        return model

    def _recording(self) -> AbstractContextManager[None]:
        """What happens inside goes into the record of the model folder, except by mocks."""
        if self.use_mock:
            return nullcontext()
        from auto_voice.models.registry.maintenance import UsageRecord, recorded

        with self._lock:
            self._usage = self._usage or UsageRecord(self.model_dir)
        return recorded(self._usage)

    def _serve(self, wanted: ModelVersion) -> Any:
        """The loaded model, or what stands in for it."""
        if self.use_mock:
            return self._mock(wanted)
        with self._lock:
            substitute = self._substitutes.get(wanted.key)
        if substitute is None:
            try:
                model = self._load(wanted)
                with self._lock:
                    self._by_name.add(wanted.key)
                return model
            except RECOVERABLE as error:
                substitute = self._substitute(wanted, error)
        return self._mock(wanted) if substitute.version is None else self._load(substitute.version)

    def load_installed(self, names: Iterable[str]) -> None:
        """Load those of the models that are on this machine side by side, on all cores.

        Downloads are left to :meth:`load`, where they take turns, and so is every failure.
        """
        versions = [] if self.use_mock else [self.version(name) for name in names]
        loaded = self.loaded()
        here = {v.key: v for v in versions if v.key not in loaded and self.is_installed(v)}
        if len(here) < 2:
            return

        def attempt(version: ModelVersion) -> None:
            with suppress(BaseException):
                self._load(version)

        # Threads that are joined and no pool: a worker that full memory ends leaves its future
        # open for ever. Where none can be started, the load takes its turn later.
        with self._recording(), ExitStack() as started, suppress(RuntimeError, MemoryError):
            for version in here.values():
                # Record, listener and trace are of the thread that asks.
                thread = threading.Thread(target=copy_context().run, args=(attempt, version))
                thread.start()
                started.callback(thread.join)

    def load_hubert(self, version: str | None = None) -> ContentEncoder:
        """HuBERT base: ``extract_features(audio)`` gives ``(batch, time, 768)``.

        No fallback changes that: there is a mock of it, and no other model's features pass for it.
        """
        model: ContentEncoder = self.load(HUBERT, version)
        return model

    def load_hifigan(self, version: str | None = None) -> Vocoder:
        """HiFi-GAN universal: ``synthesize(mel)`` gives audio at 22 050 Hz."""
        model: Vocoder = self.load("hifigan_universal", version)
        return model

    def load_speaker_encoder(self, version: str | None = None) -> SpeakerEncoderStage:
        """The GE2E encoder: ``embed_utterance(samples)`` gives ``(256,)`` of unit norm."""
        model: SpeakerEncoderStage = self.load("speaker_encoder", version)
        return model

    def resolved(self, name: str, version: str | None = None) -> str:
        """What really answers to a name: ``hifigan_universal@1.0``, or a substitute and why.

        Before the model was loaded it is what would be tried first.
        """
        wanted = self.version(name, version)
        if self.use_mock:
            return f"mock (use_mock, for {wanted.key})"
        with self._lock:
            substitute = self._substitutes.get(wanted.key)
            served = wanted if substitute is None else substitute.version
            device = self._on_cpu.get(served.key, "") if served is not None else ""
        told = wanted.key if substitute is None else str(substitute)
        return f"{told} ({device})" if device else told

    def is_mock(self, name: str, version: str | None = None) -> bool:
        """Whether a mock answers to the name."""
        return self.resolved(name, version).startswith("mock ")

    def loaded(self) -> tuple[str, ...]:
        """``name@version`` of what is in memory, least recently used first."""
        return self._cache.keys()

    def unload(self, name: str | None = None, version: str | None = None) -> None:
        """Forget a loaded model, or all of them; the next load tries the full model again.

        What stood in for the model goes, too, unless it is in use under another name.
        """
        if name is None:
            keys = [*self._cache.keys(), *self._cache.loading()]
            with self._lock:
                self._substitutes.clear()
                self._by_name.clear()
                self._on_cpu.clear()
        else:
            wanted = self.version(name, version)
            keys = [wanted.key, _mock_key(wanted)]
            with self._lock:
                substitute = self._substitutes.pop(wanted.key, None)
                self._by_name.discard(wanted.key)
                keys += self._unused(substitute)
                for key in keys:
                    self._on_cpu.pop(key, None)
        for key in keys:
            self._cache.drop(key)

    def _unused(self, substitute: Substitute | None) -> list[str]:
        """The key of what stood in for a model, if nothing else goes by it."""
        if substitute is None or substitute.version is None:
            return []
        key = substitute.version.key
        others = {s.version.key for s in self._substitutes.values() if s.version is not None}
        return [] if key in others | self._by_name else [key]

    def warmup_models(self, names: Iterable[str] | None = None) -> dict[str, WarmupTiming]:
        """Load models and run each once on real input; timings by name.

        Args:
            names: by default every stage of the default pipeline, what is loaded already, and
                HuBERT where it is on this machine or a mock.
        """
        return {name: self._warm(name) for name in (names or self._usual_names())}

    # How

    def _usual_names(self) -> list[str]:
        usual = list(PIPELINE_MODELS.values())
        # No stage of the usual ones, so a pin of it that is stale must not stop the others.
        stale = self.pins.problem(self.catalog, HUBERT)
        if not stale and (self.use_mock or self.is_installed(self.version(HUBERT))):
            usual.append(HUBERT)
        known = {self.version(name).key for name in usual}
        loaded = [key.removesuffix(_MOCK) for key in self.loaded()]
        return [*usual, *(key for key in loaded if key not in known)]

    def _warm(self, name: str) -> WarmupTiming:
        from auto_voice.models.registry.loading import WarmupTiming, run_once

        version = self.version(name)
        start = time.perf_counter()
        model = self.load(name)
        loaded = time.perf_counter()
        run_once(model, version)
        return WarmupTiming(self.resolved(name), loaded - start, time.perf_counter() - loaded)

    def _load(self, version: ModelVersion) -> Any:
        return self._cache.get(version.key, _megabytes(version), lambda: self._build(version))

    def _mock(self, version: ModelVersion) -> Any:
        from auto_voice.models.mock_models import build_mock

        def build() -> Any:
            with events.span(events.Load(_mock_key(version), "cpu")):
                return build_mock(version, not self.use_mock)

        return self._cache.get(_mock_key(version), 0, build)

    def _build(self, version: ModelVersion) -> Any:
        architecture = ARCHITECTURES[version.architecture]
        files = self.loader.ensure(version) if version.files else {}
        device = self._device(version)
        try:
            with events.span(events.Load(version.key, device, _megabytes(version))) as loading:
                files = self._with_safetensors(version, files) if files else files
                model = architecture.build(files, version, device)
                real = getattr(model, "device", device)
                loading.complete(device=str(real))
        except AutoVoiceError:
            raise
        except MemoryError as error:
            raise ModelLoadError(
                f"{version.key} does not fit into memory; unload other models, lower "
                "memory_budget_mb or choose a smaller model"
            ) from error
        except Exception as error:
            # Whatever a network library raises must not leave the registry as a foreign class.
            raise ModelLoadError(
                f"{version.key} could not be loaded on {device} ({type(error).__name__}: {error})"
            ) from error
        if real != device:
            with self._lock:
                self._on_cpu[version.key] = f"on the CPU, since {device} cannot run it"
        return model

    def _with_safetensors(
        self, version: ModelVersion, files: Mapping[str, Path]
    ) -> Mapping[str, Path]:
        from auto_voice.models.registry.architectures import with_safetensors

        convert = with_safetensors
        if version.quantised is not None and version.quantised.calibration:
            from auto_voice.models.runtime.quantise import derived_files as convert
        try:
            return convert(version, files, self.store)
        except IntegrityError as error:
            # Damage that neither size nor time betrayed, found before it was converted.
            log.warning("%s", error)
            return convert(version, self.loader.repair(version), self.store)

    def _device(self, version: ModelVersion) -> str:
        """Where ``version`` runs: on the CPU, with a note, if the device asked for is missing."""
        from auto_voice.models.runtime.devices import choose_device, parse_devices

        plan = parse_devices(self.settings.device)
        plan.check(self.catalog)
        wanted = plan.of(version)
        device = choose_device(wanted, version)
        movable = ARCHITECTURES[version.architecture].devices
        if device == "cpu" and movable and wanted not in ("auto", "cpu"):
            with self._lock:
                self._on_cpu[version.key] = f"on the CPU, since {wanted} is missing or too small"
        return device

    def _substitute(self, wanted: ModelVersion, error: AutoVoiceError) -> Substitute:
        """What the policy allows in place of ``wanted``; raises ``error`` if nothing."""
        policy = self.settings.fallback
        if policy == "none":
            raise error
        # One thread decides; the others, who failed with it, find its decision.
        with self._deciding:
            known = self._substitutes.get(wanted.key)
            if known is not None:
                return known
            version = self._stand_in(wanted)
            if version is None and policy != "mock":
                raise error
            chosen = Substitute(wanted, version, reason_of(error))
            with self._lock:
                self._substitutes[wanted.key] = chosen
        chosen.announce(error)
        return chosen

    def _stand_in(self, wanted: ModelVersion) -> ModelVersion | None:
        """The first model that does the work of ``wanted`` and loads, if any: an installed
        version of the same model, then the compact model of its kind.

        Where the user chose mocks, no other model comes before them.
        """
        others = self.settings.fallback == "compact"
        for version in self.catalog.stand_ins(wanted, others=others):
            if version.name == wanted.name and not self.is_installed(version):
                continue
            try:
                self._load(version)
                return version
            except RECOVERABLE as error:
                log.warning("%s cannot stand in for %s: %s", version.key, wanted.key, error)
        return None


# Ends the key of a mock in the cache.
_MOCK = " (mock)"


def _megabytes(version: ModelVersion) -> int:
    """What a version takes in memory, by its declared needs."""
    return version.needs.ram_mb or -(-version.bytes // 10**6)


def _mock_key(version: ModelVersion) -> str:
    return f"{version.key}{_MOCK}"
