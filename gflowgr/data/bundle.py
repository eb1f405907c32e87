"""Reading and writing a data set's folder (the "bundle" format).

========================  ====================================================================
file                      content
========================  ====================================================================
``inter.json.gz``         {"user": [item, ...]}, items from 0, oldest first; last = test
``item.json.gz``          {"item": {field: text}} for every item 0 .. n - 1 (optional)
``item_ids.json.gz``      ["B00A", ...], the items' ids in the source, by number (optional)
``index.<name>.json.gz``  {"item": ["<a_3>", "<b_7>", ...]} (optional, several; read on demand)
``rating.json.gz``        {"user": [stars, ...]} parallel to inter (optional)
``time.json.gz``          {"user": [Unix seconds, ...]} parallel to inter (optional)
``behaviour.json.gz``     {"user": ["click", ...]} parallel to inter (optional)
``<other>.json.gz``       {"user": [item, ...]} a side behaviour (cart, impression), no order
``truth.npy``             float16 [users, items], true expected reward (built-in data set only)
========================  ====================================================================
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sized
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr.data.dataset import MAX_BEHAVIOURS, Dataset, check_items
from gflowgr.data.index import write_index
from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError, OutputError, shown
from gflowgr.files import ensure_writable, load_npy, read_json, save_npy, write_json_gz
from gflowgr.item_ids import ITEM_IDS_FILE, ItemIds

_PARALLEL = ("rating", "time", "behaviour")
_RESERVED = ("inter", "item", ITEM_IDS_FILE.removesuffix(".json.gz"), *_PARALLEL)
_MAX_NAME = 1000
"""Characters of a behaviour's name."""
_FREE_IDS = 1_000_000
_IDS_PER_ITEM = 20


def load_dataset(path: str | Path) -> Dataset:
    """Read a data set's folder.

    The number of items is that of ``item.json.gz``; without it, that of ``item_ids.json.gz``; then
    that of the first index file; without any, the largest item number + 1, which may then be no
    more than a million, or 20 times the number of different items: models and tables have a row for
    every number. Side pairs whose item
    is the user's validation or test item are dropped and counted (``Dataset.side_dropped``).

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: the folder or its ``inter.json.gz`` is missing.
        DataError: a file is damaged or contradicts another; the message names file, user and value.
    """
    folder = Path(path)
    inter = folder / "inter.json.gz"
    if not _is_there(inter):
        raise FileNotFoundError(f"{folder}: not a data set's folder, it has no inter.json.gz")
    users, sequences = _read_lists(inter, {int}, np.int64)
    if not users:
        raise DataError(f"{inter}: there are no users")
    if (sequences.lengths == 0).any():
        row = int(np.argmin(sequences.lengths))
        raise DataError(f"{inter}: user {users[row]!r} has no interactions")

    side = {}
    for file in sorted(folder.glob("*.json.gz")):
        name = file.name[:-8]
        if name not in _RESERVED and not name.startswith("index."):
            side[name] = _align(file, users, _read_lists(file, {int}, np.int64), complete=False)

    texts = _read_texts(folder / "item.json.gz") if _is_there(folder / "item.json.gz") else None
    item_ids = ItemIds.load(folder)
    num_items = _count_items(folder, texts or item_ids, [sequences, *side.values()])
    check_items(sequences, num_items, users, str(inter))
    for name, rows in side.items():
        check_items(rows, num_items, users, str(folder / f"{name}.json.gz"))

    names, behaviours = _read_behaviours(folder / "behaviour.json.gz", users, sequences)
    ratings = _read_parallel(folder / "rating.json.gz", users, sequences, {int, float}, np.float32)
    times = _read_parallel(folder / "time.json.gz", users, sequences, {int}, np.int64)
    truth = folder / "truth.npy"
    return Dataset(
        name=_name_of(folder),
        path=folder,
        user_ids=users,
        sequences=sequences,
        num_items=num_items,
        behaviours=behaviours,
        behaviour_names=names,
        ratings=ratings,
        times=times,
        side=side,
        texts=texts,
        item_ids=item_ids,
        truth=load_npy(truth, mmap=True) if _is_there(truth) else None,
    )


def check_target(path: str | Path, *, overwrite: bool = False, sides: Iterable[str] = ()) -> None:
    """Check that a data set may be written to ``path``.

    Every ``*.json.gz`` of a data set's folder belongs to the data set, and is replaced with it. So
    a folder that is no data set and has such files of another kind is not to be written to.

    Args:
        path: the folder; it need not exist.
        overwrite: a data set that is there may be replaced.
        sides: names of side behaviours that an interrupted save may have left.

    Raises:
        FileExistsError: the folder has a data set and ``overwrite`` is false, or has other files.
    """
    folder = Path(path)
    if (folder / "inter.json.gz").exists():
        if not overwrite:
            raise FileExistsError(
                f"{folder}: there is a data set already; pass overwrite=True "
                "(--overwrite on the command line) to replace it"
            )
        return
    own = {*_RESERVED, *sides}
    names = [file.name.removesuffix(".json.gz") for file in folder.glob("*.json.gz")]
    foreign = sorted(n for n in names if n not in own and not n.startswith("index."))
    if foreign:
        raise FileExistsError(
            f"{folder}: {foreign[0]}.json.gz is there, which would be taken for a part of the data "
            "set; choose a folder of its own"
        )


def save_dataset(dataset: Dataset, path: str | Path, *, overwrite: bool = False) -> Dataset:
    """Write ``dataset`` to the folder ``path`` in the bundle format.

    Each file is written whole or not at all, ``inter.json.gz`` last: an interrupted save leaves a
    folder that is recognisably no data set.

    Args:
        dataset: what to write; identifiers in memory or in its own folder go along.
        path: the folder; created when missing.
        overwrite: replace a data set that is already there.

    Returns:
        The same data set with ``path`` and ``name`` set to the folder.

    Raises:
        FileExistsError: see :func:`check_target`.
        OutputError: the folder cannot be written.
        ValueError: a side behaviour has a name that the format reserves, or that is no file's, or
            identifiers have one.
    """
    folder = Path(path)
    for name in dataset.side:
        if name in _RESERVED or name.startswith("index.") or not _is_file_name(name):
            raise ValueError(f"side behaviour {name!r}: the name is reserved or not a file name")
    for name in dataset.indexes:
        if not _is_file_name(name):
            raise ValueError(f"identifiers {name!r}: the name is not a file name")
    check_target(folder, overwrite=overwrite, sides=dataset.side)
    # Read everything that may lie in the very folder before anything there is removed.
    indexes = {name: dataset.identifiers(name) for name in dataset.index_names()}
    truth = None if dataset.truth is None else np.array(dataset.truth)
    ensure_writable(folder)
    try:
        for old in [*folder.glob("*.json.gz"), folder / "truth.npy"]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            error.errno or errno.EIO, "cannot replace the old data set", str(folder)
        ) from error

    if dataset.texts is not None:
        texts = {str(item): text for item, text in enumerate(dataset.texts)}
        write_json_gz(folder / "item.json.gz", texts)
    if dataset.item_ids is not None:
        dataset.item_ids.save(folder)
    for name, rows in dataset.side.items():
        write_json_gz(folder / f"{name}.json.gz", _to_lists(dataset.user_ids, rows))
    offsets = dataset.sequences.offsets
    parallel = {"rating": dataset.ratings, "time": dataset.times, "behaviour": dataset.behaviours}
    for name, values in parallel.items():
        if values is not None:
            if name == "behaviour":
                values = np.array(dataset.behaviour_names, dtype=object)[values]
            elif name == "rating":
                # float32 0.1 widens to 0.10000000149: go through its shortest text.
                values = values.astype(np.str_).astype(np.float64)
            write_json_gz(
                folder / f"{name}.json.gz", _to_lists(dataset.user_ids, Ragged(offsets, values))
            )
    for name, identifiers in indexes.items():
        write_index(folder / f"index.{name}.json.gz", identifiers)
    if truth is not None:
        save_npy(folder / "truth.npy", truth)
    write_json_gz(folder / "inter.json.gz", _to_lists(dataset.user_ids, dataset.sequences))
    return replace(dataset, path=folder, name=_name_of(folder))


def _is_file_name(name: str) -> bool:
    return bool(name) and Path(name).name == name and "\0" not in name


def _is_there(file: Path) -> bool:
    """Whether anything has the name, also a pipe or a dead link, which the reader then refuses."""
    return file.exists() or file.is_symlink()


def _name_of(folder: Path) -> str:
    """The folder's name as valid Unicode for reports: a file system's names may be any bytes."""
    return folder.resolve().name.encode(errors="backslashreplace").decode()


def _to_lists(users: list[str], rows: Ragged) -> dict[str, list[Any]]:
    flat, offsets = rows.values.tolist(), rows.offsets.tolist()
    return {user: flat[offsets[i] : offsets[i + 1]] for i, user in enumerate(users)}


def _read_lists(file: Path, types: set[type], dtype: Any) -> tuple[list[str], Ragged]:
    """{"user": [value, ...]} as user keys and Ragged; every value must have one of ``types``."""
    obj = read_json(file, expect=dict)
    users, rows = list(obj), list(obj.values())
    if not set(map(type, rows)) <= {list}:
        user, row = next((u, r) for u, r in obj.items() if type(r) is not list)
        raise DataError(f"{file}: user {user!r} must have a list; got {shown(row, 60)}")
    flat = list(chain.from_iterable(rows))
    if not set(map(type, flat)) <= types:
        wanted = " or ".join(
            sorted({int: "integer", float: "number", str: "text"}[t] for t in types)
        )
        for user, row in obj.items():
            for position, value in enumerate(row):
                if type(value) not in types:
                    raise DataError(
                        f"{file}: user {user!r}, position {position}: {shown(value, 60)} "
                        f"({type(value).__name__}) is not {wanted}"
                    )
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    try:
        with np.errstate(over="ignore"):  # a value beyond float32 becomes inf, which is refused
            values = np.array(flat, dtype=dtype)
    except OverflowError as error:
        largest = shown(max(flat, key=abs))
        raise DataError(f"{file}: a value does not fit 64 bits: {largest}") from error
    return users, Ragged.from_lengths(lengths, values)


