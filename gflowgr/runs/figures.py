"""Figures of an experiment's report, in the style of :mod:`gflowgr.report.plots`.

Methods are compared as points on a line of their own, so that any number of them can be told apart
without colours. Each function writes a PNG and returns False, leaving no file, if there is nothing
to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.plots import (
    _GREY,
    Logs,
    _colour,
    _figure,
    _log_scale_if_wide,
    _metric_name,
    _series,
    _smooth_line,
    _write,
)
from .summary import Group, Row, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Point",
    "plot_breakdown",
    "plot_calibration",
    "plot_curves",
    "plot_grid",
    "plot_points",
    "plot_rewards",
]

_COLUMNS = 3  # panels side by side
_LINES = ("-", "--", ":")


@dataclass(frozen=True)
class Point:
    """A value, the ends of its bar, and the single values (one per seed) shown behind it."""

    value: float
    low: float
    high: float
    singles: Sequence[float] = ()


def plot_points(
    names: Sequence[str],
    panels: Mapping[str, Mapping[str, Point]],
    path: Path,
    *,
    line: Mapping[str, float] | float | None = None,
    bars: bool = False,
) -> bool:
    """A panel per quantity, a line per method: point, bar of spread or interval, seeds in grey.

    Args:
        names: the methods, from the top.
        panels: label of a quantity to its points by method.
        path: of the PNG.
        line: where a vertical line stands, in all panels or by label.
        bars: also draw a bar from 0 to the point.
    """
    panels = {label: points for label, points in panels.items() if points}
    names = [name for name in names if any(name in points for points in panels.values())]
    if not names:
        return False
    figure, all_axes = _grid(len(panels), 2.9, 0.85 + 0.26 * len(names), left=1.5, columns=4)
    for place, (axes, (label, points)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        at = line.get(label) if isinstance(line, Mapping) else line
        if at is not None:
            axes.axvline(at, color="black", linewidth=0.8, linestyle="--", zorder=1)
        for height, name in enumerate(names):
            if name in points:
                _draw_point(axes, height, points[name], bars)
        _frame(axes, label, "x")
        axes.set_ylim(len(names) - 0.5, -0.5)
        shown = names if place % 4 == 0 else [""] * len(names)
        axes.set_yticks(range(len(names)), shown, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    return _write(figure, path)


def _draw_point(axes: Axes, height: int, point: Point, bars: bool) -> None:
    colour = _colour(0)
    if bars:
        axes.barh(height, point.value, 0.6, color=colour, alpha=0.35, zorder=1.5)
    if len(point.singles) > 1:
        spots: dict[str, Any] = {"color": _GREY, "markersize": 4, "zorder": 2}
        axes.plot(point.singles, [height] * len(point.singles), "o", **spots)
    if point.low < point.high:
        axes.plot([point.low, point.high], [height] * 2, color=colour, linewidth=1.6, zorder=3)
    axes.plot(point.value, height, "o", color=colour, markersize=5, zorder=4)


def plot_grid(
    settings: Sequence[Setting],
    rows: Mapping[str, Sequence[Row]],
    path: Path,
    *,
    key: str,
    baseline: str,
    metrics: Sequence[str] = ("R@10", "N@10"),
) -> bool:
    """A metric over the values of a grid: mean and spread, the varied method's own value marked.

    Args:
        settings: a column each.
        rows: title of a setting to the grid's rows there.
        path: of the PNG.
        key: what is varied.
        baseline: the method whose level is drawn as a line.
        metrics: a line of panels each.
    """
    shown = [setting for setting in settings if rows.get(setting.title)]
    if not shown:
        return False
    figure = _figure(0.6 + 3.6 * len(shown), 0.4 + 2.7 * len(metrics))
    for column, setting in enumerate(shown):
        points = sorted(rows[setting.title], key=lambda row: row.value or 0.0)
        values = np.array([row.value for row in points], np.float64)
        level = next((row for row in setting.rows if row.method == baseline), None)
        for place, metric in enumerate(metrics):
            axes = figure.add_subplot(len(metrics), len(shown), place * len(shown) + column + 1)
            spreads = [row.metrics[metric] for row in points]
            axes.errorbar(
                values,
                [each.mean for each in spreads],
                yerr=[each.sd or 0.0 for each in spreads],
                fmt="o-",
                color=_colour(0),
                capsize=3,
                markersize=4,
                linewidth=1.5,
                label="mean ± sd over seeds",
            )
            own = [(row.value, row.metrics[metric].mean) for row in points if row.alias]
            if own:
                label = f"{points[0].of}'s own value"
                style: dict[str, Any] = {"color": _colour(3), "markersize": 10, "fillstyle": "none"}
                axes.plot(*np.array(own).T, "o", label=label, **style)
            if level is not None:
                axes.axhline(
                    level.metrics[metric].mean,
                    color=_colour(6),
                    linestyle="--",
                    linewidth=1.2,
                    label=baseline,
                )
            if values.min() > 0 and values.max() / values.min() >= 30:
                axes.set_xscale("log")
            _frame(axes, setting.title if place == 0 else "", "y")
            axes.set_ylabel(_metric_name(metric), fontsize=9)
            axes.set_xlabel(key, fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=3 if len(shown) > 1 else 1,
        fontsize=8, frameon=False,
    )  # fmt: skip
    return _write(figure, path)


def plot_breakdown(
    titles: Mapping[str, Mapping[str, Sequence[Group]]], path: Path, *, metric: str = "R@10"
) -> bool:
    """A metric per part of the users: a panel per division, a line per method."""
    titles = {title: methods for title, methods in titles.items() if methods}
    if not titles:
        return False
    methods = list(dict.fromkeys(name for each in titles.values() for name in each))
    figure, all_axes = _grid(len(titles), 5.2, 3.4, columns=2)
    for axes, (title, found) in zip(all_axes, titles.items(), strict=True):
        parts = list(dict.fromkeys(g.name for groups in found.values() for g in groups))
        for name, groups in found.items():
            values = {g.name: g.metrics[metric].mean for g in groups if metric in g.metrics}
            style = _style(methods.index(name))
            shown = [values.get(part, np.nan) for part in parts]
            axes.plot(range(len(parts)), shown, "o", markersize=4, label=name, **style)
        axes.set_xticks(range(len(parts)), parts, fontsize=8)
        _frame(axes, title.split(" (")[0], "y")
        axes.set_ylabel(_metric_name(metric), fontsize=9)
        axes.set_ylim(bottom=0)
    _figure_legend(figure, all_axes, 5)
    return _write(figure, path)


def plot_curves(logs: Mapping[str, Logs], keys: Mapping[str, str], path: Path) -> bool:
    """Logged values over steps: a panel per key, a line per method."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key in keys:
        for name, entries in logs.items():
            steps, values = _series(entries, key)
            if len(steps):
                found.setdefault(key, {})[name] = (steps, values)
    if not found:
        return False
    methods = list(logs)
    figure, all_axes = _grid(len(found), 4.6, 3.2)
    for axes, (key, lines) in zip(all_axes, found.items(), strict=True):
        for name, (steps, values) in lines.items():
            style = _style(methods.index(name))
            marked: dict[str, Any] = (
                {"marker": "o", "markersize": 3} if key.startswith("eval_") else {}
            )
            if len(values) >= 60:
                _smooth_line(axes, steps, values, name, style["color"])
            else:
                axes.plot(steps, values, label=name, **style, **marked)
        if key.startswith("loss"):
            _log_scale_if_wide(axes, [values for _, values in lines.values()])
        _frame(axes, keys[key], "y")
        axes.set_xlabel("optimiser step", fontsize=9)
    _figure_legend(figure, all_axes, 5)
    return _write(figure, path)


