"""The queue: what is accepted is kept, what is finished is not done again, and nobody starves."""

from __future__ import annotations

import sqlite3
import time
from functools import partial

import pytest

from auto_voice.errors import BusyError, ConfigError, UnknownJobError
from auto_voice.server.files import new_id
from auto_voice.server.job_store import SqliteJobStore
from auto_voice.server.jobs import (
    CANCELLED,
    COMPUTE,
    DONE,
    FAILED,
    MAINTENANCE,
    QUEUED,
    RUNNING,
    JobRequest,
    QueueLimits,
    state_of,
)

MANY = QueueLimits(direct=1000, direct_client=1000, queued=1000, queued_client=1000)
# Seconds after which a process that gives no sign of life is dead.
LEASE = 1.0
LIMITS = QueueLimits(direct=4, direct_client=2, queued=20, queued_client=10)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.sqlite"


@pytest.fixture(params=["sqlite", "postgres"])
def opened(request, path):
    """Opens the store anew, as another process would."""
    made = []
    if request.param == "sqlite":
        make = partial(SqliteJobStore, path)
    else:
        url = request.getfixturevalue("database")
        from auto_voice.server.postgres import PostgresJobStore

        make = partial(PostgresJobStore, url, lease_seconds=LEASE)

    def opening():
        made.append(make())
        return made[-1]

    yield opening
    for store in made:
        store.close()


@pytest.fixture
def store(opened):
    return opened()


def recovered(store):
    """What a process takes up from those that gave no sign of life."""
    if store.shared:
        deadline = time.monotonic() + 30
        while (found := (store.beat(), store.recover(3))[1]) == (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found
    return store.recover(3)


def add(store, client="a", items=1, **more):
    names = [f"{n}.wav" for n in range(items)]
    return store.add(JobRequest(new_id(), client, "convert", names, {"x": 1}, **more), LIMITS)


def test_a_job_goes_from_queued_to_done(store):
    job = add(store, items=2)
    assert (job.state, job.progress, job.request) == (QUEUED, 0.0, {"x": 1})
    first = store.claim(COMPUTE)
    assert (first.job.id, first.item.index, first.item.attempts) == (job.id, 0, 1)
    store.report(first, 0.5)
    assert (store.get(job.id).state, store.get(job.id).progress) == (RUNNING, 0.25)
    store.finish(first, result={"file": "out-0.wav", "bytes": 7})
    second = store.claim(COMPUTE)
    done = store.finish(second, error={"type": "X", "message": "m"})
    assert (done.state, done.progress) == (DONE, 1.0)
    assert [item.state for item in done.items] == [DONE, FAILED]
    assert done.expires == pytest.approx(done.finished + 86400)
    assert store.claim(COMPUTE) is None


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([QUEUED, QUEUED], QUEUED),
        ([DONE, QUEUED], RUNNING),
        ([RUNNING, FAILED], RUNNING),
        ([DONE, FAILED], DONE),
        ([FAILED, FAILED], FAILED),
        ([DONE, CANCELLED], CANCELLED),
    ],
)
def test_state_of_a_job(states, expected):
    assert state_of(states) == expected


def test_clients_take_turns_whatever_they_have_queued(store):
    add(store, "greedy", items=6)
    add(store, "modest")
    add(store, "other")
    order = []
    while (claim := store.claim(COMPUTE)) is not None:
        order.append(claim.job.client)
        store.finish(claim, result={})
    assert set(order[:3]) == {"greedy", "modest", "other"}
    assert order[3:] == ["greedy"] * 5


def test_a_client_with_nothing_running_comes_first(store):
    add(store, "a", items=3)
    store.claim(COMPUTE)
    add(store, "b", items=3)
    assert [store.claim(COMPUTE).job.client for _ in range(3)] == ["b", "a", "b"]


def test_direct_work_comes_before_the_clients_own_batch(store):
    add(store, items=3)
    direct = add(store, direct=True)
    assert store.claim(COMPUTE).job.id == direct.id


def services_until(store, job, newcomer):
    """How many items are served until ``job`` is, while a new client comes before each of them."""
    for served in range(1, 200):
        newcomer(served)
        claim = store.claim(COMPUTE)
        store.finish(claim, result={})
        if store.get(job.id).is_finished:
            return served
    raise AssertionError("it waits for ever")


def test_direct_requests_are_not_overtaken_by_newcomers_without_limit(store):
    for _ in range(3):
        job = store.add(JobRequest(new_id(), "a", "convert", ["x"], {}, direct=True), MANY)

    def newcomer(n):
        name = f"new {n}"
        store.add(JobRequest(new_id(), name, "convert", ["x"], {}, direct=True), MANY)

    assert services_until(store, job, newcomer) <= 3


