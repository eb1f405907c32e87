"""What can be benchmarked: names of ops, shapes and dtypes, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

GROUPS = {
    "head": ("head", "head-frozen"),
    "logprobs": ("logprobs", "logprobs-frozen"),
    "children": ("children", "children-frozen"),
    "reductions": ("tb", "db", "subtb", "vargrad"),
    "decode": ("beam", "beam-hidden", "search", "score"),
    "tree": ("tree-build", "tree-walk", "tree-available", "tree-files"),
    "step": ("step",),
    "train": ("train",),
}
"""Groups of ops; each op is one table."""

OPS = tuple(op for group in GROUPS.values() for op in group)

FLOAT32_OPS = (
    *GROUPS["reductions"],
    *GROUPS["decode"],
    *GROUPS["tree"],
    *GROUPS["step"],
    *GROUPS["train"],
)
"""Ops that are measured in float32 only: it is what they compute in."""

DTYPES = ("float32", "bfloat16", "float16")

CODES = 256
"""Codes per level of the identifiers."""

LENGTH = 4
"""Tokens of an identifier in the decode and tree benchmarks."""

HIDDEN = 512
"""Width of the states of ``beam-hidden``."""

MODELS = ("t5", "gpt2", "qwen3")
"""Models of ``search``."""

TRAINED = ("t5", "qwen3")
"""Models of ``step``."""

SIZES = ("small", "tiger")
"""Sizes of T5 of ``train``."""

_SMALL = 2  # prompts of a warm-up


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

    def sizes(self, op: str) -> str:
        """The numbers that matter to an op, for a title."""
        text = f"B {self.B}, N {self.N}, L {self.L}"
        if op in GROUPS["reductions"]:
            return text
        return f"T {self.rows} = {text}; d {self.d}, V {self.V}"

    def small(self) -> Shape:
        """The same of a few prompts."""
        return replace(self, B=min(self.B, _SMALL))


@dataclass(frozen=True)
class StepShape:
    """A step of a beam search: prompts, beams, vocabulary, items of a random catalogue."""

    prompts: int
    beams: int
    vocab: int
    items: int

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        return f"beam:{self.prompts}x{self.beams}x{self.vocab}x{_short(self.items)}"

    name = text

    def sizes(self, op: str) -> str:
        """For a title."""
        width = f", d {HIDDEN}" if op == "beam-hidden" else ""
        rows = f"prompts {self.prompts}, beams {self.beams}"
        return f"{rows}{width}, V {self.vocab}, items {self.items:,}"

    def small(self) -> StepShape:
        """The same of a few prompts and items."""
        return replace(self, prompts=min(self.prompts, _SMALL), items=min(self.items, 1000))


@dataclass(frozen=True)
class SearchShape:
    """A whole beam search: a model, prompts, tokens of a prompt, beams, items."""

    model: str
    prompts: int
    source: int
    beams: int
    items: int

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        sizes = f"{self.prompts}x{self.source}x{self.beams}x{_short(self.items)}"
        return f"{self.model}:{sizes}"

    name = text

    def sizes(self, op: str) -> str:
        """For a title."""
        rows = f"prompts {self.prompts}, tokens of each {self.source}, beams {self.beams}"
        return f"{rows}, items {self.items:,}"

    def small(self) -> SearchShape:
        """The same of one prompt."""
        return replace(self, prompts=1)


@dataclass(frozen=True)
class ScoreShape:
    """Scoring a catalogue: prompts, tokens of a prompt, items."""

    prompts: int
    source: int
    items: int

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        return f"score:{self.prompts}x{self.source}x{_short(self.items)}"

    name = text

    def sizes(self, op: str) -> str:
        """For a title."""
        rows = f"prompts {self.prompts}, tokens of each {self.source}"
        return f"{rows}, items {self.items:,}"

    def small(self) -> ScoreShape:
        """The same of one prompt and a few items."""
        return replace(self, prompts=1, items=min(self.items, 50))


@dataclass(frozen=True)
class TreeShape:
    """A catalogue of random identifiers."""

    items: int

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        return f"tree:{_short(self.items)}"

    name = text

    def sizes(self, op: str) -> str:
        """For a title."""
        return f"{self.items:,} random identifiers of {LENGTH} tokens, {CODES} codes a level"

    def small(self) -> TreeShape:
        """The same of a few items."""
        return replace(self, items=min(self.items, 1000))


@dataclass(frozen=True)
class TrainShape:
    """A training step: a model, prompts, tokens of a prompt's history, trajectories, items."""

    model: str
    prompts: int
    source: int
    trajectories: int
    items: int

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        sizes = f"{self.prompts}x{self.source}x{self.trajectories}x{_short(self.items)}"
        return f"train-{self.model}:{sizes}"

    name = text

    def sizes(self, op: str) -> str:
        """For a title."""
        rows = f"prompts {self.prompts}, tokens of each {self.source}"
        return f"{rows}, trajectories {self.trajectories}, items {self.items:,}"

    def small(self) -> TrainShape:
        """The same of a few prompts."""
        return replace(self, prompts=min(self.prompts, _SMALL))


