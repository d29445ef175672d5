"""A web page that needs no network: text, tables and embedded pictures."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..files import atomic_path

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2430; --paper: #ffffff; --line: #d5dae0; --soft: #5b6572; --first: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14181e; --line: #38404b; --soft: #9aa5b3; --first: #1d2a38; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } p { white-space: pre-line; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption { color: var(--soft); padding-top: .5rem; }
caption { caption-side: bottom; text-align: left; white-space: pre-line; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
tr.bold td { font-weight: 650; background: var(--first); }
figure { margin: 2rem 0; }
img { display: block; max-width: 100%; height: auto; margin: auto; background: #fff; border-radius: 6px; }
"""


def write_html(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[tuple[str, str | Table]],
    figures: Sequence[tuple[str, str | os.PathLike[str]]] = (),
) -> None:
    """Write one self-contained page: text and tables first, then pictures, embedded. All text is escaped.

    Args:
        sections: (heading, body) in order; a body is plain text (line breaks are kept) or a rich table. An
            empty heading continues the section before.
        figures: (caption, PNG file) in order.

    Raises:
        InputError: a picture cannot be read or the page not be written.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, body in sections:
        if heading:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts.append(_html_table(body) if isinstance(body, Table) else f"<p>{html.escape(body)}</p>")
    for caption, picture in figures:
        text = html.escape(caption)
        source = f"data:image/png;base64,{_base64(Path(picture))}"
        parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _html_table(table: Table) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(_plain(value))}</{tag}>" for value in values)

    rows = [f"<tr>{cells('th', [column.header for column in table.columns])}</tr>"]
    contents = zip(*(column.cells for column in table.columns), strict=True)
    for row, values in zip(table.rows, contents, strict=True):
        kind = ' class="bold"' if row.style == "bold" else ""
        rows.append(f"<tr{kind}>{cells('td', values)}</tr>")
    notes = "\n".join(_plain(note) for note in (table.title, table.caption) if note)
    caption = f"<caption>{html.escape(notes)}</caption>" if notes else ""
    return f'<div class="scroll"><table>{caption}{"".join(rows)}</table></div>'


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _base64(picture: Path) -> str:
    try:
        return base64.b64encode(picture.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(f"{picture}: cannot be read ({error.strerror or error})") from error
