"""Prefix tree: seconds to build, bytes per item, rate of walks. CPU.

    python benchmarks/tree.py [--items 1000000 10000000] [--repeat 5] [--output benchmarks/results]

Random identifiers of 4 tokens, 256 codes per level, seed 0 (random is the worst case: real
catalogues share more prefixes). Prints a table and writes ``tree.json`` and ``tree.csv``. "ns each"
is CPU time, which other work on the machine disturbs less than wall time.

Floors and predictions, for comparison with what is printed:

* Size. Information bound for n random 32-bit identifiers as a set: log2(C(2^32, n)) / n bits, about
  log2(2^32 / n) + 1.44 bits: 1.7 bytes an item at 1M, 1.3 at 10M. Ours is 5 bytes for each of the m
  distinct 3-token prefixes (child range, token) and 1 for each leaf: (5 m + n) / n bytes with
  m = 2^24 (1 - exp(-n / 2^24)), plus 0.3 MB for the levels above: 6.2 at 1M, 4.8 at 10M. The items
  map is 4 bytes an item, and 4 more where any identifier is shared (as here).
* Build. 32 bits of key in 8-bit digits = 4 passes that each read and write 8 bytes an item, one
  pass that makes the keys, two that scan them: about 100 bytes of traffic an item, so 10 ns an item
  at 10 GB/s. The scattered writes and the codes of each row cost more: 50-100 ns an item is
  expected.
* Walk. 4 levels, each a child range and a search; levels 1 and 2 stay in cache. At 10M items levels
  3 and 4 miss: about 4 misses a walk, 100 ns each when alone, and several in flight at once: 50-150
  ns a walk is expected.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gflowgr
from gflowgr import _tree_build
from gflowgr._tree_layout import build_numpy
from gflowgr.backends import available_backends
from gflowgr.info import collect_info
from gflowgr.tree import PrefixTree

LENGTH, CODES = 4, 256
WALKS = 1_000_000


def seconds(run: Callable[[], Any], repeat: int) -> tuple[float, float]:
    """Median wall and CPU seconds of ``run``, after one run to warm up."""
    run()
    wall, cpu = [], []
    for _ in range(repeat):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return statistics.median(wall), statistics.median(cpu)


def measure(items: int, repeat: int) -> list[dict[str, Any]]:
    """Rows of the table for one catalogue size."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, CODES, (items, LENGTH), dtype=np.int32)
    rows: list[dict[str, Any]] = []

    def add(what: str, run: Callable[[], Any], count: int, **more: Any) -> None:
        wall, cpu = seconds(run, repeat)
        row = {
            "items": items,
            "what": what,
            "wall_s": wall,
            "cpu_s": cpu,
            "ns_each": cpu / count * 1e9,
        }
        rows.append({**row, **more})
        extra = "".join(f"  {key} {value:.2f}" for key, value in more.items())
        print(
            f"{items:>11,}  {what:<22}{wall:>9.3f} s wall {cpu:>9.3f} s CPU "
            f"{row['ns_each']:>9.1f} ns each{extra}",
            flush=True,
        )

    tree = PrefixTree.from_identifiers(tokens)
    sizes = {
        "structure_bytes_per_item": tree.nbytes_structure / items,
        "items_map_bytes_per_item": (tree.nbytes - tree.nbytes_structure) / items,
    }
    if _tree_build.host_module() is not None:
        add("build, C++", lambda: PrefixTree.from_identifiers(tokens), items, **sizes)
    if items <= 1_000_000:
        add("build, NumPy", lambda: build_numpy(tokens, None), items)
    available = generator.random(items) < 0.2
    add("available_nodes, 20%", lambda: tree.available_nodes(available), items)
    queries = torch.from_numpy(tokens[:WALKS])
    for name, reason in available_backends("cpu")["tree_walk"].items():
        if reason is None and name != "triton":
            with gflowgr.backend(name):
                add(f"walk, {name}", lambda: tree.walk(queries), len(queries))
    return rows


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    info = collect_info()
    machine = {
        "device": info["devices"][0]["name"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": args.threads,
        "load_average_at_start": os.getloadavg()[0],
    }
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    rows = [row for items in args.items for row in measure(items, args.repeat)]

    args.output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "rows": rows}
    (args.output / "tree.json").write_text(json.dumps(result, indent=1) + "\n")
    with open(args.output / "tree.csv", "w", newline="") as file:
        names = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
