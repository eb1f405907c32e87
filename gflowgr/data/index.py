"""Index files: the token strings of every item, as published by generative-retrieval work."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from gflowgr.errors import DataError, shown
from gflowgr.files import read_json, write_json_gz

_MAX_TOKENS = 1000
_MAX_CHARACTERS = 1000
_MAX_CODES = 1 << 28
"""Entries of the table of codes, items x longest identifier: 1 GiB."""


@dataclass(frozen=True, eq=False)
class Identifiers:
    """Identifiers of all items as small integers.

    Attributes:
        codes: int32 [items, L]; code ``c`` at level ``l`` stands for ``level_tokens[l][c]``; items
            with a shorter identifier are padded on the right with -1.
        level_tokens: per level, the distinct token strings in natural order ("<a_2>" before
            "<a_10>").
    """

    codes: np.ndarray
    level_tokens: list[list[str]]

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.codes)

    @property
    def level_sizes(self) -> list[int]:
        """Number of different tokens per level."""
        return [len(tokens) for tokens in self.level_tokens]

    def num_unique(self) -> int:
        """Number of different identifiers; fewer than items when some share one."""
        return len(np.unique(self.codes, axis=0))

    def strings(self, item: int) -> list[str]:
        """The token strings of one item."""
        row = self.codes[item]
        return [self.level_tokens[level][code] for level, code in enumerate(row) if code >= 0]


def _natural(text: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key in which digits compare as numbers."""
    # Digits of any script, but no number so long that Python takes no time to read it.
    parts = re.split(r"(\d{1,1000})", text)
    return (*((1, int(p)) if i % 2 else (0, p) for i, p in enumerate(parts)), (0, text))


def read_index(path: str | Path, num_items: int | None = None) -> Identifiers:
    """Read ``{"item": ["<a_3>", "<b_7>", ...]}`` (plain or gzipped JSON).

    Args:
        path: the file. Items must be numbered from 0 without gaps; identifiers may differ in
            length.
        num_items: how many items there must be, if known.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: damaged file, a missing or unknown item, a row that is not a list of strings, is
            longer than 1,000, or holds an empty string or one of more than 1,000 characters.
    """
    path = Path(path)
    obj = read_json(path, expect=dict)
    count = len(obj) if num_items is None else num_items
    rows = [obj.get(str(item)) for item in range(count)]
    missing = [item for item, row in enumerate(rows) if row is None]
    if missing:
        first = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise DataError(f"{path}: {len(missing)} of {count} items have no identifier: {first}")
    if len(obj) != count:
        known = set(map(str, range(count)))
        extra = next(key for key in obj if key not in known)
        raise DataError(
            f"{path}: item {shown(extra)} is unknown, the data set has items 0 .. {count - 1}"
        )
    if not rows:
        raise DataError(f"{path}: there are no items")
    for item, row in enumerate(rows):
        if type(row) is not list or not row:
            raise DataError(
                f"{path}: item {item} must have a non-empty list of tokens; got {shown(row, 60)}"
            )
        if not all(type(token) is str for token in row):
            raise DataError(f"{path}: item {item} has a token that is not text: {shown(row)}")
        # The table of codes has room for the longest row in every row.
        if len(row) > _MAX_TOKENS:
            raise DataError(
                f"{path}: item {item} must have at most {_MAX_TOKENS:,} tokens; got {len(row):,}"
            )
        wrong = next((token for token in row if not 1 <= len(token) <= _MAX_CHARACTERS), None)
        if wrong is not None:
            raise DataError(
                f"{path}: item {item}: a token must have 1 to {_MAX_CHARACTERS:,} characters; got "
                f"{len(wrong):,}, {shown(wrong, 40)}"
            )
    length = max(map(len, rows))
    if count * length > _MAX_CODES:
        raise DataError(
            f"{path}: items x longest identifier must be at most {_MAX_CODES:,}; got "
            f"{count:,} x {length:,}"
        )
    codes = np.full((count, length), -1, dtype=np.int32)
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=count)
    level_tokens: list[list[str]] = []
    for level in range(length):
        here = np.flatnonzero(lengths > level)
        tokens = [rows[item][level] for item in here]
        names = sorted(set(tokens), key=_natural)
        rank = {name: code for code, name in enumerate(names)}
        codes[here, level] = [rank[token] for token in tokens]
        level_tokens.append(names)
    return Identifiers(codes, level_tokens)


