"""What the steps say, kept on the device until it is logged."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from .sharing import sum_over_processes

__all__ = ["StepLog"]


class StepLog:
    """Sums since the last entry of the log; reading them each step would make every step wait."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._tokens: Tensor | int = 0
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Count seconds from now on."""
        self._since = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count these: they were no training."""
        self._since += seconds

    def add(self, values: Mapping[str, Tensor], share: Tensor | float, tokens: Tensor) -> None:
        """Remember a step.

        Args:
            values: scalars by name.
            share: weight of this process's in their mean over processes.
            tokens: how many this process's step read and predicted.
        """
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float() * share)
        self._tokens = self._tokens + tokens

    def entry(self) -> dict[str, float]:
        """Averages of all processes' values, ``seconds`` and ``tokens_per_second``; starts anew."""
        sums = {n: (float(torch.stack(v).sum()), len(v)) for n, v in self._values.items()}
        sums = sum_over_processes(sums | {"tokens": (float(self._tokens), 1)})
        tokens, _ = sums.pop("tokens")
        entry = {name: total / count for name, (total, count) in sums.items()}
        now = time.perf_counter()
        entry["seconds"] = max(now - self._since, 1e-9)
        entry["tokens_per_second"] = tokens / entry["seconds"]
        self._values.clear()
        self._tokens, self._since = 0, now
        return entry
