"""Output folders: replaced as a whole, checked by a manifest, and locked by one process.

A folder is complete when its manifest says so: ``manifest.json`` is written last, after all the
other files have reached the disk, and holds their sizes and hashes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gflowgr import files
from gflowgr.errors import DataError, OutputError

__all__ = [
    "MANIFEST_NAME",
    "find_damage",
    "fresh_folder",
    "manifest_facts",
    "output_lock",
    "remove_leftovers",
    "swap_in",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_LOCK = ".lock"
_OWNER = ".lock.json"
_BLOCK = 1 << 20
_THREADS = 4  # hashing and flushing wait for the disk in turn


# ---- complete or not ----


def write_manifest(folder: Path, names: Iterable[str] | None = None, **facts: Any) -> None:
    """Bring ``folder`` to the disk, then record that it is complete.

    Every file is flushed (fsync) and hashed (SHA-256), the folders' entries are flushed, and only
    then the manifest is written and flushed. Costs one read of every file.

    Args:
        folder: the folder; of its subfolders all files belong to it.
        names: its files; none: all there are, but hidden ones.
        **facts: further entries of the manifest, JSON-ready.

    Raises:
        OutputError: the manifest cannot be written.
    """
    listed = _files_of(folder) if names is None else sorted(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda name: _flushed(folder / name), listed))
    for inner in sorted({(folder / name).parent for name in listed} | {folder}):
        files.fsync_folder(inner)
    table = dict(zip(listed, entries, strict=True))
    files.write_json(folder / MANIFEST_NAME, {"format": _FORMAT, **facts, "files": table})


def find_damage(folder: Path) -> str | None:
    """What keeps ``folder`` from being complete, or None: a file that is missing, cut or changed.

    Reads every file of the manifest once. Files that it does not name are ignored.
    """
    try:
        table = _manifest(folder)["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, which is written last"
    except DataError as error:
        return str(error)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _difference(folder / name, name, table[name]), table)
        return next((text for text in found if text is not None), None)


def manifest_facts(folder: Path) -> dict[str, Any]:
    """The entries of the manifest beside the files; none where there is no manifest to be read."""
    try:
        found = _manifest(folder)
    except (FileNotFoundError, DataError):
        return {}
    return {key: value for key, value in found.items() if key not in ("format", "files")}


def _files_of(folder: Path) -> list[str]:
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(str(path) for path in shown if str(path) != MANIFEST_NAME)


def _flushed(path: Path) -> dict[str, Any]:
    files.fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _difference(path: Path, name: str, wanted: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{name} has {size:,} bytes, and had {wanted['bytes']:,} when it was written"
        if _digest(path) != wanted["sha256"]:
            return f"{name} is not what was written: its SHA-256 differs"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    found: dict[str, Any] = files.read_json(path, expect=dict)
    table = found.get("files")
    if found.get("format") != _FORMAT or not isinstance(table, dict):
        raise DataError(f"{path}: not a manifest of format {_FORMAT}")
    for name, entry in table.items():
        whole = isinstance(entry, dict) and isinstance(entry.get("bytes"), int)
        if not whole or not isinstance(entry.get("sha256"), str) or ".." in Path(name).parts:
            raise DataError(f"{path}: {name!r} is no entry of a file")
    return found


# ---- written beside, then swapped in ----


@contextlib.contextmanager
def fresh_folder(
    target: Path, *, is_own: Callable[[str], bool], last: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yield an empty folder; on success its files take the place of those of ``target``.

    Nothing of what was in ``target`` before mixes with what is written now. A folder with files of
    this writer alone is swapped as a whole. Where there are others (a README, checkpoints), or the
    folder cannot be renamed, only this writer's files are exchanged, one after the other; meanwhile
    ``last`` and the manifest are missing, so that an interrupted exchange is no complete folder.

    Args:
        target: the folder; made with its parents if it is not there.
        is_own: whether a file of this name, in ``target``, is one that this writer writes.
        last: names of files without which the folder is not read.

    Raises:
        OutputError: the folder cannot be made.
    """
    target = Path(os.path.realpath(target))
    listed = _listed(target)
    present = os.listdir(target) if target.is_dir() else []
    foreign = [name for name in present if name not in listed and not is_own(name)]
    whole = (
        not foreign and not target.is_mount() and target not in (Path.cwd(), *Path.cwd().parents)
    )
    beside = (target.parent if whole else target) / _temporary(target.name)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise files.output_error(error, target) from error
    try:
        yield beside
        write_manifest(beside)
        if whole:
            swap_in(beside, target)
        else:
            stale = [name for name in present if name in listed or is_own(name)]
            _exchange_files(beside, target, stale, (*last, MANIFEST_NAME))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def swap_in(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; what was there is removed afterwards.

    Killed within, it leaves the old or the new folder under a hidden name, and both whole.
    """
    old = target.with_name(_temporary(target.name, "old"))
    replaces = target.is_dir()
    if replaces:
        target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    files.fsync_folder(target.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a killed process left of writing ``name`` (a shell pattern) in ``folder``."""
    for path in folder.glob(f".{name}.*"):
        if re.search(r"(\.[0-9a-f]{12})?\.(tmp|old)$", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _temporary(name: str, end: str = "tmp") -> str:
    return f".{name}.{secrets.token_hex(6)}.{end}"


def _listed(folder: Path) -> set[str]:
    """First parts of the names in the folder's manifest, if it has one, and the manifest itself."""
    try:
        names = _manifest(folder)["files"]
    except (FileNotFoundError, DataError):
        return {MANIFEST_NAME}
    return {MANIFEST_NAME, *(Path(name).parts[0] for name in names)}


def _exchange_files(source: Path, target: Path, stale: list[str], last: tuple[str, ...]) -> None:
    for name in last:
        (target / name).unlink(missing_ok=True)
    files.fsync_folder(target)  # from here on it is no complete folder
    for name in stale:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        else:
            (target / name).unlink(missing_ok=True)
    names = sorted(path.name for path in source.iterdir() if path.name not in last)
    for name in names:
        os.replace(source / name, target / name)
    files.fsync_folder(target)
    for name in last:
        if (source / name).exists():
            os.replace(source / name, target / name)
    files.fsync_folder(target)


# ---- one process at a time ----


@contextlib.contextmanager
def output_lock(folder: Path | str) -> Iterator[None]:
    """Work in ``folder`` alone: another process, or thread, that has it is a refusal.

    The lock is the operating system's: it goes with its process, however that ends. Within a
    thread it may be taken again. Machines that share the folder see each other's locks, if its file
    system has them (NFS 4 has).

    Raises:
        OutputError: another one works there (the message says which), or the folder cannot be
            written.
    """
    from filelock import FileLock, Timeout

    folder = files.ensure_writable(Path(folder).resolve())
    lock = FileLock(folder / _LOCK, is_singleton=True)
    again = lock.is_locked
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            errno.EBUSY,
            f"{_owner_of(folder)} is working in this folder; wait for its end, or choose another "
            "output folder",
            str(folder),
        ) from error
    try:
        if not again:
            files.write_json(folder / _OWNER, _this_process())
        yield
    finally:
        if not again:
            (folder / _OWNER).unlink(missing_ok=True)
        lock.release()


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }


def _owner_of(folder: Path) -> str:
    try:
        owner = files.read_json(folder / _OWNER, expect=dict)
    except (FileNotFoundError, DataError):
        return "another process"  # it has not written its facts yet
    facts = [owner.get(name, "?") for name in ("pid", "host", "since", "command")]
    return "process {} on {} (since {}: {})".format(*facts)
