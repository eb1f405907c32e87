"""Per-step metrics, accumulated on the device between logs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cpu_time import cpu_seconds
from ..distributed import gathered, sum_over_processes
from ..models.gflow_model import GFlowModel

__all__ = ["Logs", "Mean", "StepLog", "check_finite", "histogram", "of_model"]

_BINS = 1000  # of histograms: quantiles are right to half of a bin
_QUANTILES = (10, 50, 90)


class Mean(NamedTuple):
    """A mean over a micro-batch, and over how many things (``weight``)."""

    value: Tensor
    weight: Tensor | float


Logs = dict[str, Mean | Tensor]
"""By name: means, and histograms of :func:`histogram`."""


def histogram(values: Tensor) -> Tensor:
    """Numbers of values at 0, 0.001, ... 1, int64 [1001], of ``values`` in [0, 1]; NaN is none.

    Unlike quantiles, the histograms of a batch's parts add up to that of the batch.
    """
    bins = (values.float() * _BINS).round().clamp(0, _BINS).nan_to_num(_BINS + 1).long()
    counts = torch.zeros(_BINS + 2, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, bins.flatten(), torch.ones_like(bins.flatten()))[:-1]


def of_model(
    model: GFlowModel,
    output: Mapping[str, Tensor],
    flow: dict[str, Tensor],
    prompts: int,
    share: float,
) -> Logs:
    """The metrics that a model's ``forward`` returned for ``flow``, each with its weight.

    Args:
        model: the model.
        output: what it returned.
        flow: its inputs.
        prompts: how many these have; of whole sequences, their targets.
        share: of the global batch's prompts; sums are over the global batch.
    """
    mask = flow["mask"]
    counts: dict[str, Tensor | float] = {
        "importance": mask.any(-1).sum(),
        "reference_divergence": mask.sum(),
    }
    if "observed" in flow:  # the flow's term has prompts without a target, too
        counts["loss_gfn"] = float(len(flow["observed"]))
    trajectories = [mask, *([flow["branch_mask"]] if "branch_mask" in flow else [])]
    if model.settings.objective not in ("db", "subtb"):
        trajectories = [each.any(-1) for each in trajectories]
    residuals = torch.stack([each.sum() for each in trajectories]).sum()
    counts |= dict.fromkeys(("residual_mean", "residual_rms"), residuals)
    if model.settings.counts_apart:
        terms = model.term_counts(**flow)[1]
        compared = ("loss_preference", "preference_margin", "preference_accuracy")
        counts |= dict.fromkeys(("loss_gfn", "loss_fusion", *compared), terms)
    logs: Logs = {}
    for name, value in output.items():
        if model.settings.reduced_by == "sum" and name.startswith("loss_") and share:
            value = value / share  # the mean over parts of this is the sum over all
        if name != "loss":
            logs[name] = Mean(value, counts.get(name, float(prompts)))
    return logs


def check_finite(logs: Mapping[str, float], step: int, *, fp16: bool) -> None:
    """Check a log entry's loss and gradient.

    Raises:
        FloatingPointError: one is NaN or infinite.
    """
    for name, label in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
        value = logs.get(name, 0.0)
        # With fp16 an infinite gradient only makes the loss scaler skip a step.
        if not math.isfinite(value) and not (name == "grad_norm" and fp16):
            raise FloatingPointError(
                f"the {label} is {value} at step {step}; lower learning_rate or gfn_weight, and "
                "check the rewards"
            )


class StepLog:
    """Sums since the last log entry; reading them in each step would synchronise each step."""

    def __init__(self) -> None:
        self._means: dict[str, list[tuple[Tensor, Tensor | float]]] = {}
        self._histograms: dict[str, Tensor] = {}
        self._tokens: Tensor | int = 0
        self.restart()

    def restart(self) -> None:
        """Count seconds from now on."""
        self._since, self._cpu_since = time.perf_counter(), cpu_seconds()

    def leave_out(self, seconds: float, cpu: float) -> None:
        """Do not count these seconds, of the clock and of CPU time: they were not training."""
        self._since += seconds
        self._cpu_since += cpu

    def add(self, values: Logs, per_prompt: float, tokens: Tensor) -> None:
        """Remember a micro-batch.

        Args:
            values: means and histograms by name; a mean whose name ends in ``_rms`` is the root of
                a mean of squares.
            per_prompt: 1 over the number of prompts of the step's global batch, so that every step
                has the same weight; 0: these are another process's prompts, not to be counted.
            tokens: how many this process's step read and predicted.
        """
        for name, value in values.items():
            if isinstance(value, Mean):
                mean, weight = value.value.detach().float(), value.weight * per_prompt
                mean = mean.square() if name.endswith("_rms") else mean
                mean = mean if per_prompt else torch.zeros_like(mean)
                self._means.setdefault(name, []).append((mean * weight, weight))
            elif per_prompt:
                before = self._histograms.get(name, 0)
                self._histograms[name] = value.detach() + before
        self._tokens = self._tokens + tokens

    def entry(self) -> dict[str, float]:
        """Averages over all micro-batches of all processes, quantiles of the histograms,
        ``seconds``, ``cpu_seconds`` and ``tokens_per_second``; starts anew."""
        sums = {name: _sum(pairs) for name, pairs in self._means.items()}
        cpu = cpu_seconds()
        totals = {"tokens": float(self._tokens), "cpu_seconds": cpu - self._cpu_since}
        sums = sum_over_processes(sums | {name: (total, 1.0) for name, total in totals.items()})
        (tokens, _), (spent, _) = (sums.pop(name) for name in totals)
        entry = {name: total / weight for name, (total, weight) in sums.items() if weight}
        entry |= {n: math.sqrt(max(v, 0.0)) for n, v in entry.items() if n.endswith("_rms")}
        counts: dict[str, np.ndarray] = {}
        for part in gathered({n: h.cpu().numpy() for n, h in self._histograms.items()}):
            for name, values in part.items():
                counts[name] = counts.get(name, 0) + values
        for name, values in counts.items():
            entry |= _quantiles(name, values)
        now = time.perf_counter()
        entry["seconds"] = max(now - self._since, 1e-9)
        entry["cpu_seconds"] = max(spent, 0.0)
        entry["tokens_per_second"] = tokens / entry["seconds"]
        self._means.clear()
        self._histograms.clear()
        self._tokens, self._since, self._cpu_since = 0, now, cpu
        return entry


def _sum(pairs: list[tuple[Tensor, Tensor | float]]) -> tuple[float, float]:
    device = pairs[0][0].device
    weights = [torch.as_tensor(w, dtype=torch.float64, device=device) for _, w in pairs]
    return (
        float(torch.stack([value for value, _ in pairs]).double().sum()),
        float(torch.stack(weights).sum()),
    )


def _quantiles(name: str, counts: np.ndarray) -> dict[str, float]:
    if not counts.any():
        return {}
    below = counts.cumsum()
    ranks = [round(q / 100 * (below[-1] - 1)) for q in _QUANTILES]
    found = np.searchsorted(below, ranks, side="right") / _BINS
    return {f"{name}/q{q}": float(v) for q, v in zip(_QUANTILES, found, strict=True)}
