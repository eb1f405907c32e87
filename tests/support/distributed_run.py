"""What each process of the distributed tests runs, under ``torchrun``; and the same on one.

``torchrun ... distributed_run.py FOLDER``: trains with DDP and with FSDP2, resumes, and at the end
fails in one process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from gflowgr.models import CausalConfig
from gflowgr.training import GFlowGRTrainer
from support.tiny_causal import causal_model
from support.tiny_shop import make_args, make_model
from support.tiny_trainer import make_trainer, reproducible

GLOBAL_BATCH = 256  # of 1,353 examples: the sixth and last batch of an epoch has 73
STEPS, HALF = 8, 4

OPTIONS: dict[str, Any] = {
    "num_trajectories": 4,
    "sampler": {"curriculum": 0.5, "on_policy": 0.5},
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": HALF,
    "eval_strategy": "steps",
    "eval_steps": HALF,
    "eval_calibration_users": 20,
    "load_best_model_at_end": True,
}
SETTINGS: dict[str, Any] = {
    "signals": ["r_a", "r_yhat", "r_sim", "r_generation"],
    "fusion": "weighted",
}


def trainer_in(folder: Path, *, processes: int = 1, **options: Any) -> GFlowGRTrainer:
    sampling = {"refresh_steps": 3, "replay_share": 0.25}
    values = {
        **OPTIONS,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "sampler_options": sampling,
        **options,
    }
    trainer = make_trainer(make_args(folder, **values), make_model(**SETTINGS))
    write_down(trainer, folder)
    return trainer


def write_down(trainer: GFlowGRTrainer, folder: Path) -> None:
    """Append what this process samples, (epoch, example, items), to ``items.RANK.jsonl``."""
    sampler = trainer._flow_inputs.sampler
    sample, path = sampler.sample, folder / f"items.{trainer.args.process_index}.jsonl"

    def sample_and_write(request: Any) -> Any:
        chosen = sample(request)
        with path.open("a") as file:
            for example, items in zip(request.examples, chosen.items, strict=True):
                file.write(json.dumps([request.epoch, int(example), items.tolist()]) + "\n")
        return chosen

    sampler.sample = sample_and_write


def causal_in(folder: Path, *, processes: int = 1) -> GFlowGRTrainer:
    """A decoder-only generator, whose evaluation decodes with copies of its modules.

    By SGD: log Z starts where its gradient is rounding alone, which Adam would make large.
    """
    torch.manual_seed(0)
    values = {**OPTIONS, "sampler": "curriculum", "max_steps": 2, "optim": "sgd"}
    values |= {"eval_steps": 2, "save_steps": 2}
    args = make_args(folder, **values, per_device_train_batch_size=64 // processes)
    return make_trainer(args, causal_model(CausalConfig(str(folder.parent / "qwen3"))))


def shard(trainer: GFlowGRTrainer) -> GFlowGRTrainer:
    """Turn FSDP2 on, as accelerate does for ``fsdp=True`` on GPUs, but not on CPUs."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    trainer.is_fsdp_enabled = True
    return trainer


def note(trainer: GFlowGRTrainer, folder: Path) -> None:
    """What this process knows at the end."""
    rank = trainer.args.process_index
    (folder / f"log.{rank}.json").write_text(json.dumps(reproducible(trainer)))


def run(root: Path) -> None:
    ddp = trainer_in(root / "ddp", processes=2)
    ddp.train()
    ddp.save_model(str(root / "ddp" / "model"))
    note(ddp, root / "ddp")

    # One process got as far as step 4.
    resumed = trainer_in(root / "one_then_two", processes=2)
    resumed.train(resume_from_checkpoint=str(root / "one" / f"checkpoint-{HALF}"))
    note(resumed, root / "one_then_two")

    AcceleratorState._reset_state()
    fsdp = shard(trainer_in(root / "fsdp", processes=2))
    fsdp.train()
    kinds = {type(value).__name__ for value in fsdp.model.parameters()}
    assert kinds == {"DTensor"}, kinds
    fsdp.save_model(str(root / "fsdp" / "model"))
    note(fsdp, root / "fsdp")

    AcceleratorState._reset_state()
    again = shard(trainer_in(root / "fsdp_resumed", processes=2))
    again.train(resume_from_checkpoint=str(root / "fsdp" / f"checkpoint-{HALF}"))
    note(again, root / "fsdp_resumed")

    AcceleratorState._reset_state()
    causal = shard(causal_in(root / "causal_fsdp", processes=2))
    causal.train()
    note(causal, root / "causal_fsdp")

    AcceleratorState._reset_state()
    broken = trainer_in(root / "broken", processes=2)
    if broken.args.process_index == 1:
        sample = broken._flow_inputs.sampler.sample

        def fail(request: Any) -> Any:
            if request.step == 1:
                raise ValueError("the second process cannot go on")
            return sample(request)

        broken._flow_inputs.sampler.sample = fail
    broken.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
