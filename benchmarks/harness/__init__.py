"""The harness of all benchmarks: cases, checks, clocks, memory, floors, bars and reports.

Every variant of a case is first compared with a reference, and is timed only if it is right. Then
all variants of a case run in turns on the same fresh data, with a fixed canary between the rounds,
and peak extra memory is counted in a process of its own. ``benchmarks/README.md`` explains the
columns.

Modules: ``registry`` and ``shapes`` (what can be asked for), ``case`` (a table at a shape),
``inputs``, ``models`` and ``constraints`` (data), ``plain``, ``peers`` and ``ours`` (what is
compared), ``checking`` and ``judging`` (is it right), ``measuring``, ``memory`` and ``floors`` (how
it is measured), ``running``, ``report``, ``bars``, ``plots``. The cases themselves are in the
modules above, one per op.
"""

from __future__ import annotations
