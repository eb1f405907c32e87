"""Random models of transformers, small enough for a test, over 60 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 60
_ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _gpt2(**changes: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    return transformers.GPT2LMHeadModel(config)


def _t5(**changes: Any) -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**_T5, **changes}))


def _umt5() -> Any:
    return transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**_T5))


def _rope(family: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**_ROPE, **changes})
    return getattr(transformers, f"{family}ForCausalLM")(config)


_MODELS: dict[str, Callable[[], Any]] = {
    "t5": _t5,
    "t5-gated-untied": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-unlike-depths": lambda: _t5(num_decoder_layers=1),
    "t5-whole-vectors": lambda: _t5(d_kv=16),
    "mt5": lambda: transformers.MT5ForConditionalGeneration(transformers.MT5Config(**_T5)),
    "gpt2": _gpt2,
    "gpt2-by-layer": lambda: _gpt2(scale_attn_by_inverse_layer_idx=True),
    "llama": lambda: _rope("Llama"),
    "llama-one-kv-head": lambda: _rope("Llama", num_key_value_heads=1, tie_word_embeddings=True),
    "mistral": lambda: _rope("Mistral", sliding_window=None),
    "qwen2": lambda: _rope("Qwen2"),
    "qwen3": lambda: _rope("Qwen3", head_dim=16),
    "gemma": lambda: _rope("Gemma", head_dim=8),
    "gpt-neox": lambda: _rope("GPTNeoX"),
    "olmo2": lambda: _rope("Olmo2"),
    "smollm3": lambda: _rope("SmolLM3"),
    # Not run fast: other attention, positions or logits.
    "mistral-sliding": lambda: _rope("Mistral", sliding_window=4),
    "gemma2": lambda: _rope("Gemma2", head_dim=8, sliding_window=4),
    "umt5": _umt5,
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            init_std=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    ),
}

FAST = list(_MODELS)[: list(_MODELS).index("mistral-sliding")]
SLOW = [name for name in _MODELS if name not in FAST]


def small_model(name: str, *, seed: int = 0) -> Any:
    """A model of :data:`FAST` or :data:`SLOW`, in ``eval`` mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _MODELS[name]().eval()


def padded_prompts(side: str, *, size: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts: a full one, one with 3 tokens of padding, one with 1, one of one token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (4, size), generator=generator)
    lengths = torch.tensor([size, size - 3, size - 1, 1])
    mask = (torch.arange(size) < lengths.unsqueeze(1)).long()
    mask = mask if side == "right" else mask.flip(1)
    return ids * mask, mask
