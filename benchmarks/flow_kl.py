"""Flow KL among the children of each prefix, from hidden states, against fused TB and plain code.

The same trajectories through both losses, the supervised term with them. ``fused`` has its flows
before the clock starts; ", flows too" makes them from the rewards of all items in each step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness import floors, ours, plain
from benchmarks.harness.case import Case, Variant
from benchmarks.harness.inputs import Catalogue, Inputs, MakeInputs, catalogue, head_inputs
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import CODES, LossShape, named
from benchmarks.logprobs_children import PlainRestriction, children_floor, refuse_codebooks
from gflowgr.tree import ItemFlows, PrefixTree

_REWARD_NATS = 2.0  # spread of the items' log-rewards


def _build(
    table: str,
    shape: LossShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    items = catalogue(shape)
    tree = PrefixTree.from_identifiers(items.tokens).to(device)
    restricted = _PlainFlowKL(items, shape, device)
    tokens = items.draw(shape, device)
    base = head_inputs(shape, device, dtype, trained=True, upstream=False, tokens=tokens)
    case = Case(
        table,
        shape,
        device,
        dtype,
        partial(_make_inputs, base, len(items.tokens)),
        {
            "flow KL": partial(plain.whole_reference, forward=restricted.made_loss),
            "TB": partial(plain.whole_reference, forward=restricted.loss),
        },
    )
    case.notes.append(f"tree: {items.source}; trajectories drawn uniformly")
    children = restricted.children(case.make_inputs(0)["tokens"])
    case.notes.append(f"{children:,} children to normalise over in one draw")
    case.bare["zero-fill of the gradient"] = floors.zero_fill
    case.floors["dense"] = children_floor(shape, dtype, children, trained=True, sparse=False)
    held = _Fused(tree)
    case.add_ours("flow_kl", held.loss, "flow KL", floor="dense", prepare=held.hold)
    case.add_ours("flow_kl", held.made_loss, "flow KL", floor="dense", suffix=", flows too")
    fused_tb = partial(ours.fused_loss, tree=tree)
    case.variants.append(Variant("fused TB, children", "tb", fused_tb, "TB", "dense"))
    if "torch" in peers:
        for name, forward, prepare in (
            ("plain torch", restricted.held_loss, restricted.hold),
            ("plain torch, flows too", restricted.made_loss, None),
        ):
            case.variants.append(
                Variant(name, "restricted", forward, "flow KL", "dense", prepare=prepare)
            )
    return case


def _make_inputs(base: MakeInputs, items: int, seed: int) -> Inputs:
    """Inputs of a fused loss with log-rewards of all items and log Z."""
    inputs = base(seed)
    g = torch.Generator().manual_seed(seed)
    rewards = _REWARD_NATS * torch.randn(len(inputs["tokens"]), items, generator=g)
    inputs.tensors["rewards"] = rewards.to(inputs["tokens"].device)
    inputs.tensors["log_z"] = inputs["log_z"].detach()
    return inputs


class _Fused:
    """The package's op, with flows that were made before or are made with it."""

    def __init__(self, tree: PrefixTree) -> None:
        self.tree = tree
        self.flows: ItemFlows | None = None

    def hold(self, inputs: Inputs) -> None:
        self.flows = gflowgr.item_flows(self.tree, inputs["rewards"])

    def loss(self, inputs: Inputs) -> Tensor:
        assert self.flows is not None
        return gflowgr.fused_flow_kl_loss(
            inputs["hidden"],
            inputs["weight"],
            inputs["tokens"],
            self.flows,
            tree=self.tree,
            nll_weight=plain.NLL_WEIGHT,
        )

    def made_loss(self, inputs: Inputs) -> Tensor:
        self.hold(inputs)
        return self.loss(inputs)


class _PlainFlowKL(PlainRestriction):
    """The same loss in plain PyTorch: flows of all nodes by sums over levels, softmax by level."""

    def __init__(self, items: Catalogue, shape: LossShape, device: torch.device) -> None:
        super().__init__(items, shape, device)
        self.flows: Tensor | None = None

    def hold(self, inputs: Inputs) -> None:
        """log F [B, nodes]."""
        rewards = inputs["rewards"]
        top = rewards.amax(1, keepdim=True)
        sums = rewards.new_zeros(len(rewards), len(self.table))
        for level in range(self.paths.shape[1]):
            sums.index_add_(1, self.paths[:, level], (rewards - top).exp())
        self.flows = sums.log() + top

    def held_loss(self, inputs: Inputs) -> Tensor:
        """The loss with flows made before."""
        hidden, tokens, flows = inputs["hidden"], inputs["tokens"], self.flows
        assert flows is not None
        prompt = torch.arange(len(tokens), device=tokens.device)
        prompt = prompt.repeat_interleave(tokens.shape[1])[:, None]
        node = torch.zeros(tokens.shape[0] * tokens.shape[1], dtype=torch.int64).to(tokens.device)
        loss = hidden.new_zeros((), dtype=flows.dtype)
        for level, rows in enumerate(inputs["weight"][self.first :].split(CODES)):
            code = tokens[..., level].flatten() - self.first - CODES * level
            children = self.table[node].long()
            alone = children < 0
            logits = (hidden[:, :, level].flatten(0, 1) @ rows.T).to(flows.dtype)
            log_p = logits.masked_fill(alone, -torch.inf).log_softmax(-1)
            target = flows[prompt, children.clamp(min=0)].masked_fill(alone, -torch.inf)
            target = target.log_softmax(-1)
            gap = torch.where(alone, 0.0, target - log_p)
            loss = loss + (target.exp() * gap).sum()
            nll = -log_p.gather(1, code[:, None]).view(tokens.shape[:2])[:, 0]
            loss = loss + plain.NLL_WEIGHT * nll.sum()
            node = children.gather(1, code[:, None]).squeeze(1)
        return loss / len(tokens)

    def made_loss(self, inputs: Inputs) -> Tensor:
        """The loss, flows included."""
        self.hold(inputs)
        return self.held_loss(inputs)


register(
    Table(
        "flow_kl",
        _build,
        LossShape,
        on_cpu=named("letter", "llm"),
        on_gpu=named("letter-gpu"),
        refuse=refuse_codebooks,
    )
)
