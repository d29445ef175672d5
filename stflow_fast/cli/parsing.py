"""What the text of an option means."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from ..config import DenoiserConfig
from ..errors import InputError
from ..windows import TrainingConfig


def settings_of(pairs: list[str], taken: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """NAME=VALUE pairs as fields of TrainingConfig and of DenoiserConfig, in the types of their defaults."""
    fields = {
        field.name: (home, _kind_of(config, field.name))
        for home, config in enumerate((TrainingConfig, DenoiserConfig))
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and field.name not in taken
    }
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name in taken:
            raise InputError(f"--set {name}: has a flag of its own, --{name.replace('_', '-')}")
        if name not in fields:
            raise InputError(f"--set {name}: is not a setting; the settings are {', '.join(fields)}")
        home, kind = fields[name]
        try:
            found[home][name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise InputError(f"--set {name}: {text!r} is not a {kind.__name__}") from error
    return found


def _kind_of(config: type, field: str) -> type:
    """Of the values of a field, but for None."""
    hint = typing.get_type_hints(config)[field]
    kind: type = next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)
    return kind


def words_of(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers_of(name: str, text: str, kind: type = int) -> tuple[Any, ...]:
    try:
        return tuple(kind(each) for each in text.split(",")) if text else ()
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name}: must be {what} with commas between, not {text!r}") from None


def shard_of(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise InputError(f"shard: must be I/N such as 1/4, not {text!r}")
    return int(index), int(count)


def solver_of(n_sample_steps: int | None, prior: str | None, fast: bool) -> tuple[int | None, str | None]:
    """Steps and prior. With ``--fast`` a single call from zero: what x_t tells beyond the image is little."""
    if fast and not (n_sample_steps is None and prior is None):
        raise InputError("fast: is --n-sample-steps 2 --prior zero; give either")
    return (2, "zero") if fast else (n_sample_steps, prior)
