"""What the decode, tree and training benchmarks are to reach on a CPU of two threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.harness.shapes import (
    AnyShape,
    ScoreShape,
    SearchShape,
    StepShape,
    ThroughputShape,
    TrainShape,
    TreeShape,
    default_shapes,
    read_shape,
)

if TYPE_CHECKING:
    from benchmarks.harness.report import Row

_ROWS = "64x20"  # what the figures of a step are for
_FLAT = 1.5


@dataclass(frozen=True)
class Bar:
    """One figure to reach.

    Attributes:
        what: the op and its shape, and what is measured.
        measured, wanted: the figure and its limit.
        most: the limit is an upper one; otherwise a lower one.
        contended: other work disturbed the run.
    """

    what: str
    measured: float
    wanted: float
    most: bool
    contended: bool

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        if self.most:
            return self.measured <= self.wanted
        return self.measured >= self.wanted

    @property
    def text(self) -> str:
        """A line that says it."""
        sign = "at most" if self.most else "at least"
        end = " (CONTENDED)" if self.contended else ""
        state = "met" if self.met else "MISSED"
        return f"{state}: {self.what} {self.measured:.3g}, {sign} {self.wanted:.3g}{end}"


def judge_bars(rows: Sequence[Row]) -> list[Bar]:
    """Those that the rows can tell. Ours is its fastest variant; what is not right has no time."""
    best: dict[tuple[str, str], Row] = {}
    mapped: dict[str, Row] = {}
    for row in rows:
        if row.family or row.ms is None or row.device != "cpu":
            continue
        if row.variant == "load, memory-mapped":
            mapped[row.shape] = row
        key = (row.op, row.shape)
        if key not in best or row.ms < (best[key].ms or 0.0):
            best[key] = row
    found = []
    for (op, name), row in best.items():
        found += _bars(op, read_shape(name), mapped.get(name, row))
    return found + _flat(best)


def _bars(op: str, shape: AnyShape, row: Row) -> list[Bar]:
    found = []

    def add(what: str, measured: float | None, wanted: float, *, most: bool = False) -> None:
        if measured is not None:
            text = f"{op}, {shape.name}: {what}"
            found.append(Bar(text, measured, wanted, most, row.contended))

    ms = row.ms or 0.0
    if isinstance(shape, StepShape):
        _step_bars(op, shape, row, add)
    elif isinstance(shape, SearchShape) and shape in default_shapes(op, "cpu"):
        wanted = {1: 5.0, 64: 8.0}.get(shape.prompts, 0.0) if shape.model == "t5" else 4.0
        if wanted:
            add("times faster than generate", row.speedup_transformers, wanted)
        add("of the memory of generate", row.memory_transformers, 1 / 3, most=True)
    elif isinstance(shape, ScoreShape) and shape in default_shapes(op, "cpu"):
        add("times faster than a row per item", row.speedup_pairs, 30.0)
    elif isinstance(shape, TreeShape) and shape.items >= 10_000_000:
        large = shape.items >= 100_000_000
        if op == "tree-build":
            add("bytes per item", row.bytes_per_item, 2.0 if large else 5.0, most=True)
            add("seconds", ms / 1e3, 15.0 if large else 2.0, most=True)
        elif op == "tree-files":
            add("ms to load by memory-map", ms, 10.0, most=True)
    elif isinstance(shape, TrainShape) and shape in default_shapes(op, "cpu") and row.speedup_sft:
        add("times the cost of an SFT step", 1 / row.speedup_sft, 1.15, most=True)
    elif isinstance(shape, ThroughputShape) and shape in default_shapes(op, "cpu"):
        rate = shape.examples / (ms / 1e3) if ms else 0.0
        add(f"{rate:,.0f} examples/s, times the plain Trainer's", row.speedup_transformers, 3.0)
    return found


def _step_bars(op: str, shape: StepShape, row: Row, add: Callable[..., None]) -> None:
    if not _full(shape):
        return
    if op == "beam-hidden":
        if shape.vocab == 33124:
            add("times faster than all logits first", row.speedup_logits, 20.0)
    elif shape.vocab == 1027:
        add("ms", row.ms, 0.7, most=True)
    elif shape.vocab == 33124:
        add("times faster than CSR", row.speedup_csr, 3.0)
        add("times faster than transformers", row.speedup_transformers, 20.0)


def _full(shape: StepShape) -> bool:
    return f"{shape.prompts}x{shape.beams}" == _ROWS


def _flat(best: dict[tuple[str, str], Row]) -> list[Bar]:
    """The slowest catalogue over the fastest, where a step was measured on several."""
    groups: dict[int, list[Row]] = {}
    for (op, name), row in best.items():
        shape = read_shape(name)
        if op == "beam" and isinstance(shape, StepShape) and _full(shape):
            groups.setdefault(shape.vocab, []).append(row)
    found = []
    for vocab, members in groups.items():
        times = [row.ms for row in members if row.ms]
        if len(times) > 1:
            what = f"beam, {_ROWS}, V {vocab}: the slowest catalogue over the fastest"
            contended = any(row.contended for row in members)
            found.append(Bar(what, max(times) / min(times), _FLAT, True, contended))
    return found
