"""One process of the tests of a sharded vocabulary (spawned, so it must be importable)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from gflowgr.ops import tb_loss
from gflowgr.ops.logprobs.vocab_parallel import vocab_parallel_logprobs

SHARDS = (37, 20)  # rows of the head on each process


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.randint(0, 5, (6, 3, 1), generator=g)
    bias = torch.randn(sum(SHARDS), generator=g)
    bias[5] = -math.inf
    tokens = torch.randint(6, sum(SHARDS), (6, 3, 4), generator=g)
    hidden = torch.randn(6, 3, 4, 8, generator=g).masked_fill(~mask[..., None], math.nan)
    weight = torch.randn(sum(SHARDS), 8, generator=g)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": bias,
        "tokens": tokens.masked_fill(~mask, -3),
        "mask": mask,
        "log_reward": torch.randn(6, 3, generator=g),
        "log_z": torch.randn(6, generator=g),
    }


def run_shard(rank: int, folder: str, dtypes: list[torch.dtype]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARDS)
    )
    for dtype in dtypes:
        torch.save(shard_results(rank, dtype), f"{folder}/{dtype}.{rank}.pt")
    dist.destroy_process_group()


def shard_results(rank: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Log-probabilities and the gradients of hidden states and of this rank's rows of the head."""
    x = inputs(dtype)
    first = sum(SHARDS[:rank])
    part = slice(first, first + SHARDS[rank])
    leaves = [x["hidden"], x["weight"][part].clone(), x["bias"][part].clone()]
    hidden, weight, bias = (t.requires_grad_() for t in leaves)
    log_pf = vocab_parallel_logprobs(
        hidden,
        weight,
        x["tokens"],
        first_token=first,
        bias=bias,
        mask=x["mask"],
        temperature=0.7,
    )
    tb_loss(log_pf, x["log_reward"], x["log_z"], mask=x["mask"]).backward()
    return [log_pf.detach(), *(t.grad for t in leaves)]
