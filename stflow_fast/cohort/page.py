"""The page of a cohort: what became of each slide, in one file that opens from the disk and needs nothing else."""

from __future__ import annotations

import html
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..files import atomic_path
from .state import DONE, SlideLine
from .tables import GENES_TABLE, SLIDES_TABLE, in_order

PAGE = "index.html"

SHOWN = 160
"""CSS pixels of the side of a picture."""

BARS = [step * power for power in (1, 10, 100, 1000, 10_000, 100_000) for step in (1, 2, 5)]
"""Lengths of scale bars, in micron."""

LONGEST_BAR = 0.4
"""Of the width of a picture."""

COLUMNS = ("slide", "status", "spots", "genes", "seconds", "attempts", "remarks")
NUMBERS = COLUMNS[2:6]


def write_page(folder: Path, lines: Sequence[SlideLine], about: Mapping[str, Any]) -> Path:
    """Write ``index.html``: totals, and a table of the slides with their pictures, failures first. A browser without
    JavaScript shows all of it; sorting and filtering need it.

    Args:
        folder: of the predictions; links are relative to it.
        lines: of the slides, in any order.
        about: what the predictions were made by, the content of ``predictions.json``.

    Raises:
        OutputError: the page cannot be written.
    """
    genes = list(dict.fromkeys(gene for line in lines for gene in line.maps))
    title = f"Predictions of {len(lines):,} slide{'' if len(lines) == 1 else 's'}"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
        f"<title>{html.escape(title)}</title><style>{_style(len(genes))}</style></head>\n<body>",
        f"<header><h1>{html.escape(title)}</h1>",
        _pairs("totals", _totals(lines)),
        _pairs("about", _made_by(about)),
        f"<p>{_notes(genes)}</p>{_FILTER}</header>\n<main>",
        _table(in_order(lines), genes),
        f"</main>\n<script>{_SCRIPT}</script></body></html>\n",
    ]
    path = folder / PAGE
    with atomic_path(path) as temporary:
        # A file's name need not be UTF-8: what is not becomes an escape.
        temporary.write_text("".join(parts), encoding="utf-8", errors="backslashreplace")
    return path


def _totals(lines: Sequence[SlideLine]) -> dict[str, str]:
    done = [line for line in lines if line.is_done]
    genes = sorted({line.genes for line in done if line.genes is not None})
    return {
        "done": f"{len(done):,}",
        "failed": f"{len(lines) - len(done):,}",
        "spots": f"{sum(line.spots or 0 for line in done):,}",
        "genes": " to ".join(f"{number:,}" for number in dict.fromkeys((*genes[:1], *genes[-1:]))) or "0",
        "time of all slides": _duration(sum(line.seconds or 0 for line in lines)),
    }


def _made_by(about: Mapping[str, Any]) -> dict[str, str]:
    prior = about.get("prior")
    selected_on = about.get("selected_on")
    told = {
        "model": about.get("model"),
        "weights": str(about.get("weights_sha256") or "")[:12],
        "epoch chosen on": None if selected_on == "unknown" else selected_on,
        "seed": about.get("seed"),
        "sample steps": about.get("n_sample_steps"),
        "prior": prior.get("name") if isinstance(prior, Mapping) else prior,
        "precision": about.get("precision"),
        "neighbours mixed in": about.get("smooth") or None,
        "draws": about.get("draws"),
        "stflow-fast": about.get("version"),
    }
    return {name: str(value) for name, value in told.items() if value not in (None, "")}


def _pairs(kind: str, content: Mapping[str, str]) -> str:
    rows = (f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in content.items())
    return f'<dl class="{kind}">{"".join(rows)}</dl>'


def _notes(genes: Sequence[str]) -> str:
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in (SLIDES_TABLE, GENES_TABLE))
    tables = f"The name of a slide opens its prediction. All of this as tables: {links}."
    colors = "Each map has its own colours, from its 1st percentile (dark) to its 99th (bright)."
    return f"{tables} {colors}" if genes else tables


def _table(lines: Iterable[SlideLine], genes: Sequence[str]) -> str:
    heads = [_head(name, "number" if name in NUMBERS else "text", name == "status") for name in COLUMNS]
    heads += [_head(gene, "number map", False) for gene in genes]
    rows = "\n".join(_row(line, genes) for line in lines)
    # The roles are those that a browser takes away from a table that is laid out as a grid.
    return (
        f'<table role="table"><thead role="rowgroup"><tr role="row">{"".join(heads)}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{rows}\n</tbody></table>'
    )


def _style(n_maps: int) -> str:
    columns = f"repeat({n_maps}, calc(var(--side) + .5rem))" if n_maps else ""
    narrow = 59 + n_maps * (SHOWN / 16 + 1.5)  # 16 CSS pixels are one em of the window
    maps = f":root {{ --side: {SHOWN}px; --maps: {columns}; }}"
    return f"{_STYLE}{maps}\n@media (max-width: {narrow:g}em) {{{_NARROW}}}\n"


