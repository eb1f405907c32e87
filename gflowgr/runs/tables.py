"""The tables of an experiment's report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..report.tables import Table, TableCell
from .statistics import ranking_metrics
from .summary import Comparison, MethodRow, Spread

__all__ = [
    "breakdown_table",
    "cost_table",
    "difference_tables",
    "diversity_table",
    "format_p",
    "grid_table",
    "score_table",
]

Notes = Sequence[tuple[str, str]]

_NONE = TableCell("-")
_MOST_COLUMNS = 4  # of differences with interval and p, side by side


def _spread_text(spread: Spread, decimals: int) -> str:
    text = f"{spread.mean:.{decimals}f}"
    return text if spread.sd is None else f"{text} ± {spread.sd:.{decimals}f}"


def _column(
    rows: Sequence[MethodRow],
    find: Callable[[MethodRow], Spread | None],
    decimals: int = 4,
    best: bool = False,
) -> list[TableCell]:
    """A column of mean and spread; with ``best``, all that show the largest mean are bold."""
    spreads = [find(row) for row in rows]
    shown = [None if s is None else f"{s.mean:.{decimals}f}" for s in spreads]
    there = [(s.mean, text) for s, text in zip(spreads, shown, strict=True) if s is not None]
    top = max(there)[1] if best and len({*there}) > 1 else None
    return [
        _NONE if s is None else TableCell(_spread_text(s, decimals), text == top)
        for s, text in zip(spreads, shown, strict=True)
    ]


def _assemble(
    title: str, corner: str, names: Sequence[str], columns: dict[str, list[TableCell]], notes: Notes
) -> Table:
    rows = [
        [TableCell(name), *(cells[place] for cells in columns.values())]
        for place, name in enumerate(names)
    ]
    return Table(title, [corner, *columns], rows, notes)


def _names(rows: Sequence[MethodRow]) -> list[str]:
    """Names; rows with fewer seeds than the fullest say how many they have."""
    most = max(len(row.seeds) for row in rows)
    return [
        row.method if len(row.seeds) == most else f"{row.method} ({len(row.seeds)} of {most} seeds)"
        for row in rows
    ]


def score_table(title: str, rows: Sequence[MethodRow], notes: Notes) -> Table:
    """Recall and NDCG, and what was measured against true utilities; a column's best is bold."""
    every = dict.fromkeys(key for row in rows for key in row.metrics)
    extra = [key for key in every if key.startswith(("utility", "unbiased"))]
    columns = {
        key: _column(rows, lambda row, key=key: row.metrics.get(key), best=True)  # type: ignore[misc]
        for key in (*ranking_metrics(every), *extra)
    }
    return _assemble(title, "method", _names(rows), columns, notes)


def format_p(p: float) -> str:
    """A p-value in three decimals, or that it is below 0.001."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def difference_tables(
    title: str, comparisons: Sequence[tuple[str, Comparison]], notes: Notes
) -> list[Table]:
    """Differences with interval and corrected p; of recall and NDCG apart if they are many."""
    metrics = list(comparisons[0][1].metrics)
    parts = {title: metrics}
    if len(metrics) > _MOST_COLUMNS:
        kinds = (("Recall", "R"), ("NDCG", "N"), ("value-weighted NDCG", "V"))
        apart = {f"{title}: {kind}": [m for m in metrics if m[0] == k] for kind, k in kinds}
        parts = {name: found for name, found in apart.items() if found}
    return [_differences(*part, comparisons, notes) for part in parts.items()]


def _differences(
    title: str,
    metrics: Sequence[str],
    comparisons: Sequence[tuple[str, Comparison]],
    notes: Notes,
) -> Table:
    rows = []
    most = max(len(found.seeds) for _, found in comparisons)
    for name, found in comparisons:
        few = len(found.seeds) < most
        cells = [TableCell(f"{name} ({len(found.seeds)} of {most} seeds)" if few else name)]
        for metric in metrics:
            d = found.metrics[metric]
            text = f"{d.mean:+.4f} ({d.low:+.4f}, {d.high:+.4f}), p {format_p(d.p_holm)}"
            cells.append(TableCell(text, d.p_holm < 0.05))
        rows.append(cells)
    marked = ("Differences", "mean (95 % interval), Holm-corrected p; bold where p < 0.05")
    return Table(title, ["method", *metrics], rows, [marked, *notes])


def cost_table(title: str, rows: Sequence[MethodRow], baseline: str) -> Table:
    """CPU time, steps, tokens, times and memory, and their ratios to the baseline's."""

    def of(key: str, decimals: int, scale: float = 1.0) -> list[TableCell]:
        cells = []
        for row in rows:
            spread = row.training.get(key)
            cells.append(
                _NONE if spread is None else TableCell(f"{spread.mean * scale:,.{decimals}f}")
            )
        return cells

    def ratio(key: str) -> list[TableCell]:
        return [
            TableCell(f"{row.relative[key]:.2f}") if key in row.relative else _NONE for row in rows
        ]

    kinds = {row.memory_kind for row in rows if row.memory_kind}
    columns = {
        "CPU s": of("cpu_seconds", 0),
        "CPU s in all": of("cpu_seconds_in_all", 0),
        " ratio": ratio("cpu_seconds_in_all"),
        "steps": of("steps", 0),
        "batch": of("batch_size", 0),
        "tokens, million": of("tokens", 2, 1e-6),
        "ratio ": ratio("tokens"),
        "s": of("seconds", 1),
        "ratio": ratio("seconds"),
        "ms per step": of("seconds_per_step", 1, 1e3),
        "ratio  ": ratio("seconds_per_step"),
        "peak memory, MiB": of("peak_memory_bytes", 0, 2.0**-20),
        "ratio   ": ratio("peak_memory_bytes"),
    }
    notes = [
        ("Ratios", f"to {baseline}, mean over the seeds that both have"),
        (
            "CPU s",
            "user and system time of the training steps, all threads, without validation; in all: "
            "with that of the start and of the collaborative model, where a method needs them",
        ),
        ("s", "training and validation, mean over seeds, with whatever else ran on the machine"),
        ("ms per step", "training alone"),
        ("Peak memory", " and ".join(sorted(kinds)) + " memory of the process" if kinds else "-"),
    ]
    return _assemble(title, "method", _names(rows), columns, notes)


