"""A few steps on Amazon Beauty with LETTER's published identifiers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args

from gflowgr.collaborative import EmbeddingScorer
from gflowgr.data import LeaveOneOut, load_dataset
from gflowgr.evaluation.generative import GenerativeRecommender
from gflowgr.models import FlowSettings, GFlowModel, TigerConfig, build_tiger
from gflowgr.runs.prepare import make_catalogue
from gflowgr.training import GFlowGRTrainer


@pytest.fixture(scope="module")
def beauty(data_root: Path) -> LeaveOneOut:
    return LeaveOneOut(load_dataset(data_root / "Beauty"), max_history=20)


def test_sft_and_then_gflowgr_on_beauty(beauty: LeaveOneOut, tmp_path: Path) -> None:
    identifiers = beauty.dataset.identifiers("letter_official")
    catalogue = make_catalogue("letter_official", identifiers)
    sizes = TigerConfig(16, d_ff=32, d_kv=8, num_heads=2, num_layers=1, dropout=0.0)
    model = GFlowModel(
        build_tiger(catalogue.vocabulary, sizes, seed=0),
        catalogue.tree,
        catalogue.vocabulary,
        FlowSettings(objective="sft"),
    )
    options = {"max_steps": 3, "per_device_train_batch_size": 64, "eval_max_users": 20}
    sft = GFlowGRTrainer(model, make_args(tmp_path / "sft", **options), beauty)
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(4 * np.log(catalogue.vocabulary.size), rel=0.2)
    assert losses[-1] < losses[0]

    generator = torch.Generator().manual_seed(0)
    scorer = EmbeddingScorer(torch.randn(beauty.num_items, 8, generator=generator))
    model = model.with_settings(objective="tb")
    args = make_args(tmp_path / "tb", **options)
    trainer = GFlowGRTrainer(model, args, beauty, collaborative=scorer)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(np.isfinite(entry["loss_gfn"]) for entry in log)
    assert log[0]["reward/r_a"] == 10  # no behaviours are recorded: each event counts in full
    metrics = trainer.evaluate()
    assert metrics["eval_num_users"] == 20

    histories = beauty.histories("test")[:20]
    items, scores = GenerativeRecommender(model, num_beams=10).recommend(histories, 10)
    assert items.shape == (20, 10)
    assert items.min() >= 0
    assert items.max() < beauty.num_items
    assert all(len(set(row)) == 10 for row in items.tolist())
    assert bool((np.diff(scores, axis=1) <= 0).all())
