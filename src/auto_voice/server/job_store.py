"""The queue in SQLite, for one server: committed to disk before the client hears of acceptance."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from auto_voice.errors import ConfigError, UnknownJobError
from auto_voice.server.jobs import (
    CANCELLED,
    DONE,
    FAILED,
    FINISHED,
    JOB_TURN,
    QUEUED,
    RUNNING,
    SECONDS_PER_ITEM,
    Claim,
    JobItem,
    JobRecord,
    JobRequest,
    JobStore,
    JobStoreError,
    Json,
    QueueDepth,
    QueueLimits,
    check_digest,
    check_limits,
    expired_of,
    gave_up,
    json_text,
    json_value,
    seconds_until_half,
    state_of,
)

# Layout of the database; one of another is refused.
SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, client TEXT NOT NULL, kind TEXT NOT NULL, lane TEXT NOT NULL,
    state TEXT NOT NULL, request TEXT NOT NULL, direct INTEGER NOT NULL, key TEXT,
    digest TEXT NOT NULL, keep_seconds REAL NOT NULL, created REAL NOT NULL, started REAL,
    finished REAL, expires REAL, bytes INTEGER NOT NULL DEFAULT 0, UNIQUE (client, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE, idx INTEGER NOT NULL,
    name TEXT NOT NULL, state TEXT NOT NULL, progress REAL NOT NULL DEFAULT 0,
    error TEXT, result TEXT, attempts INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (job, idx)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_by_state ON items (state);
CREATE TABLE IF NOT EXISTS clients (client TEXT PRIMARY KEY, served INTEGER NOT NULL)
WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns (only_row INTEGER PRIMARY KEY, turn INTEGER NOT NULL);
INSERT INTO turns VALUES (1, 0) ON CONFLICT DO NOTHING;
"""
# Direct requests wait in one line, first come, first served, so that their wait has a bound.
# Items of jobs go to the client with the least running, then to the one served longest ago.
_NEXT = """
SELECT i.job, i.idx FROM items i JOIN jobs j ON j.id = i.job
WHERE i.state = 'queued' AND j.lane = ?
ORDER BY
  CASE WHEN j.direct = ? THEN 0 ELSE 1 END,
  CASE WHEN j.direct = 1 THEN j.created END,
  (SELECT COUNT(*) FROM items r JOIN jobs k ON k.id = r.job
   WHERE r.state = 'running' AND k.client = j.client),
  COALESCE((SELECT served FROM clients c WHERE c.client = j.client), 0),
  j.created, i.job, i.idx
LIMIT 1
"""
_WAITING = """
SELECT COUNT(*), COUNT(CASE WHEN j.client = ? THEN 1 END)
FROM items i JOIN jobs j ON j.id = i.job
WHERE i.state = 'queued' AND j.direct = ?
"""


