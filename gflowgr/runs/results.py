"""Read and check the results in an experiment's folder.

Layout of the folder ``OUT``: ``experiment.json`` (what was to be run); per dataset and seed
``OUT/<dataset>/seed_<s>/``: ``collaborative/evaluation/<slug>/`` for the rows that need no
generator, and per identifiers ``<identifiers>/sft/`` (the common start) and
``<identifiers>/<method slug>/``. A cell is complete once its evaluation holds ``analysis.json``,
which is written last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from .. import files
from ..errors import DataError
from ..evaluation.analysis import UserGroup
from ..evaluation.first_level import FirstLevel
from .sections import collaborative_names
from .stages import MASKED, SUMMED, collaborative_cpu_seconds
from .statistics import per_user, ranking_metrics

__all__ = [
    "EXPERIMENT",
    "Analysis",
    "CellResult",
    "ExperimentResults",
    "MethodFacts",
    "MissingCell",
    "read_results",
]

REFERENCE, START, MAIN, GRID, ABLATION = "reference", "start", "main", "grid", "ablation"
EXPERIMENT = "experiment.json"
"""The description of the experiment, in its folder."""
_DONE = "done.json"


@dataclass(frozen=True)
class MethodFacts:
    """One row of the tables.

    Attributes:
        name: as shown.
        slug: name of its folder.
        group: "reference" (no generator), "start" (the common SFT model), "main", "grid" or
            "ablation".
        of: the method that a grid or an ablation varies.
        key: what a grid varies, such as "flow.gfn_weight".
        value: the grid's value of ``key``.
        alias: the grid's point is the method ``of`` itself, whose folder it shares.
    """

    name: str
    slug: str
    group: str
    of: str | None = None
    key: str | None = None
    value: float | None = None
    alias: bool = False


_START = MethodFacts("SFT", "sft", START)


@dataclass(frozen=True)
class MissingCell:
    """A cell without results; ``identifiers`` is None for reference rows."""

    dataset: str
    identifiers: str | None
    seed: int
    method: str

    def __str__(self) -> str:
        parts = [self.dataset, self.identifiers, f"seed {self.seed}", self.method]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Analysis:
    """Measurements beside the ranking metrics; empty where there are none.

    Attributes:
        diversity: measure to value; per-level lists are spread out as ``code_entropy/1``, ...
        breakdown: title of a division of the users to its parts.
        pearson: correlation of log P and log R within users, None if not measured.
        spearman: the same of their ranks.
        log_p: float64 [m], sampled points of log P, centred per user.
        log_r: float64 [m], log R of the same points, centred per user.
        first_level: policies over the first token, as of
            :class:`~gflowgr.evaluation.first_level.FirstLevel`.
    """

    diversity: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, list[UserGroup]] = field(default_factory=dict)
    pearson: float | None = None
    spearman: float | None = None
    log_p: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    log_r: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    first_level: FirstLevel | None = None


@dataclass(frozen=True)
class CellResult:
    """One complete, evaluated cell.

    Attributes:
        dataset: the dataset's name.
        identifiers: the identifiers' name, None for reference rows.
        seed: the seed.
        method: the method.
        metrics: metric to mean over users.
        rules: what the metrics mean.
        training: numbers of the training (steps, seconds, CPU seconds, tokens, ...); of reference
            rows, the collaborative model's CPU seconds.
        memory_kind: "resident" or "accelerator": which memory ``peak_memory_bytes`` is of.
        logs: the Trainer's ``log_history``; empty for reference rows.
        users: int64 [n], the evaluated users.
        ranks: int64 [n], 0-based place of the target, -1 = not in the list.
        values: float64 [n], what the targets are worth; None where it was not asked for.
        analysis: diversity, breakdown and calibration.
        also: the same by other rules, by folder (``MASKED``, ``SUMMED``), where it was evaluated so
            besides; without analysis.
    """

    dataset: str
    identifiers: str | None
    seed: int
    method: MethodFacts
    metrics: dict[str, float]
    rules: dict[str, str]
    training: dict[str, float]
    memory_kind: str
    logs: list[dict[str, Any]] = field(repr=False)
    users: np.ndarray = field(repr=False)
    ranks: np.ndarray = field(repr=False)
    values: np.ndarray | None = field(repr=False)
    analysis: Analysis = field(repr=False)
    also: dict[str, CellResult] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class ExperimentResults:
    """An experiment and the cells of it that are complete.

    Attributes:
        name: short name.
        title: for the report.
        baseline: name of the method that differences are taken to.
        datasets: dataset to its identifiers' names.
        seeds: the seeds.
        methods: all rows: reference rows, the start, then the methods in the experiment's order.
        caveats: sentences for the reader.
        base: the configuration that all cells share.
        cells: complete cells.
        missing: the other cells.
    """

    name: str
    title: str
    baseline: str
    datasets: dict[str, list[str]]
    seeds: list[int]
    methods: list[MethodFacts]
    caveats: list[str]
    base: dict[str, Any]
    cells: list[CellResult]
    missing: list[MissingCell]

    @property
    def seeds_done(self) -> list[int]:
        """The seeds that have results."""
        done = {cell.seed for cell in self.cells}
        return [seed for seed in self.seeds if seed in done]

    def settings(self) -> Iterator[tuple[str, str]]:
        """(dataset, identifiers), in the experiment's order."""
        for dataset, names in self.datasets.items():
            for identifiers in names:
                yield dataset, identifiers

    @property
    def teacher(self) -> str | None:
        """The collaborative model's row, which methods are compared with besides."""
        names = [each.name for each in self.methods if each.group == REFERENCE]
        return next((name for name in names if name != "Popularity"), None)

    def seeds_of(self, dataset: str, identifiers: str, method: str) -> dict[int, CellResult]:
        """The complete cells of a row by seed; reference rows belong to all identifiers."""
        found = {
            cell.seed: cell
            for cell in self.cells
            if cell.dataset == dataset
            and cell.identifiers in (identifiers, None)
            and cell.method.name == method
        }
        return {seed: found[seed] for seed in self.seeds if seed in found}