@dataclass(frozen=True)
class ThroughputShape:
    """A whole training: sizes of T5, prompts of a step, steps, items."""

    model: str
    prompts: int
    steps: int
    items: int

    @property
    def examples(self) -> int:
        """Of all steps."""
        return self.prompts * self.steps

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        return f"sft-{self.model}:{self.prompts}x{self.steps}x{_short(self.items)}"

    name = text

    def sizes(self, op: str) -> str:
        """For a title."""
        return f"{self.steps} steps of {self.prompts} prompts, items {self.items:,}"

    def small(self) -> ThroughputShape:
        """The same of a few steps."""
        return replace(self, steps=min(self.steps, _SMALL))


AnyShape = Shape | StepShape | SearchShape | ScoreShape | TreeShape | TrainShape | ThroughputShape

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

BEAUTY_ITEMS = 12101
"""Items of Amazon Beauty."""

_FORMS = {
    "beam": ("beam:PROMPTSxBEAMSxVxITEMS", "beam:64x20x33124x10m"),
    "score": ("score:PROMPTSxSOURCExITEMS", "score:4x60x12101"),
    "tree": ("tree:ITEMS", "tree:10m"),
} | {model: (f"{model}:PROMPTSxSOURCExBEAMSxITEMS", f"{model}:8x60x20x12101") for model in MODELS}
_FORMS |= {
    f"train-{model}": (f"train-{model}:PROMPTSxSOURCExNxITEMS", f"train-{model}:64x80x4x12101")
    for model in TRAINED
}
_FORMS |= {
    f"sft-{size}": (f"sft-{size}:PROMPTSxSTEPSxITEMS", f"sft-{size}:128x16x12101") for size in SIZES
}
"""Shapes of all benchmarks but the losses': how they are written, and an example."""


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


def read_shape(text: str) -> AnyShape:
    """A named shape, ``BxNxLxdxV``, or a kind and its numbers (``beam:``, ``t5:``, ``tree:``, ...).

    Numbers may end in k (thousand) or m (million). Raises ValueError, saying what was expected.
    """
    if text in NAMED:
        return NAMED[text]
    kind, colon, rest = text.lower().partition(":")
    if colon:
        return _read_kind(text, kind, rest)
    sizes = _numbers(text.lower())
    if sizes is None or len(sizes) != 5:
        raise ValueError(
            f"shape {text!r} is neither a name ({', '.join(NAMED)}) nor BxNxLxdxV, five whole "
            "numbers such as 256x4x4x512x33024, nor any of "
            + ", ".join(form for form, _ in _FORMS.values())
        )
    _check_sizes(text, sizes)
    return Shape("x".join(map(str, sizes)), *sizes)


