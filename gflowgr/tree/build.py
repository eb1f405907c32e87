"""Convert a caller's identifiers (arrays, lists of lists) to the builder's form, and build."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gflowgr.integers import integer_array
from gflowgr.tree.layout import MAX_ITEMS, MAX_LENGTH, Buffer, IdentifierError, build_numpy

_MESSAGES = {
    "empty": "tokens[{row}] is empty: an identifier needs at least one token",
    "hole": "tokens[{row}, {column}] = -1 stands before other tokens; padding belongs on the right",
    "token": "tokens[{row}, {column}] must be 0..2**31 - 1 or -1 (padding); got {value}",
    "present": "items: item {row} is in the tree already",
    "absent": "removed: item {row} is not in the tree",
    "nothing": "removed: no item would be left; a tree needs at least one",
}


def host_module() -> Any | None:
    """The compiled builder ``gflowgr._host``, or None where it was not built."""
    try:
        from gflowgr import _host
    except ImportError:
        return None
    return _host


def token_array(tokens: Any) -> npt.NDArray[Any]:
    """``tokens`` as an integer array [rows, L], padded on the right with -1.

    Raises TypeError for other than integers, ValueError for a wrong shape or no rows.
    """
    if isinstance(tokens, torch.Tensor):
        tokens = tokens.detach().cpu().numpy()
    if not isinstance(tokens, np.ndarray):
        tokens = _padded(tokens)
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers; got {tokens.dtype}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be of shape [items, L]; got {tokens.shape}")
    if tokens.shape[0] == 0:
        raise ValueError("tokens: no identifiers; a tree needs at least one")
    if not 1 <= tokens.shape[1] <= MAX_LENGTH:
        raise ValueError(
            f"tokens must have identifiers of 1..{MAX_LENGTH} tokens; got {tokens.shape[1]}"
        )
    if tokens.shape[0] > MAX_ITEMS:
        raise ValueError(f"tokens must have at most {MAX_ITEMS} rows; got {tokens.shape[0]}")
    small = tokens.dtype.itemsize < 4 or tokens.dtype == np.int32
    return np.ascontiguousarray(integer_array(tokens, "tokens", np.int32 if small else np.int64))


def _padded(rows: Sequence[Sequence[int]]) -> npt.NDArray[Any]:
    rows = [row.tolist() if isinstance(row, np.ndarray | torch.Tensor) else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, Sequence) or isinstance(row, str):
            raise TypeError(
                f"tokens[{index}] must be a sequence of token ids; got {type(row).__name__}"
            )
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    flat = np.array(list(itertools.chain.from_iterable(rows)) or [0])
    if flat.dtype.kind not in "iu" or flat.ndim != 1:
        raise TypeError("tokens must be integers in every identifier")
    width = max(1, int(lengths.max(initial=0)))
    out = np.full((len(rows), width), -1, dtype=np.int64)
    out[np.arange(width) < lengths[:, None]] = (
        integer_array(flat, "tokens") if lengths.any() else []
    )
    return out


def item_array(items: Any, rows: int, *, name: str = "items") -> npt.NDArray[np.int64]:
    """``items`` as int64 [rows]: distinct ids from 0 on. Raises TypeError or ValueError."""
    if isinstance(items, torch.Tensor):
        items = items.detach().cpu().numpy()
    array = np.asarray(items)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers; got {array.dtype}")
    if array.shape != (rows,):
        raise ValueError(
            f"{name} must be of shape ({rows},) like the rows of tokens; got {array.shape}"
        )
    wrong = (array < 0) | (array >= MAX_ITEMS)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"{name}[{row}] must be 0..{MAX_ITEMS - 1}; got {array[row]}")
    array = array.astype(np.int64)
    ordered = np.sort(array)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise ValueError(
            f"{name}: item {ordered[twice[0]]} is given twice; an item has one identifier"
        )
    return array


def build(tokens: Any, items: Any | None) -> Buffer:
    """The tree's buffer, by the C++ builder when there is one and by NumPy otherwise."""
    array = token_array(tokens)
    ids = None if items is None else item_array(items, array.shape[0])
    host = host_module()
    try:
        if host is None:
            return build_numpy(array, ids)
        buffer, error = host.build_tree(array, ids, 0)
        if error is not None:
            raise IdentifierError(*error)
        return np.asarray(buffer)
    except IdentifierError as error:
        raise ValueError(explain(error, array)) from None


def explain(error: IdentifierError, tokens: npt.NDArray[Any]) -> str:
    """The error message for an identifier error."""
    row, column = error.row, error.column
    value = tokens[row, column] if error.kind == "token" else None
    return _MESSAGES[error.kind].format(row=row, column=column, value=value)


def integer_tensor(values: Any, name: str, device: torch.device) -> Tensor:
    """``values`` as an integer tensor on ``device``; a tensor must be there already.

    Raises TypeError for other than integers, ValueError for a tensor on another device.
    """
    given = isinstance(values, Tensor)
    try:
        tensor = torch.as_tensor(values, device=None if given else device)
    except (RuntimeError, OverflowError) as error:  # an integer of more than 64 bits
        raise ValueError(f"{name} must be integers of 64 bits: {error}") from error
    if tensor.numel() == 0 and not given:
        tensor = tensor.to(torch.int64)  # an empty list has no dtype of its own
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {tensor.dtype}")
    if tensor.dtype == torch.uint64 and bool((tensor.view(torch.int64) < 0).any()):
        raise ValueError(f"{name} must be below 2**63; got more")
    if tensor.device != device:
        raise ValueError(f"{name} are on {tensor.device}, the tree is on {device}")
    return tensor


def check_range(name: str, value: int, count: int) -> None:
    """Raise ValueError unless ``0 <= value < count``."""
    if not 0 <= value < count:
        raise ValueError(f"{name} must be 0..{count - 1}; got {value}")
