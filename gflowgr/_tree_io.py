"""Where a saved prefix tree lies within its safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gflowgr._tree_layout import Buffer
from gflowgr.errors import DataError
from gflowgr.files import atomic_path

_FORMAT = "gflowgr.prefix_tree"


def write_buffer(path: str | os.PathLike[str], buffer: Tensor) -> None:
    """Write the buffer as the one tensor of a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({"tree": buffer.cpu()}, temporary, metadata={"format": _FORMAT})


def read_buffer(path: str | os.PathLike[str], *, mmap: bool) -> Buffer:
    """Read or map the buffer of a file of :func:`write_buffer`; DataError names the file."""
    offset, nbytes = _locate(Path(path))
    if mmap:
        # Copy-on-write: PyTorch wants writable memory, and nothing is ever written.
        mapped: npt.NDArray[np.uint8] = np.memmap(
            path, dtype=np.uint8, mode="c", offset=offset, shape=(nbytes,)
        )
        return mapped
    return np.fromfile(path, dtype=np.uint8, count=nbytes, offset=offset)


def _locate(path: Path) -> tuple[int, int]:
    """Offset and size of the buffer within a safetensors file; or DataError."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{path}: not a safetensors file (it is {size} bytes long)")
        head = file.read(length)
    try:
        header = json.loads(head)
        kind = header["__metadata__"]["format"]
        entry: dict[str, Any] = header["tree"]
        begin, end = entry["data_offsets"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a prefix tree saved by PrefixTree.save") from error
    if kind != _FORMAT or entry["dtype"] != "U8" or end - begin != size - 8 - length:
        raise DataError(
            f"{path}: expected format {_FORMAT} and {end - begin} bytes of tree, "
            f"got {kind} and {size - 8 - length} bytes (truncated?)"
        )
    return 8 + length + begin, end - begin
