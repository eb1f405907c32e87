"""``gflowgr identifiers``: files, tables, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from gflowgr.cli import identifiers as command
from gflowgr.cli import main
from gflowgr.data import generate_builtin, load_dataset, save_dataset
from gflowgr.identifiers import METHODS, read_index
from gflowgr.identifiers.collisions import Collisions

Capture = pytest.CaptureFixture[str]
QUICK = ("--steps", 20, "--hidden", 16, "--codes", 16, "--no-progress")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    save_dataset(generate_builtin(seed=1, num_users=60, num_items=200), folder)
    rng = np.random.default_rng(0)
    np.save(folder / "cf.npy", rng.normal(size=(200, 6)).astype(np.float32))
    return folder


def call(capsys: Capture, *arguments: Any) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        code = main(["identifiers", *map(str, arguments)])
    except SystemExit as end:  # argparse ends so
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_knows_the_methods_of_the_package() -> None:
    assert command.METHODS == METHODS
    assert get_args(Collisions) == command.COLLISIONS


@pytest.mark.parametrize("method", METHODS)
def test_identifiers_are_made_from_texts(
    method: str, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / f"index.{method}.json.gz"
    options: tuple[Any, ...] = ("--codes", 16) if method == "kmeans" else QUICK
    if method == "letter":
        options += ("--cf-embeddings", data / "cf.npy")
    make = ("make", "--data", data, "--dim", 16, "--method", method, "--output", output, *options)
    code, out, error = call(capsys, *make)
    assert (code, error) == (0, "")
    assert f"written to {output}" in out
    assert "collisions: reassign" in out
    made = read_index(output, num_items=200)
    assert made.num_unique() == 200
    assert made.codes.shape == (200, 4)
    # The same command gives the same bytes, but never replaces a file unasked.
    before = output.read_bytes()
    code, _, error = call(capsys, *make)
    assert code == 2
    assert "exists; give --overwrite" in error
    assert call(capsys, *make, "--overwrite")[0] == 0
    assert output.read_bytes() == before


def test_identifiers_are_made_from_vectors_without_a_dataset(
    data: Path, tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "index.x.json.gz"
    options = ("--method", "kmeans", "--levels", 2, "--codes", 8, "--collisions", "extra")
    made = call(capsys, "make", "--embeddings", data / "cf.npy", "--output", output, *options)
    assert made[0] == 0
    assert read_index(output).codes.shape == (200, 3)


def test_identifiers_are_made_by_a_function_of_ones_own(
    data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the current folder; it is told the dataset, the vectors and the seed."""
    (tmp_path / "own_codes.py").write_text(
        "import numpy as np\n"
        "def by_number(dataset, vectors, seed):\n"
        "    assert (dataset.num_items, vectors.shape, seed) == (200, (200, 6), 3)\n"
        "    items = np.arange(dataset.num_items)\n"
        "    return np.stack([items // 16, items % 16], axis=1)\n"
        "def too_few(dataset, vectors, seed):\n"
        "    return np.zeros((2, 2), np.int64)\n"
    )
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "index.own.json.gz"
    options = ("--cf-embeddings", data / "cf.npy", "--seed", 3, "--output", output)
    own = ("make", "--method", "own_codes:by_number", *options)
    code, out, error = call(capsys, *own, "--data", data)
    assert (code, error) == (0, "")
    assert "own_codes:by_number" in out
    assert read_index(output, num_items=200).num_unique() == 200
    again = (*options, "--overwrite", "--data", data)
    for arguments, message in [
        ((*own, "--overwrite"), "--method own_codes:by_number needs --data FOLDER"),
        ((*own, "--overwrite", "--data", data, "--steps", 3), "has no option steps"),
        (("make", "--method", "own_codes:none", *again), "has no 'none'"),
        (("make", "--method", "own_codes:too_few", *again), "codes of 200 items; got 2"),
        (("make", "--method", "rqvea", *options), "or 'module:function'; got 'rqvea'"),
    ]:
        code, _, error = call(capsys, *arguments)
        assert code == 2
        assert message in error


