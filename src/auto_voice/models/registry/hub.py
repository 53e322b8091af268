"""The Hugging Face Hub: revisions that become commits, its cache on this machine, and models that
are repositories.

A repository that ``push`` made holds ``autovoice.yaml``, a catalog whose sources are paths inside
it, each version's files in a folder of their own, and a model card. Downloads need no library of
the hub; uploads do (the extra ``hub``).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from auto_voice.errors import (
    CatalogError,
    ConfigError,
    DownloadError,
    DownloadStatusError,
    IntegrityError,
    MissingDependencyError,
    ModelUnavailableError,
    OfflineError,
    UnsafeFileError,
    install_hint,
)
from auto_voice.filesystem import sha256_file
from auto_voice.models.registry.catalog import Catalog, ModelEntry, ModelFile, ModelVersion
from auto_voice.models.registry.fetchers import hub_endpoint, hub_token
from auto_voice.models.registry.sources import HubSource, parse_source

if TYPE_CHECKING:
    from auto_voice.models.registry.transfer import HttpTransfer

# The catalog of a repository.
CATALOG = "autovoice.yaml"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)(@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
)
_FILE_ADDRESS = re.compile(
    r"hf://(?P<repo>[A-Za-z0-9._-]+/[A-Za-z0-9._-]+)@(?P<revision>[A-Za-z0-9._-]+)/(?P<file>.+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A repository at a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    @staticmethod
    def of(address: str) -> Repository:
        """From ``hf://owner/repo[@revision]``.

        Raises:
            ConfigError: it is written otherwise.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ConfigError(
                f'"{address}" is no repository; write hf://owner/repo or hf://owner/repo@revision, '
                "where a revision is a branch, a tag or a commit."
            )
        return Repository(match["repo"], match["revision"] or "main")


# The hub's cache


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the hub's own tools keep what they fetched."""
    home = environ.get("HF_HOME") or str(
        Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named or Path(home) / "hub").expanduser()


def cached_file(source: HubSource, sha256: str = "") -> Path | None:
    """A file of the hub that its tools left here; its bytes are not hashed yet."""
    folder = cache_folder() / f"models--{source.repo.replace('/', '--')}"
    places = [folder / "snapshots" / source.commit / source.file]
    # Large files are named by their sha256, whatever commit they came with.
    places += [folder / "blobs" / sha256] if sha256 else []
    return next((path for path in places if path.is_file()), None)


def cached_copies(file: ModelFile) -> list[Path]:
    """Files of the hub's cache that should hold the bytes of ``file``."""
    sources = (parse_source(uris[0]) for uris in file.sources if len(uris) == 1)
    found = (cached_file(one, file.sha256) for one in sources if isinstance(one, HubSource))
    return list(dict.fromkeys(path for path in found if path is not None))


# Repositories that hold models


def commit_of(repository: Repository, transfer: HttpTransfer, *, offline: bool = False) -> str:
    """The commit that a branch or a tag means now.

    Raises:
        ConfigError: the hub knows no such repository or revision.
        OfflineError: the network is switched off and the hub's cache does not know it either.
        ModelUnavailableError: the hub cannot be reached.
    """
    repo, revision = repository.repo, repository.revision
    if _COMMIT.fullmatch(revision):
        return revision
    if offline:
        known = cache_folder() / f"models--{repo.replace('/', '--')}" / "refs" / revision
        if known.is_file() and _COMMIT.fullmatch(found := known.read_text("ascii").strip()):
            return found
        raise OfflineError(
            f"the network is switched off and the hub's cache does not know {revision} of {repo}: "
            "give the commit, or switch the network on."
        )
    url = f"{hub_endpoint()}/api/models/{repo}/revision/{quote(revision, safe='')}"
    answer = _read(url, repository, transfer)
    try:
        commit = json.loads(answer).get("sha", "")
    except (ValueError, AttributeError):
        commit = ""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ModelUnavailableError(f"{hub_endpoint()} named no commit for {revision} of {repo}.")
    return commit


