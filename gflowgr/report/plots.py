"""The style of all plots: colours per method, panels, frames, legends, lines and PNG files.

Drawn on matplotlib figures without ``pyplot``, so nothing global (backend, style) is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflowgr import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GREY",
    "Logs",
    "Styles",
    "colour",
    "draw_series",
    "frame",
    "legend_above",
    "limits",
    "log_scale_if_wide",
    "method_styles",
    "metric_name",
    "new_figure",
    "panels",
    "save",
    "series",
]

Logs = Sequence[Mapping[str, float]]
"""A ``log_history`` as the Trainer leaves it."""

Styles = Mapping[str, Mapping[str, Any]]
"""By method, its colour and kind of line, as matplotlib's keywords."""

# Okabe and Ito's palette: told apart by colour-blind readers and in grey print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#000000")
_LINES = ("-", "--", ":")
GREY = "#B0B0B0"
_MANY = 60  # values of a line from which on a running mean is drawn


def colour(place: int) -> str:
    """The colour at a place of the palette, which is repeated."""
    return _COLOURS[place % len(_COLOURS)]


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and line of each method, for all figures of a report: the palette once per line."""
    styles: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(dict.fromkeys(names)):
        line = _LINES[place // len(_COLOURS) % len(_LINES)]
        styles[name] = {"color": colour(place), "linestyle": line}
    return styles


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def panels(
    count: int, width: float, height: float, *, left: float = 0.0, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, ``columns`` side by side.

    Args:
        count: how many panels.
        width: of one panel, in inches, as ``height``.
        left: width to add for what stands left of the first panel.
        columns: most panels side by side.
    """
    across = 2 if count == 4 and columns == 3 else min(count, columns)
    down = -(-count // columns)
    # A single panel is wider, for the legend above it.
    figure = new_figure(left + width * max(across, 1.3), 0.4 + height * down)
    return figure, [figure.add_subplot(down, across, place + 1) for place in range(count)]


def frame(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: str = "y") -> None:
    """A quiet frame: two spines, a faint grid along one axis, small labels."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GREY, alpha=0.4, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def legend_above(figure: Figure, all_axes: Sequence[Axes], columns: int = 5) -> None:
    """One legend for all panels, outside of them: it hides no line."""
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


def series(logs: Logs, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, both float64 [n], of the finite entries of one key."""
    pairs = [(entry["step"], entry[key]) for entry in logs if key in entry and "step" in entry]
    table = np.asarray(pairs, np.float64).reshape(-1, 2)
    table = table[np.isfinite(table).all(1)]
    return table[:, 0], table[:, 1]


def draw_series(
    axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, style: Mapping[str, Any]
) -> None:
    """The values; where they are many, faint, with a running mean over 5% of them on top."""
    if len(values) < _MANY:
        axes.plot(steps, values, linewidth=1.5, label=label, **style)
        return
    window = len(values) // 20
    axes.plot(steps, values, color=style["color"], linewidth=0.8, alpha=0.3)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    mean = (sums[window:] - sums[:-window]) / window
    first = window // 2
    axes.plot(steps[first : first + len(mean)], mean, linewidth=1.8, label=label, **style)


def log_scale_if_wide(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """A logarithmic y axis if the values, all positive, span a factor of 50."""
    flat = np.concatenate(list(values))
    if flat.min() > 0 and flat.max() / flat.min() > 50:
        axes.set_yscale("log")


def limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of an axis that holds all values."""
    low = min(float(each.min()) for each in values)
    high = max(float(each.max()) for each in values)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def metric_name(key: str) -> str:
    """A metric, spelled out."""
    return key.replace("R@", "Recall@").replace("N@", "NDCG@")


def save(figure: Figure, path: Path) -> bool:
    """Write the PNG, whole or not at all; True, for functions that say whether they drew."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with files.atomic_path(path) as temporary:
        # No version or date in the file: the same data gives the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return True
