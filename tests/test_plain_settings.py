"""Settings become plain Python values when they are made, or are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args

from gflowgr.collaborative.sasrec import SASRecConfig
from gflowgr.identifiers.letter import LetterConfig
from gflowgr.models import CausalConfig, FlowSettings, TigerConfig
from gflowgr.models.lora import LoraSettings
from gflowgr.models.prompts import PromptLayout
from gflowgr.runs.config import RunConfig
from gflowgr.runs.sections import CollaborativeConfig, DataConfig, EvaluationConfig
from gflowgr.samplers import SamplerSettings

MADE: list[Any] = [
    lambda: FlowSettings(
        objective=np.str_("tb"),
        beta=np.float32(0.5),
        max_history=np.int64(5),
        log_reward_floor=torch.tensor(-3.0),
        signals=np.array(["r_a", "r_sim"]),
    ),
    lambda: SamplerSettings(
        kind={np.str_("random"): np.float32(1), "logs": np.int64(2)},
        window=np.int32(4),
        alpha=np.float16(1),
    ),
    lambda: LoraSettings(r=np.int64(4), alpha=np.float32(8), target_modules=np.array(["q_proj"])),
    lambda: CausalConfig(Path("model"), max_prompt=np.uint16(50), from_config=np.bool_(True)),
    lambda: TigerConfig(d_model=np.int64(16), dropout=np.float32(0.5)),
    lambda: PromptLayout(prefix=np.array([1, 2]), max_items=np.int64(3)),
    lambda: SASRecConfig(np.int64(20), dropout=np.float32(0.5)),
    lambda: LetterConfig(levels=np.int64(2), alignment=np.float32(0.5), hidden=np.array([8, 4])),
    lambda: DataConfig(path=Path("data"), users=np.int64(20)),
    lambda: CollaborativeConfig(learning_rate=np.float32(0.5)),
    lambda: EvaluationConfig(num_beams=np.int64(4), max_users=5.0),
    lambda: RunConfig("out", seed=np.int64(3), finetune={"adam_beta1": np.float32(0.5)}),
]


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in leaves(part)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.mark.parametrize("make", MADE, ids=lambda make: str(MADE.index(make)))
def test_scalars_of_numpy_and_torch_become_plain(make: Any) -> None:
    values = dataclasses.asdict(make())
    assert {type(leaf) for leaf in leaves(values)} <= {bool, int, float, str, type(None)}
    assert json.loads(json.dumps(values))


def test_training_arguments_become_plain(tmp_path: Path) -> None:
    args = make_args(
        tmp_path,
        learning_rate=np.float32(0.5),
        max_steps=np.int64(4),
        num_trajectories=np.int64(3),
        partition_learning_rate=np.float32(0.25),
        sampler_options={"window": np.int64(3)},
        behaviour_values={"click": np.float32(2), "purchase": 1},
    )
    values = [args.learning_rate, args.max_steps, args.num_trajectories]
    values += [args.partition_learning_rate, args.sampler_options, args.behaviour_values]
    assert values == [0.5, 4, 3, 0.25, {"window": 3}, {"click": 2.0, "purchase": 1}]
    assert {type(leaf) for leaf in leaves(values)} <= {int, float, str}
    json.dumps(args.to_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlowSettings(beta="0.5"), "beta must be a number; got '0.5'"),
        (lambda: FlowSettings(beta=True), "beta must be a number; got True"),
        (lambda: FlowSettings(beta=np.float32("nan")), "beta must be finite and > 0; got nan"),
        (lambda: FlowSettings(beta=None), "beta must be a number; got None"),
        (lambda: FlowSettings(max_history=5.5), "max_history must be an integer; got 5.5"),
        (lambda: FlowSettings(forward_looking=1), "forward_looking must be true or false; got 1"),
        (lambda: FlowSettings(signals="r_a"), "signals must be a list, each a text; got 'r_a'"),
        (lambda: FlowSettings(signals=[1]), r"signals\[0\] must be a text; got 1"),
        (lambda: FlowSettings(objective=["tb"]), r"objective must be one of .*; got \['tb'\]"),
        (lambda: SamplerSettings(window="4"), "window must be an integer or None; got '4'|window"),
        (lambda: SamplerSettings(kind=3), "kind must be a text or a mapping; got 3"),
        (lambda: LoraSettings(r=1.5), r"lora\.r must be an integer; got 1.5"),
        (lambda: TigerConfig(num_layers=0), "num_layers must be >= 1; got 0"),
        (lambda: TigerConfig(dropout=1.0), r"dropout must be in \[0, 1\); got 1.0"),
        (lambda: CollaborativeConfig(kind="gru"), r"kind must be one of .*; got 'gru'"),
        (lambda: EvaluationConfig(num_beams=0), "num_beams must be finite and > 0; got 0"),
        (lambda: DataConfig(users=np.array([1, 2])), r"users must be an integer; got \[1, 2\]"),
        (lambda: CausalConfig("m", max_prompt=0), "max_prompt must be >= 1; got 0"),
        (lambda: PromptLayout(prefix=("a",)), r"prefix\[0\] must be an integer; got 'a'"),
    ],
)
def test_a_bad_value_is_named_on_construction(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_training_arguments_are_named(tmp_path: Path) -> None:
    for name, value in (("num_trajectories", 2.5), ("eval_beams", "4"), ("eval_max_users", "all")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            make_args(tmp_path, **{name: value})
