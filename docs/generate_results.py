"""Results in the README and in docs/results.md, made from the files under benchmarks/results.

    python docs/generate_results.py           # rewrites the marked parts
    python docs/generate_results.py --check   # fails if one is not up to date

A part lies between ``<!-- results NAME: begin -->`` and ``<!-- results NAME: end -->``; NAME is one
of :data:`PARTS`. No figure in them is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gflowgr import files
from gflowgr.report.tables import TableRow, format_table, markdown_table
from gflowgr.runs.statistics import METRICS, holm
from gflowgr.runs.summary import labelled, verdict
from gflowgr.runs.tables import format_p

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/results.md")
METHOD = "GFlowGR-TB"
EXACT_METHODS = ("Flow KL joint",)
EXACT_REFERENCES = ("SFT",)
_SHOWN = ("reference", "start", "main")

# The README's table: label, then folder, op, shape, variant and the family compared with.
CHOSEN = (
    ("TB + SFT loss from hidden states, V 33024", "letter", "head", "letter", "cpp", "vocabulary"),
    ("TB + SFT loss, the head frozen", "letter", "head-frozen", "letter", "cpp", "vocabulary"),
    ("TB + SFT loss, V 1027", "tiger", "head", "tiger", "cpp", "vocabulary"),
    (
        "TB + SFT loss over a tree's children, V 152064",
        "children_llm",
        "children",
        "llm",
        "cpp",
        "restricted",
    ),
    ("TB from log-probabilities", "reductions", "tb", "losses", "cpp", "reduction"),
    ("SubTB from log-probabilities", "reductions", "subtb", "losses", "cpp", "reduction"),
    (
        "a step of beam search, V 33124",
        "decode",
        "beam_step.logits",
        "beam_step:64x20x33124x12101",
        "cpp",
        "csr",
    ),
    *(
        ("beam search, " + label, folder, "search", f"search-{at}x20x12101", "", "transformers")
        for label, folder, at in (
            ("T5, 64 prompts", "decode", "t5:64x60"),
            ("T5, 1 prompt", "decode", "t5:1x60"),
            ("own decoder, 64 prompts", "decoder", "decoder:64x80"),
            ("own decoder, 1 prompt", "decoder", "decoder:1x80"),
            ("Qwen3 of 4 layers, 8 prompts", "decode", "qwen3:8x512"),
        )
    ),
    (
        "SFT of a small TIGER, an epoch's steps",
        "train",
        "train",
        "sft-small:128x16x12101",
        "SFT",
        "",
    ),
)


def main() -> int:
    """Rewrite or check the parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if outdated")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md")
    args = parser.parse_args()
    outdated = 0
    for page in PAGES:
        path = args.root / page
        if not path.is_file():
            continue
        old = path.read_text(encoding="utf-8")
        new = with_parts(old, args.root)
        if new == old:
            continue
        outdated += 1
        if args.check:
            print(f"{page}: results outdated; run docs/{Path(__file__).name}", file=sys.stderr)
        else:
            files.write_text(path, new)
    return int(args.check and outdated > 0)


def with_parts(page: str, root: Path) -> str:
    """The page with every marked part made anew.

    Raises:
        SystemExit: a part has an unknown name, or no end.
    """
    for name in re.findall(r"<!-- results (\w+): begin -->", page):
        begin, end = f"<!-- results {name}: begin -->", f"<!-- results {name}: end -->"
        if name not in PARTS:
            raise SystemExit(f"results {name}: must be one of {', '.join(PARTS)}")
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{begin} must be followed by {end}")
        page = f"{before}{begin}\n{PARTS[name](root)}{end}{after}"
    return page


