"""The numbers of a report: one :class:`Setting` per dataset and identifiers, one row per method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import DataError
from .results import (
    ABLATION,
    GRID,
    MAIN,
    REFERENCE,
    START,
    CellResult,
    ExperimentResults,
    MethodFacts,
)
from .stages import MASKED, SUMMED
from .statistics import Difference, compare, mean_and_spread, ranking_metrics

__all__ = [
    "Comparison",
    "MethodRow",
    "Setting",
    "Spread",
    "UserGroup",
    "labelled",
    "summarise",
    "to_json",
    "verdict",
]

COSTS = ("cpu_seconds_in_all", "seconds", "seconds_per_step", "tokens", "peak_memory_bytes")
"""What is compared with the baseline's cost."""


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, standard deviation (None for one seed), and the values by seed."""

    mean: float
    sd: float | None
    values: dict[int, float]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Spread:
        """Of values by seed, at least one."""
        return cls(*mean_and_spread(list(values.values())), dict(values))


@dataclass(frozen=True)
class Comparison:
    """Differences to another method, over the seeds that both have."""

    against: str
    seeds: list[int]
    metrics: dict[str, Difference]


@dataclass(frozen=True)
class UserGroup:
    """Metrics of one part of the users, mean over seeds."""

    name: str
    users: float
    metrics: dict[str, Spread]


@dataclass(frozen=True)
class MethodRow:
    """One method on one dataset with one set of identifiers.

    Attributes:
        method: the method's name.
        group: see :class:`~gflowgr.runs.results.MethodFacts`, as ``of``, ``key``,
            ``value`` and ``alias``.
        seeds: seeds whose cell is complete.
        metrics: metric to its values.
        to_baseline: differences to the experiment's baseline, None without a common seed.
        to_full: of an ablation, differences to the full method.
        to_teacher: of the start and the main methods, differences to the collaborative model.
        training: number to its values; ``seconds_per_step`` is training time over steps,
            ``cpu_seconds_in_all`` the CPU time of this training and those that it needs.
        relative: cost to its mean ratio to the baseline's, over the seeds that both have.
        memory_kind: which memory the peak is of.
        diversity: measure to its values.
        breakdown: title to its groups.
        calibration: "pearson", "spearman" where they were measured.
    """

    method: str
    group: str
    of: str | None
    key: str | None
    value: float | None
    alias: bool
    seeds: list[int]
    metrics: dict[str, Spread]
    to_baseline: Comparison | None = None
    to_full: Comparison | None = None
    to_teacher: Comparison | None = None
    training: dict[str, Spread] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    memory_kind: str = ""
    diversity: dict[str, Spread] = field(default_factory=dict)
    breakdown: dict[str, list[UserGroup]] = field(default_factory=dict)
    calibration: dict[str, Spread] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """All rows of one dataset and set of identifiers; reference rows are in each of them.

    Attributes:
        dataset: the dataset's name.
        identifiers: the identifiers' name.
        rules: what the metrics mean.
        metrics: "R@k" and "N@k" that all rows have.
        rows: one per method.
        also: the same by other rules, by folder (``MASKED``, ``SUMMED``), where some cells were
            evaluated so besides.
    """

    dataset: str
    identifiers: str
    rules: dict[str, str]
    metrics: list[str]
    rows: list[MethodRow]
    also: dict[str, Setting] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.dataset}, {self.identifiers} identifiers"

    def of_group(self, *groups: str) -> list[MethodRow]:
        """The rows of some groups, in order."""
        return [row for row in self.rows if row.group in groups]


def summarise(results: ExperimentResults) -> list[Setting]:
    """Means, spread and comparisons of every dataset and set of identifiers that has any cell.

    Raises:
        DataError: cells that are compared but were evaluated on other users or by other rules.
    """
    settings = []
    for dataset, identifiers in results.settings():
        rows = [
            (method, cells)
            for method in results.methods
            if (cells := results.seeds_of(dataset, identifiers, method.name))
        ]
        if not rows:
            continue
        setting = _setting(results, dataset, identifiers, rows)
        also = {
            name: _setting(results, dataset, identifiers, there)
            for name in (MASKED, SUMMED)
            if (there := _by_rule(rows, name))
        }
        settings.append(dataclasses.replace(setting, also=also))
    return settings


def _by_rule(
    rows: Sequence[tuple[MethodFacts, dict[int, CellResult]]], name: str
) -> list[tuple[MethodFacts, dict[int, CellResult]]]:
    """The rows with what was evaluated by another rule; none where no generator was.

    A row that needs no generator is the same with and without a collaborative model beside it.
    """
    found = []
    for method, cells in rows:
        as_it_is = name == SUMMED and method.group == REFERENCE
        chosen = {
            seed: cell if as_it_is else cell.also[name]
            for seed, cell in cells.items()
            if as_it_is or name in cell.also
        }
        if chosen:
            found.append((method, chosen))
    return found if any(method.group != REFERENCE for method, _ in found) else []


def _setting(
    results: ExperimentResults,
    dataset: str,
    identifiers: str,
    rows: Sequence[tuple[MethodFacts, dict[int, CellResult]]],
) -> Setting:
    # Reference rows rank items, not identifiers; their rule of collisions may be another one.
    generators = [each for each in rows if each[0].group != REFERENCE]
    first = next(iter((generators or rows)[0][1].values()))
    by_name = {method.name: cells for method, cells in rows}
    every = [cell for cells in by_name.values() for cell in cells.values()]
    for cell in every:
        _check_comparable(first, cell)
    metrics = [m for m in ranking_metrics(first.metrics) if all(m in c.metrics for c in every)]
    compared = _compare(results, rows, metrics)
    base = by_name.get(results.baseline, {})
    made = [_row(*each, base, compared, results.teacher) for each in rows]
    return Setting(dataset, identifiers, first.rules, metrics, made)


def _check_comparable(first: CellResult, cell: CellResult) -> None:
    names = [
        f"{each.dataset}, {each.identifiers}, seed {each.seed}, {each.method.name}"
        for each in (first, cell)
    ]
    if not np.array_equal(first.users, cell.users):
        raise DataError(f"users.npy of ({names[1]}) differs from that of ({names[0]})")
    if cell.method.group != REFERENCE and first.rules != cell.rules:
        keys = {*first.rules, *cell.rules}
        differing = sorted(key for key in keys if first.rules.get(key) != cell.rules.get(key))
        raise DataError(f"rules of ({names[1]}) differ from ({names[0]}): {', '.join(differing)}")


def _compare(
    results: ExperimentResults,
    rows: Sequence[tuple[MethodFacts, dict[int, CellResult]]],
    metrics: Sequence[str],
) -> dict[tuple[str, str], Comparison]:
    """All comparisons of a setting, from one set of draws; those of a table are a family."""
    teacher, pairs = results.teacher, {}
    for method, _ in rows:
        varied = (method.group, method.of, method.key) if method.group in (GRID, ABLATION) else ()
        pairs[method.name, results.baseline] = ("baseline", *varied)
        if method.group == ABLATION and method.of and method.of != results.baseline:
            pairs[method.name, method.of] = ("full", *varied)
        if teacher is not None and method.group in (START, MAIN):
            pairs[method.name, teacher] = ("teacher",)
    ranks = {
        method.name: {seed: cell.ranks for seed, cell in cells.items()} for method, cells in rows
    }
    values = next(cell.values for _, cells in rows for cell in cells.values())
    return {
        pair: Comparison(pair[1], seeds, differences)
        for pair, (seeds, differences) in compare(ranks, pairs, metrics, values).items()
    }


def _row(
    method: MethodFacts,
    cells: Mapping[int, CellResult],
    base: Mapping[int, CellResult],
    compared: Mapping[tuple[str, str], Comparison],
    teacher: str | None,
) -> MethodRow:
    calibration = {
        name: {
            seed: value
            for seed, cell in cells.items()
            if (value := getattr(cell.analysis, name)) is not None
        }
        for name in ("pearson", "spearman")
    }
    comparisons = {other: found for (name, other), found in compared.items() if name == method.name}
    full = comparisons.pop(method.of or "", None) if method.group == ABLATION else None
    to_teacher = comparisons.pop(teacher or "", None)
    return MethodRow(
        method.name,
        method.group,
        method.of,
        method.key,
        method.value,
        method.alias,
        list(cells),
        _spreads({seed: cell.metrics for seed, cell in cells.items()}),
        # An ablation of the baseline itself has one comparison that is both.
        next(iter(comparisons.values()), full),
        full,
        to_teacher,
        _spreads({seed: _training(cell) for seed, cell in cells.items()}),
        _relative(cells, base),
        next(iter(cells.values())).memory_kind,
        _spreads({seed: cell.analysis.diversity for seed, cell in cells.items()}),
        _breakdown(cells),
        {name: Spread.of(values) for name, values in calibration.items() if values},
    )


def _spreads(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Spread]:
    keys = dict.fromkeys(key for values in by_seed.values() for key in values)
    return {
        key: Spread.of({seed: values[key] for seed, values in by_seed.items() if key in values})
        for key in keys
    }


def _training(cell: CellResult) -> dict[str, float]:
    facts = dict(cell.training)
    if facts.get("steps") and "train_seconds" in facts:
        facts["seconds_per_step"] = facts["train_seconds"] / facts["steps"]
    if "cpu_seconds" in facts:
        facts["cpu_seconds_in_all"] = facts["cpu_seconds"] + facts.get("cpu_seconds_before", 0.0)
    return facts


def _relative(cells: Mapping[int, CellResult], base: Mapping[int, CellResult]) -> dict[str, float]:
    pairs = [(_training(cells[seed]), _training(base[seed])) for seed in cells if seed in base]
    found = {}
    for key in COSTS:
        ratios = [
            ours[key] / other[key] for ours, other in pairs if ours.get(key) and other.get(key)
        ]
        if ratios:
            found[key] = float(np.mean(ratios))
    return found


def _breakdown(cells: Mapping[int, CellResult]) -> dict[str, list[UserGroup]]:
    titles = dict.fromkeys(title for cell in cells.values() for title in cell.analysis.breakdown)
    found = {}
    for title in titles:
        strata = {
            seed: {part.name: part for part in cell.analysis.breakdown.get(title, [])}
            for seed, cell in cells.items()
        }
        names = dict.fromkeys(name for parts in strata.values() for name in parts)
        found[title] = [
            UserGroup(
                name,
                float(np.mean([parts[name].users for parts in strata.values() if name in parts])),
                _spreads({s: parts[name].metrics for s, parts in strata.items() if name in parts}),
            )
            for name in names
        ]
    return found


def labelled(method: str, group: str) -> str:
    """The name in a verdict; it marks a start, which is not a method."""
    return f"{method} (the start of all)" if group == START else method


def verdict(differences: Mapping[str, Mapping[str, tuple[float, float]]], baseline: str) -> str:
    """One sentence that says what holds, by a fixed rule.

    Args:
        differences: method to metric to (mean difference to the baseline, p, Holm-corrected).
        baseline: the baseline's name.

    A difference counts when its p is below 0.05. Methods are named under the first that applies:
    above on all metrics; above on some and below on none; above on some, below on others; below on
    some; no difference shown.
    """
    groups: dict[str, list[str]] = {}
    for method, metrics in differences.items():
        above = [key for key, (mean, p) in metrics.items() if p < 0.05 and mean > 0]
        below = [key for key, (mean, p) in metrics.items() if p < 0.05 and mean < 0]
        if len(above) == len(metrics):
            groups.setdefault(f"above {baseline} on all metrics", []).append(method)
        elif len(below) == len(metrics):
            groups.setdefault(f"below {baseline} on all metrics", []).append(method)
        elif above and below:
            detail = f"{method} (above: {', '.join(above)}; below: {', '.join(below)})"
            groups.setdefault("mixed", []).append(detail)
        elif above or below:
            side = "above" if above else "below"
            detail = f"{method} ({', '.join(above or below)})"
            groups.setdefault(f"{side} {baseline} on some metrics", []).append(detail)
        else:
            groups.setdefault(f"no difference to {baseline} shown", []).append(method)
    order = (
        f"above {baseline} on all metrics",
        f"above {baseline} on some metrics",
        "mixed",
        f"no difference to {baseline} shown",
        f"below {baseline} on some metrics",
        f"below {baseline} on all metrics",
    )
    text = "; ".join(f"{part}: {', '.join(groups[part])}" for part in order if part in groups)
    return f"With p < 0.05 by Holm's correction, {text}." if text else ""


def to_json(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """The settings as they go into ``results.json``."""
    return [dataclasses.asdict(setting) for setting in settings]
