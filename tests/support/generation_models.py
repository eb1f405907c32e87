"""Random models of three families, small catalogues, and the constraint from dictionaries."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from support.dict_trie import DictTrie, Identifier

PAD, EOS, VOCAB = 0, 1, 24
FIXED: list[Identifier] = [
    (2 + (7 * i) % 5, 8 + (3 * i) % 6, 15 + i % 7) for i in range(35) if i % 4
]
RAGGED: list[Identifier] = [ids[: 1 + i % 3] for i, ids in enumerate(FIXED)]


@functools.cache
def make_model(family: str) -> PreTrainedModel:
    """A random model, peaked enough that beams change places."""
    torch.manual_seed(3)
    if family == "t5":
        config = T5Config(
            vocab_size=VOCAB, d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=2,
            pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        )  # fmt: skip
        model: PreTrainedModel = T5ForConditionalGeneration(config)
    elif family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64,
            pad_token_id=PAD, bos_token_id=PAD, eos_token_id=EOS,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    else:
        config = Qwen3Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            pad_token_id=PAD, bos_token_id=PAD, eos_token_id=EOS,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(0, 0.35)
    return model.eval()


def prompts(family: str) -> dict[str, Tensor]:
    """Three prompts of different lengths; decoder-only models take them padded on the left."""
    ids = torch.tensor([[5, 9, 16, 3], [4, 12, 0, 0], [2, 8, 15, 0]])
    mask = (ids != PAD).long()
    if family != "t5":
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask}


def prompt_length(family: str) -> int:
    return 1 if family == "t5" else 4


def from_dictionary(
    identifiers: list[Identifier], start: int, end_token: int | None = EOS
) -> Callable[[int, Tensor], list[int]]:
    """The constraint as its users write it: a dictionary of children."""
    trie = DictTrie(identifiers, range(len(identifiers)))
    tokens_after = {
        prefix: [child[-1] for child in trie.children(prefix)]
        + ([end_token] if prefix in trie.items_of else [])
        for prefix in trie.prefixes
    }
    return lambda batch_id, ids: tokens_after.get(tuple(ids[start:].tolist()), []) or [end_token]
