"""The page in a real browser: a real upload, a real conversion, by mouse and by keyboard.

``AUTOVOICE_SCREENSHOTS=folder`` keeps the screenshots to be looked at.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from auto_voice.voices.library import VoiceLibrary
from server_kit import mock_engine

CHROMIUM = next(
    (p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None
)
SCREENSHOTS = Path(os.environ.get("AUTOVOICE_SCREENSHOTS", ""))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]
WAIT_MS = 120_000

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to show the page in"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def play() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        yield play


@pytest.fixture(scope="module")
def browser(play: Any) -> Iterator[Any]:
    browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens the page of a server; errors of the page or its security policy fail the test."""
    with visitor(browser) as open_page:
        yield open_page


@contextmanager
def visitor(browser: Any) -> Iterator[Any]:
    contexts, problems = [], []

    def open_page(url: str, expected: tuple[str, ...] = (), **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.grant_permissions(["microphone"], origin=url)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text)
                if message.type == "error" and not any(text in message.text for text in expected)
                else None
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def ready(page: Any) -> Any:
    page.wait_for_selector("body[data-ready=yes]")
    return page


def keep(page: Any, name: str) -> None:
    if SCREENSHOTS.name:
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def convert(page: Any, talk: Path, friend: Path) -> None:
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#convert")
    page.wait_for_selector("#result:not([hidden]) #after audio")


def drawn(page: Any, place: str) -> float:
    """Share of the canvas that is not left blank."""
    return page.evaluate(
        """place => {
            const canvas = document.querySelector(place + " canvas");
            const pen = canvas.getContext("2d");
            const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
            let filled = 0;
            for (let i = 3; i < data.length; i += 4) filled += data[i] > 0;
            return filled / (data.length / 4);
        }""",
        place,
    )


def test_upload_convert_look_and_download(live, visit, talk, friend, tmp_path):
    page = ready(visit(live.url))
    keep(page, "empty")
    convert(page, talk, friend)
    page.wait_for_selector("#before .picture")
    assert page.inner_text("#result-title") == "talk_as_friend.wav"
    assert "similarity" in page.inner_text("#figures")
    assert "words kept" in page.inner_text("#figures")
    assert "for 3.0 s of sound" in page.inner_text("#figures")
    assert drawn(page, "#before") > 0.5
    assert drawn(page, "#after") > 0.5
    keep(page, "desktop")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "got.wav")
    import soundfile

    assert soundfile.info(tmp_path / "got.wav").frames == 3 * 22050
    page.reload()
    ready(page)
    assert "talk.wav" in page.inner_text("#history")
    page.click("#history button >> text=Open")
    page.wait_for_selector("#result:not([hidden]) #after audio")
    page.wait_for_selector("#before .picture")
    assert drawn(page, "#before") > 0.5


def test_dark_and_narrow(live, visit, talk, friend):
    page = ready(visit(live.url, color_scheme="dark"))
    convert(page, talk, friend)
    keep(page, "dark")
    narrow = ready(visit(live.url, viewport={"width": 360, "height": 740}))
    convert(narrow, talk, friend)
    wide = narrow.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360
    keep(narrow, "narrow")


def test_recording_and_enrolling_with_warnings(live, visit):
    page = ready(visit(live.url, expected=("422",)))
    page.click("#reference-record")
    page.wait_for_selector("#reference-record.on")
    page.wait_for_timeout(2500)
    page.click("#reference-record")
    page.wait_for_selector("#reference-list li")
    page.fill("#voice-name", "beeps")
    page.click("#enrol")
    # The browser's pretended microphone beeps, in which there is no speech.
    page.wait_for_selector("#enrol-error:not([hidden]), #voice-notes p")
    said = page.inner_text("#enrol-error") + page.inner_text("#voice-notes")
    assert "speech" in said


