"""Build the CUDA kernels for the emulator (emulate.h) and load them in place of _C_cuda."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from gflowgr import backends

HERE = Path(__file__).parents[1] / "cuda"
SOURCES = HERE.parents[1] / "csrc"
LIBRARY_VARIABLE = "GFLOWGR_EMULATED_LIBRARY"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SCHEDULES = (0, 1, 7)
"""Threads and blocks in ascending order, in descending order, shuffled."""


class CannotEmulate(Exception):
    """The message says what is missing."""


def compiler() -> str:
    """Path of g++; CannotEmulate where there is none that has the sanitizers."""
    found = shutil.which("g++")
    if found is None:
        raise CannotEmulate("g++ was not found")
    done = subprocess.run(
        [found, *SANITIZE, "-x", "c++", "-", "-o", "/dev/null"],
        input="int main() {}",
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise CannotEmulate(f"g++ cannot link with {' '.join(SANITIZE)}: {done.stderr.strip()}")
    return found


def preload(gxx: str) -> str:
    """What must be loaded before all else: AddressSanitizer, and what throws exceptions for it."""
    names = ("libasan.so", "libstdc++.so.6")
    found = [
        subprocess.run([gxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in names
    ]
    return " ".join(str(Path(path.strip()).resolve()) for path in found)


def compile_all(gxx: str, sources: list[Path], folder: Path, options: list[str]) -> list[Path]:
    """Object files of the sources, two at a time; RuntimeError with the compiler's message."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        done = subprocess.run(
            [
                *(gxx, "-std=c++17", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror"),
                # Bindings take long to compile, and no time to run.
                "-O0" if source.name.endswith("_cuda.cpp") else "-O1",
                *("-Wno-unknown-pragmas", *SANITIZE, "-DGFLOWGR_EMULATE", f"-I{HERE}"),
                *(f"-I{SOURCES}", *options, "-x", "c++", "-c"),
                *(str(source), "-o", str(target)),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stderr[-4000:]}")
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def build_library(gxx: str, folder: Path) -> Path:
    """All kernels and their bindings, for CPU tensors."""
    torch_folder = Path(torch.__file__).parent
    kernels, bindings = (sorted(SOURCES.glob(f"*/{name}")) for name in ("*.cu", "*_cuda.cpp"))
    sources = [*kernels, *bindings, HERE / "emulate.cpp"]
    # As in setup.py: the stable ABI as of torch 2.10. Torch's headers are not held to our warnings.
    options = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        str(torch_folder / "include"),
    ]
    objects = compile_all(gxx, sources, folder, options)
    library = folder / "libemulated.so"
    done = subprocess.run(
        [
            *(gxx, "-shared", *SANITIZE, *map(str, objects), "-o", str(library)),
            *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not link:\n{done.stderr[-4000:]}")
    return library


def cpu_backends() -> tuple[str, ...]:
    """Backends for tests on CPU tensors; in the emulator's process only the emulated one."""
    return ("cuda",) if LIBRARY_VARIABLE in os.environ else ("torch", "cpp")


def load_library(path: str) -> None:
    """Register ``gflowgr_cuda`` for CPU tensors, and the backend "cuda" of all ops with it."""
    torch.ops.load_library(path)
    backends.cuda_missing = lambda: None  # type: ignore[assignment]
    import gflowgr.ops  # noqa: F401  # registers them

    gpu = torch.device("cuda")
    for op, probes in backends._registry.items():
        if "cuda" in probes:
            probe = probes["cuda"]
            backends.register(op, "cuda", lambda device, dtype, probe=probe: probe(gpu, dtype))
    global _set_schedule
    _set_schedule = ctypes.CDLL(path).gflowgr_emulate_schedule


_set_schedule = None


@contextmanager
def schedule(order: int) -> Iterator[None]:
    """Run the threads and blocks of all kernels in this order; see SCHEDULES."""
    assert _set_schedule is not None
    _set_schedule(order)
    try:
        yield
    finally:
        _set_schedule(0)
