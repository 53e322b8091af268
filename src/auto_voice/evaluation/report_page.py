"""The shell of a self-contained page: style and the little script that sorts tables."""

from __future__ import annotations

from html import escape

STYLE = """
:root{--bg:#fbfbfa;--ink:#1b1d21;--soft:#5b616b;--line:#d9dbe0;--card:#fff;--one:#1f5fbf;
--two:#c2410c;--band:#1f5fbf2e;--good:#15693b;--bad:#a61b1b;--mark:#ffe08a;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#15171b;--ink:#e8eaee;--soft:#a2a9b5;--line:#343942;
--card:#1d2026;--one:#7fb0ff;--two:#ff9a62;--band:#7fb0ff33;--good:#67d39a;--bad:#ff8d8d;
--mark:#6b5310}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1.5rem 1.25rem 4rem;background:var(--bg);
color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.4rem 0 .6rem}
h3{font-size:1rem;margin:0 0 .2rem;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:46rem}
.soft{color:var(--soft);font-size:.9rem}
a{color:var(--one)}
:focus-visible{outline:3px solid var(--one);outline-offset:2px;border-radius:3px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.5rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;padding:.6rem .75rem;color:var(--soft);font-size:.9rem}
th,td{padding:.4rem .75rem;text-align:right;border-top:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child,td.words,th.words{text-align:left}
td{white-space:nowrap}
td.words{min-width:13rem;color:var(--soft);white-space:normal}
thead th{border-top:0;color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:600;overflow-wrap:anywhere;min-width:min(13rem,38vw)}
th button{all:unset;cursor:pointer;font-weight:600}
th button:focus-visible{outline:3px solid var(--one);outline-offset:2px}
th[aria-sort=ascending] button::after{content:" ▲"}
th[aria-sort=descending] button::after{content:" ▼"}
.grid{display:grid;gap:1rem;align-items:start;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem .9rem}
.example{margin-bottom:1rem}
.takes{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr))}
.takes figure{margin:0}.takes figcaption{font-size:.88rem;color:var(--soft);margin-bottom:.25rem}
.takes img{width:100%;height:110px;display:block;border-radius:4px;image-rendering:auto}
audio{width:100%;margin-top:.4rem;height:36px}
.chips{display:flex;flex-wrap:wrap;gap:.35rem .9rem;margin:.2rem 0 .7rem;padding:0;list-style:none;
font-size:.9rem;color:var(--soft)}.chips b{color:var(--ink);font-variant-numeric:tabular-nums}
mark{background:var(--mark);color:inherit;border-radius:2px;padding:0 .1em}
.better{color:var(--good);font-weight:600}.worse{color:var(--bad);font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.5rem 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}
.axis{stroke:var(--soft);stroke-width:1}.rule{stroke:var(--line)}
.diagonal{stroke-dasharray:4 4;stroke:var(--soft)}
.dot{fill:var(--one);fill-opacity:.62}.mean{stroke:var(--two);stroke-width:2.5}
.band{fill:var(--band)}.whisker{stroke:var(--soft);stroke-width:1.5}
.track{stroke-width:1.7;stroke-linejoin:round}.track.under{stroke-width:4;opacity:.55}.one{stroke:var(--one)}.two{stroke:var(--two)}
.key{display:inline-block;width:1.4em;height:.25em;vertical-align:middle;border-radius:2px}
.key.k1{background:var(--one)}.key.k2{background:var(--two)}
@media (max-width:34rem){body{padding:1rem .8rem 3rem}th,td{padding:.35rem .5rem}
dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
@media print{audio{display:none}.scroll{overflow:visible}}
"""

SCRIPT = """
for (const button of document.querySelectorAll('table.sortable th button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th'), table = head.closest('table'), body = table.tBodies[0];
    const down = head.getAttribute('aria-sort') !== 'descending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const value = row => {
      const cell = row.cells[head.cellIndex];
      return 'v' in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
    };
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (typeof x === 'string' || typeof y === 'string')
        return String(x).localeCompare(String(y)) * (down ? 1 : -1);
      if (Number.isNaN(x)) return 1;
      if (Number.isNaN(y)) return -1;
      return down ? y - x : x - y;
    };
    body.append(...[...body.rows].sort(order));
  });
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document without any outside reference."""
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "img-src data:; media-src data:"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        '<a class="skip" href="#main">Skip to the figures</a>'
        f'<main id="main">{body}</main><script>{SCRIPT}</script></body></html>\n'
    )


class Cell(str):
    """A whole ``<td>``; every other string is text, whatever it starts with."""


def table(
    header: tuple[str, ...], rows: list[list[str]], caption: str, *, sortable: bool = False
) -> str:
    """A table whose first column heads the rows; the others are ``Cell`` or plain text."""
    words = [
        any(isinstance(r[i], Cell) and r[i].startswith('<td class="words"') for r in rows)
        for i in range(len(header))
    ]
    heads = "".join(
        f'<th scope="col"{" class=words" if left else ""}>'
        + (f'<button type="button">{escape(h)}</button>' if sortable else escape(h))
        + "</th>"
        for h, left in zip(header, words, strict=True)
    )
    lines = []
    for row in rows:
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        cells += [c if isinstance(c, Cell) else f"<td>{escape(c)}</td>" for c in row[1:]]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table{kind}><caption>{escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
