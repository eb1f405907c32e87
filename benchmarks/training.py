"""Supervised training end to end, against the plain ``transformers.Trainer``; GFlowGR-TB's cost.

Every variant trains a copy of the same T5 once over the same examples: batches of as many prompts,
as many steps. The clock runs around ``trainer.train()`` and so around everything: order, collation,
forward, backward, clipping, optimiser, logs. Histories are as long as those of Amazon Beauty's
users; items and identifiers are random, which the cost does not depend on.
"""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.checking import Check, relative_error
from benchmarks.harness.constraints import random_tokens
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, CODES, LENGTH, Shape
from gflowgr.collaborative import SASRec, SASRecConfig
from gflowgr.data import Dataset, LeaveOneOut, Ragged
from gflowgr.models import FlowSettings, GFlowModel, IdentifierVocabulary, TigerConfig, build_tiger
from gflowgr.models.t5_on_cpu import use_dense_attention
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer
from gflowgr.training.batches import PromptCollator
from gflowgr.tree import PrefixTree

_HISTORY = 20
_SEED = 0
_CHECKED = 64  # examples whose loss is compared
_LIMITS = {"float32": 1e-5, "bfloat16": 1e-3}
"""Relative error of the loss in each precision."""

_SIZES = {
    "small": TigerConfig(96, d_ff=384, d_kv=24, num_heads=4, num_layers=2, dropout=0.0),
    "tiger": TigerConfig(),
}

_BEAUTY_EVENTS = (
    *(7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112, 117),
    *(84, 66, 73, 74, 61, 54, 44, 44, 38, 30, 38, 20, 19, 21, 19, 23, 24, 22, 15, 17, 7, 10, 10),
    *(15, 7, 11, 8, 4, 8, 9, 8, 9, 6, 8, 2, 6, 4, 7, 94),
)
"""Users of Amazon Beauty with 5, 6, ... 59, and with 60 or more interactions."""


@dataclass(frozen=True)
class TrainingShape(Shape):
    """A whole training: sizes of T5, prompts of a step, steps, items."""

    kind: ClassVar[str] = "training"
    models: ClassVar[tuple[str, ...]] = tuple(_SIZES)
    example: ClassVar[str] = "128x16x12101"
    few: ClassVar[dict[str, int]] = {"steps": 2}
    model: str
    prompts: int
    steps: int
    items: int

    @property
    def examples(self) -> int:
        """Examples of all steps."""
        return self.prompts * self.steps


@dataclass(frozen=True)
class _World:
    """Data, model and arguments that all variants share."""

    shape: TrainingShape
    device: torch.device
    model: GFlowModel  # where all start
    collaborative: SASRec

    @classmethod
    def build(cls, shape: TrainingShape, device: torch.device) -> _World:
        vocabulary = IdentifierVocabulary((CODES,) * LENGTH)
        tokens = torch.from_numpy(random_tokens(shape.items, vocabulary.offset))
        backbone = build_tiger(vocabulary, _SIZES[shape.model], seed=_SEED)
        tree = PrefixTree.from_identifiers(tokens)
        settings = FlowSettings(objective="sft", max_history=_HISTORY)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            sasrec = SASRec(SASRecConfig(shape.items, d_model=64, max_length=_HISTORY))
        return cls(shape, device, GFlowModel(backbone, tree, vocabulary, settings), sasrec)

    def split(self, seed: int) -> LeaveOneOut:
        """Random users who together have exactly the examples of all steps."""
        rng = np.random.default_rng([_SEED, seed])
        shares = np.array(_BEAUTY_EVENTS) / sum(_BEAUTY_EVENTS)
        wanted = self.shape.examples
        # Of a user's events two are held out and the first is no target.
        examples = rng.choice(len(shares), size=wanted, p=shares) + 5 - 3
        users = int(np.searchsorted(examples.cumsum(), wanted)) + 1
        examples = examples[:users]
        examples[-1] -= examples.sum() - wanted
        items = rng.integers(0, self.shape.items, int(examples.sum()) + 3 * users)
        sequences = Ragged.from_lengths(examples + 3, items.astype(np.int32))
        names = [str(user) for user in range(users)]
        dataset = Dataset("random", names, sequences, self.shape.items)
        return LeaveOneOut(dataset, max_history=_HISTORY)

    def arguments(self, folder: str, **more: Any) -> dict[str, Any]:
        """The arguments of both trainers."""
        return {
            "output_dir": folder,
            "use_cpu": self.device.type == "cpu",
            "per_device_train_batch_size": self.shape.prompts,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 50,
            "remove_unused_columns": False,
            **more,
        }


