"""Stepwise decoding of any model, without a cache: every step runs whole sequences again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .base import StepDecoder

__all__ = ["GenericDecoder"]

_ROWS = 256
"""Sequences that one call of the model runs."""


class GenericDecoder(StepDecoder):
    """The slow decoder for every model whose call returns ``logits``: the reference of the others.

    Decoder-only models see [padding | prompt | identifier so far], encoder-decoder models
    encode the prompt once. ``hidden`` is the logits, so whatever the model does to them is done.

    Args:
        model: the model, in ``eval`` mode.
        input_ids: prompts [B, S].
        attention_mask: 1 for real tokens [B, S]; padding may be on either side.
        encoded: the encoder's states [B, S, d], where there is one and they are known already.
    """

    head = None

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, encoded: Tensor | None = None
    ) -> None:
        self.batch, self.device = input_ids.shape[0], input_ids.device
        self._model = model
        self._accepted = inspect.signature(model.forward).parameters
        config = getattr(model, "config", None)
        self._encoded = encoded
        if getattr(config, "is_encoder_decoder", False):
            if encoded is None:
                encoder = model.get_encoder()
                output = encoder(input_ids=input_ids, attention_mask=attention_mask)
                self._encoded = output.last_hidden_state
            self._start = _start_token(model)
            self._mask = attention_mask
        else:
            # Stable: padding first, and real tokens in their order.
            real = attention_mask.to(torch.int8)
            order = real.argsort(dim=1, stable=True)
            self._ids, self._mask = input_ids.gather(1, order), attention_mask.gather(1, order)

    def first(self) -> Tensor:
        self._history = torch.empty(self.batch, 1, 0, dtype=torch.long, device=self.device)
        return self._run()

    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        rows = self._rows(parents, self._history.shape[1])
        history = self._history.flatten(0, 1)[rows].unflatten(0, parents.shape)
        self._history = torch.cat([history, tokens.clamp_min(0).unsqueeze(-1)], dim=2)
        return self._run()

    def _run(self) -> Tensor:
        width = self._history.shape[1]
        rows = torch.arange(self.batch, device=self.device).repeat_interleave(width)
        run = self._continue if self._encoded is None else self._decode
        parts = zip(rows.split(_ROWS), self._history.flatten(0, 1).split(_ROWS), strict=True)
        logits = torch.cat([run(chunk, tokens) for chunk, tokens in parts])
        return logits.unflatten(0, (self.batch, width))

    def _continue(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Logits after prompt ``rows`` and ``tokens`` [rows, t], of a decoder-only model."""
        mask = torch.cat([self._mask[rows], self._mask.new_ones(tokens.shape)], dim=1)
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if "position_ids" in self._accepted:
            options["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 1
        ids = torch.cat([self._ids[rows], tokens], dim=1)
        logits: Tensor = self._model(input_ids=ids, **options).logits[:, -1]
        return logits

    def _decode(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The same of an encoder-decoder model."""
        from transformers.modeling_outputs import BaseModelOutput

        assert self._encoded is not None
        start = torch.full_like(rows, self._start).unsqueeze(1)
        logits: Tensor = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._encoded[rows]),
            attention_mask=self._mask[rows],
            decoder_input_ids=torch.cat([start, tokens], dim=1),
            use_cache=False,
        ).logits[:, -1]
        return logits


def _start_token(model: Any) -> int:
    for holder in (getattr(model, "generation_config", None), model.config):
        token = getattr(holder, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise ValueError(f"the configuration of {type(model).__name__} has no decoder_start_token_id")
