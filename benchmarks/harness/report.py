"""Rows, tables and files of a benchmark."""

from __future__ import annotations

import csv
import datetime
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness.bars import judge_bars
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.checking import TOLERANCES, Check
from benchmarks.harness.floors import Rates
from benchmarks.harness.measuring import Times, quartiles
from gflowgr import files
from gflowgr.report.info import collect_info
from gflowgr.report.tables import Table, TableCell, render_table

_PACKAGES = ("triton", "cut-cross-entropy", "liger-kernel", "trl", "transformers", "numpy")
_MIB = 2**20


class Ratio(NamedTuple):
    """A row over the fastest peer of a family: times faster, and the multiple of its memory."""

    peer: str
    speedup: float
    memory: float | None


@dataclass
class BenchRow:
    """One variant of one case. Times in milliseconds, memory in MiB; None: not known."""

    op: str  # name of the table
    shape: str
    sizes: str
    dtype: str
    device: str
    variant: str
    family: str  # see case.Variant
    floor: str  # which of the case's floors; "": none is known
    status: str  # see checking.Check
    reason: str
    result_error: float | None
    gradient_error: float | None
    repeats: int = 0
    ms: float | None = None  # median
    ms_q1: float | None = None
    ms_q3: float | None = None
    cpu_ms: float | None = None  # median, all threads together; not on a GPU
    floor_ms: float | None = None
    predicted_floor_ms: float | None = None
    over_floor: float | None = None  # ms / floor_ms
    extra_mib: float | None = None
    extra_note: str = ""
    bytes_per_item: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    contended: bool = False
    ratios: dict[str, Ratio] = field(default_factory=dict)  # by the peers' family

    def flat(self) -> dict[str, Any]:
        """Plain values; the ratios as ``fastest_FAMILY_peer``, ``speedup_...``, ``memory_...``."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        del values["ratios"]
        for family, ratio in self.ratios.items():
            values[f"fastest_{family}_peer"] = ratio.peer
            values[f"speedup_{family}"] = ratio.speedup
            values[f"memory_{family}"] = ratio.memory
        return values


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Machine, versions and command: plain values."""
    info = collect_info()
    names = [d["name"] for d in info["devices"] if d["device"].startswith(device.type)]
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": ", ".join(names),
        "threads": torch.get_num_threads(),
        "python": info["python"],
        "gflowgr": info["gflowgr"],
        "torch": info["packages"]["torch"],
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "environment": ", ".join(
            f"{name}={os.environ[name]}"
            for name in ("GFLOWGR_VALIDATE", "OMP_NUM_THREADS", "OMP_PROC_BIND", "MKL_NUM_THREADS")
            if name in os.environ
        ),
        "load average at start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "",
    }


def make_row(
    case: Case,
    variant: Variant,
    check: Check,
    times: Times,
    rates: Rates,
    extra_bytes: int | None,
    extra_note: str,
) -> BenchRow:
    """A row without the ratios to peers, which need all rows of the case."""
    row = BenchRow(
        op=case.op,
        shape=case.shape.label,
        sizes=case.shape.text,
        dtype=str(case.dtype).removeprefix("torch."),
        device=case.device.type,
        variant=variant.name,
        family=variant.family,
        floor=variant.floor or "",
        status=check.status,
        reason=check.reason,
        result_error=check.result_error,
        gradient_error=check.gradient_error,
        extra_mib=None if extra_bytes is None else extra_bytes / _MIB,
        extra_note=extra_note,
        bytes_per_item=check.bytes_per_item,
        contended=times.contended,
    )
    samples = times.samples.get(variant.name, [])
    if check.status == "ok":
        first, median, third = quartiles(samples)
        row.repeats = len(samples)
        row.ms_q1, row.ms, row.ms_q3 = first * 1e3, median * 1e3, third * 1e3
        if case.device.type == "cpu":
            row.cpu_ms = quartiles(times.cpu[variant.name])[1] * 1e3
    if variant.floor is not None:
        floor = case.floors[variant.floor]
        row.predicted_floor_ms = floor.predict(rates) * 1e3
        row.floor_ms = row.predicted_floor_ms
        if floor.bare is not None:
            bare_ms = quartiles(times.samples[floor.bare])[1] * 1e3
            row.floor_ms = bare_ms if floor.bare_is_all else max(bare_ms, row.floor_ms)
        if row.ms is not None:
            row.over_floor = row.ms / row.floor_ms
            row.tflops = floor.flops / row.ms / 1e9
            row.gb_per_s = floor.nbytes / row.ms / 1e6
    return row


