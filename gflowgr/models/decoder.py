"""A decoder-only generator over the identifier tokens alone, trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..plain_settings import make_plain
from .prompts import PromptLayout
from .vocabulary import EOS_TOKEN, PAD_TOKEN, IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

__all__ = ["DecoderConfig", "build_decoder", "decoder_prompt"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a GPT-2 (Radford et al., 2019) over the identifier tokens.

    Learned positions, pre-normalised blocks, the output rows tied to the embeddings. The defaults
    train to convergence on a laptop: 0.7 million parameters for four codebooks of 256.

    Attributes:
        d_model: width of the residual stream.
        d_ff: width of the feed-forward layers.
        num_heads: attention heads; divides ``d_model``.
        num_layers: blocks.
        dropout: on the embeddings and on each block's two outputs, while training.
        activation: of the feed-forward layers, by its name in ``transformers``.
        kind: tells the generators of a configuration apart.
    """

    d_model: int = 128
    d_ff: int = 512
    num_heads: int = 4
    num_layers: int = 3
    dropout: float = 0.15
    activation: str = "relu"
    kind: Literal["decoder"] = "decoder"

    def __post_init__(self) -> None:
        from transformers.activations import ACT2FN

        make_plain(self)
        for name in ("d_model", "d_ff", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads must divide d_model = {self.d_model}; got {self.num_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if self.activation not in ACT2FN:
            raise ValueError(
                f"activation must be one of {', '.join(sorted(ACT2FN))}; got {self.activation!r}"
            )

    def summary(self) -> str:
        """For reports."""
        return (
            f"GPT-2, {self.num_layers} layers, d_model {self.d_model}, d_ff {self.d_ff}, "
            f"{self.num_heads} heads"
        )


def decoder_prompt(vocabulary: IdentifierVocabulary) -> PromptLayout:
    """A start token, then the identifiers, oldest first, and nothing between or after them.

    So a prompt is the beginning of a longer one: every item of a sequence is a target of the same
    pass (:func:`~gflowgr.models.sequences.sequence_prompts`).
    """
    end_token = vocabulary.eos_token if vocabulary.ragged else None
    return PromptLayout(prefix=(EOS_TOKEN,), pad_token=PAD_TOKEN, end_token=end_token)


def build_decoder(
    vocabulary: IdentifierVocabulary, config: DecoderConfig, *, max_history: int, seed: int
) -> GPT2LMHeadModel:
    """A randomly initialised ``GPT2LMHeadModel`` over ``vocabulary``.

    Args:
        vocabulary: identifier tokens; the model's vocabulary is exactly these.
        config: sizes.
        max_history: items of the longest prompt; the model has positions for it and one item more.
        seed: seeds the initial weights; the global generator is left as it was.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2Config(
        vocab_size=vocabulary.size,
        n_positions=1 + (max_history + 1) * vocabulary.length,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.d_ff,
        activation_function=config.activation,
        embd_pdrop=config.dropout,
        resid_pdrop=config.dropout,
        attn_pdrop=0.0,
        bos_token_id=EOS_TOKEN,
        eos_token_id=EOS_TOKEN,
        pad_token_id=PAD_TOKEN,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(gpt2)
