"""Names of genes: lists of them, and what to say where a slide spells them otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_line
from ..files import read_json

if TYPE_CHECKING:
    import pandas as pd

_VERSION = re.compile(r"(?<=\d)\.\d+$")

_SPELLINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("but for the version behind the dot", lambda name: _VERSION.sub("", name)),
    ("but for capital letters (another species?)", str.upper),
    ("but for blanks around them", str.strip),
)
"""In what names may differ that mean one gene, or its relative in another species: never matched, only said."""


def read_genes(path: str | Path) -> tuple[str, ...]:
    """A list of genes: JSON (``["A", "B"]`` or ``{"genes": ["A", "B"]}``), or text with one name a line. Blanks around
    names are no part of them.

    Raises:
        InputError: no such file, another content, or a gene listed twice.
    """
    path = Path(path)
    names = _json_genes(path) if path.suffix.lower() == ".json" else _text_genes(path)
    if not names:
        raise InputError(f"{path}: names no gene; give names one a line")
    known: set[str] = set()
    for name in names:
        if name in known:
            raise InputError(f"{path}: lists {name} twice; remove one")
        known.add(name)
    return names


def find_genes(folder: Path, name: str) -> tuple[str, ...]:
    """:func:`read_genes` of a list of a folder, or of the path of one elsewhere.

    Raises:
        InputError: no such file, or what read_genes refuses.
    """
    path = folder / name
    if not path.is_file():
        path = Path(name) if Path(name).is_file() else path
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in folder.glob("*.json"))) or "none"
        raise InputError(f"{path}: does not exist; .json files there: {known}")
    return read_genes(path)


def _json_genes(path: Path) -> tuple[str, ...]:
    content = read_json(path)
    genes = content.get("genes") if isinstance(content, dict) else content
    if not isinstance(genes, list) or not genes or not all(isinstance(gene, str) and gene.strip() for gene in genes):
        raise InputError(f'{path}: must be a JSON list of gene names, or {{"genes": [names]}}')
    return tuple(gene.strip() for gene in genes)


def _text_genes(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a readable list of genes ({first_line(error)})") from error
    names = tuple(name for line in lines if (name := line.strip()) and not name.startswith("#"))
    broken = next((name for name in names if re.search(r"[\s,;{}\[\]\"]", name)), None)
    if broken:
        raise InputError(f"{path}: {broken[:40]!r} is not the name of a gene; give one a line, or a .json")
    return names


def some_of(names: Sequence[str], n: int = 5) -> str:
    """The first few of many names, for messages."""
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def other_spelling(missing: Sequence[str], gene_names: Sequence[str], var: pd.DataFrame | None) -> str:
    """What to add to a message that genes are missing: :func:`known_otherwise`, else some of the names that are there.

    Args:
        missing: names that were asked for.
        gene_names: names that a slide has.
        var: its other columns of the genes, a row for each of ``gene_names``; None where whoever asks has no way to
            choose one.
    """
    some = f"; it has names such as {', '.join(gene_names[:3])}" if gene_names else ""
    return known_otherwise(missing, gene_names, var) or some


def known_otherwise(missing: Sequence[str], gene_names: Sequence[str], var: pd.DataFrame | None) -> str:
    """Where most of the missing genes are by another name, with both spellings of one; empty where none is.

    Args:
        missing, gene_names, var: see :func:`other_spelling`.
    """
    found = [*_in_columns(missing, gene_names, var), *_but_for(missing, gene_names)]
    return max(found, key=lambda each: each[0], default=(0, ""))[1]


def _in_columns(
    missing: Sequence[str], gene_names: Sequence[str], var: pd.DataFrame | None
) -> Iterator[tuple[int, str]]:
    """How many of the genes a column of ``var`` has, and what to say."""
    if var is None:
        return
    for index, label in enumerate(var.columns):
        here = dict(zip(var.iloc[:, index].astype(str), gene_names, strict=True))
        there = [name for name in missing if name in here]
        if there:
            pair = f"such as {there[0]!r}, which is {here[there[0]]!r} here"
            yield len(there), f"; var[{str(label)!r}] has {len(there)} of them: --gene-key {label} ({pair})"


def _but_for(missing: Sequence[str], gene_names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """How many of the genes are there in another spelling, and what to say."""
    for what, plain in _SPELLINGS:
        by_plain = {plain(name): name for name in gene_names}
        pairs = [(name, by_plain[plain(name)]) for name in missing if plain(name) in by_plain]
        if pairs:
            asked, has = pairs[0]
            yield len(pairs), f"; {len(pairs)} of them are there {what}, such as {has!r} for {asked!r}: rename them"
