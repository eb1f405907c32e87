"""The report of an experiment: results.json, results.csv, report.md and report.html."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__, files
from ..report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Paragraph,
    Section,
    write_document,
)
from ..report.machine import command_as_typed, machine_summary
from ..report.plots import Styles, method_styles
from ..report.tables import TableRow, format_table
from . import figures
from .processes import alone
from .publish import without_places
from .results import GRID, MAIN, REFERENCE, START, ExperimentResults, read_results
from .setting_section import MAIN_GROUPS, picture, setting_section, short_rules
from .stages import MASKED, SUMMED
from .statistics import STATISTICS_RULES
from .summary import Setting, labelled, summarise, to_json, verdict
from .tables import grid_table

__all__ = ["write_report"]

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
    with alone(out):  # --report may be asked for when the experiment ends
        document = _document(results, settings, facts, out)
        files.write_json(out / "results.json", facts | {"settings": to_json(settings)})
        files.write_text(out / "results.csv", _csv(results, settings))
        path = write_document(document, out)
    return path, _screen_text(results, settings)


def _screen_text(results: ExperimentResults, settings: list[Setting]) -> str:
    parts = []
    for setting in settings:
        rows = [
            TableRow(row.method, *_shown(row.metrics, setting.metrics))
            for row in setting.of_group(*MAIN_GROUPS)
        ]
        if not rows:
            continue
        text = f"{setting.title}\n\n{format_table(rows, columns=setting.metrics)}"
        parts.append("\n\n".join([text, *_sentences(results, setting)]))
    total = len({*map(str, results.missing)}) + len(results.cells)
    if results.missing:
        parts.append(f"{len(results.missing)} of {total} results are missing.")
    return "\n\n".join(parts)


def _shown(
    metrics: dict[str, Any], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    means = {key: metrics[key].mean for key in names}
    spread = {key: metrics[key].sd for key in names if metrics[key].sd is not None}
    return means, spread


def _sentences(results: ExperimentResults, setting: Setting) -> list[str]:
    """What holds against the baseline, and against the collaborative model."""
    found = [
        verdict(_differences(setting, which), against)
        for against, which in ((results.baseline, "to_baseline"), (results.teacher, "to_teacher"))
        if against is not None
    ]
    return [sentence for sentence in found if sentence]


def _differences(setting: Setting, which: str) -> dict[str, dict[str, tuple[float, float]]]:
    """What :func:`~gflowgr.runs.summary.verdict` takes: the main methods and their start."""
    return {
        labelled(row.method, row.group): {
            metric: (difference.mean, difference.p_holm)
            for metric, difference in found.metrics.items()
        }
        for row in setting.of_group(START, MAIN)
        if (found := getattr(row, which)) is not None
    }


def _document(
    results: ExperimentResults,
    settings: Sequence[Setting],
    facts: Mapping[str, Any],
    out: Path,
) -> Document:
    """Build the report; its figures are drawn anew into ``out/figures``.

    Args:
        results: the experiment.
        settings: its numbers.
        facts: what was run and where: "command", "versions", "machine", "base".
        out: the report's folder.
    """
    shutil.rmtree(out / "figures", ignore_errors=True)
    # A method has the same colour in all figures: those of the tables' main part come first.
    order = {START: 0, MAIN: 1, REFERENCE: 2}
    methods = sorted(results.methods, key=lambda method: order.get(method.group, 3))
    styles = method_styles(method.name for method in methods)
    sections = [_missing(results)] if results.missing else []
    for setting in settings:
        sections.append(setting_section(results, setting, out, styles))
    grids = _grids(results, settings, out, styles)
    sections += [grids] if grids.blocks else []
    rules = Section("How to read the numbers", [Bullets(list(STATISTICS_RULES.items()))])
    sections += [rules, _what_was_run(facts)]
    return Document(results.title, _introduction(results, settings), sections)


def _introduction(results: ExperimentResults, settings: Sequence[Setting]) -> list[Block]:
    seeds = ", ".join(map(str, results.seeds))
    several = len(results.seeds_done or results.seeds) > 1
    if results.seeds_done and len(results.seeds_done) < len(results.seeds):
        seeds = f"{', '.join(map(str, results.seeds_done))} (of {seeds})"
    blocks: list[Block] = [
        Paragraph(
            f"Experiment {results.name}. Methods of a dataset, identifiers and seed start from the "
            f"same supervised model (SFT) or, with new weights, from the same seed; "
            f"differences are taken to {results.baseline}. "
            f"{'Seeds' if several else 'One seed'}: {seeds}. Complete results: "
            f"{len([c for c in results.cells if not c.method.alias])}; missing: "
            f"{len(results.missing)}."
        )
    ]
    sentences = [
        (setting.title, sentence)
        for setting in settings
        for sentence in _sentences(results, setting)
    ]
    if sentences:
        blocks.append(Bullets(sentences))
    caveats = list(results.caveats)
    if not several:
        caveats.append("One seed: nothing is known of how results vary between trainings.")
    if caveats:
        blocks += [Paragraph("Read this first:"), Bullets([("", text) for text in caveats])]
    return blocks


def _missing(results: ExperimentResults) -> Section:
    """What is missing, by dataset, identifiers and method."""
    by_row: dict[tuple[str, str], list[int]] = {}
    for cell in results.missing:
        place = cell.dataset + (f", {cell.identifiers} identifiers" if cell.identifiers else "")
        by_row.setdefault((place, cell.method), []).append(cell.seed)
    grouped: dict[str, list[str]] = {}
    for (place, method), seeds in by_row.items():
        some = "" if seeds == results.seeds else f" (seed {', '.join(map(str, seeds))})"
        grouped.setdefault(place, []).append(method + some)
    entries = [(place, "; ".join(methods)) for place, methods in grouped.items()]
    text = "These have no results yet; a row's mean is over the seeds that it has."
    return Section("What is missing", [Paragraph(text), Bullets(entries)])


def _what_was_run(facts: Mapping[str, Any]) -> Section:
    entries = [
        ("command", facts["command"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())),
        *((f"{name} (of this report)", text) for name, text in facts["machine"].items()),
    ]
    base = json.dumps(facts["base"], indent=2, ensure_ascii=False)
    return Section("What was run", [Bullets(entries), Code("Base configuration", base)])


def _grids(
    results: ExperimentResults, settings: Sequence[Setting], out: Path, styles: Styles
) -> Section:
    """Each grid over all datasets: whether the best value is in the middle."""
    blocks: list[Block] = []
    grids = dict.fromkeys((m.of, m.key) for m in results.methods if m.group == GRID and m.key)
    for of, key in grids:
        assert key is not None
        rows = {
            setting.title: [row for row in setting.of_group(GRID) if (row.of, row.key) == (of, key)]
            for setting in settings
        }
        for setting in settings:
            if rows[setting.title]:
                notes = short_rules(setting)
                title = f"{of}, {key}: {setting.title}"
                blocks.append(grid_table(title, key, rows[setting.title], notes))
        alt = f"R@10 and N@10 of {of} over the values of {key}, per dataset and identifiers"
        blocks += picture(
            out, f"grid-{of}-{key}", f"{of} over {key}", alt,
            lambda path, rows=rows, key=key: figures.plot_grid(  # type: ignore[misc]
                settings, rows, path, styles, key=key, baseline=results.baseline
            ),
        )  # fmt: skip
    return Section("Grids", blocks)


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
        "base": without_places(results.base),
        "missing": [vars(cell) for cell in results.missing],
    }


def _versions() -> dict[str, str]:
    found = {"gflowgr": __version__}
    for name in ("torch", "transformers", "numpy"):
        found[name] = importlib.metadata.version(name)
    return found


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
        also = {name: each.metrics for name, each in cell.also.items()}
        for kind, numbers in (
            ("metric", cell.metrics),
            ("metric, seen items masked", also.get(MASKED, {})),
            ("metric, with the collaborative model", also.get(SUMMED, {})),
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
            for found in (row.to_baseline, row.to_full, row.to_teacher):
                for metric, difference in found.metrics.items() if found else ():
                    for part, number in vars(difference).items():
                        assert found is not None
                        kind = f"difference to {found.against}, {part}"
                        yield [*start, kind, metric, repr(number)]
