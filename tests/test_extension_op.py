"""An op from outside the package, by the steps that CONTRIBUTING has for adding one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr import backends
from gflowgr.ops import checks

NAME = "half_square_of_the_tests"
ran: list[str] = []


def reference(x: Tensor) -> Tensor:
    """x^2 / 2 of each element of ``x`` [B]."""
    return x * x / 2


def half_square(x: Tensor) -> Tensor:
    """The front door: checks once, then the op."""
    checks.check_tensor("x", x, (None,), "B", dtypes=checks.FLOAT_DTYPES)
    result: Tensor = getattr(torch.ops.gflowgr, NAME)(x)
    return result


def kernel(x: Tensor) -> Tensor:
    """What C++ would compute, in float32."""
    return x.float().square().mul(0.5).to(x.dtype)


def implementation(x: Tensor) -> Tensor:
    name = backends.resolve(NAME, x.device, x.dtype)
    ran.append(name)
    return reference(x) if name == "torch" else kernel(x)


def fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def derivative(ctx: Any, grad: Tensor) -> Tensor:
    return grad * ctx.saved_tensors[0]


backends.define_op(
    NAME,
    implementation,
    fake,
    probes={
        "torch": backends.probe_torch,
        "cpp": backends.float32_only(backends.probe_torch),
        "cuda": backends.float32_only(backends.probe_cuda),
    },
    setup_context=keep,
    backward=derivative,
)


def numbers(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-2, 3, 7, dtype=dtype, requires_grad=True)


def test_a_defined_op_is_listed_with_the_backends_that_run_it() -> None:
    found = gflowgr.available_backends("cpu")[NAME]
    assert {name: why is None for name, why in found.items()} == {
        "torch": True,
        "cpp": True,
        "triton": False,
        "cuda": False,
    }
    assert found["triton"] == "the op has no such backend"
    assert found["cuda"] == "runs on CUDA tensors only"
    assert gflowgr.available_backends("cpu", torch.float64)[NAME]["cpp"] is not None


@pytest.mark.parametrize(
    ("forced", "dtype", "wanted"),
    [
        (None, torch.float32, "cpp"),
        (None, torch.float64, "torch"),
        ("torch", torch.float32, "torch"),
        ("cpp", torch.float32, "cpp"),
    ],
)
def test_the_fastest_backend_runs_unless_one_is_forced(
    forced: str | None, dtype: torch.dtype, wanted: str
) -> None:
    x = numbers(dtype)
    ran.clear()
    with gflowgr.backend(forced):
        found = half_square(x)
    assert ran == [wanted]
    torch.testing.assert_close(found, reference(x.detach().double()).to(dtype))


@pytest.mark.parametrize(
    ("forced", "dtype", "reason"),
    [
        ("cpp", torch.float64, "computes in float32"),
        ("triton", torch.float32, "the op has no such backend"),
        ("cuda", torch.float32, "runs on CUDA tensors only"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(
    forced: str, dtype: torch.dtype, reason: str
) -> None:
    x = numbers(dtype)
    with (
        gflowgr.backend(forced),
        pytest.raises(backends.BackendError, match=rf"{NAME} .* '{forced}': {reason}"),
    ):
        half_square(x)


def test_bad_input_does_not_reach_the_op() -> None:
    ran.clear()
    with pytest.raises(ValueError, match=r"x must have shape \[B\]; got shape \[2, 2\]"):
        half_square(torch.ones(2, 2))
    with pytest.raises(TypeError, match="x must have dtype"):
        half_square(torch.ones(2, dtype=torch.long))
    assert ran == []


def test_its_derivative_and_its_schema_are_right_and_it_compiles_whole() -> None:
    assert torch.autograd.gradcheck(half_square, numbers(torch.float64))
    torch.library.opcheck(getattr(torch.ops.gflowgr, NAME).default, (numbers(torch.float32),))
    x = numbers(torch.float32)
    compiled = torch.compile(half_square, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), half_square(x))
