"""The registry of benchmarks: every module of ``benchmarks/`` registers its tables here.

An op is a module (``benchmarks/beam_step.py``), and has one table or several (``beam_step.logits``,
``beam_step.hidden``). To add an op, add a module that calls :func:`register`; nothing else lists
the ops. Only the modules that are asked for are imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import benchmarks
from benchmarks.harness.shapes import NAMED, LossShape, Shape, read_loss_shape

if TYPE_CHECKING:
    from benchmarks.harness.case import Case

Build = Callable[[str, Any, torch.device, torch.dtype, tuple[str, ...]], "Case"]
"""(name of the table, shape, device, dtype, keys of the wanted peers) -> case."""


@dataclass(frozen=True)
class Table:
    """One table of the benchmark, at several shapes and in several dtypes.

    Attributes:
        name: the op (its module's name), or ``OP.PART`` where the op has several tables.
        build: makes a case with every variant that can run, the others with reasons.
        shape: the kind of its shapes.
        on_cpu, on_gpu: shapes that are measured when none is asked for; without any of the latter
            it runs on the CPU only.
        low_precision: devices on which it is measured in 16 bits too; elsewhere float32 alone.
        refuse: why it cannot be measured at a shape of its kind, or None.
    """

    name: str
    build: Build
    shape: type[Shape]
    on_cpu: Sequence[Shape]
    on_gpu: Sequence[Shape] = ()
    low_precision: tuple[str, ...] = ()
    refuse: Callable[[Any], str | None] = lambda shape: None

    @property
    def op(self) -> str:
        """The op it belongs to."""
        return self.name.partition(".")[0]

    def defaults(self, device: str) -> Sequence[Shape]:
        """Shapes that are measured by default."""
        return self.on_gpu if device == "cuda" else self.on_cpu

    def fits(self, shape: Shape) -> bool:
        """Whether a shape is of its kind."""
        return isinstance(shape, self.shape)


_TABLES: dict[str, Table] = {}


def register(table: Table) -> None:
    """Add a table; a module calls it when it is imported.

    Raises:
        ValueError: the name is taken.
    """
    if table.name in _TABLES:
        raise ValueError(f"name of a table must be new; got {table.name!r} again")
    _TABLES[table.name] = table


def tables_of(op: str) -> list[Table]:
    """The tables of a module, imported now; none where there is no such module."""
    if op in _modules():
        importlib.import_module(f"benchmarks.{op}")
    return [table for table in _TABLES.values() if table.op == op]


def all_tables() -> list[Table]:
    """Every table, by op."""
    registered = (table.op for table in _TABLES.values())
    return [table for op in sorted({*_modules(), *registered}) for table in tables_of(op)]


def read_tables(names: Sequence[str]) -> list[Table]:
    """The tables asked for: an op stands for all of its own, nothing for all there are.

    Raises:
        ValueError: a name is neither an op nor a table.
    """
    if not names:
        return all_tables()
    wanted: dict[str, Table] = {}
    for name in names:
        found = [t for t in tables_of(name.partition(".")[0]) if name in (t.op, t.name)]
        if not found:
            ops = dict.fromkeys(table.op for table in all_tables())
            tables = (table.name for table in all_tables() if table.name != table.op)
            raise ValueError(
                f"op must be any of {', '.join(ops)}, or a table of one: {', '.join(tables)}; "
                f"got {name!r}"
            )
        wanted |= {table.name: table for table in found}
    return list(wanted.values())


def read_shape(text: str) -> Shape:
    """A name (``letter``), ``BxNxLxdxV``, or ``OP:SIZES`` (``beam_step:64x20x33124x10m``).

    Numbers may end in k (thousand) or m (million).

    Raises:
        ValueError: none of these, saying what was expected.
    """
    prefix, colon, sizes = text.lower().partition(":")
    if not colon:
        found = read_loss_shape(text)
        if found is not None:
            return found
        raise ValueError(
            f"shape must be a name ({', '.join(NAMED)}), BxNxLxdxV, five whole numbers such as "
            "256x4x4x512x33024, or any of "
            f"{', '.join(kind.form() for kind in kinds(all_tables()))}; got {text!r}"
        )
    op, _, model = prefix.partition("-")
    for kind in kinds(tables_of(op)):
        return kind.read(text, model, sizes)
    names = ", ".join(kind.kind for kind in kinds(all_tables()))
    raise ValueError(f"shape {text!r}: what stands before the colon must be any of {names}")


def kinds(tables: Sequence[Table]) -> list[type[Shape]]:
    """The kinds of their shapes, those that are written with a kind."""
    return [kind for kind in dict.fromkeys(t.shape for t in tables) if kind is not LossShape]


def build_case(
    name: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    """A table's case, with every variant that can run; the others in ``missing``, with reasons."""
    (table,) = read_tables([name])
    return table.build(name, shape, device, dtype, peers)


def describe_ops() -> str:
    """A line for each op, its tables and how its shapes are written."""
    lines = []
    for op in dict.fromkeys(table.op for table in all_tables()):
        tables = tables_of(op)
        module = importlib.import_module(tables[0].build.__module__)
        summary = (module.__doc__ or "").partition("\n")[0].replace("``", "")
        lines += [f"  {op}", f"      {summary}"]
        parts = [table.name for table in tables if table.name != op]
        if parts:
            lines.append(f"      tables: {', '.join(parts)}")
        for kind in kinds(tables):
            models = f" (MODEL: {', '.join(kind.models)})" if kind.models else ""
            lines.append(f"      shapes: {kind.form()}{models}")
    return "\n".join(lines)


def _modules() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.ispkg]
