"""Atomic writers of files, and readers that limit size and name the file in every error.

Every writer goes through :func:`atomic_path`: the bytes land in a temporary file of the same
folder, are flushed to the disk, and only then take the final name. A full disk, a crash or Ctrl-C
in between leaves the old file (or none), never half of a new one.

Every reader begins with :func:`regular_file`, so that a pipe does not block it, and takes no more
text than :func:`max_json_bytes`.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import secrets
import shutil
import stat
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr.errors import DataError, OutputError, shown

_MAX_JSON_BYTES = 1 << 30
_MAX_JSON_VARIABLE = "GFLOWGR_MAX_JSON_BYTES"

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
    """True for errors of writing our own file; an error about another file keeps its type."""
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
    """Write ``text`` as UTF-8, whole or not at all; a lone surrogate as its escape (``\\udcff``).

    Texts are checked when they are read. A text that was not, such as the name of a folder that is
    not UTF-8, must not make the report of a finished run fail.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


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
                raise DataError(f"the key {shown(key)} occurs twice in one object")
            seen.add(key)
    return result


def regular_file(path: str | os.PathLike[str]) -> Path:
    """``path``, when it is a file that ends; opening a pipe would wait for its writer for ever.

    Raises:
        FileNotFoundError: there is nothing of that name.
        DataError: it is a folder, a pipe, a socket or a device, or no name of a file at all.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise DataError(f"{str(path)!r} must be the name of a file: {error}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
        kind = next((name for test, name in kinds.items() if test(mode)), "device")
        raise DataError(f"{path} must be a regular file; got a {kind}")
    return path


def max_json_bytes() -> int:
    """Largest text of a JSON file, unpacked: 1 GiB, or the variable GFLOWGR_MAX_JSON_BYTES.

    A compressed file can name a thousand times its own size; the objects of a text take about six
    times its size in memory.

    Raises:
        ValueError: the variable is not a whole number.
    """
    given = os.environ.get(_MAX_JSON_VARIABLE, str(_MAX_JSON_BYTES))
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise ValueError(f"{_MAX_JSON_VARIABLE} must be a number of bytes; got {shown(given)}")
    return int(given)


def _read_unpacked(path: Path, limit: int) -> bytes:
    """The bytes of a file, unpacked if it is gzip, but never more than ``limit`` of them."""
    too_large = (
        f"{path} must be at most {limit:,} bytes of JSON, unpacked; got more "
        f"(set {_MAX_JSON_VARIABLE} to allow them)"
    )
    with regular_file(path).open("rb") as handle:
        start = handle.read(8)
        handle.seek(0)
        size = os.fstat(handle.fileno()).st_size
        if start[:2] != b"\x1f\x8b":
            if path.suffix == ".gz":
                raise DataError(f"{path}: not a gzip file (it starts with {start!r})")
            if size > limit:
                raise DataError(too_large)
            return handle.read()
        parts, length = [], 0
        try:
            with gzip.GzipFile(fileobj=handle) as unpacked:
                while part := unpacked.read(1 << 20):
                    length += len(part)
                    if length > limit:
                        raise DataError(too_large)
                    parts.append(part)
        except EOFError as error:
            raise DataError(f"{path}: the gzip file is truncated ({size:,} bytes)") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: the gzip file is damaged: {error}") from error
    return b"".join(parts)


def find_lone_surrogate(value: Any) -> str | None:
    """The first text in nested dicts and lists that UTF-8 cannot encode, with its keys; or None.

    JSON and YAML can spell half of a surrogate pair (``"\\ud800"``), which no file takes.
    """
    waiting: list[tuple[Any, Any]] = [(value, None)]
    while waiting:
        found, place = waiting.pop()
        if isinstance(found, str):
            try:
                found.encode()
            except UnicodeEncodeError:
                keys: list[str] = []
                while place is not None:
                    place, key = place
                    keys.append(shown(key, 40))
                return f"{shown(found, 60)} at {'/'.join(reversed(keys)) or 'the top'}"
        elif isinstance(found, dict):
            waiting += ((key, (place, key)) for key in found)
            waiting += ((each, (place, key)) for key, each in found.items())
        elif isinstance(found, list | tuple):
            waiting += ((each, (place, index)) for index, each in enumerate(found))
    return None


def parse_json(raw: bytes) -> Any:
    """The value of JSON text in UTF-8.

    Raises:
        DataError: it is not UTF-8 or not JSON (with line and column), an object has a key twice,
            it is nested too deeply, a number has thousands of digits, or a text has half of a
            surrogate pair. The message does not name the file.
    """
    try:
        obj = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text, byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from error
    except ValueError as error:  # Python's bound on the digits of an integer
        raise DataError(f"a number has too many digits: {error}") from error
    except RecursionError as error:
        raise DataError("the JSON is nested too deeply") from error
    except MemoryError as error:
        raise DataError(f"{len(raw):,} bytes of JSON take more memory than there is") from error
    # Only an escape can spell a lone surrogate: decoding has refused the bytes of one.
    if b"\\ud" in raw or b"\\uD" in raw:
        lone = find_lone_surrogate(obj)
        if lone is not None:
            raise DataError(f"texts must be valid Unicode; got a lone surrogate, {lone}")
    return obj


def read_json(path: str | os.PathLike[str], expect: type | None = None) -> Any:
    """Read a JSON file, plain or gzipped (told by its first bytes, not by its name).

    Args:
        path: the file.
        expect: ``dict`` or ``list``: the type the top level must have.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: no regular file, truncated or damaged gzip, more text than
            :func:`max_json_bytes`, another top-level type, or what :func:`parse_json` refuses.
    """
    path = Path(path)
    raw = _read_unpacked(path, max_json_bytes())
    try:
        obj = parse_json(raw)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if expect is not None and not isinstance(obj, expect):
        names: dict[type, str] = {dict: "an object {...}", list: "an array [...]"}
        raise DataError(
            f"{path}: the top level must be {names.get(expect, expect.__name__)}; "
            f"got {type(obj).__name__}"
        )
    return obj


def load_npy(path: str | os.PathLike[str], *, mmap: bool = False) -> np.ndarray:
    """Read an array in NumPy's ``.npy`` format, without pickled objects.

    Args:
        path: the file.
        mmap: map it read-only, and do not read it into memory.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no regular file, no ``.npy`` file of numbers, or shorter than it says.
    """
    path = regular_file(path)
    try:
        # Mapped first: that compares the header's shape with the file's size before any memory
        # is taken.
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, OverflowError, MemoryError, tokenize.TokenError) as e:
        raise DataError(f"{path}: not a readable .npy file of numbers: {e}") from e
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: not a readable .npy file of numbers: it is an archive (.npz)")
    return array if mmap else np.array(array)


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
