"""One self-contained HTML page of an evaluation: figures, plots, every pair, examples to hear."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from auto_voice.audio.io import read_audio
from auto_voice.audio.pitch import extract_pitch
from auto_voice.errors import AudioError
from auto_voice.evaluation.comparison import COMPARISON_HEADER, Comparison, comparison_rows
from auto_voice.evaluation.history import Entry, Finding
from auto_voice.evaluation.images import player_audio, spectrogram_png
from auto_voice.evaluation.plots import pitch_plot, scatter_plot, strip_plot, trend_plot
from auto_voice.evaluation.report_page import Cell, page, table
from auto_voice.evaluation.results import METRICS, Evaluation, PairScore, metric_columns
from auto_voice.evaluation.statistics import Estimate
from auto_voice.evaluation.tables import ROLES, figure, interval, title, verification_lines
from auto_voice.evaluation.text import normalise_text
from auto_voice.types import Waveform

PLAYER_SECONDS = 30.0
PLOTTED: tuple[str, ...] = ("secs", "secs2", "wer", "dnsmos", "f0_correlation", "voicing_error")
PLOTTED += ("register_cents", "mcd_db", "rtf")
IN_PAIRS: tuple[str, ...] = (
    "secs",
    "secs2",
    "source_similarity",
    "wer",
    "cer",
    "dnsmos",
    "f0_correlation",
)
IN_PAIRS += ("voicing_error", "register_cents", "mcd_db", "rtf")
IN_EXAMPLES = ("secs", "secs2", "wer", "dnsmos", "f0_correlation")


@dataclass
class _Budget:
    """Characters that players may still take."""

    left: int
    refused: int = 0

    def player(self, audio: Waveform, label: str) -> str:
        uri, size = player_audio(audio, seconds=PLAYER_SECONDS)
        if size > self.left:
            self.refused += 1
            return ""
        self.left -= size
        return f'<audio controls preload="none" src="{uri}" aria-label="{escape(label)}"></audio>'


def html_report(evaluation: Evaluation, *, examples: int = 6, audio_mb: float = 16.0) -> str:
    """The page.

    Args:
        examples: pairs with players and spectrograms: the worst, the median and the best ones.
        audio_mb: limit for all players together; what does not fit is left out, with a note.
    """
    budget = _Budget(int(audio_mb * 1e6))
    pairs = evaluation.pairs
    body = [
        f'<p class="soft">Voice conversion report · {escape(evaluation.created)}</p>',
        f"<h1>{escape(evaluation.name)}</h1>",
        f"<p>{escape(_verdict(evaluation))}</p>",
        _notes(evaluation.notes),
        "<h2>Figures</h2>",
        _summary(evaluation),
        *[f"<p>{escape(line)}</p>" for line in verification_lines(evaluation)],
        _plots(evaluation),
        f"<h2>All {len(pairs)} conversions</h2>",
        "<p class='soft'>A button in the header sorts by its column.</p>",
        _pair_table(pairs),
    ]
    chosen = _examples(pairs, examples)
    if chosen:
        shown = [_example(p, why, budget) for p, why in chosen]
        body.append("<h2>Examples</h2>")
        body.append(
            '<p class="soft">Melodies: <span class="key k1"></span> source '
            '<span class="key k2"></span> conversion. Marked words differ. Players hold the first '
            f"{PLAYER_SECONDS:.0f} s.</p>"
        )
        if budget.refused:
            body.append(
                f"<p>{budget.refused} players are left out to keep the page under "
                f"{audio_mb:g} MB of sound.</p>"
            )
        body += shown
    body += ["<h2>What this rests on</h2>", _provenance(evaluation)]
    return page(f"{evaluation.name}: voice conversion report", "".join(body))


def comparison_report(comparisons: Sequence[Comparison]) -> str:
    """A page with one table for each B against A."""
    body = ["<h1>Comparison of voice conversions</h1>"]
    body.append(
        "<p>Better or worse is said only where the paired 95 % interval excludes zero and "
        "Wilcoxon's signed-rank test, corrected for the number of metrics, gives p below 0.05.</p>"
    )
    for c in comparisons:
        rows = []
        for row in comparison_rows(c):
            verdict = row[-1]
            rows.append(
                [
                    *row[:-1],
                    Cell(f'<td class="{escape(verdict.split()[0])}">{escape(verdict)}</td>'),
                ]
            )
        body.append(f"<h2>B: {escape(c.b)}</h2>{_notes(c.notes)}")
        body.append(table(COMPARISON_HEADER, rows, f"A is {c.a}, over {c.pairs} shared pairs"))
    return page("Comparison of voice conversions", "".join(body))


def history_report(entries: Sequence[Entry], findings: Sequence[Finding]) -> str:
    """A page with the trend of each metric."""
    labels = [e.label for e in entries]
    body = [f"<h1>{escape(entries[-1].name)}: {len(entries)} runs</h1>"]
    worse = {f.metric for f in findings}
    body.append(_notes(f.message + ", beyond both intervals." for f in findings))
    missing = Estimate(math.nan, math.nan, math.nan, 0)
    cards = []
    for key, m in METRICS.items():
        series = [e.estimates.get(key, missing) for e in entries]
        if any(s.n for s in series):
            state = ' class="worse"' if key in worse else ""
            last = figure(m, series[-1].value)
            cards.append(
                f'<div class="card"><h3{state}>{escape(title(m))}: {last}</h3>'
                f"{trend_plot(m, series, labels)}</div>"
            )
    body.append(f'<div class="grid">{"".join(cards)}</div>')
    rows = [
        [e.label, str(e.pairs), ", ".join(e.system.values()) or "–", ", ".join(e.models.values())]
        for e in entries
    ]
    body.append("<h2>Runs</h2>" + table(("run", "pairs", "system", "judges"), rows, "Oldest first"))
    return page("Evaluation history", "".join(body))


def _verdict(evaluation: Evaluation) -> str:
    """The outcome in a sentence that needs no knowledge of the metrics' names."""
    e = evaluation.estimates
    said = []
    likeness, before = e.get("secs2") or e.get("secs"), None
    if likeness:
        before = e.get("unconverted_secs2") if "secs2" in e else e.get("unconverted_secs")
        clause = f"The likeness to the target voice is {likeness.value:.2f}"
        said.append(clause + (f", against {before.value:.2f} unconverted" if before else ""))
    if "wer" in e:
        clause = f"{100 * e['wer'].value:.1f} of 100 words come out differently"
        alone = e.get("unconverted_wer")
        said.append(clause + (f" ({100 * alone.value:.1f} unconverted)" if alone else ""))
    if "dnsmos" in e:
        source = e.get("dnsmos_source")
        clause = f"a listener is predicted to give {e['dnsmos'].value:.2f} of 5"
        said.append(clause + (f" ({source.value:.2f} for the source)" if source else ""))
    return "; ".join(said) + "." if said else f"{len(evaluation.pairs)} conversions were measured."


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(n)}</li>" for n in notes)
    return f"<ul>{items}</ul>" if items else ""