def plot_rewards(logs: Mapping[str, Logs], path: Path) -> bool:
    """Mean of each reward signal over steps, a panel per method; augmented items dashed."""
    kinds = {"reward/": "-", "reward_augmented/": "--"}
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, entries in logs.items():
        keys = dict.fromkeys(k for e in entries for k in e if k.startswith(tuple(kinds)))
        lines = {key: _series(entries, key) for key in keys}
        if lines:
            found[name] = lines
    if not found:
        return False
    signals = list(dict.fromkeys(k.split("/", 1)[1] for lines in found.values() for k in lines))
    figure, all_axes = _grid(len(found), 4.0, 2.9)
    for axes, (name, lines) in zip(all_axes, found.items(), strict=True):
        for key, (steps, values) in lines.items():
            kind, signal = key.split("/", 1)
            colour = _colour(signals.index(signal))
            what = signal + (", augmented items" if kind == "reward_augmented" else "")
            axes.plot(
                steps, values, kinds[f"{kind}/"], color=colour, linewidth=1.5, label=what
            )  # fmt: skip
        _frame(axes, name, "y")
        axes.set_xlabel("optimiser step", fontsize=9)
    _figure_legend(figure, all_axes, 6)
    return _write(figure, path)


def plot_calibration(points: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> bool:
    """log P against log R of sampled (user, item) pairs, a panel per method on common axes.

    Args:
        points: method to log P and log R, both [m] and centred per user.
        path: of the PNG.
    """
    found = {name: pair for name, pair in points.items() if len(pair[0])}
    if not found:
        return False
    figure, all_axes = _grid(len(found), 2.9, 2.7, columns=4)
    for place, (axes, (name, (log_p, log_r))) in enumerate(
        zip(all_axes, found.items(), strict=True)
    ):
        spots: dict[str, Any] = {"color": _colour(0), "markersize": 2, "alpha": 0.35}
        axes.plot(log_r, log_p, ".", **spots)
        axes.axline((0.0, 0.0), slope=1, color="black", linewidth=1, linestyle="--", label="P ∝ R")
        _frame(axes, name, "y")
        axes.set_xlim(*_limits([pair[1] for pair in found.values()]))
        axes.set_ylim(*_limits([pair[0] for pair in found.values()]))
        axes.set_xlabel("log R, centred (nats)", fontsize=8)
        if place % 4 == 0:
            axes.set_ylabel("log P, centred (nats)", fontsize=8)
    _figure_legend(figure, all_axes[:1], 1)
    return _write(figure, path)


def _limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of an axis that holds all values."""
    low = min(float(each.min()) for each in values)
    high = max(float(each.max()) for each in values)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _grid(
    count: int, width: float, height: float, *, left: float = 0.0, columns: int = _COLUMNS
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, ``columns`` side by side; sizes in inches, one per panel."""
    across = 2 if count == 4 and columns == 3 else min(count, columns)
    down = -(-count // columns)
    figure = _figure(left + width * across, 0.4 + height * down)
    return figure, [figure.add_subplot(down, across, place + 1) for place in range(count)]


def _style(place: int) -> dict[str, Any]:
    """Colour and line of a method: the palette once per kind of line."""
    line = _LINES[place // 8 % len(_LINES)]
    return {"color": _colour(place), "linestyle": line, "linewidth": 1.5}


def _frame(axes: Axes, title: str, grid: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=_GREY, alpha=0.4, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _figure_legend(figure: Figure, all_axes: Sequence[Axes], columns: int) -> None:
    """One legend for all panels, outside of them."""
    handles: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    width = figure.get_size_inches()[0]
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=max(1, min(columns, int(width / 1.9))),
        fontsize=8,
        frameon=False,
    )
