"""Choice of an op's backend: ``torch`` (the reference), ``cpp``, ``triton`` or ``cuda``.

Every op registers the backends it has, each with a function that says why it cannot run a call (or
None when it can). :func:`resolve` takes the fastest that can, unless one is forced: by
``with gflowgr.backend("torch"):`` or by the environment variable ``GFLOWGR_BACKEND``. A forced
backend that cannot run raises with the reason; it never falls back in silence.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gflowgr.architectures import Architecture, read_architectures

BACKENDS = ("torch", "cpp", "triton", "cuda")
_FASTEST_FIRST = ("cuda", "triton", "cpp", "torch")
ENVIRONMENT = "GFLOWGR_BACKEND"

Probe = Callable[[torch.device, torch.dtype], "str | None"]

_LIBRARY = torch.library.Library("gflowgr", "FRAGMENT")

_registry: dict[str, dict[str, Probe]] = {}
_warned: set[str] = set()
_forced: ContextVar[str | None] = ContextVar("gflowgr_backend", default=None)


class BackendError(RuntimeError):
    """A forced backend cannot run the call; the message says why."""


def register(op: str, backend: str, probe: Probe) -> None:
    """Say that ``op`` has ``backend``; ``probe(device, dtype)`` returns None or why not."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    _registry.setdefault(op, {})[backend] = probe


def define_op(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    probes: Mapping[str, Probe] | None = None,
    mutates: tuple[str, ...] = (),
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Define ``torch.ops.gflowgr.<name>``.

    Not ``torch.library.custom_op``, whose wrapper adds 26 us to a call of 8 us.

    Args:
        name: the op's name.
        implementation: runs below autograd, on every device; its annotations are the op's schema.
        fake: makes empty results, for tracing.
        probes: of the backends among which ``implementation`` chooses; None for an op that goes by
            the backends of another.
        mutates: names of the arguments that it writes to.
        setup_context: what the forward pass keeps, see ``torch.library.register_autograd``.
        backward: the derivative, see there.
        autograd: in place of both, what runs at the autograd key.
    """
    # Types instead of their names: older versions of torch do not know this module's aliases.
    types = typing.get_type_hints(implementation)
    none = {"return": None} if types["return"] is type(None) else {}
    implementation.__annotations__ = types | none
    schema = torch.library.infer_schema(implementation, mutates_args=mutates)
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gflowgr::{name}", fake, lib=_LIBRARY)
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd")
    elif backward is not None:
        torch.library.register_autograd(
            f"gflowgr::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    for backend_name, probe in (probes or {}).items():
        register(name, backend_name, probe)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as kernels take them: in row-major order, copied where they are not."""
    return [None if t is None else t.contiguous() for t in tensors]


def forced_backend() -> str | None:
    """The backend forced by :func:`backend` or, failing that, by the environment."""
    name = _forced.get()
    if name is None:
        name = os.environ.get(ENVIRONMENT) or None
        if name is not None and name not in BACKENDS:
            raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force a backend for the ops called inside (None: choose freely again, whatever is outside).

    Raises ValueError for an unknown name. Holds for the current thread or task.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}; got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def resolve(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs ``op`` on tensors of this device and dtype.

    Raises BackendError when a forced backend cannot, and KeyError for an op nobody registered.
    """
    probes = _registry[op]
    name = forced_backend()
    if name is not None:
        reason = probes[name](device, dtype) if name in probes else "the op has no such backend"
        if reason is not None:
            raise BackendError(f"gflowgr::{op} cannot run on backend {name!r}: {reason}")
        return name
    for candidate in _FASTEST_FIRST:
        # The interpreter is for tests: Triton on CPU tensors runs only when asked for by name.
        if candidate == "triton" and device.type == "cpu":
            continue
        if candidate in probes and probes[candidate](device, dtype) is None:
            if candidate == "torch" and device.type == "cuda":
                _warn_of_definition(op, device, dtype)
            if candidate == "torch" and "cpp" in probes and device.type == "cpu":
                _warn_without_cpp()
            return candidate
    raise BackendError(f"gflowgr::{op}: no backend for device {device} and dtype {dtype}")


def _warn_of_definition(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """Say once per op why a GPU's tensors are left to the slow PyTorch definition."""
    probes = _registry[op]
    reasons = {n: probes[n](device, dtype) for n in ("cuda", "triton") if n in probes}
    if op in _warned or not reasons:  # an op without a kernel is as fast as it gets
        return
    _warned.add(op)
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    warnings.warn(
        f"gflowgr::{op} runs as its PyTorch definition on {device} and {dtype} ({why})",
        RuntimeWarning,
        stacklevel=2,
    )


def _warn_without_cpp() -> None:
    """Say once why PyTorch does the work of the C++ kernels: pip shows nothing of a build."""
    reason = cpp_missing()
    if reason is not None and "cpp" not in _warned:
        _warned.add("cpp")
        warnings.warn(
            f"the C++ kernels of gflowgr are not used, and PyTorch does their work slower: {reason}"
            " (see gflowgr info; GFLOWGR_BACKEND=torch says that this is meant)",
            stacklevel=2,
        )


def available_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, str | None]]:
    """Per op and backend: None when it can run on ``device``, else the reason why not.

    Ops are known once :mod:`gflowgr.ops` is imported, as it is by ``gflowgr.available_backends``.

    ``device`` defaults to the GPU when there is one, else to the CPU.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        op: {
            name: probes[name](where, dtype) if name in probes else "the op has no such backend"
            for name in BACKENDS
        }
        for op, probes in sorted(_registry.items())
    }


def _library_path(name: str) -> Path | None:
    folder = Path(__file__).parent
    found = sorted(p for p in folder.glob(f"{name}.*") if p.suffix in (".so", ".pyd", ".dylib"))
    return found[0] if found else None


def _why_not_built(name: str) -> str:
    """What the build wrote down (setup.py, ``note``); else what may have been."""
    path = Path(__file__).with_name(f"{name}.not_built.txt")
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    if torch.torch_version.TorchVersion(torch.__version__) < "2.10":
        return f"torch {torch.__version__} is older than 2.10"
    if name == "_C_cuda":
        return "it needs a CUDA toolkit and GFLOWGR_CUDA not 0"
    return "no torch was there to build with, or GFLOWGR_NO_EXT was set"


@functools.cache
def cpp_missing() -> str | None:
    """Load ``gflowgr/_C`` once; None when its ops are there, else why not."""
    path = _library_path("_C")
    if path is None:
        return f"gflowgr/_C was not built: {_why_not_built('_C')}"
    return _load(path)


@functools.cache
def cuda_missing() -> str | None:
    """Load ``gflowgr/_C_cuda`` once; None when its ops are there, else why not."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    path = _library_path("_C_cuda")
    if path is None:
        return f"gflowgr/_C_cuda was not built: {_why_not_built('_C_cuda')}"
    return _load(path)


