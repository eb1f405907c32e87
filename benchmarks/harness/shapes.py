"""Sizes of cases: how they are written, read and named."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

DTYPES = ("float32", "bfloat16", "float16")

CODES = 256
"""Codes per level of the identifiers."""

LENGTH = 4
"""Tokens of a random identifier."""

BEAUTY_ITEMS = 12101
"""Items of Amazon Beauty."""

Self = TypeVar("Self", bound="Shape")


@dataclass(frozen=True)
class Shape:
    """Sizes of one kind of case, written ``KIND:AxBxC``, with models ``KIND-MODEL:AxBxC``.

    A subclass is a frozen dataclass whose fields are the sizes, in the order in which they are
    written; where it has models, the first field is ``model``.

    Attributes:
        kind: name of the module whose cases have such sizes.
        models: what may stand behind the kind; empty: nothing may.
        example: sizes, for messages and the help.
        few: the most of some sizes that a warm-up has.
    """

    kind: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = ""
    few: ClassVar[dict[str, int]] = {}

    @classmethod
    def form(cls) -> str:
        """How such a shape is written."""
        return _prefixed(
            cls.kind, "MODEL" if cls.models else "", "x".join(map(str.upper, cls._names()))
        )

    @classmethod
    def example_text(cls) -> str:
        """One such shape, as it is written."""
        return _prefixed(cls.kind, cls.models[0] if cls.models else "", cls.example)

    @classmethod
    def read(cls: type[Self], text: str, model: str, sizes: str) -> Self:
        """The shape that ``text`` writes; ``model`` and ``sizes`` are parts of it.

        Raises:
            ValueError: another form, an unknown model, or sizes that no case can have.
        """
        if cls.models and model not in cls.models:
            raise ValueError(
                f"shape {text!r}: MODEL must be any of {', '.join(cls.models)}; got {model!r}"
            )
        found = read_sizes(sizes)
        if found is None or len(found) != len(cls._names()) or bool(model) != bool(cls.models):
            raise ValueError(f"shape {text!r} must be {cls.form()}, such as {cls.example_text()}")
        check_sizes(text, found)
        shape = cls(*([model] if cls.models else []), *found)
        problem = shape.problem()
        if problem is not None:
            raise ValueError(f"shape {text!r}: {problem}")
        return shape

    @classmethod
    def _names(cls) -> list[str]:
        return [each.name for each in fields(cls) if each.name != "model"]

    @property
    def text(self) -> str:
        """As ``--shapes`` reads it."""
        model: str = getattr(self, "model", "")
        sizes = "x".join(_short(getattr(self, name)) for name in self._names())
        return _prefixed(self.kind, model, sizes)

    @property
    def label(self) -> str:
        """What the tables call it."""
        return self.text

    def sizes(self, table: str) -> str:
        """The sizes that matter to a table, for its title."""
        return ", ".join(f"{name} {getattr(self, name):,}" for name in self._names())

    def small(self: Self) -> Self:
        """The same with few prompts or items: what a warm-up runs on."""
        sizes: dict[str, Any] = {n: min(getattr(self, n), most) for n, most in self.few.items()}
        return replace(self, **sizes)

    def problem(self) -> str | None:
        """Why no case can have these sizes, or None."""
        return None


@dataclass(frozen=True)
class LossShape(Shape):
    """B prompts, N trajectories, L tokens, width d, vocabulary V (d, V unused by flow_loss).

    Written ``BxNxLxdxV``, or by a name of :data:`NAMED`: four modules have such sizes.
    """

    kind: ClassVar[str] = ""
    few: ClassVar[dict[str, int]] = {"B": 2}
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
    def label(self) -> str:
        """Its name, or the numbers."""
        return self.name

    @property
    def first_code(self) -> int:
        """Token of the first code: the codebooks are the last rows of the head."""
        return self.V - self.L * CODES

    def sizes(self, table: str) -> str:
        """The numbers that matter to a table, for its title."""
        text = f"B {self.B}, N {self.N}, L {self.L}"
        if table.startswith("flow_loss"):
            return text
        return f"T {self.rows} = {text}; d {self.d}, V {self.V}"


NAMED = {
    shape.name: shape
    for shape in (
        LossShape("letter", 256, 4, 4, 512, 33024),
        LossShape("llm", 64, 4, 4, 1024, 152064),
        LossShape("tiger", 256, 4, 4, 128, 1027),
        LossShape("letter-gpu", 4096, 4, 4, 512, 33024),
        LossShape("llm-gpu", 1024, 4, 4, 1024, 152064),
        LossShape("tiger-gpu", 4096, 4, 4, 128, 1027),
        LossShape("losses", 4096, 8, 4, 1, 1),
        LossShape("losses-gpu", 65536, 8, 4, 1, 1),
    )
}


def named(*names: str) -> tuple[LossShape, ...]:
    """Shapes of :data:`NAMED`."""
    return tuple(NAMED[name] for name in names)


def read_loss_shape(text: str) -> LossShape | None:
    """A name of :data:`NAMED` or ``BxNxLxdxV``, None for anything else.

    Raises:
        ValueError: a size is less than 1.
    """
    if text in NAMED:
        return NAMED[text]
    sizes = read_sizes(text.lower())
    if sizes is None or len(sizes) != 5:
        return None
    check_sizes(text, sizes)
    return LossShape("x".join(map(str, sizes)), *sizes)


def read_sizes(text: str) -> list[int] | None:
    """Whole numbers between x's, None where there is anything else."""
    found = []
    for part in text.split("x"):
        digits = part.rstrip("km")
        if not digits.isdecimal() or len(part) - len(digits) > 1:
            return None
        found.append(int(digits) * {"k": 1000, "m": 1_000_000}.get(part[-1], 1))
    return found


def check_sizes(text: str, sizes: list[int]) -> None:
    """Raise ValueError where a size is less than 1."""
    if min(sizes) < 1:
        raise ValueError(f"shape {text!r}: every size must be at least 1; got {min(sizes)}")


def _prefixed(kind: str, model: str, sizes: str) -> str:
    return f"{kind}-{model}:{sizes}" if model else f"{kind}:{sizes}"


def _short(count: int) -> str:
    return f"{count // 1_000_000}m" if count % 1_000_000 == 0 else str(count)
