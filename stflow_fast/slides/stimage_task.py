"""STImage-Bench: slides of one organ of STImage-1K4M, their splits and their genes.

Huang et al., ICML 2025 (arXiv 2506.05361), appendix.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import InputError, first_line
from .genes import find_genes
from .hest import Fold, find_embeddings
from .match import with_features
from .options import ReadOptions
from .slide import Slide
from .stimage import files_of, read_counts, read_header, read_stimage
from .stores import guarded

ORGANS = ("Breast", "Brain", "Skin", "Mouth", "Stomach", "Prostate", "Colon")
TECHNOLOGY = "Visium"
N_GENES = 50
SEEDS = (0, 1, 2)
HELD_OUT = 0.1
"""Of the slides of an organ: this share each for validation and for test."""

GENE_LIST = "var_50genes.json"


@dataclass(frozen=True)
class StImageTask:
    """STImage-Bench: the human Visium cancer slides of one organ, with embeddings of one encoder.

    As its reproduction reads the paper's appendix: the slides of the newest ``meta/meta_all_gene*.csv``, split 8:1:1
    into train, validation and test by three seeds, here fold k by seed k; the 50 genes of the highest variance of log1p
    counts, over the spots of all of the organ's slides, those of the test too, among the genes that all of these share.
    Slides of one patient may stand on several sides, as published.

    Attributes:
        root: the folder with ``Visium/`` and ``meta/``, or ``Visium/`` itself, with ``meta/`` beside or above it.
        encoder: name of the embeddings' folder, with ``{slide}.h5`` in it.
        embeddings: where the encoders' folders are, if not in ``root/embeddings``.
        organ: one of :data:`ORGANS`.

    Raises:
        InputError: another organ, missing files, too few slides, or no such encoder.
    """

    root: str | Path
    encoder: str
    embeddings: str | Path | None = None
    organ: str = "Breast"

    def __post_init__(self) -> None:
        if self.organ not in ORGANS:
            raise InputError(f"organ: must be one of {', '.join(ORGANS)}, not {self.organ!r}")
        needed = [path for name in self.slides for path in files_of(self._folder, name)[1:3]]
        missing = [path for path in needed if not path.is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: does not exist, one of {len(missing)} missing files; download the whole organ"
            )
        _ = self.embeddings_folder

    @property
    def _folder(self) -> Path:
        inside = Path(self.root) / TECHNOLOGY
        return inside if inside.is_dir() else Path(self.root)

    @cached_property
    def embeddings_folder(self) -> Path:
        """Where ``{slide}.h5`` lie: see :func:`.hest.find_embeddings`."""
        base = Path(self.embeddings) if self.embeddings else Path(self.root) / "embeddings"
        return find_embeddings(base, self.encoder, (self.organ, self.organ.lower()))

    @cached_property
    def slides(self) -> tuple[str, ...]:
        """Names of the organ's slides, sorted."""
        return _slides_of(_newest_meta(self._folder), self.organ)

    def folds(self) -> list[int]:
        """Numbers of the splits."""
        return list(SEEDS)

    def fold(self, number: int) -> Fold:
        """One split.

        Raises:
            InputError: no such split.
        """
        if number not in SEEDS:
            raise InputError(f"fold: must be one of {', '.join(map(str, SEEDS))}, not {number!r}")
        names = np.random.default_rng(number).permutation(self.slides)
        size = max(1, round(HELD_OUT * len(names)))
        test, val, train = (tuple(sorted(part.tolist())) for part in np.split(names, [size, 2 * size]))
        return Fold(train, test, val)

    def genes(self, name: str = GENE_LIST) -> tuple[str, ...]:
        """The benchmark's genes, or those of a list.

        Reading all of an organ's counts takes minutes; a list that stands in the folder as ``var_50genes.json`` is
        taken for the benchmark's.

        Args:
            name: of a list in the folder, or the path of one elsewhere.

        Raises:
            InputError: no such list, or counts that cannot be read.
        """
        if name == GENE_LIST and not (Path(self.root) / name).is_file():
            return self._variable
        return find_genes(Path(self.root), name)

    @cached_property
    def _variable(self) -> tuple[str, ...]:
        return variable_genes([files_of(self._folder, name).counts for name in self.slides], N_GENES)

    def slide(self, sample_id: str, expression: bool = True) -> Slide:
        """One slide, its spots matched to the embeddings by barcode.

        Args:
            sample_id: name of the slide.
            expression: read its counts too; features are read into memory then.

        Raises:
            InputError: missing or broken files, no barcode in common, or what Slide refuses.
        """
        options = ReadOptions(section=sample_id, expression=expression, require_features=False)
        places = files_of(self._folder, sample_id).coord
        slide = with_features(guarded(places, lambda: read_stimage(self._folder, options)), self.embeddings_folder)
        return dataclasses.replace(slide, features=np.asarray(slide.features)) if expression else slide