def _read_kind(text: str, kind: str, rest: str) -> AnyShape:
    if kind not in _FORMS:
        raise ValueError(f"shape {text!r}: {kind!r} is none of {', '.join(_FORMS)}")
    form, example = _FORMS[kind]
    sizes = _numbers(rest)
    if sizes is None or len(sizes) != form.count("x") + 1:
        raise ValueError(f"shape {text!r}: expected {form}, such as {example}")
    _check_sizes(text, sizes)
    if kind == "beam":
        shape = StepShape(*sizes)
        if shape.vocab < LENGTH * CODES:
            raise ValueError(f"shape {text!r}: V must be at least {LENGTH * CODES}")
        return shape
    if kind.startswith("train-"):
        trained = TrainShape(kind.removeprefix("train-"), *sizes)
        if trained.source % LENGTH:
            raise ValueError(f"shape {text!r}: SOURCE must be a multiple of {LENGTH}")
        return trained
    if kind.startswith("sft-"):
        return ThroughputShape(kind.removeprefix("sft-"), *sizes)
    if kind == "tree":
        return TreeShape(*sizes)
    if kind == "score":
        return ScoreShape(*sizes)
    return SearchShape(kind, *sizes)


def _numbers(text: str) -> list[int] | None:
    """Whole numbers between x's, None where there are others."""
    found = []
    for part in text.split("x"):
        digits = part.rstrip("km")
        if not digits.isdecimal() or len(part) - len(digits) > 1:
            return None
        found.append(int(digits) * {"k": 1000, "m": 1_000_000}.get(part[-1], 1))
    return found


def _check_sizes(text: str, sizes: Sequence[int]) -> None:
    if min(sizes) < 1:
        raise ValueError(f"shape {text!r}: every size must be at least 1")


def _short(count: int) -> str:
    return f"{count // 1_000_000}m" if count % 1_000_000 == 0 else str(count)


def default_shapes(op: str, device: str) -> list[AnyShape]:
    """The shapes that an op is measured at when none is given."""
    gpu = device == "cuda"
    if op in GROUPS["tree"]:
        return [TreeShape(items) for items in (BEAUTY_ITEMS, 1_000_000, 10_000_000)]
    if op in ("beam", "beam-hidden"):
        rows = ((1, 20), (8, 20), (64, 20), (512, 20)) if gpu else ((1, 10), (8, 20), (64, 20))
        vocabularies = (1027, 33124) if op == "beam" else (33124,)
        # Catalogues outermost: one is built, and serves all that follow.
        return [
            StepShape(prompts, beams, vocab, items)
            for vocab in vocabularies
            for items in (BEAUTY_ITEMS, 1_000_000, 10_000_000)
            for prompts, beams in rows
        ]
    if op == "search":
        searches = [("t5", n, 60) for n in (1, 8, 64, *([512] * gpu))]
        searches += [(model, n, 512) for model in ("gpt2", "qwen3") for n in (1, 8)]
        return [SearchShape(*search, 20, BEAUTY_ITEMS) for search in searches]
    if op == "score":
        return [ScoreShape(4, 60, BEAUTY_ITEMS)]
    if op in GROUPS["step"]:
        times = 8 if gpu else 1
        return [
            TrainShape("t5", 128 * times, 80, 4, BEAUTY_ITEMS),
            TrainShape("qwen3", 32 * times, 256, 4, BEAUTY_ITEMS),
        ]
    if op in GROUPS["train"]:
        if gpu:
            return [ThroughputShape("tiger", 1024, 64, BEAUTY_ITEMS)]
        return [ThroughputShape("small", 128, 16, BEAUTY_ITEMS)]
    if op in GROUPS["reductions"]:
        names = ["losses"]
    elif op in GROUPS["children"]:
        names = ["letter", "llm"]
    else:
        names = ["letter", "llm", "tiger"]
    return [NAMED[f"{name}-gpu" if gpu else name] for name in names]


def fits(op: str, shape: AnyShape) -> bool:
    """Whether a shape is of the kind that an op is measured at."""
    kinds = {"beam": StepShape, "beam-hidden": StepShape, "search": SearchShape}
    kinds |= {"score": ScoreShape} | dict.fromkeys(GROUPS["tree"], TreeShape)
    kinds |= dict.fromkeys(GROUPS["step"], TrainShape)
    kinds |= dict.fromkeys(GROUPS["train"], ThroughputShape)
    return isinstance(shape, kinds.get(op, Shape))


def shape_problem(op: str, shape: AnyShape) -> str | None:
    """Why an op cannot be measured at a shape of its kind, or None."""
    if op in GROUPS["children"] and isinstance(shape, Shape) and shape.first_code < 0:
        return f"the tree needs V of at least L * {CODES} = {shape.L * CODES}, got {shape.V}"
    return None
