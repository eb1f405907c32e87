"""The table over seeds: means, spread and paired differences from what runs leave behind."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "seeds_table.py"
METHODS = ("SFT continued", "GFlowGR-TB")
METRICS = ("R@5", "R@10", "N@5", "N@10", "utility@10")


def leave_run(folder: Path, seed: int, beta: float = 5.0) -> Path:
    """A run of 50 users, in which TB has the target two places higher and better items."""
    run = folder / str(seed)
    rng = np.random.default_rng(seed)
    truth = rng.random((50, 30)).astype(np.float16)
    (run / "data").mkdir(parents=True)
    np.save(run / "data" / "truth.npy", truth)
    users, ranks = rng.permutation(50), rng.integers(2, 12, 50)
    order = truth.astype(float).argsort(axis=1)[users]
    lists = {METHODS[0]: (ranks, order[:, 10:20]), METHODS[1]: (ranks - 2, order[:, -10:])}
    found = {}
    for name, (rank, items) in lists.items():
        place = run / "evaluation" / name.lower().replace(" ", "_")
        place.mkdir(parents=True)
        rank = np.where(rank < 10, rank, -1)
        for key, values in (("users", users), ("ranks", rank), ("items", items)):
            np.save(place / f"{key}.npy", values)
        metrics = {}
        for k in (5, 10):
            hit = (rank >= 0) & (rank < k)
            metrics[f"R@{k}"] = hit.mean()
            metrics[f"N@{k}"] = (hit / np.log2(np.maximum(rank, 0) + 2)).mean()
        metrics["utility@10"] = truth[users[:, None], items].astype(float).mean()
        found[name] = {"metrics": metrics}
    config = {"seed": seed, "output_dir": str(run), "flow": {"beta": beta}}
    (run / "results.json").write_text(json.dumps({"config": config, "methods": found}))
    return run


def make_table(monkeypatch: pytest.MonkeyPatch, runs: list[Path], out: Path) -> None:
    arguments = [str(SCRIPT), *map(str, runs), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_table_has_the_runs_means_and_their_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [leave_run(tmp_path, seed) for seed in (1, 2, 3)]
    make_table(monkeypatch, runs, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "seeds.json").read_text())
    assert facts["seeds"] == [1, 2, 3]
    for metric in METRICS:
        method, baseline = (np.array(facts["methods"][name][metric]) for name in reversed(METHODS))
        middle, low, high = np.array([facts["differences"][s][metric] for s in "123"]).T
        assert middle == pytest.approx(method - baseline)
        assert (low <= middle).all()
        assert (middle <= high).all()
        assert (low > 0).all()
        spread = f"{method.mean():.4f} ± {method.std(ddof=1):.4f}"
        assert spread in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "differences.png").stat().st_size > 0


def test_runs_that_do_not_belong_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = leave_run(tmp_path, 1), leave_run(tmp_path, 2, beta=4.0)
    with pytest.raises(SystemExit, match=r"2 differs from .*1 in flow"):
        make_table(monkeypatch, [one, other], tmp_path / "out")
    with pytest.raises(SystemExit, match="a seed occurs twice"):
        make_table(monkeypatch, [one, one], tmp_path / "out")
    np.save(one / "data" / "truth.npy", np.zeros((50, 30), np.float16))
    with pytest.raises(SystemExit, match=r"utility@10 of GFlowGR-TB is not that of its results"):
        make_table(monkeypatch, [one, leave_run(tmp_path, 3)], tmp_path / "out")
