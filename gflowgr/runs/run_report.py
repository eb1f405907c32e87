"""The end of a run: one table on the screen, results.json, and a report with plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, files
from ..models.settings import FlowSettings
from ..report.document import (
    Block,
    Bullets,
    Document,
    Paragraph,
    Picture,
    Section,
    write_document,
)
from ..report.machine import command_as_typed, machine_summary
from ..report.plots import Logs, Styles, method_styles, series
from ..report.tables import Table, TableCell, TableRow, format_table, results_table
from . import figures
from .config import RunConfig
from .example_lists import Example, example_recommendations, examples_section
from .figures import Point
from .processes import is_first_process, working_alone
from .run import RunResult, TableEntry, run
from .statistics import METRICS, STATISTICS_RULES, compare, ranking_metrics
from .summary import Comparison
from .tables import difference_tables

__all__ = ["Report", "run_and_report", "write_report"]


@dataclass(frozen=True)
class Report:
    """What :func:`write_report` writes.

    Attributes:
        title: first line.
        rows: results, one method each.
        rules: from ``Evaluation.rules``; printed under the table.
        setup: what was run: name to value (data, model, settings, command, durations).
        stages: stage name to the Trainer's ``log_history``, for the curves.
        examples: see :func:`example_recommendations`.
        caveats: what the reader must know to judge the numbers, one sentence each.
        references: rows from elsewhere, shown in a table of their own (their note says where from).
        differences: tables of differences between the rows.
        cpu_before: CPU seconds of the trainings that each stage needs.
    """

    title: str
    rows: list[TableRow]
    rules: Mapping[str, str]
    setup: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Logs] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    caveats: Sequence[str] = ()
    references: Sequence[TableRow] = ()
    differences: Sequence[Table] = ()
    cpu_before: Mapping[str, float] = field(default_factory=dict)


def run_and_report(
    config: RunConfig, *, say: Callable[[str], None] = print, progress: bool = True
) -> RunResult:
    """Carry a run out and write its table, results.json and report.

    Args:
        config: what to do.
        say: receives the text for the screen.
        progress: show progress bars.

    Raises:
        OutputError: the folder cannot be written, or another run works in it.
    """
    with working_alone(Path(config.output_dir)):
        return _run_and_report(config, say, progress)


def _run_and_report(config: RunConfig, say: Callable[[str], None], progress: bool) -> RunResult:
    result = run(config, say=say, progress=progress)
    if not is_first_process():
        return result
    rows = [TableRow(entry.name, entry.evaluation.metrics) for entry in result.rows]
    rules = result.rows[0].evaluation.rules
    output = Path(config.output_dir)
    files.write_json(output / "results.json", _results(result))
    path = write_report(output, _report(result, rows, rules))
    say("\n" + format_table(rows) + "\n")
    for name, rule in rules.items():
        say(f"{name}: {rule}")
    say(f"\nReport: {path}")
    say(
        f"Use it: gflowgr recommend {output / 'gflowgr' / 'model'} --data {_data_folder(result)} "
        f"--user {result.split.dataset.user_ids[0]}"
    )
    return result


def _results(result: RunResult) -> dict[str, Any]:
    config = result.config.to_dict()
    # Results are published: leave out the paths of this machine, which are private.
    for section, key in (("data", "path"), ("collaborative", "embeddings"), ("model", "path")):
        if config[section].get(key) is not None:
            config[section][key] = Path(config[section][key]).name
    return {
        "gflowgr": __version__,
        "command": command_as_typed(),
        "config": config,
        "identifiers": result.identifiers_name,
        "data": result.split.dataset.summary(),
        "split": result.split.report(),
        "machine": machine_summary(),
        "rules": result.rows[0].evaluation.rules,
        "methods": {
            entry.name: {"metrics": entry.evaluation.metrics, "training": entry.training}
            for entry in result.rows
        },
    }


def _report(result: RunResult, rows: list[TableRow], rules: dict[str, str]) -> Report:
    config = result.config
    dataset = result.split.dataset
    setup: dict[str, Any] = {
        "data": f"{dataset.name}: {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{dataset.num_interactions:,} interactions",
        "identifiers": result.identifiers_name,
        "training examples": f"{len(result.split.train):,}",
        "generator": config.model.summary(),
        "objective": f"{_objective(config.flow)}, softmax over {config.flow.normalize}",
        "reward": _reward(config.flow),
        "seed": config.seed,
        "command": command_as_typed(),
    }
    for entry in result.rows:
        facts = entry.training
        if facts:
            setup[f"{entry.name}, training"] = (
                f"{facts['steps']:,} steps of {facts['batch_size']} prompts, "
                f"learning rate {facts['learning_rate']:g}, {facts['seconds']:.0f} s"
            )
    return Report(
        title=f"GFlowGR on {dataset.name}",
        rows=rows,
        rules=rules,
        setup=setup,
        stages=result.histories,
        examples=example_recommendations(
            result.split,
            {entry.name: entry.evaluation for entry in result.rows},
            count=config.evaluation.examples,
            seed=config.seed,
        ),
        caveats=config.caveats,
        differences=_differences(result.rows),
        cpu_before={
            entry.name: entry.training.get("cpu_seconds_before", 0.0) for entry in result.rows
        },
    )


def _differences(rows: Sequence[TableEntry]) -> list[Table]:
    """Differences to continued SFT (to SFT, where there is none) and to the recommender of items.

    Corrected table by table, see :data:`~gflowgr.runs.statistics.STATISTICS_RULES`.
    """
    ranks = {entry.name: {0: entry.evaluation.ranks} for entry in rows}
    trained = [entry.name for entry in rows if entry.training]
    items = [entry.name for entry in rows if not entry.training and entry.name != "Popularity"]
    baseline = "SFT continued" if "SFT continued" in trained else "SFT"
    metrics = ranking_metrics(rows[0].evaluation.metrics)
    values = rows[0].evaluation.values
    tables = []
    for against, names in ((baseline, list(ranks)), *((name, trained) for name in items)):
        pairs = {(name, against): against for name in names if name != against}
        found = [
            (pair[0], Comparison(against, seeds, differences))
            for pair, (seeds, differences) in compare(ranks, pairs, metrics, values).items()
        ]
        if found:
            notes = [(key, STATISTICS_RULES[key]) for key in ("Interval", "p", "Holm")]
            tables += difference_tables(f"Less {against}", found, notes)
    return tables


def _data_folder(result: RunResult) -> str:
    path = result.split.dataset.path
    return "FOLDER" if path is None else str(path)


def _objective(flow: FlowSettings) -> str:
    """The objective and its constants."""
    if not flow.has_reference:
        name = flow.label if flow.is_outside else flow.objective.upper()
        heads = f"{_flow_heads(flow)}, beta {flow.beta}"
        if flow.has_exact_flows:
            heads = "Z vargrad" if flow.is_vargrad else "exact flows"
        return f"{name}, {heads}, lambda {flow.gfn_weight}"
    start = "the model of the round" if flow.in_rounds else "the model after SFT"
    text = f"{flow.label} against {start}, beta {flow.reference_weight}"
    if flow.objective == "ipa":
        text += f", lambda {flow.gfn_weight}"
    if flow.sft_weight > 0:
        text += f", {flow.sft_weight} x SFT + {flow.gfn_weight} x {flow.label}"
    return text


def _reward(flow: FlowSettings) -> str:
    if not flow.uses_reward:
        return "none"
    if flow.has_exact_flows:
        temperature = flow.reward_temperature or "by validation"
        return f"{', '.join(flow.catalogue_signals)} of every item, temperature {temperature}"
    return f"{flow.fusion} of {', '.join(flow.signals)}"


def _flow_heads(flow: FlowSettings) -> str:
    """Where log Z, and the flow of prefixes, come from."""
    if flow.has_partition or flow.objective == "tb":
        return f"Z {flow.partition}"
    return "F learned" + (", forward-looking" if flow.forward_looking else "")


def write_report(folder: str | Path, report: Report) -> Path:
    """Write report.md, its PNG plots and report.html into ``folder``; return report.md's path.

    Plots for which the logs hold nothing are left out; plots of an earlier report in the same
    folder are removed.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = files.ensure_writable(folder)
    results: list[Block] = [
        results_table(report.rows),
        Paragraph("Rules behind these numbers:"),
        Bullets(list(report.rules.items())),
    ]
    if report.references:
        results.append(Paragraph("Numbers from elsewhere (not measured here):"))
        results.append(results_table(report.references))
    sections = [Section("Results", results)]
    results += report.differences
    if report.caveats:
        caveats = Bullets([("", text) for text in report.caveats])
        sections.append(Section("Read this first", [caveats]))
    drawn = _draw(report, folder)
    if drawn:
        sections.append(Section("Plots", (), drawn))
    if report.examples:
        sections.append(examples_section(report.examples))
    if report.setup:
        sections.append(Section("What was run", [_pairs(report.setup)]))
    sections.append(Section("Machine", [_pairs(machine_summary())]))
    return write_document(Document(report.title, (), sections), folder)


