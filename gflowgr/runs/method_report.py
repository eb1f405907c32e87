"""A report in one folder: report.md and its plots, every file whole or not at all."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr import files
from gflowgr.data import LeaveOneOut
from gflowgr.evaluation.evaluate import Evaluation
from gflowgr.report import plots
from gflowgr.report.tables import TableRow, escape_line_start, format_table

REPORT_NAME = "report.md"


@dataclass(frozen=True)
class Example:
    """One user's recommendations, as titles.

    Attributes:
        user: the user's id in the data.
        history: titles of the user's last items, oldest first.
        target: title of the held-out item.
        recommendations: method to titles, best first.
        found: method to the 0-based place of the held-out item in that method's list, -1 = not in
            it; different items may have the same title.
    """

    user: str
    history: list[str]
    target: str
    recommendations: dict[str, list[str]]
    found: dict[str, int]


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
        machine: see :func:`machine_summary`.
    """

    title: str
    rows: list[TableRow]
    rules: Mapping[str, str]
    setup: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, plots.Logs] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    caveats: Sequence[str] = ()
    references: Sequence[TableRow] = ()
    machine: Mapping[str, str] = field(default_factory=lambda: machine_summary())


def machine_summary() -> dict[str, str]:
    """Processor, memory, accelerators and library versions; no names or paths of the machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    summary = {
        "processor": f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads used",
        "accelerator": "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
    }
    memory = _memory_bytes()
    if memory:
        summary["memory"] = f"{memory / 2**30:.0f} GiB"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        summary["accelerator"] = ", ".join(names)
    return summary


def command_as_typed() -> str:
    """The running command, without the folders that things lie in on this machine."""
    program = Path(sys.argv[0]).name
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["gflowgr" if program == "__main__.py" else program, *words])


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def example_recommendations(
    split: LeaveOneOut,
    evaluations: Mapping[str, Evaluation],
    *,
    count: int = 5,
    history: int = 5,
    top: int = 5,
    seed: int = 0,
) -> list[Example]:
    """Recommendations of each method for the same users, as titles.

    Half of the users (rounded up) are drawn among those for whom some method found the target in
    its list, the rest among all others, so that both sides are seen; say so beside them.

    Args:
        split: the data.
        evaluations: method name to its evaluation; all of the same part and users.
        count: number of users.
        history: items of the history shown.
        top: items of each list shown.
        seed: of the choice.

    Raises:
        ValueError: no evaluations, or evaluations of different users or parts.
    """
    if not evaluations:
        raise ValueError("evaluations must not be empty")
    first = next(iter(evaluations.values()))
    for name, other in evaluations.items():
        if other.which != first.which or not np.array_equal(other.users, first.users):
            raise ValueError(f"evaluation {name!r} is of another part or other users")
    rng = np.random.default_rng(seed)
    found = np.any([evaluation.ranks >= 0 for evaluation in evaluations.values()], axis=0)
    hits, others = (rng.permutation(np.flatnonzero(part)) for part in (found, ~found))
    wanted_hits = max(-(-count // 2), count - len(others))
    chosen = np.concatenate([hits[:wanted_hits], others])[:count]
    row_of = {int(user): row for row, user in enumerate(split.eval_users(first.which))}
    histories, targets = split.histories(first.which), split.targets(first.which)
    title = split.dataset.title
    examples = []
    for place in chosen:
        user = int(first.users[place])
        row = row_of[user]
        lists = {
            name: [title(int(item)) for item in evaluation.items[place, :top] if item >= 0]
            for name, evaluation in evaluations.items()
        }
        past = [title(int(item)) for item in histories[row][-history:]]
        places = {name: int(evaluation.ranks[place]) for name, evaluation in evaluations.items()}
        examples.append(
            Example(split.dataset.user_ids[user], past, title(int(targets[row])), lists, places)
        )
    return examples


def write_report(folder: str | Path, report: Report) -> Path:
    """Write report.md and its PNG plots into ``folder``; return the path of report.md.

    Plots for which the logs hold nothing are left out; plots of an earlier report in the same
    folder are removed.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = files.ensure_writable(folder)
    drawn: list[str] = []
    for name, title, draw in _PLOTS:
        path = folder / f"{name}.png"
        if draw(report, path):
            drawn.append(f"### {title}\n\n![{title}]({path.name})\n")
        else:
            path.unlink(missing_ok=True)
    parts = [f"# {_cell(report.title, 0)}\n", _results(report)]
    if report.caveats:
        parts.append("## Read this first\n\n" + _bullets(_one_line(report.caveats)))
    if drawn:
        parts.append("## Plots\n\n" + "\n".join(drawn))
    if report.examples:
        parts.append(_examples(report.examples))
    if report.setup:
        parts.append("## What was run\n\n" + _pairs(report.setup))
    parts.append("## Machine\n\n" + _pairs(report.machine))
    files.write_text(folder / REPORT_NAME, "\n".join(parts))
    return folder / REPORT_NAME


