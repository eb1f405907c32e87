"""Flow KL against a brute force over the items: values, gradients, padding, bad inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr.ops import fused_flow_kl
from gflowgr.ops.flow_kl import op
from gflowgr.ops.logprobs import children
from gflowgr.tree import PrefixTree

FIXED = [[0, 3, 6], [0, 3, 7], [0, 4, 6], [1, 3, 6], [2, 5, 8], [2, 5, 9]]
SHARED = [*FIXED, [0, 3, 7], [2, 5, 8], [2, 5, 8]]
RAGGED = [[0], [0, 3], [0, 3, 6], [0, 4], [1, 4], [2, 5, 7], [2, 5, 8], [1]]
CASES = {"fixed": FIXED, "shared": SHARED, "ragged": RAGGED}
NORMALIZERS = ("children", "vocab", "level")
VOCABULARY, WIDTH = 11, 5


@pytest.fixture(params=["torch", "cpp"])
def backend(request: pytest.FixtureRequest) -> Any:
    """Forces a backend; the name of it."""
    from gflowgr import backends

    if request.param == "cpp" and (reason := backends.cpp_missing()):
        pytest.skip(reason)
    with gflowgr.backend(request.param):
        yield request.param


class Case:
    """Four prompts with three trajectories, of them one all padding, poisoned with NaN."""

    def __init__(self, rows: list[list[int]], dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(5)
        self.rows, self.tree = rows, PrefixTree.from_identifiers(rows)
        chosen = torch.randint(len(rows), (4, 3), generator=g)
        self.paths = [[rows[i] for i in prompt] for prompt in chosen.tolist()]
        self.paths[2][1] = []
        length = max(map(len, rows))
        self.tokens = torch.full((4, 3, length), 10**9)
        self.mask = torch.zeros(4, 3, length, dtype=torch.bool)
        for b, prompt in enumerate(self.paths):
            for n, path in enumerate(prompt):
                self.tokens[b, n, : len(path)] = torch.tensor(path, dtype=torch.int64)
                self.mask[b, n, : len(path)] = True
        hidden = torch.randn(4, 3, length, WIDTH, generator=g, dtype=dtype)
        self.hidden = hidden.masked_fill(~self.mask[..., None], math.nan).requires_grad_()
        self.weight = torch.randn(VOCABULARY, WIDTH, generator=g, dtype=dtype).requires_grad_()
        self.bias = torch.randn(VOCABULARY, generator=g, dtype=dtype).requires_grad_()
        self.log_reward = 2 * torch.randn(4, len(rows), generator=g, dtype=dtype)
        self.log_reward[1, ::2] = -math.inf
        self.log_reward[3] = -math.inf  # no reward at all: no flow
        self.flows = gflowgr.item_flows(self.tree, self.log_reward)

    def run(self, flows: gflowgr.ItemFlows | None = None, **options: Any) -> Any:
        return fused_flow_kl(
            self.hidden,
            self.weight,
            self.tokens,
            self.flows if flows is None else flows,
            tree=self.tree,
            bias=self.bias,
            mask=self.mask,
            temperature=0.7,
            **options,
        )

    def expected(
        self, b: int, path: list[int], depth: int, normalize: str
    ) -> tuple[Tensor, Tensor]:
        """The divergence at a prefix and the log-probability of its next token, over all items."""
        prefix = path[:depth]
        reward: dict[int, Tensor] = {}
        for i, row in enumerate(self.rows):
            if len(row) > depth and row[:depth] == prefix:
                zero = torch.zeros((), dtype=torch.float64)
                reward[row[depth]] = reward.get(row[depth], zero) + self.log_reward[b, i].exp()
        n = self.paths[b].index(path)
        logits = (self.hidden[b, n, depth] @ self.weight.T + self.bias) / 0.7
        here = sorted({row[depth] for row in self.rows if len(row) > depth})
        among = {
            "children": sorted(reward),
            "vocab": list(range(VOCABULARY)),
            "level": list(range(here[0], here[-1] + 1)),
        }[normalize]
        log_p = logits - logits[among].logsumexp(-1)
        total = sum(reward.values(), torch.zeros(()))
        value = logits.sum() * 0
        if total > 0:
            for token, r in reward.items():
                if r > 0:
                    value = value + r / total * ((r / total).log() - log_p[token])
        return value, log_p[path[depth]]


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_a_brute_force_over_items(name: str, normalize: str) -> None:
    case = Case(CASES[name])
    wanted, nll = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for b, prompt in enumerate(case.paths):
        for n, path in enumerate(prompt):
            first = prompt.index(path)  # its states are other than those of a repeated path
            if first != n:
                case.hidden.data[b, n] = case.hidden.data[b, first]
            for depth in range(len(path)):
                value, log_pf = case.expected(b, path, depth, normalize)
                wanted[b, n] = wanted[b, n] + value
                nll[b] = nll[b] - (log_pf if n == 0 else 0.0)
    found = case.run(normalize=normalize, reduction="none", nll_weight=0.5)
    near = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.kl.sum(-1), wanted.detach(), **near)
    loss = wanted + 0.5 * torch.nn.functional.pad(nll[:, None], (0, 2))
    torch.testing.assert_close(found.loss, loss, **near)
    leaves = (case.hidden, case.weight, case.bias)
    slope = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((found.loss * slope).sum(), leaves)
    # The brute force reads the states of a repeated path from its first trajectory.
    expected = torch.autograd.grad((loss * slope).sum(), leaves)
    torch.testing.assert_close(got[1:], expected[1:], **near)
    torch.testing.assert_close(got[0].sum(1), expected[0].sum(1), **near)
    assert (got[0][~case.mask] == 0).all()


def test_gradients_are_the_derivative() -> None:
    case = Case(RAGGED)
    case.hidden = torch.where(case.mask[..., None], case.hidden.detach(), 0.0).requires_grad_()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        case.hidden, case.weight, case.bias = hidden, weight, bias
        return case.run(nll_weight=0.3).loss

    leaves = (case.hidden, case.weight, case.bias)
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_op_passes_opcheck(backend: str, pooled: bool) -> None:
    case = Case(RAGGED, torch.float32)
    rewards = case.flows.rewards
    if pooled:
        pool = torch.tensor([[0, 3, -1]] * 4)
        rewards = gflowgr.item_flows(case.tree, torch.zeros(4, 3), items=pool).rewards
    for weights in (None, torch.ones(4, 3)):
        arguments = (
            torch.where(case.mask[..., None], case.hidden.detach(), 0.0).requires_grad_(),
            case.weight,
            case.bias,
            case.tokens,
            case.mask,
            case.tree.buffer,
            0.7,
            12 * sum(case.tree.layout.max_children),
            weights,
            rewards.log_reward,
            rewards.pool,
            rewards.floor,
            rewards.root,
        )
        # Slopes are kept up to what the rows could need: what is behind them is not written.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.gflowgr.flow_kl.default, arguments, test_utils=tests)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_it_compiles_as_one_graph(normalize: str) -> None:
    case = Case(FIXED, torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        case.hidden, case.weight = hidden, weight
        return case.run(normalize=normalize, nll_weight=0.5).loss

    leaves = (case.hidden, case.weight)
    wanted = loss(*leaves)
    gradients = torch.autograd.grad(wanted, leaves)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), gradients)


def test_autocast_rounds_what_a_head_rounds(backend: str) -> None:
    case = Case(SHARED, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run(nll_weight=0.5)
    assert found.loss.dtype == torch.float32
    gradient = torch.autograd.grad(found.loss, case.weight)[0]
    rounded = Case(SHARED, torch.float64)
    for name in ("hidden", "weight", "bias"):
        value = getattr(case, name).detach().bfloat16().double()
        setattr(rounded, name, value.requires_grad_())
    rounded.flows = gflowgr.item_flows(rounded.tree, case.log_reward)
    with gflowgr.backend("torch"):
        wanted = rounded.run(nll_weight=0.5).loss
        slope = torch.autograd.grad(wanted, rounded.weight)[0]
    torch.testing.assert_close(found.loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-2, atol=1e-2)


def test_the_number_of_threads_changes_nothing() -> None:
    def results() -> list[Tensor]:
        case = Case(SHARED, torch.float32)
        found = case.run(nll_weight=0.5)
        return [*found, *torch.autograd.grad(found.loss, (case.hidden, case.weight, case.bias))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        three = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_float32_agrees_with_float64(backend: str, normalize: str) -> None:
    exact, case = Case(SHARED), Case(SHARED, torch.float32)
    for name in ("hidden", "weight", "bias", "log_reward"):
        value = getattr(exact, name).detach().float()
        for each in (exact, case):
            setattr(each, name, value.to(each.hidden.dtype).requires_grad_(name != "log_reward"))
    for each in (exact, case):
        each.flows = gflowgr.item_flows(each.tree, each.log_reward)
    with gflowgr.backend("torch"):
        wanted = exact.run(normalize=normalize, nll_weight=0.5)
        wanted.loss.backward()
    found = case.run(normalize=normalize, nll_weight=0.5)
    found.loss.backward()
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    for name in ("hidden", "weight", "bias"):
        got, want = getattr(case, name).grad.double(), getattr(exact, name).grad
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", ["children", "vocab"])
def test_slopes_beyond_the_limit_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, normalize: str
) -> None:
    def gradients() -> tuple[Tensor, ...]:
        case = Case(SHARED, torch.float32)
        loss = case.run(normalize=normalize, nll_weight=0.5).loss
        return torch.autograd.grad(loss, (case.hidden, case.weight, case.bias))

    def refuse(*arguments: Any) -> None:
        raise AssertionError("slopes were computed again")

    with monkeypatch.context() as patch:
        patch.setattr(op, "_backward_recomputed", refuse)
        wanted = gradients()
    monkeypatch.setattr(children, "SAVED_LIMIT", 0)
    for at_once in (0, 2**24):  # a prompt at a time, and all of them
        monkeypatch.setattr(op, "RECOMPUTED_AT_ONCE", at_once)
        torch.testing.assert_close(gradients(), wanted)


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_a_state_that_is_no_number_makes_the_loss_none(backend: str, normalize: str) -> None:
    """Neither a finite loss nor an infinite one, which a forbidden child has."""
    case = Case(CASES["ragged"], torch.float32)
    with torch.no_grad():
        case.hidden[0, 1, 0, 2] = math.nan
    found = case.run(normalize=normalize)
    assert found.loss.isnan()
    assert found.kl[0, 1, 0].isnan()
    assert found.log_pf[0, 1, 0].isnan()
    assert found.kl[1][case.mask[1]].isfinite().all()
    found.loss.backward()
    assert case.hidden.grad is not None
    assert case.hidden.grad[0, 1, 0].isnan().all()


def test_reductions_are_those_of_the_other_fused_losses() -> None:
    case = Case(FIXED)
    each = case.run(reduction="none").loss
    total = each.sum()
    torch.testing.assert_close(case.run(reduction="sum").loss, total)
    torch.testing.assert_close(case.run(reduction="mean").loss, total / 11)
    torch.testing.assert_close(case.run().loss, total / 4)
    nll = -case.run().log_pf[:, 0].sum()
    for reduction, over in (("sum", 1), ("mean", 4), ("prompt", 4)):
        difference = (
            case.run(reduction=reduction, nll_weight=2.0).loss - case.run(reduction=reduction).loss
        )
        torch.testing.assert_close(difference, 2 * nll / over)


def test_the_supervised_weight_is_of_the_computing_type() -> None:
    """Eight trajectories of three prompts: a ratio that float32 rounds."""
    case = Case(FIXED)
    case.mask[3] = False
    nll = -case.run().log_pf[:, 0].sum()
    found = case.run(reduction="mean", nll_weight=2.0).loss - case.run(reduction="mean").loss
    torch.testing.assert_close(found, 2 * nll / 3, rtol=1e-12, atol=1e-12)


def test_pools_are_targets_too(backend: str) -> None:
    case = Case(RAGGED, torch.float32)
    floor = -1.5
    pool = torch.tensor([[0, 3, -1], [1, 2, 5], [7, 6, 5], [4, -1, -1]])
    reward = torch.randn(4, 3)
    whole = torch.full((4, len(RAGGED)), floor)
    for b, i in (pool >= 0).nonzero().tolist():
        whole[b, pool[b, i]] = reward[b, i]
    flows = gflowgr.item_flows(case.tree, reward, items=pool, log_reward_floor=floor)
    wanted = case.run(gflowgr.item_flows(case.tree, whole))
    found = case.run(flows)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-5, atol=1e-5)


def test_the_loss_is_zero_where_the_policy_is_the_flows_own(backend: str) -> None:
    case = Case(FIXED, torch.float32)
    # One-hot states: the logits are the head's column of the prefix, set to the children's log F.
    tree, reward = case.tree, torch.randn(1, 6)
    flows = gflowgr.item_flows(tree, reward)
    tokens = torch.tensor(FIXED)[None]
    nodes = tree.walk(tokens)
    before = torch.cat([torch.zeros_like(nodes[..., :1]), nodes[..., :-1]], -1)
    hidden = torch.nn.functional.one_hot(before, tree.num_nodes).float().requires_grad_()
    weight = torch.zeros(10, tree.num_nodes)
    for node in range(tree.layout.num_inner):
        token, child = tree.children(node)
        weight[token, node] = flows.node_log_flow(child[None])[0]
    loss = gflowgr.fused_flow_kl_loss(hidden, weight, tokens, flows, tree=tree)
    loss.backward()
    assert loss.abs() < 1e-5
    assert hidden.grad.abs().max() < 1e-5
    log_pf = gflowgr.trajectory_logprobs(hidden, weight, tokens, tree=tree)
    balance = flows.log_flow(tokens)
    assert gflowgr.tb_loss(log_pf, reward, flows.log_z) < 1e-9
    assert gflowgr.db_loss(log_pf, reward, balance) < 1e-9
    assert gflowgr.subtb_loss(log_pf, reward, balance) < 1e-9
    head = (hidden, weight, tokens, reward)
    assert gflowgr.fused_tb_loss(*head, flows.log_z, tree=tree) < 1e-9
    assert gflowgr.fused_db_loss(*head, balance, tree=tree) < 1e-9
    assert gflowgr.fused_subtb_loss(*head, balance, tree=tree) < 1e-9


class TestRefusals:
    case = Case(FIXED)

    def refuse(self, error: type[Exception], match: str, **changed: Any) -> None:
        arguments: dict[str, Any] = {
            "hidden": self.case.hidden,
            "weight": self.case.weight,
            "tokens": self.case.tokens,
            "flows": self.case.flows,
            "tree": self.case.tree,
            "mask": self.case.mask,
        }
        with pytest.raises(error, match=match):
            gflowgr.fused_flow_kl_loss(**(arguments | changed))

    def test_flows_are_the_prompts_own(self) -> None:
        self.refuse(TypeError, r"flows must be gflowgr\.ItemFlows; got Tensor", flows=torch.ones(4))
        short = gflowgr.item_flows(self.case.tree, torch.zeros(3, 6))
        self.refuse(ValueError, "flows must be of the B=4 prompts of hidden; got", flows=short)
        other = gflowgr.item_flows(PrefixTree.from_identifiers(FIXED), torch.zeros(4, 6))
        self.refuse(ValueError, "flows must be of the tree that is given", flows=other)

    def test_options_are_named(self) -> None:
        self.refuse(ValueError, "tree must be the flows' prefix tree; got None", tree=None)
        self.refuse(ValueError, "normalize must be one of", normalize="all")
        self.refuse(ValueError, "reduction must be one of", reduction="max")
        self.refuse(ValueError, "nll_weight must be at least 0", nll_weight=-1.0)

    def test_values_are_looked_at(self) -> None:
        tokens = self.case.tokens.clone()
        tokens[0, 0, 2] = 5
        self.refuse(ValueError, r"tokens\[0, 0", tokens=tokens)
        first = self.case.tokens[0, 0, 0]
        bias = torch.zeros(VOCABULARY).index_fill(0, first, -math.inf)
        self.refuse(ValueError, "is forbidden, bias", bias=bias)
