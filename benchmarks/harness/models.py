"""Random models of whole searches, scores and training steps, their prompts and their arithmetic.

All models have a vocabulary of 1027: three special tokens, then four codebooks of 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.inputs import Inputs
from benchmarks.harness.shapes import CODES, LENGTH
from gflowgr.models import DecoderConfig, build_decoder
from gflowgr.models.vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD, END = 0, 2
_FIRST_CODE = 3
VOCAB = _FIRST_CODE + LENGTH * CODES


def build_model(name: str, device: torch.device) -> PreTrainedModel:
    """A random model, the same every time, in ``eval`` mode: "t5", "gpt2", "qwen3" or "decoder".

    T5: width 128, 4 + 4 layers, 6 heads of 64, feed-forward 1024. GPT-2 and Qwen3: 4 layers, width
    256. "decoder" is the package's own generator (a GPT-2 of 3 layers, width 128).
    """
    import transformers as hf

    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "t5":
            sizes: dict[str, Any] = {"d_model": 128, "d_ff": 1024, "d_kv": 64, "num_heads": 6}
            sizes |= {"num_layers": 4, "num_decoder_layers": 4, "vocab_size": VOCAB}
            sizes |= {"decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": END}
            config = hf.T5Config(**sizes)
            model = hf.T5ForConditionalGeneration(config)
        elif name == "gpt2":
            model = hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=VOCAB,
                    n_embd=256,
                    n_layer=4,
                    n_head=4,
                    bos_token_id=1,
                    eos_token_id=END,
                )
            )
        elif name == "qwen3":
            model = hf.Qwen3ForCausalLM(
                hf.Qwen3Config(
                    vocab_size=VOCAB,
                    hidden_size=256,
                    intermediate_size=768,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=64,
                    pad_token_id=PAD,
                    eos_token_id=END,
                )
            )
        elif name == "decoder":
            codes = IdentifierVocabulary((CODES,) * LENGTH, offset=_FIRST_CODE, eos_token=END)
            # More positions than a prompt of 20 items needs: more tokens are counted behind it.
            model = build_decoder(codes, DecoderConfig(), max_history=24, seed=0)
        else:
            raise ValueError(f"model must be t5, gpt2, qwen3 or decoder; got {name!r}")
    return model.eval().to(device)


def make_prompts(prompts: int, source: int, device: torch.device, seed: int) -> Inputs:
    """Random prompts [prompts, source], no padding."""
    g = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(_FIRST_CODE, VOCAB, (prompts, source), generator=g, device=device)
    return Inputs({"input_ids": ids, "mask": torch.ones_like(ids)})


def weight_bytes(model: PreTrainedModel) -> float:
    """Bytes of all weights."""
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))


def token_flops(model: Any, source: int) -> tuple[float, float]:
    """FLOPs of matrix products: (of a prompt of ``source`` tokens, of one more token after it)."""
    counts: list[float] = []
    lengths: Sequence[int] = (4, 8)
    for length in lengths:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _forward(model, source, length)
        counts.append(float(counter.get_total_flops()))
    per_token = (counts[1] - counts[0]) / (lengths[1] - lengths[0])
    return counts[0] - lengths[0] * per_token, per_token


def _forward(model: Any, source: int, length: int) -> None:
    """A prompt and ``length`` tokens behind it, of which only these have logits."""
    device = model.device
    ids = torch.full((1, source), _FIRST_CODE, device=device)
    after = torch.full((1, length), _FIRST_CODE, device=device)
    if model.config.is_encoder_decoder:
        model(input_ids=ids, decoder_input_ids=after)
    else:
        model(input_ids=torch.cat([ids, after], dim=1), logits_to_keep=length)
