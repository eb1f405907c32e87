"""A small experiment's folder, as the runner leaves it, with made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

USERS = 400
TAIL = 120  # the first users, whose targets count as rare
REFERENCES = {"sasrec": ("SASRec", 0.30), "popularity": ("Popularity", 0.04)}
START = ("sft", "SFT", 0.26)
BASELINE, FULL = "SFT continued", "GFlowGR-TB"
RULES = {"Split": "leave-one-out", "Users": f"{USERS}, all of them", "Seen items": "not masked"}


def method(name: str, chance: float, **facts: Any) -> dict[str, Any]:
    """A method's entry; ``chance``: of a target to be found (not part of the file)."""
    slug = name.lower().replace(" ", "_")
    plain = {"name": name, "slug": slug, "group": "main", "of": None, "key": None, "value": None}
    return plain | {"chance": chance} | facts


METHODS = [
    method(BASELINE, 0.27),
    method("S-DPO", 0.28),
    method(FULL, 0.42),
    method(f"{FULL} without r_a", 0.30, group="ablation", of=FULL),
    *(
        method(f"{FULL} gfn_weight={value:g}", chance, group="grid", of=FULL,
               key="flow.gfn_weight", value=value)
        for value, chance in ((0.01, 0.3), (1.0, 0.33))
    ),
    method(f"{FULL} gfn_weight=0.1", 0.42, slug=FULL.lower(), group="grid", of=FULL,
           key="flow.gfn_weight", value=0.1, alias=True),
]  # fmt: skip