class _Row(ABC):
    """A way of training: a fresh trainer for each round, and the loss that it minimises."""

    def __init__(self, world: _World, **options: Any) -> None:
        self.world, self.options = world, options
        self.folder = tempfile.TemporaryDirectory()
        self.trainer: Any = None

    @property
    def precision(self) -> str:
        """The dtype of the matrix products."""
        return "bfloat16" if self.trainer.args.bf16 else "float32"

    @abstractmethod
    def make(self, model: GFlowModel, split: LeaveOneOut) -> Any:
        """A trainer of ``model``."""

    def loss(self, model: GFlowModel, batch: Mapping[str, Tensor]) -> Tensor:
        """Token-summed negative log-likelihood, mean over prompts."""
        flow = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = self.world.model.item_tokens().to(model.device)[batch["target"]]
        loss: Tensor = model(**flow, tokens=tokens.unsqueeze(1))["loss"]
        return loss

    def prepare(self, inputs: Inputs) -> None:
        """Have a new trainer of the initial weights, before the clock starts."""
        model = copy.deepcopy(self.world.model)
        self.trainer = self.make(model, self.world.split(int(inputs["seed"])))
        self.trainer.callback_handler.callbacks[:] = [
            c for c in self.trainer.callback_handler.callbacks if "Printer" not in type(c).__name__
        ]

    @torch.enable_grad()
    def train(self, inputs: Inputs) -> Callable[[], tuple[Tensor, str]]:
        """The whole training."""
        self.trainer.train()
        if self.trainer.state.global_step != self.world.shape.steps:
            raise AssertionError(f"{self.trainer.state.global_step} steps were taken")
        return partial(self.outcome, inputs)

    @torch.no_grad()
    def outcome(self, inputs: Inputs) -> tuple[Tensor, str]:
        """The loss of the first examples at the initial weights, and its precision."""
        model = copy.deepcopy(self.world.model).to(self.world.device).eval()
        self.ready(model)
        device, half = self.world.device.type, self.precision == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=half):
            return self.loss(model, _first_examples(self.world, inputs)), self.precision

    @abstractmethod
    def ready(self, model: GFlowModel) -> None:
        """The trainer's changes to a model."""


class _Ours(_Row):
    def __init__(self, world: _World, objective: str, **options: Any) -> None:
        super().__init__(world, **options)
        self.objective = objective

    def make(self, model: GFlowModel, split: LeaveOneOut) -> GFlowGRTrainer:
        args = self.world.arguments(self.folder.name, **self.options)
        collaborative = None
        if self.objective != "sft":
            model = model.with_settings(objective=self.objective)
            collaborative = self.world.collaborative
        return GFlowGRTrainer(model, GFlowGRConfig(**args), split, collaborative=collaborative)

    def ready(self, model: GFlowModel) -> None:
        use_dense_attention(model.backbone)


