"""HEST-bench task folders with STFlow embeddings."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from ..errors import InputError, first_line
from ..files import read_json
from .anndata_file import count_notes, counts_of, open_h5ad, pixel_size_of, read_h5ad, spatial_of
from .slide import Slide

BARCODE_KEYS = ("barcodes", "barcode")


@dataclass(frozen=True)
class Fold:
    """Slide ids of one split; ``val`` is empty where the folder has no val_{k}.csv."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()


class _PatchSizes(NamedTuple):
    half_patch: float | None  # level-0 pixels from the corner to the centre
    micron_per_pixel: float | None

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> _PatchSizes:
        size, pixel = (float(attributes.get(key, 0)) for key in ("patch_size_src", "pixel_size"))
        return cls(size / 2 or None, pixel or None)


@dataclass(frozen=True)
class _Embeddings:
    features: np.ndarray  # [N, F] float32
    corners: np.ndarray  # [N, 2] float64, top-left of the patches
    barcodes: np.ndarray  # [N] str
    sizes: _PatchSizes


def read_embeddings(path: str | Path, patches: str | Path | None = None) -> Slide:
    """Read a slide without expression from a STFlow embeddings file: ``embeddings``, ``coords``, ``barcodes``.

    Coordinates in the file are the top-left corners of the patches; the centre is taken where the file says how large
    a patch is (``coords.attrs["patch_size_src"]``), or HEST's file of the slide's patches does. Elsewhere they stay
    corners, and a note says so.

    Args:
        path: ``.../embeddings/{encoder}/fp32/{slide}.h5``, or anywhere.
        patches: HEST's ``patches/{slide}.h5``; looked for beside ``embeddings/`` when None.

    Raises:
        InputError: a missing, unreadable or truncated file, missing keys, or what Slide refuses.
    """
    path = Path(path)
    found = _open_embeddings(path)
    above = path.resolve().parents
    if patches is None and len(above) > 3:
        patches = above[3] / "patches" / path.name
    beside = _patch_sizes(Path(patches)) if patches and Path(patches).is_file() else _PatchSizes(None, None)
    half_patch = found.sizes.half_patch or beside.half_patch
    notes = () if half_patch else ("coordinates stay top-left corners of patches: no file says how large a patch is",)
    return Slide(
        path.stem,
        found.features,
        found.corners + (half_patch or 0.0),
        found.barcodes,
        micron_per_pixel=found.sizes.micron_per_pixel or beside.micron_per_pixel,
        notes=notes,
    )


def _patch_sizes(patches: Path) -> _PatchSizes:
    """What HEST's ``patches/{id}.h5`` says of its patches."""
    try:
        with h5py.File(patches, "r") as file:
            return _PatchSizes.of(dict(file["coords"].attrs) if "coords" in file else {})
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{patches}: is not readable HDF5, or is truncated ({first_line(error)})") from error


def read_slide(path: str | Path, features_key: str = "features", expression: bool = True) -> Slide:
    """Read one file: ``.h5ad`` (:func:`read_h5ad`) or ``.h5`` (:func:`read_embeddings`, never with expression).

    Raises:
        InputError: another suffix, or as the reader.
    """
    path = Path(path)
    if path.suffix.lower() == ".h5ad":
        return read_h5ad(path, features_key, expression)
    if path.suffix.lower() in (".h5", ".hdf5"):
        return read_embeddings(path)
    raise InputError(f"{path}: is neither .h5ad (AnnData) nor .h5 (embeddings)")


