"""The command line: help, output, exit codes, and one-line errors."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
from support.command_line import Capture, call, without_bars

from gflowgr import __version__
from gflowgr.cli import main
from gflowgr.cli.converting import FORMATS, add_convert, import_arguments
from gflowgr.data import importers, load_dataset


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
        (("quickstart",), "the experiment gflowgr/runs/specs/quickstart.yaml"),
        (("train",), "gflowgr train --config examples/beauty_tiger.yaml"),
        (("evaluate",), "rank the full catalogue"),
        (("recommend",), '{"history": [3, 14, 15]}'),
        (("data",), "convert"),
        (("data", "builtin"), "simulated"),
        (("data", "inspect"), "check a dataset"),
        (("data", "convert"), "movielens   ratings.csv"),
        (("identifiers", "make"), "nothing is downloaded unless"),
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


def test_a_table_is_converted(tmp_path: Path, capsys: Capture) -> None:
    rows = [f"{user},{item},{user + item}" for user in range(20) for item in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["who,what,time", *rows]) + "\n")
    code, out, error = call(
        capsys,
        "data",
        "convert",
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


@pytest.mark.parametrize("kind", FORMATS)
def test_a_conversion_offers_every_parameter_of_its_importer(kind: str) -> None:
    parser = argparse.ArgumentParser()
    add_convert(parser.add_subparsers())
    args = parser.parse_args(["convert", kind, "file", "--out", "folder"])
    importer = getattr(importers, f"import_{FORMATS[kind].importer}")
    _, _, *others = inspect.signature(importer).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in others}
    assert import_arguments(args) == defaults | FORMATS[kind].fixed


def test_each_public_format_is_converted_by_one_command(tmp_path: Path, capsys: Capture) -> None:
    """With the ids of its source, and a file of another release named as what it is."""
    pairs = [(user, item) for user in "ABC" for item in ("x1", "x2", "x3")]
    old = [
        {"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": n}
        for n, (u, i) in enumerate(pairs)
    ]
    new = [
        {"user_id": u, "parent_asin": i, "rating": 5, "timestamp": n * 1000}
        for n, (u, i) in enumerate(pairs)
    ]
    yelp = [
        {"user_id": u, "business_id": i, "stars": 4, "date": f"2019-01-0{n + 1} 10:00:00"}
        for n, (u, i) in enumerate(pairs)
    ]
    raw = {
        "amazon2014": ("old.json", "\n".join(map(json.dumps, old))),
        "amazon2018": ("old.json", "\n".join(map(json.dumps, old))),
        "amazon2023": ("new.jsonl", "\n".join(map(json.dumps, new))),
        "yelp": ("yelp.json", "\n".join(map(json.dumps, yelp))),
        "movielens": ("ratings.dat", "\n".join(f"{u}::{i}::4::7" for u, i in pairs)),
        "recbole": (
            "shop.inter",
            "user_id:token\titem_id:token\ttimestamp:float\n"
            + "\n".join(f"{u}\t{i}\t7" for u, i in pairs),
        ),
        "table": ("log.csv", "user,item,time\n" + "\n".join(f"{u},{i},7" for u, i in pairs)),
    }
    assert set(raw) == set(FORMATS)
    for kind, (name, text) in raw.items():
        (tmp_path / name).write_text(text + "\n")
        folder = tmp_path / kind
        code, _, error = call(
            capsys, "data", "convert", kind, tmp_path / name, "--out", folder, "--k-core", 1
        )
        assert code == 0, (kind, error)
        data = load_dataset(folder)
        assert (data.user_ids, data.num_interactions) == (["A", "B", "C"], 9)
        assert [data.item_id(item) for item in range(3)] == ["x1", "x2", "x3"], kind
    source = tmp_path / "new.jsonl"
    code, _, error = call(capsys, "data", "convert", "amazon2018", source, "--out", tmp_path / "no")
    assert code == 2
    assert "new.jsonl:1: no reviewerID" in error


def test_options_of_a_conversion_reach_the_importer(tmp_path: Path, capsys: Capture) -> None:
    log, folder = tmp_path / "log.txt", tmp_path / "imported"
    log.write_text("A;x;31.01.2019;buy\nA;y;01.02.2019;buy\nA;x;02.02.2019;buy\nA;y;1.1.2019;see\n")
    options = ["--separator", ";", "--columns", "user", "item", "time", "kind", "--k-core", 1]
    options += ["--time-format", "%d.%m.%Y", "--behaviour-column", "kind"]
    options += ["--side-behaviours", "see", "--duplicates", "last"]
    code, _, error = call(capsys, "data", "convert", "table", log, "--out", folder, *options)
    assert (code, error) == (0, "")
    dataset = load_dataset(folder)
    assert dataset.sequences.row(0).tolist() == [0, 1]
    assert list(dataset.side) == ["see"]
    # What a format does not know is refused, not ignored.
    code, _, error = call(
        capsys, "data", "convert", "amazon2023", log, "--out", folder, "--separator", ";"
    )
    assert code == 2
    assert "unrecognized arguments: --separator" in error


def test_a_conversion_replaces_a_dataset_only_when_asked(tmp_path: Path, capsys: Capture) -> None:
    log, folder = tmp_path / "log.csv", tmp_path / "imported"

    def imported(users: int, *options: str) -> tuple[int, str, str]:
        rows = [f"{user},{item},{user + item}" for user in range(users) for item in range(6)]
        log.write_text("\n".join(["user,item,time", *rows]) + "\n")
        return call(capsys, "data", "convert", "table", log, "--out", folder, *options)

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
    groups = re.findall(r"^(?:none|1 to 4|5 to 19|20 or more) \((\d+) users\)", out, re.MULTILINE)
    assert sum(map(int, groups)) == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--beams", "0"), "--beams must be at least 1; got 0"),
        (("--max-users", "0"), "max_users must be at least 1; got 0"),
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
    index = other / "index.hierarchy.json.gz"
    code, _, error = call(capsys, "evaluate", model, "--data", other, "--index", index)
    assert code == 2
    assert f"{index} must have the identifiers of the model, then new ones" in error


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
