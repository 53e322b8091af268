"""Jobs in one SQLite file: committed to disk before the client hears that its job was accepted."""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auto_voice.errors import BusyError, ConfigError, UnknownJobError
from auto_voice.server.jobs import (
    CANCELLED,
    DONE,
    FAILED,
    FINISHED,
    QUEUED,
    RUNNING,
    Claim,
    Depth,
    Item,
    Job,
    Limits,
    NewJob,
    Record,
    state_of,
)

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, client TEXT NOT NULL, kind TEXT NOT NULL, lane TEXT NOT NULL,
    state TEXT NOT NULL, request TEXT NOT NULL, direct INTEGER NOT NULL, key TEXT,
    keep_seconds REAL NOT NULL, created REAL NOT NULL, started REAL, finished REAL, expires REAL,
    bytes INTEGER NOT NULL DEFAULT 0, UNIQUE (client, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, idx INTEGER NOT NULL,
    name TEXT NOT NULL, state TEXT NOT NULL, progress REAL NOT NULL DEFAULT 0,
    error TEXT, result TEXT, attempts INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (job, idx)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_state ON items (state);
CREATE TABLE IF NOT EXISTS clients (client TEXT PRIMARY KEY, served INTEGER NOT NULL)
WITHOUT ROWID;
"""
_NEXT = """
SELECT i.job, i.idx FROM items i JOIN jobs j ON j.id = i.job
WHERE i.state = 'queued' AND j.lane = ?
ORDER BY
  (SELECT COUNT(*) FROM items r JOIN jobs k ON k.id = r.job
   WHERE r.state = 'running' AND k.client = j.client),
  COALESCE((SELECT served FROM clients c WHERE c.client = j.client), 0),
  j.direct DESC, j.created, i.job, i.idx
LIMIT 1
"""
_WAITING = """
SELECT COUNT(*), COALESCE(SUM(j.client = ?), 0) FROM items i JOIN jobs j ON j.id = i.job
WHERE i.state = 'queued' AND j.direct = ?
"""
# Assumed for Retry-After before anything was measured.
_SECONDS_PER_ITEM = 5.0


class SqliteJobStore:
    """A :class:`~auto_voice.server.jobs.JobStore` for one server process.

    Args:
        path: of the database, made if missing.
        workers: how many claim at the same time, for the estimate in Retry-After.
    """

    def __init__(self, path: Path, workers: int = 1) -> None:
        self._lock = threading.Lock()
        self._workers = workers
        self._pace = _SECONDS_PER_ITEM
        self._begun: dict[tuple[str, int], float] = {}
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            # FULL: a commit survives a power cut, not only the death of the process.
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if found not in (0, SCHEMA_VERSION):
                self._db.close()
                raise ConfigError(
                    f"{path} was made by another version of auto_voice; start the server with "
                    "another --data-dir, or remove the file together with its jobs."
                )
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise ConfigError(f"the job database {path} cannot be used: {error}.") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def add(self, job: NewJob, limits: Limits) -> Job:
        now = time.time()
        with self._transaction() as db:
            if job.key:
                earlier = self._by_key(db, job.client, job.key)
                if earlier is not None:
                    return earlier
            self._check(db, job.client, job.direct, len(job.names), limits)
            db.execute(
                "INSERT INTO jobs (id, client, kind, lane, state, request, direct, key,"
                " keep_seconds, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.client, job.kind, job.lane, QUEUED, json.dumps(dict(job.request)),
                 job.direct, job.key or None, job.keep_seconds, now),
            )  # fmt: skip
            db.executemany(
                "INSERT INTO items (job, idx, name, state) VALUES (?, ?, ?, ?)",
                [(job.id, index, name, QUEUED) for index, name in enumerate(job.names)],
            )
            return self._get(db, job.id)

    def check(self, client: str, direct: bool, limits: Limits) -> None:
        with self._lock:
            self._check(self._db, client, direct, 1, limits)

    def _check(
        self, db: sqlite3.Connection, client: str, direct: bool, more: int, limits: Limits
    ) -> None:
        waiting, own = db.execute(_WAITING, (client, direct)).fetchone()
        most, most_own = (
            (limits.direct, limits.direct_client)
            if direct
            else (limits.queued, limits.queued_client)
        )
        what = "direct requests" if direct else "recordings"
        if own + more > most_own:
            raise BusyError(
                f"{own} of your {what} already wait and {most_own} may; try again later.",
                self._retry_after(own),
                429,
            )
        if waiting + more > most:
            raise BusyError(
                f"The server is busy: {waiting} {what} wait and {most} may; try again later.",
                self._retry_after(waiting),
            )

    def _retry_after(self, waiting: int) -> int:
        """Seconds until about half of the queue is done."""
        return max(1, min(600, math.ceil(self._pace * max(1, waiting) / 2 / self._workers)))

    def find(self, client: str, key: str) -> Job | None:
        with self._lock:
            return self._by_key(self._db, client, key)

    def _by_key(self, db: sqlite3.Connection, client: str, key: str) -> Job | None:
        row = db.execute("SELECT id FROM jobs WHERE client = ? AND key = ?", (client, key))
        found = row.fetchone()
        return None if found is None else self._get(db, found[0])

    def get(self, job_id: str) -> Job:
        with self._lock:
            return self._get(self._db, job_id)

    def _get(self, db: sqlite3.Connection, job_id: str) -> Job:
        row = db.execute(
            "SELECT client, kind, state, request, direct, created, started, finished, expires"
            " FROM jobs WHERE id = ?",
            (job_id,),
        ).fetchone()
        if row is None:
            raise UnknownJobError("There is no such job; it may have expired.")
        client, kind, state, request, direct, created, started, finished, expires = row
        items = db.execute(
            "SELECT idx, name, state, progress, error, result, attempts FROM items"
            " WHERE job = ? ORDER BY idx",
            (job_id,),
        ).fetchall()
        return Job(
            job_id,
            client,
            kind,
            state,
            json.loads(request),
            bool(direct),
            created,
            started,
            finished,
            expires,
            tuple(
                Item(idx, name, s, progress, _loads(error), _loads(result), attempts)
                for idx, name, s, progress, error, result, attempts in items
            ),
        )

    def listed(self, client: str, limit: int) -> list[Job]:
        with self._lock:
            rows = self._db.execute(
                "SELECT id FROM jobs WHERE client = ? AND NOT direct ORDER BY created DESC LIMIT ?",
                (client, limit),
            ).fetchall()
            return [self._get(self._db, row[0]) for row in rows]

    def claim(self, lane: str) -> Claim | None:
        now = time.time()
        with self._transaction() as db:
            row = db.execute(_NEXT, (lane,)).fetchone()
            if row is None:
                return None
            job_id, index = row
            db.execute(
                "UPDATE items SET state = ?, attempts = attempts + 1 WHERE job = ? AND idx = ?",
                (RUNNING, job_id, index),
            )
            db.execute(
                "UPDATE jobs SET state = ?, started = COALESCE(started, ?) WHERE id = ?",
                (RUNNING, now, job_id),
            )
            job = self._get(db, job_id)
            turn = db.execute("SELECT COALESCE(MAX(served), 0) + 1 FROM clients").fetchone()[0]
            db.execute(
                "INSERT INTO clients VALUES (?, ?) ON CONFLICT (client) DO UPDATE SET"
                " served = excluded.served",
                (job.client, turn),
            )
            self._begun[job_id, index] = time.monotonic()
            return Claim(job, next(item for item in job.items if item.index == index))

    def report(self, job_id: str, index: int, progress: float) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE items SET progress = ? WHERE job = ? AND idx = ? AND state = ?",
                (progress, job_id, index, RUNNING),
            )

    def others_wait(self, job_id: str) -> bool:
        with self._lock:
            found = self._db.execute(
                "SELECT 1 FROM items i JOIN jobs j ON j.id = i.job, jobs own"
                " WHERE own.id = ? AND i.state = ? AND j.lane = own.lane"
                " AND (j.direct OR j.client != own.client) LIMIT 1",
                (job_id, QUEUED),
            ).fetchone()
        return found is not None

    def finish(
        self, job_id: str, index: int, *, result: Record | None = None, error: Record | None = None
    ) -> Job:
        state = DONE if error is None else FAILED
        with self._transaction() as db:
            begun = self._begun.pop((job_id, index), None)
            if begun is not None and state == DONE:
                self._pace += 0.2 * (time.monotonic() - begun - self._pace)
            changed = db.execute(
                "UPDATE items SET state = ?, progress = 1, result = ?, error = ?"
                " WHERE job = ? AND idx = ? AND state = ?",
                (state, _dumps(result), _dumps(error), job_id, index, RUNNING),
            ).rowcount
            if changed and result:
                db.execute(
                    "UPDATE jobs SET bytes = bytes + ? WHERE id = ?",
                    (int(result.get("bytes", 0)), job_id),
                )
            return self._settle(db, job_id)

    def _settle(self, db: sqlite3.Connection, job_id: str) -> Job:
        """Bring the job's state in line with its items'."""
        rows = db.execute("SELECT state FROM items WHERE job = ?", (job_id,)).fetchall()
        state = state_of([row[0] for row in rows])
        now = time.time() if state in FINISHED else None
        db.execute(
            "UPDATE jobs SET state = ?, finished = COALESCE(finished, ?),"
            " expires = COALESCE(expires, ? + keep_seconds) WHERE id = ?",
            (state, now, now, job_id),
        )
        return self._get(db, job_id)

    def release(self, job_id: str, index: int) -> None:
        with self._transaction() as db:
            self._begun.pop((job_id, index), None)
            db.execute(
                "UPDATE items SET state = ?, attempts = attempts - 1"
                " WHERE job = ? AND idx = ? AND state = ?",
                (QUEUED, job_id, index, RUNNING),
            )
            self._settle(db, job_id)

    def cancel(self, job_id: str) -> Job:
        with self._transaction() as db:
            db.execute(
                "UPDATE items SET state = ? WHERE job = ? AND state IN (?, ?)",
                (CANCELLED, job_id, QUEUED, RUNNING),
            )
            return self._settle(db, job_id)

    def recover(self, most_attempts: int) -> tuple[int, int]:
        died = {
            "type": "ServerError",
            "status": 500,
            "message": f"The server stopped unexpectedly {most_attempts} times while it worked on "
            "this recording, so it is not tried again.",
        }
        with self._transaction() as db:
            touched = db.execute(
                "SELECT DISTINCT job FROM items WHERE state = ?", (RUNNING,)
            ).fetchall()
            direct = db.execute("SELECT id FROM jobs WHERE direct AND finished IS NULL").fetchall()
            db.execute(
                "UPDATE items SET state = ? WHERE state IN (?, ?)"
                " AND job IN (SELECT id FROM jobs WHERE direct)",
                (CANCELLED, QUEUED, RUNNING),
            )
            failed = db.execute(
                "UPDATE items SET state = ?, error = ? WHERE state = ? AND attempts >= ?",
                (FAILED, json.dumps(died), RUNNING, most_attempts),
            ).rowcount
            queued = db.execute(
                "UPDATE items SET state = ?, progress = 0 WHERE state = ?", (QUEUED, RUNNING)
            ).rowcount
            for row in {*touched, *direct}:
                self._settle(db, row[0])
            return queued, failed

    def expired(self, now: float, keep_bytes: int) -> list[str]:
        with self._lock:
            rows = self._db.execute(
                "SELECT id, bytes, expires FROM jobs WHERE finished IS NOT NULL"
                " ORDER BY finished DESC"
            ).fetchall()
        gone, total = [], 0
        for job_id, size, expires in rows:
            total += size
            if expires <= now or (size and total > keep_bytes):
                gone.append(job_id)
        return gone

    def remove(self, job_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            db.execute("DELETE FROM clients WHERE client NOT IN (SELECT client FROM jobs)")

    def ids(self) -> set[str]:
        with self._lock:
            return {row[0] for row in self._db.execute("SELECT id FROM jobs")}

    def depth(self) -> Depth:
        with self._lock:
            rows = self._db.execute(
                "SELECT i.state, j.direct, COUNT(*) FROM items i JOIN jobs j ON j.id = i.job"
                " WHERE i.state IN (?, ?) GROUP BY 1, 2",
                (QUEUED, RUNNING),
            ).fetchall()
        count = {(state, bool(direct)): n for state, direct, n in rows}
        return Depth(
            direct=count.get((QUEUED, True), 0),
            queued=count.get((QUEUED, False), 0),
            running=count.get((RUNNING, True), 0) + count.get((RUNNING, False), 0),
        )

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _loads(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _dumps(value: Record | None) -> str | None:
    return None if value is None else json.dumps(dict(value))
