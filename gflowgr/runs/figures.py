"""Figures of runs' and experiments' reports, in the style of :mod:`gflowgr.report.plots`.

Each takes the report's styles, so that a method has one colour in all of them. Methods are compared
as points on a line of their own, so that any number of them can be told apart. Each function writes
a PNG and returns False, leaving no file, if there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.first_level import FirstLevel
from ..report import plots
from ..report.plots import GREY, Logs, Styles
from .results import CellResult
from .summary import MethodRow, Setting, UserGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LOG_Z",
    "LOSSES",
    "VALIDATION",
    "Point",
    "cpu_curve",
    "plot_breakdown",
    "plot_calibration",
    "plot_cpu_curves",
    "plot_curves",
    "plot_difficulty",
    "plot_first_level",
    "plot_grid",
    "plot_points",
    "plot_rewards",
    "validation_over_cpu",
]

LOSSES = {
    "loss_gr": "L_GR: observed item (nats)",
    "loss_gfn": "L_GFN: flow residual (nats²)",
    "loss_preference": "preference loss (nats)",
}
VALIDATION = {"eval_N@10": "validation NDCG@10"}
LOG_Z = {
    "log_z": "learned log Z (nats)",
    "log_z_group": "group estimate of log Z (nats)",
    "log_z_gap_rms": "rms of their difference (nats)",
}


_LINES_AT_MOST = 6
"""Methods in one panel of lines."""


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
    styles: Styles,
    *,
    line: float | None = None,
    bars: bool = False,
) -> bool:
    """A panel per quantity, a line per method: point, bar of spread or interval, seeds in grey.

    Args:
        names: the methods, from the top.
        panels: label of a quantity to its points by method.
        path: of the PNG.
        styles: of the methods.
        line: where a vertical line stands.
        bars: also draw a bar from 0 to the point.
    """
    panels = {label: points for label, points in panels.items() if points}
    names = [name for name in names if any(name in points for points in panels.values())]
    if not names:
        return False
    height = 0.85 + 0.26 * len(names)
    figure, all_axes = plots.panels(len(panels), 3.4, height, left=1.5, columns=2)
    for place, (axes, (label, points)) in enumerate(zip(all_axes, panels.items(), strict=True)):
        if line is not None:
            axes.axvline(line, color="black", linewidth=0.8, linestyle="--", zorder=1)
        for down, name in enumerate(names):
            if name in points:
                _draw_point(axes, down, points[name], styles[name]["color"], bars)
        plots.frame(axes, title=label, grid="x")
        axes.set_ylim(len(names) - 0.5, -0.5)
        shown = names if place % 2 == 0 else [""] * len(names)
        axes.set_yticks(range(len(names)), shown, fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
    return plots.save(figure, path)


def _draw_point(axes: Axes, height: int, point: Point, colour: str, bars: bool) -> None:
    if bars:
        axes.barh(height, point.value, 0.6, color=colour, alpha=0.35, zorder=1.5)
    if len(point.singles) > 1:
        spots: dict[str, Any] = {"color": GREY, "markersize": 4, "zorder": 2}
        axes.plot(point.singles, [height] * len(point.singles), "o", **spots)
    if point.low < point.high:
        axes.plot([point.low, point.high], [height] * 2, color=colour, linewidth=1.6, zorder=3)
    axes.plot(point.value, height, "o", color=colour, markersize=5, zorder=4)


def plot_grid(
    settings: Sequence[Setting],
    rows: Mapping[str, Sequence[MethodRow]],
    path: Path,
    styles: Styles,
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
        styles: of the methods.
        key: what is varied.
        baseline: the method whose level is drawn as a line.
        metrics: a line of panels each.
    """
    shown = [setting for setting in settings if rows.get(setting.title)]
    if not shown:
        return False
    figure = plots.new_figure(0.6 + 3.6 * len(shown), 0.4 + 2.7 * len(metrics))
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
                color=styles[points[0].of or baseline]["color"],
                capsize=3,
                markersize=4,
                linewidth=1.5,
                label="mean ± sd over seeds",
            )
            own = [(row.value, row.metrics[metric].mean) for row in points if row.alias]
            if own:
                label = f"{points[0].of}'s own value"
                style: dict[str, Any] = {"color": "black", "markersize": 10, "fillstyle": "none"}
                axes.plot(*np.array(own).T, "o", label=label, **style)
            if level is not None:
                axes.axhline(
                    level.metrics[metric].mean,
                    color=styles[baseline]["color"],
                    linestyle="--",
                    linewidth=1.2,
                    label=baseline,
                )
            if values.min() > 0 and values.max() / values.min() >= 30:
                axes.set_xscale("log")
            title = setting.title if place == 0 else ""
            plots.frame(axes, title=title, x=key, y=plots.metric_name(metric))
    plots.legend_above(figure, figure.axes, 3)
    return plots.save(figure, path)


