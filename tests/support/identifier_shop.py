"""Items with any identifiers, a small random model, and what it gives each item by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from gflowgr.tree import PrefixTree

VOCABULARY = 12
FIRST = 2  # tokens 0 and 1 are padding and the end of a prompt


def tiny_t5(*, seed: int = 0, **changes: object) -> T5ForConditionalGeneration:
    """A random T5 over 12 tokens, in evaluation mode."""
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_heads": 3, "num_layers": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = T5Config(vocab_size=VOCABULARY, **(sizes | special | changes))
        model = T5ForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # far from uniform, so that mistakes show
                parameter.data.mul_(1.5)
    return model.eval()


class IdentifierShop:
    """A catalogue of ``identifiers``, with item ids 0, 1, 2, ... and two prompts by default."""

    def __init__(
        self,
        identifiers: Sequence[Sequence[int]],
        *,
        model: nn.Module | None = None,
        lengths: Sequence[int] = (3, 6),
        seed: int = 0,
    ) -> None:
        self.identifiers = [tuple(identifier) for identifier in identifiers]
        self.tree = PrefixTree.from_identifiers([list(row) for row in self.identifiers])
        self.model = tiny_t5(seed=seed) if model is None else model
        self._known: dict[tuple[int, ...], Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths, default=1))
        real = torch.arange(shape[1]) < torch.tensor(lengths, dtype=torch.long)[:, None]
        self.ids = torch.randint(FIRST, VOCABULARY, shape, generator=generator) * real
        self.mask = real.long()

    def logits(self, prefix: Sequence[int]) -> Tensor:
        """What the model predicts after ``prefix`` [B, V], by forwards without any padding."""
        real = [ids[mask.bool()].tolist() for ids, mask in zip(self.ids, self.mask, strict=True)]
        return torch.stack([self._predict(prompt, list(prefix)) for prompt in real])

    def _predict(self, prompt: list[int], prefix: list[int]) -> Tensor:
        key = (*prompt, -1, *prefix)
        if key not in self._known:
            config = self.model.config
            if config.is_encoder_decoder:
                start = torch.tensor([[config.decoder_start_token_id, *prefix]])
                given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": start}
            else:
                given = {"input_ids": torch.tensor([prompt + prefix])}
            with torch.no_grad():
                self._known[key] = self.model(**given).logits[0, -1].double()
        return self._known[key]

    def pad_left(self) -> None:
        """Move the padding of the prompts to the left."""
        self.mask = self.mask.flip(1)
        shifts = self.mask.shape[1] - self.mask.sum(1)
        rows = zip(self.ids, shifts.tolist(), strict=True)
        self.ids = torch.stack([row.roll(shift) for row, shift in rows])

    def choices(self, prefix: tuple[int, ...], normalize: str) -> list[int]:
        """The tokens over which the one after ``prefix`` is normalised."""
        depth = len(prefix)
        if normalize == "vocab":
            return list(range(self.model.config.vocab_size))
        longer = [row for row in self.identifiers if len(row) > depth]
        if normalize == "level":
            here = [row[depth] for row in longer]
            return list(range(min(here), max(here) + 1))
        return sorted({row[depth] for row in longer if row[:depth] == prefix})

    def exact(self, normalize: str = "children", temperature: float = 1.0) -> Tensor:
        """log P of every item's identifier [B, items], each by forwards of its own."""
        out = torch.zeros(len(self.ids), len(self.identifiers), dtype=torch.float64)
        for item, identifier in enumerate(self.identifiers):
            for depth, token in enumerate(identifier):
                choices = self.choices(identifier[:depth], normalize)
                log_p = (self.logits(identifier[:depth])[:, choices] / temperature).log_softmax(-1)
                out[:, item] += log_p[:, choices.index(token)]
        return out

    def sampling(
        self,
        row: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        allowed: Sequence[int] | None = None,
    ) -> Tensor:
        """Probability of drawing each item for prompt ``row`` [items], by definition."""
        allowed = range(len(self.identifiers)) if allowed is None else allowed
        out = torch.zeros(len(self.identifiers), dtype=torch.float64)

        def descend(prefix: tuple[int, ...], items: list[int], probability: float) -> None:
            ending = [item for item in items if self.identifiers[item] == prefix]
            if ending:
                out[ending] = probability / len(ending)
                return
            tokens = sorted({self.identifiers[item][len(prefix)] for item in items})
            share = (self.logits(prefix)[row, tokens] / temperature).softmax(-1)
            kept, reached = [], 0.0
            for place in share.argsort(descending=True, stable=True).tolist():
                if reached < top_p:
                    kept.append(place)
                reached += float(share[place])
            for place in kept:
                longer = (*prefix, tokens[place])
                below = [item for item in items if self.identifiers[item][: len(longer)] == longer]
                descend(longer, below, probability * float(share[place] / share[kept].sum()))

        if allowed:
            descend((), list(allowed), 1.0)
        return out