def read_results(out: Path | str) -> ExperimentResults:
    """Read the folder of an experiment, complete or not.

    Raises:
        DataError: no experiment there, or a file that is damaged or does not fit the others; the
            message names the file.
    """
    out = Path(out)
    path = out / EXPERIMENT
    facts = _read_json(path, dict)
    try:
        datasets = {
            str(name): [str(each) for each in entry["identifiers"]]
            for name, entry in facts["datasets"].items()
        }
        named = [_method(entry) for entry in facts["methods"]]
        seeds = [int(seed) for seed in facts["seeds"]]
        name, title, baseline = (str(facts[key]) for key in ("name", "title", "baseline"))
        caveats = [str(sentence) for sentence in facts.get("caveats", [])]
        base = dict(facts.get("base", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not an experiment: {type(error).__name__} {error}") from error
    if baseline not in [_START.name, *(method.name for method in named)]:
        raise DataError(f"{path}: the baseline {baseline!r} is none of the methods")
    references = _references(base)
    cells: list[CellResult] = []
    missing: list[MissingCell] = []
    for dataset, names in datasets.items():
        for seed in seeds:
            top = out / dataset / f"seed_{seed}"
            spent = collaborative_cpu_seconds(top / "collaborative")
            for method in references:
                evaluation = top / "collaborative" / "evaluation" / method.slug
                if _is_complete(evaluation):
                    cell = _cell(dataset, None, seed, method, None, evaluation)
                    if spent is not None and method.name != "Popularity":
                        cell.training["cpu_seconds"] = spent
                    cells.append(cell)
                else:
                    missing.append(MissingCell(dataset, None, seed, method.name))
            for identifiers in names:
                for method in [_START, *named]:
                    folder = top / identifiers / method.slug
                    evaluation = folder / "evaluation"
                    if _is_complete(evaluation):
                        cells.append(_cell(dataset, identifiers, seed, method, folder, evaluation))
                    elif not method.alias:
                        missing.append(MissingCell(dataset, identifiers, seed, method.name))
    methods = [*references, _START, *named]
    return ExperimentResults(
        name, title, baseline, datasets, seeds, methods, caveats, base, cells, missing
    )


def _method(entry: Mapping[str, Any]) -> MethodFacts:
    group = str(entry["group"])
    if group not in (MAIN, GRID, ABLATION):
        raise ValueError(f"group {group!r} of {entry['name']!r}")
    value = entry.get("value")
    return MethodFacts(
        str(entry["name"]),
        str(entry["slug"]),
        group,
        entry.get("of"),
        entry.get("key"),
        None if value is None else float(value),
        bool(entry.get("alias", False)),
    )


def _references(base: Mapping[str, Any]) -> list[MethodFacts]:
    """The collaborative model, if there is one, and popularity."""
    kind = dict(base.get("collaborative") or {}).get("kind", "sasrec")
    names = collaborative_names(kind)
    return [
        MethodFacts(name, name.lower().replace(" ", "_"), REFERENCE)
        for name in (*names, "Popularity")
    ]


def _is_complete(evaluation: Path) -> bool:
    return (evaluation / "analysis.json").is_file()


def _cell(
    dataset: str,
    identifiers: str | None,
    seed: int,
    method: MethodFacts,
    folder: Path | None,
    evaluation: Path,
) -> CellResult:
    done = _read_json(evaluation / _DONE, dict)
    metrics = _numbers(evaluation / _DONE, done.get("metrics"), "metrics")
    rules = done.get("rules")
    if not isinstance(rules, dict):
        raise DataError(f"{evaluation / _DONE}: rules must be an object; got {rules!r}")
    names = ranking_metrics(metrics)
    if "R@10" not in names or "N@10" not in names:
        raise DataError(f"{evaluation / _DONE}: metrics must have R@10 and N@10; got {metrics}")
    users, ranks = _arrays(evaluation, max(int(name[2:]) for name in names))
    values = _values(evaluation, len(users)) if any(n[0] == "V" for n in names) else None
    measured = per_user(ranks, names, values).mean(axis=0).tolist()
    for metric, counted in zip(names, measured, strict=True):
        if not math.isclose(metrics[metric], counted, abs_tol=1e-6):
            raise DataError(
                f"{evaluation / _DONE}: {metric} is {metrics.get(metric)}, but ranks.npy says "
                f"{counted:.6f}"
            )
    facts: dict[str, Any] = {}
    logs: list[dict[str, Any]] = []
    if folder is not None:
        facts = _read_json(folder / _DONE, dict)
        logs = _read_json(folder / "log_history.json", list)
        if not all(isinstance(entry, dict) for entry in logs):
            raise DataError(f"{folder / 'log_history.json'}: every entry must be an object")
    training = {key: value for key, value in facts.items() if _is_number(value)}
    has_analysis = _is_complete(evaluation)
    also = {
        name: _cell(dataset, identifiers, seed, method, folder, evaluation / name)
        for name in (MASKED, SUMMED)
        if (evaluation / name / _DONE).is_file()
    }
    return CellResult(
        dataset,
        identifiers,
        seed,
        method,
        metrics,
        {str(title): str(text) for title, text in rules.items()},
        {key: float(value) for key, value in training.items()},
        str(facts.get("memory_kind", "")),
        logs,
        users,
        ranks,
        values,
        _analysis(evaluation / "analysis.json", metrics) if has_analysis else Analysis(),
        also,
    )


def _arrays(folder: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Users and ranks, of lists of ``length``."""
    users, ranks = (_load(folder / f"{name}.npy") for name in ("users", "ranks"))
    if not len(users) == len(ranks) > 0:
        raise DataError(
            f"{folder}: users.npy and ranks.npy must have one entry per user; got {len(users)} and "
            f"{len(ranks)}"
        )
    if ranks.min() < -1 or ranks.max() >= length:
        wrong = ranks.min() if ranks.min() < -1 else ranks.max()
        raise DataError(f"{folder / 'ranks.npy'}: {wrong} is no place of {length}, nor -1")
    return users, ranks


def _values(folder: Path, users: int) -> np.ndarray:
    values = _load(folder / "values.npy", "f", "floating-point numbers").astype(np.float64)
    if len(values) != users or not (values >= 0).all() or not 0 < values.sum() < math.inf:
        raise DataError(
            f"{folder / 'values.npy'}: must hold {users} finite numbers >= 0, one of them > 0; got "
            f"{len(values)} from {values.min(initial=math.inf)} to {values.max(initial=-math.inf)}"
        )
    return values


def _load(path: Path, kind: str = "i", what: str = "integers") -> np.ndarray:
    try:
        array = files.load_npy(path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, though the cell is marked as complete") from error
    if array.ndim != 1 or array.dtype.kind != kind:
        raise DataError(f"{path}: must hold {what} [n]; got {array.dtype} {array.shape}")
    return array


def _analysis(path: Path, metrics: Mapping[str, float]) -> Analysis:
    # The evaluation itself counts these two; the analysis may say more.
    counted = {"coverage": "coverage", "entropy": "item_entropy"}
    diversity = {name: metrics[key] for key, name in counted.items() if key in metrics}
    facts = _read_json(path, dict)
    try:
        for key, value in (facts.get("diversity") or {}).items():
            if isinstance(value, list):
                diversity |= {f"{key}/{i}": float(each) for i, each in enumerate(value, 1)}
            elif value is not None:
                diversity[key] = float(value)
        breakdown = {
            str(title): [
                UserGroup(
                    str(part["name"]), int(part["users"]), _numbers(path, part["metrics"], "")
                )
                for part in parts
            ]
            for title, parts in (facts.get("breakdown") or {}).items()
        }
        found = facts.get("calibration") or {}
        log_p, log_r = (np.asarray(found.get(key, []), np.float64) for key in ("log_p", "log_r"))
        correlations = [found.get(key) for key in ("pearson", "spearman")]
        pearson, spearman = (None if each is None else float(each) for each in correlations)
        level = found.get("first_level")
        policies = None if level is None else FirstLevel(**level)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not an analysis: {type(error).__name__} {error}") from error
    if log_p.shape != log_r.shape or log_p.ndim != 1:
        raise DataError(f"{path}: log_p and log_r must be lists of equal length")
    return Analysis(diversity, breakdown, pearson, spearman, log_p, log_r, policies)


def _read_json(path: Path, expect: type) -> Any:
    try:
        return files.read_json(path, expect)
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error


def _numbers(path: Path, values: Any, name: str) -> dict[str, float]:
    """Metric to value; a part without users has no value (null)."""
    if not isinstance(values, dict):
        raise DataError(f"{path}: {name or 'metrics'} must be an object; got {values!r}")
    kept = {key: value for key, value in values.items() if value is not None}
    for key, value in kept.items():
        if not _is_number(value):
            raise DataError(f"{path}: {key} must be a finite number; got {value!r}")
    return {str(key): float(value) for key, value in kept.items()}


def _is_number(value: Any) -> bool:
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(cast(float, value))