def plot_breakdown(
    titles: Mapping[str, Mapping[str, Sequence[UserGroup]]],
    path: Path,
    styles: Styles,
    *,
    metric: str = "R@10",
) -> bool:
    """A metric per part of the users: a panel per division, a line per method; of more methods than
    lines can be told apart, a panel per part and a row per method."""
    titles = {title: methods for title, methods in titles.items() if methods}
    if not titles:
        return False
    names = list(dict.fromkeys(name for found in titles.values() for name in found))
    if len(names) > _LINES_AT_MOST:
        return plot_points(names, _points_of_parts(titles, metric), path, styles)
    figure, all_axes = plots.panels(len(titles), 5.2, 3.4, columns=2)
    for axes, (title, found) in zip(all_axes, titles.items(), strict=True):
        parts = list(dict.fromkeys(g.name for groups in found.values() for g in groups))
        for name, groups in found.items():
            values = {g.name: g.metrics[metric].mean for g in groups if metric in g.metrics}
            shown = [values.get(part, np.nan) for part in parts]
            marked: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.5}
            axes.plot(range(len(parts)), shown, label=name, **marked, **styles[name])
        axes.set_xticks(range(len(parts)), parts)
        plots.frame(axes, title=title.split(" (")[0], y=plots.metric_name(metric))
        axes.set_ylim(bottom=0)
    plots.legend_above(figure, all_axes)
    return plots.save(figure, path)


def _points_of_parts(
    titles: Mapping[str, Mapping[str, Sequence[UserGroup]]], metric: str
) -> dict[str, dict[str, Point]]:
    """Division and part to the methods' points."""
    panels: dict[str, dict[str, Point]] = {}
    for title, found in titles.items():
        for name, groups in found.items():
            for group in groups:
                if metric in group.metrics:
                    value = group.metrics[metric].mean
                    label = f"{title.split(' (')[0]}: {group.name}"
                    panels.setdefault(label, {})[name] = Point(value, value, value)
    return panels


