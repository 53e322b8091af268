"""Several servers and workers on one PostgreSQL: one queue, one set of files, one set of voices."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
import soundfile

from auto_voice.cli import main
from auto_voice.client import Client
from auto_voice.errors import AutoVoiceError, BusyError, ConfigError, UnknownVoiceError
from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
from auto_voice.inference.checkpoint import Checkpoint
from auto_voice.server import Engine
from auto_voice.server.files import (
    JobFiles,
    ObjectFiles,
    ObjectStore,
    ObjectVoices,
    StorageError,
    new_id,
)
from auto_voice.server.jobs import (
    COMPUTE,
    DONE,
    MAINTENANCE,
    CancellationToken,
    Claim,
    ClaimLostError,
    JobItem,
    JobRecord,
    JobRequest,
    JobStoreError,
    QueueLimits,
)
from auto_voice.server.workers import Workers
from auto_voice.voices.cloning import bare_voice
from postgres_kit import PASSWORD
from server_kit import Gated, reserved_ports, until

pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")

from auto_voice.server.postgres import MOST_CONNECTIONS, PostgresJobStore

MANY = QueueLimits(direct=1000, direct_client=1000, queued=1000, queued_client=1000)


@pytest.fixture
def opened(database):
    """Opens the store as another process would."""
    made = []

    def opening(**more):
        made.append(PostgresJobStore(database, **{"lease_seconds": 1.0, **more}))
        return made[-1]

    yield opening
    for store in made:
        store.close()


def add(store, items=1, client="a", limits=MANY, **more):
    names = [f"{n}.wav" for n in range(items)]
    return store.add(JobRequest(new_id(), client, "convert", names, {}, **more), limits)


def taken_up(store):
    """What the store takes up, once there is something."""
    return until(lambda: (store.beat(), store.recover(3))[1] != (0, 0), seconds=30)


# The store


def test_many_claim_at_once_and_each_item_goes_to_one(opened):
    stores = [opened() for _ in range(4)]
    jobs = [add(stores[0], items=10, client=f"c{n}") for n in range(4)]
    claimed = []

    def work(store):
        while store.depth().queued:
            if (claim := store.claim(COMPUTE)) is not None:
                claimed.append(claim.key[:2])
                store.finish(claim, result={"bytes": 1})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, stores * 2))
    assert sorted(claimed) == sorted((job.id, n) for job in jobs for n in range(10))
    # Two that end the last items of a job at once both see that it is over.
    assert all(stores[0].get(job.id).state == DONE for job in jobs)
    assert all(stores[0].get(job.id).finished for job in jobs)


def test_limits_hold_together(opened):
    stores = [opened() for _ in range(3)]
    limits = QueueLimits(direct=1, direct_client=1, queued=10, queued_client=10)

    def ask(n):
        try:
            return add(stores[n % 3], client=f"c{n}", limits=limits)
        except BusyError:
            return None

    with ThreadPoolExecutor(8) as pool:
        kept = [job for job in pool.map(ask, range(30)) if job is not None]
    assert len(kept) == stores[0].depth().queued == 10


def test_the_same_key_at_two_servers_gives_one_job(opened):
    stores = [opened() for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda store: add(store, key="once"), stores))
    assert jobs[0].id == jobs[1].id


def test_who_wakes_up_after_another_took_its_work_can_finish_nothing(opened):
    asleep, awake = opened(), opened()
    job = add(awake)
    old = asleep.claim(COMPUTE)
    taken_up(awake)
    new = awake.claim(COMPUTE)
    assert new.ticket != old.ticket
    asleep.report(old, 0.9)
    asleep.release(old)
    with pytest.raises(ClaimLostError):
        asleep.finish(old, result={"file": "late.wav"})
    assert awake.get(job.id).items[0].progress == 0.0
    awake.finish(new, result={"file": "out.wav"})
    with pytest.raises(ClaimLostError):
        asleep.finish(old, error={"type": "X", "message": "m"})
    assert awake.get(job.id).items[0].result == {"file": "out.wav"}
    assert awake.finish(new, result={"file": "out.wav"}).state == DONE  # the answer had been lost


def test_who_sleeps_is_told_what_it_lost(opened):
    asleep, awake = opened(), opened()
    add(awake)
    claim = asleep.claim(COMPUTE)
    assert asleep.beat() == set()
    taken_up(awake)
    assert asleep.beat() == {claim.key}


def test_a_cancel_elsewhere_is_heard(opened):
    here, there = opened(), opened()
    job = add(here)
    claim = here.claim(COMPUTE)
    assert here.news(0.0)  # begins to listen
    there.cancel(job.id)
    assert here.news(20.0)
    assert here.beat() == {claim.key}


def test_a_claim_whose_answer_was_lost_is_put_back(opened):
    store = opened()
    job = add(store)
    claim = store.claim(COMPUTE)
    store._held.clear()  # as if the connection had broken after the commit
    store.beat()
    assert store.get(job.id).items[0].attempts == 0
    assert store.claim(COMPUTE).ticket != claim.ticket


@pytest.mark.slow
def test_direct_work_outlives_its_worker_but_not_its_server(opened):
    server, worker, other = (opened(lease_seconds=10.0) for _ in range(3))
    job = add(server, direct=True)
    worker.claim(COMPUTE)
    server.beat()
    until(lambda: (server.beat(), other.beat(), other.recover(3))[2] == (1, 0), seconds=120)
    assert other.claim(COMPUTE).job.id == job.id  # the server has given signs of life
    until(lambda: (other.beat(), other.recover(3), other.get(job.id).is_finished)[2], seconds=120)
    assert other.get(job.id).state == "cancelled"


def test_models_are_kept_up_where_that_was_asked(opened):
    asked, other = opened(), opened()
    job = asked.add(JobRequest(new_id(), "a", "pull", ["m"], {}, lane=MAINTENANCE), MANY)
    assert other.claim(MAINTENANCE) is None
    assert asked.claim(MAINTENANCE).job.id == job.id
    left = asked.add(JobRequest(new_id(), "a", "pull", ["m"], {}, lane=MAINTENANCE), MANY)
    asked.close()
    until(lambda: (other.beat(), other.recover(3), other.get(left.id).is_finished)[2], seconds=30)
    assert [other.get(one.id).state for one in (job, left)] == ["cancelled", "cancelled"]


@pytest.mark.slow
def test_after_an_absence_of_the_database_nobody_counts_as_dead_at_once(opened, postgres_server):
    ours, others = opened(lease_seconds=5.0), opened(lease_seconds=5.0)
    add(ours)
    others.claim(COMPUTE)
    until(lambda: (ours.beat(), ours.recover(3))[1] != (0, 0), seconds=30)
    others.beat()  # hears what it has lost
    claim = others.claim(COMPUTE)
    postgres_server.stop()
    with pytest.raises(JobStoreError):
        ours.beat()
    postgres_server.start()
    until(lambda: not _fails(ours.beat))
    assert ours.recover(3) == (0, 0)
    assert others.beat() == set()
    others.finish(claim, result={})


def _fails(call):
    try:
        call()
    except JobStoreError:
        return True
    return False


def test_a_restart_of_the_database_between_two_calls_is_not_noticed(opened, postgres_server):
    store = opened()
    job = add(store)
    postgres_server.stop()
    postgres_server.start()
    assert store.get(job.id).state == "queued"
    assert store.problem == ""


def test_what_was_committed_before_the_database_went_away_may_be_done(
    opened, postgres_server, monkeypatch
):
    """The files of such a job must not be deleted: nobody knows yet whether it is there."""
    import psycopg

    store, committed = opened(), psycopg.Connection.transaction

    @contextlib.contextmanager
    def breaking(connection, *args, **more):
        with committed(connection, *args, **more) as transaction:
            yield transaction
        monkeypatch.undo()
        postgres_server.stop()
        connection.close()
        raise psycopg.OperationalError("the answer to the commit is lost")

    monkeypatch.setattr(psycopg.Connection, "transaction", breaking)
    job_id = new_id()
    try:
        with pytest.raises(JobStoreError) as refused:
            store.add(JobRequest(job_id, "a", "convert", ["x"], {}, key="once"), MANY)
    finally:
        postgres_server.start()
    assert refused.value.maybe_done
    until(lambda: not _fails(lambda: store.get(job_id)))
    assert store.find("a", "once", "").id == job_id


def test_what_never_reached_the_database_is_not_done(opened, postgres_server):
    store = opened()
    postgres_server.stop()
    try:
        with pytest.raises(JobStoreError) as refused:
            add(store)
    finally:
        postgres_server.start()
    assert not refused.value.maybe_done


def test_who_waits_for_a_block_that_another_is_in_holds_no_connection(opened):
    ours, others = opened(), opened()
    waiting = threading.Semaphore(0)

    def wait():
        waiting.release()
        with ours.exclusively("voices"):
            return True

    with ThreadPoolExecutor(3 * MOST_CONNECTIONS) as pool:
        with others.exclusively("voices"):
            entered = [pool.submit(wait) for _ in range(3 * MOST_CONNECTIONS)]
            for _ in entered:
                assert waiting.acquire(timeout=60)
            add(ours)
            claim = ours.claim(COMPUTE)
            assert ours.beat() == set()
            blocked = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            until(lambda: others._run(lambda db: db.execute(blocked).fetchall()))
            assert len(others._run(lambda db: db.execute(blocked).fetchall())) == 1
        assert all(future.result(60) for future in entered)
    ours.finish(claim, result={})


def test_signs_of_life_are_given_while_all_connections_are_in_use(opened, monkeypatch):
    monkeypatch.setattr("auto_voice.server.postgres.PLACE_SECONDS", 0)
    store = opened()
    with contextlib.ExitStack() as used:
        for _ in range(MOST_CONNECTIONS):
            used.enter_context(store._connection())
        with pytest.raises(JobStoreError):
            store.depth()
        assert store.beat() == set()


def test_a_clock_that_is_wrong_deletes_nothing(opened, monkeypatch):
    store = opened()
    add(store)
    store.finish(store.claim(COMPUTE), result={"bytes": 1})
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 25 * 3600)
    assert store.expired(10**9) == []


def test_what_was_put_back_has_not_been_started(opened):
    store = opened()
    job = add(store)
    claim = store.claim(COMPUTE)
    assert store.get(job.id).started is not None
    store.release(claim)
    assert store.get(job.id).started is None


def test_processes_that_do_not_share_their_files_do_not_share_jobs(database, opened):
    here = opened(place=lambda: "here", lease_seconds=600.0)
    with pytest.raises(ConfigError, match="give all of them the same --files"):
        opened(place=lambda: "there", lease_seconds=600.0)
    here.close()
    there = opened(place=lambda: "there", lease_seconds=600.0)  # whoever was wrong has gone
    add(there)
    there.close()
    with pytest.raises(ConfigError, match="give all of them the same --files"):
        opened(place=lambda: "here", lease_seconds=600.0)


def test_tables_of_another_version_are_refused(database, opened):
    import psycopg

    opened().close()
    with psycopg.connect(database) as db:
        db.execute("UPDATE autovoice_version SET version = 99")
    with pytest.raises(ConfigError, match="another version"):
        opened()


@pytest.mark.parametrize(
    "url", ["mysql://a:secret@b/c", "postgresql://a:secret@b:c:d/", "secret", "postgres://%zz"]
)
def test_what_is_no_address_is_refused_without_showing_it(url):
    with pytest.raises(ConfigError, match="no address of a PostgreSQL") as refused:
        PostgresJobStore(url)
    assert "secret" not in str(refused.value)


def test_a_wrong_password_is_one_sentence(postgres_server):
    with pytest.raises(ConfigError, match="password authentication failed") as refused:
        PostgresJobStore(postgres_server.url(password="quite wrong"))
    assert "quite" not in str(refused.value)


# Servers


@pytest.fixture(params=["folder", "objects"])
def files(request, tmp_path):
    """A folder, and an object store: one in memory, or the S3 that S3_TEST_URL names."""
    if request.param == "folder":
        return str(tmp_path / "shared")
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra postgres)")
    return f"{os.environ.get('S3_TEST_URL', 'memory://')}{new_id()}"


@pytest.fixture
def machine(serve, tmp_path, database, files):
    """Starts servers that share a database, files and voices, each with a data folder of its own.

    Args:
        engine: makes the engine of a folder.
    """
    from auto_voice.server import ServerSettings
    from auto_voice.server.files import make_voices

    def start(make=Gated, **settings):
        given = {"data_dir": tmp_path / new_id(), "database": database, "files": files, **settings}
        engine = make(tmp_path)
        engine.open.set()
        engine.voices = type(engine.voices)(
            make_voices(ServerSettings(**given), None), engine.registry
        )
        return serve(engine, **given)

    return start


def clients(*servers):
    return [Client(server.url, timeout_seconds=60, patience_seconds=60) for server in servers]


@pytest.mark.slow
def test_what_one_accepts_the_other_does_and_either_gives(machine, talk, friend):
    asked, working = machine(workers=0), machine()
    with contextlib.ExitStack() as stack:
        here, there = map(stack.enter_context, clients(asked, working))
        job = here.submit([talk, friend], references=[friend])
        assert there.wait(job.id).state == "done"
        assert [item.state for item in here.job(job.id).items] == ["done", "done"]
        for client in (here, there):
            assert client.result(job.id, 1).content == here.result(job.id, 1).content
        sound = here.convert(talk, references=[friend])  # the connection is here, the work there
        assert len(sound.content) > 1000
        zipped = httpx2.get(f"{asked.url}/v1/jobs/{job.id}/result", timeout=60)
        assert zipped.content[:2] == b"PK"
        ranged = httpx2.get(
            f"{asked.url}/v1/jobs/{job.id}/results/0", headers={"range": "bytes=0-3"}, timeout=60
        )
        assert (ranged.status_code, ranged.content) == (206, b"RIFF")
        there.delete(job.id)
        with pytest.raises(AutoVoiceError, match="no such job"):
            here.job(job.id)
        assert here.server() == there.server()
    # What was worked on is nowhere left.
    assert not asked.context.files.names(job.id)


def test_a_job_is_cancelled_at_another_server(machine, talk, friend):
    asked, working = machine(workers=0), machine()
    gated = working.context.engine
    gated.open.clear()
    with contextlib.ExitStack() as stack:
        here, there = map(stack.enter_context, clients(asked, working))
        job = here.submit([talk], references=[friend])
        until(lambda: gated.running)
        assert here.cancel(job.id).state == "cancelled"
        until(lambda: not gated.running)
        until(lambda: not working.context.files.names(job.id))
        gated.open.set()
        assert there.wait(there.submit([talk], references=[friend])).state == "done"


@pytest.mark.slow
def test_voices_are_shared_and_a_job_keeps_the_one_it_was_accepted_with(machine, talk, friend):
    heard = []

    class Heard(Gated):
        def convert(self, source, voice, controls, progress):
            heard.append(voice)
            return super().convert(source, voice, controls, progress)

    asked, working = machine(workers=0), machine(Heard)
    gated = working.context.engine
    with contextlib.ExitStack() as stack:
        here, there = map(stack.enter_context, clients(asked, working))
        here.enrol("friend", [friend])
        assert [voice.name for voice in there.voices()] == ["friend"]
        first = working.context.engine.voices.get("friend")
        gated.open.clear()
        blocking = here.submit([talk], references=[friend])
        until(lambda: gated.running)
        job = here.submit([talk], voice="friend")
        # Another voice takes the name while the job waits, at the server that will do it.
        there.delete_voice("friend")
        gated.open.set()
        assert here.wait(blocking.id).state == "done"
        assert here.wait(job.id).state == "done"
        assert np.array_equal(heard[-1].embedding, first.embedding)
        with pytest.raises(UnknownVoiceError):
            here.submit([talk], voice="friend")
        # A name that is used again means the new voice at once, at every server.
        there.enrol("friend", [talk])
        here.enrol("third", [talk])
        again = asked.context.engine.voices.get("friend")
        assert not np.array_equal(again.embedding, first.embedding)
        there.rename_voice("friend", "enemy")
        assert sorted(voice.name for voice in here.voices()) == ["enemy", "third"]
        # Two who want one name at the same time: one gets it.
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(client.enrol, "one", [friend]) for client in (here, there)]
        assert sorted(future.exception() is None for future in both) == [False, True]


class Pieces(Engine):
    """Long conversions in pieces of two seconds, held up after the second."""

    def __init__(self, folder):
        config = PipelineConfig(use_mock_models=True, chunk_seconds=2.0)
        super().__init__(VoiceConversionPipeline(config), folder / "voices")
        self.open = threading.Event()
        self.pieces: list[float] = []

    def convert_file(self, source, voice, output, controls, progress, *, subtype, allow_truncated):
        def told(done):
            self.pieces.append(done)
            while len(self.pieces) > 1 and not self.open.wait(0.02):
                progress(done)
            progress(done)

        return super().convert_file(
            source, voice, output, controls, told, subtype=subtype, allow_truncated=allow_truncated
        )


@pytest.mark.slow
def test_a_long_recording_goes_on_at_another_server_where_one_stopped(
    machine, talk, friend, monkeypatch
):
    monkeypatch.setattr("auto_voice.server.tasks.IN_MEMORY_SECONDS", 4.0)
    first = machine(Pieces, grace_seconds=0.1)
    begun, waiting = first.context.engine, machine(Pieces, workers=0)
    begun.open.clear()
    with Client(waiting.url, timeout_seconds=60, patience_seconds=60) as client:
        job = client.submit([friend], references=[talk])
        until(lambda: len(begun.pieces) > 1)
        first.stop()
        second = machine(Pieces)
        done = client.wait(job.id)
        assert done.items[0].state == "done"
        assert done.items[0].result["resumed"] is True
        made, _ = soundfile.read(io.BytesIO(client.result(job.id).content))
    ended = second.context.engine
    assert min(ended.pieces) > begun.pieces[0]  # the first piece was not made twice
    alone = ended.pipeline.convert(friend, talk)
    assert np.abs(made - alone.samples).max() < 1e-3


def test_a_worker_that_counts_as_dead_does_not_keep_its_successor_from_the_work(
    machine, talk, friend, monkeypatch
):
    """It still holds the lock of what it was writing, which on a network can outlive it."""
    monkeypatch.setattr("auto_voice.server.tasks.IN_MEMORY_SECONDS", 4.0)
    server = machine(workers=0)
    with Client(server.url, timeout_seconds=60, patience_seconds=60) as client:
        job = client.submit([friend], references=[talk])
        context = machine(workers=0).context
        claim = context.store.claim(COMPUTE)
        context.files.bring(claim)
        folder = context.files.folder(job.id)
        with Checkpoint(folder / "out-0.wav", "of the dead one"):
            result = context.workers._perform(claim, CancellationToken())
        context.files.deliver(claim, result)
        context.store.finish(claim, result=result)
        assert len(client.result(job.id).content) > 1000


@pytest.mark.slow
def test_logging_out_at_one_server_ends_the_session_at_the_other(machine):
    token = "a-token-of-the-tests"
    here, there = machine(workers=0, tokens=(token,)), machine(workers=0, tokens=(token,))
    opened = httpx2.post(f"{here.url}/v1/session", json={"token": token}, timeout=60)
    cookie = {"cookie": opened.headers["set-cookie"].partition(";")[0]}

    def status(server):
        return httpx2.get(f"{server.url}/v1/jobs", headers=cookie, timeout=60).status_code

    assert [status(server) for server in (here, there)] == [200, 200]
    assert httpx2.delete(f"{here.url}/v1/session", headers=cookie, timeout=60).status_code == 204
    assert status(here) == 401
    until(lambda: status(there) == 401)


@pytest.mark.slow
def test_without_its_database_a_server_says_so_and_goes_on_when_it_is_back(
    machine, postgres_server, talk, friend, caplog
):
    caplog.set_level(logging.DEBUG)
    server = machine()
    gated = server.context.engine
    gated.open.clear()
    with Client(server.url, timeout_seconds=60, patience_seconds=60) as client:
        running = client.submit([talk], references=[friend])
        until(lambda: gated.running)
        waiting = client.submit([talk], references=[friend])
        postgres_server.stop()
        try:
            answer = until(lambda: _refused(server, talk, friend))
            assert answer.json()["error"]["message"].startswith("The server's job database cannot")
            ready = until(lambda: _not_ready(server))
            assert "job database cannot be used" in ready["status"]
            gated.open.set()  # what runs ends while the database is away
            until(lambda: not gated.running)
            told = answer.text + str(ready) + caplog.text
        finally:
            postgres_server.start()
        assert [client.wait(job.id).state for job in (running, waiting)] == ["done", "done"]
        assert len(gated.started) == 2
        until(lambda: httpx2.get(f"{server.url}/readyz", timeout=60).status_code == 200)
    assert "ss/word" not in told
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("files", ["objects"], indirect=True)
@pytest.mark.slow
def test_without_its_object_store_accepted_work_waits_until_it_is_back(
    machine, talk, friend, caplog
):
    server = machine()
    gated, objects = server.context.engine, server.context.files._objects
    with Client(server.url, timeout_seconds=60, patience_seconds=60) as client:
        gated.open.clear()
        first = client.submit([talk], references=[friend])
        until(lambda: gated.running)
        job = client.submit([talk], references=[friend])
        working, objects._fs = objects._fs, Away()
        gated.open.set()  # what runs cannot hand its result over
        answer = until(lambda: _refused(server, talk, friend))
        assert "files cannot be used" in answer.json()["error"]["message"]
        assert "cannot be used (the bucket is away)" in until(lambda: _not_ready(server))["status"]
        objects._fs = working
        assert [client.wait(one.id).state for one in (first, job)] == ["done", "done"]
        until(lambda: httpx2.get(f"{server.url}/readyz", timeout=60).status_code == 200)
        assert len(client.result(job.id).content) > 1000
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("files", ["objects"], indirect=True)
def test_a_job_is_known_as_long_as_its_files_cannot_be_deleted(machine, talk, friend):
    server = machine()
    context, objects = server.context, server.context.files._objects
    with Client(server.url, timeout_seconds=60, patience_seconds=60) as client:
        job, later = (client.submit([talk], references=[friend]) for _ in range(2))
        assert [client.wait(one.id).state for one in (job, later)] == ["done", "done"]
        working, objects._fs = objects._fs, Away()
        address = f"{server.url}/v1/jobs/{job.id}"
        try:
            assert httpx2.delete(address, timeout=60).status_code == 503
            context.workers._keep_bytes = 0
            with pytest.raises(StorageError):
                context.workers.sweep()
        finally:
            objects._fs = working
        assert context.files.names(job.id)
        assert httpx2.get(address, timeout=60).status_code == 200
        assert httpx2.delete(address, timeout=60).status_code == 204
        assert context.workers.sweep() == 1
        for one in (job, later):
            assert not context.files.names(one.id)
        assert context.store.ids() == set()


@pytest.mark.parametrize("files", ["objects"], indirect=True)
def test_who_has_no_token_is_not_told_where_database_and_files_are(machine, caplog):
    token = "a-token-of-the-tests"
    server = machine(workers=0, tokens=(token,))
    objects = server.context.files._objects
    working, objects._fs = objects._fs, Away()
    try:
        with pytest.raises(StorageError):
            server.context.files.names(new_id())
        address, known = f"{server.url}/readyz", {"authorization": f"Bearer {token}"}
        hidden = httpx2.get(address, timeout=60)
        wrong = httpx2.get(address, headers={"authorization": "Bearer x"}, timeout=60)
        told = httpx2.get(address, headers=known, timeout=60)
    finally:
        objects._fs = working
    assert [answer.status_code for answer in (hidden, wrong, told)] == [503, 503, 503]
    for answer in (hidden, wrong):
        assert answer.json()["status"].startswith("work waits for the job database or")
        assert "bucket" not in answer.text
        assert "memory:" not in answer.text
    assert "the bucket is away" in told.json()["status"]
    assert "the bucket is away" in caplog.text


class Away:
    """A file system that cannot be reached."""

    def __getattr__(self, name):
        raise OSError("the bucket is away")


@pytest.fixture
def objects():
    """An object store in memory."""
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra postgres)")
    return ObjectStore(f"memory://{new_id()}")


def test_no_name_in_a_bucket_is_written_elsewhere_than_in_the_folder_of_its_job(objects, tmp_path):
    files, job_id = ObjectFiles(objects, tmp_path / "a" / "b" / "scratch"), new_id()
    harmless = {"in-0", "in-0.wav", "ref-1", "voice.safetensors", "out-0.wav.partial/part-1"}
    evil = {
        "ref-/../../../../evil",
        "in-0./../../evil",
        "/ref-1",
        "out-0.wav.partial/../../evil",
        "out-0.wav.partial/..",
        "out-0./../x.partial/evil",
        "ref-\\..\\..\\evil",
    }
    objects.names = lambda folder: dict.fromkeys([*harmless, *evil], "mark")

    def get(name, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    objects.get = get
    item = JobItem(0, "a")
    job = JobRecord(job_id, "c", "convert", "running", {}, False, 1.0, None, None, None, (item,))
    files.bring(Claim(job, item, "ticket"))
    folder = files.folder(job_id)
    made = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.relative_to(folder).as_posix() for path in made} == harmless


def test_a_voice_that_the_object_store_refused_is_used_nowhere(objects, tmp_path):
    library = ObjectVoices(objects, tmp_path / "voices")
    old, new = (bare_voice(np.eye(256, dtype=np.float32)[n]) for n in range(2))
    library.add("ann", old)
    library.get("ann")
    working, objects._fs = objects._fs, HalfAway(objects._fs)
    with pytest.raises(StorageError):
        library.add("ann", new, overwrite=True)
    objects._fs = working
    assert np.array_equal(library.get("ann").embedding, old.embedding)


class HalfAway:
    """A file system that can be read and not written."""

    def __init__(self, working):
        self._working = working

    def __getattr__(self, name):
        if name == "put_file":
            raise OSError("the bucket is full")
        return getattr(self._working, name)


def test_work_whose_files_are_carried_too_slowly_is_free_when_its_process_has_stopped(
    opened, objects, tmp_path, monkeypatch
):
    monkeypatch.setattr("auto_voice.server.workers.STOPPING_SECONDS", 0.1)
    store, other = opened(lease_seconds=600.0), opened(lease_seconds=600.0)
    files, job_id = ObjectFiles(objects, tmp_path / "scratch"), new_id()
    (files.make(job_id) / "in-0").write_bytes(b"x")
    files.publish(job_id)
    store.add(JobRequest(job_id, "c", "convert", ["x"], {}), MANY)
    begun, carrying, go_on, over = (threading.Event() for _ in range(4))

    def perform(claim, token):
        partial = files.folder(job_id) / "out-0.wav.partial"
        partial.mkdir()
        (partial / "part-0").write_bytes(b"y")
        begun.set()
        while True:
            token.check()
            time.sleep(0.01)

    def slowly(path, name):
        carrying.set()
        assert go_on.wait(60)

    working = Workers(
        store, files, perform, count=1, keep_bytes=1, observe=lambda *_: over.set(), sweeps=False
    )
    working.start()
    try:
        assert begun.wait(60)
        monkeypatch.setattr(objects, "put", slowly)
        stopping = threading.Thread(target=working.stop, args=(0.1,))
        stopping.start()
        assert carrying.wait(60)
        stopping.join(60)
        item = other.get(job_id).items[0]
        assert (item.state, item.attempts) == ("queued", 0)
        claim = other.claim(COMPUTE)
    finally:
        go_on.set()
    assert over.wait(60)  # the first process comes to its end, and changes nothing
    assert other.beat() == set()
    assert other.finish(claim, result={}).state == DONE


def test_news_make_nobody_look_for_dead_processes(opened, tmp_path, monkeypatch):
    """With many processes, each change of one would else cost a look of all of them."""
    store, other = opened(lease_seconds=600.0), opened(lease_seconds=600.0)
    beaten, looks, told = threading.Semaphore(0), [], []
    beat, recover = store.beat, store.recover
    monkeypatch.setattr(store, "beat", lambda: (beat(), beaten.release())[0])
    monkeypatch.setattr(store, "recover", lambda most: looks.append(most) or recover(most))
    working = Workers(
        store, JobFiles(tmp_path), lambda *_: {}, count=0, keep_bytes=1, sweeps=False,
        every_beat=lambda: told.append(1),
    )  # fmt: skip
    working.start()
    try:
        for _ in range(4):
            assert beaten.acquire(timeout=60)
            other.cancel(add(other).id)
    finally:
        working.stop(0.0)
    assert (len(looks), len(told)) == (1, 1)


def test_a_bucket_that_is_not_there_is_one_sentence(tmp_path, database, capsys):
    pytest.importorskip("fsspec", reason="fsspec is not installed (extra postgres)")
    args = ["worker", "--mock", "--data-dir", str(tmp_path / "data"), "--database", database]
    # A file where the folder of the store would be.
    (tmp_path / "x").touch()
    assert main.main([*args, "--files", f"local://{tmp_path / 'x'}"]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_a_database_that_was_made_anew_is_set_up_again(opened, database):
    import psycopg

    store = opened()
    with psycopg.connect(database) as db:
        db.execute("DROP TABLE autovoice_items, autovoice_jobs, autovoice_version")
    assert _fails(lambda: store.get("x" * 22))
    job = add(store)
    assert store.get(job.id).state == "queued"


def _refused(server, talk, friend):
    files = [("source", talk.read_bytes()), ("reference", friend.read_bytes())]
    answer = httpx2.post(f"{server.url}/v1/jobs", files=files, timeout=60)
    if answer.status_code != 503:
        return None
    assert int(answer.headers["retry-after"]) > 0
    return answer


def _not_ready(server):
    answer = httpx2.get(f"{server.url}/readyz", timeout=60)
    return answer.json() if answer.status_code == 503 else None


@pytest.mark.slow
def test_a_server_that_starts_before_its_database_waits_for_it(
    machine, postgres_server, talk, friend
):
    postgres_server.stop()
    try:
        server = machine()
        ready = until(lambda: _not_ready(server))
        assert "job database cannot be used" in ready["status"]
    finally:
        postgres_server.start()
    until(lambda: httpx2.get(f"{server.url}/readyz", timeout=60).status_code == 200)
    with Client(server.url, timeout_seconds=60, patience_seconds=60) as client:
        assert client.wait(client.submit([talk], references=[friend])).state == "done"


def test_an_enrolment_that_died_after_its_voice_was_kept_is_done_again(machine, friend):
    server = machine(workers=0)
    files = {"reference": ("friend.wav", friend.read_bytes())}
    fields = {"name": "late", "wait": "false"}
    answer = httpx2.post(f"{server.url}/v1/voices", data=fields, files=files, timeout=60)
    assert answer.status_code == 202
    context = machine(workers=0).context
    claim = context.store.claim(COMPUTE)
    context.files.bring(claim)
    context.workers._perform(claim, CancellationToken())  # and then it is killed
    context.files.leave(claim)
    assert server.context.engine.voices.get("late")
    context.store.release(claim)
    with Client(machine().url, timeout_seconds=60, patience_seconds=60) as client:
        assert client.wait(answer.json()["id"]).state == "done"


# Processes


def test_worker_without_a_database_is_one_sentence(tmp_path, capsys):
    assert main.main(["worker", "--mock", "--data-dir", str(tmp_path)]) == 2
    assert "name it with --database" in capsys.readouterr().err


def test_a_worker_that_would_do_nothing_is_refused(tmp_path, capsys):
    args = ["worker", "--mock", "--data-dir", str(tmp_path), "--workers", "0"]
    assert main.main(args) == 2
    assert "--workers" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "worker"])
def test_a_folder_of_voices_beside_shared_files_is_one_sentence(name, tmp_path, capsys, database):
    args = [name, "--mock", "--data-dir", str(tmp_path / "data"), "--database", database]
    more = ["--files", str(tmp_path / "shared"), "--voice-dir", str(tmp_path / "voices")]
    assert main.main([*args, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--voice-dir cannot be given with --files" in line
    assert not (tmp_path / "voices").exists()


def test_files_without_a_database_is_one_sentence(tmp_path, capsys):
    args = ["serve", "--mock", "--data-dir", str(tmp_path), "--files", str(tmp_path / "x")]
    assert main.main(args) == 2
    assert "needs --database" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "said"),
    [("nonsense://x/y", "nor a URL that fsspec knows"), ("s3://bucket/x", "s3fs")],
)
def test_files_that_cannot_be_are_one_sentence(tmp_path, capsys, database, url, said):
    if url.startswith("s3"):
        with contextlib.suppress(ImportError):
            import s3fs  # noqa: F401

            pytest.skip("s3fs is installed")
    args = ["worker", "--mock", "--data-dir", str(tmp_path), "--database", database]
    assert main.main([*args, "--files", url]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def command(tmp_path):
    """Starts ``autovoice``: the process and its log."""
    running = []

    def start(*args, **variables):
        log = tmp_path / f"{len(running)}.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "auto_voice.cli", *args, "--mock"],
                stderr=stderr,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            )
        running.append(process)
        return process, log

    yield start
    for process in running:
        process.kill()
        process.wait()


def said(process, log, pattern):
    def found():
        text = log.read_text()
        assert process.poll() is None, text
        return re.search(pattern, text)

    return until(found, seconds=300)


@pytest.mark.slow
def test_two_servers_and_a_worker_as_the_page_starts_them(
    command, database, tmp_path, talk, friend
):
    """On one machine with one data folder; the password is in a variable of its own."""
    plain = re.sub(":[^:@/]+@", "@", database)
    shared = {
        "AUTOVOICE_DATABASE": plain,
        "PGPASSWORD": PASSWORD,
        "AUTOVOICE_FILES": str(tmp_path / "shared"),
        "AUTOVOICE_VOICE_DIR": str(tmp_path / "not used"),
    }
    at = ["--data-dir", str(tmp_path / "data")]
    servers = [command("serve", "--port", "0", "--workers", "0", *at, **shared) for _ in range(2)]
    here, there = (said(*server, r"listens on (http://\S+)/")[1] for server in servers)
    worker, log = command("worker", *at, **shared)
    said(worker, log, "works on what servers accept")
    with (
        Client(here, timeout_seconds=60, patience_seconds=60) as one,
        Client(there, timeout_seconds=60, patience_seconds=60) as other,
    ):
        one.enrol("friend", [friend])
        job = one.submit([talk, talk], voice="friend")
        assert other.wait(job.id).state == "done"
        assert len(other.result(job.id, 1).content) > 1000
        assert len(other.convert(talk, voice="friend").content) > 1000
    assert (tmp_path / "shared" / "voices" / "friend.safetensors").is_file()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    for _, text in [*servers, (worker, log)]:
        assert "Traceback" not in text.read_text()
        assert PASSWORD not in text.read_text()


def test_what_is_shared_is_not_shown(monkeypatch, capsys, database):
    monkeypatch.setenv("AUTOVOICE_DATABASE", database)
    monkeypatch.setenv("AUTOVOICE_FILES", "sftp://me:hidden@host/x")
    assert main.main(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert "AUTOVOICE_DATABASE" in shown
    assert PASSWORD not in shown
    assert "hidden" not in shown
    assert "ss%2Fword" not in shown


PROCESS = """
    import sys, threading, time
    from pathlib import Path
    import uvicorn
    from auto_voice.inference import PipelineConfig, VoiceConversionPipeline
    from auto_voice.server import Engine, ServerSettings, create_app
    from auto_voice.server.app import make_context
    from auto_voice.server.files import make_files, make_voices
    from auto_voice.server.postgres import PostgresJobStore
    from auto_voice.server.telemetry import set_up_logs

    set_up_logs("text")
    folder, database, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    class Slow(Engine):
        def convert(self, source, voice, controls, progress):
            with open(folder / "begun.log", "a") as log:
                log.write(f"{source.seconds:.3f}\\n")
            time.sleep(0.3)
            return super().convert(source, voice, controls, progress)

    settings = ServerSettings(
        data_dir=folder / f"data-{port}-{sys.argv[4]}",
        database=database,
        files=str(folder / "shared"),
        port=port,
    )
    pipeline = VoiceConversionPipeline(PipelineConfig(use_mock_models=True))
    engine = Slow(pipeline, make_voices(settings, None))
    store = PostgresJobStore(database, place=make_files(settings).place, lease_seconds=5.0)
    if port:
        app = create_app(settings, engine, store=store)
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")
        uvicorn.Server(config).run()
    else:
        make_context(settings, engine, store, only_works=True).workers.start()
        threading.Event().wait()