def _summary(evaluation: Evaluation) -> str:
    rows = []
    for key, m in METRICS.items():
        if (e := evaluation.estimates.get(key)) is not None:
            rows.append(
                [
                    title(m),
                    Cell(f"<td><b>{figure(m, e.value)}</b></td>"),
                    interval(m, e),
                    str(e.n),
                    Cell(f'<td class="words">{escape(m.meaning)}</td>'),
                ]
            )
    unit = evaluation.settings.get("resampled_by", "pair")
    what = "pairs" if unit == "pair" else f"{unit} speakers"
    caption = f"↑ higher is better, ↓ lower is better; intervals: 95 % bootstrap over {what}"
    return table(("metric", "value", "interval", "pairs", "what it says"), rows, caption)


def _plots(evaluation: Evaluation) -> str:
    cards = []
    for key in PLOTTED:
        if (e := evaluation.estimates.get(key)) is not None and e.n > 1:
            m = METRICS[key]
            values = [p.values.get(key, math.nan) for p in evaluation.pairs]
            cards.append(
                f'<div class="card"><h3>{escape(title(m))}</h3>{strip_plot(m, values, e)}</div>'
            )
    for end, who in (("", "GE2E"), ("2", "independent encoder")):
        x, y = (
            metric_columns(evaluation.pairs, f"{k}{end}")[0] for k in ("source_similarity", "secs")
        )
        points = list(zip(x, y, (p.id for p in evaluation.pairs), strict=True))
        if any(math.isfinite(a) and math.isfinite(b) for a, b, _ in points):
            cards.append(
                f'<div class="card"><h3>Whose voice? ({who})</h3><p class="soft">Above the dashed '
                "line the result sounds more like the target than like the source.</p>"
                + scatter_plot(
                    points, "likeness to source", "likeness to target", f"Whose voice, by the {who}"
                )
                + "</div>"
            )
    if not cards:
        return ""
    lead = (
        '<p class="soft">Each dot is a conversion, the line the figure over all, the band its '
        "interval.</p>"
    )
    return f'<h2>Spread</h2>{lead}<div class="grid">{"".join(cards)}</div>'


