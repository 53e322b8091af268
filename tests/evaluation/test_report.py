"""The page: complete, self-contained, safe with any file name, and small enough."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_comparison import BASE, results

from auto_voice.evaluation import Evaluation, compare, evaluate, read_pairs
from auto_voice.evaluation.history import to_entry
from auto_voice.evaluation.judges import Judges
from auto_voice.evaluation.plots import player_audio, spectrogram_png
from auto_voice.evaluation.report import comparison_report, history_report, html_report
from auto_voice.types import Waveform
from evaluation_kit import RATE, sing

pytestmark = pytest.mark.slow
VOID = {"meta", "img", "link", "br", "input"}


class Page(HTMLParser):
    """Elements with their attributes; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture
def result(make_folder: Callable[..., Path], judges: Judges) -> Evaluation:
    return evaluate(read_pairs(make_folder(pairs=5)), judges, name="my system")


def test_the_page_needs_nothing_from_outside(result: Evaluation) -> None:
    text = html_report(result, examples=3)
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    for tag in ("img", "audio"):
        assert all((a["src"] or "").startswith("data:") for a in page.all(tag))
    assert page.all("link") == []
    assert len(page.all("audio")) == len(page.all("img")) == 9


def test_everything_measured_is_on_the_page(result: Evaluation) -> None:
    words = Page(html_report(result, examples=1)).words
    for said in ("SECS ↑", "WER, % ↓", "table@1", "spectrum@2", "p0", "p4", "equal error rate"):
        assert said in words


def test_a_reader_without_eyes_or_mouse_can_use_it(result: Evaluation) -> None:
    page = Page(html_report(result, examples=2))
    assert page.all("html")[0]["lang"] == "en"
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("aria-label") for a in page.all("audio") + page.all("svg"))
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len([a for a in page.all("button") if a["type"] == "button"]) > 5
    assert all(a.get("tabindex") == "0" for a in page.all("div") if a.get("class") == "scroll")
    text = html_report(result, examples=0)
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text


def test_names_and_words_cannot_become_markup(result: Evaluation) -> None:
    evil = '<script>alert("x")</script>'
    pairs = [
        replace(p, id=evil, texts={"reference": evil, "heard": "b"}, notes=(evil,))
        for p in result.pairs
    ]
    text = html_report(replace(result, name=evil, pairs=tuple(pairs), notes=(evil,)), examples=2)
    assert len(Page(text).all("script")) == 1
    assert "alert(&quot;" in text


def test_sound_beyond_the_limit_is_left_out_and_said(result: Evaluation) -> None:
    page = Page(html_report(result, examples=5, audio_mb=0.05))
    assert 0 < len(page.all("audio")) < 15
    assert "players are left out" in page.words
    assert len(page.all("img")) == 15


def test_differing_words_are_marked(result: Evaluation) -> None:
    texts = {"reference": "red cat blue", "heard": "red hat blue"}
    pairs = tuple(replace(p, texts=texts) for p in result.pairs)
    text = html_report(replace(result, pairs=pairs), examples=1)
    assert "red <mark>cat</mark> blue" in text
    assert "red <mark>hat</mark> blue" in text


def test_a_vanished_recording_does_not_lose_the_page(result: Evaluation) -> None:
    pairs = tuple(replace(p, converted="gone.wav") for p in result.pairs)
    assert "gone.wav" in Page(html_report(replace(result, pairs=pairs), examples=1)).words


def test_a_result_without_models_still_makes_a_page(make_folder: Callable[..., Path]) -> None:
    pairs = read_pairs(make_folder(pairs=1))
    page = Page(html_report(evaluate(pairs, Judges(pitch=False), name="x")))
    assert "1 conversions were measured" in page.words


def test_spectrogram_shows_where_the_energy_is() -> None:
    image = pytest.importorskip("PIL.Image")
    t = np.arange(RATE) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 4000 * t)).astype(np.float32)
    head, _, data = spectrogram_png(Waveform(tone, RATE)).partition(",")
    assert head == "data:image/png;base64"
    picture = np.asarray(image.open(io.BytesIO(base64.b64decode(data))).convert("L"), float)
    assert picture.shape == (80, RATE * 22050 // RATE // 256)
    brightest = int(picture.mean(axis=1).argmax())
    assert 8 < brightest < 30  # 4 kHz of 8 kHz lies in the upper third of a mel axis
    long = Waveform(np.tile(tone, 30), RATE)
    data = spectrogram_png(long, max_width=200).partition(",")[2]
    assert image.open(io.BytesIO(base64.b64decode(data))).width <= 200


def test_players_hold_the_recording() -> None:
    voice = sing(seconds=2.0)
    uri, size = player_audio(voice, seconds=30)
    assert len(uri) == size
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert len(samples) / rate == pytest.approx(voice.seconds, abs=0.1)
    short, _ = player_audio(voice, seconds=0.5)
    assert len(short) < size / 2


def test_a_comparison_says_better_in_words() -> None:
    page = Page(comparison_report([compare(results("a", BASE), results("<b>", BASE + 0.05))]))
    assert "better" in page.words
    assert "<b>" in page.words


def test_a_text_that_looks_like_markup_stays_text() -> None:
    """Names of stages come from a log that somebody else may have written."""
    entry = replace(to_entry(results("a", BASE)), system={"vocoder": "<td onclick=steal()>x</td>"})
    page = history_report([entry], [])
    assert "<td onclick" not in page
    assert "&lt;td onclick" in page
    assert "<td onclick=steal()>" in Page(page).words