class SqliteDatabase:
    """One SQLite file for one server process.

    Args:
        path: of the database, made if missing.

    Raises:
        ConfigError: it cannot be used, is damaged, or was made by another version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self.problem = ""
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
            check = str(self._db.execute("PRAGMA quick_check(1)").fetchone()[0])
            if check != "ok":
                self._db.close()
                raise ConfigError(_damaged(path, check.splitlines()[-1]))
            self._db.executescript(_SCHEMA)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.DatabaseError as error:
            if hasattr(self, "_db"):
                self._db.close()
            if isinstance(error, sqlite3.OperationalError):
                text = f"the job database {path} cannot be used ({error}); name another --data-dir."
                raise ConfigError(text) from error
            raise ConfigError(_damaged(path, str(error))) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it happens or none; transactions follow one another.

        Raises:
            JobStoreError: the database says no; ``problem`` tells why until it works again.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
                self.problem = ""
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self.problem = f"the job database cannot be used ({error})"
                raise JobStoreError(
                    f"The server's job database cannot be used ({error}); try again later."
                ) from error

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    def __del__(self) -> None:
        # An app that is made and never run has nobody who closes its database.
        if hasattr(self, "_db"):
            self._db.close()


def _damaged(path: Path, how: str) -> str:
    return (
        f"the job database {path} is damaged ({how}); move it away, and its jobs are lost, or "
        "start the server with another --data-dir."
    )


class SqliteJobStore(JobStore):
    """The kept jobs in one SQLite file.

    Args:
        path: of the database, made if missing.
        workers: how many claim at the same time, for the estimate in Retry-After.

    Raises:
        ConfigError: it cannot be used, is damaged, or was made by another version.
    """

    def __init__(self, path: Path, workers: int = 1) -> None:
        self._database = SqliteDatabase(path)
        self._workers = workers
        self._pace = SECONDS_PER_ITEM
        self._begun: dict[tuple[str, int], float] = {}

    @property
    def problem(self) -> str:
        return self._database.problem

    def add(self, job: JobRequest, limits: QueueLimits) -> JobRecord:
        now = time.time()
        with self._database.transaction() as db:
            if job.key and (earlier := self._by_key(db, job.client, job.key, job.digest)):
                return earlier
            self._check(db, job.client, job.direct, len(job.names), limits)
            self._arrive(db, job.client)
            db.execute(
                "INSERT INTO jobs (id, client, kind, lane, state, request, direct, key, digest,"
                " keep_seconds, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (job.id, job.client, job.kind, job.lane, QUEUED, json.dumps(dict(job.request)),
                 int(job.direct), job.key or None, job.digest, job.keep_seconds, now),
            )  # fmt: skip
            db.executemany(
                "INSERT INTO items (job, idx, name, state) VALUES (?, ?, ?, ?)",
                [(job.id, index, name, QUEUED) for index, name in enumerate(job.names)],
            )
            return self._get(db, job.id)

    def _arrive(self, db: sqlite3.Connection, client: str) -> None:
        """Put a client with nothing to do behind all who wait, before the one served last.

        Newcomers would else overtake everybody, and a stream of them would keep the others
        waiting for ever.
        """
        has_work = db.execute(
            "SELECT 1 FROM items i JOIN jobs j ON j.id = i.job"
            " WHERE j.client = ? AND i.state IN (?, ?) LIMIT 1",
            (client, QUEUED, RUNNING),
        ).fetchone()
        if has_work is None:
            db.execute(
                "INSERT INTO clients SELECT ?, turn - 1 FROM turns WHERE true"
                " ON CONFLICT (client) DO UPDATE SET served = excluded.served",
                (client,),
            )

    def check(self, client: str, direct: bool, limits: QueueLimits) -> None:
        with self._database.transaction() as db:
            self._check(db, client, direct, 1, limits)

    def _check(
        self, db: sqlite3.Connection, client: str, direct: bool, more: int, limits: QueueLimits
    ) -> None:
        waiting, own = db.execute(_WAITING, (client, int(direct))).fetchone()
        check_limits(limits, direct, (waiting, own), more, self._retry_after)

    def _retry_after(self, waiting: int) -> int:
        return seconds_until_half(waiting, self._pace, self._workers)

    def find(self, client: str, key: str, digest: str) -> JobRecord | None:
        with self._database.transaction() as db:
            return self._by_key(db, client, key, digest)

    def _by_key(
        self, db: sqlite3.Connection, client: str, key: str, digest: str
    ) -> JobRecord | None:
        found = db.execute(
            "SELECT id, digest FROM jobs WHERE client = ? AND key = ?", (client, key)
        ).fetchone()
        if found is None:
            return None
        check_digest(found[1], digest)
        return self._get(db, found[0])

    def get(self, job_id: str) -> JobRecord:
        with self._database.transaction() as db:
            return self._get(db, job_id)

    def _get(self, db: sqlite3.Connection, job_id: str) -> JobRecord:
        row = db.execute(
            "SELECT client, kind, state, request, direct, created, started, finished, expires"
            " FROM jobs WHERE id = ?",
            (job_id,),
        ).fetchone()
        if row is None:
            raise UnknownJobError
        client, kind, state, request, direct, created, started, finished, expires = row
        items = db.execute(
            "SELECT idx, name, state, progress, error, result, attempts FROM items"
            " WHERE job = ? ORDER BY idx",
            (job_id,),
        ).fetchall()
        return JobRecord(
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
                JobItem(idx, name, s, progress, json_value(error), json_value(result), attempts)
                for idx, name, s, progress, error, result, attempts in items
            ),
        )

    def listed(self, client: str, limit: int) -> list[JobRecord]:
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT id FROM jobs WHERE client = ? AND direct = 0 ORDER BY created DESC LIMIT ?",
                (client, limit),
            ).fetchall()
            return [self._get(db, row[0]) for row in rows]

    def claim(self, lane: str) -> Claim | None:
        now = time.time()
        with self._database.transaction() as db:
            turn = int(db.execute("SELECT turn FROM turns").fetchone()[0]) + 1
            direct_first = int(turn % JOB_TURN != 0)
            row = db.execute(_NEXT, (lane, direct_first)).fetchone()
            if row is None:
                return None
            db.execute("UPDATE turns SET turn = ?", (turn,))
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
            db.execute(
                "INSERT INTO clients VALUES (?, ?) ON CONFLICT (client) DO UPDATE SET"
                " served = excluded.served",
                (job.client, turn),
            )
            self._begun[job_id, index] = time.monotonic()
            return Claim(job, next(item for item in job.items if item.index == index))

    def report(self, claim: Claim, progress: float) -> None:
        with self._database.transaction() as db:
            db.execute(
                "UPDATE items SET progress = ? WHERE job = ? AND idx = ? AND state = ?",
                (progress, claim.job.id, claim.item.index, RUNNING),
            )

    def others_wait(self, job_id: str) -> bool:
        with self._database.transaction() as db:
            found = db.execute(
                "SELECT 1 FROM items i JOIN jobs j ON j.id = i.job, jobs own"
                " WHERE own.id = ? AND i.state = ? AND j.lane = own.lane"
                " AND (j.direct = 1 OR j.client != own.client) LIMIT 1",
                (job_id, QUEUED),
            ).fetchone()
        return found is not None

    def finish(
        self, claim: Claim, *, result: Json | None = None, error: Json | None = None
    ) -> JobRecord:
        job_id, index = claim.job.id, claim.item.index
        state = DONE if error is None else FAILED
        with self._database.transaction() as db:
            begun = self._begun.pop((job_id, index), None)
            if begun is not None and state == DONE:
                self._pace += 0.2 * (time.monotonic() - begun - self._pace)
            changed = db.execute(
                "UPDATE items SET state = ?, progress = 1, result = ?, error = ?"
                " WHERE job = ? AND idx = ? AND state = ?",
                (state, json_text(result), json_text(error), job_id, index, RUNNING),
            ).rowcount
            if changed and result:
                db.execute(
                    "UPDATE jobs SET bytes = bytes + ? WHERE id = ?",
                    (int(result.get("bytes", 0)), job_id),
                )
            return self._settle(db, job_id)

    def _settle(self, db: sqlite3.Connection, job_id: str) -> JobRecord:
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

    def release(self, claim: Claim) -> None:
        job_id, index = claim.job.id, claim.item.index
        with self._database.transaction() as db:
            self._begun.pop((job_id, index), None)
            db.execute(
                "UPDATE items SET state = ?, attempts = attempts - 1, progress = 0"
                " WHERE job = ? AND idx = ? AND state = ?",
                (QUEUED, job_id, index, RUNNING),
            )
            self._settle(db, job_id)

    def cancel(self, job_id: str) -> JobRecord:
        with self._database.transaction() as db:
            db.execute(
                "UPDATE items SET state = ? WHERE job = ? AND state IN (?, ?)",
                (CANCELLED, job_id, QUEUED, RUNNING),
            )
            return self._settle(db, job_id)

    def recover(self, most_attempts: int) -> tuple[int, int]:
        with self._database.transaction() as db:
            touched = db.execute(
                "SELECT DISTINCT job FROM items WHERE state = ?", (RUNNING,)
            ).fetchall()
            direct = db.execute(
                "SELECT id FROM jobs WHERE direct = 1 AND finished IS NULL"
            ).fetchall()
            db.execute(
                "UPDATE items SET state = ? WHERE state IN (?, ?)"
                " AND job IN (SELECT id FROM jobs WHERE direct = 1)",
                (CANCELLED, QUEUED, RUNNING),
            )
            failed = db.execute(
                "UPDATE items SET state = ?, error = ? WHERE state = ? AND attempts >= ?",
                (FAILED, json.dumps(gave_up(most_attempts)), RUNNING, most_attempts),
            ).rowcount
            queued = db.execute(
                "UPDATE items SET state = ?, progress = 0 WHERE state = ?", (QUEUED, RUNNING)
            ).rowcount
            for row in {*touched, *direct}:
                self._settle(db, row[0])
            return queued, failed

    def expired(self, keep_bytes: int) -> list[str]:
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT id, bytes, expires FROM jobs WHERE finished IS NOT NULL"
                " ORDER BY finished DESC"
            ).fetchall()
        return expired_of(rows, time.time(), keep_bytes)

    def remove(self, job_id: str) -> None:
        with self._database.transaction() as db:
            db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            db.execute("DELETE FROM clients WHERE client NOT IN (SELECT client FROM jobs)")

    def ids(self) -> set[str]:
        with self._database.transaction() as db:
            return {row[0] for row in db.execute("SELECT id FROM jobs")}

    def depth(self) -> QueueDepth:
        with self._database.transaction() as db:
            rows = db.execute(
                "SELECT i.state, j.direct, COUNT(*) FROM items i JOIN jobs j ON j.id = i.job"
                " WHERE i.state IN (?, ?) GROUP BY 1, 2",
                (QUEUED, RUNNING),
            ).fetchall()
        count = {(state, bool(direct)): n for state, direct, n in rows}
        return QueueDepth(
            direct=count.get((QUEUED, True), 0),
            queued=count.get((QUEUED, False), 0),
            running=count.get((RUNNING, True), 0) + count.get((RUNNING, False), 0),
        )

    def close(self) -> None:
        self._database.close()
