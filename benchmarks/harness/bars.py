"""Target figures ("bars") on a CPU of two threads, as one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmarks.harness.report import BenchRow


class Wanted(NamedTuple):
    """A row of the table.

    Attributes:
        table: name of the benchmark's table.
        shape: a pattern of shapes as they are written; ``*``, ``?`` and ``[18]`` as in file names.
        dtype: name of the dtype.
        figure: "ms", "seconds", "bytes per item"; "faster, FAMILY" and "memory, FAMILY", as the
            tables' columns; "time, FAMILY", the inverse of "faster"; "slowest over fastest", over
            the shapes that match.
        sign, bar: "<=" or ">=", and the limit.
        variant: ours that is judged; "": the fastest.
    """

    table: str
    shape: str
    dtype: str
    figure: str
    sign: str
    bar: float
    variant: str = ""


# fmt: off
BARS = tuple(Wanted(*row) for row in (
    ("beam_step.logits", "beam_step:64x20x1027x*", "float32", "ms", "<=", 0.7),
    ("beam_step.logits", "beam_step:64x20x1027x*", "float32", "slowest over fastest", "<=", 1.3),
    ("beam_step.logits", "beam_step:64x20x33124x*", "float32", "faster, csr", ">=", 3.0),
    ("beam_step.logits", "beam_step:64x20x33124x*", "float32", "faster, transformers", ">=", 20.0),
    ("beam_step.logits", "beam_step:64x20x33124x*", "float32", "slowest over fastest", "<=", 1.3),
    ("beam_step.hidden", "beam_step:64x20x1027x*", "float32", "faster, logits", ">=", 10.0),
    ("beam_step.hidden", "beam_step:64x20x33124x*", "float32", "faster, logits", ">=", 20.0),
    ("search", "search-t5:1x60x20x12101", "float32", "faster, transformers", ">=", 6.0),
    ("search", "search-t5:64x60x20x12101", "float32", "faster, transformers", ">=", 8.0),
    ("search", "search-t5:*x60x20x12101", "float32", "memory, transformers", "<=", 1 / 3),
    ("search", "search-decoder:1x80x20x12101", "float32", "faster, transformers", ">=", 10.0),
    ("search", "search-decoder:64x80x20x12101", "float32", "faster, transformers", ">=", 20.0),
    ("search", "search-gpt2:[18]x512x20x12101", "float32", "faster, transformers", ">=", 4.0),
    ("search", "search-gpt2:[18]x512x20x12101", "float32", "memory, transformers", "<=", 1 / 3),
    ("search", "search-qwen3:[18]x512x20x12101", "float32", "faster, transformers", ">=", 4.0),
    ("search", "search-qwen3:[18]x512x20x12101", "float32", "memory, transformers", "<=", 1 / 3),
    ("catalogue_scores", "catalogue_scores:4x60x12101", "float32", "faster, pairs", ">=", 30.0),
    ("tree.build", "tree:??m", "float32", "bytes per item", "<=", 5.0),
    ("tree.build", "tree:??m", "float32", "seconds", "<=", 2.0),
    ("tree.build", "tree:???m", "float32", "bytes per item", "<=", 2.0),
    ("tree.build", "tree:???m", "float32", "seconds", "<=", 15.0),
    ("tree.files", "tree:*??m", "float32", "ms", "<=", 10.0, "load, memory-mapped"),
    ("train_step", "train_step-t5:128x80x4x12101", "float32", "time, sft", "<=", 1.15),
    ("train_step", "train_step-qwen3:32x256x4x12101", "float32", "time, sft", "<=", 1.15),
    ("flow_kl", "letter", "float32", "time, tb", "<=", 1.15, "gflowgr/cpp"),
    ("item_flows.pooled", "item_flows:128x100000000", "float32", "ms", "<=", 128.0),
    ("sequences", "sequences:64x20x12101", "float32", "time, sft", "<=", 1.25),
    ("sequences", "sequences:64x20x12101", "float32", "faster, prompts", ">=", 6.4),
    ("training", "training-small:128x16x12101", "float32", "faster, transformers", ">=", 3.0),
))
# fmt: on


@dataclass(frozen=True)
class Bar:
    """A figure that was measured and its limit.

    Attributes:
        what: table, shape and figure.
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
        """The bar as one line."""
        sign = "at most" if self.most else "at least"
        end = " (CONTENDED)" if self.contended else ""
        state = "met" if self.met else "MISSED"
        return f"{state}: {self.what} {self.measured:.3g}, {sign} {self.wanted:.3g}{end}"


def judge_bars(rows: Sequence[BenchRow], wanted: Sequence[Wanted] = BARS) -> list[Bar]:
    """The bars that the rows have figures for, in the order of ``wanted``.

    Ours is its fastest variant at a shape; what is wrong has no time, and no bar.
    """
    found = []
    for each in wanted:
        best: dict[str, BenchRow] = {}
        for row in rows:
            if _matches(row, each):
                fastest = best.setdefault(row.shape, row)
                if (row.ms or 0.0) < (fastest.ms or 0.0):
                    best[row.shape] = row
        if each.figure == "slowest over fastest":
            found += _spread(each, list(best.values()))
            continue
        for shape, row in best.items():
            measured = _figure(row, each.figure)
            if measured is not None:
                found.append(_bar(each, shape, measured, row.contended))
    return found


def _matches(row: BenchRow, wanted: Wanted) -> bool:
    ours = not row.family and row.ms is not None and row.device == "cpu"
    return (
        ours
        and (row.op, row.dtype) == (wanted.table, wanted.dtype)
        and fnmatchcase(row.shape, wanted.shape)
        and wanted.variant in ("", row.variant)
    )


def _figure(row: BenchRow, figure: str) -> float | None:
    what, _, family = figure.partition(", ")
    if what in ("ms", "seconds"):
        return None if row.ms is None else row.ms / (1e3 if what == "seconds" else 1.0)
    if what == "bytes per item":
        return row.bytes_per_item
    ratio = row.ratios.get(family)
    if ratio is None:
        return None
    return {"faster": ratio.speedup, "time": 1 / ratio.speedup, "memory": ratio.memory}[what]


def _spread(wanted: Wanted, rows: list[BenchRow]) -> list[Bar]:
    times = [row.ms for row in rows if row.ms]
    if len(times) < 2:
        return []
    contended = any(row.contended for row in rows)
    return [_bar(wanted, wanted.shape, max(times) / min(times), contended)]


def _bar(wanted: Wanted, shape: str, measured: float, contended: bool) -> Bar:
    what = f"{wanted.table}, {shape}: {wanted.figure}"
    return Bar(what, measured, wanted.bar, wanted.sign == "<=", contended)
