"""The attention of T5 in training on a CPU, against those of transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from gflowgr.models import (
    IdentifierVocabulary,
    TigerConfig,
    build_tiger,
    output_head,
    trajectory_hidden_states,
)
from gflowgr.models.t5_on_cpu import restore, use_dense_attention

VOCABULARY = IdentifierVocabulary((7, 7, 7))


def small_t5(dropout: float = 0.0) -> T5ForConditionalGeneration:
    sizes = TigerConfig(16, d_ff=32, d_kv=8, num_heads=2, num_layers=2, dropout=dropout)
    return build_tiger(VOCABULARY, sizes, seed=0)


def batch(padded: bool, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY.size, (5, 9), generator=generator)
    lengths = torch.tensor([9, 4, 1, 7, 9]) if padded else torch.full((5,), 9)
    tokens = torch.randint(2, VOCABULARY.size, (5, branches, 3), generator=generator)
    return ids, (torch.arange(9) < lengths[:, None]).long(), tokens


def states_and_gradients(
    model: T5ForConditionalGeneration, padded: bool, branches: int
) -> tuple[Tensor, dict[str, Tensor]]:
    ids, mask, tokens = batch(padded, branches)
    states = trajectory_hidden_states(model, ids, mask, tokens)
    logits = states.hidden @ output_head(model)[0].T
    (logits.logsumexp(-1).sum() + states.pooled.square().sum()).backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("reference", ["sdpa", "eager"])
def test_states_and_gradients_are_those_of_transformers(
    padded: bool, branches: int, reference: str
) -> None:
    """The learned position bias among them: SDPA has no fast path for its gradient on a CPU."""
    dense, theirs = small_t5(), small_t5()
    assert use_dense_attention(dense)
    theirs.set_attn_implementation(reference)
    logits, gradients = states_and_gradients(dense, padded, branches)
    wanted, wanted_gradients = states_and_gradients(theirs, padded, branches)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-5, atol=1e-5)
    assert gradients["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].any()


def test_the_loss_is_that_of_the_model_with_labels() -> None:
    """Through transformers' own forward: causal mask, shifted labels, cross-entropy."""
    dense, theirs = small_t5(), small_t5()
    use_dense_attention(dense)
    ids, mask, tokens = batch(padded=True, branches=1)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": tokens[:, 0]}
    assert dense(**inputs).loss.item() == pytest.approx(theirs(**inputs).loss.item(), rel=1e-6)


def test_a_prompt_without_tokens_has_no_nan() -> None:
    """The lowest number plus the position bias must not become minus infinity for a whole row."""
    model = small_t5()
    use_dense_attention(model)
    ids, mask, tokens = batch(padded=True, branches=3)
    mask[1] = 0
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=precision, enabled=precision == torch.bfloat16):
            hidden = trajectory_hidden_states(model, ids, mask, tokens).hidden
        assert hidden.isfinite().all()


def test_bf16_autocast_stays_near_float32() -> None:
    model = small_t5()
    use_dense_attention(model)
    ids, mask, tokens = batch(padded=True, branches=3)
    exact = trajectory_hidden_states(model, ids, mask, tokens).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = trajectory_hidden_states(model, ids, mask, tokens).hidden
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 0 < float(error.detach()) < 0.02


def test_dropout_of_attention_in_training_only() -> None:
    model = small_t5(dropout=0.5)
    use_dense_attention(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # what is left is the dropout of the attention's weights
    ids, mask, tokens = batch(padded=False, branches=1)

    def twice() -> bool:
        one, two = (trajectory_hidden_states(model, ids, mask, tokens).hidden for _ in range(2))
        return torch.equal(one, two)

    assert not twice()
    model.eval()
    assert twice()


def test_a_choice_of_the_user_and_other_models_are_left_alone() -> None:
    model = small_t5()
    model.set_attn_implementation("eager")
    assert not use_dense_attention(model)
    assert model.encoder.config._attn_implementation == "eager"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=10, intermediate_size=8, **sizes))
    assert not use_dense_attention(llama)


@pytest.mark.parametrize("padded", [False, True])
def test_a_gpt2_attends_densely_with_equal_states_and_gradients(padded: bool) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(20, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 2 + [1] * 5]) if padded else None
    outputs = []
    for dense in (False, True):
        if dense:
            assert use_dense_attention(model)
        model.zero_grad()
        states = model.transformer(ids, attention_mask=mask).last_hidden_state
        real = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask.bool()
        (states[real] ** 2).sum().backward()
        outputs.append((states[real].detach(), model.transformer.wte.weight.grad.clone()))
    restore(model)
    assert model.config._attn_implementation == "sdpa"
    for one, two in zip(*outputs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_copies_keep_the_change_and_files_do_not(tmp_path: Path) -> None:
    model = small_t5()
    use_dense_attention(model)
    assert use_dense_attention(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    assert "gflowgr_dense" not in (tmp_path / "config.json").read_text()
    loaded = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
