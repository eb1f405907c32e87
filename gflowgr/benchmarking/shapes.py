"""What can be benchmarked: names of ops, shapes and dtypes, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = {
    "head": ("head", "head-frozen"),
    "logprobs": ("logprobs", "logprobs-frozen"),
    "tree": ("tree", "tree-frozen"),
    "reductions": ("tb", "db", "subtb", "vargrad"),
}
"""Groups of ops; each op is one table."""

OPS = tuple(op for group in GROUPS.values() for op in group)

DTYPES = ("float32", "bfloat16", "float16")

CODES = 256
"""Codes per level of the identifiers in the tree benchmarks."""


@dataclass(frozen=True)
class Shape:
    """B prompts, N trajectories, L tokens, width d, vocabulary V (d, V unused by reductions)."""

    name: str
    B: int
    N: int
    L: int
    d: int
    V: int

    @property
    def rows(self) -> int:
        """T, the number of tokens."""
        return self.B * self.N * self.L

    @property
    def text(self) -> str:
        """The numbers, as ``--shapes`` reads them."""
        return f"{self.B}x{self.N}x{self.L}x{self.d}x{self.V}"

    @property
    def first_code(self) -> int:
        """Token of the first code: the codebooks are the last rows of the head."""
        return self.V - self.L * CODES


NAMED = {
    shape.name: shape
    for shape in (
        Shape("letter", 256, 4, 4, 512, 33024),
        Shape("llm", 64, 4, 4, 1024, 152064),
        Shape("tiger", 256, 4, 4, 128, 1027),
        Shape("letter-gpu", 4096, 4, 4, 512, 33024),
        Shape("llm-gpu", 1024, 4, 4, 1024, 152064),
        Shape("tiger-gpu", 4096, 4, 4, 128, 1027),
        Shape("losses", 4096, 8, 4, 1, 1),
        Shape("losses-gpu", 65536, 8, 4, 1, 1),
    )
}


def read_ops(names: list[str]) -> list[str]:
    """Ops in the order of :data:`OPS`; a group stands for its ops, nothing for all.

    Raises ValueError for an unknown name.
    """
    wanted: set[str] = set()
    for name in names or list(GROUPS):
        if name in GROUPS:
            wanted.update(GROUPS[name])
        elif name in OPS:
            wanted.add(name)
        else:
            raise ValueError(
                f"op {name!r} is unknown; groups: {', '.join(GROUPS)}; ops: {', '.join(OPS)}"
            )
    return [op for op in OPS if op in wanted]


def read_shape(text: str) -> Shape:
    """A named shape, or ``BxNxLxdxV``. Raises ValueError, saying what was expected."""
    if text in NAMED:
        return NAMED[text]
    parts = text.lower().split("x")
    if len(parts) != 5 or not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"shape {text!r} is neither a name ({', '.join(NAMED)}) nor BxNxLxdxV, five whole "
            "numbers such as 256x4x4x512x33024"
        )
    sizes = [int(part) for part in parts]
    if min(sizes) < 1:
        raise ValueError(f"shape {text!r}: every size must be at least 1")
    return Shape("x".join(map(str, sizes)), *sizes)


def default_shapes(op: str, device: str) -> list[Shape]:
    """The shapes that an op is measured at when none is given."""
    if op in GROUPS["reductions"]:
        names = ["losses"]
    elif op in GROUPS["tree"]:
        names = ["letter", "llm"]
    else:
        names = ["letter", "llm", "tiger"]
    return [NAMED[f"{name}-gpu" if device == "cuda" else name] for name in names]


def shape_problem(op: str, shape: Shape) -> str | None:
    """Why an op cannot be measured at a shape, or None."""
    if op in GROUPS["tree"] and shape.first_code < 0:
        return f"the tree needs V of at least L * {CODES} = {shape.L * CODES}, got {shape.V}"
    return None