def _head(name: str, kind: str, sorts: bool) -> str:
    sorting = "ascending" if sorts else "none"
    button = f'<button type="button" disabled>{html.escape(name)}</button>'
    return f'<th role="columnheader" scope="col" class="{kind}" aria-sort="{sorting}">{button}</th>'


def _row(line: SlideLine, genes: Sequence[str]) -> str:
    cells = [
        _cell("slide", _slide(line), line.slide),
        _cell("status", line.status, int(line.is_done)),
        *(_number_cell(name, getattr(line, name)) for name in NUMBERS),
    ]
    remarks = "".join(f"<p>{html.escape(text)}</p>" for text in (line.reason, *line.notes) if text)
    if line.maps:
        means = dict(zip(line.statistics.get("genes", ()), line.statistics.get("mean", ()), strict=True))
        cells += [_cell("remarks", remarks), *(_map(line, gene, means.get(gene)) for gene in genes)]
    else:
        cells.append(_cell("remarks", remarks, span=1 + len(genes)))
    kind = "" if line.status == DONE else ' class="failed"'
    return f'<tr role="row"{kind}>{"".join(cells)}</tr>'


def _cell(kind: str, content: str, value: Any = None, span: int = 1) -> str:
    """``value`` is what the column is sorted by, where it is not the text."""
    sorted_by = "" if value is None else f' data-v="{html.escape(str(value))}"'
    spanned = "" if span == 1 else f' colspan="{span}" aria-colspan="{span}"'
    return f'<td role="cell" class="{kind}"{sorted_by}{spanned}>{content}</td>'


def _number_cell(name: str, value: float | None) -> str:
    if value is None:
        return _cell(name, "")
    return _cell(name, f"{value:,.1f}" if isinstance(value, float) else f"{value:,}", value)


def _slide(line: SlideLine) -> str:
    name = html.escape(line.slide)
    linked = f'<a href="{_link(line.file)}">{name}</a>' if line.file else name
    path = html.escape(line.input).replace("/", "/<wbr>")  # where it may be broken
    return f"<strong>{linked}</strong><small>{path}</small>"


def _map(line: SlideLine, gene: str, mean: float | None) -> str:
    if gene not in line.maps:
        return _cell("map", "")
    picture = line.maps[gene]
    size = f'width="{SHOWN}" height="{SHOWN}" loading="lazy" decoding="async"'
    image = f'<img src="{_link(picture["path"])}" {size} alt="map of {html.escape(gene)}">'
    told = "" if mean is None else f" mean {mean:.3g}"
    return _cell("map", f"{image}{_bar(picture['micron'])}<b>{html.escape(gene)}</b>{told}", mean)


def _bar(micron: float | None) -> str:
    """A scale bar for a picture so wide."""
    if micron is None or micron * LONGEST_BAR < BARS[0]:
        return '<div class="bar"></div>'
    length = BARS[bisect_right(BARS, micron * LONGEST_BAR) - 1]
    label = f"{length} \u00b5m" if length < 1000 else f"{length // 1000} mm"
    return f'<div class="bar"><i style="width:{length / micron * SHOWN:.1f}px"></i>{label}</div>'


def _link(path: str) -> str:
    """Relative, whatever is in a name: a colon would make a scheme of what stands before it."""
    return quote(path, errors="surrogateescape")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = round(seconds / 60) % 60, round(seconds / 60) // 60
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"


