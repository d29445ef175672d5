"""Names of genes: lists of them, and what to say where a slide spells them otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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
    """A list of genes: JSON (``["A", "B"]`` or ``{"genes": ["A", "B"]}``), or text with one name a line.

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
    return tuple(genes)


def _text_genes(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not a readable list of genes ({first_line(error)})") from error
    names = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    broken = next((name for name in names if re.search(r"[\s,;{}\[\]\"]", name)), None)
    if broken:
        raise InputError(f"{path}: {broken[:40]!r} is not the name of a gene; give one a line, or a .json")
    return names


def other_spelling(missing: Sequence[str], gene_names: Sequence[str], var: pd.DataFrame | None) -> str:
    """What to add to a message that genes are missing, where they are there by other names; else both spellings.

    Args:
        missing: names that were asked for.
        gene_names: names that a slide has.
        var: its other columns of the genes.
    """
    columns = {} if var is None else {str(label): set(var[label].astype(str)) for label in var.columns}
    found = {label: sum(name in values for name in missing) for label, values in columns.items()}
    best = max(found, key=found.__getitem__, default="")
    if best and found[best]:
        return f"; var[{best!r}] has {found[best]} of them: --gene-key {best}"
    for what, plain in _SPELLINGS:
        by_plain = {plain(name): name for name in gene_names}
        pairs = [(name, by_plain[plain(name)]) for name in missing if plain(name) in by_plain]
        if pairs:
            asked, has = pairs[0]
            return f"; {len(pairs)} of them are there {what}, such as {has!r} for {asked!r}: rename them"
    return f"; it has names such as {', '.join(gene_names[:3])}" if gene_names else ""