def test_jobs_are_not_overtaken_by_newcomers_without_limit(store):
    job = add(store, "a", items=3)
    served = services_until(store, job, lambda n: add(store, f"new {n}"))
    assert served <= 9


def test_a_newcomer_goes_before_the_client_that_was_served_last(store):
    long = add(store, "a")
    claim = store.claim(COMPUTE)
    add(store, "b")
    assert store.others_wait(long.id)
    store.release(claim)
    assert [store.claim(COMPUTE).job.client for _ in range(2)] == ["b", "a"]


def test_direct_requests_do_not_keep_jobs_waiting_for_ever(store):
    job = add(store, "a", items=3)

    def newcomer(n):
        name = f"new {n}"
        store.add(JobRequest(new_id(), name, "convert", ["x"], {}, direct=True), MANY)

    assert services_until(store, job, newcomer) == 12


def test_lanes_do_not_wait_for_each_other(store):
    add(store)
    pull = store.add(JobRequest(new_id(), "a", "pull", ["m"], {}, lane=MAINTENANCE), LIMITS)
    assert store.claim(MAINTENANCE).job.id == pull.id


def test_limits_refuse_at_once_and_keep_nothing(store):
    add(store, "a", items=10)
    with pytest.raises(BusyError, match="10 of your recordings already wait") as own:
        add(store, "a")
    assert (own.value.http_status, own.value.retry_after > 0) == (429, True)
    add(store, "b", items=10)
    with pytest.raises(BusyError, match="20 recordings wait") as all_of_them:
        add(store, "c")
    assert all_of_them.value.http_status == 503
    add(store, "a", direct=True)
    assert store.depth().queued == 20
    assert len(store.listed("c", 10)) == 0


def test_the_same_key_gives_the_same_job(store):
    job = add(store, key="once")
    assert add(store, key="once").id == job.id
    assert add(store, "b", key="once").id != job.id
    assert store.find("a", "once", "").id == job.id
    assert store.find("a", "never", "") is None


def test_what_ran_when_the_process_died_is_queued_again_and_what_was_done_is_not(store, opened):
    job = add(store, items=3)
    store.finish(store.claim(COMPUTE), result={"file": "out-0.wav"})
    store.claim(COMPUTE)
    direct = add(store, "b", direct=True)
    other = opened()  # the first one is never closed, as if its process was killed
    assert recovered(other) == (1, 0)
    again = other.get(job.id)
    assert [item.state for item in again.items] == [DONE, QUEUED, QUEUED]
    assert again.items[0].result == {"file": "out-0.wav"}
    assert other.get(direct.id).state == CANCELLED
    assert other.claim(COMPUTE).item.index == 1


@pytest.mark.slow
def test_a_recording_that_kills_the_server_is_given_up(store, opened):
    job = add(store)
    for _ in range(2):
        opened().claim(COMPUTE)
        assert recovered(store) == (1, 0)
    opened().claim(COMPUTE)
    assert recovered(store) == (0, 1)
    assert store.get(job.id).state == FAILED
    assert "3 times" in store.get(job.id).items[0].error["message"]


def test_released_work_does_not_count_as_an_attempt(store):
    job = add(store)
    claim = store.claim(COMPUTE)
    store.report(claim, 0.5)
    store.release(claim)
    assert (store.get(job.id).state, store.get(job.id).progress) == (QUEUED, 0.0)
    assert store.claim(COMPUTE).item.attempts == 1


def test_cancelled_stays_cancelled_whatever_the_worker_says_later(store):
    job = add(store, items=2)
    claim = store.claim(COMPUTE)
    assert store.cancel(job.id).state == CANCELLED
    assert store.finish(claim, result={"file": "late.wav"}).items[0].result is None
    assert store.get(job.id).state == CANCELLED
    assert store.claim(COMPUTE) is None


def test_expiry_by_age_and_by_size(store):
    jobs = [add(store) for _ in range(3)]
    for _ in jobs:
        store.finish(store.claim(COMPUTE), result={"bytes": 100})
        time.sleep(0.01)
    assert store.expired(1000) == []
    assert store.expired(250) == [jobs[0].id]
    old = add(store, keep_seconds=0.0)
    store.finish(store.claim(COMPUTE), result={"bytes": 100})
    assert store.expired(1000) == [old.id]
    store.remove(old.id)
    store.remove(jobs[0].id)
    with pytest.raises(UnknownJobError):
        store.get(jobs[0].id)
    assert store.ids() == {job.id for job in jobs[1:]}


def test_a_database_of_another_version_is_refused(path):
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(ConfigError, match="another version"):
        SqliteJobStore(path)


def test_a_file_that_is_no_database_is_refused(path):
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="is damaged"):
        SqliteJobStore(path)
