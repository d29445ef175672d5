"""Gene lists, and what is said where a slide spells genes otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stflow_fast.errors import InputError
from stflow_fast.slides import Slide, read_genes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", '["GATA3", "HLA-A", "MT-CO1"]'),
        ("list.json", '\ufeff{"genes": ["GATA3", "HLA-A", "MT-CO1"], "made": "by hand"}'),
        ("list.txt", "GATA3\nHLA-A\nMT-CO1"),
        ("list", "# of the paper\r\nGATA3  \r\n\r\n  # and more\r\nHLA-A\r\nMT-CO1\r\n"),
        ("list.json", '["GATA3 ", " HLA-A", "MT-CO1\\t"]'),
    ],
)
def test_gene_lists_are_read(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_genes(tmp_path / name) == ("GATA3", "HLA-A", "MT-CO1")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "A\nB\nA\n", "lists A twice; remove one"),
        ("a.txt", "A,B\n", "'A,B' is not the name of a gene; give one a line"),
        ("a.txt", "\n# nothing\n", "names no gene"),
        ("a.txt", '["A"]', "give one a line, or a .json"),
        ("a.json", '["A", "A "]', "lists A twice; remove one"),
        ("a.json", '{"genes": ["A", ""]}', "must be a JSON list of gene names"),
        ("a.json", "A\nB", "is not valid JSON"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: .*{complaint}"):
        read_genes(tmp_path / name)
    with pytest.raises(InputError, match=r"none\.txt: "):
        read_genes(tmp_path / "none.txt")


def slide(names: list[str], var: pd.DataFrame | None = None) -> Slide:
    counts = np.ones((3, len(names)))
    coords = np.arange(6.0).reshape(3, 2)
    return Slide("s", np.zeros((3, 2)), coords, ["a", "b", "c"], counts, tuple(names), var=var)


ENSEMBL = ["ENSG00000141510.17", "ENSG00000107485.18", "ENSG00000141736.14"]
SYMBOLS = ["TP53", "GATA3", "ERBB2"]


@pytest.mark.parametrize(
    ("names", "var", "asked", "said"),
    [
        (
            ENSEMBL,
            {"gene_name": SYMBOLS},
            SYMBOLS,
            r"; var\['gene_name'\] has 3 of them: --gene-key gene_name .*'TP53', which is 'ENSG00000141510\.17' here",
        ),
        (
            SYMBOLS,
            {"kind": ["x", "y", "z"], "gene_ids": ENSEMBL},
            ENSEMBL[:2],
            r"; var\['gene_ids'\] has 2 of them: --gene-key gene_ids .*'ENSG00000141510\.17', which is 'TP53' here",
        ),
        (
            ["Trp53", "Gata3", "Erbb2"],
            {"kind": ["x", "y", "TP53"]},
            SYMBOLS,
            r"2 of them are there but for capital letters \(another species\?\), such as 'Gata3' for 'GATA3'",
        ),
        (
            ENSEMBL,
            None,
            ["ENSG00000107485", "ENSG00000141736.13"],
            r"2 of them .* for the version behind the dot, such as 'ENSG00000107485\.18' for 'ENSG00000107485':",
        ),
        (
            ["Trp53", "Gata3"],
            None,
            SYMBOLS,
            r"1 of them are there but for capital letters \(another species\?\), such as 'Gata3' for 'GATA3'",
        ),
        ([" TP53"], None, ["TP53"], r"but for blanks around them, such as ' TP53' for 'TP53'"),
        (["CD45", "HER2"], None, ["PTPRC"], r"PTPRC; it has names such as CD45, HER2"),
    ],
    ids=["ensembl", "symbols", "more by capitals", "versions", "mouse", "blanks", "alias"],
)
def test_other_spellings_are_shown_and_never_matched(
    names: list[str], var: dict[str, list[str]] | None, asked: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=f"slide s: .* genes are not in its expression: .*{said}"):
        slide(names, None if var is None else pd.DataFrame(var)).expression(asked)


def test_versions_of_genes_that_have_a_dot_in_their_name_are_no_versions() -> None:
    """RP11-34P13.7 is a gene of its own: its sister is another gene, and is named as what there is."""
    with pytest.raises(InputError, match=r"RP11-34P13\.7") as error:
        slide(["RP11-34P13.8"]).expression(["RP11-34P13.7"])
    assert "RP11-34P13.8" in str(error.value)
