"""Every op x dtype x block shape, both kinds of search and replays against float64: one table.

    python benchmarks/gpu_smoke.py [--device cuda] [--groups GROUP ...] [--most N] [--jobs N]

On a GPU each group runs in a process of its own: a kernel that spoils its CUDA context fails no
other group, and the kernels of several groups compile at once. Exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Row = Callable[[str, float, str], None]
"""(case, seconds, what is wrong or "")."""


def run_here(names: Sequence[str], device: str, show: Row) -> int:
    """Run cases in this process; how many failed."""
    import torch
    from support.gpu_cases import gpu_cases  # type: ignore[import-not-found]  # of the tests

    torch.set_num_threads(1)
    failed = 0
    for case in gpu_cases():
        if case.name not in names:
            continue
        begin, problem = time.perf_counter(), ""
        try:
            case.run(device)
            if device != "cpu":
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, the other cases are still to run
            problem = f"{type(error).__name__}: {error}".strip()
            traceback.print_exc()
        failed += bool(problem)
        show(case.name, time.perf_counter() - begin, problem)
    return failed


def show_line(name: str, seconds: float, problem: str) -> None:
    """A line of JSON, for the process that started this one."""
    print(json.dumps({"case": name, "seconds": seconds, "problem": problem}), flush=True)


def run_apart(groups: dict[str, list[str]], device: str, most: int, jobs: int) -> int:
    """Run each group in a process of its own, some at once; how many cases failed."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [
            pool.submit(show_group, group, names, device, most) for group, names in groups.items()
        ]
    return sum(future.result() for future in running)


def show_group(group: str, names: Sequence[str], device: str, most: int) -> int:
    """Print a row for each of a group's cases as a new process ends it; how many failed."""
    command = [sys.executable, __file__, "--device", device, "--most", str(most), "--here"]
    failed = done = 0
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--groups", group], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith('{"case"'):
                continue
            row = json.loads(line)
            done, failed = done + 1, failed + bool(row["problem"])
            show_row(row["case"], row["seconds"], row["problem"])
        status = process.wait()
        errors.seek(0)
        ended = f"its process ended with {status}: {errors.read().strip()[-600:]}"
    for name in names[done:]:
        show_row(name, 0.0, ended)
    return failed + len(names) - done


def show_row(name: str, seconds: float, problem: str) -> None:
    """A row of the table."""
    said = problem.replace("\n", " ")[:400]
    print(f"{'FAIL' if problem else 'PASS'}  {seconds:6.2f} s  {name}  {said}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    from support.gpu_cases import gpu_cases

    groups: dict[str, list[str]] = {}
    for case in gpu_cases():
        groups.setdefault(case.group, []).append(case.name)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--groups", nargs="+", default=list(groups), choices=list(groups))
    parser.add_argument("--most", type=int, default=1000, help="at most N cases of each group")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--here", action="store_true", help="in this process, as lines of JSON")
    args = parser.parse_args(argv)
    wanted = {group: groups[group][: args.most] for group in args.groups}
    names = [name for group in wanted.values() for name in group]
    if args.here:
        return int(run_here(names, args.device, show_line) > 0)
    if args.device == "cpu":  # a process starts slower than a group runs
        failed = run_here(names, args.device, show_row)
    else:
        failed = run_apart(wanted, args.device, args.most, args.jobs)
    print(f"{len(names) - failed} of {len(names)} cases passed on {args.device}")
    return int(failed > 0)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]
    sys.exit(main())
