"""What ``stflow_fast`` names is described: docstrings, annotations, shapes of arrays, errors."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import stflow_fast
from stflow_fast.errors import InputError

SHAPE = r"\[[A-Za-z0-9][^\]\n]*\]"
"""As docstrings write it: [N, G], [N_i, 2], [S + 1], [N, ...]."""

ARRAY = re.compile(r"\b(?:ndarray|Tensor|Array|Arrays|Features)\b")
"""In an annotation: an array, or an alias of several kinds of them."""

CALLABLES = {"__call__", "__getitem__", "__init__", "__iter__", "__len__"}
"""Methods that are public without a public name, where a class writes them itself."""

NAMES = [name for name in stflow_fast.__all__ if not name.startswith("__")]


def methods_of(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a class or one of its parents in this package writes and others may call."""
    of_dataclass = {"__init__"} if dataclasses.is_dataclass(kind) else set()
    for owner in kind.__mro__:
        if owner.__module__.split(".")[0] not in ("stflow_fast", "tests"):
            continue
        for name, member in vars(owner).items():
            if name.startswith("_") and name not in CALLABLES - of_dataclass:
                continue
            found = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            found = getattr(found, "func", found)  # of a cached property
            if inspect.isfunction(found):
                yield f"{owner.__name__}.{name}", found


def faults(name: str, thing: Any) -> list[str]:
    """What is not described, a line each."""
    if inspect.isclass(thing):
        found = [] if _described(thing) else [f"{name}: has no docstring"]
        constructor = vars(thing).get("__init__").__doc__ if "__init__" in vars(thing) else None
        text = "\n".join(filter(None, (thing.__doc__, constructor)))
        found += _unsaid_errors(name, thing, text, own=("__init__", "__post_init__"))
        found += _fields_without_shape(name, thing)
        for method_name, method in methods_of(thing):
            found += _faults_of_function(method_name, method, of_class=thing)
        return found
    return _faults_of_function(name, thing)


def _described(thing: Any) -> bool:
    text = thing.__doc__ or ""
    return bool(text.strip()) and not text.startswith(f"{getattr(thing, '__name__', '')}(")  # a dataclass's own


def _faults_of_function(name: str, function: Callable[..., Any], of_class: type | None = None) -> list[str]:
    is_constructor = name.endswith("__init__")
    text = function.__doc__ or ""
    if of_class is not None:
        described = (vars(owner).get(function.__name__) for owner in of_class.__mro__)  # what overrides says no more
        texts = [of_class.__doc__, text] if is_constructor else [text, *(each.__doc__ for each in described if each)]
        text = "\n".join(filter(None, texts))
    found = [] if text.strip() else [f"{name}: has no docstring"]
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls") and of_class is not None:
            continue
        if parameter.annotation is inspect.Parameter.empty:
            found.append(f"{name}: {parameter.name} has no annotation")
        elif ARRAY.search(str(parameter.annotation)) and not _has_shape(text, parameter.name):
            found.append(f"{name}: the docstring gives no shape of {parameter.name}")
    if signature.return_annotation is inspect.Signature.empty and not is_constructor:
        found.append(f"{name}: has no annotation of what it returns")
    elif ARRAY.search(str(signature.return_annotation)) and not re.search(SHAPE, text):
        found.append(f"{name}: the docstring gives no shape of what it returns")
    if not is_constructor:
        found += _unsaid_errors(name, function, text)
    return found


def _has_shape(text: str, parameter: str) -> bool:
    """In the parameter's entry, behind its name in a sentence, or where the entry sends a reader."""
    told = rf"\b{parameter}\b[^.]*?{SHAPE}"
    elsewhere = rf"^\s*(?:\w+, )*{parameter}(?:, \w+)*: see :(?:func|meth|class):`"
    return bool(re.search(told, text, re.DOTALL) or re.search(elsewhere, text, re.MULTILINE))


def _fields_without_shape(name: str, kind: type) -> list[str]:
    if not dataclasses.is_dataclass(kind):
        return []
    arrays = [field.name for field in dataclasses.fields(kind) if ARRAY.search(str(field.type))]
    public = [field for field in arrays if not field.startswith("_")]
    return [f"{name}: gives no shape of {field}" for field in public if not _has_shape(kind.__doc__ or "", field)]


