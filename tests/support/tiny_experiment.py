"""An experiment small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tiny_run import tiny_run


def tiny_experiment(**sections: dict[str, Any]) -> dict[str, Any]:
    """One dataset, one seed, two methods; ``sections`` change the base."""
    base = tiny_run(Path("unused"))
    del base["output_dir"], base["seed"]
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return {
        "name": "tiny",
        "baseline": "SFT continued",
        "seeds": [1],
        "base": base,
        "datasets": {"shop": {}},
        "methods": {"SFT continued": {"flow": {"objective": "sft"}}, "GFlowGR-TB": {}},
    }
