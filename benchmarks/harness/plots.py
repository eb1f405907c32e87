"""Bars of a benchmark: time over the floor, and peak extra memory, one panel per case."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gflowgr.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.harness.report import BenchRow

_OURS, _PEER = plots.colour(0), plots.colour(1)


def write_plots(folder: Path, summaries: list[dict[str, Any]], rows: list[BenchRow]) -> list[Path]:
    """``time.png`` and ``memory.png`` of what was measured; says so if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    written = []
    for name, key, label in (
        ("time.png", "over_floor", "time over the floor"),
        ("memory.png", "extra_mib", "peak extra memory, MiB"),
    ):
        panels = []
        for summary in summaries:
            case = (summary["op"], summary["shape"], summary["dtype"])
            mine = [r for r in rows if (r.op, r.shape, r.dtype) == case]
            # What has no floor (another function is computed) is drawn over the same one.
            floor = next((r.floor_ms for r in mine if r.floor_ms), None)
            bars = [(r.variant, r.family, _height(r, key, floor)) for r in mine]
            bars = [bar for bar in bars if bar[2] is not None]
            if bars:
                panels.append((" ".join(case), bars))
        if panels:
            _draw(panels, label, folder / name)
            written.append(folder / name)
    return written


def _height(row: BenchRow, key: str, floor: float | None) -> float | None:
    if key == "over_floor" and row.over_floor is None and row.ms is not None and floor:
        return row.ms / floor
    value = getattr(row, key)
    return None if value is None else float(value)


def _draw(
    panels: list[tuple[str, list[tuple[str, str, float | None]]]], label: str, path: Path
) -> None:
    most = max(len(bars) for _, bars in panels)
    figure, all_axes = plots.panels(len(panels), 6.2, 0.9 + 0.24 * most, columns=2)
    for axes, (title, bars) in zip(all_axes, panels, strict=True):
        _bars(axes, title, bars, label)
    plots.save(figure, path)


def _bars(axes: Axes, title: str, bars: list[tuple[str, str, float | None]], label: str) -> None:
    heights = [value or 0.0 for _, _, value in bars]
    colours = [_PEER if family else _OURS for _, family, _ in bars]
    drawn = axes.barh(range(len(bars)), heights, color=colours)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    positive = [height for height in heights if height > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_xscale("log")
    axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
    axes.margins(x=0.15)
    plots.frame(axes, title=title, x=label, grid="x")
