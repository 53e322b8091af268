"""The page in a real browser: a real upload, a real conversion, by mouse and by keyboard.

``AUTOVOICE_SCREENSHOTS=folder`` keeps the screenshots to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens the page of a server; errors of the page or its security policy fail the test."""
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
    assert "likeness" in page.inner_text("#figures")
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
    page.wait_for_selector("#error:not([hidden]), #voice-notes p")
    said = page.inner_text("#error") + page.inner_text("#voice-notes")
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
    assert "allowed: she said yes" in page.inner_text("#voices")
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
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == "Cancelled."
    assert page.is_enabled("#convert")
    assert "cancelled" in page.inner_text("#history")


def test_by_keyboard_alone(live, visit, talk, friend):
    page = ready(visit(live.url))
    page.set_input_files("#source-file", talk)
    page.set_input_files("#reference-file", friend)
    page.wait_for_selector("#reference-list li")
    page.focus("#tab-convert")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-voices"
    assert page.is_visible("#panel-voices")
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
