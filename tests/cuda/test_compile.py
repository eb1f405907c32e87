"""The bindings of the CUDA kernels compile against the headers of any torch, CUDA or not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
BINDINGS = sorted((ROOT / "csrc").glob("*/*_cuda.cpp"))


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.name)
def test_bindings_compile_without_cuda(source: Path) -> None:
    """With the definitions of setup.py; no CUDA header is included, so none is needed."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ was not found")
    include = Path(torch.__file__).parent / "include"
    done = subprocess.run(
        [
            *(gxx, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"),
            *("-fvisibility=hidden", "-DUSE_CUDA=1", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *(f"-I{ROOT / 'csrc'}", "-isystem", str(include), str(source)),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