def write_experiment(
    out: Path,
    *,
    datasets: dict[str, list[str]] | None = None,
    seeds: tuple[int, ...] = (42, 43, 44),
    methods: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a complete experiment and return its folder."""
    datasets = datasets or {"Shop": ["tiger"]}
    methods = METHODS if methods is None else methods
    facts = {
        "name": "made_up",
        "title": "A made-up <experiment>",
        "baseline": BASELINE,
        "seeds": list(seeds),
        "datasets": {name: {"identifiers": names} for name, names in datasets.items()},
        "methods": [{k: v for k, v in each.items() if k != "chance"} for each in methods],
        "base": {"data": {"path": "/secret/place/Shop"}, "collaborative": {"epochs": 2}},
        "caveats": ["Everything here is made up."],
    }
    write(out / "experiment.json", facts)
    for number, (dataset, names) in enumerate(datasets.items()):
        for seed in seeds:
            top = out / dataset / f"seed_{seed}"
            for slug, (name, chance) in REFERENCES.items():
                folder = top / "collaborative" / "evaluation" / slug
                write_evaluation(folder, name, chance, (number, seed), coded=False)
            facts = {"cpu_seconds": 9.0, "log_history": []}
            write(top / "collaborative" / "sasrec" / "sasrec_training.json", facts)
            for identifiers in names:
                slug, name, chance = START
                write_trained(top / identifiers / slug, name, chance, (number, seed))
                for each in methods:
                    if not each.get("alias"):
                        folder = top / identifiers / each["slug"]
                        write_trained(folder, each["name"], each["chance"], (number, seed))
    return out


def write_trained(folder: Path, name: str, chance: float, stream: tuple[int, int]) -> None:
    """A trained cell: facts, logs, and an evaluation."""
    flow = name.startswith("GFlowGR")
    steps, per_step = 200, 0.03 if flow else 0.02
    facts = {
        "steps": steps,
        "seconds": steps * per_step + 2,
        "train_seconds": steps * per_step,
        "cpu_seconds": steps * per_step * 2,
        "cpu_seconds_before": 0.0 if name == "SFT" else 9.0,
        "tokens": steps * 4000 * (3 if flow else 1),
        "batch_size": 64,
        "learning_rate": 5e-4,
        "best_valid_N@10": chance / 2,
        "peak_memory_bytes": 900 * 2**20,
        "memory_kind": "resident",
    }
    write(folder / "done.json", facts)
    rng = np.random.default_rng(stream[1])
    logs: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        entry: dict[str, Any] = {"step": step, "loss": 3 + 9 / step + 0.1 * rng.random()}
        entry["loss_gr"] = entry["loss"]
        if flow:
            entry |= {"loss_gfn": 400 / step, "log_z": step / 90, "log_z_group": 2.5}
            entry |= {f"reward/{part}": 1.0 + step / 400 for part in ("r_a", "r_yhat", "r_sim")}
            entry |= {f"reward_augmented/{part}": 0.3 for part in ("r_a", "r_yhat", "r_sim")}
        if name == "S-DPO":
            entry["loss_preference"] = 0.7 - step / 800
        logs.append(entry | {"cpu_seconds": 10 * per_step * 2})
        if step % 50 == 0:
            logs.append({"step": step, "eval_N@10": chance / 2 * (1 - 5 / step)})
    write(folder / "log_history.json", logs)
    write_evaluation(folder / "evaluation", name, chance, stream)
    for rule, better in (("masked", 1.2), ("summed", 1.1)):
        other = folder / "evaluation" / rule
        write_evaluation(other, name, min(1.0, chance * better), stream)
        (other / "analysis.json").unlink()


def write_evaluation(
    folder: Path, name: str, chance: float, stream: tuple[int, int], coded: bool = True
) -> None:
    """Ranks of which a share ``chance`` are hits; users' luck is shared by all methods."""
    rng = np.random.default_rng(stream)
    luck, place = rng.random(USERS), rng.integers(0, 10, USERS)
    ranks = np.where(luck < chance, place, -1)
    items = rng.permuted(np.tile(np.arange(50), (USERS, 1)), axis=1)[:, :10]
    arrays = {"users": np.arange(USERS), "ranks": ranks, "items": items}
    folder.mkdir(parents=True, exist_ok=True)
    for key, values in arrays.items():
        np.save(folder / f"{key}.npy", values.astype(np.int64))
    metrics = metrics_of(ranks) | {"coverage": 0.5 + chance, "entropy": 3.0, "num_users": USERS}
    write(folder / "done.json", {"name": name, "which": "test", "metrics": metrics, "rules": RULES})
    diversity = {
        "coverage": 0.5 + chance,
        "item_entropy": 3.0 + chance,
        "gini": 0.5,
        "code_entropy": [1.0, 2.0] if coded else None,
        "intra_list_distance": 0.7 if coded else None,
        "mean_popularity": 20.0,
    }
    parts = {"tail": ranks[:TAIL], "head": ranks[TAIL:]}
    groups = [
        {
            "name": key,
            "users": len(part),
            "metrics": {k: metrics_of(part)[k] for k in ("R@10", "N@10")},
        }
        for key, part in parts.items()
    ]
    calibration = None
    if coded:
        log_r = rng.normal(size=300)
        log_p = chance * log_r + rng.normal(size=300)
        values = {"log_p": log_p.round(4).tolist(), "log_r": log_r.round(4).tolist()}
        calibration = {"users": 8, "pearson": chance, "spearman": chance / 2} | values
        level = {"users": [3, 5], "tokens": [4, 6, 9], "target": [[0.5, 0.3, 0.2]] * 2}
        calibration["first_level"] = level | {
            "model": [[0.5 - chance / 4, 0.3, 0.2 + chance / 4]] * 2
        }
    analysis = {
        "diversity": diversity,
        "breakdown": {"Popularity of the target (made up)": groups},
        "calibration": calibration,
    }
    write(folder / "analysis.json", analysis)


def metrics_of(ranks: np.ndarray) -> dict[str, float]:
    """R@k and N@k, user by user."""
    found = {}
    for k in (5, 10):
        hits = [int(rank) for rank in ranks if 0 <= rank < k]
        found[f"R@{k}"] = len(hits) / len(ranks)
        found[f"N@{k}"] = sum(1 / np.log2(rank + 2) for rank in hits) / len(ranks)
    return found


def write(path: Path, values: Any) -> None:
    """JSON, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
