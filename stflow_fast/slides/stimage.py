"""STImage-1K4M: folders of one technology with places and counts in CSV.

Chen et al., NeurIPS 2024 Datasets and Benchmarks, huggingface.co/datasets/jiawennnn/STimage-1K4M.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse

from ..errors import InputError, first_line
from .match import common
from .options import ReadOptions
from .places import SeveralSections
from .slide import Origin, Slide

if TYPE_CHECKING:
    import pandas as pd

COORD_SUFFIX, COUNT_SUFFIX, IMAGE_SUFFIX = "_coord.csv", "_count.csv", ".png"
STARTS = (b",yaxis,", b",xaxis,", b'"","yax', b'"","xax')
"""How a file of places begins."""

NO_NUMBER = ("", "NA", "NaN", "nan")
"""How tables leave out a number."""


class SlideFiles(NamedTuple):
    """Of one slide in the folder of a technology."""

    slide: str
    coord: Path
    counts: Path
    image: Path


def files_of(folder: Path, slide: str) -> SlideFiles:
    return SlideFiles(
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
    files = files_of(path.absolute().parents[1] if path.is_file() else path, _chosen(path, options))
    if path.is_file():
        files = files._replace(coord=path)
    if options.require_features:
        raise InputError(f"{path}: STImage-1K4M has no features; give those of {files.slide}: --embeddings FOLDER")
    places = _read_places(files.coord)
    counts = None
    genes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
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
    files: SlideFiles, places: pd.DataFrame, counted: np.ndarray, counts: scipy.sparse.csr_matrix
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
