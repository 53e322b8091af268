"""Runs downloads in children that a test can kill: imports once, then forks on each line.

Reads JSON lines ``{"root", "url", "sha256", "bytes", "children", "die_at"}`` and answers each
with the children's process ids, then with their exit statuses. ``die_at`` makes the child kill
itself just before its n-th fsync, rename or unlink, which is where a crash could leave a half.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def ensure(job: dict[str, Any]) -> None:
    import httpx2

    from auto_voice.models.model_loader import ModelDownloader, ModelLoader
    from auto_voice.models.registry.catalog import ModelFile, ModelVersion
    from auto_voice.models.registry.store import ModelStore

    file = ModelFile("weights.bin", ((job["url"],),), job["sha256"], job["bytes"])
    version = ModelVersion("toy", "1.0", "vocoder", "toy", (file,), "MIT")
    if job.get("die_at") is not None:
        arm(job["die_at"])
    store = ModelStore(job["root"])
    # Certificates cost 0.1 s to read, and the server of the tests has none.
    plain = httpx2.HTTPTransport(verify=False)
    loader = ModelLoader(store, downloader=ModelDownloader(store, transport=plain))
    path = loader.ensure(version)["weights.bin"]
    if path.stat().st_size != job["bytes"]:
        os._exit(3)


def arm(die_at: int) -> None:
    calls = 0

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return real(*args, **options)

        return call

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def main() -> None:
    import filelock  # noqa: F401
    import httpx2  # noqa: F401

    import auto_voice.models.model_loader  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for _ in range(job.get("children", 1)):
            pid = os.fork()
            if pid == 0:
                status = 2
                try:
                    ensure(job)
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    main()
