"""The machine and the command as reports state them: kinds, never names or places."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path

import torch

__all__ = ["command_as_typed", "machine_summary", "processor_name"]


def machine_summary() -> dict[str, str]:
    """Processor, memory, accelerators and library versions; no names or paths of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    summary = {
        "processor": f"{processor_name()}, {cores} cores, {torch.get_num_threads()} threads used",
        "accelerator": "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }
    memory = _memory_bytes()
    if memory:
        summary["memory"] = f"{memory / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        summary["accelerator"] = ", ".join(names)
    return summary


def processor_name() -> str:
    """The processor's model, or its architecture where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""  # not Linux, or nothing is mounted there
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_as_typed() -> str:
    """The running command, without the folders that things lie in on this machine."""
    program = Path(sys.argv[0]).name
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["gflowgr" if program == "__main__.py" else program, *words])


def _memory_bytes() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
