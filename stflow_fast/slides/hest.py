"""HEST-bench task folders, and folders of HEST-1k with splits, with patch embeddings."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import InputError, first_line
from .anndata_file import read_anndata
from .embeddings import PRECISION_FOLDERS, open_features, read_embeddings
from .genes import find_genes
from .match import match
from .options import ReadOptions
from .slide import Slide
from .stores import guarded

EXPRESSION_FOLDERS = ("adata", "st")
"""Where expression lies where splits do not say: HEST-bench's folder, HEST-1k's."""

_SPLIT = re.compile(r"(train|val|test)_(0|[1-9][0-9]*)\.csv")
"""Names of splits; people keep other tables beside them."""


@dataclass(frozen=True)
class Fold:
    """Slide ids of one split; ``val`` is empty where the folder has no val_{k}.csv."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()


@dataclass(frozen=True)
class HestTask:
    """A HEST-bench task folder: ``splits/``, expression, gene lists, and embeddings of one encoder.

    Attributes:
        root: the folder.
        encoder: name of the embeddings' folder; empty where only expression is read.
        embeddings: where the encoders' folders are, if not in ``root/embeddings``.
        gene_key: column of ``var`` with the names of the genes; the index when None.

    Raises:
        InputError: a missing folder, or no such encoder.
    """

    root: str | Path
    encoder: str = ""
    embeddings: str | Path | None = None
    gene_key: str | None = None

    def __post_init__(self) -> None:
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"{root}: is not a folder; give a HEST-bench task folder")
        if not (root / "splits").is_dir():
            raise InputError(f"{root}: has no splits/ folder, so it is not a HEST-bench task folder")
        if self.encoder:
            _ = self.embeddings_folder

    @cached_property
    def embeddings_folder(self) -> Path:
        """Where ``{slide}.h5`` lie: see :func:`find_embeddings`."""
        base = Path(self.embeddings) if self.embeddings else Path(self.root) / "embeddings"
        return find_embeddings(base, self.encoder, (Path(self.root).absolute().name, Path(self.root).resolve().name))

    def folds(self) -> list[int]:
        """Numbers of the splits."""
        named = (_SPLIT.fullmatch(path.name) for path in self._splits())
        return sorted(int(name[2]) for name in named if name and name[1] == "train")

    def fold(self, number: int) -> Fold:
        """One split.

        Raises:
            InputError: no such split, a broken file, or a slide on both sides of it.
        """
        if number not in self.folds():
            known = ", ".join(map(str, self.folds())) or "none"
            raise InputError(f"fold: {number} is not in {Path(self.root) / 'splits'}; there are {known}")
        fold = Fold(self._split("train", number), self._split("test", number), self._split("val", number))
        shared = set(fold.train) & set(fold.test) | set(fold.val) & {*fold.train, *fold.test}
        if shared:
            raise InputError(
                f"{Path(self.root) / 'splits'}: fold {number} has {', '.join(sorted(shared))} on two sides; remove one"
            )
        return fold

    def _splits(self) -> list[Path]:
        folder = Path(self.root) / "splits"
        return sorted(path for path in guarded(folder, lambda: list(folder.iterdir())) if _SPLIT.fullmatch(path.name))

    def _split(self, side: str, number: int) -> tuple[str, ...]:
        path = Path(self.root) / "splits" / f"{side}_{number}.csv"
        if side == "val" and not path.exists():
            return ()
        names = [row["sample_id"] for row in _read_split(path)]
        if not all(names):
            raise InputError(f"{path}: names no slide in row {names.index('') + 2}; give each row a sample_id")
        if not names:
            raise InputError(f"{path}: names no slide; give one row for each")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{path}: names {twice[0]} twice; remove one")
        return tuple(names)

    @cached_property
    def _named(self) -> dict[tuple[str, str], tuple[Path, str]]:
        """By slide and column of the splits: the split that names a file, and its name there."""
        found: dict[tuple[str, str], tuple[Path, str]] = {}
        for split in self._splits():
            for row in _read_split(split):
                for column in ("expr_path", "patches_path"):
                    name = row.get(column)
                    if not name:
                        continue
                    first, known = found.setdefault((row["sample_id"], column), (split, name))
                    if self._place(known) != self._place(name):
                        what = f"{column} of {row['sample_id']}"
                        raise InputError(f"{split}: {what} is {name}, but {known} in {first.name}; make them one")
        return found

    def _place(self, name: str) -> str:
        """Of a file that a split names, however it is spelled."""
        return os.path.abspath(Path(self.root) / name)

    def expression_file(self, sample_id: str) -> Path:
        """What the splits name as ``expr_path``, relative to the folder or absolute; where they name none,
        ``adata/{sample_id}.h5ad`` or ``st/{sample_id}.h5ad``.

        Raises:
            InputError: the file is not there.
        """
        split, name = self._named.get((sample_id, "expr_path"), (None, ""))
        if name:
            path = Path(self.root) / name
            if not path.exists():
                raise InputError(
                    f"{path}: does not exist; {split} names it as expr_path of {sample_id}; mend one of them"
                )
            return path
        sought = [Path(self.root) / folder / f"{sample_id}.h5ad" for folder in EXPRESSION_FOLDERS]
        found = next((path for path in sought if path.exists()), None)
        if found is None:
            raise InputError(f"{sought[0]}: does not exist, nor does {sought[1]}, and the splits name no expr_path")
        return found

    def patches_file(self, sample_id: str) -> Path:
        """What the splits name as ``patches_path`` where it is there, else ``patches/{sample_id}.h5``, there or not."""
        _, name = self._named.get((sample_id, "patches_path"), (None, ""))
        named = Path(self.root) / name if name else None
        return named if named and named.is_file() else Path(self.root) / "patches" / f"{sample_id}.h5"

    def _patches_notes(self, sample_id: str) -> tuple[str, ...]:
        """On a ``patches_path`` that is not there. The benchmark's own is often left out: that is no slip."""
        split, name = self._named.get((sample_id, "patches_path"), (None, ""))
        named = Path(self.root) / name
        if not name or named.is_file() or self._place(name) == self._place(f"patches/{sample_id}.h5"):
            return ()
        return (f"{named}: does not exist; {split} names it as patches_path of {sample_id}",)

    def genes(self, name: str = "var_50genes.json") -> tuple[str, ...]:
        """A gene list of the folder: see :func:`.genes.find_genes`.

        Args:
            name: of the file in the folder, or the path of one elsewhere.

        Raises:
            InputError: no such file, another content, or a gene listed twice.
        """
        return find_genes(Path(self.root), name)

    def slide(self, sample_id: str, expression: bool = True) -> Slide:
        """One slide, embeddings and expression matched by the name of the barcode.

        Args:
            sample_id: name of the embeddings' file, without suffix.
            expression: read :meth:`expression_file` too; its ``obsm["spatial"]`` then gives the coordinates, and
                features are read into memory.

        Raises:
            InputError: missing or broken files, no barcode in common, or what Slide refuses.
        """
        notes, embedded = self._patches_notes(sample_id), self.embeddings_folder / f"{sample_id}.h5"
        if not expression:
            slide = guarded(embedded, lambda: read_embeddings(embedded, self.patches_file(sample_id)))
            return dataclasses.replace(slide, notes=(*slide.notes, *notes)) if notes else slide
        found = guarded(embedded, lambda: open_features(embedded, ReadOptions()))
        slide = match(self.measured(sample_id), found)
        return dataclasses.replace(slide, features=np.asarray(slide.features), notes=(*slide.notes, *notes))

    def measured(self, sample_id: str) -> Slide:
        """One slide's expression alone, without features.

        Raises:
            InputError: a missing or broken file, or what Slide refuses.
        """
        path = self.expression_file(sample_id)
        options = ReadOptions(expression=True, require_features=False, gene_key=self.gene_key, library_key="")
        return dataclasses.replace(guarded(path, lambda: read_anndata(path, options)), id=sample_id, features=None)


