"""``/v1/models``: which there are and where they stand; changing them needs a token."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from fastapi import Path as PathField

from auto_voice.errors import NotPermittedError
from auto_voice.server.context import Client, Here
from auto_voice.server.schemas import JobView, ModelList, ModelView

router = APIRouter(prefix="/v1/models")

Name = Annotated[str, PathField(max_length=80, examples=["hifigan_universal"])]
Version = Annotated[str | None, Query(max_length=40, examples=["1.0"])]


def may_change(here: Here) -> None:
    """Raises NotPermittedError on a server without a token (the gate has checked it elsewhere)."""
    if not here.settings.tokens:
        raise NotPermittedError(
            "Changing models over HTTP needs a token; start the server with --token-file FILE, or "
            "use `autovoice models` on its machine."
        )


@router.get("", summary="All models")
def listed(here: Here) -> ModelList:
    return ModelList(models=[ModelView(**model) for model in here.engine.models()])


@router.get("/{name}", summary="The versions of a model")
def show(here: Here, name: Name, version: Version = None) -> ModelList:
    return ModelList(models=[ModelView(**m) for m in here.engine.model(name, version)])


@router.post(
    "/{name}/pull",
    status_code=202,
    summary="Fetch a model's files",
    dependencies=[Depends(may_change)],
)
def pull(
    response: Response, here: Here, client: Client, name: Name, version: Version = None
) -> JobView:
    return _upkeep(response, here, client, "pull", name, version)


@router.post(
    "/{name}/warm",
    status_code=202,
    summary="Load a model and run it once",
    dependencies=[Depends(may_change)],
)
def warm(
    response: Response, here: Here, client: Client, name: Name, version: Version = None
) -> JobView:
    return _upkeep(response, here, client, "warm", name, version)


@router.post(
    "/{name}/unload",
    status_code=204,
    summary="Free a model's memory",
    dependencies=[Depends(may_change)],
)
def unload(here: Here, name: Name, version: Version = None) -> None:
    here.engine.unload(name, version)


def _upkeep(
    response: Response, here: Here, client: str, kind: str, name: str, version: str | None
) -> JobView:
    here.engine.model(name, version)
    job = here.upkeep(client, kind, {"model": name, "version": version}, name)
    response.headers["location"] = f"/v1/jobs/{job.id}"
    return JobView.of(job)