def _newest_meta(folder: Path) -> Path:
    """Of ``meta_all_gene.csv`` and ``meta_all_gene{MMDDYYYY}.csv`` beside or above the folder of a technology."""
    places = [parent / "meta" for parent in folder.absolute().parents[:2]]
    found = next((files for place in places if (files := sorted(place.glob("meta_all_gene*.csv")))), None)
    if found is None:
        raise InputError(f"{places[0]}: has no meta_all_gene*.csv; download meta/ of STImage-1K4M beside {folder.name}")
    return max(found, key=_date)


def _date(path: Path) -> tuple[str, ...]:
    """(year, month, day) of a name that ends in MMDDYYYY; nothing, which is less, of another."""
    found = re.search(r"(\d{2})(\d{2})(\d{4})$", path.stem)
    return (found[3], found[1], found[2]) if found else ()


def _slides_of(meta: Path, organ: str) -> tuple[str, ...]:
    import pandas as pd

    wanted = {"species": "human", "tech": TECHNOLOGY.lower(), "involve_cancer": "true", "tissue": organ.lower()}
    try:
        table = pd.read_csv(meta, usecols=["slide", *wanted], dtype=str, encoding_errors="replace")
    except (OSError, ValueError) as error:
        raise InputError(f"{meta}: cannot be read ({first_line(error)})") from error
    fits = np.logical_and.reduce([table[name].str.strip().str.lower() == value for name, value in wanted.items()])
    names = tuple(sorted(table["slide"][fits]))
    if len(names) < 3:
        raise InputError(f"{meta}: names {len(names)} human {TECHNOLOGY} cancer slides of {organ}; a split needs three")
    return names


def variable_genes(paths: Sequence[Path], n: int) -> tuple[str, ...]:
    """The ``n`` genes of the highest variance of log1p counts over all spots of tables of counts, among those that
    stand once in each of them; highest first, ties by name.

    Raises:
        InputError: a table that cannot be read, or fewer shared genes.
    """
    once = [{name for name, times in Counter(read_header(path)).items() if times == 1} for path in paths]
    shared = sorted(set.intersection(*once))
    if len(shared) < n:
        raise InputError(f"{paths[0].parent}: {len(paths)} slides share {len(shared)} genes, fewer than {n}")
    total, squares, spots = np.zeros(len(shared)), np.zeros(len(shared)), 0
    for path in paths:
        _, genes, counts = read_counts(path)
        column = {name: index for index, name in enumerate(genes)}
        logged = counts.log1p()[:, [column[name] for name in shared]]
        total += np.asarray(logged.sum(axis=0, dtype=np.float64)).ravel()
        squares += np.asarray(logged.power(2).sum(axis=0, dtype=np.float64)).ravel()
        spots += logged.shape[0]
    variance = squares / spots - (total / spots) ** 2
    return tuple(shared[index] for index in np.argsort(-variance, kind="stable")[:n])
