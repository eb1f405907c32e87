"""A sampler, a signal, an objective and a backbone from outside the package, as in CONTRIBUTING."""

from __future__ import annotations

import math
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.command_line import Capture, call
from support.documentation import blocks, write_modules
from support.small_models import padded_prompts, small_model
from support.tiny_run import tiny_run, write_config
from support.tiny_shop import make_args, make_inputs, make_model
from support.tiny_trainer import make_trainer, steps
from torch import Tensor

import gflowgr
from gflowgr.extensions import search_path
from gflowgr.files import read_json
from gflowgr.models import output_head, trajectory_hidden_states
from gflowgr.rewards import SignalContext, make_signals
from gflowgr.runs import ConfigError, RunConfig
from gflowgr.samplers import CandidatePool, Candidates, SampleRequest, TrajectorySampler

ASKED: list[SampleRequest] = []


class NextDoor(TrajectorySampler):
    """The items whose ids follow the observed one."""

    def candidates(self, request: SampleRequest) -> Candidates:
        ASKED.append(request)
        following = np.arange(1, self.num_trajectories)
        return Candidates.augmented((request.targets[:, None] + following) % self.pool.num_items)


class Scored(NextDoor):
    needs_scores = True


class Even:
    """Items with an even id are worth twice as much."""

    name = "r_even"

    def __call__(self, context: SignalContext) -> Tensor:
        return 1.0 + (context.items % 2 == 0).float()


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """These classes as a module that is not of the package."""
    module = ModuleType("mine")
    module.__dict__.update(NextDoor=NextDoor, Scored=Scored, Even=Even, number=7)
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


@pytest.mark.parametrize("sampler", ["mine:NextDoor", {"mine:NextDoor": 0.5, "random": 0.5}])
def test_a_sampler_and_a_signal_from_outside_train(
    sampler: Any, mine: ModuleType, tmp_path: Path
) -> None:
    ASKED.clear()
    args = make_args(tmp_path, sampler=sampler, num_trajectories=3, max_steps=2)
    model = make_model(signals=["r_sim", "mine:Even"])
    trainer = make_trainer(args, model, scorer=False)
    trainer.train()
    assert ASKED
    logged = steps(trainer)[-1]
    assert math.isfinite(logged["loss"])
    assert 1.0 <= logged["reward/r_even"] <= 2.0