def _draw(report: Report, folder: Path) -> list[Section]:
    """A section per plot for which there is something to draw."""
    stages = report.stages
    styles = method_styles([*stages, *(row.name for row in report.rows)])
    # A stage that logs L_GR shows it in place of the total, which mixes two units.
    totals = {
        name: [{k: v for k, v in entry.items() if k != "loss" or not gr} for entry in logs]
        for name, logs in stages.items()
        for gr in [any("loss_gr" in entry for entry in logs)]
    }
    losses = figures.LOSSES | {"loss": "training loss (nats)"}
    plots: dict[str, tuple[str, Callable[[Path], bool]]] = {
        "metrics": ("Ranking metrics", lambda path: _plot_metrics(report.rows, path, styles)),
        "cpu": (
            "Validation over CPU time",
            lambda path: figures.plot_cpu_curves(_cpu_curves(report), path, styles),
        ),
        "validation": (
            "Validation while training",
            lambda path: _plot_validation(stages, path, styles),
        ),
        "losses": (
            "Training losses",
            lambda path: figures.plot_curves(totals, losses, path, styles),
        ),
        "log_z": (
            "log Z, learned and estimated",
            lambda path: figures.plot_curves(stages, figures.LOG_Z, path, styles),
        ),
        "rewards": ("Reward components", lambda path: figures.plot_rewards(stages, path)),
        "difficulty": (
            "Sampling difficulty",
            lambda path: figures.plot_difficulty(stages, path, styles),
        ),
    }
    drawn = []
    for name, (title, draw) in plots.items():
        path = folder / f"{name}.png"
        if draw(path):
            drawn.append(Section(title, [Picture(path.name, "", title)]))
        else:
            path.unlink(missing_ok=True)
    return drawn


