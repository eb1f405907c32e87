"""Any layout of any argument: of a view an op gives what it gives of a copy, gradients too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gflowgr import ops

from .public_ops import DIFFERENTIABLE, OPS, arguments, read_by


def transposed(x: Tensor) -> Tensor:
    """The same values with the dimensions in memory in reverse order."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def sliced(x: Tensor) -> Tensor:
    """The same values as every second entry of a tensor twice as long."""
    room = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1]))
    room[..., ::2] = x
    return room[..., ::2]


def part_of_a_larger_one(x: Tensor) -> Tensor:
    """The same values as the middle of a tensor that is larger in every dimension."""
    room = x.new_zeros([size + 2 for size in x.shape])
    view = room[tuple(slice(1, -1) for _ in x.shape)]
    view.copy_(x)
    return view


def repeated(x: Tensor) -> Tensor:
    """The first prompt's values for all, with stride 0."""
    return x[:1].expand(x.shape)


def flipped_sign(x: Tensor) -> Tensor:
    """The same values as a view that PyTorch negates when it is read."""
    return torch._neg_view(-x) if x.is_floating_point() else x


CONTIGUOUS = torch.contiguous_format

VIEWS: list[Callable[[Tensor], Tensor]] = [
    transposed,
    part_of_a_larger_one,
    repeated,
    flipped_sign,
]


def run(name: str, given: dict[str, Tensor]) -> list[Tensor]:
    """The result, and the gradients of what it reads."""
    leaves = {key: x.requires_grad_() for key, x in given.items() if key in DIFFERENTIABLE}
    result = OPS[name](given)
    wanted = [leaves[key] for key in read_by(name) if key in leaves]
    gradients = torch.autograd.grad(result.sum(), wanted)
    return [result.detach(), *gradients]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("name", OPS)
def test_views_of_all_arguments_count_as_copies(
    name: str, view: Callable[[Tensor], Tensor]
) -> None:
    copies = {key: view(x).clone(memory_format=CONTIGUOUS) for key, x in arguments().items()}
    expected = run(name, copies)
    for found, value in zip(
        run(name, {k: view(x) for k, x in arguments().items()}), expected, strict=True
    ):
        torch.testing.assert_close(found, value)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("name", [name for name in OPS if "tokens" in read_by(name)])
def test_tokens_may_be_integers_of_any_size(name: str, dtype: torch.dtype) -> None:
    given = arguments()
    expected = run(name, given)
    found = run(name, {**arguments(), "tokens": transposed(given["tokens"].to(dtype))})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", [transposed, sliced, part_of_a_larger_one])
def test_a_part_of_a_batch_of_one_token_each(layout: Callable[[Tensor], Tensor]) -> None:
    """Whose rows flattened are still a view."""
    given = arguments()
    first: dict[str, Any] = {key: layout(given[key])[:, :, :1] for key in ("tokens", "mask")}
    for name, inputs in (("trajectory_logprobs", ("hidden", "weight")), ("logits", ("logits",))):
        function = ops.trajectory_logprobs if name != "logits" else ops.logprobs_from_logits
        leaves = [given[key].requires_grad_() for key in inputs]
        head = [x[:, :, :1] if x.dim() == 4 else x for x in leaves]
        found = function(*head, first["tokens"], mask=first["mask"])
        expected = function(*head, given["tokens"][:, :, :1], mask=given["mask"][:, :, :1])
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found.sum(), leaves),
            torch.autograd.grad(expected.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["log_pf", "log_reward", "log_z", "mask"])
def test_a_sparse_tensor_is_refused_by_name(name: str) -> None:
    given = arguments()
    given[name] = given[name].to_sparse()
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor; got layout sparse_coo"):
        OPS["tb"](given)