_FILTER = """<div class="filter"><label for="filter">Filter</label>
<input id="filter" type="search" placeholder="slide, file, reason, failed ..." autocomplete="off" spellcheck="false">
<output for="filter" aria-live="polite"></output></div>
<noscript><p>Sorting and filtering need JavaScript; without it all slides stand here, failures first.</p></noscript>"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fff; --line: #d5dae0; --soft: #55606d;
  --link: #0b57a4; --bad: #a8201a; --ground: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14181e; --line: #38404b; --soft: #a3adba;
    --link: #8cc2ff; --bad: #ff9a90; --ground: #2b323c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: .9375rem/1.45 system-ui, sans-serif; }
header { max-width: 80rem; padding: 1.25rem 1rem .75rem; }
h1 { margin: 0 0 1rem; font-size: 1.5rem; line-height: 1.2; }
a { color: var(--link); }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0 0 .9rem; }
dt { color: var(--soft); font-size: .8125rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.totals dd { font-size: 1.375rem; font-weight: 600; line-height: 1.25; }
header p { margin: 0 0 .9rem; color: var(--soft); }
.filter { display: flex; flex-wrap: wrap; align-items: center; gap: .6rem; }
html:not(.script) .filter { display: none; }
input { flex: 0 1 22rem; min-width: 0; padding: .4rem .6rem; border: 1px solid var(--soft); border-radius: 6px;
  background: var(--paper); color: var(--ink); font: inherit; }
::placeholder { color: var(--soft); opacity: 1; }
output { color: var(--soft); font-variant-numeric: tabular-nums; }
table, thead, tbody { display: block; }
tr { display: grid; border-bottom: 1px solid var(--line); padding: 0 1rem; column-gap: 1rem;
  grid-template-columns: minmax(13rem, 3fr) 4.5rem 5.5rem 4.5rem 5.5rem 6.5rem minmax(12rem, 2fr)
    var(--maps); }
tbody tr { content-visibility: auto; contain-intrinsic-size: auto calc(var(--side) + 4.6rem); }
tbody tr.failed { box-shadow: inset 4px 0 var(--bad); contain-intrinsic-size: auto 5rem; }
tr[hidden] { display: none; }
thead { position: sticky; top: 0; z-index: 1; background: var(--paper); }
th, td { display: block; min-width: 0; padding: .6rem 0; text-align: left; overflow-wrap: anywhere; font-weight: 400; }
th { padding: .3rem 0; }
td.remarks, th:nth-child(7) { padding-left: .75rem; }
button { width: 100%; padding: .3rem 0; border: 0; background: none; color: inherit; font: inherit; font-weight: 600;
  text-align: inherit; overflow-wrap: anywhere; cursor: pointer; }
button:disabled { cursor: auto; }
button:hover:enabled { text-decoration: underline; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
[aria-sort=ascending] button::after { content: " \\2191"; content: " \\2191" / ""; }
[aria-sort=descending] button::after { content: " \\2193"; content: " \\2193" / ""; }
.number, .spots, .genes, .seconds, .attempts { text-align: right; font-variant-numeric: tabular-nums; }
th.map { text-align: left; }
.slide strong, .slide small { display: block; }
small { color: var(--soft); font-size: .8125rem; }
td p { margin: 0 0 .3rem; }
.failed .status { color: var(--bad); font-weight: 600; }
td[colspan] { grid-column: 7 / -1; max-width: 60rem; }
td.map { font-size: .8125rem; font-variant-numeric: tabular-nums; }
img { display: block; background: var(--ground); border-radius: 6px; }
.bar { display: flex; align-items: center; gap: .4rem; height: 1.25rem; color: var(--soft); }
.bar i { height: 3px; background: var(--ink); }
"""

_NARROW = """
  thead { position: static; }
  thead tr, tbody tr { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding-block: .6rem; }
  tbody tr { contain-intrinsic-size: auto calc(var(--side) + 9rem); }
  th, td, td.remarks, th:nth-child(7) { padding: 0; text-align: left; }
  button { padding: .4rem 0; }
  .slide { flex: 1 1 calc(100% - 5rem); }
  td.remarks { flex: 1 1 100%; max-width: none; }
  td:empty { display: none; }
  td.remarks:empty { display: block; }
  td.map { width: var(--side); }
  .spots:not(:empty)::after { content: " spots"; }
  .genes:not(:empty)::after { content: " genes"; }
  .seconds:not(:empty)::after { content: " s"; }
  .attempts::before { content: "attempts: "; }
"""
"""Where the window is narrower than the columns, each slide is a block."""

_SCRIPT = """
"use strict";
document.documentElement.classList.add("script");
const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
const rows = [...body.rows], box = document.getElementById("filter"), told = document.querySelector("output");
const text = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));

function valueOf(row, column, isNumber) {
  const cell = row.cells[column];
  const value = cell ? cell.dataset.v ?? (isNumber ? "" : cell.textContent) : "";
  return value === "" ? null : isNumber ? Number(value) : value;
}

function sortBy(head) {
  const column = heads.indexOf(head), isNumber = head.classList.contains("number");
  const first = isNumber ? "descending" : "ascending", other = isNumber ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? other : first, sign = order === "ascending" ? 1 : -1;
  for (const each of heads) each.setAttribute("aria-sort", each === head ? order : "none");
  const values = new Map(rows.map(row => [row, valueOf(row, column, isNumber)]));
  // Equal rows keep the order of the page; what is not known comes last either way.
  const sorted = [...rows].sort((one, two) => {
    const a = values.get(one), b = values.get(two);
    if (a === null || b === null) return (a === null) - (b === null);
    return a < b ? -sign : a > b ? sign : 0;
  });
  body.replaceChildren(...sorted);  // rows appended behind white space that stays take seconds
}

function filter() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    row.hidden = !words.every(word => text.get(row).includes(word));
    shown += !row.hidden;
  }
  const of = rows.length.toLocaleString("en");
  told.textContent = words.length ? `${shown.toLocaleString("en")} of ${of} slides` : "";
}

for (const head of heads) {
  head.firstChild.disabled = false;
  head.firstChild.addEventListener("click", () => sortBy(head));
}
box.addEventListener("input", filter);
filter();
"""
