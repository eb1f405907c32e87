"""Steps of training on whole sequences: SFT and SFT with flow KL, against SFT prompt by prompt.

Every variant is a :class:`~gflowgr.training.GFlowGRTrainer` of its own with the decoder that trains
from scratch, over the same random users: a step is what the trainer does with a collated batch,
from scores and rewards to AdamW. All learning rates are 0, so that every round steps from the same
weights. The targets of a step are the same for all: each item but the first of every sequence.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.checking import TOLERANCES, Check, relative_error
from benchmarks.harness.constraints import random_tokens
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, CODES, LENGTH, Shape
from gflowgr.collaborative import SASRec, SASRecConfig
from gflowgr.data import Dataset, LeaveOneOut, Ragged
from gflowgr.models import DecoderConfig, FlowSettings, GFlowModel, build_decoder, decoder_prompt
from gflowgr.models.vocabulary import IdentifierVocabulary
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer
from gflowgr.tree import PrefixTree

_CHECKED = 2  # sequences whose loss and gradients are compared in float64
_SEED = 0
FLOW_KL, SFT, PROMPTS = "gflowgr, SFT and flow KL", "SFT, whole sequences", "SFT, prompt by prompt"

Outcome = Callable[[], tuple[Tensor, Tensor]]
"""Of a step's first sequences, without dropout: the loss, and the gradient in float64."""


@dataclass(frozen=True)
class SequenceShape(Shape):
    """A step: sequences, targets of each, items of the catalogue."""

    kind: ClassVar[str] = "sequences"
    example: ClassVar[str] = "64x20x12101"
    few: ClassVar[dict[str, int]] = {"sequences": 2}
    sequences: int
    targets: int
    items: int


class _Trainer:
    """A trainer of one objective, over sequences or over their prompts, and its step."""

    def __init__(self, shape: SequenceShape, split: LeaveOneOut, **options: Any) -> None:
        self.whole = options.pop("whole")
        vocabulary = IdentifierVocabulary((CODES,) * LENGTH)
        tree = PrefixTree.from_identifiers(random_tokens(shape.items, vocabulary.offset))
        backbone = build_decoder(vocabulary, DecoderConfig(), max_history=shape.targets, seed=_SEED)
        settings = FlowSettings(normalize="children", max_history=shape.targets, **options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            layout = decoder_prompt(vocabulary)
            self.model = GFlowModel(backbone, tree, vocabulary, settings, layout)
            scorer = SASRec(SASRecConfig(shape.items, d_model=64, max_length=shape.targets))
        self.folder = tempfile.TemporaryDirectory()
        args = GFlowGRConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            sequences=self.whole,
            per_device_train_batch_size=shape.sequences * (1 if self.whole else shape.targets),
            max_steps=2,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
        )
        self.trainer = GFlowGRTrainer(self.model, args, split, collaborative=scorer)
        self.trainer.state.max_steps, self.trainer.state.global_step = 2, 1
        self.trainer.current_gradient_accumulation_steps = 1
        self.optimizer = self.trainer.create_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def batch(self, users: list[int]) -> dict[str, Tensor]:
        """The sequences of these users, or all their prompts."""
        examples: Any = self.trainer.train_dataset
        owner = [int(examples[i]["user"]) for i in range(len(examples))]
        of_user: dict[int, list[int]] = {}
        for index, user in enumerate(owner):
            of_user.setdefault(user, []).append(index)
        chosen = [examples[i] for user in users for i in of_user[user]]
        found: dict[str, Tensor] = self.trainer._prepare_inputs(self.trainer.data_collator(chosen))
        return found


