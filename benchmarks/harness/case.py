"""One table of the benchmark: an op at a shape, its variants, references and floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.harness import ours
from benchmarks.harness.floors import Bare, Floor
from benchmarks.harness.inputs import Inputs, MakeInputs
from benchmarks.harness.shapes import Shape
from gflowgr.decoding.graphed import capture

if TYPE_CHECKING:
    from benchmarks.harness.checking import Check

Judge = Callable[[Any, Any], "Check"]
"""(result of a variant, reference) -> how right it is."""


@dataclass(frozen=True)
class Variant:
    """One implementation of a case.

    Attributes:
        name: unique in the case.
        family: what a peer competes in, such as "csr"; "" for ours, which compete with every
            family of their case.
        forward: what is timed; of an op that trains, the forward pass.
        reference: key of the case's references.
        floor: key of the case's floors; None: no floor is known for what it computes.
        backend: ours only: the backend that is forced.
        compiles: a run of full size must come before its memory is counted.
        trains: the backward pass is timed with it, and gradients are compared.
        scale: its time is multiplied by this: for a part of the work, or one of several steps.
        prepare: what it does with new inputs before the clock starts.
    """

    name: str
    family: str
    forward: Callable[[Inputs], Any]
    reference: str
    floor: str | None = None
    backend: str | None = None
    compiles: bool = False
    trains: bool = True
    scale: float = 1.0
    prepare: Callable[[Inputs], None] | None = None

    def run(self, inputs: Inputs) -> Any:
        """Run once; gradients of an op that trains are in ``inputs.leaves``."""
        with ours.forced(self.backend):
            if not self.trains:
                with torch.no_grad():
                    return self.forward(inputs)
            result = self.forward(inputs)
            result.backward(inputs.upstream)
        return result.detach()

    def get_ready(self, inputs: Inputs) -> None:
        """What comes before the clock, once for new inputs."""
        if self.prepare is not None:
            with ours.forced(self.backend), torch.no_grad():
                self.prepare(inputs)


@dataclass(frozen=True)
class GraphedVariant(Variant):
    """One whose whole run, backward pass too, is captured for new inputs and then replayed."""

    _held: list[Any] = field(default_factory=list, repr=False)

    def get_ready(self, inputs: Inputs) -> None:
        """Capture; the memory of the last graph is given back first."""
        super().get_ready(inputs)
        self._held.clear()

        def work() -> Any:
            inputs.clear()
            return super(GraphedVariant, self).run(inputs)

        replay, result = capture(work)
        gradients = {name: leaf.grad for name, leaf in inputs.leaves.items()}
        self._held.extend((replay, result, gradients))

    def run(self, inputs: Inputs) -> Any:
        """Replay; gradients are where the graph writes them."""
        replay, result, gradients = self._held
        replay()
        for name, gradient in gradients.items():
            inputs[name].grad = gradient
        return result


@dataclass
class Case:
    """A table at a shape, on a device, in a dtype.

    Attributes:
        op: name of the table.
        judge: compares a result with its reference; None: result and gradients, in norm.
        tolerance: the judge's; None: that of the dtype.
        missing: (variant, why it is left out).
        uncounted: why memory is not counted; "": it is.
        examples: what a run trains on; 0: nothing is counted.
        parts: bare operations that are a part of a variant's work, by name, and the variant's name.
    """

    op: str
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    make_inputs: MakeInputs
    references: dict[str, Callable[[Inputs], Any]]
    variants: list[Variant] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    floors: dict[str, Floor] = field(default_factory=dict)
    bare: dict[str, Bare] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    judge: Judge | None = None
    tolerance: float | None = None
    uncounted: str = ""
    examples: int = 0
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the tables are headed with."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}, {self.shape.label}, {dtype} ({self.shape.sizes(self.op)})"

    def add_ours(
        self, ops: str, forward: Callable[[Inputs], Any], reference: str, **more: Any
    ) -> None:
        """A variant for each of our backends that runs here; the others in :attr:`missing`.

        ``ops`` is what the names of the registered ops begin with; ``suffix`` comes behind the
        variant's name; ``more`` is the variant's. On a GPU the free choice comes in a CUDA graph
        too, unless ``graph`` is false.
        """
        suffix, graph = more.pop("suffix", ""), more.pop("graph", True)
        found, missing = ours.usable_backends(ops, self.device, self.dtype)
        for backend in found:
            name = ours.variant_name(backend) + suffix
            self.variants.append(Variant(name, "", forward, reference, backend=backend, **more))
        if self.device.type == "cuda" and graph:
            name = f"gflowgr, CUDA graph{suffix}"
            slow = ours.without_kernels(ops, self.device, self.dtype)
            if slow:
                reason = f"{slow[0]} runs its reference here, which waits for the device"
                self.missing.append((name, reason))
            else:
                self.variants.append(GraphedVariant(name, "", forward, reference, **more))
        if not suffix:
            self.missing += missing
