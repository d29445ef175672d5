"""Triton's interpreter in half the time: what it makes again and again is made once."""

from __future__ import annotations

from typing import Any


def hasten() -> None:
    """Take two things out of Triton 3.7's interpreter that change no result; a Triton without them is left as it is.

    Before every call of a device function it goes through all of ``triton.language`` to exchange its functions, which
    the launch of the kernel has done; and to look up numpy's type of a tensor it writes down the table of all types.
    """
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    exchange, look_up = (getattr(interpreter, name, None) for name in ("_patch_lang", "_get_np_dtype"))
    scope = getattr(interpreter, "_LangPatchScope", None)
    if exchange is None or look_up is None or scope is None:
        return
    types: dict[str, Any] = {}

    def exchange_once(function: Any) -> Any:
        """A scope without changes where all that the function sees is exchanged already."""
        seen = [tl.tensor.__add__, *(part.load for part in (tl, tl.core) if part in function.__globals__.values())]
        return exchange(function) if any(map(tl.core.is_builtin, seen)) else scope()

    def found_once(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in types:
            types[name] = look_up(dtype)
        return types[name]

    interpreter._patch_lang, interpreter._get_np_dtype = exchange_once, found_once
