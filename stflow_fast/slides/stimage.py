"""STImage-1K4M: folders of one technology with places and counts in CSV, and the splits of STImage-Bench.

Chen et al., NeurIPS 2024 Datasets and Benchmarks, huggingface.co/datasets/jiawennnn/STimage-1K4M; the benchmark is
Huang et al., ICML 2025 (arXiv 2506.05361), appendix.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse

from ..errors import InputError, first_line
from .genes import find_genes
from .hest import Fold, find_embeddings
from .match import common, with_features
from .options import ReadOptions
from .places import SeveralSections
from .slide import Origin, Slide
from .stores import guarded

if TYPE_CHECKING:
    import pandas as pd

COORD_SUFFIX, COUNT_SUFFIX, IMAGE_SUFFIX = "_coord.csv", "_count.csv", ".png"
STARTS = (b",yaxis,", b",xaxis,", b'"","yax', b'"","xax')
"""How a file of places begins."""

ORGANS = ("Breast", "Brain", "Skin", "Mouth", "Stomach", "Prostate", "Colon")
TECHNOLOGY = "Visium"
N_GENES = 50
SEEDS = (0, 1, 2)
HELD_OUT = 0.1
"""Of the slides of an organ: this share each for validation and for test."""

GENE_LIST = "var_50genes.json"

NO_NUMBER = ("", "NA", "NaN", "nan")
"""How tables leave out a number."""


class _Files(NamedTuple):
    """Of one slide in the folder of a technology."""

    slide: str
    coord: Path
    counts: Path
    image: Path


def _files(folder: Path, slide: str) -> _Files:
    return _Files(
        slide,
        folder / "coord" / f"{slide}{COORD_SUFFIX}",
        folder / "gene_exp" / f"{slide}{COUNT_SUFFIX}",
        folder / "image" / f"{slide}{IMAGE_SUFFIX}",
    )


def sections_of(path: Path, options: ReadOptions) -> tuple[str, ...]:
    """The slides of a folder of one technology, or the one of a file of places.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return (path.stem.removesuffix(COORD_SUFFIX.removesuffix(".csv")),)
    names = sorted(file.name.removesuffix(COORD_SUFFIX) for file in (path / "coord").glob(f"*{COORD_SUFFIX}"))
    if not names:
        raise InputError(f"{path / 'coord'}: has no file *{COORD_SUFFIX}; give the folder ST, Visium or VisiumHD")
    return tuple(names)


def read_stimage(path: Path, options: ReadOptions) -> Slide:
    """Read a slide of STImage-1K4M, which holds no features.

    Coordinates are the spots' centres in pixels of the image that is shipped, the spot diameter is twice its radius
    ``r``. With ``options.expression`` the counts are read too; spots that have none, or no place, are left out. A slide
    without a file of counts has no expression. With ``options.gene_names`` alone, only the names of its genes are read.

    Args:
        path: the folder of one technology, or the file ``coord/{slide}_coord.csv`` in it.
        options: ``section`` is the slide, where the folder has several.

    Raises:
        InputError: features are required, no such slide, files that cannot be read, or what Slide refuses.
    """
    files = _files(path.absolute().parents[1] if path.is_file() else path, _chosen(path, options))
    if path.is_file():
        files = files._replace(coord=path)
    if options.require_features:
        raise InputError(f"{path}: STImage-1K4M has no features; give those of {files.slide}: --embeddings FOLDER")
    places = _read_places(files.coord)
    counts, genes, notes = None, (), ()
    if options.expression and files.counts.is_file():
        counted, genes, counts = read_counts(files.counts)
        places, counts, notes = _matched(files, places, counted, counts)
    elif options.gene_names and files.counts.is_file():
        genes = read_header(files.counts)
    diameter = 2 * float(places["r"].median()) if "r" in places else 0.0
    return Slide(
        files.slide,
        None,
        places[["xaxis", "yaxis"]].to_numpy(),
        places.index.to_numpy(dtype=np.str_),
        counts,
        genes,
        notes=notes,
        origin=Origin(
            files.coord,
            "stimage",
            image_size=_image_size(files.image),
            scalefactors={"spot_diameter_fullres": diameter} if 0 < diameter < np.inf else {},
        ),
    )


def _chosen(path: Path, options: ReadOptions) -> str:
    names = sections_of(path, options)
    if options.section is None and len(names) > 1:
        raise SeveralSections(f"{path}: has {len(names)} slides ({', '.join(names[:3])}, ...); choose one as section")
    name = options.section or names[0]
    if name not in names:
        raise InputError(f"{path}: has no slide {name!r}; it has {len(names)}, such as {', '.join(names[:3])}")
    return name


def _read_places(path: Path) -> pd.DataFrame:
    """Columns xaxis, yaxis (and r) as numbers, by barcode, which stays text whatever it looks like: 001, NA."""
    import pandas as pd

    try:
        lines = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)  # dtype is not of an index_col
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    names, lines = lines.iloc[0].tolist(), lines.iloc[1:].set_index(0)
    missing = [name for name in ("xaxis", "yaxis") if name not in names[1:]]
    if missing:
        known = ", ".join(names[1:]) or "none"
        raise InputError(f"{path}: has no column {' and no '.join(missing)}; its columns: {known}")
    if lines.empty:
        raise InputError(f"{path}: has no spots; copy it again")
    _check_end(path, len(names))
    places = pd.DataFrame({name: _numbers(path, name, lines[names.index(name)]) for name in ("xaxis", "yaxis")})
    return places.assign(r=pd.to_numeric(lines[names.index("r")], errors="coerce")) if "r" in names[1:] else places


