"""The report of an experiment: results.json, results.csv, report.md and report.html."""

from __future__ import annotations

import csv
import importlib.metadata
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__, files
from ..report.document import to_markdown
from ..report.html import to_html
from ..report.tables import TableRow, format_table
from .cells import alone
from .method_report import command_as_typed, machine_summary
from .results import ExperimentResults, read_results
from .sections import differences_of, experiment_document
from .setting_section import MAIN_GROUPS
from .statistics import METRICS, STATISTICS_RULES
from .summary import Setting, summarise, to_json, verdict

__all__ = ["write_report"]

_PLACES = ("path", "embeddings", "output_dir")
_COLUMNS = (
    "dataset", "identifiers", "seed", "method", "group", "of", "key", "value", "kind", "quantity",
    "number",
)  # fmt: skip


def write_report(out: Path | str) -> tuple[Path, str]:
    """Write the report of what is complete in an experiment's folder, into that folder.

    Written: ``results.json`` and ``results.csv`` (all numbers), ``report.md`` with its figures in
    ``figures/``, and ``report.html``, the same in one file. What is not complete is named.

    Returns:
        the path of ``report.md``, and the main tables for the screen, with a verdict each.

    Raises:
        DataError: no experiment there, a damaged file, or cells that do not fit each other.
        OutputError: the folder cannot be written.
    """
    out = Path(out)
    results = read_results(out)
    settings = summarise(results)
    facts = _facts(results)
    path = out / "report.md"
    with alone("report", out):  # several callers of an experiment end at the same time
        document = experiment_document(results, settings, facts, out)
        files.write_json(out / "results.json", facts | {"settings": to_json(settings)})
        files.write_text(out / "results.csv", _csv(results, settings))
        files.write_text(out / "report.html", to_html(document, out))
        files.write_text(path, to_markdown(document))
    return path, _screen_text(results, settings)


def _screen_text(results: ExperimentResults, settings: list[Setting]) -> str:
    parts = []
    for setting in settings:
        rows = [
            TableRow(row.method, *_shown(row.metrics)) for row in setting.of_group(*MAIN_GROUPS)
        ]
        if not rows:
            continue
        text = f"{setting.title}\n\n{format_table(rows, columns=METRICS)}"
        sentence = verdict(differences_of(setting, results.baseline), results.baseline)
        parts.append(text + (f"\n\n{sentence}" if sentence else ""))
    total = len({*map(str, results.missing)}) + len(results.cells)
    if results.missing:
        parts.append(f"{len(results.missing)} of {total} results are missing.")
    return "\n\n".join(parts)


def _shown(metrics: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    means = {key: metrics[key].mean for key in METRICS}
    spread = {key: metrics[key].sd for key in METRICS if metrics[key].sd is not None}
    return means, spread


def _facts(results: ExperimentResults) -> dict[str, Any]:
    """All but the numbers themselves."""
    return {
        "name": results.name,
        "title": results.title,
        "baseline": results.baseline,
        "seeds": results.seeds,
        "datasets": results.datasets,
        "caveats": results.caveats,
        "command": command_as_typed(),
        "versions": _versions(),
        "machine": machine_summary(),
        "statistics": STATISTICS_RULES,
        "base": _without_places(results.base),
        "missing": [vars(cell) for cell in results.missing],
    }


def _versions() -> dict[str, str]:
    found = {"gflowgr": __version__}
    for name in ("torch", "transformers", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


def _without_places(values: Any, key: str = "") -> Any:
    """A configuration to pass on: of paths, the names alone."""
    if isinstance(values, dict):
        return {name: _without_places(value, name) for name, value in values.items()}
    if isinstance(values, list):
        return [_without_places(value) for value in values]
    if isinstance(values, str) and (key in _PLACES or Path(values).is_absolute()):
        return Path(values).name
    return values


def _csv(results: ExperimentResults, settings: list[Setting]) -> str:
    """One number per line: those of single cells with their seed, comparisons without."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell in results.cells:
        method = cell.method
        start = [
            cell.dataset, cell.identifiers or "", cell.seed, method.name, method.group,
            method.of or "", method.key or "", "" if method.value is None else method.value,
        ]  # fmt: skip
        for kind, numbers in (
            ("metric", cell.metrics),
            ("training", cell.training),
            ("diversity", cell.analysis.diversity),
            ("calibration", {k: getattr(cell.analysis, k) for k in ("pearson", "spearman")}),
        ):
            for name, number in numbers.items():
                if number is not None:
                    writer.writerow([*start, kind, name, repr(float(number))])
        for title, strata in cell.analysis.breakdown.items():
            for part in strata:
                for name, number in part.metrics.items():
                    where = f"{title.split(' (')[0]}: {part.name}: {name}"
                    writer.writerow([*start, "breakdown", where, repr(number)])
    writer.writerows(_compared(settings))
    return text.getvalue()


def _compared(settings: list[Setting]) -> Iterator[list[Any]]:
    for setting in settings:
        for row in setting.rows:
            start = [
                setting.dataset, setting.identifiers, "", row.method, row.group, row.of or "",
                row.key or "", "" if row.value is None else row.value,
            ]  # fmt: skip
            for found in (row.to_baseline, row.to_full):
                for metric, difference in found.metrics.items() if found else ():
                    for part, number in vars(difference).items():
                        assert found is not None
                        kind = f"difference to {found.against}, {part}"
                        yield [*start, kind, metric, repr(number)]
