"""Two processes under ``torchrun`` train as one does: DDP and FSDP2, resumed, and with an error.

All of it is one job (:mod:`distributed_run`), because starting processes takes most of the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import distributed_run
from support.distributed_run import GLOBAL_BATCH, HALF, STEPS, causal_in, note, trainer_in
from support.tiny_causal import causal_folder
from support.tiny_shop import make_args, make_model, shop
from support.tiny_trainer import make_trainer

from gflowgr.evaluation import evaluate
from gflowgr.evaluation.generative import GenerativeRecommender
from gflowgr.models import GFlowModel

pytestmark = pytest.mark.process

Entry = dict[str, float]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does, and where the job of two goes on from."""
    folder = tmp_path_factory.mktemp("distributed")
    trainer = trainer_in(folder / "one")
    trainer.train()
    note(trainer, folder / "one")
    causal_folder(folder / "qwen3")
    return folder


@pytest.fixture(scope="module")
def job(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", distributed_run.__file__, str(root)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def history(folder: Path, rank: int = 0) -> list[Entry]:
    entries: list[Entry] = json.loads((folder / f"log.{rank}.json").read_text())
    return entries


def assert_same_course(one: list[Entry], other: list[Entry], folder: str) -> None:
    """The same steps, losses, gradients, rewards and evaluations, up to rounding."""
    assert [entry["step"] for entry in one] == [entry["step"] for entry in other]
    for entry, expected in zip(other, one, strict=True):
        assert entry.keys() == expected.keys()
        for name in entry:
            # Ranks may swap; a mean of residuals of both signs is small beside their rounding.
            near = 1e-4 if name.endswith(("spearman", "residual_mean")) else 1e-6
            assert entry[name] == pytest.approx(expected[name], rel=3e-4, abs=near), (
                folder,
                name,
                entry["step"],
            )


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one(
    way: str, root: Path, job: subprocess.CompletedProcess[str]
) -> None:
    """Also in the last batch of an epoch, which is short, and in the evaluation they divide."""
    assert (root / way / "log.0.json").is_file(), job.stderr
    assert history(root / way, rank=1) == history(root / way)
    assert_same_course(history(root / "one"), history(root / way), way)
    steps = [entry["step"] for entry in history(root / way) if "loss" in entry]
    assert steps == list(range(1, STEPS + 1))


def test_a_sharded_decoder_only_model_trains_as_a_whole_one(
    root: Path, job: subprocess.CompletedProcess[str]
) -> None:
    assert (root / "causal_fsdp" / "log.0.json").is_file(), job.stderr
    trainer = causal_in(root / "causal")
    trainer.train()
    note(trainer, root / "causal")
    assert_same_course(history(root / "causal"), history(root / "causal_fsdp"), "causal_fsdp")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_draw_the_same_items(
    way: str, root: Path, job: subprocess.CompletedProcess[str]
) -> None:
    """From the collaborative model, from the backbone, and from what was rewarded before."""
    sets = {}
    for folder, processes in (("one", 1), (way, 2)):
        parts = sorted((root / folder).glob("items.*.jsonl"))
        assert len(parts) == processes, job.stderr
        rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
        sets[folder] = sorted(rows)
    assert sets["one"] == sets[way]
    assert len(sets["one"]) == len(shop().train) + 2 * GLOBAL_BATCH


@pytest.mark.parametrize("way", ["one_then_two", "fsdp_resumed"])
def test_two_processes_go_on(way: str, root: Path, job: subprocess.CompletedProcess[str]) -> None:
    """From what one process saved; and with sharded weights and optimiser."""
    assert (root / way / "log.0.json").is_file(), job.stderr
    assert_same_course(history(root / "one"), history(root / way), way)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_process_goes_on_from_two(
    accumulation: int, root: Path, job: subprocess.CompletedProcess[str]
) -> None:
    """With the same order of the data, also if it takes each batch in two parts."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    folder = root / f"two_then_one_{accumulation}"
    trainer = trainer_in(folder, **options)
    trainer.train(resume_from_checkpoint=str(root / "ddp" / f"checkpoint-{HALF}"))
    note(trainer, folder)
    if accumulation == 1:
        assert_same_course(history(root / "one"), history(folder), folder.name)
    else:
        losses = [[e["loss"] for e in history(root / n) if "loss" in e] for n in ("one", folder)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_saved_model_is_an_ordinary_one(
    way: str, root: Path, job: subprocess.CompletedProcess[str]
) -> None:
    """The best one, on a single process and without sharding; tied weights are stored once."""
    assert (root / way / "model" / "model.safetensors").is_file(), job.stderr
    model = GFlowModel.from_pretrained(root / way / "model")
    assert model.flow_started
    recommender = GenerativeRecommender(model, num_beams=4)
    measured = evaluate(recommender, shop(), "valid", max_users=30, seed=3, progress=False)
    best = max(entry.get("eval_N@10", 0.0) for entry in history(root / "one"))
    assert measured.metrics["N@10"] == pytest.approx(best)
    sizes = [
        (root / f / "model.safetensors").stat().st_size
        for f in (f"{way}/model", "one/checkpoint-8")
    ]
    assert sizes[0] == sizes[1]


def test_an_error_in_one_process_ends_all(
    root: Path, job: subprocess.CompletedProcess[str]
) -> None:
    """The other one waits for it in the middle of a step."""
    assert (root / "fsdp_resumed" / "log.0.json").is_file(), job.stderr
    assert job.returncode == 1
    assert "ValueError: the second process cannot go on" in job.stderr
    assert not list((root / "broken").glob("checkpoint-*"))


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path))
    shard = distributed_run.shard(trainer)
    plugin = shard.accelerator.state.fsdp_plugin
    try:
        plugin.fsdp_version = 1
        with pytest.raises(ValueError, match=r"fsdp_config: version must be 2 \(FSDP2\); got 1"):
            trainer._check_fsdp(make_model())
    finally:
        type(shard.accelerator.state)._reset_state()
