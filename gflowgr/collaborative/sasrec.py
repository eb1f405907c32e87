"""SASRec: a small causal transformer over item sequences.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. As there: learned
positions, one embedding table for input and output, two layers. Unlike there: pre-normalised
blocks, and the softmax over the whole catalogue as the loss in place of one sampled negative,
which is what makes SASRec a strong baseline.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gflowgr.collaborative.base import (
    check_score_inputs,
    load_saved,
    positions_to_score,
    save_model,
)
from gflowgr.errors import DataError
from gflowgr.ops import fused_vargrad_loss
from gflowgr.plain_settings import make_plain
from gflowgr.transfer import to_device


@dataclass(frozen=True)
class SASRecConfig:
    """Size and loss of a SASRec.

    Attributes:
        num_items: size of the catalogue; ids are 0..num_items-1.
        d_model: width of the item embeddings and of the transformer.
        num_layers: transformer blocks.
        num_heads: attention heads; divides d_model.
        d_ff: inner width of the feed-forward layers.
        max_length: longest history seen by the model; older items are dropped.
        dropout: on the embeddings and on each block's two outputs, while training.
        negatives: 0 for the softmax over the whole catalogue; otherwise the number of uniform
            negatives that estimate it, for catalogues where the full one is too expensive.
    """

    num_items: int
    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    d_ff: int = 256
    max_length: int = 50
    dropout: float = 0.3
    negatives: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("num_items", "d_model", "num_layers", "num_heads", "d_ff", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer; got {value!r}")
        if self.d_model % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide d_model = {self.d_model}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout!r}")
        if not isinstance(self.negatives, int) or self.negatives < 0:
            raise ValueError(f"negatives must be an integer >= 0; got {self.negatives!r}")


class _Block(nn.Module):
    """Pre-normalised causal self-attention and feed-forward."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm_attention = nn.LayerNorm(config.d_model)
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.norm_feed = nn.LayerNorm(config.d_model)
        self.feed_in = nn.Linear(config.d_model, config.d_ff)
        self.feed_out = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, dropout: float) -> torch.Tensor:
        """x [B, L, d]; mask bool [B, 1, L, L] (true = may attend) or None for plain causal."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(mixed, dropout, dropout > 0)
        fed = self.feed_out(F.gelu(self.feed_in(self.norm_feed(x))))
        return x + F.dropout(fed, dropout, dropout > 0)


class SASRec(nn.Module):
    """A causal transformer whose state after a history is matched with the item embeddings.

    The score of an item is the dot product of the last state and its embedding, the logit of the
    training softmax. Padding stands on the right, so the causal mask alone keeps it out.
    An empty history has no state: it is scored by ``empty_scores`` [num_items], which training
    sets to the log share of each item in the training part.
    """

    KIND = "sasrec"
    empty_scores: torch.Tensor

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.settings = config
        self.num_items = config.num_items
        self.items = nn.Embedding(config.num_items, config.d_model)
        self.positions = nn.Embedding(config.max_length, config.d_model)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.register_buffer("empty_scores", torch.zeros(config.num_items))
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def item_embeddings(self) -> torch.Tensor:
        """The shared input and output table, float32 [num_items, d_model]."""
        return self.items.weight

    def _encode(
        self,
        items: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """States [B, L, d]; items [B, L] (-1 = padding), positions [L] or [B, L]."""
        x = self.items(items.clamp_min(0)) + self.positions(positions)
        x = F.dropout(x, dropout, dropout > 0)
        for block in self.blocks:
            x = block(x, mask, dropout)
        return self.norm(x)

    def forward(
        self,
        items: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The training loss of packed sequences.

        Several sequences share a row, told apart by ``segments``; so a batch of short and long
        sequences holds hardly any padding, and stays a uniform sample of the sequences.

        Args:
            items: int64 [R, L], -1 = padding.
            positions: int64 [R, L], the place in the item's own sequence.
            segments: int64 [R, L], equal within a sequence, different between those of a row.
            targets: int64 [R, L], the next item; -1 = nothing to predict here.
            weights: float32 [R, L], of each target in the loss; None: 1.

        Returns:
            {"loss": mean of weight times cross-entropy, in nats, over the positions with a target}.
        """
        length = items.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=items.device).tril()
        mask = (segments[:, :, None] == segments[:, None, :]) & causal
        dropout = self.settings.dropout if self.training else 0.0
        hidden = self._encode(items, positions, mask.unsqueeze(1), dropout)
        wanted = targets >= 0
        states, wanted_items = hidden[wanted].float(), targets[wanted]
        table = self.items.weight
        given = None if weights is None else weights[wanted]
        if self.settings.negatives == 0:
            return {"loss": catalogue_cross_entropy(states, table, wanted_items, given)}
        negatives = torch.randint(self.num_items, (self.settings.negatives,), device=states.device)
        return {"loss": sampled_cross_entropy(states, table, wanted_items, negatives, given)}

    @torch.no_grad()
    def user_states(self, histories: torch.Tensor) -> torch.Tensor:
        """The state after each history, float32 [B, d_model]; zeros for an empty one.

        Args:
            histories: int64 [B, H], left-aligned, padded with -1; more than ``max_length`` items
                are cut to the last ones.
        """
        lengths = check_score_inputs(histories, None, self.num_items)
        return self._states(histories, lengths)

    def _states(self, histories: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        device = self.items.weight.device
        width = min(max(int(lengths.max()) if len(lengths) else 0, 1), self.settings.max_length)
        histories, lengths = to_device(histories.long(), device), to_device(lengths, device)
        if histories.shape[1] > width:
            skip = (lengths - width).clamp_min(0)
            columns = skip[:, None] + torch.arange(width, device=device)
            histories, lengths = histories.gather(1, columns), lengths.clamp_max(width)
        if histories.numel() == 0:
            return self.items.weight.new_zeros(len(histories), self.settings.d_model)
        places = torch.arange(histories.shape[1], device=device)
        hidden = self._encode(histories, places, None, 0.0)
        rows = torch.arange(len(histories), device=device)
        states = hidden[rows, (lengths - 1).clamp_min(0)]
        return torch.where(lengths[:, None] > 0, states, 0.0)

    @torch.no_grad()
    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`gflowgr.collaborative.CollaborativeModel.score`; never uses dropout."""
        lengths = check_score_inputs(histories, items, self.num_items)
        states = self._states(histories, lengths)
        if items is None:
            scores = states @ self.items.weight.t()
            prior = self.empty_scores.expand_as(scores)
        else:
            items = items.to(states.device).long()
            scores = torch.einsum("bd,bmd->bm", states, self.items.weight[items])
            prior = self.empty_scores[items]
        empty = lengths == 0
        if not bool(empty.any()):
            return scores
        return torch.where(to_device(empty, states.device)[:, None], prior, scores)

    @torch.no_grad()
    def position_states(self, histories: torch.Tensor) -> torch.Tensor:
        """The state after each prefix of whole sequences, float32 [W, H, d_model].

        One causal pass gives those of all prefixes of at most ``max_length`` items. A longer
        prefix is cut to its last items, as :meth:`score` does, and so needs a pass of its own.

        Args:
            histories: int64 [W, H], left-aligned, padded with -1 on the right; anything stands
                at padding.
        """
        check_score_inputs(histories, None, self.num_items)
        device = self.items.weight.device
        histories = to_device(histories.long(), device)
        most = self.settings.max_length
        if histories.numel() == 0:
            return self.items.weight.new_zeros(*histories.shape, self.settings.d_model)
        first = histories[:, :most]
        states = self._encode(first, torch.arange(first.shape[1], device=device), None, 0.0)
        if histories.shape[1] <= most:
            return states
        windows = histories[:, 1:].unfold(1, most, 1)
        real = windows[:, :, -1] >= 0
        later = states.new_zeros(*real.shape, states.shape[2])
        if bool(real.any()):
            places = torch.arange(most, device=device)
            later[real] = self._encode(windows[real], places, None, 0.0)[:, -1]
        return torch.cat([states, later], dim=1)

    @torch.no_grad()
    def score_positions(
        self, histories: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :func:`gflowgr.collaborative.score_positions`; one pass over the sequences."""
        where = to_device(positions_to_score(histories, chosen), self.items.weight.device)
        return self.position_states(histories)[where] @ self.items.weight.t()

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each atomically."""
        save_model(folder, {"kind": self.KIND, **asdict(self.settings)}, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> SASRec:
        """Read what :meth:`save` wrote, in evaluation mode on the CPU.

        Raises:
            DataError: a file is missing, broken, or of another kind of model.
        """
        config, tensors = load_saved(folder, cls.KIND)
        names = {field.name for field in fields(SASRecConfig)}
        try:
            model = cls(SASRecConfig(**{key: config[key] for key in names}))
            model.load_state_dict(tensors)
        except KeyError as error:
            raise DataError(f"{folder}: config.json has no entry {error}") from error
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{folder}: weights and config.json do not agree: {error}") from error
        return model.eval()


def catalogue_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over rows of ``-log softmax(hidden @ weight.T)[target]``, without holding the logits.

    The package's own fused loss of supervised trajectories of one token: VarGrad of a single
    trajectory is 0, and its supervised term is what is left.

    Args:
        hidden: float32 [T, d].
        weight: float32 [V, d].
        targets: int64 [T], ids in 0..V-1.
        weights: float32 [T], of the rows in the mean; None: 1.

    Returns:
        float32 scalar in nats; 0 when T is 0.
    """
    if hidden.shape[0] == 0:
        return (hidden.sum() + weight.sum()) * 0.0
    loss: torch.Tensor = fused_vargrad_loss(
        hidden[:, None, None],
        weight=weight,
        tokens=targets[:, None, None],
        log_reward=hidden.new_zeros(len(targets), 1),
        nll_weight=1.0,
        reduction="prompt" if weights is None else "none",
    )
    return loss if weights is None else (loss[:, 0] * weights).mean()


def sampled_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    negatives: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same loss with the other items' share of the normaliser estimated from a uniform sample.

    The normaliser is ``exp(s_target) + (V - 1) / S * sum over S negatives of exp(s)``; negatives
    that equal the row's target are left out (S counts the remaining ones), so the sum of
    exponentials is unbiased.

    Args:
        hidden: float32 [T, d].
        weight: float32 [V, d].
        targets: int64 [T].
        negatives: int64 [S], drawn uniformly from the catalogue, shared by all rows.
        weights: float32 [T], of the rows in the mean; None: 1.

    Returns:
        float32 scalar, the mean over rows; 0 when T is 0.
    """
    if hidden.shape[0] == 0:
        return (hidden.sum() + weight.sum()) * 0.0
    chosen = (hidden * weight[targets]).sum(1, keepdim=True)
    logits = hidden @ weight[negatives].t()
    hit = targets[:, None] == negatives[None, :]
    kept = (~hit).sum(1, keepdim=True).clamp_min(1)
    correction = ((weight.shape[0] - 1) / kept).log()
    others = logits.masked_fill(hit, float("-inf")) + correction
    losses = torch.cat([chosen, others], 1).logsumexp(1, keepdim=True) - chosen
    return (losses if weights is None else losses * weights[:, None]).mean()