_PLOTS: list[tuple[str, str, Callable[[Report, Path], bool]]] = [
    ("metrics", "Ranking metrics", lambda r, path: plots.plot_metrics(r.rows, path)),
    ("validation", "Validation while training", lambda r, p: plots.plot_validation(r.stages, p)),
    ("losses", "Training losses", lambda r, path: plots.plot_losses(r.stages, path)),
    ("log_z", "log Z, learned and estimated", lambda r, path: plots.plot_log_z(r.stages, path)),
    ("rewards", "Reward components", lambda r, path: plots.plot_rewards(r.stages, path)),
    ("difficulty", "Sampling difficulty", lambda r, path: plots.plot_difficulty(r.stages, path)),
]


def _results(report: Report) -> str:
    text = "## Results\n\n" + format_table(report.rows, style="markdown")
    text += "\n\nRules behind these numbers:\n\n"
    text += _bullets([f"**{name}**: {rule}" for name, rule in report.rules.items()])
    if report.references:
        text += "\nNumbers from elsewhere (not measured here):\n\n"
        text += format_table(report.references, style="markdown") + "\n"
    return text


def _examples(examples: Sequence[Example]) -> str:
    parts = [
        "## Example recommendations\n",
        "Users for whom some method found the held-out item come first and are over-represented. "
        "The held-out item is marked ✓.\n",
    ]
    for example in examples:
        parts.append(f"### User {_cell(example.user)}\n")
        parts.append("Last items, oldest first:\n")
        parts.append(_bullets([escape_line_start(_cell(title)) for title in example.history]))
        parts.append(f"Held-out item: **{_cell(example.target)}**\n")
        depth = max((len(titles) for titles in example.recommendations.values()), default=0)
        names = list(example.recommendations)
        lines = [_row(["", *names]), _row(["---:", *["---"] * len(names)])]
        for place in range(depth):
            line = [str(place + 1)]
            for name, titles in example.recommendations.items():
                title = titles[place] if place < len(titles) else ""
                mark = " ✓" if example.found[name] == place else ""
                line.append(_cell(title) + mark)
            lines.append(_row(line))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _pairs(pairs: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [_row([_cell(key, 0), _cell(value, 0)]) for key, value in pairs.items()]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _one_line(texts: Sequence[str]) -> list[str]:
    """Sentences, whose Markdown is their author's, without a line that would leave the list."""
    return [" ".join(text.split()) for text in texts]


def _cell(value: Any, width: int = 70) -> str:
    """Text that is safe inside a Markdown table, cut to ``width`` characters unless it is 0."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    text = " ".join(str(value).split())
    if width:
        text = textwrap.shorten(text, width, placeholder=" ...")
    for mark in ("\\", "|", "*", "_", "<", "`", "[", "&", "~"):
        text = text.replace(mark, "\\" + mark)
    return text
