"""Versions, devices, compiled parts and backends: the content of ``gflowgr info``."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gflowgr import __version__, backends
from gflowgr.ops import available_backends
from gflowgr.report.machine import processor_name
from gflowgr.tree.build import host_module

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "transformers",
    "accelerate",
    "scikit-learn",
    "polars",
    "pyarrow",
    "matplotlib",
)


def collect_info() -> dict[str, Any]:
    """Versions, devices, compiled parts, and per op and device the backend that would be used.

    Plain values only (strings, numbers, lists, dicts, None), so that it can be written as JSON. A
    reason of None means "available". Imports no optional package.
    """
    return {
        "gflowgr": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch_cuda": torch.version.cuda,
        "devices": _devices(),
        "compiled": {
            "_host": None if host_module() is not None else "not built: trees are built by NumPy",
            "_C": backends.cpp_missing(),
            "_C_cuda": backends.cuda_missing(),
        },
        "cuda_architectures": [str(each) for each in backends.cuda_architectures()],
        "environment": {
            name: os.environ[name]
            for name in (
                backends.ENVIRONMENT,
                "TRITON_INTERPRET",
                "GFLOWGR_DATA",
                "CUDA_VISIBLE_DEVICES",
            )
            if name in os.environ
        },
        "ops": _ops(),
    }


def format_info(info: dict[str, Any]) -> str:
    """The text of ``gflowgr info`` from what :func:`collect_info` returned."""
    lines = [
        f"gflowgr {info['gflowgr']} in {info['folder']}",
        f"Python {info['python']} on {info['platform']}",
        "",
        "packages",
    ]
    for name, version in info["packages"].items():
        lines.append(f"  {name:<14}{version or '- (not installed)'}")
    lines += ["", "devices"]
    for device in info["devices"]:
        lines.append(f"  {device['device']:<14}{device['name']}")
    lines += ["", "compiled parts"]
    for name, reason in info["compiled"].items():
        lines.append(f"  {name:<14}{'yes' if reason is None else 'no: ' + reason}")
    if info["cuda_architectures"]:
        lines.append(f"  _C_cuda is for {', '.join(info['cuda_architectures'])}")
    if info["environment"]:
        lines += ["", "environment"]
        lines += [f"  {name}={value}" for name, value in info["environment"].items()]
    lines += ["", "ops (* = would be used)"]
    for op, per_device in info["ops"].items():
        for device, choice in per_device.items():
            lines.append(f"  {op} on {device}: {choice['used'] or 'none: ' + choice['error']}")
            for name, reason in choice["backends"].items():
                mark = "*" if name == choice["used"] else " "
                lines.append(
                    f"   {mark} {name:<8}{'available' if reason is None else 'no: ' + reason}"
                )
    return "\n".join(lines)


def _version(name: str) -> str | None:
    if name == "torch":
        return torch.__version__  # with the kind of build, which the metadata may lack
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    devices = [
        {
            "device": "cpu",
            "name": f"{processor_name()}, {os.cpu_count()} cores, {threads} threads, {cpu}",
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.1f} GiB",
            }
        )
    return devices


def _ops() -> dict[str, dict[str, Any]]:
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    ops: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        device = torch.device(kind)
        for op, reasons in available_backends(device).items():
            used, error = None, None
            try:
                used = backends.resolve(op, device, torch.float32)
            except (backends.BackendError, ValueError) as problem:
                error = str(problem)
            ops.setdefault(op, {})[kind] = {"used": used, "error": error, "backends": reasons}
    return ops
