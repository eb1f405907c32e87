"""Plots of a report. Each takes the Trainer's ``log_history`` lists as they are.

Drawn on matplotlib figures without ``pyplot``, so nothing global (backend, style) is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflowgr import files
from gflowgr.report.tables import TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Logs = Sequence[Mapping[str, float]]

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#000000")
_GREY = "#B0B0B0"


def plot_metrics(
    rows: Sequence[TableRow], path: Path, *, columns: Sequence[str] = ("R@5", "R@10", "N@5", "N@10")
) -> bool:
    """Bars of each metric, one colour per method; False, and no file, if there is nothing."""
    shown = [key for key in columns if any(key in row.metrics for row in rows)]
    if not shown:
        return False
    figure = _figure(max(7.0, 1.1 + 0.42 * len(rows) * len(shown)), 3.9)
    axes = figure.add_subplot()
    width = 0.84 / len(rows)
    small = len(rows) > 6
    for place, row in enumerate(rows):
        centres = np.arange(len(shown)) + (place - (len(rows) - 1) / 2) * width
        heights = [row.metrics.get(key, np.nan) for key in shown]
        errors = [row.spread.get(key, 0.0) for key in shown] if row.spread else None
        bars = axes.bar(
            centres,
            heights,
            width * 0.92,
            label=row.name,
            yerr=errors,
            color=_colour(place),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        axes.bar_label(bars, fmt="%.4f", fontsize=6 if small else 7, padding=2, rotation=90)
    axes.set_xticks(np.arange(len(shown)), [_metric_name(key) for key in shown])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("mean over users")
    axes.margins(y=0.22)
    axes.set_ylim(bottom=0)
    _legend_above(axes, columns=min(len(rows), 5))
    return _write(figure, path)


def plot_losses(stages: Mapping[str, Logs], path: Path) -> bool:
    """Training losses over steps, a panel per loss and a line per stage."""
    panels = [
        ("loss_gr", "L_GR: observed item (nats)"),
        ("loss_gfn", "L_GFN: flow residual (nats²)"),
        ("loss", "training loss (nats)"),
    ]
    # A stage that logs L_GR shows it in place of the total, which mixes two units.
    lines: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for stage, logs in stages.items():
        for key, _ in panels:
            if key == "loss" and len(_series(logs, "loss_gr")[0]):
                continue
            series = _series(logs, key)
            if len(series[0]):
                lines.setdefault(key, {})[stage] = series
    shown = [(key, label) for key, label in panels if key in lines]
    if not shown:
        return False
    figure = _figure(4.4 * max(len(shown), 1.5), 3.6)
    for place, (key, label) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), place + 1)
        for stage, (steps, values) in lines[key].items():
            _smooth_line(axes, steps, values, stage, _colour(list(stages).index(stage)))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
        if key == "loss_gfn":
            _log_scale_if_wide(axes, [values for _, values in lines[key].values()])
        _legend_above(axes, columns=2)
    return _write(figure, path)


def plot_validation(stages: Mapping[str, Logs], path: Path, *, key: str = "eval_N@10") -> bool:
    """A validation metric over steps, the best value of each stage marked."""
    found = {stage: _series(logs, key) for stage, logs in stages.items()}
    found = {stage: series for stage, series in found.items() if len(series[0])}
    if not found:
        return False
    figure = _figure(6.6, 3.6)
    axes = figure.add_subplot()
    for stage, (steps, values) in found.items():
        colour = _colour(list(stages).index(stage))
        best = int(np.argmax(values))
        axes.plot(
            steps,
            values,
            "o-",
            color=colour,
            markersize=3,
            linewidth=1.5,
            label=f"{stage} (best {values[best]:.4f})",
        )
        axes.plot(steps[best], values[best], "o", color=colour, markersize=8, fillstyle="none")
    axes.set_xlabel("optimiser step of the stage")
    axes.set_ylabel("validation " + key.removeprefix("eval_"))
    _legend_above(axes, columns=2)
    return _write(figure, path)


def plot_log_z(stages: Mapping[str, Logs], path: Path) -> bool:
    """The learned log Z beside the group estimate, a panel per stage that has both or one."""
    labels = {"log_z": "learned log Z", "log_z_group": "group estimate"}
    found = _panels(stages, labels)
    if not found:
        return False
    figure = _figure(5.6 * max(1.0, 0.8 * len(found)), 3.6)
    for place, (stage, lines) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), place + 1)
        for key, (steps, values) in lines.items():
            style = "--" if key == "log_z_group" else "-"
            colour = _COLOURS[list(labels).index(key)]
            axes.plot(steps, values, style, label=labels[key], color=colour, linewidth=1.5)
        _finish_panel(axes, stage, "log Z, mean over prompts (nats)", place, len(found))
    return _write(figure, path)


def plot_rewards(stages: Mapping[str, Logs], path: Path) -> bool:
    """Mean of each reward component over steps; augmented trajectories dashed where logged."""
    keys = {
        f"{kind}/{part}": part
        for kind in ("reward", "reward_augmented")
        for part in ("r_a", "r_yhat", "r_sim")
    }
    found = _panels(stages, keys)
    if not found:
        return False
    figure = _figure(5.6 * max(1.0, 0.8 * len(found)), 3.6)
    parts = list(dict.fromkeys(keys.values()))
    for place, (stage, lines) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), place + 1)
        split = any(key.startswith("reward_augmented/") for key in lines)
        for key, (steps, values) in lines.items():
            augmented = key.startswith("reward_augmented/")
            label = keys[key] + ((", augmented" if augmented else ", observed") if split else "")
            axes.plot(
                steps,
                values,
                "--" if augmented else "-",
                label=label,
                color=_COLOURS[parts.index(keys[key])],
                linewidth=1.5,
            )
        _finish_panel(axes, stage, "reward component, mean", place, len(found))
    return _write(figure, path)


def plot_difficulty(stages: Mapping[str, Logs], path: Path) -> bool:
    """How hard the sampled items are: median and the band from the 10% to the 90% quantile."""
    keys = {f"difficulty/q{q}": q for q in (10, 50, 90)}
    found = {s: v for s, v in _panels(stages, keys).items() if len(v) == len(keys)}
    if not found:
        return False
    figure = _figure(6.6, 3.6)
    axes = figure.add_subplot()
    for stage, lines in found.items():
        colour = _colour(list(stages).index(stage))
        steps, low = lines["difficulty/q10"]
        high, median = lines["difficulty/q90"][1], lines["difficulty/q50"][1]
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, median, color=colour, linewidth=1.5, label=f"{stage}: median, 10% to 90%")
    axes.set_ylim(0, 1)
    axes.set_xlabel("optimiser step of the stage")
    axes.set_ylabel("score quantile of sampled items\n(0 easiest, 1 hardest)")
    _legend_above(axes, columns=2)
    return _write(figure, path)


def plot_calibration(
    flows: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path, *, bins: int = 20
) -> bool:
    """log P against log R, a panel per model: items as points, binned median and 10% to 90% band.

    Each prompt's values are shown relative to their means over its items, so that neither its log Z
    nor its sum of rewards matters: a calibrated generator lies on the diagonal. At most 6,000
    points are drawn (evenly spaced through the data); bins hold equal numbers of all of them.

    Args:
        flows: per model log P and log R (times beta), both [B, items]; pairs that are not both
            finite are left out.
        path: where the PNG goes.
        bins: quantile bins of log R.
    """
    found = {name: _centred_pairs(*pair) for name, pair in flows.items()}
    found = {name: pairs for name, pairs in found.items() if pairs.shape[1]}
    if not found:
        return False
    figure = _figure(4.6 * len(found), 4.0)
    for place, (name, (log_p, log_r)) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), place + 1)
        shown = slice(None, None, -(-len(log_r) // 6_000))
        points: dict[str, Any] = {"color": _GREY, "markersize": 1.5, "alpha": 0.5, "zorder": 0.9}
        axes.plot(log_r[shown], log_p[shown], ".", **points)
        groups = np.array_split(np.argsort(log_r, kind="stable"), min(bins, len(log_r)))
        middle = [np.median(log_r[group]) for group in groups]
        low, median, high = np.array(
            [np.quantile(log_p[group], (0.1, 0.5, 0.9)) for group in groups]
        ).T
        colour = _colour(place)
        axes.fill_between(middle, low, high, color=colour, alpha=0.3, linewidth=0)
        axes.plot(middle, median, color=colour, linewidth=1.5, label="median, 10% to 90%")
        axes.axline((0.0, 0.0), slope=1, color="black", linewidth=1, linestyle="--", label="P ∝ R")
        axes.set_xlabel("log R, less the prompt's mean (nats)")
        if place == 0:
            axes.set_ylabel("log P, less the prompt's mean (nats)")
        axes.set_title(name, fontsize=9, loc="left", pad=26)
        _legend_above(axes, columns=2)
    return _write(figure, path)


def _centred_pairs(log_p: np.ndarray, log_r: np.ndarray) -> np.ndarray:
    """(log P, log R) [2, n] of all prompts' items, less each prompt's means."""
    pairs = np.stack([np.asarray(log_p, np.float64), np.asarray(log_r, np.float64)])
    good = np.isfinite(pairs).all(0)
    count = np.maximum(good.sum(-1), 1)
    mean = np.where(good, pairs, 0.0).sum(-1) / count
    return (pairs - mean[..., None])[:, good]


def _series(logs: Logs, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(entry["step"], entry[key]) for entry in logs if key in entry and "step" in entry]
    table = np.asarray(pairs, np.float64).reshape(-1, 2)
    table = table[np.isfinite(table).all(1)]
    return table[:, 0], table[:, 1]


def _panels(
    stages: Mapping[str, Logs], keys: Mapping[str, Any]
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    found = {}
    for stage, logs in stages.items():
        lines = {key: _series(logs, key) for key in keys}
        lines = {key: series for key, series in lines.items() if len(series[0])}
        if lines:
            found[stage] = lines
    return found


def _smooth_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str
) -> None:
    """The values; where they are many, faint, with a running mean over 5% of them on top."""
    window = len(values) // 20
    if window < 3:
        axes.plot(steps, values, color=colour, linewidth=1.5, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    mean = (sums[window:] - sums[:-window]) / window
    first = window // 2
    axes.plot(steps[first : first + len(mean)], mean, color=colour, linewidth=1.8, label=label)


def _log_scale_if_wide(axes: Axes, series: Sequence[np.ndarray]) -> None:
    values = np.concatenate(list(series))
    if values.min() > 0 and values.max() / values.min() > 50:
        axes.set_yscale("log")


def _finish_panel(axes: Axes, stage: str, label: str, place: int, panels: int) -> None:
    axes.set_xlabel("optimiser step")
    if place == 0:
        axes.set_ylabel(label)
    if panels > 1:
        axes.set_title(stage, fontsize=9, loc="left", pad=26)
    _legend_above(axes, columns=3)


def _metric_name(key: str) -> str:
    return key.replace("R@", "Recall@").replace("N@", "NDCG@")


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _legend_above(axes: Axes, columns: int) -> None:
    """Frameless legend over the axes, and a quiet frame: no line is ever hidden."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        fontsize=8,
        frameon=False,
        handlelength=1.4,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GREY, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


def _write(figure: Figure, path: Path) -> bool:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with files.atomic_path(path) as temporary:
        # No version or date in the file: the same data gives the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return True