def plot_curves(
    logs: Mapping[str, Logs], keys: Mapping[str, str], path: Path, styles: Styles
) -> bool:
    """Logged values over steps: a panel per key, a line per method; best validations circled."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for key in keys:
        for name, entries in logs.items():
            steps, values = plots.series(entries, key)
            if len(steps):
                found.setdefault(key, {})[name] = (steps, values)
    if not found:
        return False
    figure, all_axes = plots.panels(len(found), 4.6, 3.2)
    for axes, (key, lines) in zip(all_axes, found.items(), strict=True):
        for name, (steps, values) in lines.items():
            plots.draw_series(axes, steps, values, name, styles[name])
            if key.startswith("eval_"):
                _mark_values(axes, steps, values, styles[name]["color"])
        if key.startswith("loss"):
            plots.log_scale_if_wide(axes, [values for _, values in lines.values()])
        plots.frame(axes, title=keys[key], x="optimiser step")
    plots.legend_above(figure, all_axes)
    return plots.save(figure, path)


def cpu_curve(cells: Iterable[CellResult]) -> np.ndarray:
    """CPU seconds and validation NDCG@10, float64 [n, 2], means over seeds (one cell each).

    The seconds are those of training up to the evaluation and of the trainings before it. Of seeds
    that stopped at different steps, the steps that all have; none where CPU time is not recorded.
    """
    by_step = [
        validation_over_cpu(c.logs, c.training.get("cpu_seconds_before", 0.0)) for c in cells
    ]
    if not by_step:
        return np.empty((0, 2))
    common = [step for step in by_step[0] if all(step in other for other in by_step)]
    found = [np.mean([points[step] for points in by_step], axis=0) for step in common]
    return np.asarray(found, np.float64).reshape(-1, 2)


def validation_over_cpu(logs: Logs, before: float) -> dict[float, tuple[float, float]]:
    """Step of each validation to (CPU seconds, NDCG@10), ``before`` being spent at the start."""
    (key,), spent, points = VALIDATION, before, {}
    if not any("cpu_seconds" in entry for entry in logs):
        return {}
    for entry in logs:
        spent += entry.get("cpu_seconds", 0.0)
        if key in entry:
            points[entry["step"]] = (spent, entry[key])
    return points


def plot_cpu_curves(curves: Mapping[str, np.ndarray], path: Path, styles: Styles) -> bool:
    """Validation over CPU time: a curve and a colour per method; the best values circled.

    Args:
        curves: of each method, :func:`cpu_curve`.
        path: of the PNG.
        styles: of the methods.
    """
    curves = {name: points for name, points in curves.items() if len(points)}
    if not curves:
        return False
    figure, (axes,) = plots.panels(1, 6.2, 4.0)
    for name, points in curves.items():
        seconds, values = points.T
        axes.plot(seconds, values, linewidth=1.6, label=name, **styles[name])
        _mark_values(axes, seconds, values, styles[name]["color"])
    plots.frame(axes, x="CPU seconds of training", y=VALIDATION["eval_N@10"])
    axes.set_xlim(left=0)
    plots.legend_above(figure, [axes], 4)
    return plots.save(figure, path)


def _mark_values(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    axes.plot(steps, values, "o", color=colour, markersize=3)
    best = int(np.argmax(values))
    axes.plot(steps[best], values[best], "o", color=colour, markersize=8, fillstyle="none")


def plot_rewards(logs: Mapping[str, Logs], path: Path) -> bool:
    """Mean of each reward signal over steps, a panel per method; augmented items dashed."""
    kinds = {"reward/": "-", "reward_augmented/": "--"}
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, entries in logs.items():
        keys = dict.fromkeys(k for e in entries for k in e if k.startswith(tuple(kinds)))
        lines = {key: plots.series(entries, key) for key in keys}
        if lines:
            found[name] = lines
    if not found:
        return False
    signals = list(dict.fromkeys(k.split("/", 1)[1] for lines in found.values() for k in lines))
    figure, all_axes = plots.panels(len(found), 4.0, 2.9)
    for axes, (name, lines) in zip(all_axes, found.items(), strict=True):
        for key, (steps, values) in lines.items():
            kind, signal = key.split("/", 1)
            what = signal + (", augmented items" if kind == "reward_augmented" else "")
            style: dict[str, Any] = {"color": plots.colour(signals.index(signal))}
            style["linestyle"] = kinds[f"{kind}/"]
            axes.plot(steps, values, linewidth=1.5, label=what, **style)
        plots.frame(axes, title=name, x="optimiser step", y="mean of the signal")
    plots.legend_above(figure, all_axes, 6)
    return plots.save(figure, path)


def plot_difficulty(logs: Mapping[str, Logs], path: Path, styles: Styles) -> bool:
    """How hard the sampled items are: median and the band from the 10% to the 90% quantile."""
    found = {}
    for name, entries in logs.items():
        lines = [plots.series(entries, f"difficulty/q{q}") for q in (10, 50, 90)]
        if all(len(steps) for steps, _ in lines):
            found[name] = lines
    if not found:
        return False
    figure, (axes,) = plots.panels(1, 5.2, 3.2)
    for name, ((steps, low), (_, median), (_, high)) in found.items():
        axes.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.18, linewidth=0)
        axes.plot(steps, median, linewidth=1.5, label=f"{name}: median, 10% to 90%", **styles[name])
    axes.set_ylim(0, 1)
    label = "score quantile of sampled items\n(0 easiest, 1 hardest)"
    plots.frame(axes, x="optimiser step", y=label)
    plots.legend_above(figure, [axes], 2)
    return plots.save(figure, path)


def plot_first_level(levels: Mapping[str, FirstLevel], path: Path, styles: Styles) -> bool:
    """P(first token | prompt), a panel per user: the exact flows' policy grey, a line per method.

    Tokens stand in the order of the target policy, the most probable first.

    Args:
        levels: of each method, of the same users and tokens.
        path: of the PNG.
        styles: of the methods.
    """
    if not levels:
        return False
    first = next(iter(levels.values()))
    figure, all_axes = plots.panels(len(first.users), 4.6, 2.7, columns=2)
    for row, (axes, user) in enumerate(zip(all_axes, first.users, strict=True)):
        target = np.asarray(first.target[row])
        order = np.argsort(-target, kind="stable")
        places = np.arange(1, len(order) + 1)
        axes.fill_between(
            places, target[order], step="mid", color=GREY, alpha=0.6, label="exact flows", lw=0
        )
        for name, level in levels.items():
            values = np.asarray(level.model[row])[order]
            axes.plot(
                places, values, marker=".", markersize=3, linewidth=0.9, label=name, **styles[name]
            )
        y = "P(first token)" if row % 2 == 0 else ""
        plots.frame(axes, title=f"user {user}", x="first tokens, by the target", y=y)
        axes.set_ylim(bottom=0)
    plots.legend_above(figure, all_axes[:1], 4)
    return plots.save(figure, path)


def plot_calibration(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]],
    path: Path,
    styles: Styles,
    *,
    bins: int = 20,
) -> bool:
    """log P against log R of sampled (user, item) pairs, a panel per method on common axes.

    The pairs are grey points; over them the median and the band from the 10% to the 90% quantile of
    log P, in bins of log R that hold equal numbers of pairs. A calibrated generator lies on the
    diagonal.

    Args:
        points: method to log P and log R, both [m], finite and centred per user.
        path: of the PNG.
        styles: of the methods.
        bins: most bins.
    """
    found = {name: pair for name, pair in points.items() if len(pair[0])}
    if not found:
        return False
    figure, all_axes = plots.panels(len(found), 2.9, 2.7, columns=4)
    spots: dict[str, Any] = {"color": GREY, "markersize": 2, "alpha": 0.6, "zorder": 0.9}
    for place, (axes, (name, (log_p, log_r))) in enumerate(
        zip(all_axes, found.items(), strict=True)
    ):
        axes.plot(log_r, log_p, ".", **spots)
        groups = np.array_split(np.argsort(log_r, kind="stable"), min(bins, len(log_r)))
        middle = [np.median(log_r[group]) for group in groups]
        low, median, high = np.array(
            [np.quantile(log_p[group], (0.1, 0.5, 0.9)) for group in groups]
        ).T
        colour = styles[name]["color"]
        axes.fill_between(middle, low, high, color=colour, alpha=0.3, linewidth=0)
        axes.plot(middle, median, color=colour, linewidth=1.5)
        axes.axline((0.0, 0.0), slope=1, color="black", linewidth=1, linestyle="--", label="P ∝ R")
        axes.set_xlim(*plots.limits([pair[1] for pair in found.values()]))
        axes.set_ylim(*plots.limits([pair[0] for pair in found.values()]))
        y = "log P, centred (nats)" if place % 4 == 0 else ""
        plots.frame(axes, title=name, x="log R, centred (nats)", y=y)
    plots.legend_above(figure, all_axes[:1], 1)
    return plots.save(figure, path)
