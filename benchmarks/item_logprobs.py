"""Seconds to score a whole catalogue for a prompt: shared prefixes against one row per item.

    python benchmarks/item_logprobs.py [--data DIR] [--prompts 4] [--source 60] [--sample 512]

Beauty's 12,101 items with LETTER's published identifiers; a random T5, 128 wide, 4 + 4 layers. The
plain ways are timed on ``--sample`` items and scaled up (they are linear in the items): *plain*
puts every (prompt, item) pair through the model, *plain_encoded_once* repeats the encoder's states
instead, which leaves only the decoder per pair.

Prediction, in multiply-adds per prompt (S = 60 source tokens): a decoder token costs
4 x (4 x 128 x 384 + 2 x 128 x 360 + 2 x 128 x 1024 + 128 x 1027 / 4), 2.3 million, for each of the
tree's 19,825 inner nodes: 46 G. A pair costs an encoder of 60 tokens (110 M), cross-attention keys
and values of 60 tokens (24 M) and four decoder tokens (11 M): 1750 G for all items, 38 times as
much, and 420 G, 9 times, without the encoder.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gflowgr.decoding import item_logprobs
from gflowgr.identifiers import read_index
from gflowgr.models import IdentifierVocabulary, TigerConfig, build_tiger
from gflowgr.tree import PrefixTree


def plain(model: nn.Module, source: Tensor, tokens: Tensor, encoded: bool, rows: int) -> Tensor:
    """Log P of identifiers [M, L] for one prompt [1, S], every item a row of its own."""
    out = []
    states = model.get_encoder()(input_ids=source) if encoded else None
    for part in tokens.split(rows):
        start = torch.zeros_like(part[:, :1])
        given = {"decoder_input_ids": torch.cat([start, part[:, :-1]], dim=1)}
        if states is None:
            logits = model(input_ids=source.expand(len(part), -1), **given).logits
        else:
            repeated = states.last_hidden_state.expand(len(part), -1, -1)
            logits = model(encoder_outputs=(repeated,), **given).logits
        out.append(logits.log_softmax(-1).gather(-1, part.unsqueeze(-1)).sum((1, 2)))
    return torch.cat(out)


def seconds(run: Callable[[], Tensor], repeat: int) -> tuple[np.ndarray, Tensor]:
    """Fastest wall and CPU seconds of ``repeat`` runs, after one to warm up.

    Other work on the machine only ever adds time; CPU seconds suffer less from it than wall time.
    """
    best, result = np.full(2, np.inf), run()
    for _ in range(repeat):
        gc.collect()
        begin = time.perf_counter(), time.process_time()
        result = run()
        best = np.minimum(best, np.subtract((time.perf_counter(), time.process_time()), begin))
    return best, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("GFLOWGR_DATA", "../shared/data"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--source", type=int, default=60)
    parser.add_argument("--sample", type=int, default=512)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--normalize", default="vocab", choices=["vocab", "level", "children"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    index = read_index(Path(options.data) / "Beauty" / "index.letter_official.json.gz")
    codes = np.asarray(index.codes)
    vocabulary = IdentifierVocabulary((256,) * codes.shape[1])
    tokens = torch.from_numpy(vocabulary.encode(codes))
    tree = PrefixTree.from_identifiers(tokens)
    model = build_tiger(vocabulary, TigerConfig(), seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (options.prompts, options.source)
    source = torch.randint(2, vocabulary.size, shape, generator=generator)
    mask = torch.ones_like(source)
    chosen = torch.randperm(len(tokens), generator=generator)[: options.sample]

    with torch.no_grad():
        ours, values = seconds(
            lambda: item_logprobs(model, source, mask, tree, normalize=options.normalize),
            options.repeat,
        )
        ours /= options.prompts
        report: dict[str, Any] = {"items": len(tokens)} | vars(options)
        report["tree"] = {"seconds": ours[0], "cpu_seconds": ours[1]}
        for name, encoded in (("plain", False), ("plain_encoded_once", True)):
            took, expected = seconds(
                lambda encoded=encoded: plain(
                    model, source[:1], tokens[chosen], encoded, options.rows
                ),
                options.repeat,
            )
            took *= len(tokens) / len(chosen)
            report[name] = {"seconds": took[0], "cpu_seconds": took[1]}
            report[name] |= {"times": took[0] / ours[0], "cpu_times": took[1] / ours[1]}
            if options.normalize == "vocab":
                report["largest_difference"] = float((values[0, chosen] - expected).abs().max())
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
