"""Plots of identifiers' quality, in the style of the reports'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gflowgr.identifiers.quality import Quality
from gflowgr.report.plots import _colour, _figure, _legend_above, _write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_code_use(rows: Mapping[str, Quality], path: Path) -> None:
    """Items per token, the most frequent first: a panel per level, a line per set."""
    levels = max(row.levels for row in rows.values())
    figure = _figure(3.1 * levels, 3.4)
    for level in range(levels):
        axes = figure.add_subplot(1, levels, level + 1)
        for place, (name, row) in enumerate(rows.items()):
            if level < row.levels:
                counts = row.frequencies[level]
                axes.plot(
                    np.arange(1, len(counts) + 1),
                    counts,
                    color=_colour(place),
                    linestyle="-" if place < 8 else "--",
                    linewidth=1.5,
                    label=name if level == 0 else None,
                )
        axes.set_yscale("log")
        axes.set_xlabel(f"level {level + 1}: tokens by frequency")
        if level == 0:
            axes.set_ylabel("items per token")
        _frame(axes)
    # One legend for all panels, outside of them.
    figure.legend(loc="outside upper left", ncols=2 * levels, fontsize=8, frameon=False)
    _write(figure, path)


def plot_agreement(rows: Mapping[str, Quality], path: Path) -> bool:
    """Neighbours with the same first token(s), a panel per space; False if nothing was measured.

    Bars are the shares, black ticks what chance gives.
    """
    spaces = list(dict.fromkeys(space for row in rows.values() for space in row.agreement))
    if not spaces:
        return False
    figure = _figure(4.6 * len(spaces) + 1.6, 1.3 + 0.42 * len(rows))
    for panel, space in enumerate(spaces):
        axes = figure.add_subplot(1, len(spaces), panel + 1)
        found = [row.agreement[space] for row in rows.values()]
        depth = max(len(each.neighbours) for each in found)
        height = 0.8 / depth
        for length in range(depth):
            # An identifier of one token has no first two.
            having = [n for n, r in enumerate(found) if len(r.neighbours) > length]
            shares = [found[place].neighbours[length] for place in having]
            chances = [found[place].chance[length] for place in having]
            centres = np.array(having) + (length - (depth - 1) / 2) * height
            label = "same first token" if length == 0 else f"same first {length + 1} tokens"
            bars = axes.barh(centres, shares, height * 0.92, color=_colour(length), label=label)
            axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
            axes.plot(chances, centres, "|", color="black", markersize=6)
        axes.set_yticks(np.arange(len(rows)), list(rows) if panel == 0 else [""] * len(rows))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"share of the nearest neighbours in {space} space")
        _legend_above(axes, columns=2)
        _frame(axes)
        axes.grid(visible=False, axis="y")
    _write(figure, path)
    return True


def _frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    axes.set_axisbelow(True)
