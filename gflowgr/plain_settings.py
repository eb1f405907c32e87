"""Settings hold plain Python values of their declared types, or are refused on construction.

A ``numpy.float32`` would pass every comparison and end a training at its first save, because JSON
has no such number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

__all__ = ["make_plain", "plain", "type_hints"]

_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def plain(value: Any) -> Any:
    """``value`` with the scalars and arrays of numpy and torch, and texts of other classes than
    ``str``, made Python's own, also inside of lists, tuples and dicts; anything else as it is."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict or (isinstance(value, Mapping) and not dataclasses.is_dataclass(value)):
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


@functools.cache
def type_hints(cls: type) -> Mapping[str, Any]:
    """The declared types of a class's fields; an experiment's configurations ask thousands of times
    for those of a few classes."""
    return get_type_hints(cls)


def make_plain(settings: Any, *, prefix: str = "", only: frozenset[str] | None = None) -> None:
    """Make the fields of a dataclass instance plain, in place, and check their types.

    Whole numbers are taken for numbers, and 5.0 for the integer 5; texts and booleans are not
    numbers.

    Args:
        settings: an instance of a dataclass, frozen or not.
        prefix: put before a field's name in errors.
        only: fields to look at; None: all.

    Raises:
        ValueError: a field's value is not of its type.
    """
    kind: Any = type(settings)
    hints = type_hints(kind)
    for field in dataclasses.fields(settings):
        if only is not None and field.name not in only:
            continue
        value = plain(getattr(settings, field.name))
        checked = _typed(prefix + field.name, value, hints[field.name])
        object.__setattr__(settings, field.name, checked)


def _typed(name: str, value: Any, hint: Any) -> Any:
    if hint is Any or (isinstance(hint, type) and isinstance(value, hint) and hint not in _NAMES):
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    options = arguments if origin in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    for option in options:
        fits, result = _fit(name, value, option)
        if fits:
            return result
    wanted = " or ".join(_name(option) for option in options)
    raise ValueError(f"{name} must be {wanted}; got {value!r}")


def _fit(name: str, value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether ``value`` is one of ``hint``, and the value to keep."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        whole = isinstance(value, float) and math.isfinite(value) and value.is_integer()
        number = isinstance(value, int) and not isinstance(value, bool)
        return whole or number, int(value) if whole or number else value
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if origin is Literal:
        return isinstance(value, str) and value in arguments, value
    if hint is str:
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        return isinstance(value, str), str(value) if isinstance(value, str) else value
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False, value
        return True, origin(
            _typed(f"{name}[{place}]", item, arguments[0]) for place, item in enumerate(value)
        )
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return False, value
        kind = arguments[1]
        return True, {k: _typed(f"{name}[{k!r}]", item, kind) for k, item in value.items()}
    return isinstance(hint, type) and isinstance(value, hint), value


def _name(hint: Any) -> str:
    origin = get_origin(hint)
    if hint is NoneType:
        return "None"
    if origin is Literal:
        return f"one of {get_args(hint)}"
    if origin in (list, tuple):
        return f"a list, each {_name(get_args(hint)[0])}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    return _NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")
