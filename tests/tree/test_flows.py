"""Exact flows: every sum over a subtree against brute force over the items."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gflowgr
from gflowgr.tree import PrefixTree

FIXED = [[0, 3, 6], [0, 3, 7], [0, 4, 6], [1, 3, 6], [2, 5, 8], [2, 5, 9]]
SHARED = [*FIXED, [0, 3, 7], [2, 5, 8], [2, 5, 8]]
RAGGED = [[0], [0, 3], [0, 3, 6], [1, 4], [2, 5, 7], [2, 5, 8], [1]]


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest):
    from gflowgr import backends

    if request.param == "cpp" and (reason := backends.cpp_missing()):
        pytest.skip(reason)
    with gflowgr.backend(request.param):
        yield request.param


def brute_force(rows: list[list[int]], log_reward: Tensor, prefix: list[int]) -> Tensor:
    """log of the sum of the rewards of the items that start with a prefix, float64 [B]."""
    inside = [i for i, row in enumerate(rows) if row[: len(prefix)] == prefix]
    return log_reward.double()[:, inside].logsumexp(-1)


def trajectories(rows: list[list[int]], prompts: int) -> tuple[Tensor, Tensor]:
    """Every identifier as a trajectory of every prompt: tokens and mask [B, items, L]."""
    length = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[j < len(row) for j in range(length)] for row in rows])
    return tokens.expand(prompts, -1, -1), mask.expand(prompts, -1, -1)


def check(rows: list[list[int]], log_reward: Tensor, flows: gflowgr.ItemFlows, tol: float) -> None:
    """log_z, log_flow and log_policy of all trajectories; `log_reward` is of every item."""
    tokens, mask = trajectories(rows, len(log_reward))
    log_flow, policy = flows.log_flow(tokens, mask), flows.log_policy(tokens, mask)
    near = {"rtol": tol, "atol": tol}
    torch.testing.assert_close(flows.log_z.double(), log_reward.double().logsumexp(-1), **near)
    for n, row in enumerate(rows):
        for j in range(tokens.shape[-1]):
            if j >= len(row):
                assert (log_flow[:, n, j] == 0).all()
                assert (policy[:, n, j] == 0).all()
                continue
            here = brute_force(rows, log_reward, row[:j])
            after = brute_force(rows, log_reward, row[: j + 1])
            torch.testing.assert_close(log_flow[:, n, j].double(), here, **near)
            wanted = torch.where(after == -math.inf, -math.inf, after - here)
            torch.testing.assert_close(policy[:, n, j].double(), wanted, **near)


@pytest.mark.parametrize("rows", [FIXED, SHARED, RAGGED], ids=["fixed", "shared", "ragged"])
@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_flows_are_the_sums_over_subtrees(backend, rows, dtype, tol):
    reward = (3 * torch.randn(19, len(rows), dtype=torch.float64)).to(dtype)
    flows = gflowgr.item_flows(PrefixTree.from_identifiers(rows), reward)
    check(rows, reward, flows, tol)


@pytest.mark.parametrize("rows", [FIXED, SHARED, RAGGED], ids=["fixed", "shared", "ragged"])
@pytest.mark.parametrize("floor", [None, -2.5])
def test_pools_are_the_catalogue_with_everything_else_at_the_floor(backend, rows, floor):
    generator = torch.Generator().manual_seed(1)
    pool = torch.stack([torch.randperm(len(rows), generator=generator)[:4] for _ in range(7)])
    pool[::2, -1] = -1
    reward = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    reward[::2, -1] = math.nan  # padding may hold anything
    flows = gflowgr.item_flows(
        PrefixTree.from_identifiers(rows), reward, items=pool, log_reward_floor=floor
    )
    whole = torch.full((7, len(rows)), -math.inf if floor is None else floor, dtype=torch.float64)
    for b, i in (pool >= 0).nonzero().tolist():
        whole[b, pool[b, i]] = reward[b, i]
    check(rows, whole, flows, 1e-12)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_tree_any_pool(data):
    length = data.draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 3), min_size=1, max_size=length)
    rows = data.draw(st.lists(row, min_size=1, max_size=30))
    reward = 4 * torch.randn(data.draw(st.integers(1, 18)), len(rows), dtype=torch.float64)
    reward[torch.rand(reward.shape) < 0.2] = -math.inf
    tree = PrefixTree.from_identifiers(rows)
    for name in ("torch", "cpp"):
        if name == "cpp" and gflowgr.available_backends("cpu")["item_flows"]["cpp"] is not None:
            continue
        with gflowgr.backend(name):
            check(rows, reward, gflowgr.item_flows(tree, reward), 1e-12)
            pool = torch.arange(len(rows)).flip(0).expand_as(reward)
            check(rows, reward, gflowgr.item_flows(tree, reward.flip(1), items=pool), 1e-12)


def test_no_reward_at_all_leaves_no_flow(backend):
    flows = gflowgr.item_flows(PrefixTree.from_identifiers(FIXED), torch.full((2, 6), -math.inf))
    tokens, mask = trajectories(FIXED, 2)
    assert (flows.log_z == -math.inf).all()
    assert (flows.log_flow(tokens, mask) == -math.inf).all()
    assert (flows.log_policy(tokens, mask) == -math.inf).all()


def test_no_prompts_and_no_candidates_are_no_special_case(backend):
    tree = PrefixTree.from_identifiers(FIXED)
    flows = gflowgr.item_flows(tree, torch.zeros(0, 6))
    assert flows.log_flow(torch.zeros(0, 2, 3, dtype=torch.int64)).shape == (0, 2, 3)
    nobody = torch.zeros(2, 0, dtype=torch.int64)
    flows = gflowgr.item_flows(tree, torch.zeros(2, 0), items=nobody, log_reward_floor=-1.0)
    check(FIXED, torch.full((2, 6), -1.0), flows, 1e-6)
    assert (gflowgr.item_flows(tree, torch.zeros(2, 0), items=nobody).log_z == -math.inf).all()


def test_rewards_thousands_of_nats_apart_neither_overflow_nor_vanish(backend):
    reward = torch.tensor([[-9000.0, -9001.0, 8000.0, -50.0, 0.0, -4000.0]], dtype=torch.float64)
    # The largest is once under the root's first child, and once under another one.
    reward = torch.cat([reward, reward.flip(1)])
    flows = gflowgr.item_flows(PrefixTree.from_identifiers(FIXED), reward)
    check(FIXED, reward, flows, 1e-12)


def test_the_ops_pass_opcheck(backend):
    tree = PrefixTree.from_identifiers(RAGGED)
    reward, pool = torch.randn(3, 7), torch.tensor([[0, 3, -1]] * 3)
    tests = ("test_schema", "test_faketensor")
    ends = tree.leaf_nodes(tree.leaf_of(pool).clamp(min=0)).sort(-1).values
    for rewards, nodes in ((reward, None), (reward[:, :3], ends)):
        first = (rewards, nodes, -1.0, tree.buffer, tree.layout.node_begin[2])
        op = torch.ops.gflowgr.item_flows.default
        torch.library.opcheck(op, first, test_utils=tests)
        asked = torch.tensor([[0, -1, tree.num_nodes - 1]] * 3)
        below = (rewards, nodes, -1.0, op(*first), asked, tree.buffer)
        torch.library.opcheck(torch.ops.gflowgr.node_flows.default, below, test_utils=tests)


def test_a_prefix_outside_the_tree_has_no_flow(backend):
    flows = gflowgr.item_flows(PrefixTree.from_identifiers(FIXED), torch.zeros(1, 6))
    tokens = torch.tensor([[[0, 9, 6]]])
    six, three = math.log(6), math.log(3)
    expected = torch.tensor([[[six, three, -math.inf]]])
    torch.testing.assert_close(flows.log_flow(tokens), expected)
    expected = torch.tensor([[[three - six, -math.inf, -math.inf]]])
    torch.testing.assert_close(flows.log_policy(tokens), expected)


def test_trajectory_balance_vanishes_where_the_policy_is_the_flows_own(backend):
    reward = torch.randn(3, len(SHARED), dtype=torch.float64)
    flows = gflowgr.item_flows(PrefixTree.from_identifiers(SHARED), reward)
    tokens, mask = trajectories(SHARED[:6], 3)
    log_pf = flows.log_policy(tokens, mask)
    of_leaf = torch.stack([brute_force(SHARED, reward, row) for row in SHARED[:6]], 1)
    log_flow = flows.log_flow(tokens, mask)
    assert gflowgr.tb_loss(log_pf, of_leaf, flows.log_z, mask=mask) < 1e-24
    assert gflowgr.db_loss(log_pf, of_leaf, log_flow, mask=mask) < 1e-24
    assert gflowgr.subtb_loss(log_pf, of_leaf, log_flow, mask=mask) < 1e-24


class TestRefusals:
    tree = PrefixTree.from_identifiers(FIXED)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_rewards_that_are_no_rewards(self, bad):
        reward = torch.zeros(2, 6)
        reward[1, 4] = bad
        with pytest.raises(ValueError, match=r"log_reward\[1, 4\] = (nan|inf)"):
            gflowgr.item_flows(self.tree, reward)

    def test_an_item_twice_in_a_pool(self):
        with pytest.raises(ValueError, match=r"got 3 twice in items\[1\]"):
            gflowgr.item_flows(
                self.tree, torch.zeros(2, 3), items=torch.tensor([[0, 1, -1], [3, 0, 3]])
            )

    @pytest.mark.parametrize("item", [6, -2])
    def test_an_item_that_is_not_there(self, item):
        with pytest.raises(ValueError, match=rf"items must be 0\.\.5.*items\[0, 0\] = {item}"):
            gflowgr.item_flows(self.tree, torch.zeros(1, 1), items=torch.tensor([[item]]))

    def test_shapes_types_and_options_are_named(self):
        zeros = torch.zeros(2, 6)
        with pytest.raises(ValueError, match=r"log_reward must have shape \[B, items=6\]"):
            gflowgr.item_flows(self.tree, zeros[:, :5])
        with pytest.raises(TypeError, match="log_reward must be a floating tensor"):
            gflowgr.item_flows(self.tree, zeros.long())
        with pytest.raises(ValueError, match="log_reward_floor needs items"):
            gflowgr.item_flows(self.tree, zeros, log_reward_floor=-1.0)
        pool = torch.arange(6).expand(2, 6)
        for floor in ("low", zeros):
            with pytest.raises(TypeError, match="log_reward_floor must be a number or None; got"):
                gflowgr.item_flows(self.tree, zeros, items=pool, log_reward_floor=floor)
        flows = gflowgr.item_flows(self.tree, zeros)
        with pytest.raises(TypeError, match=r"nodes must be int64; got torch\.int32"):
            flows.node_log_flow(torch.zeros(2, 1, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"nodes must have shape \[B=2, \.\.\.\]"):
            flows.node_log_flow(torch.zeros(3, 1, dtype=torch.int64))
        with pytest.raises(TypeError, match="mask must be bool; got list"):
            flows.log_flow(torch.zeros(2, 1, 3, dtype=torch.int64), [[[True] * 3]] * 2)
        with pytest.raises(ValueError, match="items and log_reward must have one shape"):
            gflowgr.item_flows(self.tree, zeros, items=torch.zeros(2, 5, dtype=torch.long))
        with pytest.raises(TypeError, match=r"tree must be a gflowgr\.PrefixTree"):
            gflowgr.item_flows(None, zeros)
        with pytest.raises(ValueError, match=r"tokens must have shape \[B=2, N, L\]"):
            gflowgr.item_flows(self.tree, zeros).log_flow(torch.zeros(3, 1, 3, dtype=torch.long))
