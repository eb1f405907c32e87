"""Build of the compiled parts; everything declarative is in pyproject.toml.

Three extensions, each optional (what cannot be built is reported; PyTorch or NumPy does its work):

    gflowgr._host    pybind11, no torch: building the prefix tree
    gflowgr._C       CPU kernels, LibTorch stable ABI
    gflowgr._C_cuda  CUDA kernels, LibTorch stable ABI

Environment switches:

    GFLOWGR_NO_EXT=1      build nothing
    GFLOWGR_CUDA          auto (default): build _C_cuda when a CUDA toolkit and a CUDA build of
                          torch are there; 0: never; 1: fail when it cannot be built
    GFLOWGR_CUDA_ARCHS    e.g. "8.0;9.0" (or TORCH_CUDA_ARCH_LIST); default: the visible GPUs, or
                          without one all from 8.0 that the toolkit knows
    GFLOWGR_SANITIZE=1    for tests/sanitize.sh: with sanitizers of address and behaviour
    MAX_JOBS              compile jobs of ninja
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
# The stable ABI is used as of torch 2.10 (parallel_for and TORCH_BOX came with it): one build
# serves 2.10 and all later versions. With torch 2.8 or 2.9 the package works without them.
STABLE_ABI = (2, 10)
STABLE_ABI_DEFINE = "TORCH_TARGET_VERSION", f"0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
TORCH_REQUIREMENT = "torch>=2.8"
BUILD_ERRORS = (BaseError, CCompilerError, RuntimeError, OSError, subprocess.SubprocessError)


def switch(name: str, default: str) -> str:
    return os.environ.get(name, "").strip().lower() or default


# Undefined behaviour ends the process too, so that no test passes over it.
SANITIZERS = (
    ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    if switch("GFLOWGR_SANITIZE", "0") == "1"
    else []
)


def warn(message: str) -> None:
    line = "*" * 88
    print(f"\n{line}\ngflowgr: WARNING: {message}\n{line}\n", file=sys.stderr, flush=True)


def find_torch() -> ModuleType | None:
    """torch, also from under build isolation.

    An isolated build hides the environment's packages, and would download a torch of several GB
    only to read its headers. The environment that is installed into is still known by its prefix.
    """
    if importlib.util.find_spec("torch") is None:
        prefixes = [sys.prefix, os.environ.get("VIRTUAL_ENV", "")]
        for prefix in filter(None, prefixes):
            places = {"base": prefix, "platbase": prefix}
            for key in ("purelib", "platlib"):
                folder = sysconfig.get_path(key, vars=places)
                if (Path(folder) / "torch" / "version.py").is_file() and folder not in sys.path:
                    sys.path.append(folder)  # last: the build's own setuptools and pybind11 win
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        import torch
    except (ImportError, OSError) as error:
        warn(f"torch was found but cannot be imported ({error}); building without it.")
        return None
    return torch


def reason(error: BaseException) -> str:
    """Why nothing was compiled: the error, which hardly names a compiler that is not there."""
    named = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    if os.name == "nt" or any(map(shutil.which, named)):
        return str(error)
    return f"{error}: no C++ compiler was found; install one, such as g++, and install again"


def compile_flags() -> list[str]:
    if os.name == "nt":
        return ["/O2", "/std:c++17"]
    common = ["-std=c++17", "-fvisibility=hidden"]
    return [*common, "-O1", "-g1", *SANITIZERS] if SANITIZERS else [*common, "-O3", "-g0"]


def host_extension(torch: ModuleType | None) -> Extension | None:
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        include = pybind11.get_include()
    elif torch is not None:  # torch carries pybind11's headers
        include = str(Path(torch.__file__).parent / "include")
    else:
        warn("pybind11 is not installed; the prefix tree will be built by NumPy.")
        return None
    return Extension(
        "gflowgr._host",
        ["csrc/tree/host_bindings.cpp", "csrc/tree/tree_build.cpp", "csrc/tree/tree_check.cpp"],
        include_dirs=[str(ROOT / "csrc"), include],
        extra_compile_args=compile_flags(),
        extra_link_args=SANITIZERS,
        language="c++",
    )


def locate_cuda_toolkit() -> None:
    """Set CUDA_HOME where torch would guess it wrong: from an nvcc that is a link or a wrapper.

    torch takes the folder above the one that nvcc was found in; nvcc itself knows where it belongs.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    if (Path(nvcc).parents[1] / "include" / "cuda_runtime.h").is_file():
        return
    dry = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    for line in subprocess.run(dry, capture_output=True, text=True).stderr.splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "_HERE_" and (Path(value).parent / "include" / "cuda_runtime.h").is_file():
            os.environ["CUDA_HOME"] = str(Path(value).parent)


def toolkit_version(cuda_home: str) -> str | None:
    """Version of the CUDA toolkit, such as "13.0"; None if its nvcc does not say."""
    nvcc = Path(cuda_home) / "bin" / "nvcc"
    try:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+\.\d+)", answer)
    return found.group(1) if found else None


