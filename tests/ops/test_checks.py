"""Errors of bad arguments: their type and their text."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr import ops
from gflowgr.tree import PrefixTree

B, N, L, D, V = 2, 3, 4, 5, 20

ZERO_MASK = torch.zeros(B, N, L, dtype=torch.bool)
HOLED = torch.tensor([True, False, True, False]).repeat(B, N, 1)


def at(x: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    """A copy of x with one element replaced."""
    x = x.clone()
    x[index] = value
    return x


def loss_arguments() -> dict[str, Any]:
    return {
        "log_pf": -torch.ones(B, N, L),
        "log_reward": torch.zeros(B, N),
        "log_z": torch.zeros(B),
        "log_flow": torch.zeros(B, N, L),
        "mask": torch.ones(B, N, L, dtype=torch.bool),
    }


def head_arguments() -> dict[str, Any]:
    return {
        "hidden": torch.zeros(B, N, L, D),
        "weight": torch.zeros(V, D),
        "tokens": torch.tensor([1, 5, 9, 13]).repeat(B, N, 1),
        "tree": PrefixTree.from_identifiers([[1, 5, 9, 13], [1, 6, 9, 13]]),
        "bias": torch.zeros(V),
        "mask": torch.ones(B, N, L, dtype=torch.bool),
    }


class TreeElsewhere(PrefixTree):
    """A tree that says it is on another device."""

    device = torch.device("meta")


TAKES: dict[str, list[str]] = {
    "tb": ["log_z"],
    "db": ["log_flow"],
    "subtb": ["log_flow"],
    "vargrad": [],
}


def call_loss(kind: str, **changes: Any) -> Tensor:
    """A loss on sound arguments, except for the changes."""
    arguments = loss_arguments()
    names = ["log_pf", "log_reward", "mask", *TAKES[kind]]
    loss: Tensor = getattr(ops, f"{kind}_loss")(**{n: arguments[n] for n in names} | changes)
    return loss


def call_fused(kind: str, **changes: Any) -> Tensor:
    """A fused loss on sound arguments, except for the changes."""
    arguments = head_arguments() | {n: loss_arguments()[n] for n in ["log_reward", *TAKES[kind]]}
    loss: Tensor = getattr(ops, f"fused_{kind}_loss")(**arguments | changes)
    return loss


SHARED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"log_reward": [0.0]}, TypeError, "log_reward must be a torch.Tensor; got list"),
    (
        {"log_reward": torch.zeros(B, N, dtype=torch.long)},
        TypeError,
        "log_reward must have dtype float32, float64, bfloat16, float16; got int64",
    ),
    (
        {"log_reward": torch.zeros(B, L)},
        ValueError,
        "log_reward must have shape [B=2, N=3], as in {first}; got shape [2, 4]",
    ),
    (
        {"log_reward": torch.zeros(B, N, device="meta")},
        ValueError,
        "log_reward must be on cpu, the device of {first}; it is on meta",
    ),
    (
        {"log_reward": at(torch.zeros(B, N), (1, 2), math.nan)},
        ValueError,
        "log_reward[1, 2] must be finite; got nan (give log_reward_floor to floor the log-reward "
        "of non-positive rewards)",
    ),
    (
        {"log_reward": at(torch.zeros(B, N), (0, 1), -math.inf)},
        ValueError,
        "log_reward[0, 1] must be finite; got -inf",
    ),
    (
        {"log_reward": at(torch.zeros(B, N), (0, 1), math.inf)},
        ValueError,
        "log_reward[0, 1] must be finite; got inf",
    ),
    (
        {"log_reward": at(torch.zeros(B, N), (0, 1), math.inf), "log_reward_floor": -5.0},
        ValueError,
        "log_reward[0, 1] must be finite; got inf (log_reward_floor stands in for -inf and NaN "
        "only)",
    ),
    ({"mask": torch.ones(B, N, L)}, TypeError, "mask must have dtype bool; got float32"),
    (
        {"mask": torch.ones(B, N, dtype=torch.bool)},
        ValueError,
        "mask must have shape [B=2, N=3, L=4], as in {first}; got shape [2, 3]",
    ),
    (
        {"mask": HOLED},
        ValueError,
        "mask[0, 0] must be a prefix of its row (true, then false): position 2 is true after a "
        "false one",
    ),
    ({"beta": 0.0}, ValueError, "beta must be greater than 0; got 0"),
    ({"beta": math.nan}, ValueError, "beta must be finite; got nan"),
    ({"beta": "1"}, TypeError, "beta must be a real number; got str"),
    ({"beta": torch.ones(())}, TypeError, "beta must be a real number; got Tensor"),
    ({"log_reward_floor": -math.inf}, ValueError, "log_reward_floor must be finite; got -inf"),
    ({"log_reward_floor": True}, TypeError, "log_reward_floor must be a real number; got bool"),
    (
        {"reduction": "batch"},
        ValueError,
        "reduction must be one of 'none', 'sum', 'mean', 'prompt'; got 'batch'",
    ),
]

TARGETS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "tb",
        {"log_z": torch.zeros(B, N)},
        ValueError,
        "log_z must have shape [B=2], as in {first}; got shape [2, 3]",
    ),
    ("tb", {"log_z": 0.0}, TypeError, "log_z must be a torch.Tensor; got float"),
    (
        "tb",
        {"log_z": torch.zeros(B, dtype=torch.long)},
        TypeError,
        "log_z must have dtype float32, float64, bfloat16, float16; got int64",
    ),
    (
        "db",
        {"log_flow": torch.zeros(B, N, L + 1)},
        ValueError,
        "log_flow must have shape [B=2, N=3, L=4], as in {first}; got shape [2, 3, 5]",
    ),
    (
        "subtb",
        {"log_flow": torch.zeros(B, N, L, device="meta")},
        ValueError,
        "log_flow must be on cpu, the device of {first}; it is on meta",
    ),
    ("subtb", {"lam": 0.0}, ValueError, "lam must be greater than 0; got 0"),
    ("subtb", {"lam": None}, TypeError, "lam must be a real number; got NoneType"),
]

HEAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": None}, TypeError, "hidden must be a torch.Tensor; got NoneType"),
    (
        {"hidden": torch.zeros(B, L, D)},
        ValueError,
        "hidden must have shape [B, N, L, d]; got shape [2, 4, 5]",
    ),
    (
        {"weight": torch.zeros(D, V)},
        ValueError,
        "weight must have shape [V, d=5], as in hidden; got shape [5, 20]",
    ),
    (
        {"weight": torch.zeros(V, D, device="meta")},
        ValueError,
        "weight must be on cpu, the device of hidden; it is on meta",
    ),
    (
        {"weight": torch.zeros(0, D), "bias": None},
        ValueError,
        "weight must have at least one row; got shape [0, 5]",
    ),
    (
        {"tokens": torch.zeros(B, N, L)},
        TypeError,
        "tokens must have dtype int64, int32, int16, int8, uint8; got float32",
    ),
    (
        {"tokens": torch.zeros(B, N, L - 1, dtype=torch.long)},
        ValueError,
        "tokens must have shape [B=2, N=3, L=4], as in hidden; got shape [2, 3, 3]",
    ),
    (
        {"tokens": at(head_arguments()["tokens"], (1, 0, 2), V)},
        ValueError,
        "tokens[1, 0, 2] = 20 is outside the vocabulary: weight has 20 rows, so tokens must be "
        "0..19",
    ),
    (
        {"tokens": at(head_arguments()["tokens"], (0, 0, 3), -1), "tree": None},
        ValueError,
        "tokens[0, 0, 3] = -1 is outside the vocabulary",
    ),
    (
        {"tokens": at(head_arguments()["tokens"], (1, 2, 1), 7)},
        ValueError,
        "tokens[1, 2] = (1, 7, 9, 13) is not an identifier of the tree: no child 7 under (1,)",
    ),
    (
        {"tokens": at(head_arguments()["tokens"], (1, 2, 1), 7), "normalize": "vocab"},
        ValueError,
        "tokens[1, 2] = (1, 7, 9, 13) is not an identifier of the tree",
    ),
    (
        {"bias": torch.zeros(D)},
        ValueError,
        "bias must have shape [V=20], as in weight; got shape [5]",
    ),
    (
        {"weight": torch.zeros(13, D), "bias": None},
        ValueError,
        "weight has 13 rows, but the tree holds tokens up to 13: the head must cover every token "
        "of the tree",
    ),
    ({"tree": {}}, TypeError, "tree must be a gflowgr.PrefixTree; got dict"),
    (
        {"tree": TreeElsewhere(head_arguments()["tree"].buffer)},
        ValueError,
        "tree must be on cpu, the device of hidden; it is on meta: move it with tree.to(device)",
    ),
    (
        {"tree": None, "normalize": "children"},
        ValueError,
        'normalize="children" needs a tree; got tree=None',
    ),
    (
        {"normalize": "leaves"},
        ValueError,
        "normalize must be one of 'vocab', 'level', 'children'; got 'leaves'",
    ),
    ({"temperature": 0}, ValueError, "temperature must be greater than 0; got 0"),
    ({"temperature": "hot"}, TypeError, "temperature must be a real number; got str"),
    ({"mask": HOLED}, ValueError, "mask[0, 0] must be a prefix of its row"),
]

CLIPS: list[tuple[Any, type[Exception], str]] = [
    (0.0, ValueError, "residual_clip must be greater than 0; got 0"),
    (math.inf, ValueError, "residual_clip must be finite; got inf"),
    ("3", TypeError, "residual_clip must be a real number; got str"),
]

FUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"nll_weight": -1.0}, ValueError, "nll_weight must be at least 0; got -1"),
    ({"nll_weight": None}, TypeError, "nll_weight must be a real number; got NoneType"),
    (
        {"bias": at(torch.zeros(V), (9,), -math.inf)},
        ValueError,
        "tokens[0, 0, 2] = 9 is forbidden, bias[9] = -inf: its log-probability is -inf, no loss is "
        "finite",
    ),
]


def label(value: Any) -> str | None:
    """Test names: the argument that is wrong."""
    return "+".join(value) if isinstance(value, dict) else None


@pytest.mark.parametrize("kind", TAKES)
@pytest.mark.parametrize(("changes", "error", "message"), SHARED, ids=label)
def test_arguments_of_every_loss(
    kind: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call, first in ((call_loss, "log_pf"), (call_fused, "hidden")):
        with pytest.raises(error) as caught:
            call(kind, **changes)
        assert str(caught.value).startswith(message.format(first=first))


@pytest.mark.parametrize(("kind", "changes", "error", "message"), TARGETS, ids=label)
def test_log_z_log_flow_and_lambda(
    kind: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for call, first in ((call_loss, "log_pf"), (call_fused, "hidden")):
        with pytest.raises(error) as caught:
            call(kind, **changes)
        assert str(caught.value) == message.format(first=first)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(B, N), ValueError, "log_pf must have shape [B, N, L]; got shape [2, 3]"),
        (
            torch.zeros(B, N, L, dtype=torch.int32),
            TypeError,
            "log_pf must have dtype float32, float64, bfloat16, float16; got int32",
        ),
    ],
)
def test_log_pf(value: Tensor, error: type[Exception], message: str) -> None:
    for kind in TAKES:
        with pytest.raises(error) as caught:
            call_loss(kind, log_pf=value)
        assert str(caught.value) == message
    with pytest.raises(error, match="log_pf must have"):
        ops.vargrad_log_z(value, torch.zeros(B, N))


@pytest.mark.parametrize(("changes", "error", "message"), HEAD, ids=label)
def test_head_inputs(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        ops.trajectory_logprobs(**head_arguments() | changes)
    assert str(caught.value).startswith(message)
    for kind in TAKES:
        with pytest.raises(error) as caught:
            call_fused(kind, **changes)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("changes", "error", "message"), FUSED, ids=label)
def test_arguments_of_the_fused_losses_only(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for kind in TAKES:
        with pytest.raises(error) as caught:
            call_fused(kind, **changes)
        assert str(caught.value) == message


@pytest.mark.parametrize(("value", "error", "message"), CLIPS)
def test_the_clip_of_a_residual(value: Any, error: type[Exception], message: str) -> None:
    for kind in ("tb", "db", "vargrad"):
        for call in (call_loss, call_fused):
            with pytest.raises(error) as caught:
                call(kind, residual_clip=value)
            assert str(caught.value) == message


def test_sound_arguments_pass() -> None:
    """The cases above fail for the change alone."""
    assert ops.trajectory_logprobs(**head_arguments()).shape == (B, N, L)
    for kind in TAKES:
        assert call_loss(kind).isfinite()
        assert call_fused(kind).isfinite()


def test_an_error_names_the_first_bad_value() -> None:
    reward = at(at(torch.zeros(B, N), (0, 2), math.nan), (1, 0), math.inf)
    with pytest.raises(ValueError, match=r"log_reward\[0, 2\] must be finite; got nan"):
        call_loss("tb", log_reward=reward)


def test_padding_may_hold_what_would_be_an_error() -> None:
    bad = {"log_reward": torch.full((B, N), math.nan), "mask": ZERO_MASK}
    for kind in TAKES:
        assert call_loss(kind, **bad) == 0
        assert call_fused(kind, **bad, tokens=torch.full((B, N, L), -5)) == 0


def test_rewards_whose_sum_overflows_are_looked_at_one_by_one() -> None:
    huge = torch.full((1, 3), 3e38)
    log_pf = torch.zeros(1, 3, 2)
    with gflowgr.backend("torch"):
        assert gflowgr.tb_loss(log_pf, huge, torch.zeros(1)).isinf()
        with pytest.raises(ValueError, match=r"log_reward\[0, 1\]"):
            gflowgr.tb_loss(log_pf, huge.index_fill(1, torch.tensor(1), torch.inf), torch.zeros(1))
