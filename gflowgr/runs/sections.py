"""What the report of an experiment says, for both writers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report.document import Block, Bullets, Code, Document, Paragraph, Section
from . import figures
from .results import GRID, MAIN, START, ExperimentResults
from .setting_section import picture, setting_section, short_rules
from .statistics import STATISTICS_RULES
from .summary import Setting, labelled, verdict
from .tables import grid_table

__all__ = ["differences_of", "experiment_document"]


def differences_of(setting: Setting, baseline: str) -> dict[str, dict[str, tuple[float, float]]]:
    """What :func:`~gflowgr.runs.summary.verdict` takes: the main methods and their start."""
    return {
        labelled(row.method, row.group): {
            metric: (difference.mean, difference.p)
            for metric, difference in row.to_baseline.metrics.items()
        }
        for row in setting.of_group(START, MAIN)
        if row.to_baseline is not None and row.method != baseline
    }


def experiment_document(
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
    folder = out / "figures"
    shutil.rmtree(folder, ignore_errors=True)
    sections = [_missing(results)] if results.missing else []
    for setting in settings:
        sections.append(setting_section(results, setting, out))
    grids = _grids(results, settings, out)
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
            f"Experiment {results.name}. Every method starts from the same supervised model (SFT) "
            f"of its dataset, identifiers and seed; differences are taken to {results.baseline}. "
            f"{'Seeds' if several else 'One seed'}: {seeds}. Complete results: "
            f"{len([c for c in results.cells if not c.method.alias])}; missing: "
            f"{len(results.missing)}."
        )
    ]
    sentences = [
        (setting.title, sentence)
        for setting in settings
        if (sentence := verdict(differences_of(setting, results.baseline), results.baseline))
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


def _grids(results: ExperimentResults, settings: Sequence[Setting], out: Path) -> Section:
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
                settings, rows, path, key=key, baseline=results.baseline
            ),
        )  # fmt: skip
    return Section("Grids", blocks)
