"""The style of the plots: one colour per method, the same bytes for the same data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from gflowgr.report import plots
from gflowgr.runs import figures
from gflowgr.runs.figures import Point
from gflowgr.runs.summary import Spread, UserGroup

LOGS = [{"step": step, "loss_gr": 5.0 - step / 50, "eval_N@10": 0.1} for step in range(10, 100)]


def test_methods_have_styles_of_their_own() -> None:
    names = [f"method {place}" for place in range(24)]
    styles = plots.method_styles(names)
    assert len({tuple(style.values()) for style in styles.values()}) == 24
    assert len({style["color"] for style in list(styles.values())[:8]}) == 8
    assert plots.method_styles([*names[:3], names[0]]) == {n: styles[n] for n in names[:3]}


def test_a_method_has_one_colour_in_all_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: bool(drawn.append(figure)) or True)
    styles = plots.method_styles(["SASRec", "SFT", "TB"])
    path, pair = tmp_path / "x.png", (np.zeros(3), np.arange(3.0))
    assert figures.plot_curves({"TB": LOGS}, figures.LOSSES, path, styles)
    assert figures.plot_points(["TB"], {"R@5": {"TB": Point(0.1, 0.0, 0.2)}}, path, styles)
    assert figures.plot_calibration({"TB": pair}, path, styles)
    difficulty = [{"step": 1, **{f"difficulty/q{q}": q / 100 for q in (10, 50, 90)}}]
    assert figures.plot_difficulty({"TB": difficulty}, path, styles)
    assert len(drawn) == 4
    for figure in drawn:
        (axes,) = figure.axes
        colours = {line.get_color() for line in axes.lines} - {"black", plots.GREY}
        assert colours == {styles["TB"]["color"]}


@pytest.mark.parametrize(("count", "panels"), [(6, 1), (10, 2)])
def test_ten_methods_have_a_row_each_per_part_of_the_users(
    count: int, panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: bool(drawn.append(figure)) or True)
    names = [f"method {place}" for place in range(count)]
    groups = [UserGroup(part, 5, {"R@10": Spread.of({42: 0.1})}) for part in ("tail", "head")]
    titles = {"Popularity (interactions)": dict.fromkeys(names, groups)}
    styles = plots.method_styles(names)
    assert figures.plot_breakdown(titles, tmp_path / "x.png", styles)
    (figure,) = drawn
    assert len(figure.axes) == panels
    if panels == 2:
        assert [axes.get_title("left") for axes in figure.axes] == [
            "Popularity: tail",
            "Popularity: head",
        ]
        shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert shown == names


def test_calibration_is_the_same_bytes_and_needs_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log_r = rng.normal(size=500)
    points = {"TB": (log_r + 0.1 * rng.normal(size=500), log_r), "SFT": (0 * log_r, log_r)}
    styles = plots.method_styles(points)
    for name in ("one.png", "two.png"):
        assert figures.plot_calibration(points, tmp_path / name, styles)
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    none = {"TB": (np.zeros(0), np.zeros(0))}
    assert not figures.plot_calibration(none, tmp_path / "none.png", styles)
    assert not (tmp_path / "none.png").exists()


def test_only_finite_values_are_drawn() -> None:
    logs = [{"step": 1, "x": float("nan")}, {"step": 2, "x": 3.0}, {"x": 1.0}, {"step": 4}]
    steps, values = plots.series(logs, "x")
    assert steps.tolist() == [2.0]
    assert values.tolist() == [3.0]


def test_many_values_are_smoothed_by_a_running_mean() -> None:
    axes = Figure().add_subplot()
    values = np.arange(100.0)
    plots.draw_series(axes, values, values, "x", {"color": "red", "linestyle": "--"})
    faint, mean = axes.lines
    assert faint.get_alpha() == 0.3
    assert faint.get_ydata().tolist() == values.tolist()
    assert mean.get_label() == "x"
    # The mean of five values stands in their middle.
    assert mean.get_xdata().tolist() == mean.get_ydata().tolist() == values[2:98].tolist()