def fill_ratios(rows: list[BenchRow]) -> None:
    """Speed-up and memory of every row of a case over the fastest peer of each family.

    A dense gradient of the head is compared with dense ones, a row-sparse one with row-sparse ones
    where the family has any.
    """
    for family in dict.fromkeys(row.family for row in rows if row.family):
        timed = [row for row in rows if row.family == family and row.ms is not None]
        for row in rows:
            alike = [peer for peer in timed if peer.floor == row.floor] or timed
            best = min(alike, key=lambda peer: peer.ms or 0.0, default=None)
            if row.ms is None or best is None or not best.ms:
                continue
            memory = None
            if row.extra_mib is not None and best.extra_mib:
                memory = row.extra_mib / best.extra_mib
            row.ratios[family] = Ratio(best.variant, best.ms / row.ms, memory)


def make_summary(case: Case, times: Times, rates: Rates) -> dict[str, Any]:
    """Facts of a case apart from its rows."""
    bare = {}
    for name in case.bare:
        first, median, third = quartiles(times.samples[name])
        bare[name] = {"ms": median * 1e3, "ms_q1": first * 1e3, "ms_q3": third * 1e3}
        whole = times.samples.get(case.parts.get(name, ""))
        if whole:
            bare[name]["share"] = median / quartiles(whole)[1]
    floors = {}
    for name, floor in case.floors.items():
        predicted = floor.predict(rates) * 1e3
        entry = {"flops": floor.flops, "bytes": floor.nbytes, "predicted_ms": predicted}
        floors[name] = {**entry, "bandwidth_used_gb_per_s": rates.bandwidth_at(floor.nbytes) / 1e9}
    return {
        "title": case.title,
        "op": case.op,
        "shape": case.shape.label,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tolerance": TOLERANCES[case.dtype] if case.tolerance is None else case.tolerance,
        "notes": [
            *case.notes,
            *([f"memory is not counted: {case.uncounted}"] * bool(case.uncounted)),
        ],
        "examples": case.examples,
        "missing": [{"variant": name, "reason": reason} for name, reason in case.missing],
        "bare": bare,
        "floors": floors,
        "product_tflops": rates.product / 1e12,
        "triad_gb_per_s": rates.bandwidth / 1e9,
        "canary_ms": [seconds * 1e3 for seconds in times.canary],
        "canary_spread": times.spread,
        "contended": times.contended,
    }


# ---- tables ----


def case_text(summary: dict[str, Any], rows: list[BenchRow], *, markdown: bool = False) -> str:
    """The table of a case, with everything needed to judge it."""
    cells = _cells(rows)
    title, rule = summary["title"], "-" * len(summary["title"])
    lines = [f"## {title}", ""] if markdown else [title, rule]
    table = Table("", cells[0], [[TableCell(text) for text in line] for line in cells[1:]])
    lines.append(render_table(table, "markdown" if markdown else "text"))
    notes = list(summary["notes"])
    for name, bare in summary["bare"].items():
        share = f", {bare['share']:.1%} of it" if "share" in bare else ""
        times = f"{bare['ms']:.4g} ms ({bare['ms_q1']:.4g} to {bare['ms_q3']:.4g})"
        notes.append(f"{name}: {times}{share}")
    for name, floor in summary["floors"].items():
        notes.append(
            f"floor, {name}: {floor['flops'] / 1e9:.4g} GFLOP, {floor['bytes'] / 1e6:.4g} MB, "
            f"predicted {floor['predicted_ms']:.4g} ms"
        )
    notes.append(
        f"ceilings: products {summary['product_tflops']:.4g} TFLOP/s, triad "
        f"{summary['triad_gb_per_s']:.4g} GB/s; tolerance {summary['tolerance']:g}"
    )
    notes.append(
        f"canary: spread {summary['canary_spread']:.0%}"
        + (" -- CONTENDED: other work disturbed this run" if summary["contended"] else "")
    )
    for row in rows:
        if summary["examples"] and row.ms:
            rate = summary["examples"] / row.ms * 1e3
            notes.append(f"{row.variant}: {rate:,.0f} examples/s")
        if row.status != "ok":
            notes.append(f"not timed: {row.variant} ({row.status}): {row.reason}")
        if row.extra_note:
            notes.append(f"memory of {row.variant} was not counted: {row.extra_note}")
    notes += [f"left out: {m['variant']}: {m['reason']}" for m in summary["missing"]]
    mark = "- " if markdown else "  "
    return "\n".join([*lines, *([""] if markdown else []), *(mark + note for note in notes)])