class _Plain(_Row):
    """``transformers.Trainer`` on the bare T5: float32, random order, padded to the longest."""

    def make(self, model: GFlowModel, split: LeaveOneOut) -> Any:
        from transformers import Trainer, TrainingArguments

        tokens = model.item_tokens().cpu()
        collate = PromptCollator(tokens, _HISTORY, model.prompt)

        def collator(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            batch = collate(examples)
            labels = tokens[batch["target"]]
            return {n: batch[n] for n in ("input_ids", "attention_mask")} | {"labels": labels}

        args = TrainingArguments(**self.world.arguments(self.folder.name, bf16=False))
        backbone: Any = model.backbone
        return Trainer(backbone, args, train_dataset=split.train, data_collator=collator)

    def ready(self, model: GFlowModel) -> None:
        """No changes."""

    def loss(self, model: GFlowModel, batch: Mapping[str, Tensor]) -> Tensor:
        tokens = self.world.model.item_tokens().to(model.device)[batch["target"]]
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        backbone: Any = model.backbone
        loss: Tensor = backbone(**prompts, labels=tokens).loss
        return loss * LENGTH  # theirs is the mean over tokens


def _build(
    table: str,
    shape: TrainingShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    """SFT by our trainer as it is and in float32, by the plain Trainer, and our GFlowGR-TB."""
    world = _World.build(shape, device)
    plain = _Plain(world)
    case = Case(
        table,
        shape,
        device,
        dtype,
        lambda seed: Inputs({"seed": torch.tensor(seed)}),
        {"transformers, float64": partial(_reference, world, plain)},
        judge=_judge,
        tolerance=_LIMITS["float32"],
        uncounted="a whole training holds what its framework holds",
        examples=shape.examples,
    )
    rows: list[tuple[str, str, _Row]] = [
        ("gflowgr, SFT", "", _Ours(world, "sft")),
        ("gflowgr, SFT, float32", "", _Ours(world, "sft", bf16=False)),
        ("gflowgr, TB", "tb", _Ours(world, "tb")),
    ]
    if "transformers" in peers:
        rows.append(("transformers Trainer", "transformers", plain))
    flops = _flops(world)
    weights = float(sum(p.numel() * p.element_size() for p in world.model.parameters()))
    case.floors["SFT"] = Floor(flops, weights * shape.steps)
    for name, family, row in rows:
        floor = None if family == "tb" else "SFT"
        case.variants.append(
            Variant(
                name,
                family,
                row.train,
                "transformers, float64",
                floor,
                trains=False,
                prepare=row.prepare,
            )
        )
    case.missing.append(
        (
            "cornac's TIGER",
            "its fit() learns identifiers of its own and trains on sessions, so that neither the "
            "examples nor the weights can be the same",
        )
    )
    case.notes += [
        f"a run is {shape.examples:,} examples in {shape.steps} steps; loss of {_CHECKED} of them "
        f"compared at the initial weights, to {_LIMITS['float32']:g} in float32 and "
        f"{_LIMITS['bfloat16']:g} in bfloat16",
        "'faster, tb' of gflowgr, SFT is what a GFlowGR-TB training costs, in SFT trainings",
        "the floor has the real tokens' products, none of padding, at the float32 rate",
    ]
    return case


def _first_examples(world: _World, inputs: Inputs) -> dict[str, Tensor]:
    split, model = world.split(int(inputs["seed"])), world.model
    collate = PromptCollator(model.item_tokens().cpu(), _HISTORY, model.prompt)
    examples = [split.train[index] for index in range(min(_CHECKED, len(split.train)))]
    return {name: value.to(world.device) for name, value in collate(examples).items()}


@torch.no_grad()
def _reference(world: _World, plain: _Plain, inputs: Inputs) -> Tensor:
    model = copy.deepcopy(world.model).to(world.device).double().eval()
    return plain.loss(model, _first_examples(world, inputs))


def _judge(found: Callable[[], tuple[Tensor, str]], wanted: Tensor) -> Check:
    loss, precision = found()
    error, limit = relative_error(loss, wanted), _LIMITS[precision]
    if not error <= limit:  # NaN is wrong too
        reason = f"the loss is off by {error:.2g}, over {limit:g} ({precision})"
        return Check("wrong", reason, error)
    return Check("ok", result_error=error)


def _flops(world: _World) -> float:
    """FLOPs of forward and backward of all examples without padding: one prompt of each length."""
    lengths, counts = np.unique(world.split(_SEED).train.lengths, return_counts=True)
    model = copy.deepcopy(world.model).train()
    tokens = model.item_tokens()[:1]
    total = 0.0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        ids = torch.full((1, length * LENGTH + 1), 2)
        backbone: Any = model.backbone
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            backbone(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=tokens
            ).loss.backward()
        total += count * float(counter.get_total_flops())
    return total


register(
    Table(
        "training",
        _build,
        TrainingShape,
        on_cpu=(TrainingShape("small", 128, 16, BEAUTY_ITEMS),),
        on_gpu=(TrainingShape("tiger", 1024, 64, BEAUTY_ITEMS),),
    )
)
