"""A model in a wrapper gives the states that it would give in its own forward, or is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.small_models import padded_prompts, small_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from gflowgr import PrefixTree, constrained_beam_search, fused_vargrad_loss
from gflowgr.models import output_head, trajectory_hidden_states

TOKENS = torch.tensor([[[3, 9, 5], [4, 9, 6]]])
TREE = PrefixTree.from_identifiers(TOKENS[0])


def states(model: Any) -> Tensor:
    ids, mask = padded_prompts("left")
    return trajectory_hidden_states(model, ids, mask, TOKENS.expand(len(ids), -1, -1)).hidden


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate's state is of the process: a precision that it was given once would stay."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert not PartialState._shared_state

    reset()
    yield
    reset()


@pytest.mark.parametrize("name", ["t5", "qwen3"])
@pytest.mark.usefixtures("fresh_accelerate")
def test_autocast_of_accelerate_is_kept(name: str) -> None:
    model = small_model(name)
    exact = states(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = states(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    found = states(prepared)
    assert found.dtype == torch.float32  # as the outputs of a prepared model are
    assert torch.equal(found, rounded.float())
    assert not torch.equal(found, exact)
    assert output_head(prepared)[0] is output_head(model)[0]
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(states(prepared), rounded.float())
    with torch.autocast("cpu", dtype=torch.float16):  # the caller's own counts
        halves = states(prepared)
    assert not torch.equal(halves.float(), rounded.float())


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([5, 6, 7]), "log_reward": torch.tensor([0.0, -1.0])}


@pytest.mark.usefixtures("fresh_accelerate")
def test_compute_loss_of_a_bf16_trainer_runs_layers_in_bf16(tmp_path: Path) -> None:
    """What an engineer wrote: the call inside ``compute_loss``, and bf16 in the arguments."""
    seen = []

    class Flow(Trainer):
        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
            tokens = TOKENS.expand(len(inputs["input_ids"]), -1, -1)
            found = trajectory_hidden_states(model, inputs["input_ids"], None, tokens)
            weight, bias = output_head(model)
            return fused_vargrad_loss(
                found.hidden, weight, tokens, inputs["log_reward"], bias=bias, tree=TREE
            )

    model = small_model("t5")
    layer = model.encoder.block[0].layer[0].SelfAttention.q
    layer.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        bf16=True,
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Flow(model, arguments, train_dataset=Rows()).train()
    assert seen == [torch.bfloat16]


def test_a_compiled_model_gives_the_same_states_and_says_that_it_is_not_compiled() -> None:
    model = small_model("t5")
    exact = states(model)
    with pytest.warns(UserWarning, match="compiled T5ForConditionalGeneration runs uncompiled"):
        assert torch.equal(states(torch.compile(model, backend="eager")), exact)
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="compile the module whose forward makes this call"):
        assert torch.equal(states(model), exact)


def test_data_parallelism_is_refused_by_name_where_gradients_are_recorded() -> None:
    model = small_model("t5")
    wrapped = nn.DataParallel(model)
    compiled = torch.compile(wrapped, backend="eager")
    for given in (wrapped, compiled):
        with pytest.raises(TypeError, match="got the DataParallel, whose gradients"):
            states(given)
        with pytest.raises(TypeError, match="got the DataParallel, whose gradients"):
            output_head(given)
    with torch.no_grad():
        assert torch.equal(states(wrapped), states(model))


def test_a_wrapped_model_can_be_searched() -> None:
    model = small_model("t5").eval()
    ids, mask = padded_prompts("left")
    plain = constrained_beam_search(model, ids, mask, TREE, num_beams=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
            found = constrained_beam_search(wrapped, ids, mask, TREE, num_beams=2)
            assert torch.equal(found.items, plain.items)
            assert torch.equal(found.scores, plain.scores)
