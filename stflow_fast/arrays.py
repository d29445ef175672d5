"""Arrays as people have them, made into what the program computes with: the one rule of all its entries.

Taken, and given on in the precision that they came in: tensors and arrays of any layout, byte order and real type
(read-only ones and those that require gradients too), lists, data frames, masked arrays, sparse matrices of scipy,
tables on disk that are read by indexing (h5py, zarr, anndata), booleans as 0 and 1, and text and objects that say
numbers, as float64. What is no number, is missing, or has another shape is an InputError that names the argument.
"""

from __future__ import annotations

import numbers
import reprlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .errors import InputError, first_line

Shape = tuple[int | str, ...]
"""The size that each axis must have, or a name for one that may have any."""

SEVERAL_SLIDES = "give one slide at a time, or where slide_ptr is taken several packed one after another"

EXACT_BELOW = 2**53
"""From here on float64 does not tell one whole number from the next."""

_WIDER = {"uint16": "int32", "uint32": "int64", "uint64": "float64"}
"""What torch computes little with, and the next type that it does."""


def as_tensor(name: str, value: Any, shape: Shape, mend: str = "") -> Tensor:
    """Numbers as a dense tensor without gradients, on the device they are on.

    In the memory of ``value`` wherever a tensor can have its layout and type: never write to it.

    Args:
        name: of the argument, for messages.
        value: see :mod:`stflow_fast.arrays`.
        shape: wanted; an axis of one in front of it is dropped.
        mend: what to do about another size.

    Raises:
        InputError: no real numbers, or another shape.
    """
    found = _shaped(name, _numbers(name, value), shape, mend)
    return found if isinstance(found, Tensor) else torch.from_numpy(_lent(found))


def as_array(name: str, value: Any, shape: Shape, dtype: type[np.floating], mend: str = "") -> np.ndarray:
    """As :func:`as_tensor`, but a numpy array of ``dtype``; what is too large for that is infinite."""
    found = _shaped(name, _numbers(name, value), shape, mend)
    if isinstance(found, Tensor):
        found = (found.float() if found.dtype == torch.bfloat16 else found).numpy(force=True)
    with np.errstate(over="ignore"):
        return found.astype(dtype, copy=False)


def as_counts(name: str, value: Any, shape: Shape, mend: str = "") -> scipy.sparse.csr_matrix:
    """A table, sparse or dense, as float32 CSR; in the memory of ``value`` if it is that already. As :func:`as_array`
    for what is dense."""
    value = _loaded(value)
    if not scipy.sparse.issparse(value):
        value = as_array(name, value, shape, np.float32, mend)
    elif not _fits(value.shape, shape):
        raise _other_shape(name, value.shape, shape, mend)
    elif value.dtype.kind not in "biuf":
        raise _no_numbers(name, value.dtype)
    with np.errstate(over="ignore"):
        return scipy.sparse.csr_matrix(value, dtype=np.float32)


def as_names(name: str, value: Any) -> np.ndarray:
    """Names as unicode [N], from text, UTF-8 bytes or whole numbers in a list, array or index, or a table [N, 1].

    Raises:
        InputError: another shape, or something else (a missing value too).
    """
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise InputError(f"{name}: must be a list of names, not {_short(value)}")
    if not hasattr(value, "__array__"):
        value = np.array(list(value), dtype=object)
    names = np.asarray(value)
    if names.ndim == 2 and 1 in names.shape:
        names = names.reshape(-1)
    if names.ndim != 1:
        raise _other_shape(name, names.shape, ("N",))
    return names if names.dtype.kind == "U" else np.array([_name(name, each) for each in names.tolist()], dtype=np.str_)


