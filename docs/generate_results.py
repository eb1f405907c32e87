"""The README's results of experiments, made from the committed files.

    python benchmarks/readme_results.py           # rewrites the section
    python benchmarks/readme_results.py --check   # fails if it is not up to date

Read are ``benchmarks/results/*/results.json`` that ``gflowgr experiment`` wrote. The section lies
between ``<!-- results: begin -->`` and ``<!-- results: end -->``. For each dataset and
identifiers: the main methods' means over seeds with standard deviation, the p-values of their
differences to the baseline, and one sentence derived from these by
:func:`gflowgr.runs.summary.verdict`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gflowgr import files
from gflowgr.report.tables import TableRow, format_table
from gflowgr.runs.statistics import METRICS
from gflowgr.runs.summary import labelled, verdict
from gflowgr.runs.tables import format_p

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Rewrite or check the section."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if outdated")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md")
    args = parser.parse_args()
    path = args.root / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_section(old, section(args.root))
    if args.check:
        if new != old:
            print(f"{path.name}: results outdated; run {Path(__file__).name}", file=sys.stderr)
        return int(new != old)
    files.write_text(path, new)
    return 0


def with_section(readme: str, text: str) -> str:
    """The README with another section between the marks.

    Raises:
        SystemExit: the marks are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md must hold {BEGIN} and {END} once each")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    if not after:
        raise SystemExit(f"README.md: {END} must come after {BEGIN}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def section(root: Path) -> str:
    """All committed experiments, by name of their folder."""
    parts = []
    for path in sorted((root / "benchmarks" / "results").glob("*/results.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if "settings" in facts:  # of an experiment, not of a single run
            parts.append(_experiment(facts, path.parent.relative_to(root).as_posix()))
    return "\n".join(parts) if parts else "No results of experiments are committed yet.\n"


def _experiment(facts: dict[str, Any], folder: str) -> str:
    rows = [row for setting in facts["settings"] for row in setting["rows"]]
    done = sorted({seed for row in rows for seed in row["seeds"]})
    seeds = ", ".join(map(str, done))
    if len(done) > 1:
        seeds = f"mean ± standard deviation over seeds {seeds}"
    elif facts["seeds"] != done:
        seeds = f"one seed, {seeds} (of {', '.join(map(str, facts['seeds']))})"
    else:
        seeds = f"one seed, {seeds}"
    machine = facts["machine"]
    where = machine["processor"] if machine["accelerator"] == "none" else machine["accelerator"]
    text = f"**{facts['title']}** ([report]({folder}/report.md); `{facts['command']}`; {where}). "
    text += f"Test users; {seeds}; p: paired bootstrap over "
    text += f"users of the difference to {facts['baseline']}."
    if facts["missing"]:
        text += f" {len(facts['missing'])} results are missing."
    return text + "\n\n" + "".join(_setting(each, facts["baseline"]) for each in facts["settings"])


def _setting(setting: dict[str, Any], baseline: str) -> str:
    rows, differences = [], {}
    for row in setting["rows"]:
        if row["group"] not in ("reference", "start", "main"):
            continue
        spreads = {metric: row["metrics"][metric] for metric in METRICS}
        note = ""
        if row["to_baseline"] and row["method"] != baseline:
            found = row["to_baseline"]["metrics"]
            note = "p " + ", ".join(format_p(found[metric]["p"]) for metric in METRICS)
            if row["group"] in ("start", "main"):
                pairs = {metric: (found[metric]["mean"], found[metric]["p"]) for metric in METRICS}
                differences[labelled(row["method"], row["group"])] = pairs
        means = {metric: spread["mean"] for metric, spread in spreads.items()}
        sds = {m: spread["sd"] for m, spread in spreads.items() if spread["sd"] is not None}
        rows.append(TableRow(row["method"], means, sds, note))
    if not rows:
        return ""
    table = format_table(rows, columns=METRICS, style="markdown")
    table = table.replace("| note |", "| p of each |", 1)
    sentence = verdict(differences, baseline)
    title = f"{setting['dataset']}, {setting['identifiers']} identifiers"
    return f"{title}:\n\n{table}\n\n" + (f"{sentence}\n\n" if sentence else "")


if __name__ == "__main__":
    sys.exit(main())