def _build(
    table: str,
    shape: SequenceShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    """The three kinds of steps."""
    split = _split(shape)
    kl_trainer = _Trainer(shape, split, whole=True, objective="flow_kl", reward_temperature=1.0)
    sft, prompts = (_Trainer(shape, split, whole=w, objective="sft") for w in (True, False))
    rows = (
        (FLOW_KL, "", kl_trainer, "flow KL, reference"),
        (SFT, "sft", sft, "prompts, float64"),
        (PROMPTS, "prompts", prompts, "prompts, float64"),
    )
    steps = {name: _Step(trainer) for name, _, trainer, _ in rows}
    case = Case(
        table,
        shape,
        torch.device("cpu"),
        dtype,
        lambda seed: Inputs({"users": _users(shape, seed)}),
        {
            "prompts, float64": steps[PROMPTS].exact,
            "flow KL, reference": steps[FLOW_KL].exact,
        },
        judge=_judge,
        tolerance=TOLERANCES[dtype],
        examples=shape.sequences * shape.targets,
    )
    case.notes.append(
        f"{shape.sequences * shape.targets:,} targets a step; {DecoderConfig().summary()}; "
        f"compared: loss and gradients of {min(_CHECKED, shape.sequences)}, without dropout"
    )
    weights = float(sum(p.numel() * 4 for p in rows[0][2].model.parameters()))
    case.floors["weights, read once"] = Floor(0.0, weights)
    for name, family, _, reference in rows:
        if family == "prompts" and "torch" not in peers:
            continue
        case.variants.append(
            Variant(
                *(name, family, steps[name].run, reference, "weights, read once"),
                trains=False,
                prepare=steps[name].hold,
            )
        )
    return case


class _Step:
    """A trainer's step on the sequences of some users, collated before the clock."""

    def __init__(self, trainer: _Trainer) -> None:
        self.of = trainer
        self.batch: dict[str, Tensor] = {}

    def hold(self, inputs: Inputs) -> None:
        self.batch = self.of.batch(inputs["users"].tolist())

    @torch.enable_grad()
    def run(self, inputs: Inputs) -> Outcome:
        trainer, model = self.of.trainer, self.of.model
        trainer.training_step(model, dict(self.batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        self.of.optimizer.step()
        model.zero_grad()
        return partial(self.outcome, inputs)

    def outcome(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        flow = self._flow(inputs)
        self.of.model.eval()
        with torch.no_grad():
            loss: Tensor = self.of.model(**flow)["loss"]
        return loss, self._exact(flow)[1]

    def exact(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Loss and gradient in float64, where every op is its reference."""
        return self._exact(self._flow(inputs))

    def _flow(self, inputs: Inputs) -> dict[str, Tensor]:
        batch = self.of.batch(inputs["users"][:_CHECKED].tolist())
        make, log_probs = self.of.trainer._flow_inputs, self.of.model.log_probs
        flow, _ = make(batch, epoch=0, step=1, progress=0.5, log_probs=log_probs)
        return flow

    def _exact(self, flow: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model = copy.deepcopy(self.of.model).double().eval()
        wide = {k: v.double() if v.is_floating_point() else v for k, v in flow.items()}
        with torch.enable_grad():
            loss = model(**wide)["loss"]
            loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), torch.cat([found[name].flatten() for name in sorted(found)])


def _judge(found: Outcome, wanted: tuple[Tensor, Tensor]) -> Check:
    loss, gradient = found()
    errors = (relative_error(loss, wanted[0]), relative_error(gradient, wanted[1]))
    limit = TOLERANCES[torch.float32]
    if not max(errors) <= limit:
        reason = f"relative error over {limit:g}: loss {errors[0]:.2g}, gradient {errors[1]:.2g}"
        return Check("wrong", reason, *errors)
    return Check("ok", "", *errors)


def _users(shape: SequenceShape, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(2 * shape.sequences, generator=g)[: shape.sequences]


def _split(shape: SequenceShape) -> LeaveOneOut:
    """Random users, each with one window of targets; two more events for validation and test."""
    users, events = 2 * shape.sequences, shape.targets + 3
    items = np.random.default_rng(_SEED).integers(0, shape.items, users * events)
    lengths = Ragged.from_lengths(np.full(users, events), items.astype(np.int32))
    dataset = Dataset("random", [str(user) for user in range(users)], lengths, shape.items)
    return LeaveOneOut(dataset, max_history=shape.targets)


register(Table("sequences", _build, SequenceShape, on_cpu=(SequenceShape(64, 20, BEAUTY_ITEMS),)))