def _check_end(path: Path, n_columns: int) -> None:
    """Raise InputError where the last row is short: the rest of the file is missing."""
    last = path.read_bytes().rstrip().rpartition(b"\n")[2]
    found = last.count(b",") + 1  # at least: barcodes may have some
    if found < n_columns:
        raise InputError(f"{path}: its last row has {found} of {n_columns} columns; copy it again")


def _numbers(path: Path, name: str, column: pd.Series) -> pd.Series:
    try:
        return column.mask(column.isin(NO_NUMBER)).astype(np.float64)
    except ValueError as error:
        raise InputError(f"{path}: {name} is not a column of numbers ({first_line(error)})") from error


def _matched(
    files: _Files, places: pd.DataFrame, counted: np.ndarray, counts: scipy.sparse.csr_matrix
) -> tuple[pd.DataFrame, scipy.sparse.csr_matrix, tuple[str, ...]]:
    """The spots that have both, in the order of their places, and notes on the others."""
    of_places, of_counts = common(str(files.coord), places.index.to_numpy(dtype=np.str_), str(files.counts), counted)
    notes = []
    if len(of_places) < len(places):
        notes.append(f"{len(places) - len(of_places)} of {len(places)} spots have no counts and are left out")
    if len(of_counts) < len(counted):
        placeless = len(counted) - len(of_counts)
        notes.append(f"{placeless} of {len(counted)} spots with counts have no place and are left out")
    return places.iloc[of_places], counts[of_counts], tuple(notes)


def read_counts(path: Path) -> tuple[np.ndarray, tuple[str, ...], scipy.sparse.csr_matrix]:
    """A table of counts in CSV, one line a spot, without ever holding it dense.

    Returns:
        Barcodes [N], genes, and counts [N, G] float32.

    Raises:
        InputError: it cannot be read, or a line has another length than the first or something that is no number.
    """
    genes = read_header(path)
    barcodes, columns, values, ends = [], [], [], [0]
    for number, line in enumerate(_lines(path), start=1):
        if number == 1 or not line.strip():
            continue
        try:
            barcode, numbers = _barcode_and_counts(line.rstrip(b"\r\n"))
            size, where, found = _nonzero(numbers)
            barcodes.append(barcode)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not a barcode and counts ({first_line(error)})") from error
        if size != len(genes):
            raise InputError(f"{path}: line {number} has {size} counts for {len(genes)} genes; copy the file again")
        columns.append(where)
        values.append(found)
        ends.append(ends[-1] + len(where))
    if not barcodes:
        raise InputError(f"{path}: has no spots; copy it again")
    parts = np.concatenate(values), np.concatenate(columns), ends
    counts = scipy.sparse.csr_matrix(parts, shape=(len(barcodes), len(genes)))
    return np.array(barcodes, dtype=np.str_), genes, counts


def read_header(path: Path) -> tuple[str, ...]:
    """Names of the genes of a table of counts.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    line = next(_lines(path), b"")
    try:
        names = next(csv.reader([line.decode("utf-8-sig")]), [])[1:]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: does not begin with names of genes ({first_line(error)})") from error
    if not names:
        raise InputError(f"{path}: does not begin with names of genes; copy the file again")
    return tuple(names)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


def _barcode_and_counts(line: bytes) -> tuple[str, bytes]:
    """The barcode, and the text of the counts, of a line in which either may be in quotes."""
    quoted = line.startswith(b'"')
    barcode, _, counts = line[1:].partition(b'",') if quoted else line.partition(b",")
    return barcode.decode().replace('""', '"') if quoted else barcode.decode(), counts.replace(b'"', b"")


def _nonzero(text: bytes) -> tuple[int, np.ndarray, np.ndarray]:
    """How many numbers there are between commas; places and values of those that are not "0".

    Nine of ten counts are, so only the others are parsed: 1.7 s for 54 million, where numpy.fromstring takes 5 s and
    pandas, whose cost is in 36,000 columns, 24 s (100 s where it is told that they are float32).

    Raises:
        ValueError: one is no number.
    """
    codes = np.frombuffer(text + b",", dtype=np.uint8)
    ends = np.flatnonzero(codes == ord(","))
    starts = np.concatenate([[0], ends[:-1] + 1])
    where = np.flatnonzero((ends - starts != 1) | (codes[starts] != ord("0")))
    found = [text[start:end] for start, end in zip(starts[where].tolist(), ends[where].tolist(), strict=True)]
    return len(ends), where.astype(np.int32), np.array(found, dtype=np.bytes_).astype(np.float32)


def _image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image that is called .png and is JPEG, TIFF or PNG; None where there is none.

    Nothing is decoded. ``PIL.Image.open`` would refuse the large ones, unless a global limit is lifted for all.
    """
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile
    from PIL.TiffImagePlugin import TiffImageFile

    for kind in (PngImageFile, JpegImageFile, TiffImageFile):
        try:
            with kind(path) as image:
                return image.size
        except Exception:  # SyntaxError is PIL's word for another kind of file; what is broken raises anything
            continue
    return None


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
        needed = [path for name in self.slides for path in _files(self._folder, name)[1:3]]
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
        return variable_genes([_files(self._folder, name).counts for name in self.slides], N_GENES)

    def slide(self, sample_id: str, expression: bool = True) -> Slide:
        """One slide, its spots matched to the embeddings by barcode.

        Args:
            sample_id: name of the slide.
            expression: read its counts too; features are read into memory then.

        Raises:
            InputError: missing or broken files, no barcode in common, or what Slide refuses.
        """
        options = ReadOptions(section=sample_id, expression=expression, require_features=False)
        places = _files(self._folder, sample_id).coord
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
