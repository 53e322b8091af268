"""Self-contained HTML pages of an evaluation, a comparison and a history, by Jinja2 templates.

Here the figures are chosen and put into words; ``templates/`` holds the markup, which escapes every
text. Names of files, systems and stages come from elsewhere and may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_voice.audio.io import read_audio
from auto_voice.audio.pitch import extract_pitch
from auto_voice.errors import AudioError, MissingDependencyError
from auto_voice.evaluation.comparison import COMPARISON_HEADER, Comparison, comparison_rows
from auto_voice.evaluation.history import LogEntry, Shortfall
from auto_voice.evaluation.metrics import aligned_words
from auto_voice.evaluation.plots import (
    pitch_plot,
    player_audio,
    scatter_plot,
    spectrogram_png,
    strip_plot,
    trend_plot,
)
from auto_voice.evaluation.results import METRICS, Estimate, Evaluation, PairScore, metric_columns
from auto_voice.evaluation.tables import ROLES, figure, interval, title, verification_lines
from auto_voice.types import Waveform

# Longer recordings are cut in the players: MP3 takes about 8 kB a second.
PLAYER_SECONDS = 30.0
PLOTTED = ("secs", "secs2", "wer", "dnsmos", "f0_correlation", "voicing_error",
           "register_cents", "mcd_db", "rtf")  # fmt: skip
IN_PAIRS = ("secs", "secs2", "source_similarity", "wer", "cer", "dnsmos", "f0_correlation",
            "voicing_error", "register_cents", "mcd_db", "rtf")  # fmt: skip
IN_EXAMPLES = ("secs", "secs2", "wer", "dnsmos", "f0_correlation")


@dataclass(frozen=True)
class Cell:
    """A table cell that is more than text: its CSS class, and the number it is sorted by."""

    text: str
    kind: str = ""
    sort: str | None = None


@dataclass(frozen=True)
class Table:
    """A table for the templates; a cell is a text or a ``Cell``."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str


@dataclass
class _Budget:
    """Characters that players may still take, and how many players did not fit."""

    left: int
    refused: int = 0

    def player(self, audio: Waveform) -> str:
        """Data URI of the player's sound; empty where it does not fit."""
        uri, size = player_audio(audio, seconds=PLAYER_SECONDS)
        if size > self.left:
            self.refused += 1
            return ""
        self.left -= size
        return uri


def html_report(evaluation: Evaluation, *, examples: int = 6, audio_mb: float = 16.0) -> str:
    """The page of one evaluation.

    Args:
        examples: pairs with players and spectrograms: the worst, the median and the best ones.
        audio_mb: limit for all players together; what does not fit is left out, with a note.

    Raises:
        MissingDependencyError: Jinja2 is not installed.
    """
    budget = _Budget(int(audio_mb * 1e6))
    return _render(
        "evaluation.html",
        page_title=f"{evaluation.name}: voice conversion report",
        evaluation=evaluation,
        verdict=_verdict(evaluation),
        summary=_summary(evaluation),
        verification=verification_lines(evaluation),
        cards=_cards(evaluation),
        pairs=_pair_table(evaluation.pairs),
        examples=[_example(p, why, budget) for p, why in _examples(evaluation.pairs, examples)],
        player_seconds=f"{PLAYER_SECONDS:.0f}",
        refused=budget.refused,
        audio_mb=f"{audio_mb:g}",
        provenance=_provenance(evaluation),
    )


def comparison_report(comparisons: Sequence[Comparison]) -> str:
    """A page with one table for each B against A."""
    shown = []
    for c in comparisons:
        rows = [[*row[:-1], Cell(row[-1], kind=row[-1].split()[0])] for row in comparison_rows(c)]
        caption = f"A is {c.a}, over {c.pairs} shared pairs"
        shown.append({"name": c.b, "notes": c.notes, "rows": rows, "caption": caption})
    return _render(
        "comparison.html",
        page_title="Comparison of voice conversions",
        header=COMPARISON_HEADER,
        comparisons=shown,
    )


