"""Every public op on tensors of trajectories, on named arguments: for tests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.tree import PrefixTree, item_flows

from .cases import IDENTIFIERS, VOCABULARY

B, N, L, WIDTH = 3, 2, 4, 5
TREE = PrefixTree.from_identifiers(IDENTIFIERS)

_GENERATOR = torch.Generator().manual_seed(1)
FLOWS = item_flows(TREE, torch.randn(B, TREE.num_items, generator=_GENERATOR))

Arguments = dict[str, Tensor]
Op = Callable[[Arguments], Tensor]


def arguments(dtype: torch.dtype = torch.float32) -> Arguments:
    """One set for all ops: trajectories are identifiers of ``TREE``, of different lengths."""
    g = torch.Generator().manual_seed(0)
    tokens = TREE.identifiers(torch.tensor([[0, 3], [6, 8], [4, 0]]))
    mask = tokens >= 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    return {
        "hidden": normal(B, N, L, WIDTH),
        "weight": normal(VOCABULARY, WIDTH),
        "bias": normal(VOCABULARY),
        "tokens": tokens.clamp(min=0),
        "mask": mask,
        "log_reward": normal(B, N),
        "log_z": normal(B),
        "log_flow": normal(B, N, L),
        "logits": normal(B, N, L, VOCABULARY),
        "log_pf": -normal(B, N, L).abs(),
        "ref_log_pf": -normal(B, N, L).abs(),
        "ref_hidden": normal(B, N, L, WIDTH),
        "ref_weight": normal(VOCABULARY, WIDTH),
        "ref_bias": normal(VOCABULARY),
        "reward": normal(B, N).abs(),
    }


def _on_head(name: str, *balance: str, **options: Any) -> Op:
    function = getattr(ops, name)
    return lambda a: function(
        *(a[key] for key in ("hidden", "weight", "tokens", *balance)),
        **{key: a[key] for key in ("bias", "mask")},
        **options,
    )


def _on_flows(**options: Any) -> Op:
    return lambda a: ops.fused_flow_kl_loss(
        *(a[key] for key in ("hidden", "weight", "tokens")),
        FLOWS,
        tree=TREE,
        **{key: a[key] for key in ("bias", "mask")},
        **options,
    )


def _on_two_heads(name: str, *balance: str) -> Op:
    function = getattr(ops, name)
    return lambda a: function(
        *(a[key] for key in ("hidden", "weight", "tokens", "ref_hidden", "ref_weight", *balance)),
        **{key: a[key] for key in ("bias", "ref_bias", "mask")},
        nll_weight=0.5,
    )


def _on_log_pf(name: str, *balance: str) -> Op:
    function = getattr(ops, name)
    return lambda a: function(*(a[key] for key in ("log_pf", *balance)), mask=a["mask"])


OPS: dict[str, Op] = {
    "logprobs vocab": _on_head("trajectory_logprobs", temperature=0.7),
    "logprobs level": _on_head("trajectory_logprobs", tree=TREE, normalize="level"),
    "logprobs children": _on_head("trajectory_logprobs", tree=TREE),
    "fused tb": _on_head("fused_tb_loss", "log_reward", "log_z", nll_weight=0.5),
    "fused tb level": _on_head(
        "fused_tb_loss", "log_reward", "log_z", tree=TREE, normalize="level"
    ),
    "fused tb children": _on_head("fused_tb_loss", "log_reward", "log_z", tree=TREE),
    "fused tb, one each": _on_head("fused_tb_loss", "log_reward", "log_z", reduction="none"),
    "fused db": _on_head("fused_db_loss", "log_reward", "log_flow"),
    "fused subtb": _on_head("fused_subtb_loss", "log_reward", "log_flow", lam=0.5),
    "fused vargrad": _on_head("fused_vargrad_loss", "log_reward", reduction="mean"),
    "fused flow kl level, children": _on_flows(normalize="level"),
    "fused flow kl children": _on_flows(nll_weight=0.5),
    "fused dpo": _on_two_heads("fused_dpo_loss"),
    "fused grpo": _on_two_heads("fused_grpo_loss", "reward"),
    "logprobs from logits": lambda a: ops.logprobs_from_logits(
        a["logits"], a["tokens"], mask=a["mask"], temperature=0.7
    ),
    "tb": _on_log_pf("tb_loss", "log_reward", "log_z"),
    "db": _on_log_pf("db_loss", "log_reward", "log_flow"),
    "subtb": _on_log_pf("subtb_loss", "log_reward", "log_flow"),
    "vargrad": _on_log_pf("vargrad_loss", "log_reward"),
    "vargrad log Z": _on_log_pf("vargrad_log_z", "log_reward"),
    "dpo": _on_log_pf("dpo_loss", "ref_log_pf"),
    "sdpo": _on_log_pf("sdpo_loss", "ref_log_pf"),
    "grpo": _on_log_pf("grpo_loss", "ref_log_pf", "reward"),
}

DIFFERENTIABLE = ("hidden", "weight", "bias", "log_reward", "log_z", "log_flow", "logits", "log_pf")


class Reading(dict[str, Tensor]):
    """Arguments that note which of them an op reads."""

    def __init__(self, given: Arguments) -> None:
        super().__init__(given)
        self.read: list[str] = []

    def __getitem__(self, key: str) -> Tensor:
        self.read.append(key)
        return super().__getitem__(key)


def read_by(name: str) -> list[str]:
    """The names of an op's tensor arguments."""
    reading = Reading(arguments())
    OPS[name](reading)
    return reading.read
