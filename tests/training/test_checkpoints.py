"""Only a checkpoint that was written to its end is gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from gflowgr.errors import OutputError
from gflowgr.training.checkpoints import last_complete_checkpoint, named_write_errors


def write(folder: Path, state: str | None) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_newest_complete_one_is_taken_and_incomplete_ones_are_removed(tmp_path: Path) -> None:
    older = write(tmp_path / "checkpoint-9", '{"global_step": 9}')
    newest_complete = write(tmp_path / "checkpoint-10", '{"global_step": 10}')
    no_state = write(tmp_path / "checkpoint-11", None)
    truncated = write(tmp_path / "checkpoint-100", '{"global_step": 10')
    other = write(tmp_path / "checkpoint-best", None)
    assert last_complete_checkpoint(tmp_path) == newest_complete
    assert not no_state.exists()
    assert not truncated.exists()
    assert older.exists()  # it may be the best one
    assert other.exists()


def test_none_is_found_where_there_is_none(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(tmp_path) is None
    write(tmp_path / "checkpoint-3", '{"global')
    assert last_complete_checkpoint(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


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
