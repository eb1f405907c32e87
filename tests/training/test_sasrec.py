"""Training SASRec: packed batches, resuming after a kill, the folder it leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.forked import kill_when, run_ranks
from torch.nn import functional as F
from transformers import TrainerCallback

from gflowgr.collaborative import SASRec, SASRecConfig
from gflowgr.data import Dataset, LeaveOneOut, Ragged
from gflowgr.errors import OutputError
from gflowgr.evaluation import ScoringRecommender, evaluate
from gflowgr.training import sasrec as module
from gflowgr.training import train_sasrec
from gflowgr.training.packing import EpochBatches, PackedSequences

NUM_ITEMS = 30
CONFIG = SASRecConfig(num_items=NUM_ITEMS, d_model=16, d_ff=32, max_length=8, dropout=0.2)
OPTIONS = {"epochs": 6, "batch_size": 16, "lr": 5e-3, "patience": 6, "progress": False}


def make_split(num_users: int = 60) -> LeaveOneOut:
    """Users walk through the items in steps of 1 or 2; their lengths differ."""
    rng = np.random.default_rng(3)
    rows = []
    for _ in range(num_users):
        start, step, length = rng.integers(NUM_ITEMS), rng.integers(1, 3), rng.integers(4, 14)
        rows.append(((start + step * np.arange(length)) % NUM_ITEMS).tolist())
    users = [str(user) for user in range(num_users)]
    return LeaveOneOut(Dataset("walks", users, Ragged.from_lists(rows), NUM_ITEMS))


def same_weights(one: SASRec, two: SASRec) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def losses(folder: Path) -> list[tuple[float, float]]:
    """(step, value) of every logged loss and validation metric of a finished run."""
    history = json.loads((folder / "sasrec_training.json").read_text())["log_history"]
    keys = ("loss", "eval_N@10")
    return [(entry["step"], entry[key]) for entry in history for key in keys if key in entry]


# ---- packed batches ----

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=12).filter(
    lambda rows: any(len(row) >= 2 for row in rows)
)


@given(rows=ROWS, max_length=st.integers(1, 6), batch_size=st.integers(1, 9))
def test_every_transition_is_predicted_once(
    rows: list[list[int]], max_length: int, batch_size: int
) -> None:
    data = PackedSequences(Ragged.from_lists(rows), max_length)
    found: list[tuple[int, int]] = []
    for windows in EpochBatches(len(data), batch_size, seed=1):
        batch = {name: values.numpy() for name, values in data[windows].items()}
        real = batch["targets"] >= 0
        assert np.array_equal(real, batch["items"] >= 0)
        assert np.array_equal(real, batch["segments"] >= 0)
        assert batch["items"].shape[1] <= max_length
        found += zip(batch["items"][real].tolist(), batch["targets"][real].tolist(), strict=True)
        # Within a segment: places count from 0, and each target is the next item.
        for segment in range(batch["segments"].max() + 1):
            row, column = np.nonzero(batch["segments"] == segment)
            assert len(set(row)) == 1
            assert batch["positions"][row, column].tolist() == list(range(len(row)))
            assert np.array_equal(
                batch["items"][row, column][1:], batch["targets"][row, column][:-1]
            )
    expected = [pair for row in rows for pair in itertools.pairwise(row)]
    assert sorted(found) == sorted(expected)
    assert data.num_predictions == len(expected)


def test_packing_leaves_little_padding() -> None:
    rng = np.random.default_rng(0)
    rows = [[1] * length for length in np.minimum(rng.geometric(0.15, 512) + 1, 51)]
    data = PackedSequences(Ragged.from_lists(rows), 50)
    batch = data[np.arange(512)]
    assert (batch["targets"] >= 0).float().mean() > 0.95


def test_packed_loss_equals_the_loss_of_single_sequences() -> None:
    torch.manual_seed(0)
    model = SASRec(CONFIG).eval()
    rows = [[4, 9, 2, 7], [1, 3], [5], list(range(20))]
    batch = PackedSequences(Ragged.from_lists(rows), 8)[np.arange(5)]
    terms = []
    for row in ([4, 9, 2, 7], [1, 3], [0, 1, 2, 3], list(range(3, 12)), list(range(11, 20))):
        for end in range(1, len(row)):
            scores = model.score(torch.tensor([row[:end]]), None)
            terms.append(F.cross_entropy(scores, torch.tensor([row[end]])))
    assert len(terms) == 3 + 1 + 19
    torch.testing.assert_close(model(**batch)["loss"], torch.stack(terms).mean())


def test_exposure_weights_take_down_what_was_shown_often(tmp_path: Path) -> None:
    split = make_split()
    dataset = replace(split.dataset, side={"shown": Ragged.from_lists([[7]] * 59 + [[]])})
    split = LeaveOneOut(dataset)
    sequences = split.train_sequences
    own = np.bincount(sequences.values, minlength=NUM_ITEMS)
    shown = np.bincount(split.dataset.side["shown"].values, minlength=NUM_ITEMS)
    assert shown[7] > 20
    weights = module._exposure_weights(split, sequences, 0.5)
    assert weights is not None
    expected = np.maximum(own + shown, 1.0) ** -0.5
    expected /= (expected * own).sum() / own.sum()
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    plain = train_sasrec(split, CONFIG, tmp_path / "plain", **{**OPTIONS, "epochs": 1})
    weighted = train_sasrec(
        split, CONFIG, tmp_path / "weighted", exposure_power=1.0, **{**OPTIONS, "epochs": 1}
    )
    assert not same_weights(plain, weighted)
    with pytest.raises(ValueError, match=r"exposure_power must be in \[0, 1\]; got 2"):
        train_sasrec(split, CONFIG, tmp_path / "none", exposure_power=2, **OPTIONS)


def test_batches_depend_on_seed_and_epoch_only() -> None:
    batches = EpochBatches(50, 8, seed=1)
    first = [batch.tolist() for batch in batches]
    assert first == [batch.tolist() for batch in EpochBatches(50, 8, seed=1)]
    batches.epoch = 1
    assert first != [batch.tolist() for batch in batches]
    assert sorted(itertools.chain(*first)) == list(range(50))
    assert len(first) == len(batches) == 7


def test_processes_share_the_batches() -> None:
    parts = [[b.tolist() for b in EpochBatches(50, 8, 1, rank, 2)] for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 4
    both = list(itertools.chain(*parts[0], *parts[1]))
    assert set(both) == set(range(50))
    assert len(both) == 64  # an equal share for each, filled up from the start


def test_no_transition_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sequence of two items"):
        PackedSequences(Ragged.from_lists([[1], [2]]), 5)


# ---- training ----


def test_training_learns_and_leaves_the_best_model(tmp_path: Path) -> None:
    split = make_split()
    other = tmp_path / "checkpoint-7"  # of another stage in the same folder: to be left alone
    other.mkdir()
    model = train_sasrec(split, CONFIG, tmp_path, **{**OPTIONS, "epochs": 25})
    assert not model.training
    result = evaluate(ScoringRecommender("SASRec", model), split, "valid", progress=False)
    record = json.loads((tmp_path / "sasrec_training.json").read_text())
    validation = [e["eval_N@10"] for e in record["log_history"] if "eval_N@10" in e]
    # The returned model is the best one, measured the same way by the package's evaluation.
    assert record["best_valid_N@10"] == max(validation)
    assert result.metrics["N@10"] == pytest.approx(max(validation), abs=1e-6)
    assert result.metrics["N@10"] > 0.6 > 3 * validation[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint-7",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "sasrec_training.json",
    ]
    assert same_weights(SASRec.load(tmp_path), model)
    # The score of an empty history is the popularity in the training part.
    counts = torch.from_numpy(split.item_counts).float()
    empty = model.score(torch.full((1, 1), -1), None)[0]
    torch.testing.assert_close(empty, ((counts + 1) / (counts + 1).sum()).log())


def test_finished_run_is_loaded_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split()
    model = train_sasrec(split, CONFIG, tmp_path, **{**OPTIONS, "epochs": 2})
    with pytest.raises(ValueError, match=re.escape("lr = 0.005, now 0.1; choose another")):
        train_sasrec(split, CONFIG, tmp_path, **{**OPTIONS, "epochs": 2, "lr": 0.1})
    replaced = train_sasrec(
        split, CONFIG, tmp_path, **{**OPTIONS, "epochs": 2, "seed": 7, "resume": False}
    )
    assert not same_weights(model, replaced)
    monkeypatch.setattr(module.SASRecTrainer, "train", None)  # would fail if it trained again
    again = train_sasrec(split, CONFIG, tmp_path, **{**OPTIONS, "epochs": 2, "seed": 7})
    assert same_weights(again, replaced)


class StopAt(TrainerCallback):
    """Raises, as a kill would end the process, at one optimiser step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["in the middle of an epoch", "before any checkpoint"])
