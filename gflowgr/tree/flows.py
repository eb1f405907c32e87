"""Exact flows of the prefix tree: log Z and every state flow, computed and not learned.

For a prompt U with a reward R(i) of every item i,

    F(s) = sum of R(i) over the items whose identifier starts with s,     Z(U) = F(empty prefix),
    P*_F(t | s) = F(s t) / F(s)                (the GFlowNet's forward policy, in closed form).

They follow from the definition of a flow on a tree, where a state has one parent (Bengio et al.
2023, arXiv 2111.09266). ``tb_loss`` with ``flows.log_z`` and ``db_loss`` with
``flows.log_flow(tokens)`` are zero exactly where P_F is proportional to R.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gflowgr import backends
from gflowgr.tree.build import integer_tensor
from gflowgr.tree.facts import accept
from gflowgr.tree.flows_reference import NO_NODE, item_flows_reference
from gflowgr.tree.prefix_tree import PrefixTree

__all__ = ["ItemFlows", "item_flows"]


@torch.library.custom_op("gflowgr::item_flows", mutates_args=())
def _item_flows(
    log_reward: Tensor, pool: Tensor | None, floor: float, tree: Tensor, count: int
) -> Tensor:
    accept(tree)
    if backends.resolve("item_flows", log_reward.device, log_reward.dtype) == "torch":
        flows = item_flows_reference(log_reward, pool, floor, PrefixTree(tree))
        return flows[:, :count].clone()
    found: Tensor = torch.ops.gflowgr_cpp.item_flows(
        *backends.contiguous(log_reward, pool), floor, tree
    )
    return found


@_item_flows.register_fake
def _(log_reward: Tensor, pool: Tensor | None, floor: float, tree: Tensor, count: int) -> Tensor:
    return log_reward.new_empty(log_reward.shape[0], count)


@torch.library.custom_op("gflowgr::node_flows", mutates_args=())
def _node_flows(
    log_reward: Tensor,
    pool: Tensor | None,
    floor: float,
    root: Tensor,
    nodes: Tensor,
    tree: Tensor,
) -> Tensor:
    accept(tree)
    if backends.resolve("node_flows", log_reward.device, log_reward.dtype) == "torch":
        flows = item_flows_reference(log_reward, pool, floor, PrefixTree(tree))
        return flows.gather(1, nodes.clamp(min=0)).masked_fill(nodes < 0, -math.inf)
    found: Tensor = torch.ops.gflowgr_cpp.node_flows(
        *backends.contiguous(log_reward, pool), floor, *backends.contiguous(root, nodes), tree
    )
    return found


@_node_flows.register_fake
def _(
    log_reward: Tensor,
    pool: Tensor | None,
    floor: float,
    root: Tensor,
    nodes: Tensor,
    tree: Tensor,
) -> Tensor:
    return log_reward.new_empty(nodes.shape)


for _op in ("item_flows", "node_flows"):
    backends.register(_op, "torch", backends.probe_torch)
    backends.register(_op, "cpp", backends.probe_cpp)


@dataclass(frozen=True)
class FlowRewards:
    """What flows are summed from, as the ops take it.

    Attributes:
        log_reward: [B, num_items], or [B, M] beside `pool`; float32 or float64, nats.
        pool: [B, M] int64 ascending, the node where each candidate's identifier ends; or None.
        floor: log-reward of every item that is no candidate, nats.
        root: [B, 1 + children of the root] log F of the first nodes.
    """

    log_reward: Tensor
    pool: Tensor | None
    floor: float
    root: Tensor


class ItemFlows:
    """The flows of B prompts; made by :func:`item_flows`. Constants: no gradient passes.

    Attributes:
        tree: the prefix tree.
        log_z: [B] log partition function, nats: log of the sum of all rewards (-inf without any).
        rewards: what the flows below the root's children are summed from, when they are asked for;
            not to be written to.
    """

    def __init__(self, tree: PrefixTree, rewards: FlowRewards) -> None:
        self.tree = tree
        self.rewards = rewards
        self.log_z: Tensor = rewards.root[:, 0]

    def __len__(self) -> int:
        return self.log_z.shape[0]

    def __repr__(self) -> str:
        kind = "every item" if self.rewards.pool is None else "pools"
        return f"ItemFlows({len(self)} prompts, rewards of {kind}, {self.tree!r})"

    def log_flow(self, tokens: Any, mask: Tensor | None = None) -> Tensor:
        """log F of the prefix before each token, nats.

        Args:
            tokens: [B, N, L] integer token ids of N trajectories for each prompt.
            mask: [B, N, L] bool, a prefix of each row (true = real token); None = all true.

        Returns:
            [B, N, L]; -inf where the prefix leads nowhere in the tree or to rewards of 0 only, and
            exactly 0 under a false mask.

        Raises:
            TypeError: `tokens` are no integers, or `mask` no bools.
            ValueError: a wrong shape or device.
        """
        before, _ = self._nodes_around(tokens, mask)
        values = self.node_log_flow(before)
        return values if mask is None else values.masked_fill(~mask, 0.0)

    def log_policy(self, tokens: Any, mask: Tensor | None = None) -> Tensor:
        """log P*_F of each token, ``log F(s t) - log F(s)``, nats; arguments as :meth:`log_flow`.

        Returns:
            [B, N, L]; -inf where the tree has no such child or its rewards are 0, and exactly 0
            under a false mask. Where an identifier ends at s, the rest of the policy's mass is that
            of stopping there.
        """
        before, after = self._nodes_around(tokens, mask)
        flow, parent = self.node_log_flow(after), self.node_log_flow(before)
        values = torch.where(flow == -math.inf, -math.inf, flow - parent)
        return values if mask is None else values.masked_fill(~mask, 0.0)

    def node_log_flow(self, nodes: Tensor) -> Tensor:
        """log F of nodes of the tree, nats.

        Args:
            nodes: [B, ...] int64 node ids of each prompt; -1 = none.

        Returns:
            [B, ...]; -inf for -1, and where the rewards under a node are 0 only.

        Raises:
            TypeError: `nodes` are not int64.
            ValueError: a wrong shape.
        """
        if nodes.dtype != torch.int64:
            raise TypeError(f"nodes must be int64; got {nodes.dtype}")
        if nodes.dim() == 0 or len(nodes) != len(self):
            raise ValueError(
                f"nodes must have shape [B={len(self)}, ...], as the flows' prompts; "
                f"got shape {list(nodes.shape)}"
            )
        r = self.rewards
        flows: Tensor = torch.ops.gflowgr.node_flows(
            r.log_reward,
            r.pool,
            r.floor,
            r.root,
            nodes.reshape(len(self), math.prod(nodes.shape[1:])),
            self.tree.buffer,
        )
        return flows.reshape(nodes.shape)

    def _nodes_around(self, tokens: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The nodes before and after each token, [B, N, L]; -1 off the tree."""
        tokens = integer_tensor(tokens, "tokens", self.tree.device)
        if tokens.dim() != 3 or tokens.shape[0] != len(self):
            raise ValueError(
                f"tokens must have shape [B={len(self)}, N, L], as the flows' prompts; "
                f"got shape {list(tokens.shape)}"
            )
        after = self.tree.walk(tokens, mask=mask)
        return torch.cat([torch.zeros_like(after[..., :1]), after[..., :-1]], -1), after


