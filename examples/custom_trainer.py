"""gflowgr's losses in a training loop of one's own; nothing but torch and gflowgr is needed.

    python examples/custom_trainer.py

A toy model of 200 items: an embedding per user, and a GRU that emits an item's three tokens. Each
user has a reward for every item. Trajectory balance over a few sampled items per step drives the
model's distribution over items towards the rewards; the distance that is left is printed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gflowgr

USERS, ITEMS, CODES, WIDTH = 16, 200, 8, 64


class Model(nn.Module):
    """Hidden states [B, N, L, WIDTH], from which each token of each item is predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, WIDTH)
        self.token = nn.Embedding(1 + 3 * CODES, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 1 + 3 * CODES)
        self.log_z = nn.Embedding(USERS, 1)

    def forward(self, users: Tensor, tokens: Tensor) -> Tensor:
        batch, count, length = tokens.shape
        start = torch.zeros_like(tokens[..., :1])
        inputs = self.token(torch.cat([start, tokens[..., :-1]], dim=-1)).flatten(0, 1)
        state = self.user(users).repeat_interleave(count, 0).unsqueeze(0)
        return self.gru(inputs, state)[0].view(batch, count, length, WIDTH)


def main(steps: int = 1000) -> None:
    torch.manual_seed(0)
    # Identifiers: 3 codes of 8 each; level l uses the token ids 1 + 8 l ... 8 + 8 l.
    codes = torch.randperm(CODES**3)[:ITEMS]
    levels = torch.stack([codes // 64, codes // 8 % 8, codes % 8], dim=1)
    item_tokens = 1 + levels + CODES * torch.arange(3)
    tree = gflowgr.PrefixTree.from_identifiers(item_tokens)
    log_reward = 1.5 * torch.randn(USERS, ITEMS)

    model = Model()
    optimizer = torch.optim.Adam(
        [
            {"params": [p for n, p in model.named_parameters() if "log_z" not in n], "lr": 3e-3},
            {"params": model.log_z.parameters(), "lr": 3e-2},
        ]
    )
    users = torch.arange(USERS)
    for step in range(1, steps + 1):
        items = torch.stack([torch.randperm(ITEMS)[:32] for _ in range(USERS)])
        tokens = item_tokens[items]
        loss = gflowgr.fused_tb_loss(
            model(users, tokens),
            model.head.weight,
            tokens,
            log_reward.gather(1, items),
            model.log_z(users).squeeze(-1),
            bias=model.head.bias,
            tree=tree,
            reduction="mean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // 4) == 0:
            left = distance(model, tree, item_tokens, log_reward)
            print(f"step {step:5}  loss {loss.item():8.4f}  distance {left:.4f}")


@torch.no_grad()
def distance(
    model: Model, tree: gflowgr.PrefixTree, item_tokens: Tensor, log_reward: Tensor
) -> float:
    """Total variation between the model over ALL items and R / sum R, mean over users."""
    users = torch.arange(USERS)
    tokens = item_tokens.expand(USERS, -1, -1)
    log_pf = gflowgr.trajectory_logprobs(
        model(users, tokens), model.head.weight, tokens, bias=model.head.bias, tree=tree
    )
    gap = log_pf.sum(-1).exp() - log_reward.softmax(-1)
    return gap.abs().sum(-1).mean().item() / 2


if __name__ == "__main__":
    main()
