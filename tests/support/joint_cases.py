"""Models over eight identifiers of 2 to 4 tokens, inputs for them, and every joint objective."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gflowgr import PrefixTree
from gflowgr.models import FlowSettings, GFlowModel
from support.small_models import padded_prompts, small_model
from support.tiny_shop import shop_catalogue

# Identifiers of 2 to 4 tokens, none a prefix of another.
IDENTIFIERS = [
    [5, 20, 40, 50],
    [5, 20, 41],
    [5, 21, 40, 50],
    [6, 20, 40, 51],
    [6, 22],
    [7, 23, 42, 52],
    [7, 23, 43, 52],
    [7, 24, 42],
]
LENGTH = 4
# Prompt 1 has a padding trajectory; the positive comes first, and no set has an item twice.
ITEMS = torch.tensor([[0, 1, 3, 5], [4, 2, 7, -1], [6, 5, 0, 4], [1, 0, 6, 2]])


def make_model(*, backbone: str = "t5", **settings: Any) -> GFlowModel:
    tree = PrefixTree.from_identifiers([torch.tensor(tokens) for tokens in IDENTIFIERS])
    vocabulary = shop_catalogue().vocabulary  # only checkpoints read it
    torch.manual_seed(0)
    flow = FlowSettings(**settings)
    model = GFlowModel(small_model(backbone), tree, vocabulary, flow).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):  # heads of zeros would prove little
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_inputs(model: GFlowModel) -> dict[str, Tensor]:
    settings = model.settings
    input_ids, attention_mask = padded_prompts("right")
    padded = [tokens + [-1] * (LENGTH - len(tokens)) for tokens in IDENTIFIERS]
    tokens = torch.tensor(padded)[ITEMS.clamp_min(0)]
    mask = (tokens >= 0) & (ITEMS >= 0).unsqueeze(-1)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "tokens": tokens.masked_fill(~mask, 99_999),  # padding may hold anything
        "mask": mask,
    }
    if settings.objective != "sft":
        inputs["signals"] = 5 * torch.rand(4, 4, 3, generator=generator)
    if settings.importance_clip is not None:
        log_p = model.log_probs(inputs)
        # P / proposal, below and above every clip of the cases.
        ratios = torch.tensor([0.25, 1.0, 4.0])[torch.arange(16).view(4, 4) % 3]
        inputs["log_proposal"] = (log_p - ratios.log()).index_fill(1, torch.tensor(0), math.nan)
    return inputs


CASES = {
    "sft": {"objective": "sft"},
    "sft-children": {"objective": "sft", "normalize": "children"},
    "tb": {"objective": "tb"},
    "tb-children": {"objective": "tb", "normalize": "children", "gfn_weight": 0.3, "beta": 2.0},
    "tb-level-scalar": {"objective": "tb", "normalize": "level", "partition": "scalar"},
    "tb-vargrad": {"objective": "tb", "partition": "vargrad", "log_reward_floor": 1.0},
    "tb-vargrad-children": {"objective": "tb", "partition": "vargrad", "normalize": "children"},
    "tb-mean": {"objective": "tb", "reduction": "mean"},
    "tb-importance": {"objective": "tb", "importance_clip": 0.5, "reduction": "mean"},
    "tb-weighted": {"objective": "tb", "fusion": "weighted", "fusion_anchor": 0.5},
    "tb-mlp-sum": {"objective": "tb", "fusion": "mlp", "reduction": "sum", "gfn_weight": 10.0},
    "db": {"objective": "db"},
    "db-children": {"objective": "db", "normalize": "children", "gfn_weight": 0.3},
    "db-forward-looking": {"objective": "db", "forward_looking": True, "beta": 0.7},
    "subtb": {"objective": "subtb", "subtb_lambda": 0.5},
    "subtb-children": {"objective": "subtb", "normalize": "children", "forward_looking": True},
    "subtb-importance": {"objective": "subtb", "importance_clip": 2.0},
    "gpt2-sft": {"backbone": "gpt2", "objective": "sft"},
    "gpt2-tb-children": {"backbone": "gpt2", "objective": "tb", "normalize": "children"},
    "qwen3-tb": {"backbone": "qwen3", "objective": "tb", "fusion": "weighted"},
    "qwen3-db-children": {"backbone": "qwen3", "objective": "db", "normalize": "children"},
    "llama-subtb": {"backbone": "llama", "objective": "subtb", "forward_looking": True},
}
