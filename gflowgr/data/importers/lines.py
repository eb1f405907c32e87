"""Reading long text files line by line, with bad lines counted and remembered."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, cast

from gflowgr.errors import DataError

_EXAMPLES = 5
MAX_LINE = 16 << 20
# Packed text of real logs grows 3 to 30 times; what grows more, and to this size, is a bomb.
_MAX_GROWTH = 200
_FREE_GROWTH = 256 << 20
_BOMS = (
    # The longer mark first: UTF-32's begins with UTF-16's.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_OTHER_PACKINGS = {
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}


class BadLines:
    """Counts the lines that could not be used and keeps the first few as examples."""

    def __init__(self) -> None:
        self.lines = 0
        self.bad = 0
        self.latin = 0
        self.examples: list[str] = []

    def add(self, place: str, reason: str, text: str = "") -> None:
        """Record one bad line: where it is, what is wrong with it, how it starts."""
        self.bad += 1
        if len(self.examples) < _EXAMPLES:
            shown = f": {text.strip()[:80]!r}" if text else ""
            self.examples.append(f"{place}: {reason}{shown}")

    def more(self, count: int) -> None:
        """Record ``count`` further bad lines, of which there are examples enough."""
        self.bad += count

    @property
    def wants_examples(self) -> int:
        """How many more examples are kept."""
        return _EXAMPLES - len(self.examples)

    def check(self, source: str, max_bad_fraction: float) -> None:
        """Raise DataError when there is no line at all, or the bad share is above the limit."""
        if self.lines == 0:
            raise DataError(f"{source}: there are no lines")
        if self.bad > max_bad_fraction * self.lines:
            listed = "\n  ".join(self.examples)
            raise DataError(
                f"{source}: {self.bad:,} of {self.lines:,} lines are bad, more than "
                f"max_bad_fraction = {max_bad_fraction:g} allows. The first:\n  {listed}"
            )


def as_paths(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """One or several files as a list; each must exist.

    Raises:
        FileNotFoundError: one does not exist.
        ValueError: the list is empty.
    """
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(p) for p in source]
    if not paths:
        raise ValueError("no files given")
    for path in paths:
        if not path.is_file():
            kind = "this is a folder, not a file" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{kind}: {path}")
    return paths


class _Bounded(io.RawIOBase):
    """The unpacked bytes of a packed file, until they grow beyond all measure."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path, self._read = stream, path, 0
        self._limit = max(_FREE_GROWTH, _MAX_GROWTH * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        chunk = self._stream.read(len(buffer))
        self._read += len(chunk)
        if self._read > self._limit:
            raise DataError(
                f"{self._path}: the packed file grows beyond {self._limit:,} bytes, more than "
                f"{_MAX_GROWTH} times its size; unpack it first if that is meant"
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)


def _only_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    members = [
        m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        names = ", ".join(m.filename for m in members[:5]) or "nothing"
        raise DataError(
            f"{path}: a zip archive must hold exactly one file to be read as it is; got "
            f"{len(members)} ({names}): unpack it first"
        )
    return members[0]


@contextlib.contextmanager
def open_bytes(path: Path, raw: BinaryIO | None = None) -> Iterator[io.BufferedReader]:
    """The bytes of ``path``, unpacked when it is gzip, bzip2, xz or a zip of one file.

    The packing is told by the first bytes. Unpacked bytes are bounded (a bomb is an error).

    Args:
        path: the file.
        raw: the same file opened by the caller, who may follow its position.

    Raises:
        DataError: the packing is damaged, cut off, of another kind, encrypted, or a bomb.
    """
    with contextlib.ExitStack() as stack:
        if raw is None:
            raw = stack.enter_context(open(path, "rb"))
        head = raw.read(6)
        raw.seek(0)
        kind = "gzip"
        try:
            if head[:2] == b"\x1f\x8b":
                stream = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=raw)))
            elif head[:3] == b"BZh":
                kind = "bzip2"
                stream = cast(BinaryIO, stack.enter_context(bz2.BZ2File(raw)))
            elif head == b"\xfd7zXZ\x00":
                kind = "xz"
                stream = cast(BinaryIO, stack.enter_context(lzma.LZMAFile(raw)))
            elif head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                kind = "zip"
                archive = stack.enter_context(zipfile.ZipFile(raw))
                member = archive.open(_only_member(archive, path))
                stream = cast(BinaryIO, stack.enter_context(member))
            else:
                for mark, name in _OTHER_PACKINGS.items():
                    if head.startswith(mark):
                        raise DataError(f"{path}: packed with {name}; unpack it first")
                yield io.BufferedReader(cast(io.RawIOBase, raw), 1 << 20)
                return
            yield io.BufferedReader(_Bounded(stream, path), 1 << 20)
        except EOFError as error:
            raise DataError(f"{path}: the {kind} file is truncated") from error
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: the {kind} file is damaged: {error}") from error
        except (NotImplementedError, RuntimeError) as error:
            if kind != "zip":
                raise
            raise DataError(f"{path}: the zip file cannot be read: {error}") from error
        except OSError as error:
            # bz2 reports damage as a bare OSError without a number.
            if kind != "bzip2" or error.errno is not None:
                raise
            raise DataError(f"{path}: the bzip2 file is damaged: {error}") from error


