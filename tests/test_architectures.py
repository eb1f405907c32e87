"""Which GPUs a compiled library has code for, as its file, `gflowgr info` and the probe say it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from gflowgr import backends
from gflowgr.architectures import Architecture, read_architectures
from gflowgr.report.info import collect_info, format_info

GPU = torch.device("cuda", 0)


@pytest.mark.process
def test_what_nvcc_was_asked_for_is_read_from_the_file(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source = tmp_path / "kernel.cu"
    source.write_text("__global__ void kernel(float* x) { *x = 1; }")
    targets = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
    subprocess.run(
        [nvcc, "-c", *(f"-gencode={t}" for t in targets), str(source), "-o", str(tmp_path / "k.o")],
        check=True,
    )
    found = read_architectures(tmp_path / "k.o")
    assert list(map(str, found)) == ["sm_80", "compute_90", "sm_90"]


@pytest.mark.parametrize(
    "content", [b"", b"no library", bytes.fromhex("50ed55ba"), b"\x50\xed\x55\xba" * 9]
)
def test_nothing_is_claimed_of_other_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(content)
    assert read_architectures(path) == ()


@pytest.mark.parametrize(
    ("kind", "capability", "runs_on"),
    [("sm", 80, {80, 86, 89}), ("sm", 90, {90}), ("compute", 86, {86, 89, 90, 120})],
)
def test_machine_code_stays_in_its_generation_and_ptx_does_not(
    kind: str, capability: int, runs_on: set[int]
) -> None:
    able = {c for c in (75, 80, 86, 89, 90, 120) if Architecture(kind, capability).runs_on(c)}
    assert able == runs_on


@pytest.mark.parametrize(("major", "minor"), [(9, 0), (8, 6)])
def test_a_build_for_another_gpu_says_so(
    major: int, minor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "cuda_missing", lambda: None)
    monkeypatch.setattr(backends, "cuda_architectures", lambda: (Architecture("sm", 80),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
    backends._wrong_architecture.cache_clear()
    reason = backends.probe_cuda(GPU, torch.float32)
    backends._wrong_architecture.cache_clear()
    if major == 8:
        assert reason is None
    else:
        assert reason is not None
        assert "built for sm_80, this GPU is sm_90" in reason
        assert "GFLOWGR_CUDA_ARCHS=9.0" in reason


def test_info_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Architecture("sm", 90), Architecture("compute", 90))
    monkeypatch.setattr(backends, "cuda_architectures", lambda: found)
    info = collect_info()
    assert info["cuda_architectures"] == ["sm_90", "compute_90"]
    assert "_C_cuda is for sm_90, compute_90" in format_info(info)


def test_rocm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    reason = backends.probe_triton(GPU, torch.float32)
    assert reason is not None
    assert reason.startswith("ROCm")