def history_report(entries: Sequence[LogEntry], shortfalls: Sequence[Shortfall]) -> str:
    """A page with the trend of each metric."""
    labels = [e.label for e in entries]
    worse = {f.metric for f in shortfalls}
    missing = Estimate(math.nan, math.nan, math.nan, 0)
    cards = []
    for key, m in METRICS.items():
        series = [e.estimates.get(key, missing) for e in entries]
        if any(s.n for s in series):
            last = figure(m, series[-1].value)
            plot = _markup(trend_plot(m, series, labels))
            cards.append({"title": f"{title(m)}: {last}", "plot": plot, "worse": key in worse})
    rows = [
        [e.label, str(e.pairs), ", ".join(e.system.values()) or "–", ", ".join(e.models.values())]
        for e in entries
    ]
    return _render(
        "history.html",
        page_title="Evaluation history",
        name=entries[-1].name,
        worse=[f"{f.message}, beyond both intervals." for f in shortfalls],
        cards=cards,
        runs=Table(("run", "pairs", "system", "judges"), rows, "Oldest first"),
    )


def _render(template: str, **values: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependencyError(
            "A page needs Jinja2; install it with: pip install 'auto-voice[eval]'"
        ) from error
    loader = PackageLoader("auto_voice.evaluation", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values) + "\n"


def _markup(svg: str) -> Any:
    """A plot of our own, which has escaped its texts itself."""
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704


def _verdict(evaluation: Evaluation) -> str:
    """The outcome in a sentence that needs no knowledge of the metrics' names."""
    e = evaluation.estimates
    clauses = []
    similarity = e.get("secs2") or e.get("secs")
    if similarity:
        before = e.get("unconverted_secs2") if "secs2" in e else e.get("unconverted_secs")
        clause = f"The similarity to the target voice is {similarity.value:.2f}"
        clauses.append(clause + (f", against {before.value:.2f} unconverted" if before else ""))
    if "wer" in e:
        clause = f"{100 * e['wer'].value:.1f} of 100 words come out differently"
        alone = e.get("unconverted_wer")
        clauses.append(clause + (f" ({100 * alone.value:.1f} unconverted)" if alone else ""))
    if "dnsmos" in e:
        source = e.get("dnsmos_source")
        clause = f"a listener is predicted to give {e['dnsmos'].value:.2f} of 5"
        clauses.append(clause + (f" ({source.value:.2f} for the source)" if source else ""))
    if not clauses:
        return f"{len(evaluation.pairs)} conversions were measured."
    return "; ".join(clauses) + "."


def _summary(evaluation: Evaluation) -> Table:
    rows: list[list[str | Cell]] = [
        [
            title(m),
            Cell(figure(m, e.value), kind="value"),
            interval(m, e),
            str(e.n),
            Cell(m.meaning, kind="words"),
        ]
        for key, m in METRICS.items()
        if (e := evaluation.estimates.get(key)) is not None
    ]
    unit = evaluation.settings.get("resampled_by", "pair")
    what = "pairs" if unit == "pair" else f"{unit} speakers"
    caption = f"↑ higher is better, ↓ lower is better; intervals: 95 % bootstrap over {what}"
    return Table(("metric", "value", "interval", "pairs", "what it says"), rows, caption)


def _cards(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One plot for each metric that was measured, and whose voice the conversions are nearer to."""
    cards = []
    for key in PLOTTED:
        if (e := evaluation.estimates.get(key)) is not None and e.n > 1:
            m = METRICS[key]
            values = [p.values.get(key, math.nan) for p in evaluation.pairs]
            plot = _markup(strip_plot(m, values, e))
            cards.append({"title": title(m), "lead": "", "plot": plot})
    for end, who in (("", "GE2E"), ("2", "independent encoder")):
        x, y = (
            metric_columns(evaluation.pairs, f"{k}{end}")[0] for k in ("source_similarity", "secs")
        )
        points = list(zip(x, y, (p.id for p in evaluation.pairs), strict=True))
        if any(math.isfinite(a) and math.isfinite(b) for a, b, _ in points):
            axes = ("similarity to source", "similarity to target")
            plot = _markup(scatter_plot(points, *axes, f"Whose voice, by the {who}"))
            lead = (
                "Above the dashed line the result sounds more like the target than like the source."
            )
            cards.append({"title": f"Whose voice? ({who})", "lead": lead, "plot": plot})
    return cards


def _pair_table(pairs: Sequence[PairScore]) -> Table:
    keys = [k for k in IN_PAIRS if any(k in p.values for p in pairs)]
    rows = []
    for p in pairs:
        cells: list[str | Cell] = [p.id]
        for k in keys:
            value = p.values.get(k, math.nan)
            sort = "NaN" if math.isnan(value) else f"{value:.6g}"
            cells.append(Cell(figure(METRICS[k], value), sort=sort))
        rows.append(cells)
    header = ("conversion", *(title(METRICS[k]) for k in keys))
    return Table(header, rows, "Figures of each conversion")


def _examples(pairs: Sequence[PairScore], count: int) -> list[tuple[PairScore, str]]:
    """Worst, median and best pairs by the sternest speaker similarity that was measured."""
    key = next((k for k in ("secs2", "secs", "dnsmos") if any(k in p.values for p in pairs)), "")
    if not key or count <= 0:
        return [(p, "") for p in pairs[:count]]
    ordered = sorted((p for p in pairs if key in p.values), key=lambda p: p.values[key])
    if len(ordered) <= count:
        return [(p, "") for p in ordered]
    third = max(1, count // 3)
    middle = len(ordered) // 2 - third // 2
    label = METRICS[key].label
    best = count - 2 * third
    picked = [(p, f"among the lowest {label}") for p in ordered[:third]]
    if best > 0:
        picked += [(p, f"around the median {label}") for p in ordered[middle : middle + third]]
        picked += [(p, f"among the highest {label}") for p in ordered[-best:]]
    return list({p.id: (p, why) for p, why in picked}.values())[:count]


def _example(pair: PairScore, why: str, budget: _Budget) -> dict[str, Any]:
    takes: list[dict[str, str]] = []
    audios: dict[str, Waveform] = {}
    for name, file in (
        ("source", pair.source),
        ("target", pair.targets[0]),
        ("converted", pair.converted),
    ):
        try:
            audio = read_audio(file)
        except AudioError as error:
            problem = str(error).replace(str(file), Path(file).name)
            takes.append({"label": name, "problem": problem})
            continue
        audios[name] = audio
        takes.append(
            {
                "name": name,
                "label": f"{name}: {Path(file).name}, {audio.seconds:.1f} s",
                "problem": "",
                "spectrogram": spectrogram_png(audio),
                "player": budget.player(audio),
            }
        )
    melody = ""
    if "source" in audios and "converted" in audios and "f0_correlation" in pair.values:
        tracks = [
            extract_pitch(audios[n].samples, audios[n].sample_rate) for n in ("source", "converted")
        ]
        melody = _markup(pitch_plot(*tracks))
    return {
        "id": pair.id,
        "why": why,
        "chips": [
            (title(METRICS[k]), figure(METRICS[k], pair.values[k]))
            for k in IN_EXAMPLES
            if k in pair.values
        ],
        "takes": takes,
        "melody": melody,
        "words": _words(pair.texts),
        "notes": pair.notes,
    }


def _words(texts: Mapping[str, str]) -> list[tuple[str, list[tuple[bool, str]]]]:
    """Both texts as they were compared, as runs of words that are the same or differ."""
    if not texts:
        return []
    runs = list(aligned_words(texts.get("reference", ""), texts.get("heard", "")))
    expected = [(same, reference) for same, reference, _ in runs if reference]
    heard = [(same, hypothesis) for same, _, hypothesis in runs if hypothesis]
    return [("expected", expected), ("heard", heard)]


def _provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    facts = [(ROLES.get(role, role), model) for role, model in evaluation.models.items()]
    facts += [(f"system: {stage}", model) for stage, model in evaluation.system.items()]
    if evaluation.peak_memory_mb is not None:
        facts.append(("peak memory", f"{evaluation.peak_memory_mb:.0f} MB"))
    for about in (evaluation.settings, evaluation.machine):
        facts += [(k.replace("_", " "), str(v)) for k, v in about.items() if v != ""]
    return facts