def _name(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: {_short(value)} is not UTF-8 text") from error
    if isinstance(value, str) or (not isinstance(value, bool) and isinstance(value, numbers.Integral)):
        return str(value)
    raise InputError(f"{name}: {_short(value)} is not a name; give text")


def _numbers(name: str, value: Any) -> Tensor | np.ndarray:
    """Real numbers of native byte order and positive strides, of a type that torch computes with."""
    try:
        found = _read(name, value)
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        reason = first_line(error)
        raise InputError(f"{name}: is not a table of numbers with rows of one length ({reason})") from error
    return _of_tensor(name, found) if isinstance(found, Tensor) else _of_array(name, found)


def _read(name: str, value: Any) -> Tensor | np.ndarray:
    """Anything as a tensor or an array, of whatever type."""
    if isinstance(value, Tensor):
        return value
    value = _loaded(value)
    if isinstance(value, np.ma.MaskedArray):
        missing = int(np.ma.getmaskarray(value).sum())
        if missing:
            raise InputError(f"{name}: {missing} values are masked; fill them or leave those spots out")
        return np.asarray(value.data)
    if scipy.sparse.issparse(value):
        dense: np.ndarray = value.toarray()
        return dense
    if hasattr(value, "iloc") and hasattr(value, "columns"):
        return _of_frame(name, value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
        return torch.stack(tuple(value))
    return np.asarray(value)


def _loaded(value: Any) -> Any:
    """A table on disk that numpy does not read by itself, in memory; all else as it is."""
    by_index = hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")
    if not by_index or hasattr(value, "__array__") or scipy.sparse.issparse(value):
        return value
    return value[:]


def _of_frame(name: str, frame: Any) -> np.ndarray:
    if all(isinstance(dtype, np.dtype) and dtype.kind in "biuf" for dtype in frame.dtypes):
        return np.asarray(frame)
    columns = [np.asarray(frame.iloc[:, index]) for index in range(frame.shape[1])]
    named = zip(frame.columns, columns, strict=True)
    return np.column_stack([_of_array(f"{name}: column {label}", column) for label, column in named])


def _of_tensor(name: str, found: Tensor) -> Tensor:
    if found.layout != torch.strided or found.is_quantized or found.is_nested or found.is_meta:
        raise InputError(f"{name}: must be a dense tensor of numbers; make it one (to_dense, dequantize)")
    if found.is_complex():
        raise _no_numbers(name, found.dtype)
    found = found.detach().resolve_neg()
    if found.is_floating_point():
        return found.float() if found.element_size() == 1 else found
    wider = _WIDER.get(str(found.dtype).removeprefix("torch."))
    whole = found if wider is None else found.to(getattr(torch, wider))
    if found.element_size() == 8:
        _check_exact(name, whole)
    return whole


def _of_array(name: str, found: np.ndarray) -> np.ndarray:
    kind, size = found.dtype.kind, found.dtype.itemsize
    if kind in "OSUT":
        return _parsed(name, found)
    if kind not in "biuf":
        raise _no_numbers(name, found.dtype)
    wider = "float64" if size > 8 else _WIDER.get(found.dtype.name)
    plain = _plain(found.astype(wider or found.dtype.newbyteorder("="), copy=False))
    if kind in "iu" and size == 8:
        _check_exact(name, plain)
    return plain


def _plain(found: np.ndarray) -> np.ndarray:
    """Copied, if torch could not have it where it lies."""
    return found if found.flags.aligned and min(found.strides, default=0) >= 0 else found.copy("C")


def _lent(found: np.ndarray) -> np.ndarray:
    """The same memory, as torch wants it: its tensors can all be written to, and it warns of arrays that cannot. Nobody
    writes to these. Silencing the warning instead would change the filters of other threads too."""
    if found.flags.writeable:
        return found
    interface = found.__array_interface__
    address, _ = interface["data"]
    return np.asarray(SimpleNamespace(__array_interface__={**interface, "data": (address, False)}, owner=found))


def _parsed(name: str, values: np.ndarray) -> np.ndarray:
    """Text and objects that say numbers, as float64."""
    if values.ndim == 0:
        raise InputError(f"{name}: must be an array of numbers, not {_short(values.item())}")
    parsed = np.empty(values.size)
    for index, value in enumerate(values.ravel().tolist()):
        try:
            parsed[index] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{name}: {_short(value)} is not a number") from error
    return parsed.reshape(values.shape)


def _check_exact(name: str, whole: Tensor | np.ndarray) -> None:
    if 0 not in whole.shape and max(-int(whole.min()), int(whole.max())) >= EXACT_BELOW:
        raise InputError(f"{name}: whole numbers from 2^53 on are not exact in float64; subtract what they share")


def _shaped(name: str, found: Tensor | np.ndarray, shape: Shape, mend: str) -> Tensor | np.ndarray:
    one = found[0] if found.ndim == len(shape) + 1 and len(found) == 1 else found
    if not _fits(one.shape, shape):
        raise _other_shape(name, found.shape, shape, mend)
    return one


def _fits(found: tuple[int, ...], shape: Shape) -> bool:
    pairs = zip(found, shape, strict=False)
    return len(found) == len(shape) and all(isinstance(size, str) or here == size for here, size in pairs)


def _other_shape(name: str, found: tuple[int, ...], shape: Shape, mend: str = "") -> InputError:
    if len(shape) == 2 and len(found) == 3 and found[0] > 1:
        mend = SEVERAL_SLIDES
    elif len(shape) == 2 and _fits(found[:-3:-1], shape):
        mend = "it is transposed, give its .T"
    wanted = ", ".join(map(str, shape))
    return InputError(f"{name}: must have shape [{wanted}], not {list(found)}" + (f"; {mend}" if mend else ""))


def _no_numbers(name: str, dtype: object) -> InputError:
    return InputError(f"{name}: must be real numbers, not {dtype}")


def _short(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())
