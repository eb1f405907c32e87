"""A run of the benchmark: cases one after the other, a table each, then the files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import checking, measuring, memory, report
from benchmarks.harness.bars import judge_bars
from benchmarks.harness.case import Case, GraphedVariant, Variant
from benchmarks.harness.floors import Rates
from benchmarks.harness.peers import read_peers
from benchmarks.harness.plots import write_plots
from benchmarks.harness.registry import Table, read_shape, read_tables
from benchmarks.harness.report import BenchRow
from benchmarks.harness.shapes import DTYPES, Shape
from gflowgr import files
from gflowgr.ops import validation

_CHECK_SEED = 1


@dataclass(frozen=True)
class Settings:
    """What to run; see ``python -m benchmarks --help``."""

    tables: tuple[Table, ...]
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]  # empty: each table's own
    peers: tuple[str, ...]
    repeats: int = 7
    seconds: float = 60.0
    count_memory: bool = True
    out: Path | None = None
    progress: bool = True

    @classmethod
    def read(
        cls,
        ops: Sequence[str],
        *,
        device: str = "cpu",
        dtypes: Sequence[str] = ("float32", "bfloat16"),
        shapes: Sequence[str] = (),
        peers: Sequence[str] | None = None,
        threads: int | None = None,
        repeats: int = 7,
        seconds: float = 60.0,
        count_memory: bool = True,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> Settings:
        """Check words and numbers; sets the number of threads. Raises ValueError or OutputError."""
        for name in dtypes:
            if name not in DTYPES:
                raise ValueError(f"dtype must be any of {', '.join(DTYPES)}; got {name!r}")
        if device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda; got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu: torch sees no GPU; got cuda")
        if repeats < 1:
            raise ValueError(f"--repeats must be at least 1; got {repeats}")
        if not seconds > 0:
            raise ValueError(f"--seconds must be greater than 0; got {seconds:g}")
        if threads is not None and threads < 1:
            raise ValueError(f"--threads must be at least 1; got {threads}")
        wanted = read_tables(ops)
        if device == "cuda":
            able = [table for table in wanted if table.on_gpu]
            if ops and not able:
                names = ", ".join(table.name for table in wanted)
                raise ValueError(f"device must be cpu for {names}; got cuda")
            wanted = able
        sizes = tuple(read_shape(text) for text in shapes)
        for shape in sizes:
            fitting = [table for table in wanted if table.fits(shape)]
            if not fitting:
                names = ", ".join(table.name for table in wanted)
                raise ValueError(f"shape must be one of {names}; got {shape.text}")
            for table in fitting:
                problem = table.refuse(shape)
                if problem is not None:
                    raise ValueError(f"{table.name} at shape {shape.text}: {problem}")
        keys = read_peers(None if peers is None else list(peers))
        if out is not None:
            files.ensure_writable(out)
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(
            tables=tuple(wanted),
            device=torch.device(device),
            dtypes=tuple(getattr(torch, name) for name in dtypes),
            shapes=sizes,
            peers=keys,
            repeats=repeats,
            seconds=seconds,
            count_memory=count_memory,
            out=None if out is None else Path(out),
            progress=progress,
        )

    def cases(self) -> list[tuple[Table, Shape, torch.dtype]]:
        """What is measured, in order; a table that none of the given shapes fits is left out."""
        found = []
        for table in self.tables:
            low = str(self.device) in table.low_precision
            dtypes = self.dtypes if low else (torch.float32,)
            for shape in self.shapes or table.defaults(str(self.device)):
                if table.fits(shape):
                    found += [(table, shape, dtype) for dtype in dtypes]
        return found


def run_benchmarks(settings: Settings) -> list[BenchRow]:
    """Measure everything, print a table per case, write the files of ``settings.out``."""
    machine = report.describe_machine(settings.device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    rows: list[BenchRow] = []
    summaries: list[dict[str, Any]] = []
    for table, shape, dtype in settings.cases():
        # Compiled code of earlier cases: keeping it would meet the compiler's recompilation limit.
        torch.compiler.reset()
        case = table.build(table.name, shape, settings.device, dtype, settings.peers)
        found, summary = _measure(case, settings)
        rows += found
        summaries.append(summary)
        print(f"\n{report.case_text(summary, found)}", flush=True)
        if settings.out is not None:
            # After every case, so that an interrupted run leaves what it has measured.
            report.write_files(settings.out, machine, summaries, rows)
    bars = judge_bars(rows)
    if bars:
        print("\n".join(["", "bars", "----", *(bar.text for bar in bars)]))
    if settings.out is not None:
        write_plots(settings.out, summaries, rows)
        print(f"\nwritten to {settings.out}")
    return rows


def timed_checks(device: torch.device) -> AbstractContextManager[None]:
    """The data checks of our ops, while it is timed: off on a GPU, as in training there.

    Each would synchronise with the GPU, and no peer checks its data.
    """
    return validation(device.type != "cuda")


def _measure(case: Case, settings: Settings) -> tuple[list[BenchRow], dict[str, Any]]:
    say = _Status(settings.progress)
    checks = _check_all(case, say)
    right = [v for v in case.variants if checks[v.name].status == "ok"]
    with timed_checks(case.device):
        times = measuring.time_case(
            case, right, repeats=settings.repeats, seconds=settings.seconds, progress=say
        )
    say(f"{case.title}: measuring the machine")
    rates = Rates(case.device, case.dtype)
    rows = []
    for variant in case.variants:
        extra, note = None, ""
        counted = settings.count_memory and not case.uncounted
        if variant in right and counted and not isinstance(variant, GraphedVariant):
            say(f"{case.title}: memory of {variant.name}")
            extra, note = memory.peak_extra_bytes(case, variant, settings.peers)
        rows.append(report.make_row(case, variant, checks[variant.name], times, rates, extra, note))
    say.clear()
    report.fill_ratios(rows)
    return rows, report.make_summary(case, times, rates)


def _check_all(case: Case, say: _Status) -> dict[str, checking.Check]:
    inputs = case.make_inputs(_CHECK_SEED)
    for run in case.bare.values():
        run(inputs)  # its buffers are there from now on: what does not fit beside them fails here
    checks: dict[str, checking.Check] = {}
    # One reference at a time: a float64 gradient of a large head is large.
    for key, make_reference in case.references.items():
        judged: list[Variant] = [v for v in case.variants if v.reference == key]
        if not judged:
            continue
        say(f"{case.title}: float64 reference ({key})")
        reference = make_reference(inputs)
        for variant in judged:
            say(f"{case.title}: checking {variant.name}")
            checks[variant.name] = checking.check(case, variant, inputs, reference)
    return checks


class _Status:
    """What is being done, on one line of a terminal; silent elsewhere."""

    def __init__(self, wanted: bool) -> None:
        self._shown = wanted and sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave an empty line for the table."""
        self("")