def test_a_voice_is_kept_used_and_deleted(live, visit, talk, friend):
    page = ready(visit(live.url))
    page.set_input_files("#reference-file", friend)
    page.fill("#voice-name", "my friend")
    page.fill("#voice-consent", "she said yes")
    page.click("#enrol")
    page.wait_for_selector("#voice-notes .good")
    assert page.input_value("#voice") == "my friend"
    keep(page, "enrolled")
    page.click("#tab-voices")
    page.wait_for_selector("#voices .entry")
    keep(page, "voices")
    assert "agreed: she said yes" in page.inner_text("#voices")
    page.click("#new-voice")
    assert page.is_visible("#reference-part")
    page.click("#tab-voices")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#voices button >> text=Use")
    page.set_input_files("#source-file", talk)
    page.click("#convert")
    page.wait_for_selector("#result:not([hidden])")
    assert page.inner_text("#result-title") == "talk_as_my friend.wav"
    page.click("#tab-voices")
    page.click("#voices button >> text=Delete")
    page.wait_for_selector("#voices .empty")
    page.click("#tab-models")
    page.wait_for_selector("#models li")
    assert "start the server with a token" in page.inner_text("#models-hint")
    keep(page, "models")


def test_cancel(serve, gated, visit, talk, friend):
    live = serve(gated)
    page = ready(visit(live.url))
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#convert")
    page.locator("#status", has_text="38 %").wait_for()
    keep(page, "running")
    page.click("#cancel")
    page.locator("#status", has_text="Cancelled.").wait_for()
    assert page.is_hidden("#error")
    assert page.is_enabled("#convert")
    assert "cancelled" in page.inner_text("#history")


