"""Several seeds of one configuration in one table: means, spread, and paired differences.

    python benchmarks/seeds_table.py runs/proof_42 runs/proof_43 runs/proof_44 \
        --out benchmarks/results/simulated_proof

Each folder is a run of ``gflowgr train``. Written: ``table.md``, ``seeds.json`` and a plot,
``differences.png``.
The spread is the standard deviation over seeds (n - 1). A seed's interval is a bootstrap over its
users, who are drawn together for both methods (percentiles 2.5 and 97.5 of 2,000 draws).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr import files
from gflowgr.evaluation.metrics import gains, hits
from gflowgr.report import plots
from gflowgr.report.tables import markdown_table

METRICS = ("R@5", "R@10", "N@5", "N@10", "utility@10")
BASELINE, METHOD = "SFT continued", "GFlowGR-TB"
_DRAWS = 2_000


def main() -> None:
    """Read the runs, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, one per seed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()
    results = [json.loads((run / "results.json").read_text()) for run in args.runs]
    seeds = [int(result["config"]["seed"]) for result in results]
    _check_equal(args.runs, results, seeds)
    differences = [_paired(*each) for each in zip(args.runs, results, seeds, strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out / "table.md", _tables(results, seeds, differences))
    _write_json(args.out / "seeds.json", results, seeds, differences)
    _plot(args.out / "differences.png", seeds, differences)


def _check_equal(runs: Sequence[Path], results: Sequence[dict[str, Any]], seeds: list[int]) -> None:
    """Runs of one configuration, each seed once."""
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"a seed occurs twice: {seeds}")
    configs = [
        {key: value for key, value in result["config"].items() if key not in ("seed", "output_dir")}
        for result in results
    ]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        if config != configs[0]:
            keys = [key for key in config if config[key] != configs[0].get(key)]
            raise SystemExit(f"{run} differs from {runs[0]} in {', '.join(keys)}")


def per_user(run: Path, method: str) -> dict[str, np.ndarray]:
    """Each metric of each test user [users]; their means are the run's results."""
    folder = run / "evaluation" / method.lower().replace(" ", "_")
    users, ranks, items = (np.load(folder / f"{name}.npy") for name in ("users", "ranks", "items"))
    values = {}
    for k in (5, 10):
        values[f"R@{k}"] = hits(ranks, k).astype(float)
        values[f"N@{k}"] = gains(ranks, k)
    truth = np.load(run / "data" / "truth.npy")[users].astype(np.float64)
    gained = np.take_along_axis(truth, np.maximum(items, 0), axis=1)
    gained = np.where(items >= 0, gained, truth.min(axis=1, keepdims=True))
    values["utility@10"] = gained.mean(axis=1)
    return {name: values[name] for name in METRICS}


def _paired(run: Path, result: dict[str, Any], seed: int) -> dict[str, list[float]]:
    """Method less baseline: the mean over users and the ends of its interval."""
    method, baseline = per_user(run, METHOD), per_user(run, BASELINE)
    for name, values in ((METHOD, method), (BASELINE, baseline)):
        for metric, recorded in result["methods"][name]["metrics"].items():
            if metric in values and abs(values[metric].mean() - recorded) > 1e-9:
                raise SystemExit(f"{run}: {metric} of {name} is not that of its results.json")
    difference = np.stack([method[name] - baseline[name] for name in METRICS], axis=1)
    rng = np.random.default_rng(seed)
    draws = np.empty((_DRAWS, len(METRICS)))
    for draw in draws:
        draw[:] = difference[rng.integers(len(difference), size=len(difference))].mean(axis=0)
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    mean = difference.mean(axis=0)
    return {name: [float(mean[i]), float(low[i]), float(high[i])] for i, name in enumerate(METRICS)}


def _column(results: Sequence[dict[str, Any]], method: str, metric: str) -> np.ndarray:
    return np.array([result["methods"][method]["metrics"][metric] for result in results])


def _tables(
    results: Sequence[dict[str, Any]], seeds: list[int], differences: list[dict[str, list[float]]]
) -> str:
    rows = []
    for method in results[0]["methods"]:
        cells = []
        for metric in METRICS:
            values = _column(results, method, metric)
            cells.append(f"{values.mean():.4f} ± {values.std(ddof=1):.4f}")
        rows.append([method, *cells])
    paired = []
    for seed, row in zip(seeds, differences, strict=True):
        cells = [f"{m:+.4f} ({low:+.4f}, {high:+.4f})" for m, low, high in row.values()]
        paired.append([f"seed {seed}", *cells])
    cells = []
    for metric in METRICS:
        values = np.array([row[metric][0] for row in differences])
        cells.append(f"{values.mean():+.4f} ± {values.std(ddof=1):.4f}")
    paired.append(["mean ± deviation", *cells])
    head, align = ["", *METRICS], "l" * (1 + len(METRICS))
    return (
        f"Test users, mean and standard deviation over seeds {seeds}:\n\n"
        f"{markdown_table([head, *rows], align)}\n\n"
        f"{METHOD} less {BASELINE}, per seed (95 % bootstrap interval over users):\n\n"
        f"{markdown_table([head, *paired], align)}\n"
    )


def _write_json(
    path: Path,
    results: Sequence[dict[str, Any]],
    seeds: list[int],
    differences: list[dict[str, list[float]]],
) -> None:
    methods = {
        method: {metric: _column(results, method, metric).tolist() for metric in METRICS}
        for method in results[0]["methods"]
    }
    facts = {
        "seeds": seeds,
        "methods": methods,
        "differences": dict(zip(map(str, seeds), differences, strict=True)),
        "of": f"{METHOD} less {BASELINE}: mean, low, high",
    }
    files.write_json(path, facts)


def _plot(path: Path, seeds: list[int], differences: list[dict[str, list[float]]]) -> None:
    """Differences in the metrics' own units, one panel each."""
    figure, all_axes = plots.panels(len(METRICS), 1.8, 2.2, columns=len(METRICS))
    for axes, metric in zip(all_axes, METRICS, strict=True):
        mean, low, high = np.array([row[metric] for row in differences]).T
        places = np.arange(len(seeds))
        axes.errorbar(places, mean, yerr=[mean - low, high - mean], fmt="o", capsize=3)
        axes.axhline(0, color=plots.GREY, linewidth=0.8)
        axes.set_xticks(places, [str(seed) for seed in seeds])
        axes.set_xlim(-0.5, len(seeds) - 0.5)
        plots.frame(axes, title=metric, x="seed")
    figure.suptitle(f"{METHOD} less {BASELINE}, 95 % bootstrap over users", fontsize=9)
    plots.save(figure, path)


if __name__ == "__main__":
    main()