def diversity_table(title: str, rows: Sequence[MethodRow], notes: Notes) -> Table:
    """Diversity measures, mean over seeds and spread."""
    labels = {
        "coverage": ("coverage", 4),
        "item_entropy": ("entropy of items", 3),
        "gini": ("Gini", 3),
        "intra_list_distance": ("intra-list distance", 3),
        "mean_popularity": ("mean popularity", 1),
    }
    columns = {}
    for key, (label, decimals) in labels.items():
        if any(key in row.diversity for row in rows):
            columns[label] = _column(
                rows,
                lambda row, key=key: row.diversity.get(key),  # type: ignore[misc]
                decimals,
            )
    levels = dict.fromkeys(
        key for row in rows for key in row.diversity if key.startswith("code_entropy/")
    )
    if levels:
        columns["entropy of codes per level"] = [
            TableCell(
                ", ".join(f"{row.diversity[k].mean:.2f}" for k in levels if k in row.diversity)
            )
            if any(key in row.diversity for key in levels)
            else _NONE
            for row in rows
        ]
    own = [
        ("Coverage", "share of the catalogue in any list"),
        ("Entropy", "of what is recommended, in nats"),
        ("Gini", "0 if all items are recommended equally often"),
        (
            "Intra-list distance",
            "share of identifier positions in which two items of a list differ",
        ),
        ("Mean popularity", "interactions in training of what is recommended"),
    ]
    return _assemble(title, "method", _names(rows), columns, [*own, *notes])


def breakdown_table(
    title: str, rows: Sequence[MethodRow], notes: Notes, metric: str = "R@10"
) -> Table:
    """One metric per part of the users; the best of a part is bold."""
    parts: dict[str, float] = {}
    for row in rows:
        for group in row.breakdown[title]:
            parts.setdefault(group.name, group.users)

    def of(part: str) -> Callable[[MethodRow], Spread | None]:
        return lambda row: next(
            (g.metrics.get(metric) for g in row.breakdown[title] if g.name == part), None
        )

    columns = {
        f"{part} ({users:,.0f} users)": _column(rows, of(part), best=True)
        for part, users in parts.items()
    }
    return _assemble(f"{metric}. {title}", "method", _names(rows), columns, notes)


def grid_table(title: str, key: str, rows: Sequence[MethodRow], notes: Notes) -> Table:
    """A row per value of the grid, with R@10 and N@10 compared to the baseline."""
    rows = sorted(rows, key=lambda row: row.value or 0.0)
    columns = {
        metric: _column(rows, lambda row, metric=metric: row.metrics[metric], best=True)  # type: ignore[misc]
        for metric in ranking_metrics(rows[0].metrics)
    }
    for metric in ("R@10", "N@10"):
        cells = []
        for row in rows:
            if row.to_baseline is None:
                cells.append(_NONE)
                continue
            d = row.to_baseline.metrics[metric]
            cells.append(TableCell(f"{d.mean:+.4f}, p {format_p(d.p_holm)}", d.p_holm < 0.05))
        columns[f"{metric} less the baseline's"] = cells
    names = [f"{row.value:g}" + (" (own)" if row.alias else "") for row in rows]
    own = ("own", "the value of the method itself")
    return _assemble(title, key.split(".")[-1], names, columns, [own, *notes])