def from_codes(codes: np.ndarray) -> Identifiers:
    """Identifiers with token strings ``<a_N>``, ``<b_N>``, ... for integer codes [items, L].

    Rows may be padded on the right with -1.

    Codes that no item uses get no token: codes are renumbered to ranks per level, as ``read_index``
        does.

    Raises:
        ValueError: not a two-dimensional integer array, more than 26 levels, an empty identifier,
            or a -1 in the middle of a row.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or codes.size == 0:
        raise ValueError(f"codes must be integers [items, L]; got {codes.dtype} {codes.shape}")
    if codes.shape[1] > len(string.ascii_lowercase):
        raise ValueError(f"codes have {codes.shape[1]} levels, at most 26 can be named")
    present = codes >= 0
    bad = np.flatnonzero(~present[:, 0] | (present[:, 1:] & ~present[:, :-1]).any(axis=1))
    if len(bad):
        raise ValueError(
            f"codes[{bad[0]}] = {codes[bad[0]].tolist()}: -1 may only pad a non-empty row"
        )
    ranks = np.full(codes.shape, -1, dtype=np.int32)
    level_tokens = []
    for level, letter in enumerate(string.ascii_lowercase[: codes.shape[1]]):
        names, rank = np.unique(codes[present[:, level], level], return_inverse=True)
        ranks[present[:, level], level] = rank
        level_tokens.append([f"<{letter}_{name}>" for name in names])
    return Identifiers(ranks, level_tokens)


def raw_codes(identifiers: Identifiers, where: object) -> np.ndarray:
    """The numbers in tokens such as ``<a_17>``, int32 [items, L]; :func:`from_codes` backwards.

    Args:
        identifiers: whose tokens have this form.
        where: what errors call them.

    Raises:
        DataError: a token has another form, or identifiers differ in length.
    """
    if (identifiers.codes < 0).any():
        raise DataError(f"{where}: identifiers must all have as many tokens; some have fewer")
    columns = []
    for level, tokens in enumerate(identifiers.level_tokens):
        letter = string.ascii_lowercase[level]
        found = [re.fullmatch(rf"<{letter}_([0-9]{{1,9}})>", token) for token in tokens]
        wrong = next((token for token, match in zip(tokens, found, strict=True) if not match), None)
        if wrong is not None:
            raise DataError(f"{where}: tokens must be such as <{letter}_17>; got {shown(wrong)}")
        numbers = np.array([int(match[1]) for match in found if match], dtype=np.int32)
        columns.append(numbers[identifiers.codes[:, level]])
    return np.stack(columns, axis=1)


def write_index(path: str | Path, codes: Identifiers | np.ndarray) -> None:
    """Write identifiers as an index file, whole or not at all.

    Args:
        path: the file, usually ``index.<name>.json.gz``.
        codes: identifiers, or an integer array [items, L] (see :func:`from_codes`).

    Raises:
        ValueError: the array is not a set of identifiers.
        OutputError: the file cannot be written.
    """
    identifiers = codes if isinstance(codes, Identifiers) else from_codes(codes)
    columns = [
        [tokens[code] if code >= 0 else None for code in column]
        for tokens, column in zip(
            identifiers.level_tokens, identifiers.codes.T.tolist(), strict=True
        )
    ]
    rows = {
        str(item): [token for token in chain(row) if token is not None]
        for item, row in enumerate(zip(*columns, strict=True))
    }
    write_json_gz(path, rows)
