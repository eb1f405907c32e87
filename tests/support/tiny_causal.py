"""Folders as decoder-only models are published: a tokenizer and small random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gflowgr.models import CausalConfig, FlowSettings, GFlowModel
from gflowgr.models.causal import load_tokenizer
from gflowgr.runs.generator import add_adapters, make_generator
from gflowgr.runs.prepare import make_catalogue
from support.tiny_shop import MAX_HISTORY, shop

_ROPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


@functools.cache
def _tokenizer() -> Any:
    """Byte-level BPE of the shop's titles, with <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    titles = [shop().dataset.title(item) for item in range(shop().num_items)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*titles, CausalConfig("").template], trainer)
    return tokenizer


def causal_folder(folder: Path, family: str = "qwen3", **changes: Any) -> Path:
    """A checkpoint of ``family`` with a tokenizer, in ``folder``."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": len(tokenizer), **ends, **changes}
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, n_positions=128, **sizes
        )
    else:
        name = {"qwen3": "Qwen3", "llama": "Llama"}[family]
        config = getattr(transformers, f"{name}Config")(**{**_ROPE, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def causal_model(config: CausalConfig, *, seed: int = 0, **settings: Any) -> GFlowModel:
    """The generator of ``config`` on the shop, as a run makes it."""
    identifiers = shop().dataset.identifiers("hierarchy")
    catalogue = make_catalogue("hierarchy", identifiers, load_tokenizer(config))
    flow = FlowSettings(**{"objective": "tb", "max_history": MAX_HISTORY, **settings})
    model = make_generator(config, catalogue, shop().dataset, flow, seed=seed)
    torch.manual_seed(seed)
    return add_adapters(config, model)
