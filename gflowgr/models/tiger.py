"""TIGER's generator: a T5 encoder-decoder over identifier tokens (Rajput et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..plain_settings import make_plain
from .vocabulary import EOS_TOKEN, PAD_TOKEN, IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import T5ForConditionalGeneration

__all__ = ["TigerConfig", "build_tiger"]


@dataclass(frozen=True)
class TigerConfig:
    """Sizes of the generator; the defaults are the reference configuration of TIGER/LETTER.

    Attributes:
        d_model: width of the residual stream.
        d_ff: width of the feed-forward layers.
        d_kv: width of one attention head.
        num_heads: attention heads.
        num_layers: layers of the encoder, and of the decoder.
        dropout: dropout rate.
        kind: tells the generators of a configuration apart.
    """

    d_model: int = 128
    d_ff: int = 1024
    d_kv: int = 64
    num_heads: int = 6
    num_layers: int = 4
    dropout: float = 0.1
    kind: Literal["tiger"] = "tiger"

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")

    def summary(self) -> str:
        """For reports."""
        return (
            f"T5, {self.num_layers} + {self.num_layers} layers, d_model {self.d_model}, d_ff "
            f"{self.d_ff}, {self.num_heads} heads of {self.d_kv}"
        )


def build_tiger(
    vocabulary: IdentifierVocabulary, config: TigerConfig, *, seed: int
) -> T5ForConditionalGeneration:
    """A randomly initialised ``T5ForConditionalGeneration`` over ``vocabulary``.

    Args:
        vocabulary: identifier tokens; the model's vocabulary is exactly these.
        config: sizes.
        seed: seeds the initial weights; the global generator is left as it was.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    # Taken by the base class, whose signature type checkers do not see.
    start: dict[str, Any] = {"decoder_start_token_id": PAD_TOKEN}
    t5 = T5Config(
        vocab_size=vocabulary.size,
        d_model=config.d_model,
        d_ff=config.d_ff,
        d_kv=config.d_kv,
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        num_decoder_layers=config.num_layers,
        dropout_rate=config.dropout,
        feed_forward_proj="relu",
        pad_token_id=PAD_TOKEN,
        eos_token_id=EOS_TOKEN,
        **start,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(t5)