def test_a_sampler_with_arguments_of_its_own_is_given_to_the_trainer(tmp_path: Path) -> None:
    class Every(NextDoor):
        def __init__(self, pool: CandidatePool, num_trajectories: int, step: int) -> None:
            super().__init__(pool, num_trajectories)
            self.step = step

        def candidates(self, request: SampleRequest) -> Candidates:
            following = self.step * np.arange(1, self.num_trajectories)
            items = (request.targets[:, None] + following) % self.pool.num_items
            return Candidates.augmented(items)

    args = make_args(tmp_path, num_trajectories=3, max_steps=1)
    options = {"scorer": False, "sampler": partial(Every, step=7)}
    trainer = make_trainer(args, make_model(signals=["r_sim"]), **options)
    sampler = trainer._flow_inputs.sampler
    assert isinstance(sampler, Every)
    assert (sampler.step, sampler.num_trajectories) == (7, 3)
    trainer.train()
    assert math.isfinite(steps(trainer)[-1]["loss"])
    with pytest.raises(ValueError, match=r"sampler must be a TrajectorySampler; got .*Even"):
        make_trainer(args, scorer=False, sampler=lambda pool, count: Even())


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("mine", "sampler must be one of"),
        ("mine:Nobody", "cannot make 'mine:Nobody'"),
        ("nowhere:NextDoor", "cannot make 'nowhere:NextDoor'"),
        ("mine:Even", "cannot make 'mine:Even'"),
        ("mine:Scored", "needs a collaborative model"),
    ],
)
def test_a_sampler_that_cannot_be_had_is_refused_before_any_work(
    sampler: str, message: str, mine: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(make_args(tmp_path, sampler=sampler), scorer=False)


def test_an_objective_from_outside_is_a_loop_over_states_and_losses() -> None:
    """TB whose log Z is the free energy of the group: nothing of the trainer is needed."""
    model = make_model(objective="sft")
    inputs = make_inputs(model)
    optimizer = torch.optim.Adam(model.backbone.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        states = trajectory_hidden_states(
            model.backbone, *(inputs[n] for n in ("input_ids", "attention_mask", "tokens", "mask"))
        )
        weight, bias = output_head(model.backbone)
        log_pf = gflowgr.trajectory_logprobs(
            states.hidden, weight, inputs["tokens"], bias=bias, mask=inputs["mask"]
        )
        valid = inputs["mask"].any(-1)
        log_z = inputs["log_reward"].masked_fill(~valid, -math.inf).logsumexp(-1)
        loss = gflowgr.tb_loss(log_pf, inputs["log_reward"], log_z, mask=inputs["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_an_unknown_backbone_is_searched_by_the_general_path() -> None:
    bart = small_model("bart")
    input_ids, mask = padded_prompts("right")
    tree = gflowgr.PrefixTree.from_identifiers([[9, 20], [9, 21], [12, 20], [14, 30]])
    out = gflowgr.constrained_beam_search(bart, input_ids, mask, tree, num_beams=4)
    exact = gflowgr.item_logprobs(bart, input_ids, mask, tree)
    assert torch.equal(out.items, exact.argsort(dim=1, descending=True))
    torch.testing.assert_close(out.scores, exact.gather(1, out.items))


# ---- where the modules of names are searched ----

FRESH = """
class Fresh:
    name = "r_fresh"

    def __call__(self, context):
        return (context.items >= 100).float()
"""


@pytest.fixture
def no_folder_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's; the search path is the console script's, which lacks the cwd."""
    folder = tmp_path / "project"
    folder.mkdir()
    console = [place for place in sys.path if place and Path(place) != Path.cwd()]
    monkeypatch.setattr(sys, "path", [*console, str(Path(gflowgr.__file__).parents[1])])
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    return folder


def write_run(folder: Path, signal: str) -> Path:
    values = tiny_run(folder / "run") | {"flow": {"signals": ["r_sim", signal]}}
    return write_config(folder / "run.yaml", values)


@pytest.mark.parametrize("beside_the_file", [True, False])
def test_a_module_beside_the_yaml_or_in_the_current_folder_is_found(
    beside_the_file: bool, no_folder_beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"fresh_{'yaml' if beside_the_file else 'cwd'}"
    place = no_folder_beside if beside_the_file else no_folder_beside.parent
    (place / f"{module}.py").write_text(FRESH)
    config = RunConfig.load(write_run(no_folder_beside, f"{module}:Fresh"))
    assert [signal.name for signal in make_signals(config.flow.signals)] == ["r_sim", "r_fresh"]
    # Processes that are started find it, too.
    assert str(place.resolve()) in search_path().split(os.pathsep)


def test_a_module_that_is_nowhere_is_refused_with_the_folders_that_were_searched(
    no_folder_beside: Path,
) -> None:
    (no_folder_beside / "broken_one.py").write_text("import nothing_of_that_name\n")
    config = RunConfig.load(write_run(no_folder_beside, "gone_one:Fresh"))
    with pytest.raises(
        ValueError, match="no module 'gone_one' is installed, or in a folder"
    ) as said:
        make_signals(config.flow.signals)
    for place in (no_folder_beside, no_folder_beside.parent):
        assert str(place.resolve()) in str(said.value)
    with pytest.raises(ValueError, match="its module needs 'nothing_of_that_name', which is not"):
        make_signals(["broken_one:Fresh"])


# ---- one of each, as the page has them ----


def test_a_run_made_of_ones_own_parts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, no_drawing: None
) -> None:
    page = "docs/extending.md"
    write_modules(page, tmp_path)
    (block,) = (each for each in blocks("yaml") if each.page == page)
    values = tiny_run(tmp_path / "run")
    for section, own in yaml.safe_load(block.text).items():
        values[section] = own if section == "model" else values.get(section, {}) | own
    values["continued_sft"] = False
    for stage in ("sft", "finetune"):
        values[stage] |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1}
    config = write_config(tmp_path / "run.yaml", values)
    code, out, error = call(capsys, "train", "--config", config, "--no-progress")
    assert code == 0, error
    assert "Identifiers: my_parts:by_popularity, 200 distinct for 200 items" in out
    record = read_json(tmp_path / "run" / "results.json")
    assert list(record["methods"]) == ["SFT", "huber_balance", "AfterLast", "Popularity"]
    logged = read_json(tmp_path / "run" / "gflowgr" / "log_history.json")[0]
    assert math.isfinite(logged["loss_gfn"])
    assert 1.0 <= logged["reward/r_fresh"] <= 2.0
    model = gflowgr.GFlowModel.from_pretrained(tmp_path / "run" / "gflowgr" / "model")
    assert model.settings.objective == "my_parts:huber_balance"
    assert model.backbone.config.num_decoder_layers == 2


def test_an_objective_of_ones_own_is_joint_with_the_supervised_loss(mine: ModuleType) -> None:
    """The package's own trajectory balance, written outside, gives what ``"tb"`` gives."""

    def balance(log_pf: Tensor, log_reward: Tensor, log_z: Tensor, mask: Tensor) -> Tensor:
        return (log_z[:, None] + log_pf.sum(-1) - log_reward).square()

    mine.__dict__.update(balance=balance, scalar=lambda *given: torch.zeros(()))
    found = {}
    for objective in ("tb", "mine:balance"):
        model = make_model(objective=objective, gfn_weight=0.3, beta=2.0)
        out = model(**make_inputs(model))
        out["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found[objective] = [out["loss"], out["loss_gfn"], out["loss_gr"], *gradients]
    torch.testing.assert_close(found["mine:balance"], found["tb"], rtol=1e-4, atol=1e-5)
    model = make_model(objective="mine:scalar")
    with pytest.raises(ValueError, match=r"must give losses \[B, N\] = \(3, 4\); got \(\)"):
        model(**make_inputs(model))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("flow", {"objective": "tbb"}, "objective must be one of .* or 'module:function'"),
        ("flow", {"objective": "mine:x", "partition": "vargrad"}, "needs a learned log Z"),
        ("collaborative", {"kind": "sasrex"}, "kind must be one of .* or 'module:Class'"),
        ("model", {"kind": "mine:Even"}, "must name a dataclass with `kind`, `build`"),
        ("model", {"kind": "nowhere_at_all:X"}, "no module 'nowhere_at_all' is installed"),
    ],
)
def test_parts_that_are_none_are_refused_with_the_configuration(
    section: str, values: dict[str, Any], message: str, mine: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"output_dir": str(tmp_path), section: values})
