"""The queue in PostgreSQL, for several servers and workers on any number of machines.

Every process gives signs of life (:meth:`PostgresJobStore.beat`). What a process was doing that
has given none for a lease is taken up by another (:meth:`PostgresJobStore.recover`), and should it
wake up again, its tickets are no longer valid, so that nothing is finished twice.

Each method is one transaction that may be tried again after the connection broke, even if it was
committed the first time. Locks are taken in one order: member, job, item, client.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from auto_voice.errors import ConfigError, UnknownJobError
from auto_voice.server.jobs import (
    CANCELLED,
    COMPUTE,
    DONE,
    FAILED,
    JOB_TURN,
    LEASE_SECONDS,
    QUEUED,
    RUNNING,
    SECONDS_PER_ITEM,
    Claim,
    ClaimLostError,
    JobItem,
    JobRecord,
    JobRequest,
    JobStoreError,
    Json,
    QueueDepth,
    QueueLimits,
    SharedJobStore,
    check_digest,
    check_limits,
    expired_of,
    gave_up,
    json_text,
    json_value,
    seconds_until_half,
    state_of,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
_Db = psycopg.Connection[tuple[Any, ...]]

# Layout of the tables; those of another are refused.
SCHEMA_VERSION = 1
# Connections of one process beside the one that listens and the one for signs of life, and seconds
# to wait for one that is free: so few that the link to the others is not held up for a lease.
MOST_CONNECTIONS, PLACE_SECONDS = 8, 8
# Seconds to connect, for one statement, and until a dead connection is noticed.
CONNECT_SECONDS, STATEMENT_SECONDS, DEAD_SECONDS = 5, 30, 15
# Seconds after a failed connection in which none is tried: requests are refused at once then.
PAUSE_SECONDS = 0.5
CHANNEL = "autovoice"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS autovoice_version (version integer NOT NULL, place text NOT NULL);
CREATE TABLE IF NOT EXISTS autovoice_members (
    id text PRIMARY KEY, seen timestamptz NOT NULL, workers integer NOT NULL);
CREATE TABLE IF NOT EXISTS autovoice_jobs (
    id text PRIMARY KEY, client text NOT NULL, kind text NOT NULL, lane text NOT NULL,
    request text NOT NULL, direct boolean NOT NULL, asker text NOT NULL, key text,
    digest text NOT NULL, keep_seconds float8 NOT NULL, created float8 NOT NULL, finished float8,
    expires float8, bytes bigint NOT NULL DEFAULT 0, UNIQUE (client, key));
CREATE TABLE IF NOT EXISTS autovoice_items (
    job text NOT NULL REFERENCES autovoice_jobs (id) ON DELETE CASCADE, idx integer NOT NULL,
    name text NOT NULL, state text NOT NULL, progress float8 NOT NULL DEFAULT 0, error text,
    result text, attempts integer NOT NULL DEFAULT 0, ticket text, owner text, started float8,
    ended float8, PRIMARY KEY (job, idx));
CREATE INDEX IF NOT EXISTS autovoice_open_items ON autovoice_items (state)
    WHERE state IN ('queued', 'running');
CREATE INDEX IF NOT EXISTS autovoice_ended_items ON autovoice_items (ended);
CREATE INDEX IF NOT EXISTS autovoice_jobs_by_client ON autovoice_jobs (client, created);
CREATE TABLE IF NOT EXISTS autovoice_clients (client text PRIMARY KEY, served bigint NOT NULL);
CREATE SEQUENCE IF NOT EXISTS autovoice_turns;
CREATE TABLE IF NOT EXISTS autovoice_sessions (mark text PRIMARY KEY, until float8 NOT NULL);
CREATE OR REPLACE FUNCTION autovoice_now() RETURNS float8 LANGUAGE sql AS
    'SELECT extract(epoch FROM clock_timestamp())::float8';
CREATE OR REPLACE FUNCTION autovoice_is_gone(member text) RETURNS boolean LANGUAGE sql AS
    'SELECT NOT EXISTS (SELECT 1 FROM autovoice_members WHERE id = member)';
"""
# See the module of the other store; an item that another worker takes this moment is passed over,
# and the upkeep of models is for the process that was asked.
_NEXT = """
SELECT i.job, i.idx, j.client FROM autovoice_items i JOIN autovoice_jobs j ON j.id = i.job
WHERE i.state = 'queued' AND j.lane = %s AND (j.lane = 'compute' OR j.asker = %s)
ORDER BY
  CASE WHEN j.direct = %s THEN 0 ELSE 1 END,
  CASE WHEN j.direct THEN j.created END,
  (SELECT COUNT(*) FROM autovoice_items r JOIN autovoice_jobs k ON k.id = r.job
   WHERE r.state = 'running' AND k.client = j.client),
  COALESCE((SELECT served FROM autovoice_clients c WHERE c.client = j.client), 0),
  j.created, i.job, i.idx
LIMIT 1 FOR UPDATE OF i SKIP LOCKED
"""
# What clients are told; the reason, which may name machines, is for /readyz and the log.
_SENTENCE = "The server's job database cannot be used just now; try again later."
# What a message says where no waiting helps.
_PERMANENT = re.compile(
    r'authentication failed|no password supplied|role ".*" does not exist'
    r'|database ".*" does not exist|no pg_hba\.conf entry|not permitted to log in'
)


