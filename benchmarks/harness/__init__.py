"""Benchmarks against plain PyTorch and other projects: ``gflowgr bench``.

Every variant of a case is first compared with a reference, and is timed only if it is right. Then
all variants of a case run in turns on the same fresh data, with a fixed canary between the rounds,
and peak extra memory is counted in a process of its own. ``benchmarks/README.md`` explains the
columns.

Modules: ``shapes`` (what can be asked for), ``inputs``, ``constraints`` and ``plain`` (data, plain
PyTorch), ``peers`` and ``ours`` (what is compared), ``case``, ``cases``, ``step_cases``,
``model_cases``, ``tree_cases`` (put together), ``checking``, ``judging``, ``measuring``,
``memory``, ``floors`` (how it is measured), ``running``, ``report``, ``bars``, ``plots``. Only
``command`` is imported with the command line; the rest when a benchmark runs.
"""

from __future__ import annotations
