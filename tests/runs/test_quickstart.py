"""``gflowgr quickstart``: what it makes of the shipped experiment, and its report and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import Capture, call
from support.forked_cells import forked_cells  # noqa: F401  # a fixture
from support.tiny_quickstart import make_quickstart_tiny

from gflowgr.data import Dataset, Ragged, save_dataset
from gflowgr.files import read_json
from gflowgr.runs import ConfigError, ExperimentSpec, quickstart_resources, quickstart_spec


def shop(folder: Path, rows: list[list[int]], *, behaviours: bool = False) -> Path:
    sequences = Ragged.from_lists(rows)
    parts: dict[str, Any] = {}
    if behaviours:
        kinds = np.concatenate([np.arange(len(row)) % 2 for row in rows]).astype(np.int8)
        parts = {"behaviours": kinds, "behaviour_names": ("view", "purchase")}
    users = [f"u{number}" for number in range(len(rows))]
    save_dataset(Dataset("mine", users, sequences, num_items=6, **parts), folder)
    return folder


WITHOUT_REPEATS = [[0, 1, 2, 3], [3, 4, 5, 0]]


def test_without_options_it_is_the_shipped_experiment() -> None:
    assert quickstart_spec() == ExperimentSpec.load("quickstart")
    assert quickstart_spec(seed=5).seeds == [5]
    assert quickstart_resources().workers in (1, 2)


def test_data_of_ones_own_take_the_place_of_the_built_in_ones(tmp_path: Path) -> None:
    folder = shop(tmp_path / "my shop", WITHOUT_REPEATS)
    said: list[str] = []
    spec = quickstart_spec(data=str(folder), identifiers="letter", split=None, say=said.append)
    assert spec.datasets == {"my_shop": {"data": {"path": str(folder)}, "identifiers": ["letter"]}}
    assert "my_shop" in spec.title
    (variant,) = spec.variants
    config = spec.config(variant, spec.methods[-1])
    assert (config.data.path, config.data.identifiers) == (str(folder), "letter")
    assert config.evaluation.mask_seen is True
    assert (config.flow.seen_items, config.flow.observed_share) == ("zero", 0.0)
    assert said == []


def test_repeats_and_behaviours_of_the_data_are_minded(tmp_path: Path) -> None:
    folder = shop(tmp_path / "shop", [[0, 1, 0, 1], [3, 4, 5, 3]], behaviours=True)
    said: list[str] = []
    spec = quickstart_spec(
        data=str(folder),
        target_behaviour="purchase",
        behaviour_values={"view": 2.0},
        say=said.append,
    )
    (variant,) = spec.variants
    config = spec.config(variant, spec.methods[-1])
    assert config.data.target_behaviour == "purchase"
    assert config.evaluation.mask_seen is False
    assert (config.flow.seen_items, config.flow.observed_share) == ("keep", 0.3)
    assert config.method_arguments["behaviour_values"] == {"view": 2.0}
    assert said[0] == "Repeats: 38% of the events; items of the past are recommended, too"
    assert said[1].startswith("Behaviours: purchase 10, view 2")
    with pytest.raises(ConfigError, match="which are 'purchase', 'view'; got 'wink'"):
        quickstart_spec(data=str(folder), behaviour_values={"wink": 1.0}, say=said.append)


@pytest.mark.usefixtures("no_drawing", "forked_cells")
def test_it_compares_reports_and_leaves_a_model_that_recommends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    make_quickstart_tiny(monkeypatch, tmp_path)
    out = tmp_path / "out"
    code, told, error = call(capsys, "quickstart", "--output-dir", out, "--no-progress")
    assert code == 0, error
    assert f"Use it: gflowgr recommend {out} --data {out / 'shop' / 'data'} --user" in told
    (setting,) = read_json(out / "results.json")["settings"]
    rows = {row["method"]: row for row in setting["rows"]}
    assert set(rows) == {"SFT", "SFT continued", "GFlowGR", "SASRec", "Popularity"}
    assert setting["rules"]["Seen items"].startswith("masked")
    for against in ("to_baseline", "to_teacher"):
        assert 0 < rows["GFlowGR"][against]["metrics"]["R@10"]["p_holm"] <= 1
    text = (out / "report.md").read_text()
    for part in ("Validation over CPU time", "first level", "alibration"):
        assert part in text, part
    asked = ("recommend", out, "--data", out / "shop" / "data", "--user", 0, "-k", 3, "--json")
    code, told, error = call(capsys, *asked)
    assert code == 0, error
    assert told.count('"items"') == 1