class PostgresJobStore(SharedJobStore):
    """The kept jobs in tables ``autovoice_*`` of a PostgreSQL database, made if missing.

    While the database cannot be reached, also at the start, every method raises JobStoreError at
    once, and goes on by itself when it is back.

    Args:
        url: ``postgresql://user:password@host:port/database``; what it leaves out comes from
            libpq's own variables and files.
        workers: how many of this process claim at the same time.
        place: gives an id of where this process keeps files. Processes that share jobs but not
            their files would lose jobs, so all must have the same.
        lease_seconds: without a sign of life after which a process counts as dead.

    Raises:
        ConfigError: the URL is none, the database refuses the user, or its tables were made by
            another version.
    """

    def __init__(
        self,
        url: str,
        workers: int = 1,
        *,
        place: Callable[[], str] = lambda: "",
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._workers, self._place = workers, place
        self.lease_seconds = lease_seconds
        self._conninfo, self._where, self._secret = _parsed(url)
        # It warns of every transaction that a dead connection could not roll back.
        logging.getLogger("psycopg").setLevel(logging.ERROR)
        self._me = secrets.token_urlsafe(12)
        self._lock = threading.Lock()
        self._idle: list[_Db] = []
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        # Those that wait here for a block of :meth:`exclusively` hold no connection.
        self._blocks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._listening: _Db | None = None
        self._is_made = self._is_set_up = self._is_closed = False
        self._problem = ""
        self._pause_until = 0.0
        # Since when signs of life have arrived without a gap; None if the last one did not.
        self._steady_since: float | None = None
        # Tickets that are being drawn, and the keys of claims that are held.
        self._drawing: set[str] = set()
        self._held: set[tuple[str, int, str]] = set()
        try:
            self._run(lambda db: None)
        except JobStoreError:
            log.warning("work waits: %s", self._problem)
        self._is_made = True

    @property
    def problem(self) -> str:
        return self._problem

    # Connections

    def _run(self, work: Callable[[_Db], T], *, waits: bool = True) -> T:
        """What ``work`` gives, as one transaction, on a new connection if the old one is dead.

        Args:
            waits: until one of the connections is free; else it has one more.
        """
        failed: psycopg.Error | None = None
        maybe_done = False
        for _ in range(3):
            try:
                with self._connection(waits) as db, db.transaction():
                    found = work(db)
                    maybe_done = True  # what breaks from here on may break after the commit
                self._problem = ""
                return found
            except JobStoreError as error:  # no connection, for this try
                error.maybe_done |= maybe_done
                raise
            except (pg.DeadlockDetected, pg.SerializationFailure, _Broken) as error:
                failed = error
            except psycopg.Error as error:
                raise self._away(error, maybe_done=True) from error
            except ConfigError as error:  # found out when the database came up after us
                if not self._is_made:
                    raise
                self._problem = str(error)
                raise JobStoreError(_SENTENCE, maybe_done=maybe_done) from error
        assert failed is not None
        raise self._away(failed, maybe_done=True) from failed

    @contextmanager
    def _connection(self, waits: bool = True) -> Iterator[_Db]:
        """A connection; after an error of the database it is not used again.

        Raises:
            JobStoreError: there is none.
        """
        if waits and not self._places.acquire(timeout=PLACE_SECONDS):
            raise self._away(pg.TooManyConnections("all connections are in use"))
        try:
            db = self._taken()
            try:
                yield db
            except psycopg.Error as error:
                was_dead = db.broken or db.closed
                db.close()
                if was_dead and not isinstance(error, _Broken):
                    # The others that idle died with it.
                    self._close_idle()
                    raise _Broken(str(error)) from error
                raise
            except BaseException:
                self._give_back(db)
                raise
            self._give_back(db)
        finally:
            if waits:
                self._places.release()

    def _taken(self) -> _Db:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if time.monotonic() < self._pause_until:
            raise JobStoreError(_SENTENCE)
        try:
            db = self._connected()
        except psycopg.Error as error:
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            raise self._away(error) from error
        try:
            self._set_up(db)
        except BaseException as error:
            db.close()
            if isinstance(error, psycopg.Error):
                raise self._away(error) from error
            raise
        return db

    def _connected(self) -> _Db:
        try:
            db = psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=None)
        except psycopg.Error as error:
            if not self._is_set_up and _PERMANENT.search(str(error)):
                raise ConfigError(
                    f"the database {self._where} refuses: {self._reason(error)}; correct "
                    "--database or AUTOVOICE_DATABASE."
                ) from None
            raise
        db.execute(f"SET statement_timeout = {STATEMENT_SECONDS * 1000}")
        return db

    def _set_up(self, db: _Db) -> None:
        """Make the tables once, and say that this process is there."""
        if self._is_set_up:
            return
        try:
            with db.transaction():
                # Two processes that make a table at the same time would get in each other's way.
                db.execute("SELECT pg_advisory_xact_lock(hashtext('autovoice schema'))")
                found = None
                if db.execute("SELECT to_regclass('autovoice_version')").fetchone() != (None,):
                    found = db.execute("SELECT version FROM autovoice_version").fetchone()
                if found is not None and found[0] != SCHEMA_VERSION:
                    raise ConfigError(
                        f"the tables in {self._where} were made by another version of auto_voice; "
                        "name another database, or remove the tables autovoice_* with their jobs."
                    )
                if found is None:
                    db.execute(_SCHEMA)
                    db.execute(
                        "INSERT INTO autovoice_version VALUES (%s, %s)",
                        (SCHEMA_VERSION, self._place()),
                    )
                if _one(db, "SELECT place FROM autovoice_version") != self._place():
                    if self._is_in_use(db):
                        raise ConfigError(
                            f"the servers and workers on {self._where} keep their files elsewhere "
                            "than this one; give all of them the same --files, a folder that every "
                            "machine mounts or an object store."
                        )
                    db.execute("UPDATE autovoice_version SET place = %s", (self._place(),))
                self._sign(db)
        except pg.InsufficientPrivilege as error:
            raise ConfigError(
                f"the user of {self._where} may not make tables ({self._reason(error)}); grant "
                "CREATE on the schema, or name another database."
            ) from None
        self._is_set_up = True

    def _is_in_use(self, db: _Db) -> bool:
        """Whether another process lives or a job is kept, whose files would be missed."""
        lives = (
            "SELECT EXISTS (SELECT 1 FROM autovoice_jobs) OR EXISTS (SELECT 1 FROM"
            " autovoice_members WHERE seen >= clock_timestamp() - make_interval(secs => %s))"
        )
        row = db.execute(lives, (self.lease_seconds,)).fetchone()
        return row != (False,)

    def _give_back(self, db: _Db) -> None:
        with self._lock:
            if not self._is_closed and not db.broken and not db.closed:
                self._idle.append(db)
                return
        db.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()

    def _away(self, error: psycopg.Error, *, maybe_done: bool = False) -> JobStoreError:
        self._steady_since = None
        if isinstance(error, pg.UndefinedTable):  # The database was made anew.
            self._is_set_up = False
            self._close_idle()
        self._problem = f"the job database cannot be used ({self._reason(error)})"
        return JobStoreError(_SENTENCE, maybe_done=maybe_done)

    def _reason(self, error: BaseException) -> str:
        """The first line of what the database says, without the password."""
        text = str(error).strip() or type(error).__name__
        if found := re.search(r"failed: +(.+)", text.partition("failed:")[2] or text):
            text = found[1]
        line = text.splitlines()[0].removeprefix("FATAL:").strip()
        return line.replace(self._secret, "***") if self._secret else line

    def close(self) -> None:
        """Say that this process ends, and close its connections."""
        with suppress(JobStoreError):
            self._run(
                lambda db: db.execute("DELETE FROM autovoice_members WHERE id = %s", (self._me,))
            )
        self._is_closed = True
        self._close_idle()
        if self._listening is not None:
            self._listening.close()

    def __del__(self) -> None:
        # An app that is made and never run has nobody who closes its connections.
        for db in [*getattr(self, "_idle", ()), getattr(self, "_listening", None)]:
            if db is not None:
                db.close()

    # Jobs

    def add(self, job: JobRequest, limits: QueueLimits) -> JobRecord:
        def work(db: _Db) -> JobRecord:
            if job.direct or job.lane != COMPUTE:
                self._sign(db)
            # One after the other, so that together they keep to the limits.
            db.execute("SELECT pg_advisory_xact_lock(hashtext('autovoice add'))")
            if db.execute("SELECT 1 FROM autovoice_jobs WHERE id = %s", (job.id,)).fetchone():
                return self._get(db, job.id)  # kept before the connection broke
            if job.key and (earlier := self._by_key(db, job.client, job.key, job.digest)):
                return earlier
            self._check(db, job.client, job.direct, len(job.names), limits)
            self._arrive(db, job.client)
            db.execute(
                "INSERT INTO autovoice_jobs (id, client, kind, lane, request, direct, asker, key,"
                " digest, keep_seconds, created) VALUES"
                " (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, autovoice_now())",
                (job.id, job.client, job.kind, job.lane, json.dumps(dict(job.request)),
                 job.direct, self._me, job.key or None, job.digest, job.keep_seconds),
            )  # fmt: skip
            db.cursor().executemany(
                "INSERT INTO autovoice_items (job, idx, name, state) VALUES (%s, %s, %s, %s)",
                [(job.id, index, name, QUEUED) for index, name in enumerate(job.names)],
            )
            _notify(db)
            return self._get(db, job.id)

        return self._run(work)

    def _sign(self, db: _Db) -> None:
        db.execute(
            "INSERT INTO autovoice_members VALUES (%s, clock_timestamp(), %s)"
            " ON CONFLICT (id) DO UPDATE SET seen = excluded.seen",
            (self._me, self._workers),
        )

    def _arrive(self, db: _Db, client: str) -> None:
        """Put a client with nothing to do behind all who wait, before the one served last."""
        has_work = db.execute(
            "SELECT 1 FROM autovoice_items i JOIN autovoice_jobs j ON j.id = i.job"
            " WHERE j.client = %s AND i.state IN ('queued', 'running') LIMIT 1",
            (client,),
        ).fetchone()
        if has_work is None:
            db.execute(
                "INSERT INTO autovoice_clients"
                " SELECT %s, CASE WHEN is_called THEN last_value ELSE 0 END - 1"
                " FROM autovoice_turns"
                " ON CONFLICT (client) DO UPDATE SET served = excluded.served",
                (client,),
            )

    def check(self, client: str, direct: bool, limits: QueueLimits) -> None:
        self._run(lambda db: self._check(db, client, direct, 1, limits))

    def _check(self, db: _Db, client: str, direct: bool, more: int, limits: QueueLimits) -> None:
        row = db.execute(
            "SELECT COUNT(*), COUNT(CASE WHEN j.client = %s THEN 1 END)"
            " FROM autovoice_items i JOIN autovoice_jobs j ON j.id = i.job"
            " WHERE i.state = 'queued' AND j.direct = %s",
            (client, direct),
        ).fetchone()
        assert row is not None
        check_limits(
            limits, direct, (row[0], row[1]), more, lambda waiting: _retry_after(db, waiting)
        )

    def find(self, client: str, key: str, digest: str) -> JobRecord | None:
        return self._run(lambda db: self._by_key(db, client, key, digest))

    def _by_key(self, db: _Db, client: str, key: str, digest: str) -> JobRecord | None:
        found = db.execute(
            "SELECT id, digest FROM autovoice_jobs WHERE client = %s AND key = %s", (client, key)
        ).fetchone()
        if found is None:
            return None
        check_digest(found[1], digest)
        return self._get(db, found[0])

    def get(self, job_id: str) -> JobRecord:
        return self._run(lambda db: self._get(db, job_id))

    def _get(self, db: _Db, job_id: str) -> JobRecord:
        row = None
        if _ID.fullmatch(job_id):
            row = db.execute(
                "SELECT client, kind, request, direct, created, finished, expires"
                " FROM autovoice_jobs WHERE id = %s",
                (job_id,),
            ).fetchone()
        if row is None:
            raise UnknownJobError
        client, kind, request, direct, created, finished, expires = row
        items = db.execute(
            "SELECT idx, name, state, progress, error, result, attempts, started"
            " FROM autovoice_items WHERE job = %s ORDER BY idx",
            (job_id,),
        ).fetchall()
        begun = [item[7] for item in items if item[7] is not None]
        return JobRecord(
            job_id,
            client,
            kind,
            state_of([item[2] for item in items]),
            json.loads(request),
            direct,
            created,
            min(begun, default=None),
            finished,
            expires,
            tuple(
                JobItem(idx, name, state, progress, json_value(error), json_value(result), attempts)
                for idx, name, state, progress, error, result, attempts, _ in items
            ),
        )

    def listed(self, client: str, limit: int) -> list[JobRecord]:
        def work(db: _Db) -> list[JobRecord]:
            rows = db.execute(
                "SELECT id FROM autovoice_jobs WHERE client = %s AND NOT direct"
                " ORDER BY created DESC LIMIT %s",
                (client, limit),
            ).fetchall()
            return [self._get(db, row[0]) for row in rows]

        return self._run(work)

    # Work

    def claim(self, lane: str) -> Claim | None:
        ticket = secrets.token_hex(8)

        def work(db: _Db) -> Claim | None:
            there = db.execute(
                "SELECT 1 FROM autovoice_items i JOIN autovoice_jobs j ON j.id = i.job"
                " WHERE i.state = 'queued' AND j.lane = %s"
                " AND (j.lane = 'compute' OR j.asker = %s) LIMIT 1",
                (lane, self._me),
            ).fetchone()
            if there is None:
                return None
            self._sign(db)
            turn = _one(db, "SELECT nextval('autovoice_turns')")
            row = db.execute(_NEXT, (lane, self._me, turn % JOB_TURN != 0)).fetchone()
            if row is None:
                return None
            job_id, index, client = row
            db.execute(
                "UPDATE autovoice_items SET state = 'running', attempts = attempts + 1,"
                " ticket = %s, owner = %s, started = autovoice_now() WHERE job = %s AND idx = %s",
                (ticket, self._me, job_id, index),
            )
            db.execute(
                "INSERT INTO autovoice_clients VALUES (%s, %s)"
                " ON CONFLICT (client) DO UPDATE SET served = excluded.served",
                (client, turn),
            )
            job = self._get(db, job_id)
            return Claim(job, next(item for item in job.items if item.index == index), ticket)

        with self._lock:
            self._drawing.add(ticket)
        try:
            found = self._run(work)
            with self._lock:
                if found is not None:
                    self._held.add(found.key)
        finally:
            with self._lock:
                self._drawing.discard(ticket)
        return found

    def report(self, claim: Claim, progress: float) -> None:
        self._run(
            lambda db: db.execute(
                "UPDATE autovoice_items SET progress = %s"
                " WHERE job = %s AND idx = %s AND ticket = %s AND state = 'running'",
                (progress, *claim.key),
            )
        )

    def others_wait(self, job_id: str) -> bool:
        found = self._run(
            lambda db: db.execute(
                "SELECT 1 FROM autovoice_items i JOIN autovoice_jobs j ON j.id = i.job"
                " JOIN autovoice_jobs own ON own.id = %s"
                " WHERE i.state = 'queued' AND j.lane = own.lane"
                " AND (j.direct OR j.client != own.client) LIMIT 1",
                (job_id,),
            ).fetchone()
        )
        return found is not None

    def finish(
        self, claim: Claim, *, result: Json | None = None, error: Json | None = None
    ) -> JobRecord:
        job_id, index, ticket = claim.key
        state = DONE if error is None else FAILED

        def work(db: _Db) -> JobRecord:
            _lock(db, job_id)
            changed = db.execute(
                "UPDATE autovoice_items SET state = %s, progress = 1, result = %s, error = %s,"
                " ended = autovoice_now()"
                " WHERE job = %s AND idx = %s AND ticket = %s AND state = 'running'",
                (state, json_text(result), json_text(error), *claim.key),
            ).rowcount
            if not changed:
                row = db.execute(
                    "SELECT ticket FROM autovoice_items WHERE job = %s AND idx = %s",
                    (job_id, index),
                ).fetchone()
                if row != (ticket,):  # else it was cancelled, or this is the second try
                    raise ClaimLostError("Another worker does this recording now.")
            elif result:
                db.execute(
                    "UPDATE autovoice_jobs SET bytes = bytes + %s WHERE id = %s",
                    (int(result.get("bytes", 0)), job_id),
                )
            return self._settle(db, job_id)

        try:
            job = self._run(work)
        except (UnknownJobError, ClaimLostError):
            self._let_go(claim)
            raise
        self._let_go(claim)
        return job

    def _let_go(self, claim: Claim) -> None:
        with self._lock:
            self._held.discard(claim.key)

    def _settle(self, db: _Db, job_id: str) -> JobRecord:
        """Note the end of a job whose items have all ended; the job is locked."""
        db.execute(
            "UPDATE autovoice_jobs"
            " SET finished = autovoice_now(), expires = autovoice_now() + keep_seconds"
            " WHERE id = %s AND finished IS NULL AND NOT EXISTS (SELECT 1 FROM autovoice_items i"
            " WHERE i.job = autovoice_jobs.id AND i.state IN ('queued', 'running'))",
            (job_id,),
        )
        _notify(db)
        return self._get(db, job_id)

    def release(self, claim: Claim) -> None:
        self._run(lambda db: _put_back(db, claim.key))
        self._let_go(claim)

    def cancel(self, job_id: str) -> JobRecord:
        def work(db: _Db) -> JobRecord:
            _lock(db, job_id)
            db.execute(
                "UPDATE autovoice_items SET state = %s"
                " WHERE job = %s AND state IN ('queued', 'running')",
                (CANCELLED, job_id),
            )
            return self._settle(db, job_id)

        return self._run(work)

    # Signs of life

    def beat(self) -> set[tuple[str, int, str]]:
        def work(db: _Db) -> set[tuple[str, int, str]]:
            self._sign(db)
            return {
                (job, index, ticket)
                for job, index, ticket in db.execute(
                    "SELECT job, idx, ticket FROM autovoice_items"
                    " WHERE owner = %s AND state = 'running'",
                    (self._me,),
                )
            }

        with self._lock:
            held = set(self._held)
        mine = self._run(work, waits=False)
        if self._steady_since is None:
            self._steady_since = time.monotonic()
        with self._lock:
            known = self._drawing | {ticket for _, _, ticket in self._held}
        for key in mine - held:
            # Claimed for us while the connection broke: nobody here works on it.
            if key[2] not in known:
                self._run(partial(_put_back, key=key))
        with self._lock:
            self._held -= held - mine
        return held - mine

    def recover(self, most_attempts: int) -> tuple[int, int]:
        # After the database was away nobody has given a sign of life for a while, and all of them
        # get the time to.
        steady = self._steady_since
        if steady is None or time.monotonic() - steady < self.lease_seconds:
            return 0, 0
        return self._run(lambda db: self._take_up(db, most_attempts))

    def _take_up(self, db: _Db, most_attempts: int) -> tuple[int, int]:
        if not _one(db, "SELECT pg_try_advisory_xact_lock(hashtext('autovoice recover'))"):
            return 0, 0  # another process does it
        db.execute(
            "DELETE FROM autovoice_members"
            " WHERE seen < clock_timestamp() - make_interval(secs => %s)",
            (self.lease_seconds,),
        )
        rows = db.execute(
            "SELECT j.id, (j.direct OR j.lane != 'compute') AND autovoice_is_gone(j.asker)"
            " FROM autovoice_jobs j WHERE j.finished IS NULL"
            " AND ((j.direct OR j.lane != 'compute') AND autovoice_is_gone(j.asker)"
            " OR EXISTS (SELECT 1 FROM autovoice_items i"
            " WHERE i.job = j.id AND i.state = 'running' AND autovoice_is_gone(i.owner)))"
            " ORDER BY j.id FOR UPDATE OF j"
        ).fetchall()
        queued = failed = 0
        for job_id, nobody_waits in rows:
            if nobody_waits:
                db.execute(
                    "UPDATE autovoice_items SET state = %s"
                    " WHERE job = %s AND state IN ('queued', 'running')",
                    (CANCELLED, job_id),
                )
            else:
                failed += db.execute(
                    "UPDATE autovoice_items i SET state = %s, error = %s, ticket = NULL"
                    " WHERE job = %s AND state = 'running' AND attempts >= %s"
                    " AND autovoice_is_gone(i.owner)",
                    (FAILED, json.dumps(gave_up(most_attempts)), job_id, most_attempts),
                ).rowcount
                queued += db.execute(
                    "UPDATE autovoice_items i SET state = 'queued', progress = 0,"
                    " started = NULL, ticket = NULL, owner = NULL"
                    " WHERE job = %s AND state = 'running' AND autovoice_is_gone(i.owner)",
                    (job_id,),
                ).rowcount
            self._settle(db, job_id)
        return queued, failed

    def news(self, seconds: float) -> bool:
        try:
            if self._listening is None or self._listening.closed:
                self._listening = self._connected()
                self._listening.execute(f"LISTEN {CHANNEL}")
                return True  # what was said before that went unheard
            return any(True for _ in self._listening.notifies(timeout=seconds, stop_after=1))
        except (psycopg.Error, ConfigError) as error:
            if self._listening is not None:
                self._listening.close()
            if isinstance(error, psycopg.Error):
                raise self._away(error) from error
            self._problem = str(error)
            raise JobStoreError(_SENTENCE) from error

    # Keeping

    def expired(self, keep_bytes: int) -> list[str]:
        def work(db: _Db) -> list[str]:
            rows = db.execute(
                "SELECT id, bytes, expires FROM autovoice_jobs WHERE finished IS NOT NULL"
                " ORDER BY finished DESC"
            ).fetchall()
            now = _one(db, "SELECT autovoice_now()")
            return expired_of(((row[0], row[1], row[2]) for row in rows), now, keep_bytes)

        return self._run(work)

    def remove(self, job_id: str) -> None:
        def work(db: _Db) -> None:
            row = db.execute(
                "DELETE FROM autovoice_jobs WHERE id = %s RETURNING client", (job_id,)
            ).fetchone()
            if row is not None:
                db.execute(
                    "DELETE FROM autovoice_clients c WHERE client = %s AND NOT EXISTS"
                    " (SELECT 1 FROM autovoice_jobs j WHERE j.client = c.client)",
                    row,
                )
            _notify(db)

        self._run(work)

    def ids(self) -> set[str]:
        rows = self._run(lambda db: db.execute("SELECT id FROM autovoice_jobs").fetchall())
        return {row[0] for row in rows}

    def depth(self) -> QueueDepth:
        rows = self._run(
            lambda db: db.execute(
                "SELECT i.state, j.direct, COUNT(*) FROM autovoice_items i"
                " JOIN autovoice_jobs j ON j.id = i.job"
                " WHERE i.state IN ('queued', 'running') GROUP BY 1, 2"
            ).fetchall()
        )
        count = {(state, direct): n for state, direct, n in rows}
        return QueueDepth(
            direct=count.get((QUEUED, True), 0),
            queued=count.get((QUEUED, False), 0),
            running=count.get((RUNNING, True), 0) + count.get((RUNNING, False), 0),
        )

    def ended_sessions(self, more: Mapping[str, float]) -> dict[str, float]:
        def work(db: _Db) -> dict[str, float]:
            for mark, until in more.items():
                db.execute(
                    "INSERT INTO autovoice_sessions VALUES (%s, %s) ON CONFLICT DO NOTHING",
                    (mark, until),
                )
            db.execute("DELETE FROM autovoice_sessions WHERE until < autovoice_now()")
            return dict(db.execute("SELECT mark, until FROM autovoice_sessions").fetchall())

        return self._run(work)

    @contextmanager
    def exclusively(self, what: str) -> Iterator[None]:
        with self._lock:
            block = self._blocks[what]
        if not block.acquire(timeout=STATEMENT_SECONDS):
            raise JobStoreError("Others are changing the same just now; try again later.")
        try:
            with self._connection() as db, db.transaction():
                db.execute("SELECT pg_advisory_xact_lock(hashtext('autovoice ' || %s))", (what,))
                yield
        except psycopg.Error as error:
            raise self._away(error) from error
        finally:
            block.release()


