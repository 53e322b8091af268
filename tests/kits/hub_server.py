"""A local server that speaks as much of the hub's API as its own library asks for."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

from local_server import local_server

TOKEN = "hf_a_token_that_may_write"


@dataclass
class FakeHub:
    """Repositories as lists of commits; ``refs`` name them."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def commit(self, repo: str, files: dict[str, bytes], *refs: str) -> str:
        """A commit of whole ``files``, to which ``main`` and ``refs`` then point; its hash."""
        known = self.commits.setdefault(repo, {})
        parts = (str(len(known)).encode(), *(p.encode() + d for p, d in sorted(files.items())))
        sha = hashlib.sha1(b"".join(parts)).hexdigest()
        known[sha] = dict(files)
        for ref in ("main", *refs):
            self.refs.setdefault(repo, {})[ref] = sha
        return sha

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.refs.get(repo, {}).get(revision, revision)
        found = self.commits.get(repo, {}).get(sha)
        return None if found is None else (sha, found)


def _handler(hub: FakeHub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.asked.append(f"{self.command} {path}")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                found = hub.files(match[1], match[2])
                return self._json({"id": match[1], "sha": found[0]}) if found else self._missing()
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                found = hub.files(match[1], match[2])
                if match[1] in hub.gated and not self._may_write():
                    return self._json({"error": "gated"}, 403)
                if found is None or match[3] not in found[1]:
                    return self._missing()
                return self._bytes(found[1][match[3]])
            return self._missing()

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            hub.objects[self.path.rpartition("/")[2]] = self._body()
            self._bytes(b"")

        def do_POST(self) -> None:
            body, path = self._body(), self.path.partition("?")[0]
            hub.asked.append(f"POST {path}")
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if not self._may_write():
                return self._json({"error": "Invalid credentials"}, 401)
            if path == "/api/repos/create":
                given = json.loads(body)
                repo = f"{given.get('organization', 'me')}/{given['name']}"
                hub.commits.setdefault(repo, {})
                return self._json({"url": f"{hub.url}/{repo}", "id": repo, "name": repo})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
                large = (".safetensors", ".onnx")
                return self._json({"files": [
                    {"path": file["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
                    for file in json.loads(body)["files"]
                ]})  # fmt: skip
            if path.endswith(".git/info/lfs/objects/batch"):
                return self._json({"transfer": "basic", "objects": [
                    {"oid": one["oid"], "size": one["size"],
                     "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}}
                    for one in json.loads(body)["objects"]
                ]})  # fmt: skip
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
                return self._commit(match[1], body)
            return self._missing()

        def _commit(self, repo: str, body: bytes) -> None:
            known = hub.files(repo, "main")
            files = dict(known[1]) if known else {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
            sha = hub.commit(repo, files)
            url = f"{hub.url}/{repo}/commit/{sha}"
            self._json({"commitUrl": url, "commitOid": sha, "success": True, "hookOutput": ""})

        def _may_write(self) -> bool:
            return self.headers.get("authorization") == f"Bearer {TOKEN}"

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") == "chunked":
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def _missing(self) -> None:
            self._json({"error": "Repository or entry not found"}, 404)

        def _json(self, value: object, status: int = 200) -> None:
            self._bytes(json.dumps(value).encode(), status, "application/json")

        def _bytes(
            self, data: bytes, status: int = 200, kind: str = "application/octet-stream"
        ) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler


@contextlib.contextmanager
def hub_server() -> Iterator[FakeHub]:
    hub = FakeHub()
    with local_server(_handler(hub)) as port:
        hub.url = f"http://127.0.0.1:{port}"
        yield hub