def _unsaid_errors(name: str, thing: Any, text: str, own: tuple[str, ...] = ()) -> list[str]:
    """What a function raises, or a constructor (``own``) of a class, of bad input, and its docstring does not tell."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    bodies = (
        [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in own] if own else [tree]
    )
    raised = {_name_of(node.exc) for body in bodies for node in ast.walk(body) if isinstance(node, ast.Raise)}
    told = "Raises:" in text
    return [f"{name}: raises {error} and does not say so" for error in sorted(raised & ERRORS) if not told]


def _name_of(raised: ast.expr | None) -> str:
    function = raised.func if isinstance(raised, ast.Call) else raised
    return function.id if isinstance(function, ast.Name) else ""


def _errors() -> set[str]:
    kinds, found = [InputError], {"InputError"}
    while kinds:
        kinds = [sub for kind in kinds for sub in kind.__subclasses__()]
        found |= {kind.__name__ for kind in kinds}
    return found


ERRORS = _errors()
"""Of bad input, by their names."""


@pytest.mark.parametrize("name", NAMES)
def test_what_is_public_is_described(name: str) -> None:
    assert faults(name, getattr(stflow_fast, name)) == []


def test_the_names_are_those_of_the_package() -> None:
    assert len(NAMES) == len(set(NAMES)) > 20
    for name in NAMES:
        thing = getattr(stflow_fast, name)
        assert thing.__module__.startswith("stflow_fast.")
        assert callable(thing)


# One that lacks nothing, and for each rule one that lacks what it asks for.


def complete(coords: np.ndarray, name: str) -> Tensor:
    """Places by name.

    Args:
        coords: [N, 2] pixels.
        name: of the slide.

    Returns:
        [N, 2] float32.

    Raises:
        InputError: a name that is not known.
    """
    if not name:
        raise InputError("name: is empty")
    return Tensor(coords)


def undocumented(name: str) -> str:
    return name


def no_annotation(name) -> str:
    """A name."""
    return name


def no_return(name: str):
    """A name."""
    return name


def no_shape(coords: np.ndarray, n: int = 2) -> None:
    """Args: coords: pixels. Others are [N, 2]."""


def no_shape_returned(n: int) -> Tensor:
    """Of n spots."""
    return Tensor(n)


def unsaid_error(name: str) -> None:
    """A name."""
    if not name:
        raise InputError("name: is empty")


class Unsaid:
    """Of a name."""

    def __init__(self, name: str, coords: np.ndarray) -> None:
        if not name:
            raise InputError("name: is empty")

    def method(self) -> None:
        raise InputError("method: fails")

    @property
    def place(self) -> Tensor:
        """Where it is."""
        return Tensor(2)

    @functools.cached_property
    def cached(self):
        """Where it was."""

    @classmethod
    def made(cls, name: str) -> Unsaid:
        return cls(name, np.empty(0))


@dataclasses.dataclass
class Bare:
    coords: np.ndarray


def test_what_lacks_nothing_has_no_fault() -> None:
    assert faults("complete", complete) == []


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (undocumented, ["undocumented: has no docstring"]),
        (no_annotation, ["no_annotation: name has no annotation"]),
        (no_return, ["no_return: has no annotation of what it returns"]),
        (no_shape, ["no_shape: the docstring gives no shape of coords"]),
        (no_shape_returned, ["no_shape_returned: the docstring gives no shape of what it returns"]),
        (unsaid_error, ["unsaid_error: raises InputError and does not say so"]),
        (
            Unsaid,
            [
                "Unsaid: raises InputError and does not say so",
                "Unsaid.__init__: the docstring gives no shape of coords",
                "Unsaid.method: has no docstring",
                "Unsaid.method: raises InputError and does not say so",
                "Unsaid.place: the docstring gives no shape of what it returns",
                "Unsaid.cached: has no annotation of what it returns",
                "Unsaid.made: has no docstring",
            ],
        ),
        (Bare, ["Bare: has no docstring", "Bare: gives no shape of coords"]),
    ],
)
def test_each_rule_finds_what_it_is_for(thing: Any, expected: list[str]) -> None:
    assert faults(thing.__name__, thing) == expected