def encoding_of(head: bytes) -> str | None:
    """The encoding of a byte order mark at the start of a text, e.g. "utf-16"."""
    return next((name for mark, name in _BOMS if head.startswith(mark)), None)


def check_encoding(encoding: str | None) -> None:
    """Raise ValueError for an encoding that Python does not know as one of texts."""
    if encoding is None:
        return
    try:
        "".encode(encoding)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"encoding must be one such as 'latin-1'; got {encoding!r}") from error


def decode_latin(line: bytes) -> str:
    """Windows-1252, which is Latin-1 with letters where that has control characters."""
    try:
        return line.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no character there
        return line.decode("latin-1")


def _byte_lines(stream: io.BufferedReader, path: Path) -> Iterator[bytes | None]:
    """Lines as UTF-8 or in the file's own single-byte code; None for one that is too long."""
    wide = encoding_of(stream.peek(4)[:4])
    if wide in ("utf-16", "utf-32"):
        text = io.TextIOWrapper(stream, encoding=wide, newline="\n")
        try:
            while wide_line := text.readline(MAX_LINE):
                yield wide_line.encode("utf-8", "surrogatepass")
        except UnicodeError as error:
            raise DataError(f"{path}: not {wide} text: {error}") from error
        return
    first = True
    while line := stream.readline(MAX_LINE):
        if first:
            line, first = line.removeprefix(codecs.BOM_UTF8), False
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line


def read_lines(
    paths: Sequence[Path], bad: BadLines, *, progress: bool, latin: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line that is not blank; packing is told by first bytes.

    Text is UTF-8, or UTF-16 and UTF-32 with a byte order mark. Other lines are recorded in ``bad``
    and skipped; with ``latin`` they are read as Latin-1 and counted. Lines of more than 16 MiB are
    bad. The progress bar counts bytes as stored on the disk and shows only on a terminal.

    Raises:
        DataError: a packed file is truncated, damaged or a bomb.
    """
    from tqdm import tqdm

    for path in paths:
        number = 0
        size = path.stat().st_size
        with (
            open(path, "rb") as raw,
            tqdm(
                total=size,
                unit="B",
                unit_scale=True,
                desc=path.name,
                disable=None if progress else True,
            ) as bar,
        ):
            try:
                with open_bytes(path, raw) as stream:
                    for number, line in enumerate(_byte_lines(stream, path), start=1):
                        if number % 4096 == 0:
                            bar.update(raw.tell() - bar.n)
                        place = f"{path.name}:{number}"
                        if line is None:
                            bad.lines += 1
                            bad.add(place, f"longer than {MAX_LINE:,} bytes")
                            continue
                        if not line.strip():
                            continue
                        bad.lines += 1
                        try:
                            text = line.decode()
                        except UnicodeDecodeError as error:
                            if not latin:
                                bad.add(place, f"not utf-8 text, byte {error.start}")
                                continue
                            bad.latin += 1
                            text = decode_latin(line)
                        yield place, text
            except DataError as error:
                if number and str(error).startswith(f"{path}: the "):
                    raise DataError(f"{error} (after line {number:,})") from error
                raise
            bar.update(size - bar.n)