def test_vectors_of_texts_are_kept(data: Path, tmp_path: Path, capsys: Capture) -> None:
    kept, output = tmp_path / "text.npy", tmp_path / "index.x.json.gz"
    options = ("--method", "kmeans", "--codes", 8, "--dim", 12, "--save-embeddings", kept)
    assert call(capsys, "make", "--data", data, "--output", output, *options)[0] == 0
    assert np.load(kept).shape == (200, 12)


def test_index_files_are_checked_and_compared(data: Path, tmp_path: Path, capsys: Capture) -> None:
    other, out = tmp_path / "index.flat.json.gz", tmp_path / "report"
    options = ("--method", "kmeans", "--codes", 4, "--dim", 8, "--collisions", "shared")
    assert call(capsys, "make", "--data", data, "--output", other, *options)[0] == 0
    code, table, error = call(capsys, "check", "hierarchy", "--data", data, "--dim", 8)
    assert (code, error) == (0, "")
    assert "0 (0.00%)" in table
    assert "text, first token" in table
    spaces = ("--data", data, "--dim", 8, "--cf-embeddings", data / "cf.npy")
    code, table, error = call(capsys, "compare", "hierarchy", other, *spaces, "--out", out)
    assert (code, error) == (0, "")
    assert "cf, first two tokens" in table
    measured = json.loads((out / "identifiers.json").read_text())
    assert list(measured) == ["hierarchy", "flat"]
    assert measured["hierarchy"]["collision_rate"] == 0
    assert measured["flat"]["agreement"]["cf"]["chance"][0] > 0.2
    assert (out / "identifiers.md").read_text().startswith("| identifiers |")
    assert (out / "code_use.png").is_file()
    assert (out / "agreement.png").is_file()


def test_an_index_without_dataset_is_checked_for_itself(data: Path, capsys: Capture) -> None:
    code, table, _ = call(capsys, "check", data / "index.hierarchy.json.gz")
    assert code == 0
    assert "text" not in table.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("make", "--output", "index.x.json.gz"), "give --data FOLDER (item texts) or"),
        (("make", "--output", "codes.json"), "must be named index.NAME.json.gz"),
        (
            ("make", "--data", "DATA", "--output", "TMP/index.x.json.gz", "--method", "letter"),
            "--method letter needs --cf-embeddings",
        ),
        (
            ("make", "--data", "DATA", "--output", "TMP/index.x.json.gz", "--fields", "price"),
            "no item has 'price'",
        ),
        (
            ("make", "--embeddings", "DATA/inter.json.gz", "--output", "TMP/index.x.json.gz"),
            "not a readable .npy file of numbers",
        ),
        (
            (
                *("make", "--embeddings", "DATA/cf.npy", "--output", "TMP/index.x.json.gz"),
                *("--method", "kmeans", "--codes", "3", "--levels", "2"),
            ),
            "200 items cannot all differ in 2 tokens of 3 codes",
        ),
        (("check", "nothing", "--data", "DATA"), "no file index.nothing.json.gz"),
        (("check", "nothing"), "there is no such file, and no --data"),
        (("compare", "DATA/index.hierarchy.json.gz", "hierarchy", "--data", "DATA"), "another one"),
        (("make", "--method", "bert", "--output", "x"), "'module:function'; got 'bert'"),
        ((), "required: ACTION"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: tuple[str, ...], message: str, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    filled = [a.replace("DATA", str(data)).replace("TMP", str(tmp_path)) for a in arguments]
    code, out, error = call(capsys, *filled)
    assert code == 2
    assert message in error
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_an_index_of_other_items_is_refused(data: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "index.few.json.gz"
    np.save(tmp_path / "few.npy", np.eye(5))
    made = call(capsys, "make", "--embeddings", tmp_path / "few.npy", "--output", output, *QUICK)
    assert made[0] == 0
    code, _, error = call(capsys, "check", output, "--data", data)
    assert code == 2
    assert "195 of 200 items have no identifier: 5, 6, 7" in error
    assert load_dataset(data).num_items == 200
