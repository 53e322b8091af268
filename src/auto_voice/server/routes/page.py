"""The web page: three files of this package, no build step, nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

from auto_voice.errors import UnknownJobError

router = APIRouter(include_in_schema=False)

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "audio.js": "text/javascript; charset=utf-8",
    "views.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


@router.get("/")
def index() -> Response:
    return _file("index.html")


@router.get("/page/{name}")
def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in FILES:
        raise UnknownJobError("There is no such page.")
    data = files("auto_voice.server").joinpath("page").joinpath(name).read_bytes()
    return Response(data, media_type=FILES[name], headers={"cache-control": "no-cache"})