def cuda_archs(torch: ModuleType, cuda_version: tuple[int, int]) -> str | None:
    """Value for TORCH_CUDA_ARCH_LIST, or None to let torch take those of the visible GPUs."""
    given = os.environ.get("GFLOWGR_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    if torch.cuda.is_available():
        return None
    known = ["8.0", "8.6"]
    if cuda_version >= (11, 8):
        known += ["8.9", "9.0"]
    if cuda_version >= (12, 8):
        known += ["10.0", "12.0"]
    return ";".join(known) + "+PTX"


def torch_extensions(torch: ModuleType | None) -> list[Extension]:
    wanted = switch("GFLOWGR_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"GFLOWGR_CUDA={wanted!r}, expected 0, 1 or auto")
    why_no_cuda = None
    if torch is None:
        why_no_cuda = "torch is not installed"
        warn("torch is not installed: gflowgr._C and gflowgr._C_cuda are not built.")
        extensions = []
    else:
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < STABLE_ABI:
            why_no_cuda = f"torch {torch.__version__} is older than {STABLE_ABI[0]}.{STABLE_ABI[1]}"
            warn(f"{why_no_cuda}: gflowgr._C is not built, PyTorch definitions run instead.")
            extensions = []
        else:
            locate_cuda_toolkit()
            from torch.utils import cpp_extension

            common: dict[str, Any] = {
                "include_dirs": [str(ROOT / "csrc")],
                "define_macros": [STABLE_ABI_DEFINE],
                "py_limited_api": True,  # no Python in them: loaded with torch.ops.load_library
            }
            flags = compile_flags()
            extensions = [
                cpp_extension.CppExtension(
                    "gflowgr._C",
                    sorted(map(str, Path("csrc").glob("*/*_cpu.cpp"))),
                    extra_compile_args=flags,
                    extra_link_args=SANITIZERS,
                    **common,
                )
            ]
            home = cpp_extension.CUDA_HOME
            toolkit = None if home is None else toolkit_version(home)
            if torch.version.cuda is None:
                why_no_cuda = "this torch has no CUDA"
            elif home is None:
                why_no_cuda = "no CUDA toolkit was found (CUDA_HOME)"
            elif toolkit is None or toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
                # torch refuses to build with another major version, and the CPU part with it.
                why_no_cuda = (
                    f"the CUDA toolkit in {home} is of version {toolkit or 'unknown'}, "
                    f"torch was built with {torch.version.cuda}"
                )
                if wanted != "0":
                    warn(f"{why_no_cuda}: gflowgr._C_cuda is not built.")
            elif wanted != "0":
                # An nvcc older than torch's CUDA does not know the newest architectures.
                versions = (torch.version.cuda, toolkit)
                parts = [tuple(int(part) for part in v.split(".")[:2]) for v in versions]
                archs = cuda_archs(torch, min(parts))
                if archs is not None:
                    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
                common["define_macros"] = [STABLE_ABI_DEFINE, ("USE_CUDA", "1")]
                cuda_flags = {
                    "cxx": flags,
                    "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr"],
                }
                sources = [
                    *sorted(map(str, Path("csrc").glob("*/*_cuda.cpp"))),
                    *sorted(map(str, Path("csrc").glob("*/*.cu"))),
                ]
                extensions.append(
                    cpp_extension.CUDAExtension(
                        "gflowgr._C_cuda", sources, extra_compile_args=cuda_flags, **common
                    )
                )
    if wanted == "1" and why_no_cuda is not None:
        raise SystemExit(f"GFLOWGR_CUDA=1, but {why_no_cuda}.")
    return extensions


def build_command(torch: ModuleType | None) -> type[build_ext]:
    base: Any = build_ext
    if torch is not None:
        from torch.utils.cpp_extension import BuildExtension

        base = BuildExtension

    class OptionalBuild(base):  # type: ignore[misc]
        """Builds what it can: an extension that fails is reported and left out."""

        def build_extensions(self) -> None:
            self.built: list[Extension] = []
            try:
                super().build_extensions()
            except BUILD_ERRORS as error:  # checks of the compiler, before any extension
                self.give_up("the compiled parts", error)
                for ext in self.extensions:
                    self.note(ext, error)
            self.extensions = self.built

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
                self.built.append(ext)
                self.note(ext, None)
            except BUILD_ERRORS as error:
                self.give_up(ext.name, error)
                self.note(ext, error)

        def note(self, ext: Extension, error: BaseException | None) -> None:
            """Leave beside where the extension would be why it is not there: pip hides warnings."""
            place = Path(self.get_ext_fullpath(ext.name))
            path = place.with_name(f"{ext.name.rpartition('.')[2]}.not_built.txt")
            path.unlink(missing_ok=True)
            if error is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(" ".join(reason(error).split())[-400:] + "\n", encoding="utf-8")

        def give_up(self, what: str, error: BaseException) -> None:
            if switch("GFLOWGR_CUDA", "auto") == "1" and what != "gflowgr._host":
                raise SystemExit(f"GFLOWGR_CUDA=1, but {what} failed to build: {error}")
            slower = "failed to build and is left out; slower code will do its work."
            warn(f"{what} {slower}\n{reason(error)}")

        def get_export_symbols(self, ext: Extension) -> list[str]:
            # _C and _C_cuda are no Python modules and have no PyInit function to export.
            return [] if ext.name.startswith("gflowgr._C") else super().get_export_symbols(ext)

    return OptionalBuild


def kernel_packages() -> list[str]:
    return ["gflowgr." + name for name in find_packages(include=["kernels", "kernels.*"])]


def main() -> None:
    options: dict[str, Any] = {}
    if switch("GFLOWGR_NO_EXT", "0") in ("0", "no", "false"):
        torch = find_torch()
        if torch is None:
            options["setup_requires"] = [TORCH_REQUIREMENT]
        host = host_extension(torch)
        options["ext_modules"] = ([host] if host else []) + torch_extensions(torch)
        options["cmdclass"] = {"build_ext": build_command(torch)}
    else:
        warn("GFLOWGR_NO_EXT is set: nothing is compiled, PyTorch and NumPy do the work.")
    setup(
        packages=[*find_packages(include=["gflowgr", "gflowgr.*"]), *kernel_packages()], **options
    )


main()
