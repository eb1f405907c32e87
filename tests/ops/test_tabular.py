"""A GFlowNet small enough to know the answer: every loss must find P(leaf) = R(leaf) / sum of R.

Two prompts share a ragged tree of ten leaves and have different rewards. The policy is a table, one
logit per prompt and edge; so are the flows, one per prompt and node, and log Z. All leaves of the
tree are trajectories (and one row is padding), which identifies Z, so the optimum is unique.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.tree import PrefixTree

from . import oracles
from .cases import IDENTIFIERS, VOCABULARY, prefix_mask

PROMPTS, LEAVES, STEPS = 2, len(IDENTIFIERS), 4


class TabularGFlowNet:
    """The tables, the trajectories, and the exact distribution over leaves."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tree = PrefixTree.from_identifiers(IDENTIFIERS)
        lengths = [len(row) for row in IDENTIFIERS] + [0]
        rows = [row + [0] * (STEPS - len(row)) for row in [*IDENTIFIERS, []]]
        self.tokens = torch.tensor(rows).expand(PROMPTS, -1, -1)
        self.mask = prefix_mask(torch.tensor(lengths), STEPS).expand(PROMPTS, -1, -1)
        # Log-rewards from -3 to 2; the padding trajectory's is poison.
        self.log_reward = torch.full((PROMPTS, LEAVES + 1), math.nan, dtype=torch.float64)
        rewards = 5 * torch.rand(PROMPTS, LEAVES, generator=g, dtype=torch.float64) - 3
        self.log_reward[:, :LEAVES] = rewards

        after = self.tree.walk(self.tokens, mask=self.mask)
        self.before = torch.cat([torch.zeros_like(after[..., :1]), after[..., :-1]], -1).clamp(0)
        shape = PROMPTS, self.tree.num_nodes
        self.logits = torch.zeros(*shape, VOCABULARY, dtype=torch.float64, requires_grad=True)
        self.node_flow = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        self.log_z = torch.zeros(PROMPTS, dtype=torch.float64, requires_grad=True)

    def loss(self, kind: str, *, fused: bool) -> Tensor:
        """The loss over all leaves. An identity head turns the tables into the op's logits."""
        prompt = torch.arange(PROMPTS)[:, None, None]
        inputs = self.logits[prompt, self.before], torch.eye(VOCABULARY).double(), self.tokens
        flow = self.node_flow[prompt, self.before]
        target = {"tb": (self.log_z,), "vargrad": ()}.get(kind, (flow,))
        if fused:
            fused_loss: Callable[..., Tensor] = getattr(ops, f"fused_{kind}_loss")
            return fused_loss(*inputs, self.log_reward, *target, tree=self.tree, mask=self.mask)
        log_pf = ops.trajectory_logprobs(*inputs, tree=self.tree, mask=self.mask)
        loss: Callable[..., Tensor] = getattr(ops, f"{kind}_loss")
        return loss(log_pf, self.log_reward, *target, mask=self.mask)

    def train(self, kind: str, *, fused: bool) -> None:
        parameters = [self.logits, self.node_flow, self.log_z]
        optimiser = torch.optim.LBFGS(parameters, max_iter=150, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.loss(kind, fused=fused)
            loss.backward()
            return loss

        optimiser.step(closure)

    def probabilities(self, prompt: int) -> list[float]:
        """P(leaf): the product of the softmax over children along its path, by Python loops."""
        result = []
        for identifier in IDENTIFIERS:
            probability, prefix = 1.0, []
            for token in identifier:
                node = int(self.tree.walk(torch.tensor(prefix))[-1]) if prefix else 0
                weights = {
                    child: math.exp(self.logits[prompt, node, child].item())
                    for child in oracles.children(IDENTIFIERS, prefix)
                }
                probability *= weights[token] / sum(weights.values())
                prefix.append(token)
            result.append(probability)
        return result

    def total_variation(self, prompt: int) -> float:
        """Half the L1 distance between P and R / sum R."""
        reward = self.log_reward[prompt, :LEAVES].exp().tolist()
        pairs = zip(self.probabilities(prompt), reward, strict=True)
        return sum(abs(p - r / sum(reward)) for p, r in pairs) / 2


@pytest.mark.parametrize("fused", [False, True], ids=["from_log_pf", "fused"])
@pytest.mark.parametrize("kind", ["tb", "db", "subtb", "vargrad"])
def test_training_reaches_the_reward_distribution(kind: str, fused: bool) -> None:
    gflownet = TabularGFlowNet(seed=42)
    assert min(gflownet.total_variation(b) for b in range(PROMPTS)) > 0.3  # far off at first
    gflownet.train(kind, fused=fused)
    assert max(gflownet.total_variation(b) for b in range(PROMPTS)) < 0.01

    # Each loss also knows log Z, up to what it estimates it with.
    log_z = gflownet.log_reward[:, :LEAVES].logsumexp(-1)
    learned = gflownet.log_z if kind == "tb" else gflownet.node_flow[:, 0]
    if kind == "vargrad":
        log_pf = torch.zeros_like(gflownet.log_reward[..., None])
        for b in range(PROMPTS):
            log_pf[b, :LEAVES, 0] = torch.tensor(gflownet.probabilities(b)).log()
        mask = gflownet.mask[..., :1]
        learned = ops.vargrad_log_z(log_pf, gflownet.log_reward, mask=mask)
    torch.testing.assert_close(learned.detach(), log_z, atol=0.02, rtol=0)
