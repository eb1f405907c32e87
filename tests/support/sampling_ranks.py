"""Steps of sampling whose later sets depend on earlier ones, on one process of several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from gflowgr.samplers import OnPolicySampler, RandomSampler, ReplaySampler
from support.sampling_world import FakeProposer, ask, world, world_pool

STEPS = 7


def sample_part(rank: int, world_size: int) -> np.ndarray:
    """Items [steps, B / world_size, N] of this process's prompts."""
    inner = OnPolicySampler(FakeProposer(), RandomSampler(world_pool(), 4), refresh_steps=3)
    sampler = ReplaySampler(inner, 0.4, slots=4, capacity=8)
    sets = []
    for step in range(STEPS):
        examples = np.random.default_rng(step).permutation(len(world().train))[:20]
        asked = ask(np.sort(examples[rank::world_size]), epoch=step // 3, step=step)
        chosen = sampler.sample(asked)
        sampler.observe(asked, chosen, torch.from_numpy(chosen.items * 7 % 11 / 5.0))
        sets.append(np.concatenate([asked.examples[:, None], chosen.items], axis=1))
    return np.stack(sets)


def run_rank(rank: int, folder: str, world_size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    np.save(Path(folder) / f"{rank}.npy", sample_part(rank, world_size))
    dist.destroy_process_group()