class _Broken(psycopg.OperationalError):
    """The connection was dead, so the same is tried on a new one."""


def _parsed(url: str) -> tuple[str, str, str]:
    """What psycopg takes, what may be shown, and the password."""
    wrong = (
        "--database is no address of a PostgreSQL database; write it as "
        "postgresql://USER@HOST:5432/NAME, with the password in PGPASSWORD or ~/.pgpass, or as "
        "postgresql://USER:PASSWORD@HOST:5432/NAME."
    )
    if not re.match(r"postgres(ql)?://", url):
        raise ConfigError(wrong)
    try:
        given = conninfo_to_dict(url)
    except psycopg.Error:
        raise ConfigError(wrong) from None  # its text has the URL with the password
    if not all(port.isdigit() for port in str(given.get("port") or "5432").split(",")):
        raise ConfigError(wrong)
    secret = str(given.get("password") or "")
    defaults: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "keepalives_idle": 5,
        "keepalives_interval": 3,
        "keepalives_count": 3,
        "tcp_user_timeout": DEAD_SECONDS * 1000,
        "application_name": "autovoice",
    }
    if "," in str(given.get("host", "")):
        defaults["target_session_attrs"] = "read-write"
    conninfo = make_conninfo("", **{**defaults, **given})
    host, name = given.get("host") or "of this machine", given.get("dbname") or "(default)"
    return conninfo, f"{name} on {host}", secret


