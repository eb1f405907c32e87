"""Files that are written whole or not at all, and JSON whose faults are named.

Every writer goes through :func:`atomic_path`: the bytes land in a temporary file of the same
folder, are flushed to the disk, and only then take the final name. A full disk, a crash or Ctrl-C
in between leaves the old file (or none), never half of a new one.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr.errors import DataError, OutputError

_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EIO: "the device reported an input/output error",
}
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def output_error(error: OSError, path: Path) -> OutputError:
    """The OutputError that says why ``path`` cannot be written."""
    code = error.errno if error.errno is not None else errno.EIO
    reason = _REASONS.get(code, error.strerror or str(error))
    return OutputError(code, f"cannot write: {reason}", str(path))


def _is_write_failure(error: OSError, temporary: Path) -> bool:
    """True for errors of our own output; an error about some other file keeps its own type."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return True
    # numpy reports a short write as an OSError without an errno.
    if error.errno is None:
        return "written" in str(error)
    return error.filename is not None and str(error.filename) == str(temporary)


def fsync(path: Path) -> None:
    """Flush a file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk: a rename is durable only then.

    Some file systems cannot do that, which is no error.
    """
    try:
        fsync(path)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise output_error(error, path) from error


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it becomes ``path``.

    The folder is created when missing. On success the file is flushed (fsync) and renamed over
    ``path``; on any exception, KeyboardInterrupt included, it is removed and ``path`` stays as it
    was. The temporary name keeps the suffix of ``path``, because some writers choose a format by
    it.

    Raises:
        OutputError: the file cannot be written (read-only, no space, no permission, a folder in the
            way).
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}.tmp{target.suffix}")
    if target.is_dir():
        raise OutputError(errno.EISDIR, "cannot write: a folder has this name", str(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise output_error(error, target) from error
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if _is_write_failure(error, temporary):
            raise output_error(error, target) from error
        raise
    finally:
        # Gone already when the rename went through.
        with contextlib.suppress(OSError):
            temporary.unlink()
    fsync_folder(target.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], obj: Any, *, indent: int | None = 2) -> None:
    """Write ``obj`` as JSON (UTF-8), whole or not at all."""
    write_text(path, json.dumps(obj, indent=indent, ensure_ascii=False) + "\n")


def write_json_gz(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as compact gzipped JSON; the same object always gives the same bytes."""
    text = json.dumps(obj, separators=(",", ":"), ensure_ascii=False)
    # mtime 0 and no file name in the header: equal content, equal file.
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0))


def save_npy(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write ``array`` in NumPy's ``.npy`` format (no pickled objects), whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, array, allow_pickle=False)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DataError(f"the key {key!r} occurs twice in one object")
            seen.add(key)
    return result


def read_json(path: str | os.PathLike[str], expect: type | None = None) -> Any:
    """Read a JSON file, plain or gzipped (told by its first bytes, not by its name).

    Args:
        path: the file.
        expect: ``dict`` or ``list``: the type the top level must have.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: truncated or damaged gzip, text that is not UTF-8, bad JSON (with line and
            column), a key that occurs twice, another top-level type.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except EOFError as error:
            raise DataError(f"{path}: the gzip file is truncated ({len(raw):,} bytes)") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: the gzip file is damaged: {error}") from error
    elif path.suffix == ".gz":
        raise DataError(f"{path}: not a gzip file (it starts with {raw[:8]!r})")
    try:
        obj = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text, byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if expect is not None and not isinstance(obj, expect):
        names: dict[type, str] = {dict: "an object {...}", list: "an array [...]"}
        raise DataError(
            f"{path}: the top level must be {names.get(expect, expect.__name__)}, "
            f"got {type(obj).__name__}"
        )
    return obj


def ensure_writable(folder: str | os.PathLike[str], *, min_free_bytes: int = 1 << 20) -> Path:
    """Create ``folder`` and prove, by writing and removing a small file, that it takes output.

    Called before long work starts, so that a read-only or full disk is found at once.

    Args:
        folder: the output folder; missing parents are created.
        min_free_bytes: free space that must be there.

    Raises:
        OutputError: it is read-only, full, not a folder, or not permitted.
    """
    folder = Path(folder)
    probe = folder / f".probe.{secrets.token_hex(6)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < min_free_bytes:
            raise OutputError(
                errno.ENOSPC,
                f"cannot write: {free:,} bytes free, {min_free_bytes:,} needed",
                str(folder),
            )
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            os.write(handle, bytes(4096))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OutputError:
        raise
    except OSError as error:
        raise output_error(error, folder) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return folder