def _open_embeddings(path: Path) -> _Embeddings:
    if not path.is_file():
        raise InputError(f"{path}: does not exist")
    try:
        with h5py.File(path, "r") as file:
            barcode_key = next((key for key in BARCODE_KEYS if key in file), BARCODE_KEYS[0])
            missing = [key for key in ("embeddings", "coords", barcode_key) if key not in file]
            if missing:
                raise InputError(f"{path}: has no '{missing[0]}'; it has {', '.join(sorted(file)) or 'nothing'}")
            attributes = dict(file["coords"].attrs)
            features, corners = file["embeddings"][()], file["coords"][()]
            barcodes = file[barcode_key][()]
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: is not readable HDF5, or is truncated ({first_line(error)})") from error
    except TypeError as error:  # a group in place of a table
        raise InputError(f"{path}: embeddings, coords and {barcode_key} must be tables, not groups") from error
    try:
        barcodes = _as_text(barcodes)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {barcode_key} are not UTF-8 text ({first_line(error)})") from error
    try:
        features, corners = np.asarray(features, dtype=np.float32), np.asarray(corners, dtype=np.float64)
        sizes = _PatchSizes.of(attributes)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: embeddings or coords are not numbers") from error
    if features.ndim != 2 or corners.ndim != 2 or not len(features) == len(corners) == len(barcodes):
        shapes = f"{list(features.shape)}, {list(corners.shape)} and {len(barcodes)}"
        raise InputError(f"{path}: embeddings, coords and {barcode_key} disagree in size ({shapes})")
    return _Embeddings(features, corners, barcodes, sizes)


def _as_text(values: np.ndarray) -> np.ndarray:
    """Barcodes as text [N], from bytes or text, fixed or variable length, [N] or [N, 1]."""
    flat = np.asarray(values).reshape(-1)
    return np.array([value.decode() if isinstance(value, bytes) else str(value) for value in flat], dtype=np.str_)


