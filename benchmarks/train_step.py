"""A training step of GFlowGR-TB and its parts, against SFT and a forward per trajectory.

Every variant is a :class:`~gflowgr.training.GFlowGRTrainer` of its own over the same random split,
and a step is what the trainer does with a collated batch: collaborative scores, sampling, rewards,
forward, backward, clipping, AdamW. All learning rates are 0, so that every round and every variant
steps from the same weights; the optimiser's work does not depend on it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.case import Case, Variant
from benchmarks.harness.checking import TOLERANCES, Check, relative_error
from benchmarks.harness.constraints import random_tokens
from benchmarks.harness.floors import Floor
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.models import build_model
from benchmarks.harness.registry import Table, register
from benchmarks.harness.shapes import BEAUTY_ITEMS, CODES, LENGTH, Shape
from gflowgr.collaborative import SASRec, SASRecConfig
from gflowgr.data import Dataset, LeaveOneOut, Ragged
from gflowgr.models import FlowSettings, GFlowModel, TigerConfig, build_tiger
from gflowgr.models.prompts import TIGER_PROMPT, PromptLayout
from gflowgr.models.vocabulary import IdentifierVocabulary
from gflowgr.training import GFlowGRConfig, GFlowGRTrainer
from gflowgr.training.flow_inputs import FlowInputs, sample_request
from gflowgr.tree import PrefixTree

__all__ = ["SeparateForwards"]

_CHECKED = 8  # prompts whose loss and gradients are compared in float64
_DRAWS = 4  # users per prompt of a batch: each round draws others
_SEED = 0
OURS, SFT, SEPARATE = "gflowgr, TB", "SFT", "TB, a forward per trajectory"

Outcome = Callable[[], tuple[Tensor, Tensor]]
"""Of a step's batch, without dropout: the loss as it is computed, and the gradient of all weights
as one vector, in float64: a ReLU that rounding turns over changes a gradient by a thousandth."""


@dataclass(frozen=True)
class StepShape(Shape):
    """A step: a model, prompts, tokens of a prompt's history, trajectories of each, items."""

    kind: ClassVar[str] = "train_step"
    models: ClassVar[tuple[str, ...]] = ("t5", "qwen3")
    example: ClassVar[str] = "128x80x4x12101"
    few: ClassVar[dict[str, int]] = {"prompts": 2}
    model: str
    prompts: int
    source: int
    trajectories: int
    items: int

    def problem(self) -> str | None:
        """A history is whole items."""
        if self.source % LENGTH:
            return f"SOURCE must be a multiple of {LENGTH}; got {self.source}"
        return None


