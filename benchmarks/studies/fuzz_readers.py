"""Small slides of every format, broken by chance, and what the readers do with them.

python -m benchmarks fuzz_readers [--minutes 10] [--seed 0] [--out /tmp/fuzz_readers]

A reader reads, or refuses in one line that names the file (InputError); both are right. Another exception or message, a
process that dies, more than 4 GiB and more than 20 seconds are faults: each a line of faults.jsonl, with the number of
the slide, which the same seed breaks the same way. Needs a checkout: the slides are those of tests/corpus.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import resource
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, sources
from stflow_fast.slides.stores import guarded, is_array
from tests.corpus import WHOLE, build, editing, folder_of, replace

MEMORY = 4 * 2**30
"""Bytes of address space that a process gets beside those of its libraries."""

SECONDS = 20.0
BATCH = 200
"""Slides that a process reads, if it lives so long."""

OUTCOMES = ("read", "refused", "exception", "memory", "crash", "hang")
RIGHT = OUTCOMES[:2]

NO_MEMORY = ("MemoryError", "Unable to allocate", "memory allocation failed", "Cannot allocate memory")

OPTIONS = (
    ReadOptions(),
    ReadOptions(expression=True, require_features=False),
    ReadOptions(gene_names=True, require_features=False),
    ReadOptions(features_key="X"),
)

NUMBERS = (0, 1, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
"""Sizes, addresses and counts that programs fall over."""

VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    -1,
    1e308,
    float("nan"),
    "",
    "x",
    "../..",
    "csr_matrix",
    [],
    [0],
    [[1]],
    {},
    {"a": 1},
)
"""What may stand in JSON, or in an attribute, in the place of what should."""

CELLS = (b"", b"NaN", b"inf", b"-1", b"1e999", b'"', b"\xff\xfe", b"\0", b"x" * 5000, b"1,2", b"\n", b"\r")
"""What may stand in a CSV."""

Random = np.random.Generator


# To break slides -----------------------------------------------------------------------------------------------------


def one_of(random: Random, values: Any) -> Any:
    return values[random.integers(len(values))]


def a_file(path: Path, random: Random) -> Path:
    """The file, or one of a folder, or of STImage-1K4M."""
    if path.suffix == ".csv":
        found: Path = one_of(random, sorted(path.parents[1].rglob("*.csv")))
        return found
    return path if path.is_file() else one_of(random, sorted(each for each in path.rglob("*") if each.is_file()))


def bytes_changed(path: Path, random: Random) -> None:
    """Bits turned, a stretch of one value, a number that programs fall over, or an end."""
    file = a_file(path, random)
    content = bytearray(file.read_bytes())
    place, n = random.integers(len(content)), int(2 ** random.integers(9))
    way = random.integers(4)
    if way == 0:
        for _ in range(n // 8 + 1):
            content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    elif way == 1:
        content[place : place + n] = random.bytes(1) * len(content[place : place + n])
    elif way == 2:
        size = one_of(random, (2, 4, 8))
        place -= place % size
        content[place : place + size] = (one_of(random, NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
    else:
        del content[place:]
    file.write_bytes(content)


def file_lost(path: Path, random: Random) -> None:
    """One of a folder is gone, a folder, or a link to nothing."""
    file = a_file(path, random)
    file.unlink()
    way = random.integers(3)
    if way == 0:
        file.mkdir()
    elif way == 1:
        file.symlink_to("gone")


def json_changed(path: Path, random: Random) -> None:
    names = ("zarr.json", ".zarray", ".zattrs", ".zmetadata")
    file = one_of(random, sorted(each for each in path.rglob("*") if each.name in names))
    content = json.loads(file.read_text())
    owner, key = one_of(random, list(places_in(content)))
    owner[key] = one_of(random, VALUES)
    file.write_text(json.dumps(content))


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Where values stand in what a JSON file has."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from places_in(content[key])


def cell_changed(path: Path, random: Random) -> None:
    """A cell of a CSV, or its line."""
    file = a_file(path, random)
    lines = [line.split(b",") for line in file.read_bytes().splitlines()]
    line = one_of(random, lines)
    line[random.integers(len(line))] = one_of(random, CELLS)
    if random.random() < 0.2:
        lines.insert(random.integers(len(lines)), list(line))
    file.write_bytes(b"\n".join(b",".join(line) for line in lines))


def keys_in(store: Any, prefix: str = "") -> Iterator[str]:
    for name in sorted(store.keys()):
        yield f"{prefix}{name}"
        if not is_array(store[name]):
            yield from keys_in(store[name], f"{prefix}{name}/")


def a_table(store: Any, random: Random) -> tuple[str, Any]:
    key = one_of(random, [key for key in keys_in(store) if is_array(store[key])])
    return key, store[key]


def values_changed(path: Path, random: Random) -> None:
    """A table of another shape or type, or with values that are no numbers, in the place of one."""
    with editing(path) as store:
        key, table = a_table(store, random)
        values = np.asarray(table[()])
        ways = [values.T, values[: len(values) // 2], values[:0], np.concatenate([values] * 2)] if values.ndim else []
        ways += [values[None], values.reshape(-1), values.astype("S8"), values.ravel()[0]]
        if values.dtype.kind in "biuf":
            odd = one_of(random, (np.nan, np.inf, -1, 2.0**62))
            ways += [values.astype(name) for name in ("i1", "u8", "f2", ">f8", "c8", "?")]
            ways += [np.where(random.random(values.shape) < 0.1, odd, values), values * odd]
        changed = np.asarray(one_of(random, ways))
        dtype = h5py.string_dtype() if changed.dtype.kind == "O" and path.is_file() else None
        replace(store, key, data=changed, **({"dtype": dtype} if dtype else {}))


def more_claimed(path: Path, random: Random) -> None:
    """A table that is said to be larger than it is."""
    with editing(path) as store:
        key, table = a_table(store, random)
        shape = list(table.shape) or [1]
        shape[random.integers(len(shape))] = one_of(random, (61, 10**5, 10**9, 10**12))
        chunks = tuple(max(1, min(size, one_of(random, (1, 16, 1024)))) for size in shape)
        kind = np.dtype(table.dtype)
        replace(store, key, shape=tuple(shape), chunks=chunks, dtype=kind if kind.kind in "biuf" else "f4")


def part_lost(path: Path, random: Random) -> None:
    """A part is gone, or in HDF5 a link: to another, to nothing, or to what it is in."""
    with editing(path) as store:
        keys = list(keys_in(store))
        key = one_of(random, keys)
        targets = (h5py.SoftLink(f"/{one_of(random, keys)}"), h5py.SoftLink("/"), h5py.ExternalLink("gone.h5", "/"))
        del store[key]
        if path.is_file() and random.random() < 0.7:
            store[key] = one_of(random, targets)


def attribute_changed(path: Path, random: Random) -> None:
    with editing(path) as store:
        item = store[one_of(random, ["/", *keys_in(store)])]
        name = one_of(random, [*item.attrs, "encoding-type", "shape", "_index", "column-order", "patch_size"])
        of_hdf5 = (np.bytes_(b"\xff"), np.zeros(3, "c8"), h5py.Empty("f4")) if path.is_file() else ()
        item.attrs[name] = one_of(random, (*VALUES, "null", "categorical", "dataframe", *of_hdf5))


IN_STORES = (values_changed, values_changed, more_claimed, part_lost, attribute_changed, bytes_changed)


def ways_of(path: Path) -> tuple[Callable[[Path, Random], None], ...]:
    if path.suffix == ".csv":
        return cell_changed, cell_changed, bytes_changed
    return (*IN_STORES, json_changed, json_changed, file_lost) if path.is_dir() else IN_STORES


# To read them --------------------------------------------------------------------------------------------------------


def outcome(path: Path, options: ReadOptions) -> tuple[str, str]:
    """What came of reading all of it, of :data:`OUTCOMES`, and what was said."""
    try:
        for source in sources(path, options):
            features = source.read().features
            guarded(path, functools.partial(np.asarray, features))
    except InputError as error:
        if not str(error).isprintable() or str(path.parent) not in str(error):
            return "exception", f"not one line with the path: {error!r}"
        return "memory" if any(said in str(error) for said in NO_MEMORY) else "refused", str(error)
    except Exception:
        return "exception", traceback.format_exc(limit=-4)
    return "read", ""


def work(pipe: Connection, seed: int, folder: Path) -> None:
    """Break a copy of a slide, say how, read it, and say what came of that; again and again."""
    warnings.simplefilter("ignore")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    while True:
        number, root, whole = pipe.recv()
        random = np.random.default_rng([seed, number])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root, folder)
        path, done = folder / whole.relative_to(root), []
        ways: Any = ways_of(path)
        for way in random.choice(ways, size=one_of(random, (1, 1, 1, 2))):
            with contextlib.suppress(Exception):  # what is broken already bars it, or no library writes such a thing
                way(path, random)
                done.append(way.__name__)
        pipe.send(", ".join(done))
        pipe.send(outcome(path, one_of(random, OPTIONS)))


class Reader:
    """A process that breaks and reads, and may die or hang."""

    def __init__(self, *given: Any) -> None:
        fork = multiprocessing.get_context("fork")  # all libraries are loaded
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=work, args=(theirs, *given), daemon=True)
        self.process.start()
        theirs.close()

    def read(self, *task: Any) -> tuple[str, str, str]:
        """What was done, what came of it, and what was said."""
        self.pipe.send(task)
        try:
            done = self.pipe.recv()
            return done, *(self.pipe.recv() if self.pipe.poll(SECONDS) else ("hang", ""))
        except (EOFError, ConnectionError):
            self.process.join()
            return "", "crash", f"exit code {self.process.exitcode}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("/tmp/fuzz_readers"))
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    wholes = {make.__name__: build(given.out, make.__name__, ("", make)) for make in WHOLE}
    counts: Counter[tuple[str, str]] = Counter()
    end, reader = time.monotonic() + 60 * given.minutes, Reader(given.seed, given.out / "broken")
    with (given.out / "faults.jsonl").open("w") as faults:
        for number, format in enumerate(itertools.cycle(wholes)):
            if time.monotonic() > end:
                break
            done, kind, said = reader.read(number, folder_of(given.out, format), wholes[format])
            counts[format, kind] += 1
            if kind not in RIGHT:
                line = {"number": number, "format": format, "done": done, "outcome": kind, "said": said}
                print(json.dumps(line), file=faults, flush=True)
            if kind not in RIGHT or number % BATCH == 0:
                reader.end()
                reader = Reader(given.seed, given.out / "broken")
    reader.end()
    print(f"{'format':12}", *(f"{kind:>10}" for kind in OUTCOMES))
    for format in wholes:
        print(f"{format:12}", *(f"{counts[format, kind]:10,}" for kind in OUTCOMES))
    print(f"{'all':12}", *(f"{sum(counts[format, kind] for format in wholes):10,}" for kind in OUTCOMES))
    if any(kind not in RIGHT for _, kind in counts):
        raise SystemExit(f"faults: {given.out / 'faults.jsonl'}")
