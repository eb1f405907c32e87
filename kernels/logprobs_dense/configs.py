"""Tile sizes of ``dense_tiles_kernel``: the named set, the default of a device, and the tuner.

A choice is made once per (device, epilogue, dtype, d, size of V, size of T) by timing the
candidates on the call at hand, kept in memory, and kept on disk in ``$GFLOWGR_TUNE_CACHE`` (a
folder; empty: not on disk; default: ``$TRITON_CACHE_DIR/gflowgr`` or ``~/.cache/gflowgr``).

Nothing is timed, and the default runs, under the interpreter, while a CUDA graph is captured, with
``GFLOWGR_TUNE=0``, in a group of several processes, whose ranks must agree, and under
``torch.use_deterministic_algorithms(True)``: another tile size is another order of summation, and a
run that must repeat another's bits must not depend on timings.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

CACHE_FOLDER = "GFLOWGR_TUNE_CACHE"
TUNE = "GFLOWGR_TUNE"
_REPETITIONS = 5


class Configuration(NamedTuple):
    """A way to run the tile kernel: a tile is [rows, columns], summed over d in steps of depth."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    thirds: bool = False  # float32 as three products of TF32: errors of float32, on tensor cores

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the operands that are under way at once, at most."""
        return self.stages * (self.rows + self.columns) * self.depth * itemsize


# 16-bit operands. "square" keeps two blocks on an SM, so that the epilogue of one hides behind the
# product of the other; "tall" and "wide" re-read less, and have the SM to themselves.
CONFIGURATIONS: dict[str, Configuration] = {
    "square": Configuration(128, 128, 64, 4, 3),
    "square8": Configuration(128, 128, 64, 8, 4),
    "tall": Configuration(256, 128, 64, 8, 3),
    "wide": Configuration(128, 256, 64, 8, 3),
    "plain": Configuration(128, 128, 32, 4, 4),
    "broad": Configuration(64, 256, 32, 4, 4),
    "low": Configuration(64, 128, 64, 4, 3),
    "slim": Configuration(16, 128, 64, 4, 4),
    # float32: multiply-adds ("ieee") or TF32.
    "single": Configuration(64, 64, 32, 4, 3),
    "single_wide": Configuration(64, 128, 32, 8, 3),
    "single_square": Configuration(128, 128, 32, 8, 3),
    "single_thirds": Configuration(128, 64, 32, 8, 3, thirds=True),
    "single_slim": Configuration(16, 64, 32, 4, 3),
    # Small, so that small tests have several tiles in every dimension.
    "interpreted": Configuration(16, 32, 16, 4, 1, 2),
}

_BY_KIND = {
    ("16-bit", "many"): ("square", "square8", "tall", "wide", "plain", "broad"),
    ("16-bit", "some"): ("low", "plain", "broad"),
    ("16-bit", "few"): ("slim", "low"),
    ("32-bit", "many"): ("single_square", "single_wide", "single", "single_thirds"),
    ("32-bit", "some"): ("single", "single_wide"),
    ("32-bit", "few"): ("single_slim", "single"),
}


def shared_limit(capability: int) -> int:
    """Shared memory that a block may have, in bytes (CUDA programming guide, technical data)."""
    kilobytes = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
    return 1024 * kilobytes.get(capability, 99)


def candidates(capability: int, itemsize: int, rows: int) -> list[str]:
    """Names of the configurations that fit, for operands of ``itemsize`` bytes; the default first.

    ``capability`` is 10 * major + minor.
    """
    kind = "16-bit" if itemsize == 2 else "32-bit"
    size = "few" if rows <= 16 else "some" if rows <= 64 else "many"
    # 2 KiB: barriers, and scratch of reductions.
    room = shared_limit(capability) - 2048
    names = [
        name for name in _BY_KIND[kind, size] if CONFIGURATIONS[name].shared_bytes(itemsize) <= room
    ]
    if kind == "16-bit" and size == "many" and capability not in (90, 100, 103, 110):
        # Without wgmma the operands go through registers, and steps of 64 leave too few of them.
        names.sort(key=lambda name: name != "plain")
    return names


_chosen: dict[str, str] = {}


def choose(
    epilogue: int,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, int, int],
    run: Callable[[Configuration], None],
) -> Configuration:
    """Choose for a product of ``shape`` = (rows, columns, d); ``run`` launches it, repeatably."""
    rows, columns, width = shape
    if device.type != "cuda":
        return CONFIGURATIONS["interpreted"]
    major, minor = torch.cuda.get_device_capability(device)
    names = candidates(10 * major + minor, dtype.itemsize, rows)
    if (
        os.environ.get(TUNE, "1") == "0"
        or torch.are_deterministic_algorithms_enabled()
        or _several_ranks()
        or len(names) == 1
    ):
        return CONFIGURATIONS[names[0]]
    key = " ".join(
        (
            torch.cuda.get_device_name(device),
            f"epilogue {epilogue} {dtype} {_precision_key(dtype)}",
            f"d {width} V 2^{(columns - 1).bit_length()} T 2^{(rows - 1).bit_length()}",
        )
    )
    if key not in _chosen:
        known = _read(_file())
        if known.get(key) in names:
            _chosen[key] = known[key]
        elif torch.cuda.is_current_stream_capturing():
            return CONFIGURATIONS[names[0]]
        else:
            _chosen[key] = _fastest(names, run)
            _remember(key, _chosen[key])
    return CONFIGURATIONS[_chosen[key]]


def forget() -> None:
    """Drop the choices that are kept in memory (not those on disk)."""
    _chosen.clear()


def matmul_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot: "tf32" only where torch's own products may use it."""
    if dtype != torch.float32:
        return "tf32"  # which says nothing about 16-bit operands
    settings = torch.backends.cuda.matmul
    # torch 2.9 replaced allow_tf32, and raises when it is read after the new name was set.
    if hasattr(settings, "fp32_precision"):
        return "tf32" if settings.fp32_precision == "tf32" else "ieee"
    return "tf32" if settings.allow_tf32 else "ieee"


