"""Peak extra memory of a variant: what it holds at once beyond its inputs, gradients included.

On a GPU the caching allocator counts. On a CPU nothing sees every allocation: our C++ takes blocks
from torch and from malloc, oneDNN and MKL have buffers of their own, compiled code too. So the
kernel counts pages: a process per variant makes the inputs, warms up, resets its high-water mark of
resident memory (``/proc/self/clear_refs``), runs once, and reads the mark. No sampling, nothing is
missed between two looks.

What makes that exact to about a MiB: blocks from 64 KiB are mapped one by one (the environment
below), so memory freed before is not silently used again; MKL keeps no buffers; freed heap is given
back before the run. The warm-up is of a few prompts, since buffers that a variant would keep from a
full-size warm-up are part of its cost; only what compiles for the very shape runs in full before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.checking import FAILURES
from benchmarks.harness.registry import build_case, read_shape
from benchmarks.harness.shapes import Shape

_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MKL_DISABLE_FAST_MM": "1",
}
_SEED = 999
_ROOT = Path(__file__).resolve().parents[2]


def peak_extra_bytes(
    case: Case, variant: Variant, peers: tuple[str, ...]
) -> tuple[int | None, str]:
    """(bytes, "") or (None, why they could not be counted)."""
    if case.device.type == "cuda":
        return _cuda_peak(case, variant), ""
    if not os.path.exists("/proc/self/clear_refs"):
        return None, "counting on a CPU needs Linux (/proc/self/clear_refs)"
    request = {
        "op": case.op,
        "shape": case.shape.text,
        "dtype": str(case.dtype).removeprefix("torch."),
        "variant": variant.name,
        "peers": peers,
        "threads": torch.get_num_threads(),
    }
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path}
    command = [sys.executable, "-m", "benchmarks.harness.memory", json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"the process ended with {done.returncode}"
    return int(json.loads(done.stdout.strip().splitlines()[-1])["bytes"]), ""


def _cuda_peak(case: Case, variant: Variant) -> int:
    inputs = case.make_inputs(_SEED)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.run(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _count(request: dict[str, object]) -> int:
    """Count in the child process."""
    torch.set_num_threads(int(str(request["threads"])))
    shape = read_shape(str(request["shape"]))
    device, dtype = torch.device("cpu"), getattr(torch, str(request["dtype"]))
    peers: tuple[str, ...] = tuple(request["peers"])  # type: ignore[arg-type]

    def find(size: Shape) -> tuple[Case, Variant]:
        case = build_case(str(request["op"]), size, device, dtype, peers)
        named = {v.name: v for v in case.variants}
        if request["variant"] not in named:
            raise ValueError(f"no variant {request['variant']!r} in {case.title}")
        return case, named[str(request["variant"])]

    case, variant = find(shape)
    if not variant.compiles:
        # One thread pool, code generation and import later than now would be counted.
        warm_case, warm_variant = find(shape.small())
        warm_variant.run(warm_case.make_inputs(_SEED))
        del warm_case, warm_variant
    inputs = case.make_inputs(_SEED)
    if variant.compiles:
        variant.run(inputs)
        inputs.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    variant.run(inputs)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A size of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


def main() -> None:
    """Entry of the process: the request as JSON in, ``{"bytes": ...}`` out."""
    try:
        print(json.dumps({"bytes": _count(json.loads(sys.argv[1]))}))
    except FAILURES as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
