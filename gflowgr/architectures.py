"""GPU architectures inside a compiled library, read from its file: no CUDA, no other program.

nvcc puts machine code (ELF) and PTX in "fat binaries": a header of 16 bytes, then entries with a
header of their own each. The layout is not documented by NVIDIA; where a file has another one,
nothing is found and nothing is claimed.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQ")  # kind, version, bytes of this header, bytes of what follows
_ARCHITECTURE = struct.Struct("<I")
_PLACE_OF_ARCHITECTURE = 28
_KINDS = {1: "compute", 2: "sm"}


class Architecture(NamedTuple):
    """What a library has code for.

    Attributes:
        kind: "sm", machine code, which runs on its own generation from its version on; or
            "compute", PTX, which the driver compiles for any GPU from its version on.
        capability: 10 * major + minor, such as 90.
    """

    kind: str
    capability: int

    def __str__(self) -> str:
        return f"{self.kind}_{self.capability}"

    def runs_on(self, capability: int) -> bool:
        """Whether a GPU of this capability runs it."""
        same = self.capability // 10 == capability // 10
        return self.capability <= capability and (same or self.kind == "compute")


def read_architectures(path: Path) -> tuple[Architecture, ...]:
    """All of a library's, ascending; none where there are none or the layout is another."""
    data = path.read_bytes()
    found: set[Architecture] = set()
    place = data.find(_MAGIC)
    while place >= 0:
        _, _, size, total = _HEADER.unpack_from(data.ljust(place + _HEADER.size), place)
        if size == _HEADER.size and place + size + total <= len(data):
            found |= _entries(data[place + size : place + size + total])
        place = data.find(_MAGIC, place + 4)
    return tuple(sorted(found, key=lambda each: (each.capability, each.kind)))


def _entries(data: bytes) -> set[Architecture]:
    found, place = set(), 0
    while place + _PLACE_OF_ARCHITECTURE + 4 <= len(data):
        kind, _, size, total = _ENTRY.unpack_from(data, place)
        (capability,) = _ARCHITECTURE.unpack_from(data, place + _PLACE_OF_ARCHITECTURE)
        if kind not in _KINDS or size < _PLACE_OF_ARCHITECTURE + 4:
            break
        found.add(Architecture(_KINDS[kind], capability))
        place += size + total
    return found