@functools.cache
def cuda_architectures() -> tuple[Architecture, ...]:
    """What ``gflowgr/_C_cuda`` has code for; none where it was not built."""
    path = _library_path("_C_cuda")
    return () if path is None else read_architectures(path)


@functools.cache
def _wrong_architecture(index: int | None) -> str | None:
    """Why ``_C_cuda`` has no code for a GPU, or None."""
    built = cuda_architectures()
    if not built or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if any(each.runs_on(10 * major + minor) for each in built):
        return None
    return (
        f"gflowgr/_C_cuda was built for {', '.join(map(str, built))}, this GPU is "
        f"sm_{major}{minor}: build with GFLOWGR_CUDA_ARCHS={major}.{minor}"
    )


def capturing() -> bool:
    """Whether the current stream is captured in a CUDA graph: nothing may be read from a GPU."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _load(path: Path) -> str | None:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # Built for another torch or C++ library: the reason is shown by `gflowgr info`.
        return f"{path.name} cannot be loaded: {error}"
    return None


@functools.cache
def triton_missing() -> str | None:
    """None when Triton and ``gflowgr.kernels`` can be imported, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("gflowgr.kernels") is None:
        return "gflowgr.kernels is not installed (running from a source tree without an install)"
    return None


def triton_interpreted() -> bool:
    """True when Triton kernels run in its interpreter (on the CPU)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def probe_torch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of the references: they run everywhere."""
    return None


def probe_cpp(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of the C++ extension: CPU tensors, extension built."""
    return "runs on CPU tensors only" if device.type != "cpu" else cpp_missing()


def float32_only(probe: Probe) -> Probe:
    """The probe of a backend that computes in float32: float64 is left to the reference."""

    def answer(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return "computes in float32; float64 is left to the reference"
        return probe(device, dtype)

    return answer


def probe_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of Triton: CUDA tensors, or any under TRITON_INTERPRET=1."""
    if device.type != "cuda" and not triton_interpreted():
        return "runs on CUDA tensors only (or anywhere under TRITON_INTERPRET=1)"
    if torch.version.hip is not None and device.type == "cuda":
        return "ROCm: the kernels' tile sizes are for NVIDIA's GPUs"
    return triton_missing()


def probe_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """Probe of the CUDA extension: CUDA tensors, extension built."""
    if device.type != "cuda":
        return "runs on CUDA tensors only"
    return cuda_missing() or _wrong_architecture(device.index)