def read_repository(
    repository: Repository, transfer: HttpTransfer, *, offline: bool = False
) -> dict[str, ModelEntry]:
    """The models of a repository by name, with sources pinned to a commit.

    Raises:
        ConfigError: there is no such repository, or it holds no catalog.
        CatalogError: its catalog breaks the rules.
        UnsafeFileError: its catalog names files of this machine.
        OfflineError, ModelUnavailableError: it cannot be had.
    """
    from auto_voice.models.registry.catalog_schema import read_catalog

    commit = commit_of(repository, transfer, offline=offline)
    text = _catalog_text(repository, commit, transfer, offline=offline)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / CATALOG
        path.write_bytes(text)
        try:
            entries = read_catalog([path])
        except CatalogError as error:
            said = str(error).replace(str(path), f"{CATALOG} of {repository.repo}")
            raise CatalogError(said) from error
        return {
            name: replace(
                entry,
                versions={
                    number: _pinned(version, path.parent, repository.repo, commit)
                    for number, version in entry.versions.items()
                },
            )
            for name, entry in entries.items()
        }


def _catalog_text(
    repository: Repository, commit: str, transfer: HttpTransfer, *, offline: bool
) -> bytes:
    here = cached_file(HubSource(repository.repo, commit, CATALOG))
    if here is not None:
        return here.read_bytes()
    if offline:
        raise OfflineError(
            f"{CATALOG} of {repository.repo} is not in the hub's cache and the network is switched "
            "off."
        )
    url = f"{hub_endpoint()}/{repository.repo}/resolve/{commit}/{CATALOG}"
    try:
        return _read(url, repository, transfer)
    except ConfigError as error:
        raise ConfigError(
            f"{repository.repo} holds no {CATALOG}; name one of its files and what it is: "
            f"autovoice models add NAME hf://{repository.repo}@{repository.revision}/FILE "
            "--architecture … --licence …"
        ) from error


def _read(url: str, repository: Repository, transfer: HttpTransfer) -> bytes:
    token = hub_token()
    try:
        return transfer.read(url, {"Authorization": f"Bearer {token}"} if token else {}).body
    except DownloadStatusError as error:
        what = f"{repository.revision} of {repository.repo}"
        # The hub answers 401 for what does not exist, too.
        if error.status in (401, 403, 404):
            raise ConfigError(
                f"the hub shows no {what} ({error.status}); check the name, and for a gated or "
                "private repository set HF_TOKEN or log in (hf auth login)."
            ) from error
        raise ModelUnavailableError(f"{what} cannot be read: {error}.") from error
    except DownloadError as error:
        raise ModelUnavailableError(
            f"{repository.repo} cannot be read: {error}; check the connection, or HF_ENDPOINT."
        ) from error


def _pinned(version: ModelVersion, folder: Path, repo: str, commit: str) -> ModelVersion:
    """``version`` with its paths inside the repository as addresses of one commit."""

    def address(uri: str) -> str:
        scheme = uri.partition("://")[0].lower()
        if "://" in uri and scheme not in ("file", "package"):
            return uri
        try:
            inside = Path(os.path.normpath(uri)).relative_to(folder)
        except ValueError:
            raise UnsafeFileError(
                f"{CATALOG} of {repo} names {uri}, a file of this machine: its sources may only be "
                "paths inside the repository or addresses."
            ) from None
        return f"hf://{repo}@{commit}/{inside.as_posix()}"

    files = tuple(
        replace(file, sources=tuple(tuple(map(address, uris)) for uris in file.sources))
        for file in version.files
    )
    return replace(version, files=files)


def add_repository(
    folder: Path,
    catalog: Catalog,
    repository: Repository,
    transfer: HttpTransfer,
    *,
    offline: bool = False,
) -> list[ModelVersion]:
    """Makes the catalog of a model folder describe what a repository holds.

    Returns:
        Every version of the repository, also those that were known with the same bytes.

    Raises:
        ConfigError: a version is known already with other bytes, or the model is of another kind.
        StoreError: the folder cannot be written.
        AutoVoiceError: as for :func:`read_repository`.
    """
    from auto_voice.models.registry.catalog_schema import extend_folder_catalog, fields_of

    entries = read_repository(repository, transfer, offline=offline)
    new: list[tuple[ModelEntry, ModelVersion]] = []
    for name, entry in entries.items():
        known = catalog.models.get(name)
        if known is not None and known.kind != entry.kind:
            raise ConfigError(f"{name} is a {known.kind} here and a {entry.kind} there.")
        for number, version in entry.versions.items():
            old = known.versions.get(number) if known is not None else None
            if old is None:
                new.append((entry, version))
            elif [f.sha256 for f in old.files] != [f.sha256 for f in version.files]:
                raise ConfigError(
                    f"there is another {version.key} already; {repository.repo} must give its own "
                    "another version, or another name."
                )
    for entry, version in new:
        about = {"kind": entry.kind}
        if entry.name not in catalog.models:
            about["description"] = entry.description
        sources = {file.file: file.sources for file in version.files}
        fields = fields_of(version, sources)
        extend_folder_catalog(folder, entry.name, version.version, about, fields)
    return [version for entry in entries.values() for version in entry.versions.values()]


