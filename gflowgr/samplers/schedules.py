"""Schedules of the curriculum's difficulty over the training's progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..plain_settings import make_plain

__all__ = ["Schedule", "ScheduleShape"]

ScheduleShape = Literal["linear", "cosine", "step", "constant"]


@dataclass(frozen=True)
class Schedule:
    """A score quantile for each share of the training done.

    Attributes:
        shape: ``"linear"``; ``"cosine"``: slow at both ends; ``"step"``: ``steps`` equal stages;
            ``"constant"``: ``end`` throughout.
        start: quantile at the beginning, 0 for the lowest scores.
        end: quantile at the end, 1 for the highest scores.
        steps: stages of ``"step"``, at least 2.
    """

    shape: ScheduleShape = "linear"
    start: float = 0.0
    end: float = 1.0
    steps: int = 4

    def __post_init__(self) -> None:
        make_plain(self, prefix="schedule_", only=frozenset({"start", "end", "steps"}))
        shapes = get_args(ScheduleShape)
        if self.shape not in shapes:
            raise ValueError(f"schedule must be one of {shapes}; got {self.shape!r}")
        for name in ("start", "end"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"schedule_{name} must be in [0, 1]; got {value}")
        if self.steps < 2:
            raise ValueError(f"schedule_steps must be >= 2; got {self.steps}")

    def __call__(self, progress: float) -> float:
        """The quantile at ``progress`` (clipped to [0, 1])."""
        done = min(max(progress, 0.0), 1.0)
        if self.shape == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        elif self.shape == "step":
            done = min(math.floor(done * self.steps), self.steps - 1) / (self.steps - 1)
        elif self.shape == "constant":
            done = 1.0
        return self.start + (self.end - self.start) * done