def item_flows(
    tree: PrefixTree,
    log_reward: Tensor,
    *,
    items: Any = None,
    log_reward_floor: float | None = None,
) -> ItemFlows:
    """Exact flows of every prefix, from rewards of the whole catalogue or of a pool of candidates.

    Args:
        tree: prefix tree of the items' identifiers.
        log_reward: log-reward of each item, nats; -inf = no reward. Of every item, [B, num_items]
            (what items without an identifier have is not read), or with `items` [B, M] those of the
            candidates. On the tree's device; float16 and bfloat16 are computed in float32.
        items: [B, M] integer item ids of each prompt's candidates, each once; -1 = padding, under
            which `log_reward` may hold anything. None: `log_reward` is of every item.
        log_reward_floor: with `items`, the log-reward of every item that is no candidate, nats;
            None: those items have none.

    Returns:
        :class:`ItemFlows`, which keeps `log_reward` (no copy, where it is of float32 or float64 and
        of every item). Memory besides: one number per child of the root and prompt; of pools, 12 to
        16 bytes per candidate, whatever the size of the catalogue (and 4 bytes an item for the
        tree's map of items, once).

    Cost: log Z and the flows of the root's children are summed here, from each reward once; other
    flows when they are asked for, from the rewards of the items under the node. Of pools,
    O(M log M + M log(nodes)) per prompt.

    Raises:
        TypeError: `tree` is no PrefixTree, `log_reward` is no floating tensor, `items` no integers,
            `log_reward_floor` no number.
        ValueError: a wrong shape or device; a log-reward that is NaN or +inf; an item that is not
            in the tree's range or given twice for one prompt; a floor without `items`.

    Source: the definition of a flow (Bengio et al. 2023, arXiv 2111.09266) on the tree of
    identifiers of GFlowGR (arXiv 2506.16114), where it can be computed.
    """
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree must be a gflowgr.PrefixTree; got {type(tree).__name__}")
    if not isinstance(log_reward, Tensor) or not log_reward.is_floating_point():
        kind = log_reward.dtype if isinstance(log_reward, Tensor) else type(log_reward).__name__
        raise TypeError(f"log_reward must be a floating tensor; got {kind}")
    if log_reward.device != tree.device:
        raise ValueError(
            f"log_reward must be on {tree.device}, the device of tree; got {log_reward.device}"
        )
    reward = log_reward.detach()
    reward = reward if reward.dtype == torch.float64 else reward.to(torch.float32)
    if items is None:
        if log_reward_floor is not None:
            raise ValueError(f"log_reward_floor needs items; got {log_reward_floor} without them")
        if reward.dim() != 2 or reward.shape[1] != tree.num_items:
            raise ValueError(
                f"log_reward must have shape [B, items={tree.num_items}], as in tree; "
                f"got shape {list(reward.shape)}"
            )
        flows = _sum_rewards(tree, reward, None, -math.inf)
        # What is no reward makes log Z NaN: a look at B numbers instead of one at all of them.
        if bool(flows.log_z.isnan().any()):
            _check_rewards(reward, tree.leaf_map() >= 0)
        return flows
    pool = integer_tensor(items, "items", tree.device).to(torch.int64)
    if reward.dim() != 2 or pool.shape != reward.shape:
        raise ValueError(
            "items and log_reward must have one shape [B, M]; "
            f"got {list(pool.shape)} and {list(reward.shape)}"
        )
    if log_reward_floor is not None and not isinstance(log_reward_floor, Real):
        raise TypeError(
            f"log_reward_floor must be a number or None; got {type(log_reward_floor).__name__}"
        )
    floor = -math.inf if log_reward_floor is None else float(log_reward_floor)
    if math.isnan(floor) or floor == math.inf:
        raise ValueError(f"log_reward_floor must be a number below infinity; got {floor}")
    valid = pool >= 0
    _check_rewards(reward, valid)
    beyond = (pool < -1) | (pool >= tree.num_items)
    if bool(beyond.any()):
        row, column = beyond.nonzero()[0].tolist()
        raise ValueError(
            f"items must be 0..{tree.num_items - 1}, or -1 for padding; "
            f"got items[{row}, {column}] = {int(pool[row, column])}"
        )
    ordered = pool.sort(-1).values
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(again.any()):
        row, column = again.nonzero()[0].tolist()
        raise ValueError(
            f"items must hold each item once per prompt; got {int(ordered[row, column])} twice in "
            f"items[{row}]"
        )
    if pool.shape[1] == 0:  # no pointer to no candidates: the kernels would take it for no pool
        pool, valid = (x.new_full((len(pool), 1), fill) for x, fill in ((pool, -1), (valid, 0)))
        reward = reward.new_zeros(len(pool), 1)
    leaf = tree.leaf_map()[pool.clamp(min=0)].to(torch.int64).masked_fill(~valid, -1)
    ends = tree.leaf_nodes(leaf.clamp(min=0)).masked_fill(leaf < 0, NO_NODE)
    ends, order = ends.sort(-1)
    return _sum_rewards(tree, reward.gather(1, order), ends, floor)


def _sum_rewards(
    tree: PrefixTree, log_reward: Tensor, pool: Tensor | None, floor: float
) -> ItemFlows:
    count = tree.layout.node_begin[2]  # the root and its children
    root: Tensor = torch.ops.gflowgr.item_flows(log_reward, pool, floor, tree.buffer, count)
    return ItemFlows(tree, FlowRewards(log_reward, pool, floor, root))


def _check_rewards(reward: Tensor, valid: Tensor) -> None:
    wrong = (torch.isnan(reward) | (reward == math.inf)) & valid
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            "log_reward must be below infinity and no NaN; got "
            f"log_reward[{row}, {column}] = {float(reward[row, column])}"
        )
