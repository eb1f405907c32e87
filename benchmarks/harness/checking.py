"""Checks of a variant's result and gradients against float64, before it is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.inputs import Inputs
from gflowgr.backends import BackendError

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest relative error, in norm: |x - reference| / |reference| for the result and each gradient.

float32: dot products of up to 8192 terms and sums over the vocabulary lose a few hundred units of
6e-8. 16-bit types: peers round logits to 8 (bfloat16) or 11 (float16) bits, so a logit of 4 to 8 is
off by up to 0.016 (0.002), and its probability by that fraction.
"""

FAILURES = (
    RuntimeError,  # with torch's out-of-memory errors and those of its compiler
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ImportError,
    OSError,
)
"""What other projects raise where they cannot run; anything else is a bug of the benchmark."""


@dataclass(frozen=True)
class Check:
    """Errors of one variant.

    Attributes:
        status: "ok", "wrong", "failed" (raised), or "absent" (a forced backend that lacks one of
            the ops involved).
        reason: why it is not ok, else "".
        result_error, gradient_error: relative errors, the worst of the gradients; of scores the
            largest error in nats.
        bytes_per_item: size of a tree's structure, where one is the result.
    """

    status: str
    reason: str = ""
    result_error: float | None = None
    gradient_error: float | None = None
    bytes_per_item: float | None = None


def check(case: Case, variant: Variant, inputs: Inputs, reference: Any) -> Check:
    """Run a variant once and compare it."""
    inputs.clear()
    try:
        variant.get_ready(inputs)
        result = variant.run(inputs)
    except BackendError as error:
        return Check("absent", str(error))
    except FAILURES as error:
        text = str(error).strip() or "no message"
        return Check("failed", f"{type(error).__name__}: {text.splitlines()[0]}")
    if case.judge is not None:
        return case.judge(result, reference)
    tolerance = TOLERANCES[case.dtype]
    wanted, wanted_gradients = reference
    result_error = relative_error(result, wanted)
    errors = {}
    for name, gradient in wanted_gradients.items():
        found = inputs[name].grad
        if found is None:
            return Check("wrong", f"no gradient of {name}", result_error)
        errors[name] = relative_error(found, gradient)
    inputs.clear()
    # `not <=`, so that NaN is wrong too.
    wrong = [f"{name} {error:.2g}" for name, error in errors.items() if not error <= tolerance]
    if not result_error <= tolerance:
        wrong.insert(0, f"result {result_error:.2g}")
    reason = f"relative error over {tolerance:g}: {', '.join(wrong)}" if wrong else ""
    worst = max(errors.values(), key=lambda e: e if e == e else float("inf"))
    return Check("wrong" if wrong else "ok", reason, result_error, worst)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted` (float64), infinite for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    dense = found.to_dense() if found.is_sparse else found
    difference = torch.linalg.vector_norm(dense.double() - wanted)
    norm = torch.linalg.vector_norm(wanted)
    return float(difference / norm) if norm > 0 else float(difference)
