"""The part of a report about one dataset and set of identifiers: its tables and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..report.document import Block, Bullets, Paragraph, Picture, Section
from ..report.plots import Styles
from . import figures
from .figures import Point
from .results import ABLATION, MAIN, REFERENCE, START, CellResult, ExperimentResults
from .stages import MASKED, SUMMED
from .statistics import METRICS
from .summary import Comparison, MethodRow, Setting, Spread, UserGroup
from .tables import breakdown_table, cost_table, difference_tables, diversity_table, score_table

__all__ = ["MAIN_GROUPS", "picture", "setting_section", "short_rules"]

MAIN_GROUPS = (REFERENCE, START, MAIN)

_DIVERSITY = {
    "coverage": "coverage",
    "item_entropy": "entropy of items (nats)",
    "intra_list_distance": "intra-list distance",
    "mean_popularity": "mean popularity",
}
_COSTS = {
    "cpu_seconds_in_all": "CPU time in all",
    "seconds_per_step": "time per step",
    "seconds": "time in all",
    "tokens": "tokens",
    "peak_memory_bytes": "peak memory",
}


def setting_section(
    results: ExperimentResults, setting: Setting, out: Path, styles: Styles
) -> Section:
    """The section of a setting; its figures are drawn into ``out/figures``."""
    return _Setting(results, setting, out, styles).section()


def picture(
    out: Path, name: str, title: str, alt: str, draw: Callable[[Path], bool]
) -> list[Block]:
    """The figure, if there is anything to draw."""
    # Letters of any script stay: datasets that differ must not share a figure.
    stem = re.sub(r"[^\w.=-]+", "_", name)
    file = f"figures/{stem}.png"
    return [Picture(file, title, alt)] if draw(out / file) else []


def short_rules(setting: Setting) -> list[tuple[str, str]]:
    """The notes under every table; the main table has all rules."""
    shown = ("Users", "Collisions", "Seen items")
    return [(title, setting.rules[title]) for title in shown if title in setting.rules]


class _Setting:
    """The section of one dataset and set of identifiers."""

    def __init__(
        self, results: ExperimentResults, setting: Setting, out: Path, styles: Styles
    ) -> None:
        self.results, self.setting, self.out, self.styles = results, setting, out, styles
        self.main = setting.of_group(*MAIN_GROUPS)
        self.rules = short_rules(setting)
        self.drawn = [metric for metric in METRICS if metric in setting.metrics]

    def section(self) -> Section:
        baseline, teacher = self.results.baseline, self.results.teacher
        parts = {
            "Validation over CPU time": self._cpu_curves(),
            "Results": self._scores(),
            f"Differences to {baseline}": self._differences(baseline, "to_baseline"),
            f"Differences to {teacher}": self._differences(str(teacher), "to_teacher"),
            "Seen items masked": self._by_rule(MASKED, "seen items masked"),
            f"Together with {teacher}": self._by_rule(
                SUMMED, f"generators together with {teacher}"
            ),
            "Ablations": self._ablations(),
            "Parts of the users": self._breakdown(),
            "Diversity": self._diversity(),
            "Cost": self._cost(),
            "Training": self._curves(),
            "Calibration": self._calibration(),
        }
        sections = [Section(title, blocks) for title, blocks in parts.items() if blocks]
        return Section(self.setting.title, (), sections)

    def _figure(self, kind: str, title: str, alt: str, draw: Callable[[Path], bool]) -> list[Block]:
        name = f"{self.setting.dataset}-{self.setting.identifiers}-{kind}"
        return picture(self.out, name, title, f"{self.setting.title}: {alt}", draw)

    def _scores(self) -> list[Block]:
        if not self.main:
            return []
        shown = [row for row in self.main if row.method != "Popularity"]
        panels = {metric: _spread_points(shown, "metrics", metric) for metric in self.drawn}
        alt = "; ".join(
            f"{row.method} R@10 {row.metrics['R@10'].mean:.4f}, N@10 {row.metrics['N@10'].mean:.4f}"
            for row in shown
        )
        names = [row.method for row in shown]
        note = ("Best", "the largest mean of a column, in bold")
        return [
            score_table("Test users", self.main, [note, *self.setting.rules.items()]),
            *self._figure(
                "metrics",
                "Mean ± standard deviation over seeds; single seeds in grey (popularity: see the "
                "table)",
                alt,
                lambda path: figures.plot_points(names, panels, path, self.styles),
            ),
        ]

    def _cpu_curves(self) -> list[Block]:
        cells = {
            row.method: self.results.seeds_of(
                self.setting.dataset, self.setting.identifiers, row.method
            )
            for row in self.setting.of_group(START, MAIN)
        }
        curves = {name: figures.cpu_curve(found.values()) for name, found in cells.items()}
        ends = {name: curve for name, curve in curves.items() if len(curve)}
        alt = "; ".join(
            f"{name} {found[:, 1].max():.4f} within {found[-1, 0]:,.0f} CPU seconds"
            for name, found in ends.items()
        )
        return self._figure(
            "cpu",
            "Validation NDCG@10 over CPU time, mean over seeds; a curve begins after the trainings "
            "that its method needs (start, collaborative model)",
            alt,
            lambda path: figures.plot_cpu_curves(ends, path, self.styles),
        )

    def _differences(self, other: str, which: str) -> list[Block]:
        found = [(row.method, getattr(row, which)) for row in self.main]
        pairs = [(name, each) for name, each in found if each is not None]
        shown = [pair for pair in pairs if pair[0] != "Popularity"]
        if not pairs:
            return []
        return [
            *difference_tables(f"Less {other}", pairs, self.rules),
            *self._intervals(f"differences-{other}", shown),
        ]

    def _by_rule(self, name: str, title: str) -> list[Block]:
        setting = self.setting.also.get(name)
        if setting is None:
            return []
        rows, rules = setting.of_group(*MAIN_GROUPS), short_rules(setting)
        if name == SUMMED:
            rules.append(("Order", "of a generator's beams: the sum of both log-probabilities"))
        blocks: list[Block] = [score_table(f"Test users, {title}", rows, rules)]
        for which in ("to_baseline", "to_teacher"):
            found = [(row.method, getattr(row, which)) for row in rows]
            pairs = [(name, each) for name, each in found if each is not None]
            if pairs:
                blocks += difference_tables(f"Less {pairs[0][1].against}", pairs, rules)
        return blocks

    def _ablations(self) -> list[Block]:
        pairs = [
            (row.method, row.to_full)
            for row in self.setting.of_group(ABLATION)
            if row.to_full is not None
        ]
        rows = self.setting.of_group(ABLATION)
        if not rows:
            return []
        fulls = [row for row in self.main if row.method in {each.of for each in rows}]
        blocks: list[Block] = [score_table("Test users", [*fulls, *rows], self.rules)]
        if pairs:
            blocks += difference_tables("Less the full method", pairs, self.rules)
            blocks += self._intervals("ablations", pairs, bars=True)
        return blocks

    def _intervals(
        self, kind: str, pairs: Sequence[tuple[str, Comparison]], bars: bool = False
    ) -> list[Block]:
        panels = {
            f"{metric}, difference": {
                name: Point(d.mean, d.low, d.high)
                for name, found in pairs
                for d in [found.metrics[metric]]
            }
            for metric in self.drawn
        }
        names = [name for name, _ in pairs]
        against = " or ".join(dict.fromkeys(found.against for _, found in pairs))
        alt = "; ".join(f"{name} R@10 {f.metrics['R@10'].mean:+.4f}" for name, f in pairs)
        return self._figure(
            kind,
            f"Difference to {against} with 95 % bootstrap interval over users",
            alt,
            lambda path: figures.plot_points(names, panels, path, self.styles, line=0.0, bars=bars),
        )

    def _breakdown(self) -> list[Block]:
        blocks: list[Block] = []
        titles: dict[str, dict[str, Sequence[UserGroup]]] = {}
        for title in dict.fromkeys(title for row in self.main for title in row.breakdown):
            found = [row for row in self.main if title in row.breakdown]
            blocks.append(breakdown_table(title, found, self.rules))
            titles[title] = {row.method: row.breakdown[title] for row in found}
        alt = "R@10 of each method per part of the users: " + "; ".join(titles)
        return blocks + self._figure(
            "breakdown", "R@10 per part of the users, mean over seeds", alt,
            lambda path: figures.plot_breakdown(titles, path, self.styles),
        )  # fmt: skip

    def _diversity(self) -> list[Block]:
        rows = [row for row in self.main if row.diversity]
        if not rows:
            return []
        panels = {
            label: _spread_points(rows, "diversity", key) for key, label in _DIVERSITY.items()
        }
        alt = "; ".join(
            f"{row.method} coverage {row.diversity['coverage'].mean:.3f}"
            for row in rows
            if "coverage" in row.diversity
        )
        names = [row.method for row in rows]
        return [
            diversity_table("Recommended lists of 10", rows, self.rules),
            *self._figure(
                "diversity", "Diversity of the recommended lists; single seeds in grey", alt,
                lambda path: figures.plot_points(names, panels, path, self.styles),
            ),
        ]  # fmt: skip

    def _cost(self) -> list[Block]:
        rows = [row for row in self.main if row.training]
        if not rows:
            return []
        compared = [row for row in rows if row.relative and row.group == MAIN]
        panels = {
            label: {
                row.method: Point(row.relative[key], row.relative[key], row.relative[key])
                for row in compared
                if key in row.relative
            }
            for key, label in _COSTS.items()
        }
        names = [row.method for row in compared]
        alt = "; ".join(
            f"{row.method} {row.relative['seconds_per_step']:.2f} times the time per step"
            for row in compared
            if "seconds_per_step" in row.relative
        )
        return [
            cost_table("Training", rows, self.results.baseline),
            *self._figure(
                "cost", f"Cost relative to {self.results.baseline}", alt,
                lambda path: figures.plot_points(
                    names, panels, path, self.styles, line=1.0, bars=True
                ),
            ),
        ]  # fmt: skip

    def _curves(self) -> list[Block]:
        cells = self._cells_of_one_seed()
        logs = {name: cell.logs for name, cell in cells.items() if name != "SFT"}
        if not logs:
            return []
        seed = next(iter(cells.values())).seed
        names = ", ".join(logs)
        blocks = self._figure(
            "curves", f"Losses and validation, seed {seed}", f"curves over steps of {names}",
            lambda path: figures.plot_curves(
                logs, figures.LOSSES | figures.VALIDATION, path, self.styles
            ),
        )  # fmt: skip
        blocks += self._figure(
            "log_z", f"log Z and its group estimate, means over prompts, seed {seed}",
            "log Z over steps of the methods that have one",
            lambda path: figures.plot_curves(logs, figures.LOG_Z, path, self.styles),
        )  # fmt: skip
        return blocks + self._figure(
            "rewards", f"Reward signals, means over trajectories, seed {seed}",
            "mean of each reward signal over steps, of the observed and of the augmented items",
            lambda path: figures.plot_rewards(logs, path),
        )  # fmt: skip

    def _calibration(self) -> list[Block]:
        cells = self._cells_of_one_seed()
        points = {
            name: (cell.analysis.log_p, cell.analysis.log_r)
            for name, cell in cells.items()
            if len(cell.analysis.log_p)
        }
        if not points:
            return []
        seed = next(iter(cells.values())).seed
        entries = [
            (row.method, ", ".join(f"{n} {s.mean:.3f}" for n, s in row.calibration.items()))
            for row in self.main
            if row.calibration
        ]
        text = (
            "Correlation, within users and over the whole catalogue, of the exact log P(item) with "
            "log R(item), mean over users and seeds; R is the same for all methods."
        )
        return [
            Paragraph(text),
            Bullets(entries),
            *self._figure(
                "calibration",
                f"log P against log R of sampled items, each centred per user, seed {seed}",
                "; ".join(f"{name}: {text}" for name, text in entries),
                lambda path: figures.plot_calibration(points, path, self.styles),
            ),
            *self._first_level(cells),
        ]

    def _first_level(self, cells: Mapping[str, CellResult]) -> list[Block]:
        found = {name: cell.analysis.first_level for name, cell in cells.items()}
        levels = {name: level for name, level in found.items() if level is not None}
        if not levels:
            return []
        gaps = {
            name: 0.5 * np.abs(np.subtract(level.target, level.model)).sum(axis=1).mean()
            for name, level in levels.items()
        }
        alt = "; ".join(f"{name} {gap:.3f}" for name, gap in gaps.items())
        return self._figure(
            "first_level",
            "The tree's first level: the policy of the exact flows of the common reward, and each "
            f"model's, for a few users (mean total variation: {alt})",
            f"probability of first tokens for a few users; total variation from the target: {alt}",
            lambda path: figures.plot_first_level(levels, path, self.styles),
        )

    def _cells_of_one_seed(self) -> dict[str, CellResult]:
        """The start and main methods of the first of the seeds that have most of them."""
        setting = self.setting
        found = {
            row.method: self.results.seeds_of(setting.dataset, setting.identifiers, row.method)
            for row in setting.of_group(START, MAIN)
        }
        counts = {s: sum(s in cells for cells in found.values()) for s in self.results.seeds}
        seed = max(counts, key=lambda each: counts[each])
        return {name: cells[seed] for name, cells in found.items() if seed in cells}


def _spread_points(rows: Sequence[MethodRow], what: str, key: str) -> dict[str, Point]:
    points = {}
    for row in rows:
        spread: Spread | None = getattr(row, what).get(key)
        if spread is not None:
            sd = spread.sd or 0.0
            singles = list(spread.values.values())
            points[row.method] = Point(spread.mean, spread.mean - sd, spread.mean + sd, singles)
    return points
