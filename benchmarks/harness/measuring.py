"""Time: variants take turns on fresh data, a canary between the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.inputs import Inputs

CANARY_LIMIT = 0.2
"""A run is flagged when its canary's times spread by more than this fraction of their median."""

_SAMPLE_SECONDS = 0.02  # quick variants run several times per sample
_MOST_CALLS = 50
_FIRST_SEED = 1000

Progress = Callable[[str], None]


@dataclass
class Times:
    """Seconds per call of every variant and bare operation, one number a round."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)  # CPU time of all threads; on a CPU
    canary: list[float] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """(90% quantile - 10% quantile) / median of the canary."""
        ordered = sorted(self.canary)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        return (high - low) / statistics.median(ordered)

    @property
    def contended(self) -> bool:
        """Whether other work disturbed the run."""
        return self.spread > CANARY_LIMIT


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third


def time_case(
    case: Case,
    variants: list[Variant],
    *,
    repeats: int,
    seconds: float,
    progress: Progress = lambda text: None,
) -> Times:
    """Time checked variants and the case's bare operations.

    Round by round: new inputs, then everything in an order that rotates, so that nothing always
    follows the same neighbour. A variant whose samples took more than `seconds` together is left
    alone after its second. The check has warmed the variants up; a first, untimed round warms the
    rest up and finds how many calls make a sample.
    """
    runs: dict[str, Callable[[Inputs], object]] = {v.name: v.run for v in variants}
    runs.update(case.bare)
    scale = {v.name: v.scale for v in variants}
    ready = {v.name: v.get_ready for v in variants}
    times = Times({name: [] for name in runs}, {name: [] for name in runs})
    calls = {}
    inputs = case.make_inputs(_FIRST_SEED)
    canary = _Canary(case.device)
    for name, run in runs.items():
        progress(f"{case.title}: warming up {name}")
        ready.get(name, _nothing)(inputs)
        once, _ = _sample(run, inputs, 1, case.device)
        calls[name] = max(1, min(_MOST_CALLS, int(_SAMPLE_SECONDS / max(once, 1e-9))))
    names = list(runs)
    for round_ in range(repeats):
        del inputs  # before the next ones are made: a large head is held once
        inputs = case.make_inputs(_FIRST_SEED + 1 + round_)
        times.canary.append(canary.seconds())
        place = round_ % max(len(names), 1)
        for name in names[place:] + names[:place]:
            taken, factor = times.samples[name], scale.get(name, 1.0)
            if len(taken) >= 2 and sum(taken) / factor * calls[name] > seconds:
                continue
            progress(f"{case.title}: round {round_ + 1} of {repeats}, {name}")
            ready.get(name, _nothing)(inputs)
            wall, cpu = _sample(runs[name], inputs, calls[name], case.device)
            taken.append(wall * factor)
            times.cpu[name].append(cpu * factor)
    times.canary.append(canary.seconds())
    return times


def _sample(
    run: Callable[[Inputs], object], inputs: Inputs, calls: int, device: torch.device
) -> tuple[float, float]:
    """Wall and CPU seconds per call; gradients are dropped between calls, outside the clock.

    CPU seconds are the process's, all threads together; NaN on a GPU.
    """
    if device.type == "cuda":
        return _cuda_sample(run, inputs, calls), float("nan")
    wall = cpu = 0.0
    for _ in range(calls):
        inputs.clear()
        begin_cpu, begin = time.process_time(), time.perf_counter()
        result = run(inputs)
        wall += time.perf_counter() - begin
        cpu += time.process_time() - begin_cpu
        del result  # what is held is given back outside the clock
    inputs.clear()
    return wall / calls, cpu / calls


def _nothing(inputs: Inputs) -> None:
    """What bare operations do with new inputs."""


def _cuda_sample(run: Callable[[Inputs], object], inputs: Inputs, calls: int) -> float:
    begin = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    end = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
    torch.cuda.synchronize()
    for first, last in zip(begin, end, strict=True):
        inputs.clear()
        first.record()
        run(inputs)
        last.record()
    torch.cuda.synchronize()
    inputs.clear()
    pairs = zip(begin, end, strict=True)
    return sum(first.elapsed_time(last) for first, last in pairs) / calls / 1e3


class _Canary:
    """A fixed product, about 20 ms on a core: its time varies only with what else runs."""

    def __init__(self, device: torch.device) -> None:
        n = 8192 if device.type == "cuda" else 512
        self._matrix = torch.ones(n, n, device=device)
        self._device = device
        self.seconds()

    def seconds(self) -> float:
        """Time it once."""
        matrix = self._matrix
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin
