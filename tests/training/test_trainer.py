"""GFlowGRTrainer: what it optimises, logs and measures."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_shop import make_args, make_model, make_scorer, shop
from support.tiny_trainer import (
    make_trainer,
    steps,
    weights,
)
from transformers import TrainerCallback

from gflowgr.collaborative import CollaborativeModel, EmbeddingScorer
from gflowgr.rewards import SignalContext
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer

# ---- the objective ----


def test_logs(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, max_steps=3, logging_steps=1, num_trajectories=4))
    trainer.train()
    assert [entry["step"] for entry in steps(trainer)] == [1, 2, 3]
    for entry in steps(trainer):
        joint = entry["loss_gr"] + entry["loss_gfn"]
        assert entry["loss"] == pytest.approx(joint, rel=1e-5)
        assert math.isfinite(entry["log_z"])
        assert math.isfinite(entry["log_z_group"])
        assert entry["log_z_gap_rms"] >= abs(entry["log_z"] - entry["log_z_group"]) - 1e-4
        assert 1 <= entry["reward/r_a"] <= 10
        assert entry["reward_augmented/r_a"] == 0
        assert entry["reward/r_sim"] == 4  # equal to itself at every position
        assert 0 <= entry["reward_augmented/r_sim"] < 2
        assert 0 < entry["reward_augmented/r_yhat"] < 1
        quantiles = [entry[f"difficulty/q{percent}"] for percent in (10, 50, 90)]
        assert 0 <= quantiles[0] <= quantiles[1] <= quantiles[2] <= 1
        assert entry["seconds"] > 0
        assert entry["tokens_per_second"] > 0


def test_every_epoch_sees_every_example_in_another_order(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, max_steps=12))
    collate, seen = trainer.data_collator, []

    def recording(examples: Any) -> Any:
        seen.append([example["example"] for example in examples])
        return collate(examples)

    trainer.data_collator = recording
    trainer.train()
    epochs = [[index for batch in seen[at : at + 6] for index in batch] for at in (0, 6)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(shop().train)))
    assert epochs[0] != epochs[1]


def test_curriculum_gets_harder(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, max_steps=6))
    trainer.train()
    medians = [entry["difficulty/q50"] for entry in steps(trainer)]
    assert medians[0] < 0.4 < 0.6 < medians[-1]


def test_behaviours_reach_the_reward(tmp_path: Path) -> None:
    """One step over all examples, so the mean of r_a is known."""
    split = shop()
    events = [split.train[i]["behaviour"] for i in range(len(split.train))]
    bought = events.count(split.dataset.behaviour_names.index("purchase"))
    clicked = events.count(split.dataset.behaviour_names.index("click"))
    assert bought + clicked == len(events)
    assert min(bought, clicked) > 100
    for values, worth in ((None, (10.0, 1.0)), ({"purchase": 3.0, "click": 2.0}, (3.0, 2.0))):
        args = make_args(
            tmp_path, per_device_train_batch_size=len(events), max_steps=1, behaviour_values=values
        )
        trainer = make_trainer(args)
        trainer.train()
        expected = (worth[0] * bought + worth[1] * clicked) / len(events)
        assert steps(trainer)[0]["reward/r_a"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"partition": "learned"},
        {"partition": "scalar"},
        {"partition": "vargrad"},
        {"objective": "db", "normalize": "level"},
        {"objective": "db", "forward_looking": True},
        {"objective": "subtb", "normalize": "children"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_flow_loss_falls(settings: dict[str, Any], tmp_path: Path) -> None:
    args = make_args(
        tmp_path,
        per_device_train_batch_size=64,
        max_steps=25,
        learning_rate=1e-2,
        sampler="random",
        lr_scheduler_type="constant",
    )
    trainer = make_trainer(args, make_model(**settings))
    trainer.train()
    losses = [entry["loss_gfn"] for entry in steps(trainer)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_works_without_a_collaborative_model(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, sampler="random"), scorer=False)
    trainer.train()
    entry = steps(trainer)[0]
    assert not [name for name in entry if name.startswith("difficulty")]
    assert entry["reward/r_yhat"] == 0


@dataclasses.dataclass
class Step:
    """What the first step of a training was given, and what the model said before it.

    Attributes:
        items: of the trajectories [B, N].
        signals: the reward's signals [B, N, K].
        log_pf: log P(trajectory | prompt) [B, N].
        scores: the collaborative model's, of the whole catalogue [B, items], if there is one.
        behaviours: codes of the positives [B].
        entry: what was logged.
    """

    items: torch.Tensor
    signals: torch.Tensor
    log_pf: torch.Tensor
    scores: torch.Tensor | None
    behaviours: torch.Tensor
    entry: dict[str, float]


def first_step(
    folder: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    scorer: CollaborativeModel | None,
) -> Step:
    args = make_args(folder, per_device_train_batch_size=64, max_steps=1, **options)
    model = make_model(**settings)
    trainer = GFlowGRTrainer(model, args, shop(), collaborative=scorer)
    step, seen = trainer.compute_loss, {}

    def look(module: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        seen.update(inputs)
        return step(module, inputs, *rest, **more)

    def look_at_the_flow(module: Any, _: Any, flow: dict[str, Any]) -> None:
        seen.update(flow, log_pf=model.log_probs(flow))

    trainer.compute_loss = look
    with model.register_forward_pre_hook(look_at_the_flow, with_kwargs=True):
        trainer.train()
    item_of = {tuple(row): item for item, row in enumerate(model.item_tokens().tolist())}
    items = [[item_of[tuple(row)] for row in rows] for rows in seen["tokens"].tolist()]
    scores = None if scorer is None else scorer.score(seen["histories"])
    return Step(
        torch.tensor(items),
        seen["signals"],
        seen["log_pf"],
        scores,
        seen["behaviour"],
        steps(trainer)[0],
    )


def expected_signal(name: str, step: Step) -> torch.Tensor:
    """A signal [B, N] by its definition, of one trajectory at a time."""
    rows, columns = step.items.shape
    tokens, names = make_model().item_tokens(), shop().dataset.behaviour_names
    found = torch.zeros(rows, columns)
    for b in range(rows):
        for n in range(columns):
            item = int(step.items[b, n])
            if name == "r_sim":
                found[b, n] = (tokens[item] == tokens[step.items[b, 0]]).sum()
            elif name == "r_generation":
                found[b, n] = math.exp(step.log_pf[b, n] / tokens.shape[1])
            elif name == "r_a" and n == 0:
                found[b, n] = {"purchase": 10.0, "click": 1.0}[names[step.behaviours[b]]]
            elif name == "r_yhat" and step.scores is not None:
                row = step.scores[b].double()
                z = (row[item] - row.mean()) / row.std(correction=0)
                found[b, n] = math.log1p(math.exp(z))
    return found


@pytest.mark.parametrize(
    ("settings", "options", "scorer"),
    [
        ({"signals": ["r_yhat", "r_sim"]}, {}, True),  # r_a off
        ({"signals": ["r_a", "r_sim"]}, {"sampler": "random"}, False),  # no collaborative model
        ({"signals": ["r_a", "r_yhat"]}, {}, True),  # r_sim off
        ({}, {"sampler": "random"}, True),  # no curriculum
        ({}, {"num_trajectories": 1}, True),  # no augmented trajectories
        ({"signals": ["r_a", "r_generation"]}, {"sampler": "random"}, False),
    ],
    ids=["no-r_a", "no-cm", "no-r_sim", "no-curriculum", "no-augmented", "generation"],
)
def test_ablations(
    settings: dict[str, Any], options: dict[str, Any], scorer: bool, tmp_path: Path
) -> None:
    """Everything the paper leaves out in turn can be left out here.

    The loss sees the signals that are named and no others, with the values of their definitions;
    and items depend on the collaborative model with the curriculum alone.
    """
    step = first_step(tmp_path / "one", settings, options, make_scorer() if scorer else None)
    names = settings.get("signals", ["r_a", "r_yhat", "r_sim"])
    wanted = torch.stack([expected_signal(name, step) for name in names], -1)
    torch.testing.assert_close(step.signals, wanted, rtol=1e-4, atol=1e-4)
    assert all(bool(signal.any()) for signal in wanted.unbind(-1))

    log_z = (wanted.sum(-1).clamp_min(1e-6).log() - step.log_pf).mean()
    assert step.entry["log_z_group"] == pytest.approx(log_z.item(), rel=1e-4)
    means = {f"reward/{name}": wanted[:, 0, k].mean().item() for k, name in enumerate(names)}
    if step.items.shape[1] > 1:
        others = wanted[:, 1:].flatten(0, 1).mean(0).tolist()
        means |= {f"reward_augmented/{n}": v for n, v in zip(names, others, strict=True)}
    logged = {name: value for name, value in step.entry.items() if name.startswith("reward")}
    assert logged == pytest.approx(means, rel=1e-4)

    assert step.items.shape[1] == options.get("num_trajectories", 3)
    if scorer:
        table = torch.randn(200, 4, generator=torch.Generator().manual_seed(6))
        other = first_step(tmp_path / "two", settings, options, EmbeddingScorer(table))
        by_curriculum = "sampler" not in options and step.items.shape[1] > 1
        assert torch.equal(step.items, other.items) == (not by_curriculum)


class RareItems:
    """A signal of a user's own: the second half of the catalogue is worth 2 more."""

    name = "r_rare"

    def __call__(self, context: SignalContext) -> torch.Tensor:
        return 2.0 * (context.items >= 100).float()


def test_a_signal_of_ones_own(tmp_path: Path) -> None:
    model = make_model(signals=["r_a", f"{__name__}:RareItems"])
    args = make_args(tmp_path, per_device_train_batch_size=64, max_steps=1, sampler="random")
    trainer = make_trainer(args, model)
    trainer.train()
    assert 0 < steps(trainer)[0]["reward_augmented/r_rare"] < 2


@pytest.mark.parametrize("fusion", ["weighted", "mlp"])
def test_a_learned_fusion_trains_and_stays_near_the_sum(fusion: str, tmp_path: Path) -> None:
    model = make_model(fusion=fusion)
    args = make_args(
        tmp_path,
        per_device_train_batch_size=64,
        max_steps=15,
        fusion_learning_rate=0.02,
        lr_scheduler_type="constant",
    )
    trainer = make_trainer(args, model)
    before = weights(trainer)
    trainer.train()
    after, last = weights(trainer), steps(trainer)[-1]
    names = [name for name in before if name.startswith("fusion.")]
    assert all(not torch.equal(before[name], after[name]) for name in names)
    assert 0 < last["loss_fusion"] < 0.5
    if fusion == "weighted":
        learned = [last[f"fusion/{name}"] for name in ("r_a", "r_yhat", "r_sim")]
        assert np.mean(learned) == pytest.approx(1.0)
        assert min(learned) > 0.3


def test_one_trajectory_is_the_positive_alone(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, num_trajectories=1))
    trainer.train()
    assert not [name for name in steps(trainer)[0] if name.startswith("reward_augmented")]


def test_sft_logs_the_likelihood_only(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path), make_model(objective="sft"), scorer=False)
    trainer.train()
    assert steps(trainer)[0]["loss"] == steps(trainer)[0]["loss_gr"]
    assert "loss_gfn" not in steps(trainer)[0]


# ---- log Z ----


@pytest.mark.parametrize(
    "settings",
    [{"partition": "learned"}, {"partition": "scalar"}, {"objective": "db"}],
    ids=["learned", "scalar", "db"],
)
def test_log_z_starts_at_the_group_estimate(settings: dict[str, Any], tmp_path: Path) -> None:
    """Started at zero, the first flow loss would be the square of a log-likelihood."""
    first = {}
    for started in (True, False):
        model = make_model(**settings)
        head = model.partition or model.state_flow
        assert head is not None
        head.initialised.fill_(not started)
        trainer = make_trainer(make_args(tmp_path, max_steps=1), model)
        trainer.train()
        first[started] = steps(trainer)[0]
    assert first[True]["log_z"] == pytest.approx(first[True]["log_z_group"], rel=1e-4)
    assert first[True]["log_z"] > 5
    assert first[False]["log_z"] == 0
    assert first[True]["loss_gfn"] < 0.1 * first[False]["loss_gfn"]


@pytest.mark.parametrize(("objective", "head"), [("tb", "partition."), ("db", "state_flow.")])
def test_flow_heads_have_their_own_learning_rate(objective: str, head: str, tmp_path: Path) -> None:
    args = make_args(
        tmp_path,
        max_steps=2,
        learning_rate=0.0,
        weight_decay=0.0,
        partition_learning_rate=0.05,
        lr_scheduler_type="constant",
    )
    trainer = make_trainer(args, make_model(objective=objective))
    before = weights(trainer)
    rates: dict[str, float] = {}
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in optimizer.param_groups:
        rates |= {names[id(parameter)]: group["lr"] for parameter in group["params"]}
    assert rates.keys() == set(names.values())
    assert {n for n, rate in rates.items() if rate == 0.05} == {
        name for name in rates if name.startswith(head)
    }
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith(head) for name in moved)


def test_weight_decay_spares_norms_and_the_partition_head(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, weight_decay=0.1))
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"] > 0
    }
    assert any("SelfAttention.q" in name for name in decayed)
    assert not [name for name in decayed if "layer_norm" in name or "partition" in name]


# ---- what goes wrong ----


class Poison(TrainerCallback):
    """Spoils a weight before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                model.backbone.shared.weight.fill_(torch.nan)


@pytest.mark.parametrize("objective", ["tb", "sft"])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(
    objective: str, tmp_path: Path
) -> None:
    args = make_args(tmp_path, max_steps=6, logging_steps=5, save_strategy="steps", save_steps=2)
    trainer = make_trainer(args, make_model(objective=objective), Poison(3))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 4; lower learning_rate"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-2"]


def test_mixed_precision_on_the_cpu(tmp_path: Path) -> None:
    """bfloat16 autocast: the same objective, to the precision of bfloat16."""
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(make_args(tmp_path, max_steps=3, bf16=bf16))
        trainer.train()
        losses[bf16] = [entry["loss"] for entry in steps(trainer)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
    assert losses[True] != losses[False]  # it did run in another precision


def test_arguments_survive_the_way_through_a_dictionary(tmp_path: Path) -> None:
    args = make_args(tmp_path, num_trajectories=5, behaviour_values={"purchase": 4.0})
    names = {field.name for field in dataclasses.fields(GFlowGRConfig)}
    assert {"num_trajectories", "behaviour_values"} <= names
    assert args.to_dict()["num_trajectories"] == 5
    assert args.to_dict()["behaviour_values"] == {"purchase": 4.0}