def pinned(address: str, transfer: HttpTransfer, *, offline: bool = False) -> str:
    """``hf://owner/repo@revision/file`` with the commit that its branch or tag means now.

    What is no such address is returned as it is; a revision with a slash cannot be told from a
    folder.

    Raises:
        ConfigError, OfflineError, ModelUnavailableError: as for :func:`commit_of`.
    """
    match = _FILE_ADDRESS.fullmatch(address)
    if match is None:
        return address
    repository = Repository(match["repo"], match["revision"])
    commit = commit_of(repository, transfer, offline=offline)
    return f"hf://{repository.repo}@{commit}/{match['file']}"


# Publishing

# The hub's names of licences that models come with.
_LICENCES = {
    "mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "openrail", "gpl-3.0", "lgpl-3.0", "unlicense",
}  # fmt: skip
_TASKS = {
    "content": "feature-extraction",
    "speaker": "feature-extraction",
    "recogniser": "automatic-speech-recognition",
}
_CHECKPOINT = re.compile(r"(\.(pt|pth|bin|ckpt|tar|pkl|th))+$")


@dataclass(frozen=True)
class Publication:
    """What is uploaded.

    Attributes:
        repo: ``owner/repo``.
        version: of the model, with its files as they are there.
        files: path in the repository to the file here.
        models: the section ``models`` of the repository's catalog.
        card: its README.md.
    """

    repo: str
    version: ModelVersion
    files: Mapping[str, Path]
    models: Mapping[str, Any]
    card: str

    @property
    def catalog(self) -> str:
        """Its ``autovoice.yaml``."""
        import yaml

        return str(yaml.safe_dump({"schema": 1, "models": dict(self.models)}, sort_keys=False))


def prepare(
    entry: ModelEntry, version: ModelVersion, files: Mapping[str, Path], repo: str, about: str
) -> Publication:
    """A version as a repository holds it.

    Args:
        files: file name to path; foreign checkpoints as their safetensors form.
        about: Markdown on its data and figures, for the card.

    Raises:
        ConfigError: nothing is said of data and figures, or the version has no files.
        UnsafeFileError: a file that could hold more than numbers.
    """
    from auto_voice.models.registry.catalog_schema import fields_of

    if not version.files:
        raise ConfigError(f"{version.key} has no files that could be published.")
    if not about.strip():
        raise ConfigError(
            f"say what {version.key} was trained on and what was measured: --card FILE (Markdown)."
        )
    there, paths = [], {}
    for file in version.files:
        path = files[file.file]
        name = file.file
        if path.name != name:
            name = f"{_CHECKPOINT.sub('', name)}.safetensors"
        if _CHECKPOINT.search(name):
            raise UnsafeFileError(f"{name} may hold code; only safetensors and ONNX are published.")
        sha256 = sha256_file(path)
        if path.name == file.file and sha256 != file.sha256:
            raise IntegrityError(
                f"{path} does not match its sha256: run `autovoice models repair {version.key}`."
            )
        place = f"{version.version}/{name}"
        there.append(ModelFile(name, ((place,),), sha256, path.stat().st_size))
        paths[place] = path
    published = replace(version, files=tuple(there))
    fields = fields_of(published, {file.file: file.sources for file in there})
    models = {
        entry.name: {
            "kind": entry.kind,
            "description": entry.description,
            "versions": {version.version: fields},
        }
    }
    card = _card(entry, published, repo, about)
    return Publication(repo, published, paths, models, card)


