"""Reading long text files line by line, with bad lines counted and remembered."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from gflowgr.errors import DataError

_EXAMPLES = 5


class BadLines:
    """Counts the lines that could not be used and keeps the first few as examples."""

    def __init__(self) -> None:
        self.lines = 0
        self.bad = 0
        self.examples: list[str] = []

    def add(self, place: str, reason: str, text: str = "") -> None:
        """Record one bad line: where it is, what is wrong with it, how it starts."""
        self.bad += 1
        if len(self.examples) < _EXAMPLES:
            shown = f": {text.strip()[:80]!r}" if text else ""
            self.examples.append(f"{place}: {reason}{shown}")

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
            raise FileNotFoundError(f"no such file: {path}")
    return paths


def read_lines(
    paths: Sequence[Path], bad: BadLines, *, progress: bool, encoding: str = "utf-8"
) -> Iterator[tuple[str, str]]:
    """Yield ("file:line", text) for every line that is not blank; gzip is told by the first bytes.

    Undecodable lines are recorded in ``bad`` and skipped. The progress bar counts bytes as stored
    on the disk and shows only on a terminal.

    Raises:
        DataError: a gzip file is truncated or damaged.
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
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if zipped else raw
            try:
                for number, line in enumerate(io.BufferedReader(stream, 1 << 20), start=1):
                    if number % 4096 == 0:
                        bar.update(raw.tell() - bar.n)
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if not line.strip():
                        continue
                    bad.lines += 1
                    place = f"{path.name}:{number}"
                    try:
                        yield place, line.decode(encoding)
                    except UnicodeDecodeError as error:
                        bad.add(place, f"not {encoding} text, byte {error.start}")
            except EOFError as error:
                raise DataError(
                    f"{path}: the gzip file is truncated (after line {number:,})"
                ) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise DataError(
                    f"{path}: the gzip file is damaged after line {number:,}: {error}"
                ) from error
            bar.update(size - bar.n)