def _cpu_curves(report: Report) -> dict[str, np.ndarray]:
    curves = {}
    for name, logs in report.stages.items():
        points = figures.validation_over_cpu(logs, report.cpu_before.get(name, 0.0))
        curves[name] = np.array(list(points.values()), np.float64).reshape(-1, 2)
    return curves


def _plot_validation(stages: Mapping[str, Logs], path: Path, styles: Styles) -> bool:
    """The curves, with each stage's best value in the legend."""
    (key,) = figures.VALIDATION
    named = {}
    for name, logs in stages.items():
        values = series(logs, key)[1]
        named[name] = f"{name} (best {values.max():.4f})" if len(values) else name
    return figures.plot_curves(
        {named[name]: logs for name, logs in stages.items()},
        figures.VALIDATION,
        path,
        {named[name]: styles[name] for name in stages},
    )


def _plot_metrics(rows: Sequence[TableRow], path: Path, styles: Styles) -> bool:
    panels: dict[str, dict[str, Point]] = {}
    for metric in METRICS:
        panels[metric] = {}
        for row in rows:
            if metric in row.metrics:
                value, spread = row.metrics[metric], row.spread.get(metric, 0.0)
                panels[metric][row.name] = Point(value, value - spread, value + spread)
    return figures.plot_points([row.name for row in rows], panels, path, styles, bars=True)


def _pairs(pairs: Mapping[str, Any]) -> Table:
    texts = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in pairs.items()}
    rows = [[TableCell(name), TableCell(text)] for name, text in texts.items()]
    return Table("", ["", ""], rows, align="ll")
