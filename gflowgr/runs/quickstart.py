"""The experiment of ``gflowgr quickstart``: the shipped one, on built-in data or one's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Dataset, generate_builtin, load_dataset
from .pool import Resources
from .prepare import split_of
from .spec import ExperimentSpec, Values, merge, shipped_specs
from .work import check_reward
from .yaml_file import read_yaml

__all__ = ["quickstart_resources", "quickstart_spec"]

_METHOD = "GFlowGR"
_FEW_REPEATS = 0.01
"""Share of the events up to which data count as such without repeats."""
_OBSERVED_SHARE = 0.3
"""``flow.observed_share`` for data with behaviours, as in the experiment ``behaviours``."""


def quickstart_spec(
    *,
    data: str | None = None,
    identifiers: str | None = None,
    seed: int = 42,
    split: str | None = None,
    target_behaviour: str | None = None,
    behaviour_values: Mapping[str, float] | None = None,
    say: Callable[[str], None] = print,
) -> ExperimentSpec:
    """The shipped experiment ``quickstart``, also on a dataset of one's own.

    On data of one's own: where behaviours are recorded, their values weigh the observed item in
    the reward; where more than a hundredth of the events are repeats, items of the past keep
    their reward and are recommended, too.

    Args:
        data: folder of a dataset; None: the built-in one.
        identifiers: name of the identifiers, if the dataset has several.
        seed: seeds everything but the built-in data.
        split: how events are held out; None: each user's last.
        target_behaviour: behaviour of the held-out events; None: any.
        behaviour_values: reward of events by behaviour; None: known names have a default.
        say: receives what was found out of the data, a line each.

    Raises:
        ConfigError: the data do not have what is asked for, or a behaviour has no reward.
        DataError: the data are damaged.
    """
    values = read_yaml(shipped_specs()["quickstart"]) | {"seeds": [seed]}
    asked = {"split": split, "target_behaviour": target_behaviour}
    chosen = {name: value for name, value in asked.items() if value is not None}
    changes: Values = {"data": chosen}
    if behaviour_values:
        changes["finetune"] = {"behaviour_values": dict(behaviour_values)}
    values["base"] = merge(values["base"], changes)
    if data is not None:
        dataset = load_dataset(data)
        _adapt(values, dataset, str(data), identifiers, say)
    elif chosen or behaviour_values:
        dataset = generate_builtin()
    else:
        return ExperimentSpec.from_dict(values, source="quickstart")
    # A cell would find this out, too, but in a process of its own, and say so in its log.
    spec = ExperimentSpec.from_dict(values, source="quickstart")
    (variant,) = spec.variants
    config = spec.config(variant, next(each for each in spec.methods if each.name == _METHOD))
    parts = split_of(dataset, config.data)
    found = check_reward(config, parts)
    if found:
        say(f"Behaviours: {found}")
        if data is not None:
            change: Values = {"flow": {"observed_share": _OBSERVED_SHARE}}
            values["methods"][_METHOD] = merge(values["methods"][_METHOD], change)
    return ExperimentSpec.from_dict(values, source="quickstart")


def _adapt(
    values: dict[str, Any],
    dataset: Dataset,
    path: str,
    identifiers: str | None,
    say: Callable[[str], None],
) -> None:
    """Put a dataset in the place of the built-in one."""
    name = re.sub(r"[^\w.-]+", "_", Path(path).resolve().name).lstrip("_.-") or "data"
    own: Values = {"data": {"path": path}}
    if identifiers is not None:
        own["identifiers"] = [identifiers]
    values["datasets"] = {name: own}
    values["title"] = f"The whole job, small, on {name}"
    repeats = _repeats(dataset)
    if repeats > _FEW_REPEATS:
        say(f"Repeats: {repeats:.0%} of the events; items of the past are recommended, too")
        changes: Values = {"evaluation": {"mask_seen": False}, "flow": {"seen_items": "keep"}}
        values["base"] = merge(values["base"], changes)


def _repeats(dataset: Dataset) -> float:
    """Share of the events whose user had the item before."""
    users = np.repeat(np.arange(dataset.num_users), dataset.sequences.lengths)
    pairs = users * dataset.num_items + dataset.sequences.values
    return 1 - len(np.unique(pairs)) / max(1, len(pairs))


def quickstart_resources() -> Resources:
    """Two cells at a time on the cores of a CPU, else one for each GPU."""
    if torch.cuda.is_available():
        return Resources.of_machine()
    return Resources.of_machine(workers=min(2, len(os.sched_getaffinity(0))))