def find_embeddings(base: Path, encoder: str, tasks: Iterable[str]) -> Path:
    """Where ``{slide}.h5`` lie: ``{base}/{encoder}/fp32`` of STFlow, or ``fp16``, or none of the two as HEST-bench has
    it, each also with a name of the task in front of the encoder's.

    Raises:
        InputError: none of these is there.
    """
    bases = [base, *(base / name for name in dict.fromkeys(tasks))]
    sought = [place / encoder / folder for place in bases for folder in (*PRECISION_FOLDERS, "")]
    found = next((place for place in sought if any(place.glob("*.h5"))), None)
    if found:
        return found
    known = sorted({name for place in bases for name in _encoders_in(place)})
    raise InputError(
        f"{base / encoder}: no such folder of embeddings with .h5 files; looked for "
        f"{', '.join(map(str, sought))}; encoders there: {', '.join(known) or 'none'}"
    )


def _encoders_in(base: Path) -> Iterator[str]:
    """Names of folders with embeddings."""
    for path in base.glob("*/*.h5"):
        yield path.parent.name
    for folder in PRECISION_FOLDERS:
        for path in base.glob(f"*/{folder}"):
            yield path.parent.name


def _read_split(path: Path) -> list[dict[str, str]]:
    """Rows of a split, without blanks around their values."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets leave a mark in front
            table = csv.DictReader(file)
            rows = [{name: (value or "").strip() for name, value in row.items() if name} for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    if "sample_id" not in (table.fieldnames or ()):
        raise InputError(f"{path}: has no column sample_id; it has {', '.join(table.fieldnames or ['nothing'])}")
    return rows