def _pair_table(pairs: Sequence[PairScore]) -> str:
    keys = [k for k in IN_PAIRS if any(k in p.values for p in pairs)]
    rows = []
    for p in pairs:
        cells = [p.id]
        for k in keys:
            value = p.values.get(k, math.nan)
            sort = "NaN" if math.isnan(value) else f"{value:.6g}"
            cells.append(Cell(f'<td data-v="{sort}">{figure(METRICS[k], value)}</td>'))
        rows.append(cells)
    header = ("conversion", *(title(METRICS[k]) for k in keys))
    return table(header, rows, "Figures of each conversion", sortable=True)


def _examples(pairs: Sequence[PairScore], count: int) -> list[tuple[PairScore, str]]:
    """Worst, median and best pairs by the sternest likeness that was measured."""
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


def _example(pair: PairScore, why: str, budget: _Budget) -> str:
    takes, audios = [], {}
    for name, file in (
        ("source", pair.source),
        ("target", pair.targets[0]),
        ("converted", pair.converted),
    ):
        try:
            audio = read_audio(file)
        except AudioError as error:
            said = escape(str(error).replace(str(file), Path(file).name))
            takes.append(f"<figure><figcaption>{name}</figcaption>{said}</figure>")
            continue
        audios[name] = audio
        label = f"{name}: {Path(file).name}, {audio.seconds:.1f} s"
        takes.append(
            f'<figure><figcaption>{escape(label)}</figcaption><img alt="Mel spectrogram of '
            f'{escape(name)}" src="{spectrogram_png(audio)}">{budget.player(audio, label)}</figure>'
        )
    chips = "".join(
        f"<li>{escape(title(METRICS[k]))} <b>{figure(METRICS[k], pair.values[k])}</b></li>"
        for k in IN_EXAMPLES
        if k in pair.values
    )
    melody = ""
    if "source" in audios and "converted" in audios and "f0_correlation" in pair.values:
        tracks = [
            extract_pitch(audios[n].samples, audios[n].sample_rate) for n in ("source", "converted")
        ]
        melody = pitch_plot(*tracks)
    heading = escape(pair.id) + (f' <span class="soft">{escape(why)}</span>' if why else "")
    return (
        f'<article class="card example"><h3>{heading}</h3><ul class="chips">{chips}</ul>'
        f'<div class="takes">{"".join(takes)}</div>{melody}{_words(pair.texts)}'
        f"{_notes(pair.notes)}</article>"
    )


def _words(texts: Mapping[str, str]) -> str:
    """Both texts as they were compared, differing words marked."""
    if not texts:
        return ""
    a, b = (normalise_text(texts.get(k, "")).split() for k in ("reference", "heard"))
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for out, words in ((marked[0], a[a0:a1]), (marked[1], b[b0:b1])):
            text = escape(" ".join(words))
            out.append(text if kind == "equal" or not text else f"<mark>{text}</mark>")
    said, heard = (" ".join(m) for m in marked)
    return f"<dl><dt>expected</dt><dd>{said}</dd><dt>heard</dt><dd>{heard}</dd></dl>"


def _provenance(evaluation: Evaluation) -> str:
    facts = {ROLES.get(role, role): model for role, model in evaluation.models.items()}
    facts |= {f"system: {stage}": model for stage, model in evaluation.system.items()}
    if evaluation.peak_memory_mb is not None:
        facts["peak memory"] = f"{evaluation.peak_memory_mb:.0f} MB"
    facts |= {k.replace("_", " "): str(v) for k, v in evaluation.settings.items()}
    facts |= {k.replace("_", " "): str(v) for k, v in evaluation.machine.items() if v != ""}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return (
        "<p>Two results are comparable only where the judges named here are the same.</p>"
        f"<dl>{rows}</dl>"
    )
