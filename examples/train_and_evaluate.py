"""The whole method in Python: data, SASRec, SFT, GFlowGR-TB, evaluation.

    python examples/train_and_evaluate.py           # a minute
    python examples/train_and_evaluate.py 20 600    # epochs of SASRec, steps of each training

What `gflowgr train` does from one YAML file; here each step is yours to change. The default is far
too short for the numbers to mean anything.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from gflowgr import FlowSettings, GenerativeRecommender, GFlowGRConfig, GFlowGRTrainer, GFlowModel
from gflowgr.data import LeaveOneOut, generate_builtin
from gflowgr.evaluation import evaluate
from gflowgr.models import TigerConfig, build_tiger
from gflowgr.runs.prepare import make_catalogue
from gflowgr.training import train_sasrec


def main(epochs: int = 1, steps: int = 10) -> None:
    torch.manual_seed(0)
    dataset = generate_builtin(seed=0, num_users=300, num_items=200)
    split = LeaveOneOut(dataset, max_history=10)
    catalogue = make_catalogue("hierarchy", dataset.identifiers("hierarchy"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sasrec = train_sasrec(
            split, output_dir=folder / "sasrec", epochs=epochs, eval_users=100, progress=False
        )

        # Supervised fine-tuning of a small T5 over identifier tokens.
        sizes = TigerConfig(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1)
        backbone = build_tiger(catalogue.vocabulary, sizes, seed=0)
        settings = FlowSettings(objective="sft", max_history=10)
        sft = GFlowModel(backbone, catalogue.tree, catalogue.vocabulary, settings)
        common = {
            "max_steps": steps,
            "per_device_train_batch_size": 64,
            "save_strategy": "no",
            "logging_steps": max(1, steps // 2),
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        GFlowGRTrainer(
            sft, GFlowGRConfig(str(folder / "sft"), learning_rate=3e-3, **common), split
        ).train()

        # From there, trajectory balance over four items per prompt: lambda 0.1, beta 4.
        tb = sft.with_settings(objective="tb", gfn_weight=0.1, beta=4.0)
        config = GFlowGRConfig(str(folder / "tb"), num_trajectories=4, **common)
        GFlowGRTrainer(tb, config, split, collaborative=sasrec).train()

    for label, model in (("SFT", sft), ("GFlowGR-TB", tb)):
        recommender = GenerativeRecommender(model, num_beams=10, name=label)
        result = evaluate(
            recommender, split, "test", max_users=100, truth=dataset.truth, progress=False
        )
        shown = "  ".join(f"{key} {value:.4f}" for key, value in result.metrics.items())
        print(f"{label:<12}{shown}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
