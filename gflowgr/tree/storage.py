"""Write a prefix tree's buffer to a safetensors file, and read or memory-map it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gflowgr.errors import DataError
from gflowgr.files import atomic_path
from gflowgr.tree.layout import Buffer

_FORMAT = "gflowgr.prefix_tree"
_MAX_HEADER = 1 << 16  # save_file writes about 130 bytes; a longer one is refused


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
    if path.is_dir():
        raise DataError(f"{path}: a prefix tree must be a file; got a folder")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{path}: not a safetensors file (it is {size} bytes long)")
        if length > _MAX_HEADER:
            raise DataError(f"{path}: not a prefix tree saved by PrefixTree.save ({length} bytes)")
        head = file.read(length)
    nbytes = size - 8 - length
    expected = {
        "__metadata__": {"format": _FORMAT},
        "tree": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]},
    }
    try:
        # As text: to Python 0, 0.0 and False are equal.
        same = json.dumps(json.loads(head), sort_keys=True) == json.dumps(expected, sort_keys=True)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the header must be JSON; got {head[:200]!r}") from error
    if not same:
        raise DataError(
            f"{path}: what PrefixTree.save writes must have, before {nbytes} bytes of tree, the "
            f"header {expected}; got {head[:400]!r} (truncated?)"
        )
    return 8 + length, nbytes
