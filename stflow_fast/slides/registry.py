"""The one registry of readers: a path to its format, by content, and to slides."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from ..errors import InputError
from . import anndata_file, embeddings, spatialdata_store, stimage, wsidata_store
from .match import with_features
from .options import ReadOptions, section_id
from .slide import Slide
from .stores import HDF5_MAGIC, ZARR_MARKS, attributes_of, guarded, is_array, is_zarr, magic, opened, part_of


class Glance(NamedTuple):
    """What a look at a path shows before anything of it is read.

    Attributes:
        kind: "hdf5", "zarr", "folder" or "file".
        tables, groups: names at the root of a store, or of files and folders in a folder; of what is in a zip.
        attributes: of the root.
        marks: attributes of the store's ``coords``.
        start: the first bytes of a file.
    """

    kind: str
    tables: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    attributes: dict[str, Any] = {}  # noqa: RUF012
    marks: dict[str, Any] = {}  # noqa: RUF012
    start: bytes = b""

    def has(self, *names: str) -> bool:
        return all(name in self.tables or name in self.groups for name in names)


KEYS = ("features_key", "spatial_key", "library_key", "gene_key", "coordinate_system", "table")
"""Options that say where things are, which not every format has."""


class Format(NamedTuple):
    """A kind of file that slides are read from.

    Attributes:
        title: what people call it.
        fits: whether a path is of it.
        read: path and options to the slide, or to the section that the options name.
        sections: names of what is read as slides of their own; none where the path is one slide.
        named: whether these names are ids by themselves; else the path's name stands before them.
        options: which of :data:`KEYS` are looked at.
    """

    title: str
    fits: Callable[[Glance], bool]
    read: Callable[[Path, ReadOptions], Slide]
    sections: Callable[[Path, ReadOptions], tuple[str, ...]] = lambda path, options: ()
    named: bool = False
    options: tuple[str, ...] = ("features_key",)


def _features_of(name: str) -> Callable[[Path, ReadOptions], Slide]:
    return lambda path, options: embeddings.read_embeddings(path, options=options, format=name)


def _is_spatialdata(glance: Glance) -> bool:
    return glance.kind == "zarr" and (glance.has("tables") or spatialdata_store.ATTRIBUTES in glance.attributes)


def _is_anndata(glance: Glance) -> bool:
    return glance.attributes.get("encoding-type") == "anndata" or (
        glance.has("obs") and (glance.has("X") or glance.has("obsm") or glance.has("var"))
    )


FORMATS: dict[str, Format] = {
    "wsidata": Format(
        "wsidata or LazySlide",
        lambda glance: _is_spatialdata(glance) and any(mark in glance.attributes for mark in wsidata_store.MARKS),
        wsidata_store.read_wsidata,
    ),
    "spatialdata": Format(
        "SpatialData",
        _is_spatialdata,
        spatialdata_store.read_spatialdata,
        spatialdata_store.sections_of,
        options=KEYS,
    ),
    "stimage": Format(
        "STImage-1K4M",
        lambda glance: (glance.kind == "folder" and glance.has("coord")) or glance.start.startswith(stimage.STARTS),
        stimage.read_stimage,
        stimage.sections_of,
        named=True,
        options=(),
    ),
    "anndata": Format(
        "AnnData",
        _is_anndata,
        anndata_file.read_anndata,
        anndata_file.sections_of,
        options=("features_key", "spatial_key", "library_key", "gene_key"),
    ),
    "embeddings": Format(
        "STFlow or HEST-bench embeddings", lambda glance: glance.has("embeddings", "coords"), _features_of("embeddings")
    ),
    "trident": Format(
        "TRIDENT features",
        lambda glance: glance.has("features", "coords") and bool(glance.marks),
        _features_of("trident"),
    ),
    "clam": Format("CLAM features", lambda glance: glance.has("features", "coords"), _features_of("clam")),
}
"""Formats by the name that ``--format`` takes; the first that fits is it."""


class _Useless(NamedTuple):
    fits: Callable[[Glance], bool]
    what: str


_ZIP, _PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_USELESS = (
    _Useless(
        lambda glance: glance.start.startswith(_PICKLES) or any(name.endswith("data.pkl") for name in glance.tables),
        "holds features without coordinates (.pt of CLAM or TRIDENT), or a checkpoint; give the .h5 of the same slides",
    ),
    _Useless(
        lambda glance: glance.start.startswith(_ZIP) and bool(glance.tables & {*ZARR_MARKS, ".zmetadata"}),
        "is a zarr store in a zip; unpack it, and give the folder",
    ),
    _Useless(
        lambda glance: glance.start.startswith(_ZIP),
        "is a zip or a NumPy archive; give what it holds as .h5 or .h5ad, with features and places",
    ),
    _Useless(
        lambda glance: glance.start.startswith(b"\x93NUMPY"),
        "is a NumPy array, without places; give an .h5 with features and coords",
    ),
    _Useless(lambda glance: glance.start.startswith(b"\x1f\x8b"), "is packed with gzip; unpack it: gunzip"),
    _Useless(
        lambda glance: glance.kind == "folder" and glance.has("config.json", "model.safetensors"),
        "is a model; give it first, and then slides",
    ),
    _Useless(
        lambda glance: glance.has("img", "coords"),
        "holds images of patches and no features; make them: stflow-fast embed",
    ),
    _Useless(
        lambda glance: glance.kind == "hdf5" and glance.has("coords"),
        "holds places of patches and no features; give the features' file of the same slide",
    ),
    _Useless(
        lambda glance: glance.kind == "hdf5" and glance.has("matrix"),
        "is a count matrix of 10x without places or features; make an .h5ad with obsm['spatial'] and features of it",
    ),
    _Useless(
        lambda glance: glance.kind == "folder" and glance.has("splits"),
        "is a HEST-bench task folder; give the files in its embeddings/ (train and evaluate take the folder)",
    ),
    _Useless(
        lambda glance: glance.kind == "folder" and (glance.has("Visium") or glance.has("ST")),
        "is the folder of all of STImage-1K4M; give its ST, Visium or VisiumHD",
    ),
    _Useless(
        lambda glance: glance.start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\xff\xd8\xff", b"\x89PNG")),
        "is an image; give features of its patches (of TRIDENT, CLAM, or stflow-fast embed)",
    ),
)
"""What people give in place of features, and what to give."""


def look(path: Path) -> Glance:
    """Raises InputError for what is missing, empty, locked or truncated."""
    if path.is_dir() and not is_zarr(path):
        entries = list(path.iterdir())
        folders = frozenset(entry.name for entry in entries if entry.is_dir())
        return Glance("folder", frozenset(entry.name for entry in entries) - folders, folders)
    if path.is_dir():
        with opened(path) as store:
            return _look_into("zarr", store)
    start = magic(path)
    if start.startswith(_ZIP) and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return Glance("file", frozenset(archive.namelist()), start=start)
    if not start.startswith(HDF5_MAGIC) and not h5py.is_hdf5(path):
        return Glance("file", start=start)
    with opened(path) as store:
        return _look_into("hdf5", store)


def _look_into(kind: str, store: Any) -> Glance:
    parts = {name: part_of(store, name) for name in store.keys()}  # noqa: SIM118
    tables = frozenset(name for name, part in parts.items() if is_array(part))
    groups = frozenset(name for name, part in parts.items() if part is not None) - tables
    coords = attributes_of(parts["coords"]) if "coords" in tables else {}
    return Glance(kind, tables, groups, attributes_of(store), coords)


def recognise(path: str | Path) -> str:
    """The format of a path by its content: a name of :data:`FORMATS`.

    Raises:
        InputError: a path that cannot be read, or of no format, with what to give instead.
    """
    path = Path(path)
    glance = look(path)
    for name, known in FORMATS.items():
        if known.fits(glance):
            return name
    for useless in _USELESS:
        if useless.fits(glance):
            raise InputError(f"{path}: {useless.what}")
    if glance.kind == "file" and path.suffix.lower() in (".h5", ".h5ad", ".hdf5"):
        raise InputError(
            f"{path}: is not readable HDF5, or is truncated: it does not begin as such a file does; copy it again"
        )
    if glance.kind == "folder":
        raise InputError(f"{path}: is a folder, and of no format itself; give the files in it, or --search-nested")
    found = ", ".join(sorted(glance.tables | glance.groups))
    titles = ", ".join(each.title for each in FORMATS.values())
    raise InputError(f"{path}: is of no format that is known ({titles}); it has {found or 'nothing of them'}")


def _format(path: Path, options: ReadOptions) -> str:
    """The name of the format that the options name, or that the content tells.

    Raises:
        InputError: an unknown name, or as :func:`recognise`.
    """
    name = options.format or recognise(path)
    if name not in FORMATS:
        raise InputError(f"format: must be one of {', '.join(FORMATS)}, not {name!r}")
    return name


class SlideSource(NamedTuple):
    """A slide that can be read, and how.

    Attributes:
        id: of the slide.
        path, options: what :func:`read` takes.
    """

    id: str
    path: Path
    options: ReadOptions

    def read(self) -> Slide:
        """Raises InputError as :func:`read`."""
        return read(self.path, self.options)


def sources(path: str | Path, options: ReadOptions | None = None) -> list[SlideSource]:
    """The slides of a path: its sections where it has several, else itself. Only names are read.

    Raises:
        InputError: as :func:`recognise`; a ``library_key`` that is not there.
    """
    place, asked = Path(path), options or ReadOptions()
    format = guarded(place, lambda: _format(place, asked))
    known, told = FORMATS[format], dataclasses.replace(asked, format=format)  # reading need not look again
    names = () if told.section else guarded(place, lambda: known.sections(place, told))
    if not names:
        name = told.section or ""
        return [SlideSource(_id(place, known, name), place, told)]
    chosen = [(_id(place, known, name), dataclasses.replace(told, section=name)) for name in names]
    return [SlideSource(name, place, each) for name, each in chosen]


def _id(path: Path, known: Format, section: str) -> str:
    if not section:
        return path.stem
    return section if known.named else section_id(path.stem, section)


def read(path: str | Path, options: ReadOptions | None = None) -> Slide:
    """Read a slide, of whatever format.

    Args:
        path: a file, or the folder of a store.
        options: how; see :class:`ReadOptions`.

    Raises:
        InputError: whatever is wrong with it, in one line, with the path.
    """
    place, asked = Path(path), options or ReadOptions()
    bare = asked if asked.embeddings is None else dataclasses.replace(asked, require_features=False)

    def work() -> Slide:
        known = FORMATS[_format(place, asked)]
        slide = known.read(place, bare)
        if notes := _passed_by(known, asked):
            slide = dataclasses.replace(slide, notes=(*slide.notes, *notes))
        return slide if asked.embeddings is None else with_features(slide, asked.embeddings)

    return guarded(place, work)


def _passed_by(known: Format, options: ReadOptions) -> tuple[str, ...]:
    """A note for each option that was given and that the format does not have."""
    given = [name for name in KEYS if getattr(options, name) != getattr(ReadOptions, name)]
    return tuple(
        f"--{name.replace('_', '-')} is nothing that {known.title} has, and was not looked at"
        for name in given
        if name not in known.options
    )