def _cells(rows: list[BenchRow]) -> list[list[str]]:
    families = list(dict.fromkeys(family for row in rows for family in row.ratios))
    rates = any(row.device == "cuda" for row in rows)
    sized = any(row.bytes_per_item is not None for row in rows)
    by_cpu = any(row.op.startswith("tree.") for row in rows)
    memory = ["memory"] * any(row.extra_mib is not None for row in rows)
    header = ["variant", "ms", "quartiles", "x floor", *(["extra MiB"] if memory else [])]
    header += ["CPU ms"] if by_cpu else []
    header += ["bytes per item"] if sized else []
    for family in families:
        header += [f"{what}, {family.replace('_', ' ')}" for what in ("faster", *memory)]
    header += ["TFLOP/s", "GB/s"] if rates else []
    cells = [[*header, "error", "state"]]
    for row in rows:
        line = [
            row.variant,
            _number(row.ms, 4),
            "-" if row.ms is None else f"{row.ms_q1:.4g} to {row.ms_q3:.4g}",
            _number(row.over_floor, 3),
        ]
        line += [_number(row.extra_mib, 4)] if memory else []
        line += [_number(row.cpu_ms, 4)] if by_cpu else []
        line += [_number(row.bytes_per_item, 3)] if sized else []
        for family in families:
            ratio = row.ratios.get(family)
            line.append(_number(ratio and ratio.speedup, 3))
            line += [_number(ratio and ratio.memory, 3)] if memory else []
        if rates:
            line += [_number(row.tflops, 3), _number(row.gb_per_s, 3)]
        errors = [e for e in (row.result_error, row.gradient_error) if e is not None]
        line += [
            _number(max(errors), 2) if errors else "-",
            row.status if row.status == "ok" else row.status.upper(),
        ]
        cells.append(line)
    return cells


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


# ---- files ----


def write_files(
    folder: Path, machine: dict[str, Any], summaries: list[dict[str, Any]], rows: list[BenchRow]
) -> None:
    """``bench.json``, ``bench.csv`` and ``bench.md``, each whole or not at all."""
    flat = [row.flat() for row in rows]
    files.write_json(
        folder / "bench.json",
        {
            "machine": machine,
            "bars": [asdict(bar) for bar in judge_bars(rows)],
            "cases": summaries,
            "rows": flat,
        },
    )
    with (
        files.atomic_path(folder / "bench.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        columns = dict.fromkeys(name for row in flat for name in row)
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(flat)
    files.write_text(folder / "bench.md", _summary_text(machine, summaries, rows))


def _summary_text(
    machine: dict[str, Any], summaries: list[dict[str, Any]], rows: list[BenchRow]
) -> str:
    lines = ["# Benchmark of the ops", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if value != ""]
    lines += ["", "How to read it: [benchmarks/README.md](../README.md) of the repository.", ""]
    bars = judge_bars(rows)
    if bars:
        lines += ["## Bars", "", *(f"- {bar.text}" for bar in bars), ""]
    for summary in summaries:
        mine = [row for row in rows if _same_case(row, summary)]
        lines += [case_text(summary, mine, markdown=True), ""]
    return "\n".join(lines)


def _same_case(row: BenchRow, summary: dict[str, Any]) -> bool:
    return (row.op, row.shape, row.dtype) == (summary["op"], summary["shape"], summary["dtype"])