@dataclass(frozen=True)
class HestTask:
    """A HEST-bench task folder: ``splits/``, ``adata/``, gene lists, and embeddings of one encoder.

    Attributes:
        root: the folder.
        encoder: name of the embeddings' folder.
        embeddings: where the encoders' folders are, if not in ``root/embeddings``.

    Raises:
        InputError: a missing folder, or no such encoder.
    """

    root: str | Path
    encoder: str
    embeddings: str | Path | None = None

    def __post_init__(self) -> None:
        root = Path(self.root)
        if not root.is_dir():
            raise InputError(f"{root}: is not a folder; give a HEST-bench task folder")
        if not (root / "splits").is_dir():
            raise InputError(f"{root}: has no splits/ folder, so it is not a HEST-bench task folder")
        if not self.embeddings_folder.is_dir():
            base = self._embeddings_base
            known = ", ".join(sorted(path.parent.name for path in base.glob("*/fp32"))) if base.is_dir() else ""
            raise InputError(f"{self.embeddings_folder}: no such folder; encoders in {base}: {known or 'none'}")

    @property
    def _embeddings_base(self) -> Path:
        base = Path(self.embeddings) if self.embeddings else Path(self.root) / "embeddings"
        # STFlow's own layout has the task's name in between.
        task = Path(self.root).resolve().name
        return base / task if (base / task / self.encoder).is_dir() else base

    @property
    def embeddings_folder(self) -> Path:
        """``{embeddings}/{encoder}/fp32``, or with the task's name in front of the encoder's."""
        return self._embeddings_base / self.encoder / "fp32"

    def folds(self) -> list[int]:
        """Numbers of the splits."""
        numbers = (path.stem.removeprefix("train_") for path in (Path(self.root) / "splits").glob("train_*.csv"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def fold(self, number: int) -> Fold:
        """One split.

        Raises:
            InputError: no such split, a broken file, or a slide on both sides of it.
        """
        if number not in self.folds():
            known = ", ".join(map(str, self.folds())) or "none"
            raise InputError(f"fold: {number} is not in {Path(self.root) / 'splits'}; there are {known}")
        val = self._split("val", number) if (Path(self.root) / "splits" / f"val_{number}.csv").exists() else ()
        fold = Fold(self._split("train", number), self._split("test", number), val)
        shared = set(fold.train) & set(fold.test) | set(fold.val) & {*fold.train, *fold.test}
        if shared:
            raise InputError(
                f"{Path(self.root) / 'splits'}: fold {number} has {', '.join(sorted(shared))} on two sides; remove one"
            )
        return fold

    def _split(self, side: str, number: int) -> tuple[str, ...]:
        path = Path(self.root) / "splits" / f"{side}_{number}.csv"
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets leave a mark in front
                table = csv.DictReader(file)
                names = [(row.get("sample_id") or "").strip() for row in table]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
        if "sample_id" not in (table.fieldnames or ()):
            raise InputError(f"{path}: has no column sample_id; it has {', '.join(table.fieldnames or ['nothing'])}")
        if not names or "" in names:
            raise InputError(f"{path}: names no slide" + (f" in row {names.index('') + 2}" if names else ""))
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"{path}: names {', '.join(twice)} twice; remove one")
        return tuple(names)

    def genes(self, name: str = "var_50genes.json") -> tuple[str, ...]:
        """A gene list of the folder: a file with ``{"genes": [...]}``.

        Raises:
            InputError: no such file, another content, or a gene listed twice.
        """
        path = Path(self.root) / name
        if not path.is_file():
            known = ", ".join(sorted(file.name for file in Path(self.root).glob("*.json"))) or "none"
            raise InputError(f"{path}: does not exist; .json files there: {known}")
        content = read_json(path)
        genes = content.get("genes") if isinstance(content, dict) else None
        if not isinstance(genes, list) or not genes or not all(isinstance(gene, str) for gene in genes):
            raise InputError(f'{path}: must hold {{"genes": [names]}}')
        twice = sorted({gene for gene in genes if genes.count(gene) > 1})
        if twice:
            raise InputError(f"{path}: lists {twice[0]} twice; remove one")
        return tuple(genes)

    def slide(self, sample_id: str, expression: bool = True) -> Slide:
        """One slide, embeddings and expression matched by the name of the barcode.

        Args:
            sample_id: name of the files, without suffix.
            expression: read ``adata/{sample_id}.h5ad`` too; its ``obsm["spatial"]`` then gives the coordinates.

        Raises:
            InputError: missing or broken files, no barcode in common, or what Slide refuses.
        """
        embedded_path = self.embeddings_folder / f"{sample_id}.h5"
        if not expression:
            return read_embeddings(embedded_path, Path(self.root) / "patches" / f"{sample_id}.h5")
        embedded = _open_embeddings(embedded_path)
        path = Path(self.root) / "adata" / f"{sample_id}.h5ad"
        table = open_h5ad(path)
        names = table.obs_names.to_numpy(dtype=str)
        for file, barcodes in ((embedded_path, embedded.barcodes), (path, names)):
            repeated = len(barcodes) - len(np.unique(barcodes))
            if repeated:
                raise InputError(f"{file}: {repeated} duplicated barcodes; make them unique")
            if not len(barcodes):
                raise InputError(f"{file}: has no spots")
        _, of_embedding, of_table = np.intersect1d(embedded.barcodes, names, return_indices=True)
        if not len(of_embedding):
            example = f"{embedded.barcodes[0]} and {names[0]}"
            raise InputError(f"{embedded_path}: no barcode in common with {path} (they look like {example})")
        in_file_order = np.argsort(of_embedding)
        of_embedding, of_table = of_embedding[in_file_order], of_table[in_file_order]
        counts = counts_of(table, path)
        return Slide(
            id=sample_id,
            features=embedded.features[of_embedding],
            coords=spatial_of(table, path)[of_table],
            barcodes=embedded.barcodes[of_embedding],
            counts=None if counts is None else counts[of_table],
            gene_names=() if counts is None else tuple(table.var_names.astype(str)),
            micron_per_pixel=pixel_size_of(table) or embedded.sizes.micron_per_pixel,
            notes=(*_unmatched(len(embedded.barcodes), len(names), len(of_embedding)), *count_notes(counts)),
        )


def _unmatched(n_embedded: int, n_expressed: int, n_common: int) -> tuple[str, ...]:
    notes = []
    if n_common < n_embedded:
        notes.append(f"{n_embedded - n_common} of {n_embedded} embeddings have no expression and are left out")
    if n_common < n_expressed:
        notes.append(
            f"{n_expressed - n_common} of {n_expressed} spots with expression have no embedding and are left out"
        )
    return tuple(notes)