def test_interrupted_run_resumes_to_the_same_model(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = make_split()
    whole = train_sasrec(split, CONFIG, tmp_path / "whole", **OPTIONS)
    steps_per_epoch = len(EpochBatches(60 + 5, 16, 0))
    stop = StopAt(2 if when == "before any checkpoint" else 3 * steps_per_epoch + 2)
    construct = module.SASRecTrainer.__init__

    def stopping(self: module.SASRecTrainer, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)  # type: ignore[arg-type]
        self.add_callback(stop)

    with monkeypatch.context() as patch:
        patch.setattr(module.SASRecTrainer, "__init__", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_sasrec(split, CONFIG, tmp_path / "cut", **OPTIONS)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    checkpoints = sorted((tmp_path / "cut" / "sasrec_checkpoints").glob("checkpoint-*"))
    assert bool(checkpoints) == (when != "before any checkpoint")
    # A checkpoint whose writing was cut short is not used.
    half = tmp_path / "cut" / "sasrec_checkpoints" / "checkpoint-999"
    half.mkdir(parents=True)
    (half / "trainer_state.json").write_text('{"epoch": 4')
    resumed = train_sasrec(split, CONFIG, tmp_path / "cut", **OPTIONS)
    assert same_weights(resumed, whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_run_killed_after_its_last_epoch_only_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early stopping had ended the training; no further step may be taken."""
    split = make_split()
    options = {**OPTIONS, "epochs": 40, "patience": 1, "lr": 2e-2}
    whole = train_sasrec(split, CONFIG, tmp_path / "whole", **options)
    epochs = sum("eval_N@10" in e for e in _history(tmp_path / "whole"))
    assert 1 < epochs < 40  # it did stop early
    with monkeypatch.context() as patch:
        patch.setattr(SASRec, "save", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_sasrec(split, CONFIG, tmp_path / "cut", **options)
    resumed = train_sasrec(split, CONFIG, tmp_path / "cut", **options)
    assert same_weights(resumed, whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def _history(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "sasrec_training.json").read_text())["log_history"]
    assert isinstance(history, list)
    return history


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.process
def test_killed_process_resumes_to_the_same_model(tmp_path: Path) -> None:
    folder, options = tmp_path / "cut", {**OPTIONS, "epochs": 6, "patience": 6}
    kill_when(
        lambda: any(folder.glob("*/checkpoint-*")),
        lambda: train_sasrec(make_split(), CONFIG, folder, **options),
        tmp_path / "log",
    )
    assert not (folder / "model.safetensors").exists()
    resumed = train_sasrec(make_split(), CONFIG, folder, **options)
    whole = train_sasrec(make_split(), CONFIG, tmp_path / "whole", **options)
    assert same_weights(resumed, whole)


@pytest.mark.process
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Each asserts that the model it got is the one on disk; together they learn."""
    folder, options = tmp_path / "two", {**OPTIONS, "epochs": 25, "patience": 25}

    def train() -> None:
        model = train_sasrec(make_split(), CONFIG, folder, **options)
        assert torch.distributed.get_world_size() == 2
        assert same_weights(SASRec.load(folder), model)

    run_ranks(train, 2, tmp_path)
    validation = [e["eval_N@10"] for e in _history(folder) if "eval_N@10" in e]
    assert max(validation) > 0.6
    # 65 windows in batches of 16 for each of two processes: three steps an epoch, not five.
    assert max(e["step"] for e in _history(folder)) == 25 * 3


def test_evaluation_on_a_subset_of_users(tmp_path: Path) -> None:
    split = make_split()
    options = {**OPTIONS, "epochs": 1, "eval_users": 7}
    train_sasrec(split, CONFIG, tmp_path, **options)
    recall = [e["eval_R@10"] for e in _history(tmp_path) if "eval_R@10" in e]
    assert len(recall) == 1
    assert recall[0] * 7 == pytest.approx(round(recall[0] * 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"patience": 0}, "patience must be at least 1; got 0"),
        ({"eval_users": 0}, "eval_users must be at least 1; got 0"),
        ({"lr": float("nan")}, "lr must be a positive number; got nan"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_sasrec(make_split(), CONFIG, tmp_path, **{**OPTIONS, **change})


def test_config_of_another_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.num_items is 5, but the data has 30 items"):
        train_sasrec(make_split(), SASRecConfig(num_items=5), tmp_path, **OPTIONS)


def test_output_that_cannot_be_written_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken"):
        train_sasrec(make_split(), CONFIG, tmp_path / "taken", **OPTIONS)