def precision(config: Configuration, dtype: torch.dtype) -> str:
    """``input_precision`` of tl.dot for a configuration: "tf32x3" only in the place of "ieee"."""
    found = matmul_precision(dtype)
    return "tf32x3" if config.thirds and found == "ieee" else found


def _several_ranks() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def _precision_key(dtype: torch.dtype) -> str:
    return matmul_precision(dtype) if dtype == torch.float32 else ""


def _fastest(names: list[str], run: Callable[[Configuration], None]) -> str:
    from triton.runtime.errors import OutOfResources

    times: dict[str, float] = {}
    for name in names:
        try:
            run(CONFIGURATIONS[name])
        except OutOfResources:
            continue
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPETITIONS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run(CONFIGURATIONS[name])
            mark.record()
        marks[-1].synchronize()
        times[name] = min(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    if not times:
        raise RuntimeError(f"none of the configurations {', '.join(names)} fits this GPU")
    return min(times, key=lambda name: times[name])


@functools.cache
def _version() -> str:
    import triton

    source = Path(__file__).with_name("tiles.py").read_text()
    made_of = f"{triton.__version__} {torch.__version__} {CONFIGURATIONS} {source}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def _file() -> Path | None:
    folder = os.environ.get(CACHE_FOLDER)
    if folder is None:
        triton_cache = os.environ.get("TRITON_CACHE_DIR")
        folder = str(
            Path(triton_cache) / "gflowgr" if triton_cache else Path.home() / ".cache" / "gflowgr"
        )
    return Path(folder) / f"dense-{_version()}.json" if folder else None


def _read(file: Path | None) -> dict[str, str]:
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        # Not there, or not ours: tune again.
        return {}
    return content if isinstance(content, dict) else {}


def _remember(key: str, name: str) -> None:
    file = _file()
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({**_read(file), key: name}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"the tuned choice is kept in memory only: {error}", stacklevel=2)
