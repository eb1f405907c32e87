"""Training resumes only from a complete checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from support.tiny_causal import causal_folder, causal_model
from support.tiny_shop import make_args
from support.tiny_trainer import Killed, StopAt, assert_equal_weights, make_trainer, weights
from transformers import TrainerState

from gflowgr.errors import DataError, OutputError
from gflowgr.folders import output_lock, write_manifest
from gflowgr.models import CausalConfig, LoraSettings
from gflowgr.training.checkpoints import has_ended, last_complete_checkpoint, named_write_errors


def write(folder: Path, *, run: str = "1", best: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    state = "null" if best is None else f'"/elsewhere/{best}"'
    (folder / "trainer_state.json").write_text(f'{{"best_model_checkpoint": {state}}}')
    write_manifest(folder, run=run)
    return folder


def found(folder: Path) -> tuple[str | None, list[str]]:
    """The checkpoint that is taken, and those that are passed over with what is said of them."""
    said: list[str] = []
    path = last_complete_checkpoint(folder, said.append)
    return path and path.name, said


def test_newest_complete_one_is_taken_and_the_others_are_spoken_of(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-9")
    write(tmp_path / "checkpoint-10")
    (write(tmp_path / "checkpoint-11") / "manifest.json").unlink()
    (write(tmp_path / "checkpoint-100") / "model.safetensors").write_bytes(b"weigh")
    (tmp_path / "checkpoint-best").mkdir()
    taken, said = found(tmp_path)
    assert taken == "checkpoint-10"
    assert len(said) == 2
    assert "checkpoint-11 is passed over: it has no manifest.json" in said[0]
    assert "checkpoint-100 is passed over: model.safetensors has 5 bytes, and had 7" in said[1]
    assert len(list(tmp_path.iterdir())) == 5  # another process may be writing them


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert found(tmp_path / "nowhere") == (None, [])
    (write(tmp_path / "checkpoint-3") / "trainer_state.json").write_text("")
    with pytest.warns(UserWarning, match=r"checkpoint-3 is passed over: trainer_state\.json"):
        assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("state", "ended"),
    [
        ({"global_step": 9, "epoch": 9.9}, False),
        ({"global_step": 10, "epoch": 10.0}, True),
        ({"global_step": 4, "epoch": 4.0, "waited": 2}, False),
        ({"global_step": 4, "epoch": 4.0, "waited": 3}, True),
    ],
)
def test_a_training_has_ended_with_its_last_epoch_or_when_it_stopped_early(
    state: dict[str, float], ended: bool, tmp_path: Path
) -> None:
    args = make_args(
        tmp_path,
        max_steps=-1,
        num_train_epochs=10,
        early_stopping_patience=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    waited = {"early_stopping_patience_counter": state.get("waited", 0)}
    left = TrainerState(  # type: ignore[call-arg]
        global_step=int(state["global_step"]),
        epoch=state["epoch"],
        stateful_callbacks={"EarlyStoppingCallback": {"args": {}, "attributes": waited}},
    )
    assert has_ended(left, args) is ended
    assert has_ended(left, make_args(tmp_path, max_steps=10)) is (state["global_step"] == 10)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"format": 1}', b'{"format": 1, "files": {"a": 1}}']
)
def test_a_damaged_manifest_is_no_manifest(content: bytes, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2")
    (write(tmp_path / "checkpoint-3") / "manifest.json").write_bytes(content)
    taken, said = found(tmp_path)
    assert taken == "checkpoint-2"
    assert "manifest.json" in said[0]


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2")
    (write(tmp_path / "checkpoint-3") / "model.safetensors").write_bytes(b"wEights")
    assert found(tmp_path)[0] == "checkpoint-2"
    assert "its SHA-256 differs" in found(tmp_path)[1][0]


def test_a_checkpoint_needs_the_best_one_that_it_refers_to(tmp_path: Path) -> None:
    best = write(tmp_path / "checkpoint-1")
    write(tmp_path / "checkpoint-2", best="checkpoint-2")
    write(tmp_path / "checkpoint-3", best="checkpoint-1")
    assert found(tmp_path)[0] == "checkpoint-3"
    (best / "model.safetensors").write_bytes(b"")
    taken, said = found(tmp_path)
    assert taken == "checkpoint-2"
    assert "its best model is in checkpoint-1, and there model.safetensors has 0 bytes" in said[0]


def test_checkpoints_of_an_earlier_run_in_the_folder_are_not_gone_on_from(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-8", run="1")
    write(tmp_path / "checkpoint-4", run="2")
    assert found(tmp_path) == ("checkpoint-4", [])
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    taken, said = found(tmp_path)
    assert taken is None
    assert said[1].endswith("checkpoint-8 is passed over: it is of an earlier run in this folder")


OPTIONS: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def test_every_cut_file_of_the_newest_checkpoint_is_noticed_and_the_one_before_taken(
    tmp_path: Path,
) -> None:
    sampler = {"sampler": "on_policy", "sampler_options": {"refresh_steps": 2}}
    make_trainer(make_args(tmp_path / "run", **OPTIONS, **sampler)).train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoint-3").iterdir())
    assert {"model.safetensors", "optimizer.pt", "sampler.npz", "trainer_state.json"} <= set(names)
    assert not any(name.endswith(".bin") for name in names)
    for name in names:
        path = tmp_path / "run" / "checkpoint-3" / name
        content = path.read_bytes()
        for cut in (b"", content[: len(content) // 2]):
            path.write_bytes(cut)
            taken, said = found(tmp_path / "run")
            assert taken == "checkpoint-2", name
            assert name in said[0]
        path.write_bytes(content)
    assert found(tmp_path / "run") == ("checkpoint-3", [])

    (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    resumed = make_trainer(make_args(tmp_path / "run", **{**OPTIONS, "max_steps": 4}, **sampler))
    with pytest.raises(DataError, match=r"checkpoint-3 is no complete checkpoint: optimizer\.pt"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    with pytest.warns(UserWarning, match="checkpoint-3 is passed over"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 2
    assert found(tmp_path / "run") == ("checkpoint-4", [])  # and the damaged one was replaced


def test_a_run_where_a_lora_run_was_reads_nothing_of_it(tmp_path: Path) -> None:
    base = str(causal_folder(tmp_path / "base"))
    plain, lora = CausalConfig(base), CausalConfig(base, lora=LoraSettings(r=2))
    whole = make_trainer(make_args(tmp_path / "whole", **OPTIONS), causal_model(plain))
    whole.train()
    make_trainer(make_args(tmp_path / "run", **OPTIONS), causal_model(lora)).train()
    cut = make_trainer(make_args(tmp_path / "run", **OPTIONS), causal_model(plain), StopAt(2))
    with pytest.raises(Killed):
        cut.train()
    assert not (tmp_path / "run" / "checkpoint-1" / "adapter_config.json").exists()
    # Step 3 is the LoRA run's, and the highest.
    resumed = make_trainer(make_args(tmp_path / "run", **OPTIONS), causal_model(plain, seed=7))
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 1
    assert_equal_weights(weights(resumed), weights(whole))


def test_a_model_saved_over_adapters_is_read_alone_and_other_files_stay(tmp_path: Path) -> None:
    base = str(causal_folder(tmp_path / "base"))
    causal_model(CausalConfig(base, lora=LoraSettings(r=2))).save_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    (tmp_path / "out" / "checkpoint-1").mkdir()
    model = causal_model(CausalConfig(base))
    model.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert_equal_weights(loaded.backbone.state_dict(), model.backbone.state_dict())
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert not list((tmp_path / "out").glob("adapter_*"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.process
def test_another_run_in_the_folder_is_refused_and_named(tmp_path: Path) -> None:
    trainer = make_trainer(make_args(tmp_path, **OPTIONS))
    with output_lock(tmp_path), output_lock(tmp_path):
        pass  # taken twice by one thread, and given back
    holder = (
        "import sys; from gflowgr.folders import output_lock\n"
        "with output_lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        message = f"process {process.pid} on .* is working in this folder"
        with pytest.raises(OutputError, match=message) as caught:
            trainer.train()
        assert str(tmp_path) in str(caught.value)
        process.kill()  # the lock goes with its process
    trainer.train()
    assert found(tmp_path) == ("checkpoint-3", [])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_errors_of_the_libraries_name_the_folder(error: Exception) -> None:
    message = r"cannot write the checkpoint, [\d,]+ bytes are free: "
    expected = pytest.raises(OutputError, match=message)
    with expected as caught, named_write_errors("runs/x"):
        raise error
    assert str(caught.value).endswith("'runs/x'")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