def _recorded(root: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folder and content of each committed file of this name."""
    for path in sorted((root / "benchmarks" / "results").glob(f"*/{name}")):
        yield path.parent.name, json.loads(path.read_text(encoding="utf-8"))


# ---- methods ----


def methods(root: Path) -> str:
    """Tables of all committed experiments, by name of their folder."""
    found = _recorded(root, "results.json")
    parts = [_experiment(facts, name) for name, facts in found if "settings" in facts]
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
    text = f"### {facts['title']}\n\n`{facts['command']}` on {where}; "
    text += f"`benchmarks/results/{folder}/report.md`. "
    text += f"Test users; {seeds}; p: paired bootstrap over "
    text += f"users of the difference to {facts['baseline']}, Holm-corrected."
    if facts["missing"]:
        text += f" {len(facts['missing'])} results are missing."
    return text + "\n\n" + "".join(_setting(each, facts["baseline"]) for each in facts["settings"])


def _setting(setting: dict[str, Any], baseline: str) -> str:
    rows, differences, corrected = [], {}, _corrected(setting)
    for row in setting["rows"]:
        if row["group"] not in _SHOWN:
            continue
        spreads = {metric: row["metrics"][metric] for metric in METRICS}
        note = ""
        if row["to_baseline"] and row["method"] != baseline:
            found = row["to_baseline"]["metrics"]
            ps = {metric: corrected[row["method"], metric] for metric in METRICS}
            note = "p " + ", ".join(map(format_p, ps.values()))
            if row["group"] in ("start", "main"):
                pairs = {metric: (found[metric]["mean"], p) for metric, p in ps.items()}
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


def _corrected(setting: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Holm-corrected p of each method and metric against the baseline, over all of them."""
    found = {
        (row["method"], metric): difference["p"]
        for row in setting["rows"]
        if row["group"] in _SHOWN and row["to_baseline"]
        for metric, difference in row["to_baseline"]["metrics"].items()
    }
    return dict(zip(found, holm(list(found.values())), strict=True))


def exact_flows(root: Path) -> str:
    """The README's table: the joint recipe beside its control and the collaborative model."""
    found = dict(_recorded(root, "results.json")).get("exact_flows")
    if found is None:
        return "Results of `exact_flows` are not committed yet.\n"
    head = ["", "", *METRICS, "CPU s", "p"]
    lines, notes = [head], []
    for setting in found["settings"]:
        rows, corrected = {row["method"]: row for row in setting["rows"]}, _corrected(setting)
        models = [name for name, row in rows.items() if row["group"] == "reference"]
        teachers = [name for name in models if name != "Popularity"]
        together = setting.get("also", {}).get("summed", {"rows": []})
        for row in together["rows"]:
            if row["method"] in EXACT_METHODS:
                rows[f"{row['method']} + {teachers[0]}"] = row
        both = [f"{name} + {teacher}" for name in EXACT_METHODS for teacher in teachers]
        for name in (*EXACT_METHODS, found["baseline"], *EXACT_REFERENCES, *teachers, *both):
            if name not in rows:
                continue
            row = rows[name]
            cpu = row["training"].get("cpu_seconds_in_all")
            ps = [corrected[name, metric] for metric in METRICS if (name, metric) in corrected]
            cells = [f"{row['metrics'][metric]['mean']:.4f}" for metric in METRICS]
            cells.append("" if cpu is None else f"{cpu['mean']:,.0f}")
            cells.append(", ".join(map(format_p, ps)))
            seeds = len(row["seeds"])
            lines.append([setting["dataset"], f"{name}, {seeds} seed{'s' * (seeds > 1)}", *cells])
        notes.append(setting["rules"].get("Seen items", ""))
    if len(lines) == 1:
        return "Results of `exact_flows` are not complete yet.\n"
    seen = "; ".join(dict.fromkeys(notes))
    return (
        markdown_table(lines, "llrrrrrl")
        + f"\n\nTest users, full ranking; seen items {seen}. CPU s: of the training and those that "
        "it needs. A sum (+): the generator's beams in the order of both log-probabilities' sum. "
        f"p: of the four metrics' differences to {found['baseline']}, paired bootstrap over users, "
        "seeds pooled, Holm-corrected. "
        f"{len(found['missing'])} results of the experiment are missing.\n"
    )


def against_baseline(root: Path) -> str:
    """A sentence for each data set of each experiment: GFlowGR-TB beside continued SFT."""
    lines = []
    for folder, facts in _recorded(root, "results.json"):
        for setting in facts.get("settings", ()):
            rows = {row["method"]: row for row in setting["rows"]}
            if METHOD not in rows or not rows[METHOD]["to_baseline"]:
                continue
            ours, base = rows[METHOD], rows[facts["baseline"]]
            parts = []
            for metric in ("R@10", "N@10"):
                pair = [row["metrics"][metric]["mean"] for row in (ours, base)]
                p = format_p(ours["to_baseline"]["metrics"][metric]["p"])
                parts.append(f"{metric} {pair[0]:.4f} against {pair[1]:.4f} (p {p})")
            seeds = ", ".join(map(str, ours["seeds"]))
            place = f"{setting['dataset']} (`{folder}`; seeds {seeds})"
            lines.append(f"- {place}: {'; '.join(parts)}\n")
    return "".join(lines)


def runs(root: Path) -> str:
    """Tables of the single runs that were recorded."""
    text = ""
    for folder, facts in _recorded(root, "results.json"):
        if "settings" in facts:
            continue
        rows = [TableRow(name, found["metrics"]) for name, found in facts["methods"].items()]
        text += (
            f"### {folder}\n\n`{facts['command']}` on {facts['machine']['processor']}; one seed, "
        )
        text += f"{facts['config']['seed']}; `benchmarks/results/{folder}/report.md`.\n\n"
        text += format_table(rows, style="markdown") + "\n\n"
    return text


# ---- microbenchmarks ----


def speed(root: Path) -> str:
    """The README's table of times and memory."""
    machines = {}
    lines = [["", "gflowgr", "fastest other", "times faster", "memory", ""]]
    recorded = dict(_recorded(root, "bench.json"))
    for label, folder, op, shape, variant, family in CHOSEN:
        facts = recorded[f"bench_{folder}"]
        machines[facts["machine"]["device"]] = None
        names = {"cpp": "gflowgr/cpp", "": "gflowgr", "SFT": "gflowgr, SFT, float32"}
        (row,) = (
            row
            for row in facts["rows"]
            if (row["op"], row["shape"], row["variant"]) == (op, shape, names[variant])
            and row["dtype"] == "float32"
        )
        family = family or "transformers"
        memory = row[f"memory_{family}"]
        cells = [label, _ms(row["ms"]), row[f"fastest_{family}_peer"]]
        cells += [f"{row[f'speedup_{family}']:.3g}", "" if memory is None else f"{memory:.2g}"]
        lines.append([*cells, "disturbed" if row["contended"] else ""])
    text = markdown_table(lines, "lrlrrl") + "\n"
    return text + f"\nOn {', '.join(machines)}, float32. Memory: ours over that of the other.\n"


def microbenchmarks(root: Path) -> str:
    """All recorded rows of ours, a table for each folder."""
    text = ""
    for folder, facts in _recorded(root, "bench.json"):
        machine = facts["machine"]
        text += f"### {folder}\n\n`{machine['command']}` on {machine['device']}, torch "
        text += f"{machine['torch']}, {machine['date'][:10]}.\n\n"
        header = ["op, shape, dtype", "variant", "time", "over the floor", "extra MiB"]
        lines = [[*header, "faster than", ""]]
        for row in facts["rows"]:
            if row["family"] or row["status"] != "ok":
                continue
            peers = [
                f"{row[key]:.3g} x {row[key.replace('speedup', 'fastest') + '_peer']}"
                for key in row
                if key.startswith("speedup_") and row[key] is not None
            ]
            sizes = [row["over_floor"], row["extra_mib"]]
            cells = ["-" if size is None else f"{size:.3g}" for size in sizes]
            name = f"{row['op']}, {row['shape']}, {row['dtype']}"
            note = "disturbed" if row["contended"] else ""
            lines.append([name, row["variant"], _ms(row["ms"]), *cells, "; ".join(peers), note])
        text += markdown_table(lines, "llrrrll") + "\n\n"
    return text


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


PARTS: dict[str, Callable[[Path], str]] = {
    "methods": methods,
    "against_baseline": against_baseline,
    "exact_flows": exact_flows,
    "runs": runs,
    "speed": speed,
    "microbenchmarks": microbenchmarks,
}
"""Name of a part -> its text, given the repository's root."""


if __name__ == "__main__":
    sys.exit(main())