def test_by_keyboard_alone(live, visit, talk, friend):
    page = ready(visit(live.url))
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.focus("#tab-convert")
    for tab in ("live", "voices"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == f"tab-{tab}"
        assert page.is_visible(f"#panel-{tab}")
    page.keyboard.press("Home")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        if reached[-1] == "convert":
            break
    assert {"source-file", "source-record", "voice", "semitones", "format", "convert"} <= {*reached}
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:not([hidden])")


def test_the_token_is_asked_for_and_not_kept_in_the_page(serve, visit):
    token = "a-token-of-the-tests"
    live = serve(tokens=(token,))
    page = visit(live.url, expected=("401",))
    page.wait_for_selector("#token-dialog[open]")
    keep(page, "token")
    page.fill("#token", "wrong-wrong-wrong-wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#token-error:not([hidden])")
    page.fill("#token", token)
    page.keyboard.press("Enter")
    ready(page)
    assert token not in page.content()
    assert page.evaluate("document.cookie") == ""
    assert page.evaluate("JSON.stringify(localStorage)").find(token) < 0


def test_a_bad_file_gives_the_sentence(live, visit, tmp_path, friend):
    text = tmp_path / "talk.wav"
    text.write_text("no sound at all")
    page = ready(visit(live.url, expected=("415",)))
    page.set_input_files("#source-file", text)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#source-list li")
    page.click("#convert")
    page.wait_for_selector("#error:not([hidden])")
    assert "is text and not a recording" in page.inner_text("#error")


def test_what_was_chosen_can_be_heard_one_sound_at_a_time(live, visit, talk, friend):
    page = ready(visit(live.url))
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#source-list button >> text=Play")
    page.wait_for_selector("#source-list button >> text=Stop")
    page.click("#reference-list button >> text=Play")
    page.wait_for_selector("#reference-list button >> text=Stop")
    assert page.locator("#source-list button", has_text="Stop").count() == 0
    page.click("#reference-list button >> text=Stop")
    page.wait_for_selector("#reference-list button >> text=Play")


def test_a_visitor_with_nothing_at_hand_can_try_it(live, visit):
    page = ready(visit(live.url))
    assert "same words and melody in that voice" in page.inner_text(".intro")
    page.click("#try")
    page.wait_for_selector("#reference-list li")
    assert "sample_recording.wav" in page.inner_text("#source-list")
    page.click("#convert")
    page.wait_for_selector("#result:not([hidden]) #after audio")
    assert page.inner_text("#result-title") == "sample_recording_as_sample_voice.wav"


def test_a_batch_shows_all_its_results(live, visit, talk, friend, tmp_path):
    import soundfile

    silent = tmp_path / "silent.wav"
    soundfile.write(silent, [0.0] * 16000, 16000)
    page = ready(visit(live.url))
    page.set_input_files("#source-file", [talk, silent, friend])
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#convert")
    page.wait_for_selector("#items li:nth-child(3)")
    page.wait_for_selector("#after audio")
    assert page.inner_text("#item-title") == "talk_as_friend.wav"
    assert "holds only silence" in page.inner_text("#items li:nth-child(2)")
    assert page.locator("#items li:nth-child(2) button").count() == 0
    page.click("#items li:nth-child(3) button >> text=Show")
    page.locator("#item-title", has_text="friend_as_friend.wav").wait_for()
    with page.expect_download() as download:
        page.click("#items li:nth-child(3) a")
    assert download.value.suggested_filename == "friend_as_friend.wav"
    assert page.inner_text("#download") == "Download all 2"


def test_a_restart_of_the_server_is_waited_for(serve, gated, visit, talk, friend):
    live = serve(gated, grace_seconds=0.2)
    port = int(live.url.rpartition(":")[2])
    page = ready(visit(live.url, expected=("ERR_", "503", "500")))
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#convert")
    page.locator("#status", has_text="38 %").wait_for()
    live.stop()
    page.locator("#status", has_text="Trying again").wait_for()
    gated.open.set()
    serve(gated, on_port=port)
    page.wait_for_selector("#result:not([hidden]) #after audio")
    assert "done" in page.inner_text("#history")
    assert page.is_hidden("#error")


def test_history_recovers_jobs_that_nobody_followed(serve, gated, visit, talk, friend):
    live = serve(gated)
    page = ready(visit(live.url))
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#convert")
    page.locator("#status", has_text="38 %").wait_for()
    # A job of this browser that an earlier visit left behind.
    files = {"source": ("b.wav", talk.read_bytes()), "reference": ("f.wav", friend.read_bytes())}
    other = httpx2.post(f"{live.url}/v1/jobs", files=files).json()["id"]
    page.evaluate(
        """id => {
            const all = JSON.parse(localStorage.getItem("auto_voice.history"));
            const left = {id, name: "left", voice: "f", when: Date.now(), state: "running"};
            localStorage.setItem("auto_voice.history", JSON.stringify([...all, left]));
        }""",
        other,
    )
    page.reload()
    page.wait_for_selector("#history li:nth-child(2)")
    gated.open.set()
    left = page.locator("#history li", has_text="left")
    left.locator(".badge", has_text="done").wait_for()


def test_a_bad_voice_name_is_told_beside_the_name(live, visit, friend):
    page = ready(visit(live.url, expected=("400",), viewport={"width": 360, "height": 640}))
    page.set_input_files("#reference-file", friend)
    page.fill("#voice-name", "../up")
    page.click("#enrol")
    page.wait_for_selector("#enrol-error:not([hidden])")
    assert "cannot name a voice" in page.inner_text("#enrol-error")
    box = page.locator("#enrol-error").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 640


def test_learning_a_voice_shows_its_progress_and_can_be_cancelled(serve, tmp_path, visit, friend):
    engine = mock_engine(tmp_path)
    held = threading.Event()

    def enrol(references, name, consent, overwrite, progress, *_):
        while not held.wait(0.02):
            progress(0.5)
        raise AssertionError("it was not cancelled")

    engine.enrol = enrol
    live = serve(engine)
    page = ready(visit(live.url))
    page.set_input_files("#reference-file", friend)
    page.fill("#voice-name", "slow")
    page.click("#enrol")
    page.locator("#enrol-status", has_text="Learning the voice… 50 %").wait_for()
    assert 0.4 < page.evaluate("document.querySelector('#enrol-progress').value") < 0.6
    keep(page, "enrolling")
    page.click("#enrol-cancel")
    page.locator("#enrol-status", has_text="Cancelled").wait_for()
    assert page.is_hidden("#enrol-error")
    assert page.is_enabled("#enrol")
    held.set()


def test_a_long_file_name_does_not_widen_the_page(live, visit, talk, friend, tmp_path):
    long = tmp_path / f"{'a_recording_of_the_meeting_' * 8}.wav"
    shutil.copy(talk, long)
    voice = tmp_path / f"{'somebodys_voice_' * 12}.wav"
    shutil.copy(friend, voice)
    page = ready(visit(live.url, viewport={"width": 360, "height": 740}))
    convert(page, long, voice)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_stored_voices_are_heard_and_harmless_remarks_are_no_warnings(
    live, visit, friend, tmp_path
):
    import numpy as np
    import soundfile

    samples, rate = soundfile.read(friend)
    stereo = tmp_path / "stereo.wav"
    soundfile.write(stereo, np.stack([samples, samples], 1), rate)
    page = ready(visit(live.url))
    page.set_input_files("#reference-file", stereo)
    page.fill("#voice-name", "both sides")
    page.click("#enrol")
    page.wait_for_selector("#voice-notes .good")
    assert "down to one" in page.inner_text("#voice-notes .hint")
    assert "down to one" not in "".join(page.locator("#voice-notes .warning").all_inner_texts())
    page.click("#voice-listen")
    page.locator("#voice-listen", has_text="Stop").wait_for()
    # Opening the tab lists the voices anew, with other buttons.
    with page.expect_response("**/v1/voices") as listed:
        page.click("#tab-voices")
    listed.value.finished()
    page.click("#voices button >> text=Play")
    page.locator("#voices button", has_text="Stop").wait_for()
    assert "down to one" not in "".join(page.locator("#voices .warning").all_inner_texts())


def test_logging_out_asks_for_the_token_again(serve, visit):
    token = "a-token-of-the-tests"
    page = visit(serve(tokens=(token,)).url, expected=("401",))
    page.fill("#token", token)
    page.keyboard.press("Enter")
    ready(page)
    page.click("#leave")
    page.wait_for_selector("#token-dialog[open]")


def test_files_beyond_the_limit_are_not_sent(serve, visit, friend, tmp_path):
    large = tmp_path / "large.wav"
    large.write_bytes(bytes(2_000_000))
    page = ready(visit(serve(upload_mb=1).url))
    page.set_input_files("#source-file", large)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.click("#convert")
    page.wait_for_selector("#error:not([hidden])")
    assert "the server takes 1 MB" in page.inner_text("#error")


# Live


# Samples of a result that a recording can be compared by: 1.5 s at 48 kHz.
ENOUGH = 72_000
HEARD = "document.querySelector('#live-out').value > -50"


def eventually(page: Any, expression: str) -> None:
    """Waits until it is true; the page's security policy lets no other way in."""
    for _ in range(WAIT_MS // 100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{expression} never came true: {page.inner_text('#panel-live')}")


@pytest.fixture(scope="module")
def speaking(play: Any, talk: Path) -> Iterator[Any]:
    """A browser whose microphone plays the recording over and over."""
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={talk}"]
    browser = play.chromium.launch(executable_path=CHROMIUM, args=flags)
    yield browser
    browser.close()


@pytest.fixture
def with_voice(serve, tmp_path, friend, monkeypatch):
    """A server that keeps the voice “friend”, leaves nothing out, and its engine."""
    monkeypatch.setattr("auto_voice.server.live_routes.MOST_WAITING_BLOCKS", 1000)
    engine = mock_engine(tmp_path)
    voice = engine.pipeline.clone(friend, name="friend")
    VoiceLibrary(tmp_path / "voices").add("friend", voice)
    return lambda **settings: (serve(engine, **settings), engine)


def test_what_is_spoken_comes_back_as_the_stream_converts_it(with_voice, speaking, tmp_path):
    import numpy as np
    import soundfile

    server, engine = with_voice()
    received: list[str | bytes] = []

    def watch(socket: Any) -> None:
        socket.on("framereceived", lambda frame: received.append(frame))

    with visitor(speaking) as visit:
        page = ready(visit(server.url, viewport={"width": 1280, "height": 900}))
        page.on("websocket", watch)
        page.click("#tab-live")
        page.locator("#live-voice option", has_text="friend").wait_for(state="attached")
        page.check("#live-record")
        page.click("#live-start")
        # Something is heard, and the delay is known.
        eventually(page, HEARD)
        eventually(page, "/[0-9]+ ms/.test(document.querySelector('#live-delay').innerText)")
        assert page.evaluate("document.querySelector('#live-in').value") > -60
        keep(page, "live")
        for _ in range(WAIT_MS // 100):
            if sum(len(sound) for sound in received if isinstance(sound, bytes)) > 2 * ENOUGH:
                break
            page.wait_for_timeout(100)
        else:
            raise AssertionError("no result came back any more")
        page.click("#live-start")
        with page.expect_download() as download:
            page.click("#live-download")
        download.value.save_as(tmp_path / "live.wav")
    both, rate = soundfile.read(tmp_path / "live.wav", dtype="float32")
    assert len(both) > rate // 2
    spoken = np.round(both[:, 0] * 32768).astype(np.int16)
    stream = engine.pipeline.stream(engine.voices.get("friend"), sample_rate=rate)
    expected = stream.push(spoken)  # Of the rest the look-ahead is missing.
    assert len(expected) > rate // 4
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(both[: len(expected), 1], expected, atol=2e-4)


def test_live_is_usable_on_a_narrow_screen_and_says_what_it_needs(live, visit):
    page = ready(visit(live.url, viewport={"width": 360, "height": 740}))
    page.click("#tab-live")
    page.wait_for_selector("#live-none:not([hidden])")
    assert page.is_disabled("#live-start")
    assert "headphones" in page.inner_text("#panel-live")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    keep(page, "live_narrow")


def test_a_live_conversion_that_cannot_be_is_said(with_voice, speaking):
    server, _ = with_voice(live_streams=1)
    with visitor(speaking) as visit:
        first, second = (ready(visit(server.url)) for _ in range(2))
        for page in (first, second):
            page.click("#tab-live")
            page.locator("#live-voice option", has_text="friend").wait_for(state="attached")
        first.click("#live-start")
        eventually(first, HEARD)
        second.click("#live-start")
        second.wait_for_selector("#live-error:not([hidden])")
        assert "live conversions open" in second.inner_text("#live-error")
        assert second.inner_text("#live-start") == "Start"
        assert second.is_hidden("#live-figures")


def test_pitch_bypass_and_voice_change_while_it_runs(with_voice, speaking):
    server, _ = with_voice()
    with visitor(speaking) as visit:
        page = ready(visit(server.url, viewport={"width": 360, "height": 740}))
        page.click("#tab-live")
        page.locator("#live-voice option", has_text="friend").wait_for(state="attached")
        sent: list[str] = []
        page.on(
            "websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame))
        )
        page.click("#live-start")
        eventually(page, HEARD)
        page.check("#live-bypass")
        page.focus("#live-semitones")
        page.keyboard.press("ArrowRight")
        page.locator("#live-semitones-out", has_text="+0.5").wait_for()
        eventually(page, HEARD)
        texts = [frame for frame in sent if isinstance(frame, str)]
        assert any('"semitones":0.5' in text for text in texts[1:])
        assert page.is_hidden("#live-error")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        keep(page, "live_narrow_running")
