"""Serving: search over valid identifiers only, in `generate` or without it, while items change.

    python examples/constrained_generation.py

The model is a small random GPT-2, since only the mechanics matter here; any model of
`transformers` with your identifiers' tokens is used in the same way.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gflowgr

ITEMS = 200


def main() -> None:
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=64, **ends)
    model = GPT2LMHeadModel(config).eval()
    # Identifiers: three tokens from 4 to 39.
    codes = torch.randperm(12**3)[:ITEMS]
    item_tokens = 4 + torch.stack([codes // 144, 12 + codes // 12 % 12, 24 + codes % 12], dim=1)
    live = gflowgr.LiveTree(gflowgr.PrefixTree.from_identifiers(item_tokens))

    prompts = torch.randint(4, 40, (2, 10))
    mask = torch.ones_like(prompts)
    tree = live.snapshot.tree  # one tree from the beginning of a request to its end
    best = gflowgr.constrained_beam_search(model, prompts, mask, tree, num_beams=40)
    print("best items     ", best.items[:, :5].tolist())

    # The same through generate, for code that calls it already.
    found = model.generate(
        input_ids=prompts,
        attention_mask=mask,
        custom_generate=gflowgr.constrained_generate,
        tree=tree,
        num_beams=40,
        num_return_sequences=5,
        max_new_tokens=3,
    )
    leaves = tree.leaves(found[:, prompts.shape[1] :])
    items = [tree.items(int(leaf)).tolist()[0] for leaf in leaves]
    print("by generate    ", [items[:5], items[5:]])

    # What a user has seen, and what is sold out, never comes.
    seen = best.items[:, :2]
    available = torch.ones(tree.num_items, dtype=torch.bool)
    available[best.items[0, 2]] = False
    rest = gflowgr.constrained_beam_search(
        model, prompts, mask, tree, num_beams=40, exclude=seen, available=available
    )
    print("without these  ", rest.items[:, :5].tolist())

    # Exact log P of every item, to check the search or to rank a list made elsewhere.
    log_probs = gflowgr.item_logprobs(model, prompts, mask, tree)  # [B, items]
    print("the best, exact", log_probs.argmax(dim=1).tolist())

    # Items leave while others read: a snapshot that is held stays as it is.
    live.remove(best.items[:, :1].unique().tolist())
    now = gflowgr.constrained_beam_search(model, prompts, mask, live.snapshot.tree, num_beams=40)
    print("after removal  ", now.items[:, :5].tolist())


if __name__ == "__main__":
    main()
