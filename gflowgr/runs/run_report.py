"""The end of a run: one table on the screen, results.json, and a report with plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import __version__, files
from ..models.settings import FlowSettings
from ..report.tables import TableRow, format_table
from .config import RunConfig
from .method_report import (
    Report,
    command_as_typed,
    example_recommendations,
    machine_summary,
    write_report,
)
from .processes import is_first_process, working_alone
from .run import RunResult, run

__all__ = ["run_and_report"]


def run_and_report(
    config: RunConfig, *, say: Callable[[str], None] = print, progress: bool = True
) -> RunResult:
    """Carry a run out and leave its results for people and for programs.

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
    # Results are passed on: where things lie on this machine is nobody's business.
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
        "reward": f"{config.flow.fusion} of {', '.join(config.flow.signals)}"
        if config.flow.uses_reward
        else "none",
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
    )


def _data_folder(result: RunResult) -> str:
    path = result.split.dataset.path
    return "FOLDER" if path is None else str(path)


def _objective(flow: FlowSettings) -> str:
    """The objective and its constants."""
    if not flow.has_reference:
        name = flow.objective.upper()
        return f"{name}, {_flow_heads(flow)}, lambda {flow.gfn_weight}, beta {flow.beta}"
    start = "the model of the round" if flow.in_rounds else "the model after SFT"
    text = f"{flow.label} against {start}, beta {flow.reference_weight}"
    if flow.objective == "ipa":
        text += f", lambda {flow.gfn_weight}"
    if flow.sft_weight > 0:
        text += f", {flow.sft_weight} x SFT + {flow.gfn_weight} x {flow.label}"
    return text


def _flow_heads(flow: FlowSettings) -> str:
    """Where log Z, and the flow of prefixes, come from."""
    if flow.objective == "tb":
        return f"Z {flow.partition}"
    return "F learned" + (", forward-looking" if flow.forward_looking else "")