def _lock(db: _Db, job_id: str) -> None:
    """Lock a job, so that whoever ends the last of its items sees that it is the last."""
    found = db.execute("SELECT 1 FROM autovoice_jobs WHERE id = %s FOR UPDATE", (job_id,))
    if found.fetchone() is None:
        raise UnknownJobError


def _put_back(db: _Db, key: tuple[str, int, str]) -> None:
    """Queue the item of a claim again, if it still is that claim's."""
    db.execute(
        "UPDATE autovoice_items SET state = 'queued', attempts = attempts - 1, progress = 0,"
        " started = NULL, ticket = NULL, owner = NULL"
        " WHERE job = %s AND idx = %s AND ticket = %s AND state = 'running'",
        key,
    )
    _notify(db)


def _notify(db: _Db) -> None:
    db.execute(f"NOTIFY {CHANNEL}")


def _one(db: _Db, query: str) -> Any:
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]


def _retry_after(db: _Db, waiting: int) -> int:
    pace = _one(
        db,
        "SELECT avg(ended - started) FROM (SELECT started, ended FROM autovoice_items"
        " WHERE state = 'done' AND ended IS NOT NULL ORDER BY ended DESC LIMIT 20) x",
    )
    workers = _one(db, "SELECT COALESCE(sum(workers), 1) FROM autovoice_members")
    return seconds_until_half(
        waiting, SECONDS_PER_ITEM if pace is None else float(pace), int(workers)
    )