"""

# A row for each time that an item became done.
WATCH = """
CREATE TABLE done_log (job text, idx integer);
CREATE FUNCTION note_done() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN INSERT INTO done_log VALUES (new.job, new.idx); RETURN new; END';
CREATE TRIGGER note_done AFTER UPDATE ON autovoice_items FOR EACH ROW
    WHEN (new.state = 'done' AND old.state != 'done') EXECUTE FUNCTION note_done();
"""


class Site:
    """Two servers and two workers as processes, any of which can be killed and started again."""

    def __init__(self, folder, database, ports):
        self.folder, self._database = folder, database
        self._script = folder / "process.py"
        self._script.write_text(textwrap.dedent(PROCESS))
        self._ports = {"server 1": ports[0], "server 2": ports[1], "worker 1": 0, "worker 2": 0}
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.running = {}
        for name in self._ports:
            self.start(name)

    def start(self, name):
        args = [str(self.folder), self._database, str(self._ports[name]), name.replace(" ", "-")]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, str(self._script), *args],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def kill(self, name):
        self.running[name].kill()
        self.running[name].wait()

    def close(self):
        for name in self.running:
            self.kill(name)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no kill -9")
def test_kill_9_of_each_process_and_of_the_database_loses_and_repeats_nothing(
    tmp_path, database, postgres_server, talk, friend, unused_ports
):
    import psycopg

    PostgresJobStore(database, place=_place(tmp_path)).close()
    with psycopg.connect(database) as db:
        db.execute(WATCH)
    samples, rate = soundfile.read(talk)
    site, accepted, over = Site(tmp_path, database, unused_ports), [], threading.Event()
    begin, refused = threading.Event(), threading.Event()

    def load():
        """Jobs without end, to whichever server answers, as a load balancer sends them."""
        n = 0
        while not over.is_set():
            source = tmp_path / f"{n}.wav"
            soundfile.write(source, samples[: rate // 2 + 16 * n], rate)
            for url in (site.urls[n % 2], site.urls[1 - n % 2]):
                with (
                    contextlib.suppress(AutoVoiceError, httpx2.HTTPError),
                    Client(url, timeout_seconds=20) as client,
                ):
                    accepted.append(client.submit([source, friend], references=[friend]).id)
                    begin.set()
                    break
            else:
                refused.set()
            n += 1
            # As many as four workers can do, more or less.
            over.wait(0.5)

    try:
        sender = threading.Thread(target=load)
        sender.start()
        assert begin.wait(60)
        for name in ("worker 1", "server 1", "worker 2", "server 2"):
            had = len(accepted)
            until(lambda had=had: len(accepted) >= had + 3, seconds=300)
            site.kill(name)
            until(lambda had=had: len(accepted) >= had + 5, seconds=300)
            site.start(name)
        postgres_server.stop()
        had = len(accepted)
        refused.clear()
        try:
            assert refused.wait(300)
        finally:
            postgres_server.start()
        until(lambda: len(accepted) >= had + 3, seconds=300)
        over.set()
        sender.join()
        for url in site.urls:
            until(lambda url=url: _answers(url))
        with contextlib.ExitStack() as stack:
            here, there = (stack.enter_context(Client(url)) for url in site.urls)
            for job in accepted:
                found = here.wait(job, within_seconds=300)
                assert [item.state for item in found.items] == ["done", "done"], [
                    item.error for item in found.items
                ]
                for n in range(2):
                    assert len(there.result(job, n).content) > 1000
    finally:
        over.set()
        site.close()
    with psycopg.connect(database) as db:
        done = Counter(db.execute("SELECT job, idx FROM done_log").fetchall())
    assert set(done) >= {(job, n) for job in accepted for n in range(2)}
    assert set(done.values()) == {1}
    begun = len((tmp_path / "begun.log").read_text().split())
    print(f"{len(accepted)} jobs of 2 recordings, begun {begun} times, done {sum(done.values())}")
    for name in site.running:
        assert "Traceback" not in (tmp_path / f"{name}.log").read_text()


def _place(folder):
    from auto_voice.server.files import JobFiles

    return JobFiles(folder / "shared" / "jobs").place


def _answers(url):
    try:
        return httpx2.get(f"{url}/readyz", timeout=20).status_code == 200
    except httpx2.HTTPError:
        time.sleep(0.1)
        return False


@pytest.fixture
def unused_ports():
    with reserved_ports(2) as ports:
        yield ports
