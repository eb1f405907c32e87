"""The head sharded over processes: two gloo processes compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from support.vocab_shard import SHARDS, inputs, run_shard

from gflowgr.ops import tb_loss, trajectory_logprobs
from gflowgr.ops.logprobs.vocab_parallel import partial_logprobs

pytestmark = pytest.mark.process

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have saved, of every dtype."""
    found = tmp_path_factory.mktemp("shards")
    mp.start_processes(
        run_shard, args=(str(found), DTYPES), nprocs=len(SHARDS), start_method="fork"
    )
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_processes_equal_one(folder: Path, dtype: torch.dtype) -> None:
    results = [torch.load(folder / f"{dtype}.{rank}.pt") for rank in range(len(SHARDS))]

    x = inputs(dtype)
    leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    log_pf = trajectory_logprobs(
        hidden, weight, x["tokens"], bias=bias, mask=x["mask"], temperature=0.7
    )
    tb_loss(log_pf, x["log_reward"], x["log_z"], mask=x["mask"]).backward()

    tolerance = {
        torch.float32: {"rtol": 1e-4, "atol": 1e-4},
        torch.bfloat16: {"rtol": 2e-2, "atol": 2e-1},
    }.get(dtype, {})
    for rank, (found, d_hidden, d_weight, d_bias) in enumerate(results):
        part = slice(sum(SHARDS[:rank]), sum(SHARDS[: rank + 1]))
        torch.testing.assert_close(found, log_pf.detach())
        torch.testing.assert_close(d_hidden, hidden.grad, **tolerance)
        torch.testing.assert_close(d_weight, weight.grad[part], **tolerance)
        torch.testing.assert_close(d_bias, bias.grad[part], **tolerance)


def test_the_parts_of_the_shards_combine() -> None:
    x = inputs(torch.float64)
    hidden = x["hidden"].flatten(0, 2)
    targets = x["tokens"].masked_fill(~x["mask"], -1).flatten()
    parts = []
    for rank, size in enumerate(SHARDS):
        first = sum(SHARDS[:rank])
        part = slice(first, first + size)
        parts.append(
            partial_logprobs(
                hidden, x["weight"][part], targets, first_token=first, bias=x["bias"][part]
            )
        )
    lse, target_logit = (torch.stack(p) for p in zip(*parts, strict=True))
    expected = trajectory_logprobs(
        x["hidden"], x["weight"], x["tokens"], bias=x["bias"], mask=x["mask"]
    ).flatten()
    valid = targets >= 0
    combined = target_logit.sum(0) - lse.logsumexp(0)
    torch.testing.assert_close(combined[valid], expected[valid])
    assert not lse[:, ~valid].any()
    assert not target_logit[:, ~valid].any()
