"""Plots of identifiers' quality, in the style of the reports'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gflowgr.identifiers.quality import Quality
from gflowgr.report import plots


def plot_code_use(rows: Mapping[str, Quality], path: Path) -> None:
    """Items per token, the most frequent first: a panel per level, a line per set."""
    levels = max(row.levels for row in rows.values())
    styles = plots.method_styles(rows)
    figure, all_axes = plots.panels(levels, 3.1, 3.0, columns=levels)
    for level, axes in enumerate(all_axes):
        for name, row in rows.items():
            if level < row.levels:
                counts = row.frequencies[level]
                places = np.arange(1, len(counts) + 1)
                axes.plot(places, counts, linewidth=1.5, label=name, **styles[name])
        axes.set_yscale("log")
        y = "items per token" if level == 0 else ""
        plots.frame(axes, x=f"level {level + 1}: tokens by frequency", y=y)
    plots.legend_above(figure, all_axes)
    plots.save(figure, path)


def plot_agreement(rows: Mapping[str, Quality], path: Path) -> bool:
    """Neighbours with the same first token(s), a panel per space; False if nothing was measured.

    Bars are the shares, black ticks what chance gives.
    """
    spaces = list(dict.fromkeys(space for row in rows.values() for space in row.agreement))
    if not spaces:
        return False
    height = 0.9 + 0.42 * len(rows)
    figure, all_axes = plots.panels(len(spaces), 4.6, height, left=1.6, columns=len(spaces))
    for panel, (space, axes) in enumerate(zip(spaces, all_axes, strict=True)):
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
            bars = axes.barh(
                centres, shares, height * 0.92, color=plots.colour(length), label=label
            )
            axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=2)
            axes.plot(chances, centres, "|", color="black", markersize=6)
        axes.set_yticks(np.arange(len(rows)), list(rows) if panel == 0 else [""] * len(rows))
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        plots.frame(axes, x=f"share of the nearest neighbours in {space} space", grid="x")
    plots.legend_above(figure, all_axes, 2)
    plots.save(figure, path)
    return True