class SeparateForwards(GFlowModel):
    """The same objective from N forwards a prompt: a row for each trajectory and its prompt."""

    def _states(
        self, input_ids: Tensor, attention_mask: Tensor | None, tokens: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, count = tokens.shape[:2]
        hidden, pooled = super()._states(
            input_ids.repeat_interleave(count, 0),
            None if attention_mask is None else attention_mask.repeat_interleave(count, 0),
            tokens.flatten(0, 1).unsqueeze(1),
            None if mask is None else mask.flatten(0, 1).unsqueeze(1),
        )
        return hidden.view(batch, count, *hidden.shape[2:]), pooled[::count]


@dataclass(frozen=True)
class _World:
    """Model, data and inputs that all variants of a case share."""

    shape: StepShape
    device: torch.device
    dtype: torch.dtype  # of the trainer's autocast; what is compared is computed without
    split: LeaveOneOut
    collaborative: SASRec
    tree: PrefixTree
    full: np.ndarray  # examples whose history fills the prompt

    @classmethod
    def build(cls, shape: StepShape, device: torch.device, dtype: torch.dtype) -> _World:
        history = shape.source // LENGTH
        users = _DRAWS * shape.prompts
        events = history + 3  # a target behind the full history; then validation and test
        items = np.random.default_rng(_SEED).integers(0, shape.items, users * events)
        dataset = Dataset(
            "random",
            [str(user) for user in range(users)],
            Ragged.from_lengths(np.full(users, events), items.astype(np.int32)),
            shape.items,
        )
        split = LeaveOneOut(dataset, max_history=history)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            collaborative = SASRec(SASRecConfig(shape.items, d_model=64, max_length=history))
        tokens = random_tokens(shape.items, _vocabulary(shape).offset)
        tree = PrefixTree.from_identifiers(torch.from_numpy(tokens))
        full = np.flatnonzero(split.train.lengths == history)
        return cls(shape, device, dtype, split, collaborative, tree, full)


class _Trainer:
    """A trainer of one objective, and its step."""

    def __init__(self, world: _World, kind: type[GFlowModel], objective: Any) -> None:
        shape, vocabulary = world.shape, _vocabulary(world.shape)
        if shape.model == "t5":
            backbone: Any = build_tiger(vocabulary, TigerConfig(), seed=_SEED)
            layout = TIGER_PROMPT
        else:
            backbone = build_model(shape.model, torch.device("cpu"))
            layout = PromptLayout()
        settings = FlowSettings(objective=objective, max_history=world.split.max_history)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            self.model = kind(backbone, world.tree, vocabulary, settings, layout)
        self.model.start_flow(torch.zeros(LENGTH))
        self.folder = tempfile.TemporaryDirectory()
        args = GFlowGRConfig(
            output_dir=self.folder.name,
            use_cpu=world.device.type == "cpu",
            per_device_train_batch_size=shape.prompts,
            num_trajectories=shape.trajectories,
            max_steps=2,
            bf16=world.dtype == torch.bfloat16,
            fp16=world.dtype == torch.float16,
            disable_tqdm=True,
            report_to="none",
        )
        self.trainer = GFlowGRTrainer(
            self.model, args, world.split, collaborative=world.collaborative
        )
        # Half of the training is done: the curriculum takes items from the middle.
        self.trainer.state.max_steps, self.trainer.state.global_step = 2, 1
        self.trainer.current_gradient_accumulation_steps = 1
        self.optimizer = self.trainer.create_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.collate = self.trainer.data_collator

    @torch.enable_grad()
    def step(self, inputs: Inputs) -> Outcome:
        """A whole step."""
        self.trainer.training_step(self.model, dict(inputs.tensors))
        self.update()
        self.model.zero_grad()
        return partial(self.outcome, inputs)

    def update(self) -> None:
        """Clipping and the optimiser, on the gradients that are there."""
        self.trainer.accelerator.clip_grad_norm_(
            self.model.parameters(), self.trainer.args.max_grad_norm
        )
        self.optimizer.step()

    def flow(self, inputs: Inputs) -> dict[str, Tensor]:
        """The model's inputs: scores, sampling, rewards."""
        flow, _ = self.trainer._flow_inputs(
            inputs.tensors, epoch=0, step=1, progress=0.5, log_probs=self.model.log_probs
        )
        return flow

    def outcome(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See :data:`Outcome`, of the batch's first prompts."""
        flow = {name: value[:_CHECKED] for name, value in self.flow(inputs).items()}
        self.model.eval()
        loss: Tensor = self.model(**flow)["loss"]
        return loss.detach(), self._exact(flow)[1]

    def reference(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The same with the loss in float64."""
        return self._exact({k: v[:_CHECKED] for k, v in self.flow(inputs).items()})

    def _exact(self, flow: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        model = copy.deepcopy(self.model).double().eval()
        flow = {k: v.double() if v.is_floating_point() else v for k, v in flow.items()}
        with torch.enable_grad():
            loss = model(**flow)["loss"]
            loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), torch.cat([found[name].flatten() for name in sorted(found)])

    # ---- parts of a step ----

    def hold(self, inputs: Inputs) -> None:
        """Prepare what the parts of a step on these inputs start from."""
        self._flow = self.flow(inputs)
        make = self._inputs
        if make.sampler is not None:
            scores = make.scores(inputs.tensors)
            self._request = sample_request(inputs.tensors, 0, 1, 0.5, scores)
            self._chosen = make.sampler.sample(self._request)

    @property
    def _inputs(self) -> FlowInputs:
        made = self.trainer._flow_inputs
        assert isinstance(made, FlowInputs)  # prompts, not whole sequences
        return made

    def parts(self) -> dict[str, Callable[[Inputs], object]]:
        """The parts of a step, each alone, on the inputs held."""
        make = self._inputs

        def forward(inputs: Inputs) -> Tensor:
            self.model.train()
            with torch.enable_grad():
                loss: Tensor = self.model(**self._flow)["loss"]
            return loss

        def both(inputs: Inputs) -> None:
            self.model.zero_grad()
            forward(inputs).backward()

        def sample(inputs: Inputs) -> object:
            assert make.sampler is not None
            return make.sampler.sample(self._request)

        def reward(inputs: Inputs) -> object:
            prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            return make.rewarded(prompts, self._request, self._chosen, self.model.log_probs)

        def score(inputs: Inputs) -> object:
            return make.scores(inputs.tensors)

        def update(inputs: Inputs) -> None:
            self.update()

        found: dict[str, Callable[[Inputs], object]] = {}
        if make.sampler is not None:
            found = {"scores": score, "sampling": sample, "rewards": reward}
        return found | {"forward": forward, "forward, backward": both, "optimiser": update}


def _build(
    table: str,
    shape: StepShape,
    device: torch.device,
    dtype: torch.dtype,
    peers: tuple[str, ...],
) -> Case:
    """SFT, TB and TB by separate forwards; the parts of the first two as bare operations."""
    world = _World.build(shape, device, dtype)
    sft, tb = _Trainer(world, GFlowModel, "sft"), _Trainer(world, GFlowModel, "tb")
    separate = _Trainer(world, SeparateForwards, "tb")
    case = Case(
        table,
        shape,
        device,
        dtype,
        partial(_draw, world, (tb, sft)),
        {"SFT, float64": sft.reference, "separate forwards, float64": separate.reference},
        judge=_judge,
        tolerance=TOLERANCES[torch.float32],
    )
    for row, trainer in ((OURS, tb), (SFT, sft)):
        for part, run in trainer.parts().items():
            case.bare[f"{row}: {part}"] = run
            case.parts[f"{row}: {part}"] = row
    case.notes.append(
        f"{len(world.split.train):,} random examples; loss and gradients compared on "
        f"{min(_CHECKED, shape.prompts)} prompts, without dropout; learning rates are 0"
    )
    rows = (
        (OURS, "", tb, "separate forwards, float64"),
        (SFT, "sft", sft, "SFT, float64"),
        (SEPARATE, "separate", separate, "separate forwards, float64"),
    )
    one = Inputs({k: v[:1] for k, v in case.make_inputs(_SEED).tensors.items()})
    weights = float(sum(p.numel() * p.element_size() for p in sft.model.parameters()))
    for name, family, trainer, reference in rows:
        case.floors[name] = Floor(shape.prompts * _flops(trainer, one), weights)
        if family == "separate" and "torch" not in peers:
            continue
        case.variants.append(Variant(name, family, trainer.step, reference, name, trains=False))
    return case


def _draw(world: _World, trainers: Sequence[_Trainer], seed: int) -> Inputs:
    """A collated batch as the trainers hold it, its prompts on the device."""
    rng = np.random.default_rng([_SEED, seed])
    chosen = rng.choice(world.full, world.shape.prompts, replace=False)
    batch = trainers[0].collate([world.split.train[int(index)] for index in chosen])
    inputs = Inputs(trainers[0].trainer._prepare_inputs(batch))
    for trainer in trainers:
        trainer.hold(inputs)
    return inputs


def _judge(found: Outcome, wanted: tuple[Tensor, Tensor]) -> Check:
    loss, gradient = found()
    errors = (relative_error(loss, wanted[0]), relative_error(gradient, wanted[1]))
    limit = TOLERANCES[torch.float32]
    wrong = not max(errors) <= limit
    reason = f"relative error over {limit:g}: loss {errors[0]:.2g}, gradient {errors[1]:.2g}"
    return Check("wrong" if wrong else "ok", reason if wrong else "", *errors)


def _flops(trainer: _Trainer, one: Inputs) -> float:
    """FLOPs of matrix products and attention of one prompt's step, without the fused loss."""
    with FlopCounterMode(display=False) as counter:
        trainer.step(one)
    return float(counter.get_total_flops())


def _vocabulary(shape: StepShape) -> IdentifierVocabulary:
    sizes = (CODES,) * LENGTH
    if shape.model == "t5":
        return IdentifierVocabulary(sizes)
    return IdentifierVocabulary(sizes, offset=3, eos_token=2)


def _shapes(times: int) -> tuple[StepShape, ...]:
    return (
        StepShape("t5", 128 * times, 80, 4, BEAUTY_ITEMS),
        StepShape("qwen3", 32 * times, 256, 4, BEAUTY_ITEMS),
    )


register(
    Table(
        "train_step",
        _build,
        StepShape,
        on_cpu=_shapes(1),
        on_gpu=_shapes(8),
        low_precision=("cuda",),
    )
)
