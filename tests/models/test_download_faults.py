"""The faults that downloaders get wrong, row by row, against a local server that commits them."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import httpx2
import pytest

from auto_voice.errors import (
    DiskSpaceError,
    DownloadError,
    DownloadStatusError,
    IntegrityError,
    ModelUnavailableError,
)
from auto_voice.models.model_loader import ModelDownloader, ModelLoader
from auto_voice.models.registry.partials import HashingSink, Partial, PartialRecord
from auto_voice.models.registry.store import ModelStore
from auto_voice.models.registry.transfer import HttpTransfer, RetryPolicy, public_url
from fault_server import (
    FakeClock,
    Fault,
    FaultServer,
    fault_server,
    model_file,
    model_version,
    random_bytes,
)

SIZE = 3_000_000
DATA = random_bytes(SIZE)
OTHER = random_bytes(SIZE, seed=1)
CUT = 1_000_000
# Long enough that a busy machine does not look like a stall.
POLICY = RetryPolicy(read_timeout_s=15.0, connect_timeout_s=15.0)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with fault_server() as running:
        yield running


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def loader(tmp_path: Path, clock: FakeClock) -> Iterator[ModelLoader]:
    store = ModelStore(tmp_path / "models")
    with ModelLoader(
        store, downloader=ModelDownloader(store, policy=POLICY, clock=clock)
    ) as running:
        yield running


def pull(loader: ModelLoader, *sources: str | tuple[str, ...], data: bytes = DATA) -> bytes:
    paths = loader.ensure(model_version(model_file(data, *sources)))
    return paths["weights.bin"].read_bytes()


def partial_of(loader: ModelLoader, data: bytes = DATA) -> Partial:
    return loader.store.partial(hashlib.sha256(data).hexdigest())


def test_a_body_that_is_cut_is_resumed_where_it_ended(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=CUT))
    assert pull(loader, url) == DATA
    first, second = server.of("w")
    assert first.sent == CUT
    assert second.headers["range"] == f"bytes={CUT}-"
    assert second.headers["if-range"] == server.files["w"].etag
    assert server.sent("w") == SIZE


def test_a_body_cut_without_a_length_is_noticed_and_resumed(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", DATA, length=False)
    server.fail("w", Fault(cut_after=CUT))
    assert pull(loader, url) == DATA
    assert server.sent("w") == SIZE


def test_a_reset_connection_keeps_what_arrived(server: FaultServer, loader: ModelLoader) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=CUT, reset=True))
    assert pull(loader, url) == DATA
    # RST may drop what the kernel had not handed over yet.
    assert 0 <= server.sent("w") - SIZE <= CUT


def test_a_file_that_changes_before_the_resume_is_never_spliced(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", OTHER)
    server.fail("w", Fault(cut_after=CUT, status=0), Fault(status=404))
    with pytest.raises(ModelUnavailableError):
        pull(loader, url)
    assert partial_of(loader).size == CUT
    server.serve("w", DATA)
    assert pull(loader, url) == DATA
    last = server.of("w")[-1]
    assert last.headers["if-range"] != server.files["w"].etag
    assert (last.status, last.sent) == (200, SIZE)


def test_a_change_is_seen_even_where_the_server_ignores_if_range(
    server: FaultServer, loader: ModelLoader, clock: FakeClock
) -> None:
    url = server.serve("w", OTHER)
    server.fail("w", Fault(cut_after=CUT), Fault(status=404))
    with pytest.raises(ModelUnavailableError):
        pull(loader, url)
    server.serve("w", DATA, honour_if_range=False)
    assert pull(loader, url) == DATA
    assert [request.status for request in server.of("w")[2:]] == [206, 200]


def test_a_change_that_no_header_shows_is_caught_by_the_hash(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", OTHER, etag="")
    server.fail("w", Fault(cut_after=CUT), Fault(status=404))
    with pytest.raises(ModelUnavailableError):
        pull(loader, url)
    server.serve("w", DATA, etag="")
    assert pull(loader, url) == DATA
    assert [request.status for request in server.of("w")[2:]] == [206, 200]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_trouble_is_retried(
    server: FaultServer, loader: ModelLoader, clock: FakeClock, status: int
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(status=status), Fault(status=status))
    assert pull(loader, url) == DATA
    assert len(server.of("w")) == 3
    assert len(clock.slept) == 2
    assert clock.slept[0] <= POLICY.backoff_s
    assert clock.slept[1] <= 2 * POLICY.backoff_s


def test_who_waits_hears_of_retries_that_add_up(
    server: FaultServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(status=503), Fault(status=503))
    store = ModelStore(tmp_path / "models")
    downloader = ModelDownloader(store, clock=FakeClock())
    with caplog.at_level("WARNING"), ModelLoader(store, downloader=downloader) as loader:
        loader.ensure(model_version(model_file(DATA, url)))
    assert [record.message.partition(" in ")[0] for record in caplog.records] == [
        f"{url} answered 503 Service Unavailable; try 3 of 6"
    ]


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(
    server: FaultServer, loader: ModelLoader, clock: FakeClock
) -> None:
    url = server.serve("w", DATA)
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    server.fail(
        "w",
        Fault(status=503, headers=(("Retry-After", "7"),)),
        Fault(status=503, headers=(("Retry-After", date),)),
        Fault(status=503, headers=(("Retry-After", "soon"),)),
    )
    assert pull(loader, url) == DATA
    assert clock.slept[0] == 7
    assert 50 < clock.slept[1] <= 60
    assert clock.slept[2] < 5


def test_a_server_that_asks_for_an_hour_is_left_for_the_next_mirror(
    server: FaultServer, loader: ModelLoader, clock: FakeClock
) -> None:
    server.fail("a", Fault(status=503, headers=(("Retry-After", "3600"),)))
    assert pull(loader, server.serve("a", DATA), server.serve("b", DATA)) == DATA
    assert clock.slept == []
    assert len(server.of("a")) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_lasting_refusal_is_not_retried(
    server: FaultServer, loader: ModelLoader, clock: FakeClock, status: int
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(status=status))
    with pytest.raises(ModelUnavailableError, match=f"answered {status}"):
        pull(loader, url)
    assert len(server.of("w")) == 1
    assert clock.slept == []
    assert pull(loader, url) == DATA


def test_a_stalled_body_times_out_and_is_resumed(
    server: FaultServer, tmp_path: Path, clock: FakeClock
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(stall_after=CUT))
    store = ModelStore(tmp_path / "models")
    impatient = ModelDownloader(store, policy=RetryPolicy(read_timeout_s=1.0), clock=clock)
    with ModelLoader(store, downloader=impatient) as loader:
        assert pull(loader, url) == DATA
    assert server.of("w")[1].headers["range"] == f"bytes={CUT}-"


def test_a_body_that_drips_falls_to_the_speed_watchdog(tmp_path: Path) -> None:
    clock = FakeClock()
    requests: list[str] = []

    class Drip(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for byte in DATA[:100]:
                clock.time += 5
                yield bytes([byte])

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request.headers.get("range", ""))
        if len(requests) == 1:
            headers = {"content-length": "100", "etag": '"a"'}
            return httpx2.Response(200, headers=headers, stream=Drip())
        start = int(requests[-1][len("bytes=") : -1])
        headers = {"content-range": f"bytes {start}-99/100", "etag": '"a"'}
        return httpx2.Response(206, headers=headers, stream=httpx2.ByteStream(DATA[start:100]))

    transfer = HttpTransfer(transport=httpx2.MockTransport(answer), clock=clock)
    partial = Partial(tmp_path / "x.part")
    digest = transfer.fetch("https://drip.example/w", partial, limit=100)
    transfer.close()
    assert digest == hashlib.sha256(DATA[:100]).hexdigest()
    assert len(requests) == 2
    # 30 s window at 5 s a byte.
    assert requests[1] == "bytes=6-"


def test_a_full_disk_is_refused_before_the_transfer_and_keeps_the_partial(
    server: FaultServer, tmp_path: Path
) -> None:
    store = ModelStore(tmp_path / "models")
    url = server.serve("w", DATA)
    partial = store.partial(hashlib.sha256(DATA).hexdigest())
    partial.path.write_bytes(DATA[:CUT])
    with (
        ModelLoader(store, free_bytes=lambda path: SIZE - CUT - 1) as loader,
        pytest.raises(DiskSpaceError, match=r"needs 2\.0 MB more.*has 2\.0 MB left"),
    ):
        pull(loader, url)
    assert server.seen == []
    assert partial.path.read_bytes() == DATA[:CUT]
    with ModelLoader(store) as loader:
        assert pull(loader, url) == DATA
    assert server.sent("w") == SIZE - CUT


def test_a_disk_that_fills_up_on_the_way_keeps_what_arrived(
    server: FaultServer, loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("w", DATA)
    write = HashingSink.write

    def fills_up(sink: HashingSink, chunk: bytes) -> None:
        if sink.position > CUT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(sink, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(HashingSink, "write", fills_up)
        with pytest.raises(DiskSpaceError, match=r"filled up while downloading weights\.bin"):
            pull(loader, url)
    kept = partial_of(loader).size
    assert kept > CUT
    assert pull(loader, url) == DATA
    assert server.of("w")[-1].sent == SIZE - kept


def test_wrong_bytes_get_one_clean_retry(server: FaultServer, loader: ModelLoader) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(wrong_bytes=True))
    assert pull(loader, url) == DATA
    assert [request.sent for request in server.of("w")] == [SIZE, SIZE]
    assert "range" not in server.of("w")[1].headers


def test_wrong_bytes_twice_go_to_the_next_mirror(
    server: FaultServer, loader: ModelLoader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="auto_voice"):
        assert pull(loader, server.serve("a", OTHER), server.serve("b", DATA)) == DATA
    assert len(server.of("a")) == 2
    assert "trying the next source" in caplog.text
    record = loader.store.metadata("toy", "1.0")
    assert record is not None
    assert record["files"]["weights.bin"]["source"] == server.url("b")


def test_wrong_bytes_everywhere_install_nothing(server: FaultServer, loader: ModelLoader) -> None:
    with pytest.raises(IntegrityError, match="Nothing was installed"):
        pull(loader, server.serve("a", OTHER))
    assert loader.store.installed() == []
    assert partial_of(loader).size == 0


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_file_of_another_size_is_refused_by_its_header(
    server: FaultServer, loader: ModelLoader, size: int
) -> None:
    with pytest.raises(IntegrityError, match=f"has {size} bytes and not {SIZE}"):
        pull(loader, server.serve("w", random_bytes(size)))


def test_a_body_without_length_never_grows_past_the_expected_size(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", DATA + DATA, length=False)
    with pytest.raises(IntegrityError, match=f"more than the expected {SIZE} bytes"):
        pull(loader, url)


def test_a_wrong_content_range_starts_clean(server: FaultServer, loader: ModelLoader) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=CUT), Fault(content_range=f"bytes 5-{SIZE - 1}/{SIZE}"))
    assert pull(loader, url) == DATA
    assert [request.status for request in server.of("w")] == [200, 206, 200]


def test_a_range_past_the_end_starts_clean(server: FaultServer, loader: ModelLoader) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=CUT), Fault(status=416))
    assert pull(loader, url) == DATA
    assert [request.status for request in server.of("w")] == [200, 416, 200]


def test_a_server_without_ranges_is_downloaded_from_the_start(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", DATA, ranges=False)
    server.fail("w", Fault(cut_after=CUT))
    assert pull(loader, url) == DATA
    assert [request.sent for request in server.of("w")] == [CUT, SIZE]


def test_last_modified_stands_in_for_an_etag_but_a_weak_one_does_not(
    server: FaultServer, loader: ModelLoader
) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    url = server.serve("w", DATA, etag='W/"weak"', last_modified=date)
    server.fail("w", Fault(cut_after=CUT))
    assert pull(loader, url) == DATA
    assert server.of("w")[1].headers["if-range"] == date


def test_progress_refills_the_budget_of_attempts(server: FaultServer, loader: ModelLoader) -> None:
    url = server.serve("w", DATA)
    cuts = 3 * POLICY.attempts
    server.fail("w", *[Fault(cut_after=SIZE // (cuts + 1))] * cuts)
    assert pull(loader, url) == DATA
    assert len(server.of("w")) == cuts + 1
    assert server.sent("w") == SIZE


def test_no_progress_spends_the_budget_and_keeps_the_partial(
    server: FaultServer, loader: ModelLoader, clock: FakeClock
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=CUT), *[Fault(status=500)] * 100)
    with pytest.raises(ModelUnavailableError, match="answered 500"):
        pull(loader, url)
    # The cut one made progress and counts as the first failure of a full budget.
    assert len(server.of("w")) == POLICY.attempts
    assert partial_of(loader).size == CUT
    server.faults["w"].clear()
    assert pull(loader, url) == DATA
    assert server.sent("w") == SIZE


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", DATA, ranges=False)
    server.fail("w", *[Fault(cut_after=CUT)] * 100)
    with pytest.raises(ModelUnavailableError, match=r"ended after|closed"):
        pull(loader, url)
    assert len(server.of("w")) <= POLICY.attempts + 1


def test_backoff_is_full_jitter_below_a_capped_exponential() -> None:
    policy = RetryPolicy(backoff_s=0.5, backoff_cap_s=4.0)
    assert [policy.wait_s(n, 1.0) for n in range(1, 7)] == [0.5, 1, 2, 4, 4, 4]
    assert policy.wait_s(5, 0.0) == 0


def test_a_mirror_continues_the_partial_of_another(
    server: FaultServer, loader: ModelLoader
) -> None:
    a, b = server.serve("a", DATA), server.serve("b", DATA, etag='"own"')
    server.fail("a", Fault(cut_after=CUT), Fault(status=404))
    assert pull(loader, a, b) == DATA
    assert server.sent("b") == SIZE - CUT
    # Another server's ETag means nothing here; the sha256 decides.
    assert "if-range" not in server.of("b")[0].headers


def test_a_complete_partial_is_installed_without_a_request(
    server: FaultServer, loader: ModelLoader
) -> None:
    partial_of(loader).path.write_bytes(DATA)
    assert pull(loader, server.serve("w", DATA)) == DATA
    assert server.seen == []


def test_a_complete_partial_with_wrong_bytes_is_thrown_away(
    server: FaultServer, loader: ModelLoader
) -> None:
    partial_of(loader).path.write_bytes(OTHER)
    assert pull(loader, server.serve("w", DATA)) == DATA
    assert server.sent("w") == SIZE


def test_a_partial_longer_than_the_file_is_thrown_away(
    server: FaultServer, loader: ModelLoader
) -> None:
    partial_of(loader).path.write_bytes(DATA + b"more")
    assert pull(loader, server.serve("w", DATA)) == DATA


def test_a_damaged_partial_record_costs_the_if_range_and_nothing_else(
    server: FaultServer, loader: ModelLoader
) -> None:
    partial = partial_of(loader)
    partial.path.write_bytes(DATA[:CUT])
    partial.record_path.write_text('{"url": 1')
    assert pull(loader, server.serve("w", DATA)) == DATA
    assert server.sent("w") == SIZE - CUT
    partial.record_path.write_text('{"url": 1}')
    assert partial.read_record() is None


def test_the_record_beside_a_partial_says_where_it_came_from(
    server: FaultServer, loader: ModelLoader
) -> None:
    url = server.serve("w", DATA)
    server.fail("w", Fault(cut_after=CUT), Fault(status=404))
    with pytest.raises(ModelUnavailableError):
        pull(loader, url.replace("http://", "http://user:secret@") + "?token=secret")
    partial = partial_of(loader)
    assert partial.read_record() == PartialRecord(url, server.files["w"].etag, SIZE)
    assert "secret" not in partial.record_path.read_text()


def test_pieces_are_joined_and_each_resumes(server: FaultServer, loader: ModelLoader) -> None:
    one, two = DATA[:CUT], DATA[CUT:]
    urls = (server.serve("one", one), server.serve("two", two))
    server.fail("two", Fault(cut_after=400_000), Fault(status=404))
    with pytest.raises(ModelUnavailableError):
        pull(loader, urls)
    assert pull(loader, urls) == DATA
    assert server.sent("one") == len(one)
    assert server.sent("two") == len(two)
    assert list((loader.store.root / ".partial").glob("*.part")) == []


def test_wrong_pieces_are_fetched_clean_once(server: FaultServer, loader: ModelLoader) -> None:
    urls = (server.serve("one", DATA[:CUT]), server.serve("two", DATA[CUT:]))
    server.fail("two", Fault(wrong_bytes=True))
    assert pull(loader, urls) == DATA
    assert len(server.of("one")) == 2


def test_credentials_do_not_follow_a_redirect_to_another_origin(tmp_path: Path) -> None:
    seen: dict[str, str | None] = {}

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen[request.url.host] = request.headers.get("authorization")
        if request.url.host == "hub.example" and request.url.path == "/w":
            return httpx2.Response(302, headers={"location": "/moved"})
        if request.url.host == "hub.example":
            return httpx2.Response(302, headers={"location": "https://cdn.example/w"})
        return httpx2.Response(200, stream=httpx2.ByteStream(DATA[:100]))

    transfer = HttpTransfer(transport=httpx2.MockTransport(answer), clock=FakeClock())
    transfer.fetch(
        "https://hub.example/w",
        Partial(tmp_path / "x.part"),
        limit=100,
        headers={"Authorization": "Bearer secret"},
    )
    transfer.close()
    assert seen == {"hub.example": "Bearer secret", "cdn.example": None}


@pytest.mark.parametrize("target", ["http://hub.example/w", "ftp://hub.example/w"])
def test_a_redirect_to_an_insecure_address_is_refused(tmp_path: Path, target: str) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.url.scheme == "https"
        return httpx2.Response(302, headers={"location": target})

    transfer = HttpTransfer(transport=httpx2.MockTransport(answer), clock=FakeClock())
    with pytest.raises(DownloadError, match="insecure"):
        transfer.fetch("https://hub.example/w", Partial(tmp_path / "x.part"), limit=100)
    transfer.close()


def test_endless_redirects_end(server: FaultServer, loader: ModelLoader) -> None:
    url = server.serve("w", DATA)
    server.fail("w", *[Fault(redirect=url)] * 50)
    with pytest.raises(ModelUnavailableError, match="redirect"):
        pull(loader, url)
    assert len(server.of("w")) < 20


def test_a_refused_connection_says_so_after_its_budget(
    loader: ModelLoader, clock: FakeClock
) -> None:
    # Port 9 (discard) is closed on any machine that runs tests.
    with pytest.raises(ModelUnavailableError, match="refused"):
        pull(loader, "http://127.0.0.1:9/w")
    assert len(clock.slept) == POLICY.attempts - 1


def test_a_malformed_address_is_one_sentence(tmp_path: Path) -> None:
    transfer = HttpTransfer(clock=FakeClock())
    with pytest.raises(DownloadError, match="valid address"):
        transfer.fetch("https://exa mple:port/w", Partial(tmp_path / "x.part"), limit=1)
    transfer.close()


def test_a_page_that_cannot_be_unpacked_is_asked_for_again(clock: FakeClock) -> None:
    bodies = [b"no gzip at all", gzip.compress(b"page"), b"no gzip", b"nor this"]

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(
            200, headers={"content-encoding": "gzip"}, content=iter([bodies.pop(0)])
        )

    transfer = HttpTransfer(
        RetryPolicy(attempts=2), clock=clock, transport=httpx2.MockTransport(answer)
    )
    url = "https://index.example/page"
    assert transfer.read(url).body == b"page"
    with pytest.raises(DownloadError, match=r"index\.example/page: ."):
        transfer.read(url)
    transfer.close()


def test_status_errors_carry_the_status(server: FaultServer, tmp_path: Path) -> None:
    transfer = HttpTransfer(POLICY, clock=FakeClock())
    with pytest.raises(DownloadStatusError) as caught:
        transfer.fetch(server.url("none"), Partial(tmp_path / "x.part"), limit=1)
    transfer.close()
    assert caught.value.status == 404


def test_ctrl_c_leaves_the_partial_and_no_lock(
    server: FaultServer, loader: ModelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.serve("w", DATA)
    write = HashingSink.write

    def interrupted(sink: HashingSink, chunk: bytes) -> None:
        write(sink, chunk)
        if sink.position > CUT:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HashingSink, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull(loader, url)
    kept = partial_of(loader).size
    assert kept > CUT
    assert list(loader.store.root.rglob("*.holder")) == []
    with loader.store.lock("toy", "1.0", timeout_s=0):
        pass
    assert pull(loader, url) == DATA
    assert server.of("w")[-1].headers["range"] == f"bytes={kept}-"


def test_addresses_in_messages_hold_no_secrets() -> None:
    assert public_url("https://me:pw@host:1/a/b?sig=1#x") == "https://host:1/a/b"


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "x.part")
    partial.write_record(PartialRecord("u", "e", 3))
    assert json.loads(partial.record_path.read_text()) == {"url": "u", "etag": "e", "size": 3}
