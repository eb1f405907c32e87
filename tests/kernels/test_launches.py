"""Every launch happens on the device of its tensors; seen from the sources, without two GPUs."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = {
    "gflowgr.kernels." + ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts): path
    for path in (ROOT / "kernels").rglob("*.py")
}


def called_from_the_package() -> set[tuple[str, str]]:
    """Module and name of what the package imports from the kernels."""
    found = set()
    for path in (ROOT / "gflowgr").rglob("*.py"):
        if "kernels" in path.relative_to(ROOT / "gflowgr").parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in KERNELS:
                found |= {(node.module, alias.name) for alias in node.names}
    return found


def test_the_package_enters_the_kernels_by_functions_that_set_the_device() -> None:
    entries = called_from_the_package()
    modules = {name for name, _ in entries}
    assert {"gflowgr.kernels.tree.walk", "gflowgr.kernels.logprobs_dense.calls"} <= modules
    for module, name in entries:
        for node in ast.parse(KERNELS[module].read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                assert "on_device" in decorators, (module, name)


def test_every_cuda_file_launches_within_a_device_guard() -> None:
    """A launch takes its stream from ``Launch``, which also sets the device."""
    files = sorted((ROOT / "csrc").rglob("*_cuda.cpp"))
    assert len(files) >= 4
    for path in files:
        functions = [part for part in path.read_text().split("\n}\n") if "check_launch(" in part]
        assert functions, path
        for function in functions:
            before = function[: function.index("check_launch(")]
            assert before.count("binding::Launch launch(") == 1, (path, function)
