"""From patches to embeddings: HEST's ``patches/{id}.h5`` through a patch encoder into the files that STFlow reads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ._version import __version__
from .encoders import Encoder, load_encoder, short_name
from .errors import InputError, OutputError, batch_error
from .files import atomic_hdf5, is_same_file
from .slides.embeddings import BARCODE_KEYS
from .slides.patches import patch_size_of, read_patch_size
from .slides.stores import is_array, names_in, opened
from .threads import blocks_of, in_turn

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the encoder's matrix products and convolutions; the last two by autocast."""

DTYPES = ("float32", "float16")

AHEAD = 2
"""Batches that are read and decompressed while one is computed."""

CPU_BLOCK = 4
"""Patches that a thread of the CPU takes at a time. On one core of an AMD EPYC efficientnet_lite0 embeds 51 in a second
so, and 17 where it takes 64: what is in between layers stays in its cache."""

DECIDES = ("weights", "preprocessing", "precision", "dtype", "patches")
"""Attributes of what is written that must agree for ``resume`` to keep it."""

LOOKED_AT = 16
"""Images of a slide, evenly chosen, that its patches are known by."""


def embed(
    patches: str | Path | Iterable[str | Path],
    encoder: str | Encoder,
    out: str | Path | None = None,
    *,
    name: str | None = None,
    batch_size: int = 64,
    precision: str = "float32",
    dtype: str = "float32",
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    on_patches: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Embed the patches of slides and write one ``{out}/{name}/fp32/{slide}.h5`` each, in STFlow's layout.

    A file has ``embeddings`` [N, F] in the order of the patches; ``coords`` [N, 2], top-left corners in level-0 pixels,
    with the attributes that they have beside the patches (and the size of a patch wherever it is known: centres are
    found by it); ``barcodes`` [N, 1] bytes; and attributes that say what made it, and of which patches: "patches" is a
    SHA-256 of their number, side, size, coordinates, barcodes and some of their images. In a task folder it is what
    ``HestTask(task, name)`` reads.

    Memory holds a few batches of images and the embeddings of one slide. How patches are batched changes no more than
    the rounding of an embedding.

    Args:
        patches: HEST's files (``img`` uint8 [N, side, side, 3] RGB, ``coords``, ``barcode``), or their folders:
            ``patches/``, or the task folder around it.
        encoder: a name, see :mod:`stflow_fast.encoders`, or an encoder.
        out: folder of the embeddings of all encoders; ``embeddings/`` beside ``patches/`` when None.
        name: of this encoder's folder; from the encoder's when None.
        batch_size: patches that are encoded at once.
        precision: one of :data:`PRECISIONS`.
        dtype: of what is written, one of :data:`DTYPES`; the folder is called fp32 all the same.
        device: see :func:`stflow_fast.devices.choose_device`; an encoder that is given stays where it is.
        resume: keep the files that this very call would write again: same encoder, settings and patches.
        overwrite: replace other files.
        on_patches: called with a slide, how many of its patches are done, and how many it has.

    Returns:
        The files, in the order of the slides.

    Raises:
        InputError: a setting out of its range, an encoder that cannot be loaded, files that exist and may not be
            replaced, or a full disk. Bad slides do not stop the good ones: they are reported together, a line each,
            when the others are written.
    """
    _check_settings(batch_size, precision, dtype)
    files = patch_files([patches] if isinstance(patches, str | Path) else patches)
    name = name or (encoder.name if isinstance(encoder, Encoder) else short_name(encoder))
    folder = (_beside_patches(files.values()) if out is None else Path(out)) / name / "fp32"
    targets = {slide: folder / f"{slide}.h5" for slide in files}
    _check_places(files, targets)
    if not (resume or overwrite):
        _check_absent(list(targets.values()))
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder, device)
    embedder = _Embedder(encoder, batch_size, precision, dtype)
    about = embedder.describe(name)
    failed, written = [], []
    for slide, path in files.items():
        target = targets[slide]
        tell = functools.partial(on_patches or _say_nothing, slide)
        try:
            found = _read_patches(path)
            of_slide = {**about, "patches": found.digest}
            if resume and _is_there(target, of_slide, overwrite):
                tell(found.n, found.n)
            else:
                _write(target, embedder.embed(found, tell), found, of_slide)
        except OutputError:
            raise
        except InputError as error:
            failed.append(str(error))
            continue
        written.append(target)
    if failed:
        raise batch_error(failed, len(written), folder)
    return written


def _say_nothing(slide: str, done: int, n: int) -> None:
    """To nobody who asked."""


def _check_settings(batch_size: int, precision: str, dtype: str) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size: must be at least 1, not {batch_size}")
    if precision not in PRECISIONS:
        raise InputError(f"precision: must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if dtype not in DTYPES:
        raise InputError(f"dtype: must be {' or '.join(DTYPES)}, not {dtype!r}")


def patch_files(places: Iterable[str | Path]) -> dict[str, Path]:
    """Files of patches, or of folders of them, by the name of their slide.

    Raises:
        InputError: a folder without any, or two of one name.
    """
    found: dict[str, Path] = {}
    for path in itertools.chain.from_iterable(_files_at(Path(place)) for place in places):
        if path.stem in found:
            raise InputError(f"{path}: {found[path.stem]} is of the same slide; leave one out, each becomes one file")
        found[path.stem] = path
    if not found:
        raise InputError("patches: none are given")
    return found


def _files_at(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    folder = place / "patches" if (place / "patches").is_dir() else place
    files = sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not files:
        raise InputError(f"{folder}: holds no .h5; give files of patches, their folder, or the task folder around it")
    return files


def _beside_patches(files: Iterable[Path]) -> Path:
    """``embeddings/`` of the task folder that all files are of."""
    folders = {path.absolute().parent for path in files}
    if len(folders) > 1 or any(folder.name != "patches" for folder in folders):
        raise InputError("out: must be given where the patches are not those of one task folder (TASK/patches)")
    return folders.pop().parent / "embeddings"


def _check_places(files: Mapping[str, Path], targets: Mapping[str, Path]) -> None:
    for slide, path in files.items():
        if is_same_file(path, targets[slide]):
            raise InputError(f"{path}: its embeddings would take its own place; choose another --out or --name")


def _check_absent(targets: list[Path]) -> None:
    there = [target for target in targets if target.exists()]
    if there:
        raise InputError(
            f"{there[0]}: exists already ({len(there)} of {len(targets)} do); --resume keeps what this call would "
            "write again, --overwrite replaces"
        )


class _Patches(NamedTuple):
    """All of a slide's patches but the images."""

    path: Path
    n: int
    side: int  # pixels of an image
    coords: np.ndarray  # [N, 2]
    attributes: dict[str, Any]  # of the coordinates
    barcodes: np.ndarray  # [N, 1] bytes
    digest: str  # of all that decides what is written, and of some images


def _read_patches(path: Path) -> _Patches:
    with opened(path) as store:
        if "img" not in store:
            raise InputError(f"{path}: holds no images (img), only {names_in(store)}; give patches with their images")
        n, side = _check_images(path, store["img"])
        key = next((key for key in BARCODE_KEYS if key in store), BARCODE_KEYS[-1])
        for needed in ("coords", key):
            if needed not in store:
                raise InputError(f"{path}: has no '{needed}'; it has {names_in(store)}")
        coords, barcodes = store["coords"][()], store[key][()].reshape(-1).tolist()
        attributes = dict(store["coords"].attrs)
        some_images = _some(store["img"])
    if coords.shape != (n, 2) or len(barcodes) != n:
        sizes = f"[{n}, ...], {list(coords.shape)} and [{len(barcodes)}]"
        raise InputError(f"{path}: img, coords and {key} disagree in size ({sizes}); make the patches again")
    if coords.dtype.kind not in "iuf":
        raise InputError(f"{path}: coords must be numbers, not {coords.dtype}; make the patches again")
    size = read_patch_size(path).pixels
    if size and patch_size_of(attributes).pixels is None:  # HEST of before says it of the images
        attributes["patch_size_src"] = size
    names = [name if isinstance(name, bytes) else str(name).encode() for name in barcodes]
    sizes = f"{n} {side} {patch_size_of(attributes).pixels}"
    digest = _digest(sizes.encode(), coords.astype(np.float64).tobytes(), b"\n".join(names), some_images.tobytes())
    return _Patches(path, n, side, coords, attributes, np.array(names, dtype="S")[:, None], digest)


def _some(images: Any) -> np.ndarray:
    """At most :data:`LOOKED_AT` of the images, evenly chosen."""
    n = len(images)
    return np.stack([images[place] for place in np.linspace(0, n - 1, min(n, LOOKED_AT)).astype(int)])


def _digest(*parts: bytes) -> str:
    """SHA-256 of the parts, which are told one from the next."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _check_images(path: Path, images: Any) -> tuple[int, int]:
    """How many there are, and their side."""
    if not is_array(images):
        raise InputError(f"{path}: img must be a table, not a group")
    shape = images.shape
    if images.dtype != np.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise InputError(f"{path}: img must be uint8 [N, S, S, 3] (RGB), not {images.dtype} {list(shape)}")
    if not shape[0]:
        raise InputError(f"{path}: holds no images (img is empty); leave it out")
    return shape[0], shape[1]


class _Embedder(NamedTuple):
    """How slides are embedded; see :func:`embed`."""

    encoder: Encoder
    batch_size: int
    precision: str
    dtype: str

    def describe(self, name: str) -> dict[str, str]:
        """The attributes of what is written."""
        return {
            "encoder": name,
            "source": self.encoder.source,
            "weights": self.encoder.weights,
            "preprocessing": json.dumps(dataclasses.asdict(self.encoder.preprocessing)),
            "precision": self.precision,
            "dtype": self.dtype,
            "version": __version__,
        }

    def embed(self, patches: _Patches, tell: Callable[[int, int], None]) -> np.ndarray:
        """[N, F]. InputError where images are too small for the encoder, or embeddings not finite."""
        preprocessing = self.encoder.preprocessing
        if (preprocessing.resize or patches.side) < preprocessing.crop:
            raise InputError(
                f"{patches.path}: patches of {patches.side} pixels are smaller than the {preprocessing.crop} that the "
                "encoder takes, and it does not resize them; give larger ones"
            )
        found = np.empty((patches.n, self.encoder.dimension), dtype=self.dtype)
        for block, images in self._batches(patches):
            with np.errstate(over="ignore"):  # it becomes infinite, which is looked for
                found[block] = self._encode(images)
            if not np.isfinite(found[block]).all():
                raise InputError(
                    f"{patches.path}: embeddings of patches {block.start} to {block.stop - 1} are NaN or infinite with "
                    f"--precision {self.precision} and --dtype {self.dtype}; use float32"
                )
            tell(block.stop, patches.n)
        return found

    def _batches(self, patches: _Patches) -> Iterator[tuple[slice, np.ndarray]]:
        """Images [B, crop, crop, 3] uint8 as the encoder wants them; a thread is :data:`AHEAD` batches ahead."""

        def read(block: slice) -> np.ndarray:
            with opened(patches.path) as store:
                images = store["img"][block]
            return self.encoder.preprocessing.prepare(images)

        blocks = blocks_of(patches.n, self.batch_size)
        upcoming = iter(blocks)
        with ThreadPoolExecutor(1, "stflow-fast-reader") as reader:
            being_read = deque(reader.submit(read, block) for block in itertools.islice(upcoming, AHEAD))
            for block in blocks:
                images = being_read.popleft().result()
                being_read.extend(reader.submit(read, block) for block in itertools.islice(upcoming, 1))
                yield block, images

    def _encode(self, images: np.ndarray) -> np.ndarray:
        """[B, F] float32 of one batch."""
        encoder, dtype = self.encoder, PRECISIONS[self.precision]
        on_device = torch.from_numpy(images).to(encoder.device)
        found = torch.empty(len(images), encoder.dimension, device=encoder.device)

        def encode(block: slice) -> None:
            found[block] = encoder.forward(encoder.preprocessing.normalize(on_device[block]))

        with (
            torch.inference_mode(),
            torch.autocast(encoder.device.type, dtype, enabled=dtype != torch.float32),
            # By itself, torch takes convolutions of float32 for ones of tf32, which has three digits.
            torch.backends.cudnn.flags(
                enabled=True, deterministic=torch.backends.cudnn.deterministic, allow_tf32=False
            ),
        ):
            size = CPU_BLOCK if encoder.device.type == "cpu" else len(images)
            in_turn(encode, blocks_of(len(images), size), encoder.device)
        return found.cpu().numpy()


def _is_there(target: Path, about: dict[str, str], overwrite: bool) -> bool:
    """Whether what this call would write stands there already.

    Raises:
        InputError: something else stands there, and may not be replaced.
    """
    if not target.exists():
        return False
    difference = _difference(target, about)
    if difference and not overwrite:
        raise InputError(f"{target}: {difference}; choose another --out or --name, or replace it by --overwrite")
    return difference is None


def _difference(target: Path, about: dict[str, str]) -> str | None:
    """What tells what stands there from what would be written."""
    try:
        with opened(target) as store:
            attributes = dict(store.attrs)
    except InputError:
        return "is not readable"
    for field in DECIDES:
        if attributes.get(field) != about[field]:
            other = f"was made with other {field} than this call's"
            return other if field in attributes else f"does not say what {field} it was made with"
    return None


def _write(target: Path, embeddings: np.ndarray, patches: _Patches, about: dict[str, str]) -> None:
    with atomic_hdf5(target) as file:
        file["embeddings"] = embeddings
        file["coords"] = patches.coords
        file["barcodes"] = patches.barcodes
        file["coords"].attrs.update(patches.attributes)
        file.attrs.update(about)
