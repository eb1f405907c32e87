"""Other processes: whom a process has started, their CPU time, and where they listen."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_seconds_of", "descendants", "listening"]


def descendants(pid: int) -> dict[int, str]:
    """Titles of the running processes below a process, by their id."""
    parents, titles = dict[int, int](), dict[int, str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
        except OSError:
            continue  # it has ended
        if state != "Z":
            parents[int(folder.name)] = int(parent)
            titles[int(folder.name)] = title.decode(errors="replace").strip()
    found: dict[int, str] = {}
    ahead = [pid]
    while ahead:
        children = [child for child, parent in parents.items() if parent in ahead]
        found |= {child: titles[child] for child in children}
        ahead = children
    return found


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a process so far, in seconds; a tick of the kernel is 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listening(pid: int) -> set[str]:
    """The addresses in hexadecimal, as the kernel shows them, on which a process listens."""
    sockets, found = set(), set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            sockets.add(os.readlink(link))
        except OSError:
            continue  # closed
    for name in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        found |= {
            row[1].partition(":")[0]
            for row in rows
            if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
        }
    return found