def _align(
    file: Path, users: list[str], read: tuple[list[str], Ragged], *, complete: bool
) -> Ragged:
    """Bring the rows of ``read`` into the order of ``users``."""
    keys, rows = read
    if keys == users:
        return rows
    known = {user: row for row, user in enumerate(keys)}
    in_inter = set(users)
    extra = next((key for key in keys if key not in in_inter), None)
    if extra is not None:
        raise DataError(f"{file}: user {extra!r} is not in inter.json.gz")
    missing = next((user for user in users if user not in known), None)
    if missing is not None and complete:
        raise DataError(f"{file}: user {missing!r} of inter.json.gz is missing")
    # A user without a row gets the empty slice [0, 0).
    begin = np.array([rows.offsets[known[u]] if u in known else 0 for u in users], dtype=np.int64)
    end = np.array([rows.offsets[known[u] + 1] if u in known else 0 for u in users], dtype=np.int64)
    return rows.slices(begin, end)


def _read_parallel(
    file: Path, users: list[str], sequences: Ragged, types: set[type], dtype: Any
) -> np.ndarray | None:
    if not _is_there(file):
        return None
    rows = _align(file, users, _read_lists(file, types, dtype), complete=True)
    other = np.flatnonzero(rows.lengths != sequences.lengths)
    if len(other):
        row = int(other[0])
        raise DataError(
            f"{file}: user {users[row]!r} has {rows.lengths[row]} values, "
            f"but {sequences.lengths[row]} interactions in inter.json.gz"
        )
    if rows.values.dtype.kind == "f" and not np.isfinite(rows.values).all():
        at = int(np.flatnonzero(~np.isfinite(rows.values))[0])
        row = int(np.searchsorted(rows.offsets, at, side="right") - 1)
        raise DataError(f"{file}: user {users[row]!r} has the value {rows.values[at]}")
    return rows.values


def _read_behaviours(
    file: Path, users: list[str], sequences: Ragged
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The names of the behaviours, sorted, and the code of each event's."""
    # As objects: NumPy's texts all take the size of the longest, and lose a final NUL.
    found = _read_parallel(file, users, sequences, {str}, object)
    if found is None:
        return (), None
    code = {name: number for number, name in enumerate(sorted(set(found.tolist())))}
    if len(code) > MAX_BEHAVIOURS:
        raise DataError(
            f"{file}: {len(code)} different behaviours, at most {MAX_BEHAVIOURS} are supported"
        )
    long = next((name for name in code if len(name) > _MAX_NAME), None)
    if long is not None:
        raise DataError(
            f"{file}: a behaviour must have at most {_MAX_NAME:,} characters; got {len(long):,}, "
            f"{shown(long, 40)}"
        )
    codes = np.fromiter((code[name] for name in found.tolist()), np.int8, len(found))
    return tuple(code), codes


def _read_texts(file: Path) -> list[dict[str, str]]:
    obj = read_json(file, expect=dict)
    texts = []
    for item in range(len(obj)):
        fields = obj.get(str(item))
        if fields is None:
            raise DataError(
                f"{file}: item {item} is missing; {len(obj)} items must be numbered from 0"
            )
        if type(fields) is not dict:
            raise DataError(
                f"{file}: item {item} must have {{field: text}}; got {shown(fields, 60)}"
            )
        texts.append(
            {
                key: v if type(v) is str else _as_text(file, item, key, v)
                for key, v in fields.items()
            }
        )
    return texts


def _as_text(file: Path, item: int, key: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{file}: item {item}, field {shown(key)}: {shown(value, 60)} is not text")


def _count_items(folder: Path, listed: Sized | None, rows: list[Ragged]) -> int:
    if listed is not None:
        return len(listed)
    index = next(iter(sorted(folder.glob("index.*.json.gz"))), None)
    if index is not None:
        return len(read_json(index, expect=dict))
    having = [r.values for r in rows if len(r.values)]
    count = 1 + max(int(values.max()) for values in having)
    if count > _FREE_IDS:
        different = len(np.unique(np.concatenate(having)))
        if count > max(_FREE_IDS, _IDS_PER_ITEM * different):
            raise DataError(
                f"{folder}: items must be numbered from 0 without large gaps; got item "
                f"{count - 1:,} among {different:,} different ones. Number them anew, or say in "
                "item.json.gz or an index file which items there are"
            )
    return count