def publish(publication: Publication, *, private: bool = False) -> str:
    """Uploads it in one commit, beside the versions that are there; the commit.

    Raises:
        MissingDependencyError: the extra ``hub`` is not installed.
        ConfigError: there is no token, the hub refuses it, or other bytes stand there as this
            version.
        ModelUnavailableError: the hub cannot be reached.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is not installed; run: {install_hint('hub')}"
        ) from error
    from auto_voice.models.registry.transfer import HttpTransfer

    token = hub_token()
    if not token:
        raise ConfigError(
            "publishing needs a token that may write: set HF_TOKEN, or hf auth login."
        )
    transfer = HttpTransfer()
    try:
        models = _beside(publication, transfer)
    finally:
        transfer.close()
    data: dict[str, Any] = {
        CATALOG: replace(publication, models=models).catalog.encode(),
        "README.md": publication.card.encode(),
        **{place: str(path) for place, path in publication.files.items()},
    }
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=hub_endpoint(), token=token)
    try:
        api.create_repo(publication.repo, private=private, exist_ok=True)
        done = api.create_commit(
            publication.repo,
            [CommitOperationAdd(place, what) for place, what in data.items()],
            commit_message=f"{publication.version.key}, published by auto_voice",
        )
    except HfHubHTTPError as error:
        said = str(error).strip().splitlines()[0]
        if getattr(error.response, "status_code", 0) in (401, 403):
            raise ConfigError(
                f"the hub does not let this token write {publication.repo}: {said}"
            ) from error
        raise ModelUnavailableError(f"the hub refused {publication.repo}: {said}") from error
    except (OSError, ValueError, RuntimeError) as error:
        why = error.__cause__ or error
        raise ModelUnavailableError(f"{publication.repo} was not published: {why}") from error
    except Exception as error:
        # The library lets its HTTP client's errors through, of which there were two by now.
        if not type(error).__module__.partition(".")[0].startswith(("http", "requests", "urllib")):
            raise
        raise ModelUnavailableError(
            f"{hub_endpoint()} cannot be reached ({error}); check the connection, or HF_ENDPOINT."
        ) from error
    return str(done.oid)


def _beside(publication: Publication, transfer: HttpTransfer) -> Mapping[str, Any]:
    """The section ``models`` with what the repository describes already."""
    import yaml

    repository = Repository(publication.repo)
    try:
        commit = commit_of(repository, transfer)
        there = yaml.safe_load(_catalog_text(repository, commit, transfer, offline=False))
    except ConfigError:  # It is new.
        return publication.models
    models = dict(there.get("models", {})) if isinstance(there, dict) else {}
    version = publication.version
    (name,) = publication.models
    mine = publication.models[name]
    known = models.get(name) or {**mine, "versions": {}}
    old, new = known["versions"].get(version.version), mine["versions"][version.version]
    if old is not None and _hashes(old) != _hashes(new):
        raise ConfigError(
            f"{publication.repo} holds another {version.key} already; give yours another version."
        )
    models[name] = {**known, "versions": {**known["versions"], version.version: new}}
    return models


def _hashes(fields: Mapping[str, Any]) -> Sequence[str]:
    return [str(file["sha256"]) for file in fields.get("files", [])]


def _card(entry: ModelEntry, version: ModelVersion, repo: str, about: str) -> str:
    licence = version.licence.lower()
    known = licence in _LICENCES
    lines = ["---", f"license: {licence if known else 'other'}"]
    if not known:
        lines.append(f"license_name: {re.sub(r'[^a-z0-9.]+', '-', licence).strip('-')}")
    lines += [
        "library_name: auto_voice",
        f"pipeline_tag: {_TASKS.get(entry.kind, 'audio-to-audio')}",
        "tags:",
        "- voice-conversion",
        f"- {entry.kind}",
        "---",
        "",
        f"# {version.key}",
        "",
        f"{entry.description.rstrip('.')}. A {entry.kind} of auto_voice (architecture "
        f"`{version.architecture}`), under {version.licence}.",
        "",
        "```sh",
        f"autovoice models add hf://{repo}",
        "```",
        "",
        "| file | bytes | sha256 |",
        "|---|---|---|",
        *(f"| `{file.sources[0][0]}` | {file.bytes} | `{file.sha256}` |" for file in version.files),
        "",
    ]
    if version.params:
        lines += ["| parameter | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in version.params.items()]
        lines.append("")
    return "\n".join(lines) + f"\n## Data and figures\n\n{about.strip()}\n"
