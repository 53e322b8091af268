"""A PostgreSQL server of the tests: its own data, a free port, no other user's settings."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

# Debian's package keeps them out of PATH, one folder per version.
FOLDERS = (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), Path("/usr/bin"))
PASSWORD = "p@ss/word:of the tests"


def programs() -> Path | None:
    """The folder of ``initdb`` and ``pg_ctl``; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).parent
    return next((folder for folder in FOLDERS if (folder / "initdb").is_file()), None)


def _in_memory() -> Path | None:
    """A folder that no busy disk slows down, where there is room in one."""
    shared = Path("/dev/shm")
    is_fit = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 1_000_000_000
    return shared if is_fit else None


class PostgresServer:
    """Started at once; as another user where this one is root, which PostgreSQL refuses."""

    def __init__(self) -> None:
        found = programs()
        assert found is not None
        self._programs = found
        self._folder = Path(tempfile.mkdtemp(prefix="autovoice-postgres-", dir=_in_memory()))
        self._as: list[str] = []
        if os.geteuid() == 0:
            import pwd

            user = next(u for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody"))
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}",
                        "--clear-groups"]  # fmt: skip
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._call(
            "initdb", "--auth=scram-sha-256", f"--pwfile={secret}", "--username=autovoice",
            "--no-sync", "--encoding=UTF8", "--locale=C",
        )  # fmt: skip
        self._made = 0
        for tries_left in reversed(range(5)):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            try:
                self._start()
                break
            except AssertionError:  # another program took the port in between
                if not tries_left:
                    raise

    def _call(self, program: str, *args: str) -> None:
        command = [*self._as, str(self._programs / program), "-D", str(self._folder / "data")]
        with (self._folder / "calls.log").open("ab") as log:
            done = subprocess.run([*command, *args], cwd="/", stdout=log, stderr=log, timeout=120)
        assert done.returncode == 0, (self._folder / "calls.log").read_text()[-3000:]

    def start(self) -> None:
        """Start again; it answers when this returns."""
        for _ in range(20):
            try:
                return self._start()
            except AssertionError:  # another program's connection may have the port for a moment
                time.sleep(0.5)
        self._start()

    def _start(self) -> None:
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        )
        log = self._folder / "data" / "server.log"
        self._call("pg_ctl", "-w", "-l", str(log), "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """As if its machine lost power, by default."""
        self._call("pg_ctl", "-w", "-m", mode, "stop")

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql://autovoice:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """The URL of a new database."""
        import psycopg

        self._made += 1
        name = f"test_{self._made}"
        with psycopg.connect(self.url(), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
