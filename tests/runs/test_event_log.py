"""A shop's log of views, carts and purchases: converted, trained on, and asked for purchases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.command_line import Capture, call
from support.tiny_run import tiny_run, write_config

from gflowgr.files import read_json

pytestmark = pytest.mark.usefixtures("no_drawing")

KINDS = ("view", "add_to_cart", "purchase", "wink")


@pytest.fixture
def folder(tmp_path: Path, capsys: Capture) -> Path:
    """40 users who see, put aside or buy some of 30 items, with ids such as ``B07``."""
    rng = np.random.default_rng(0)
    rows = [
        f"u{user},B{rng.integers(30):02},{1_500_000_000 + rng.integers(10**6)},{kind}"
        for user in range(40)
        for kind in rng.choice(KINDS[:3], size=12)
    ]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time,event", *rows]) + "\n")
    options = ["--behaviour-column", "event", "--k-core", 2, "--out", tmp_path / "shop"]
    code, _, error = call(capsys, "data", "convert", "table", tmp_path / "log.csv", *options)
    assert (code, error) == (0, "")
    return tmp_path


def config_of(folder: Path) -> Path:
    values = tiny_run(folder / "run")
    values["data"] = {"path": str(folder / "shop"), "max_history": 8}
    values["collaborative"] = {"epochs": 1, "batch_size": 16}
    values["continued_sft"] = False
    for stage in ("sft", "finetune"):
        values[stage] |= {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    return write_config(folder / "run.yaml", values)


def test_purchases_of_the_last_period_are_predicted_from_all_events(
    folder: Path, capsys: Capture
) -> None:
    asked = ("--split", "temporal", "--target-behaviour", "purchase", "--no-progress")
    code, out, error = call(capsys, "train", "--config", config_of(folder), *asked)
    assert code == 0, error
    assert "Behaviours: add_to_cart 3, purchase 10, view 1 (r_a, by default; " in out
    record = read_json(folder / "run" / "results.json")
    assert "first item of behaviour 'purchase' from 2017-07-" in record["rules"]["Split"]
    users = {method["metrics"]["num_users"] for method in record["methods"].values()}
    assert users == {record["split"]["users evaluated"]}
    model = folder / "run" / "gflowgr" / "model"
    code, out, error = call(
        capsys, "evaluate", model, "--data", folder / "shop", *asked, "--mask-seen"
    )
    assert code == 0, error
    assert "first item of behaviour 'purchase' from 2017-07-" in out
    code, out, error = call(
        capsys, "recommend", model, "--data", folder / "shop", "--history", "B07,B11", "--json"
    )
    assert code == 0, error
    assert '"items": ["B' in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--behaviour-values", "wink=1"),
            "which are 'add_to_cart', 'purchase', 'view'; got 'wink'",
        ),
        (("--behaviour-values", "view"), "must be NAME=NUMBER, such as view=1; got 'view'"),
        (("--target-behaviour", "buy"), "which has 'add_to_cart', 'purchase', 'view'; got 'buy'"),
    ],
)
def test_what_the_log_does_not_have_is_named_before_any_work(
    options: tuple[str, ...], message: str, folder: Path, capsys: Capture
) -> None:
    code, out, error = call(capsys, "train", "--config", config_of(folder), *options)
    assert code == 2
    assert message in error
    assert "Stage" not in out
    # Several sections' worth of options reach a quickstart in the same way.
    out_folder = folder / "quick"
    asked = ("quickstart", "--data", folder / "shop", "--output-dir", out_folder, *options)
    code, out, error = call(capsys, *asked)
    assert code == 2
    assert message in error
    assert "Stage" not in out


def test_an_unknown_behaviour_needs_a_value(folder: Path, capsys: Capture) -> None:
    log = folder / "log.csv"
    log.write_text(log.read_text().replace("add_to_cart", "wink"))
    options = [
        "--behaviour-column",
        "event",
        "--k-core",
        2,
        "--out",
        folder / "shop",
        "--overwrite",
    ]
    assert call(capsys, "data", "convert", "table", log, *options)[0] == 0
    code, out, error = call(capsys, "train", "--config", config_of(folder))
    assert code == 2
    assert "no reward is known for the behaviours ['wink']" in error
    assert "--behaviour-values wink=5" in error
    assert "Stage" not in out
