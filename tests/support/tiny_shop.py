"""A shop of 200 users and 200 items, a generator of 16 dimensions, and arguments to train it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gflowgr.collaborative import EmbeddingScorer
from gflowgr.data import LeaveOneOut, generate_builtin
from gflowgr.models import FlowSettings, GFlowModel, TigerConfig, build_tiger, prompt_tokens
from gflowgr.runs.prepare import Catalogue, make_catalogue
from gflowgr.training import GFlowGRConfig

MAX_HISTORY = 8


@functools.cache
def shop() -> LeaveOneOut:
    dataset = generate_builtin(seed=0, num_users=200, num_items=200)
    return LeaveOneOut(dataset, max_history=MAX_HISTORY)


@functools.cache
def shop_catalogue() -> Catalogue:
    return make_catalogue("hierarchy", shop().dataset.identifiers("hierarchy"))


def make_model(*, dropout: float = 0.0, seed: int = 0, **settings: Any) -> GFlowModel:
    catalogue = shop_catalogue()
    sizes = TigerConfig(16, d_ff=32, d_kv=8, num_heads=2, num_layers=1, dropout=dropout)
    backbone = build_tiger(catalogue.vocabulary, sizes, seed=seed)
    torch.manual_seed(seed)
    settings = {"objective": "tb", "max_history": MAX_HISTORY, **settings}
    return GFlowModel(backbone, catalogue.tree, catalogue.vocabulary, FlowSettings(**settings))


def make_inputs(model: GFlowModel) -> dict[str, Tensor]:
    """3 prompts with 4 trajectories; the last trajectory of prompt 1 is padding."""
    items = torch.tensor([[3, 50, 120, 7], [9, 8, 77, 0], [199, 0, 64, 65]])
    histories = torch.tensor([[5, 6, 7], [100, -1, -1], [1, 2, -1]])
    input_ids, attention_mask = prompt_tokens(histories, model.item_tokens())
    tokens = model.item_tokens()[items]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 3] = False
    rewards = torch.tensor([[14.5, 0.4, 1.2, 2.5], [5.3, 0.9, 0.5, 1.0], [11.0, 3.0, 0.1, 2.0]])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "tokens": tokens,
        "mask": mask,
        "log_reward": rewards.log(),
    }


def make_scorer(num_items: int = 200) -> EmbeddingScorer:
    """A fixed random table: a collaborative model as good as any for the mechanics."""
    return EmbeddingScorer(torch.randn(num_items, 4, generator=torch.Generator().manual_seed(5)))


def make_args(folder: Path, **options: Any) -> GFlowGRConfig:
    """256 prompts per batch make 6 batches an epoch."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 256,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "seed": 3,
        "bf16": False,  # the default differs between machines
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "eval_beams": 4,
        "eval_max_users": 30,
        "dataloader_pin_memory": False,
    }
    return GFlowGRConfig(output_dir=str(folder), **{**defaults, **options})
