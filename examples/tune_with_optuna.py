"""Hyper-parameters by Optuna: each trial is ``gflowgr train --set ...``, judged by validation N@10.

    pip install optuna
    python examples/tune_with_optuna.py --config examples/simulated_paper.yaml --out runs/tuned

SASRec and the supervised start do not depend on what is tuned here: they are trained once, in the
first trial, and copied into the others. Test users are never looked at for a choice. The study is
kept in ``OUT/study.db``: the same command goes on with it.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import optuna

from gflowgr.cli import main as gflowgr
from gflowgr.files import read_json

SHARED = ("sasrec", "sft", "examples", "data")
"""Folders of a run that do not depend on ``flow`` and ``finetune``."""


def train(config: Path, folder: Path, settings: Sequence[str]) -> float:
    """Validation N@10 of the method after a run with these ``key=value`` settings."""
    command = ["train", "--config", str(config), "--output-dir", str(folder), "--no-progress"]
    for setting in settings:
        command += ["--set", setting]
    if gflowgr(command) != 0:
        raise optuna.TrialPruned(f"gflowgr {' '.join(command)} failed")
    return float(read_json(folder / "gflowgr" / "done.json")["best_valid_N@10"])


def main(arguments: Sequence[str] | None = None) -> optuna.Study:
    """Run the study; print and return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    first = args.out / "trial_0"

    def objective(trial: optuna.Trial) -> float:
        weight = trial.suggest_float("flow.gfn_weight", 1e-2, 10.0, log=True)
        beta = trial.suggest_float("flow.beta", 0.25, 8.0, log=True)
        rate = trial.suggest_float("finetune.learning_rate", 1e-5, 1e-3, log=True)
        folder = args.out / f"trial_{trial.number}"
        for name in SHARED:
            if (first / name).is_dir() and not (folder / name).exists():
                shutil.copytree(first / name, folder / name)
        settings = {"flow.gfn_weight": weight, "flow.beta": beta, "finetune.learning_rate": rate}
        chosen = [f"{name}={value!r}" for name, value in settings.items()]
        return train(args.config, folder, ["continued_sft=false", *chosen])

    study = optuna.create_study(
        study_name="gflowgr",
        storage=f"sqlite:///{args.out / 'study.db'}",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=42),
        load_if_exists=True,
    )
    study.optimize(objective, n_trials=args.trials)
    print(f"valid N@10 {study.best_value:.4f} with {study.best_params}")
    return study


if __name__ == "__main__":
    main()
