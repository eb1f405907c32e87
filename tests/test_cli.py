"""The command line: help, output, exit codes, and one-line errors."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gflowgr import __version__
from gflowgr.cli import main
from gflowgr.data import load_dataset

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: Any) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse ends so
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def without_bars(text: str) -> str:
    """What is on standard error beside the progress bars of model files."""
    return "".join(
        f"{line}\n" for line in text.replace("\r", "\n").splitlines() if "it/s]" not in line
    ).strip()


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Path:
    return finished_run / "gflowgr" / "model"


@pytest.fixture(scope="module")
def data(finished_run: Path) -> Path:
    return finished_run / "data"


# ---- help and usage ----


@pytest.mark.parametrize(
    ("command", "explained"),
    [
        ((), "gflowgr quickstart --data FOLDER"),
        (("quickstart",), "no download is made"),
        (("train",), "gflowgr train --config examples/beauty_tiger.yaml"),
        (("evaluate",), "rank the full catalogue"),
        (("recommend",), '{"history": [3, 14, 15]}'),
        (("data",), "import"),
        (("data", "builtin"), "simulated"),
        (("data", "inspect"), "check a dataset"),
        (("data", "import"), "movielens  ratings.csv"),
        (("info",), "backends"),
    ],
)
def test_help(command: tuple[str, ...], explained: str, capsys: Capture) -> None:
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert explained.lower() in out.lower()
    assert "usage: gflowgr" in out


def test_version(capsys: Capture) -> None:
    assert call(capsys, "--version")[:2] == (0, f"gflowgr {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("train",), "required: --config"),
        (("evaluate", "x"), "required: --data"),
        (("data", "builtin"), "required: --out"),
        (("data", "builtin", "--out", "x", "--users", "many"), "invalid int value: 'many'"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str, capsys: Capture) -> None:
    code, out, error = call(capsys, *arguments)
    assert code == 2
    assert message in error
    assert out == ""


# ---- data ----


def test_builtin_data_are_made_and_inspected(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "shop"
    code, out, error = call(
        capsys, "data", "builtin", "--out", folder, "--users", 50, "--items", 200, "--seed", 3
    )
    assert (code, error) == (0, "")
    assert f"written to {folder}" in out
    assert load_dataset(folder).num_users == 50

    code, out, error = call(capsys, "data", "inspect", folder)
    assert (code, error) == (0, "")
    assert "identifiers hierarchy: 200 distinct for 200 items" in out
    assert "no training example reaches a held-out event" in out

    # What is there is never overwritten unasked.
    code, _, error = call(capsys, "data", "builtin", "--out", folder)
    assert code == 2
    assert error.startswith(f"gflowgr: error: {folder}: there is a data set already")
    assert "--overwrite" in error
    assert load_dataset(folder).num_users == 50

    code, out, error = call(
        capsys, "data", "builtin", "--out", folder, "--users", 40, "--items", 200, "--overwrite"
    )
    assert (code, error) == (0, "")
    assert load_dataset(folder).num_users == 40


def test_a_table_is_imported(tmp_path: Path, capsys: Capture) -> None:
    rows = [f"{user},{item},{user + item}" for user in range(20) for item in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["who,what,time", *rows]) + "\n")
    code, out, error = call(
        capsys,
        "data",
        "import",
        "table",
        tmp_path / "log.csv",
        "--out",
        tmp_path / "imported",
        "--user-column",
        "who",
        "--item-column",
        "what",
    )
    assert (code, error) == (0, "")
    dataset = load_dataset(tmp_path / "imported")
    assert (dataset.num_users, dataset.num_items) == (20, 6)
    assert "written to" in out


def test_an_import_replaces_a_dataset_only_when_asked(tmp_path: Path, capsys: Capture) -> None:
    log, folder = tmp_path / "log.csv", tmp_path / "imported"

    def imported(users: int, *options: str) -> tuple[int, str, str]:
        rows = [f"{user},{item},{user + item}" for user in range(users) for item in range(6)]
        log.write_text("\n".join(["user,item,time", *rows]) + "\n")
        return call(capsys, "data", "import", "table", log, "--out", folder, *options)

    assert imported(20)[0] == 0
    code, _, error = imported(12)
    assert code == 2
    assert "--overwrite" in error
    assert load_dataset(folder).num_users == 20
    code, _, error = imported(12, "--overwrite")
    assert (code, error) == (0, "")
    assert load_dataset(folder).num_users == 12


def test_damaged_data_are_named_in_one_line(data: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    whole = (folder / "inter.json.gz").read_bytes()
    (folder / "inter.json.gz").write_bytes(whole[:200])
    code, out, error = call(capsys, "data", "inspect", folder)
    assert (code, out) == (2, "")
    assert "inter.json.gz: the gzip file is truncated" in error
    assert error.count("\n") == 1
    code, _, error = call(capsys, "data", "inspect", tmp_path / "nothing")
    assert code == 2
    assert "nothing" in error


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        main(["--debug", "data", "inspect", str(tmp_path / "nothing")])


# ---- evaluate ----


def test_evaluate(model: Path, data: Path, capsys: Capture) -> None:
    code, out, error = call(
        capsys,
        "evaluate",
        model,
        "--data",
        data,
        "--max-users",
        25,
        "--beams",
        10,
        "--no-progress",
    )
    assert code == 0
    assert without_bars(error) == ""
    assert "N@10" in out
    assert "Users: 25 of 200" in out
    assert "Seen items: not masked" in out
    assert "Collisions: item" in out
    code, out, _ = call(
        capsys,
        "evaluate",
        model,
        "--data",
        data,
        "--max-users",
        25,
        "--part",
        "valid",
        "--mask-seen",
        "--collision",
        "string",
        "--no-progress",
    )
    assert code == 0
    assert "second-last" in out
    assert "Seen items: masked" in out
    assert "Collisions: string" in out


def test_evaluate_gives_the_runs_own_numbers(
    finished_run: Path, data: Path, capsys: Capture
) -> None:
    """The folder of a run stands for its GFlowGR model."""
    results = json.loads((finished_run / "results.json").read_text())
    evaluation = finished_run / "evaluation" / "gflowgr-tb" / "done.json"
    assert (
        results["methods"]["GFlowGR-TB"]["metrics"] == json.loads(evaluation.read_text())["metrics"]
    )
    code, out, _ = call(
        capsys, "evaluate", finished_run, "--data", data, "--beams", 10, "--no-progress"
    )
    assert code == 0
    assert "Users: 200, all of them" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--beams", "0"), "--beams must be at least 1, got 0"),
        (("--max-users", "0"), "max_users must be at least 1, got 0"),
    ],
)
def test_evaluate_out_of_range(
    options: tuple[str, ...], message: str, model: Path, data: Path, capsys: Capture
) -> None:
    code, _, error = call(capsys, "evaluate", model, "--data", data, "--no-progress", *options)
    assert code == 2
    assert message in without_bars(error)


def test_what_is_no_model_is_refused(data: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, error = call(capsys, "evaluate", tmp_path, "--data", data)
    assert (code, out) == (2, "")
    assert (
        error == f"gflowgr: error: {tmp_path} is not a gflowgr checkpoint: it has no gflowgr.json\n"
    )


def test_model_of_another_catalogue_is_refused(
    model: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = tmp_path / "other"
    call(capsys, "data", "builtin", "--out", other, "--users", 20, "--items", 210)
    code, _, error = call(capsys, "evaluate", model, "--data", other)
    assert code == 2
    assert "was trained on 200 items, but" in error
    assert "has 210" in error


# ---- recommend ----


def test_recommend_to_users_and_histories(model: Path, data: Path, capsys: Capture) -> None:
    code, out, error = call(
        capsys,
        "recommend",
        model,
        "--data",
        data,
        "--user",
        17,
        "--user",
        3,
        "--history",
        "3,14,15",
        "-k",
        4,
    )
    assert code == 0
    assert without_bars(error) == ""
    for label in ("user 17", "user 3", "history 3,14,15"):
        assert f"\n{label}\n" in out
    assert out.count("log P") == 3 * 4
    dataset = load_dataset(data)
    assert dataset.title(int(dataset.sequences.row(17)[-1])) in out
    assert dataset.title(15) in out


def test_recommendations_leave_the_history_out(model: Path, data: Path, capsys: Capture) -> None:
    def items(*options: str) -> list[int]:
        code, out, _ = call(
            capsys,
            "recommend",
            model,
            "--data",
            data,
            "--history",
            "3,14,15",
            "--json",
            "-k",
            "200",
            *options,
        )
        assert code == 0
        return [entry["item"] for entry in json.loads(out)["items"]]

    assert sorted(items("--with-seen")) == list(range(200))
    assert sorted(items()) == sorted(set(range(200)) - {3, 14, 15})


def test_recommend_from_json_lines(
    model: Path, data: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad line is reported and skipped; the others are answered, in their order."""
    lines = [
        '{"user": "17"}',
        '{"user": 3}',
        "not json",
        "",
        '{"history": [3, 14, 15]}',
        '{"history": [3, 900]}',
        '{"history": [1.5]}',
        '{"history": [1e999]}',
        '{"history": ["x"]}',
        '{"user": "nobody"}',
        '{"items": [1]}',
        "[1, 2]",
        '{"history": []}',
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, out, error = call(capsys, "recommend", model, "--data", data, "-k", 3)
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["query"] for answer in answers] == ["user 17", "user 3", "line 5", "line 13"]
    for answer in answers:
        assert len(answer["items"]) == 3
        assert {"item", "log_prob", "title"} == set(answer["items"][0])
        scores = [entry["log_prob"] for entry in answer["items"]]
        assert scores == sorted(scores, reverse=True)
    skipped = without_bars(error).splitlines()
    expected = [
        ("line 3", "not JSON"),
        ("line 6", "item 900 is not in 0..199"),
        ("line 7", "1.5 is not an item number"),
        ("line 8", "inf is not an item number"),
        ("line 9", "'x' is not an item number"),
        ("'nobody'", "is not in"),
        ("line 11", 'expected {"user": ...} or {"history": [...]}'),
        ("line 12", "expected"),
    ]
    assert len(skipped) == len(expected)
    for line, (where, what) in zip(skipped, expected, strict=True):
        assert line.startswith("gflowgr: skipped: ")
        assert where in line
        assert what in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--user", "nobody"), "user 'nobody' is not in"),
        (("--history", "3,200"), "--history 3,200: item 200 is not in 0..199"),
        (("--history", "3,-1"), "item -1 is not in 0..199"),
        (("--history", "a,b"), "'a' is not an item number"),
        (("--user", "3", "-k", "0"), "-k must be at least 1, got 0"),
        (("--user", "3", "--beams", "-2"), "--beams must be at least 1, got -2"),
    ],
)
def test_bad_queries_are_refused(
    options: tuple[str, ...], message: str, model: Path, data: Path, capsys: Capture
) -> None:
    code, out, error = call(capsys, "recommend", model, "--data", data, *options)
    assert (code, out) == (2, "")
    assert without_bars(error).startswith("gflowgr: error: ")
    assert message in error
    assert len(without_bars(error).splitlines()) == 1


# ---- info ----


def test_info(capsys: Capture) -> None:
    code, out, _ = call(capsys, "info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert __version__ in json.dumps(facts)
    code, out, _ = call(capsys, "info")
    assert code == 0
    assert "torch" in out
    assert __version__ in out
