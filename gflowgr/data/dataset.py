"""The data set in memory: users' item sequences, attributes of each event, and item texts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr.data.index import Identifiers, read_index
from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError, shown
from gflowgr.files import find_lone_surrogate
from gflowgr.integers import MAX_ID, integer_array
from gflowgr.item_ids import ItemIds

MAX_BEHAVIOURS = 127


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Interaction data with 0-based users and items.

    Attributes:
        name: what reports call it.
        path: the folder it was read from, or None.
        user_ids: list [U], the users' keys in the file.
        sequences: Ragged int32, the items of each user, oldest first (last = test, second-last =
            valid).
        num_items: items are 0 .. num_items - 1.
        behaviours: int8 [M] parallel to ``sequences.values`` (codes into ``behaviour_names``), or
            None.
        behaviour_names: the names of the codes, e.g. ("click", "purchase"); at most 127.
        ratings: float32 [M] parallel to the items, or None.
        times: int64 [M] parallel to the items, never decreasing within a user, or None.
        side: other behaviours without an order, e.g. {"cart": Ragged int32 [U rows]}. A pair whose
            item is the user's validation or test item is removed on construction (it would leak the
            answer).
        side_dropped: how many pairs were removed from each side behaviour for that reason.
        texts: list [num_items] of {field: text}, or None.
        item_ids: the items' ids in the source, by number; None: the numbers are the ids.
        indexes: identifiers held in memory, by name (those in ``path`` are found besides).
        truth: float16 [U, num_items] true expected reward of each item at evaluation time, or None.

    Raises:
        DataError: arrays of other lengths, ids out of range or not integers, empty users, times
            that go back, texts that are not valid Unicode.
    """

    name: str
    user_ids: list[str]
    sequences: Ragged
    num_items: int
    path: Path | None = None
    behaviours: np.ndarray | None = None
    behaviour_names: tuple[str, ...] = ()
    ratings: np.ndarray | None = None
    times: np.ndarray | None = None
    side: dict[str, Ragged] = field(default_factory=dict)
    side_dropped: dict[str, int] = field(default_factory=dict)
    texts: list[dict[str, str]] | None = None
    item_ids: ItemIds | None = None
    indexes: dict[str, Identifiers] = field(default_factory=dict)
    truth: np.ndarray | None = None

    def __post_init__(self) -> None:
        # Item ids are stored as int32.
        if not 1 <= self.num_items <= MAX_ID:
            raise DataError(
                f"{self.name}: num_items must be in 1 .. {MAX_ID:,}; got {self.num_items:,}"
            )
        self._check_texts()
        self._check_sequences()
        self._check_parallel()
        self._clean_side()
        if self.texts is not None and len(self.texts) != self.num_items:
            raise DataError(f"{self.name}: {len(self.texts)} texts for {self.num_items} items")
        if self.item_ids is not None and len(self.item_ids) != self.num_items:
            raise DataError(
                f"{self.name}: item_ids must have one id for each of {self.num_items:,} items; got "
                f"{len(self.item_ids):,}"
            )
        if self.truth is not None and self.truth.shape != (self.num_users, self.num_items):
            raise DataError(
                f"{self.name}: truth must be [users, items] = {(self.num_users, self.num_items)}; "
                f"got {self.truth.shape}"
            )

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, {self.num_users:,} users, {self.num_items:,} items, "
            f"{self.num_interactions:,} interactions)"
        )

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.user_ids)

    @property
    def num_interactions(self) -> int:
        """Number of events M in the sequences (side behaviours not counted)."""
        return len(self.sequences.values)

    def item_id(self, item: int) -> str | int:
        """The id of ``item`` in the source; its number where the source has no ids of its own."""
        return item if self.item_ids is None else self.item_ids[item]

    def title(self, item: int) -> str:
        """A readable name of ``item``: its title, else any text it has, else its id."""
        text = self._text(item)
        return text.get("title") or next((t for t in text.values() if t), self._plain_name(item))

    def label(self, item: int) -> str:
        """The id of ``item`` and its title, as reports have them; without ids the title alone."""
        title = self.title(item)
        if self.item_ids is None or title == self._plain_name(item):
            return title
        return f"{self.item_ids[item]}: {title}"

    def _text(self, item: int) -> dict[str, str]:
        if not 0 <= item < self.num_items:
            raise IndexError(f"item {item} of {self.num_items}")
        return self.texts[item] if self.texts is not None else {}

    def _plain_name(self, item: int) -> str:
        return f"item {item}" if self.item_ids is None else self.item_ids[item]

    def index_names(self) -> list[str]:
        """Names of the identifier sets at hand, e.g. ["letter_official", ...], sorted."""
        names = set(self.indexes)
        if self.path is not None:
            names |= {f.name[6:-8] for f in self.path.glob("index.*.json.gz")}
        return sorted(names)

    def index_path(self, name: str) -> Path:
        """The file ``index.<name>.json.gz`` of the data set's folder.

        Raises:
            DataError: there is none; the message lists those there are.
        """
        path = None if self.path is None else self.path / f"index.{name}.json.gz"
        if path is None or not path.is_file():
            raise DataError(
                f"{self.path or self.name}: no file index.{name}.json.gz; "
                f"identifiers at hand: {', '.join(self.index_names()) or 'none'}"
            )
        return path

    def identifiers(self, name: str) -> Identifiers:
        """The identifiers ``name``, from memory or read (and checked) from the folder.

        Raises:
            DataError: there are none of that name, or the file is not an index of these items.
        """
        if name in self.indexes:
            return self.indexes[name]
        return read_index(self.index_path(name), num_items=self.num_items)

    def held_out(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(users, validation items, test items), int64: users with at least 3 events."""
        offsets = self.sequences.offsets
        users = np.flatnonzero(np.diff(offsets) >= 3)
        ends = offsets[users + 1]
        values = self.sequences.values
        return users, values[ends - 2].astype(np.int64), values[ends - 1].astype(np.int64)

    def with_stars_as_behaviours(self) -> Dataset:
        """Let each distinct rating be a behaviour named after its value, so that it decides r_a.

        A data set with behaviours of its own, without ratings, or whose ratings are no stars (one
        is negative, or there are more than 127 distinct ones) is returned as it is.
        """
        if self.behaviours is not None or self.ratings is None:
            return self
        # Adding 0 makes -0.0, whose name would be "-0", a plain 0.
        values, codes = np.unique(self.ratings + np.float32(0), return_inverse=True)
        if len(values) > MAX_BEHAVIOURS or values[0] < 0:
            return self
        # Shortest text without an exponent: "4", "3.5", "1000000"; distinct for distinct values.
        names = tuple(np.format_float_positional(value, trim="-") for value in values)
        return replace(self, behaviours=codes.astype(np.int8), behaviour_names=names)

    def summary(self) -> dict[str, object]:
        """The main counts: users, items, events and the like."""
        lengths = self.sequences.lengths
        result: dict[str, object] = {
            "name": self.name,
            "users": self.num_users,
            "items": self.num_items,
            "interactions": self.num_interactions,
            "items with interactions": len(np.unique(self.sequences.values)),
            "length min / median / mean / max": (
                f"{lengths.min()} / {np.median(lengths):g} / {lengths.mean():.2f} / {lengths.max()}"
            ),
        }
        if self.behaviours is not None:
            counts = np.bincount(self.behaviours, minlength=len(self.behaviour_names))
            for behaviour, count in zip(self.behaviour_names, counts, strict=True):
                result[f"behaviour {behaviour}"] = int(count)
        for side, rows in self.side.items():
            result[f"side {side}"] = len(rows.values)
            result[f"side {side}, dropped as held out"] = self.side_dropped.get(side, 0)
        if self.item_ids is not None:
            result["item ids"] = ", ".join((*list(self.item_ids)[:3], "..."))
        result["ratings"] = self.ratings is not None
        result["times"] = self.times is not None
        result["identifiers"] = self.index_names()
        return result

    def _check_texts(self) -> None:
        """Refuse texts with a lone surrogate here, since no file could hold them later."""
        parts = {
            "user_ids": self.user_ids,
            "behaviour_names": self.behaviour_names,
            "side": list(self.side),
        }
        for name, texts in parts.items():
            _check_unicode(f"{self.name}: {name}", texts)
        for item, fields in enumerate(self.texts or ()):
            _check_unicode(f"{self.name}: texts[{item}]", fields.values(), fields)

    def _check_sequences(self) -> None:
        if len(self.sequences) != len(self.user_ids):
            raise DataError(f"{self.name}: {len(self.sequences)} sequences, {self.num_users} users")
        if not self.user_ids:
            raise DataError(f"{self.name}: there are no users")
        if (self.sequences.lengths == 0).any():
            row = int(np.argmin(self.sequences.lengths))
            raise DataError(f"{self.name}: user {self.user_ids[row]!r} has no interactions")
        check_items(self.sequences, self.num_items, self.user_ids, self.name)
        object.__setattr__(self, "sequences", _as_int32(self.sequences))

    def _set_integers(self, name: str, dtype: type[np.signedinteger[Any]]) -> None:
        try:
            values = integer_array(getattr(self, name), f"{self.name}: {name}", dtype)
        except ValueError as error:
            raise DataError(str(error)) from error
        object.__setattr__(self, name, values)

    def _check_parallel(self) -> None:
        for what in ("behaviours", "ratings", "times"):
            values = getattr(self, what)
            if values is not None and values.shape != self.sequences.values.shape:
                raise DataError(
                    f"{self.name}: {what} must have shape ({self.num_interactions},), one per "
                    f"interaction; got {values.shape}"
                )
        if len(self.behaviour_names) > MAX_BEHAVIOURS:
            raise DataError(
                f"{self.name}: {len(self.behaviour_names)} behaviours, at most {MAX_BEHAVIOURS}"
            )
        if self.behaviours is not None:
            self._set_integers("behaviours", np.int8)
            low, high = int(self.behaviours.min()), int(self.behaviours.max())
            if low < 0 or high >= len(self.behaviour_names):
                raise DataError(
                    f"{self.name}: behaviour codes run from {low} to {high}, "
                    f"but there are {len(self.behaviour_names)} names"
                )
        if self.ratings is not None and not np.isfinite(self.ratings).all():
            at = int(np.flatnonzero(~np.isfinite(self.ratings))[0])
            row = int(np.searchsorted(self.sequences.offsets, at, side="right") - 1)
            raise DataError(
                f"{self.name}: user {self.user_ids[row]!r} has the rating {self.ratings[at]}"
            )
        if self.times is not None:
            self._set_integers("times", np.int64)
            same_user = np.diff(self.sequences.row_of_values()) == 0
            back = np.flatnonzero((np.diff(self.times) < 0) & same_user)
            if len(back):
                at = int(back[0])
                row = int(np.searchsorted(self.sequences.offsets, at, side="right") - 1)
                raise DataError(
                    f"{self.name}: user {self.user_ids[row]!r}: time {self.times[at + 1]} follows "
                    f"{self.times[at]}; sequences must be oldest first"
                )

    def _clean_side(self) -> None:
        users, valid, test = self.held_out()
        # One number per (user, item) pair, so that membership is one sorted search.
        held = np.unique(
            np.concatenate([users * self.num_items + valid, users * self.num_items + test])
        )
        cleaned, dropped = {}, dict(self.side_dropped)
        for side, rows in self.side.items():
            if len(rows) != self.num_users:
                raise DataError(
                    f"{self.name}: side {side}: {len(rows)} rows, {self.num_users} users"
                )
            check_items(rows, self.num_items, self.user_ids, f"{self.name}: side {side}")
            rows = _as_int32(rows)
            pairs = rows.row_of_values() * self.num_items + rows.values
            leak = np.isin(pairs, held)
            dropped[side] = dropped.get(side, 0) + int(leak.sum())
            cleaned[side] = rows.filter(~leak) if leak.any() else rows
        object.__setattr__(self, "side", cleaned)
        object.__setattr__(self, "side_dropped", dropped)


def _check_unicode(where: str, texts: Iterable[str], more: Iterable[str] = ()) -> None:
    try:
        # One call for all of them; which one it is matters only when it fails.
        "".join((*texts, *more)).encode()
    except UnicodeEncodeError:
        lone = next(text for text in (*texts, *more) if find_lone_surrogate(text))
        raise DataError(
            f"{where} must be valid Unicode; got a lone surrogate, {shown(lone)}"
        ) from None


def _as_int32(rows: Ragged) -> Ragged:
    """The rows as they are stored; :func:`check_items` has proved that they fit."""
    return Ragged(rows.offsets, rows.values.astype(np.int32, copy=False))


def check_items(rows: Ragged, num_items: int, user_ids: list[str], where: str) -> None:
    """Raise DataError naming user, position and value of the first item that is out of range."""
    if rows.values.dtype.kind not in "iu" and len(rows.values):
        raise DataError(f"{where}: items must be integers; got {rows.values.dtype}")
    bad = np.flatnonzero((rows.values < 0) | (rows.values >= num_items))
    if len(bad):
        at = int(bad[0])
        row = int(np.searchsorted(rows.offsets, at, side="right") - 1)
        raise DataError(
            f"{where}: user {user_ids[row]!r}, position {at - int(rows.offsets[row])}: item "
            f"{int(rows.values[at])} is unknown, items are 0 .. {num_items - 1}"
        )
