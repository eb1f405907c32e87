"""Cases of the flow losses, and what they give in float64.

``LossCase`` has the inputs of the public functions in float64; ``FlowCase`` is for the raw ops of
one backend.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.ops.flow_loss.reference import FlowOptions, loss_reference

from ..cases import prefix_mask

KINDS = ("tb", "db", "subtb", "vargrad")
REDUCTIONS = ("prompt", "mean", "sum", "none")


@dataclass
class LossCase:
    """Inputs of the losses on log-probabilities, in float64."""

    log_pf: Tensor
    log_reward: Tensor
    log_z: Tensor
    log_flow: Tensor
    mask: Tensor

    def target(self, kind: str) -> tuple[Tensor, ...]:
        """What the loss balances against."""
        if kind == "vargrad":
            return ()
        return (self.log_z,) if kind == "tb" else (self.log_flow,)


def make_loss_case(
    prompts: int, branches: int, steps: int, seed: int, *, padding: bool = True
) -> LossCase:
    """Random log-probabilities, rewards and flows; with `padding`, lengths from 0 to L."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    low = 0 if padding else max(steps, 0)
    lengths = torch.randint(low, steps + 1, (prompts, branches), generator=g)
    return LossCase(
        log_pf=-normal(prompts, branches, steps, scale=2.0).abs(),
        log_reward=normal(prompts, branches, scale=3.0),
        log_z=normal(prompts, scale=3.0),
        log_flow=normal(prompts, branches, steps, scale=3.0),
        mask=prefix_mask(lengths, steps),
    )


loss_cases = st.builds(
    make_loss_case,
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(1, 5),
    st.integers(0, 2**20),
)


# ------------------------------------------------------------------ the raw ops of a backend


@dataclass(frozen=True)
class FlowCase:
    """Arguments of ``flow_loss`` on the CPU; poisoned where the mask is false."""

    log_pf: Tensor  # [B, N, L]
    log_reward: Tensor  # [B, N]
    target: Tensor | None
    mask: Tensor | None
    kind: str
    lam: float = 0.9
    beta: float = 1.5
    floor: float | None = None
    reduction: str = "prompt"
    nll_weight: float = 0.7
    clip: float | None = None
    grad: Tensor = field(default_factory=lambda: torch.tensor(1.3, dtype=torch.float64))

    @classmethod
    def make(
        cls,
        kind: str,
        shape: tuple[int, int, int],
        *,
        masked: bool,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> FlowCase:
        """Random inputs; with ``masked``, trajectories of all lengths, 0 included."""
        random = torch.Generator().manual_seed(seed)
        prompts, count, length = shape
        log_pf = -3 * torch.rand(shape, generator=random, dtype=dtype)
        log_reward = torch.randn(prompts, count, generator=random, dtype=dtype)
        target: Tensor | None = torch.randn(shape, generator=random, dtype=dtype)
        mask = None
        if masked:
            lengths = torch.randint(0, length + 1, (prompts, count, 1), generator=random)
            mask = torch.arange(length) < lengths
            log_pf = log_pf.masked_fill(~mask, torch.nan)
            log_reward = log_reward.masked_fill(~mask.any(-1), torch.nan)
            target = target.masked_fill(~mask, torch.nan)
        if kind == "tb":
            target = torch.randn(prompts, generator=random, dtype=dtype)
        elif kind == "vargrad":
            target = None
        case = cls(log_pf, log_reward, target, mask, kind, **options)
        if case.reduction == "none":
            grad = torch.randn(prompts, count, generator=random, dtype=torch.float64)
            case = replace(case, grad=grad)
        return case

    def on(self, device: str) -> FlowCase:
        """The same case with its tensors on ``device``."""
        moved = {
            name: None if value is None else value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) or value is None
        }
        return replace(self, **{k: v for k, v in moved.items() if k not in ("floor", "clip")})

    def arguments(self) -> tuple[Any, ...]:
        """Of the raw op."""
        return (
            *(self.log_pf, self.log_reward, self.target, self.mask, self.kind, self.lam),
            *(self.beta, self.floor, self.reduction, self.nll_weight, self.clip),
        )

    def expected(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its gradients to log_pf, log_reward and target, in float64."""
        leaves = [
            None if t is None else t.double().detach().requires_grad_()
            for t in (self.log_pf, self.log_reward, self.target)
        ]
        # Differentiated by autograd: the op would answer with its own gradient.
        flow = FlowOptions(*self.arguments()[4:])
        loss = loss_reference(*leaves, self.mask, flow)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return loss.detach(), torch.autograd.grad(loss, wanted, self.grad.double())


def check_raw_op(namespace: Any, case: FlowCase, device: str = "cpu") -> None:
    """Compare ``namespace.flow_loss`` and its backward with float64."""
    loss, grads = case.expected()
    case = case.on(device)
    dtype = case.log_pf.dtype
    # A few dozen float32 roundings of numbers of the size of the largest residual squared.
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {}
    got = namespace.flow_loss(*case.arguments())
    assert got.dtype == dtype
    torch.testing.assert_close(got.cpu().double(), loss, **tolerance)
    needs = (True, True, case.target is not None)
    outputs = namespace.flow_loss_backward(case.grad.to(dtype), *case.arguments(), *needs)
    for output, grad in zip(outputs, grads, strict=False):
        assert output.dtype == dtype
        torch.testing.assert_close(output.cpu().double(), grad, **tolerance)
    if case.mask is not None:
        assert bool((outputs[0][~case.mask] == 0).all())
    nothing = namespace.flow_loss_backward(
        case.grad.to(dtype), *case.arguments(), False, False, False
    )
    assert [output.numel() for output in nothing] == [0, 0, 0]
