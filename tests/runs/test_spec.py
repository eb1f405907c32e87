"""What an experiment's file may say, what it becomes, and what is refused before any work."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_experiment import tiny_experiment

from gflowgr.runs import ConfigError, ExperimentSpec, cells_of, shipped_specs
from gflowgr.runs.cells import Cell, folders_of
from gflowgr.runs.same_inputs import check_same_inputs, record_inputs


def spec_of(**changes: Any) -> ExperimentSpec:
    return ExperimentSpec.from_dict(tiny_experiment() | changes)


def test_cells_are_the_product_of_datasets_identifiers_seeds_and_methods() -> None:
    two = {"data": {"users": 100, "items": 100}, "identifiers": ["kmeans", "rqvae"]}
    spec = spec_of(seeds=[1, 2], datasets={"one": {}, "two": two})
    ids = [cell.id for cell in cells_of(spec)]
    assert len(set(ids)) == len(ids)
    assert ids[:4] == [
        "one/seed_1/collaborative",
        "one/seed_1/default/sft",
        "one/seed_1/default/sft_continued",
        "one/seed_1/default/gflowgr_tb",
    ]
    # 2 seeds: one collaborative model per dataset, and a start and 2 methods per identifiers.
    assert len(ids) == 2 * (2 + 3 * (1 + 2))
    assert "two/seed_2/rqvae/gflowgr_tb" in ids


def test_every_cell_comes_after_those_that_it_needs() -> None:
    seen: set[str] = set()
    for cell in cells_of(spec_of(seeds=[1, 2])):
        assert seen.issuperset(cell.needs), cell.id
        seen.add(cell.id)


def test_methods_share_everything_but_their_own_settings() -> None:
    spec = spec_of()
    variant = spec.variants[0]
    sft, flow = (spec.config(variant, method) for method in spec.methods)
    assert (sft.flow.objective, flow.flow.objective) == ("sft", "tb")
    for part in ("seed", "data", "collaborative", "model", "sft", "finetune", "evaluation"):
        assert getattr(sft, part) == getattr(flow, part), part


def test_a_dataset_may_change_the_base() -> None:
    spec = spec_of(datasets={"one": {}, "two": {"sft": {"max_steps": 99}}})
    steps = [spec.config(variant).sft["max_steps"] for variant in spec.variants]
    assert steps == [12, 99]
    assert spec.config(spec.variants[1]).sft["learning_rate"] == 1e-2, "the rest of it stays"


def test_variants_change_one_thing_of_their_method() -> None:
    spec = spec_of(
        ablations={"GFlowGR-TB": {"without r_a": {"flow": {"signals": ["r_sim"]}}}},
        grids={"GFlowGR-TB": {"flow.gfn_weight": [0.5, 1.0], "finetune.num_trajectories": [2, 3]}},
    )
    variants = {method.name: method for method in spec.methods if method.group != "main"}
    assert list(variants) == [
        "GFlowGR-TB without r_a",
        "GFlowGR-TB gfn_weight=0.5",
        "GFlowGR-TB gfn_weight=1.0",
        "GFlowGR-TB num_trajectories=2",
        "GFlowGR-TB num_trajectories=3",
    ]
    assert {method.of for method in variants.values()} == {"GFlowGR-TB"}
    config = spec.config(spec.variants[0], variants["GFlowGR-TB gfn_weight=0.5"])
    assert config.flow.gfn_weight == 0.5
    # What the method itself has, by the defaults, too, is not trained a second time.
    aliases = [name for name, method in variants.items() if method.alias]
    assert aliases == ["GFlowGR-TB gfn_weight=1.0", "GFlowGR-TB num_trajectories=3"]
    assert len(cells_of(spec)) == 2 + 2 + 3


def test_a_cell_survives_json() -> None:
    for cell in cells_of(spec_of(grids={"GFlowGR-TB": {"flow.beta": [1.0, 2.0]}})):
        assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datsets": {}}, "unknown key 'datsets'; known: name, title"),
        ({"seeds": []}, "seeds is missing or empty"),
        ({"seeds": [1, 1]}, r"seeds must be different integers; got \[1, 1\]"),
        ({"seeds": [1.5]}, r"seeds must be different integers; got \[1.5\]"),
        ({"methods": {}}, "methods is missing or empty"),
        ({"baseline": "SFT"}, "baseline 'SFT' is no method"),
        ({"base": {"modle": {}}}, "base: unknown section 'modle'; known: data, collaborative"),
        ({"base": {"data": {"identifiers": "x"}}}, "data.identifiers: name them in the list"),
        ({"datasets": {"a/b": {}}}, "datasets: 'a/b' names a folder"),
        ({"datasets": {"a": {"identifiers": []}}}, "a: identifiers must be a list of different"),
        ({"datasets": {"a": {"flow": {"bata": 1.0}}}}, "a: flow: unknown key 'bata'; did you mean"),
        ({"methods": {"A": {"sft": {}}}}, "methods: A: unknown section 'sft'; known: flow, finetu"),
        ({"methods": {"A": {"flow": {"beta": -1.0}}}}, "A: flow: beta must be finite and > 0"),
        ({"methods": {"SFT": {}}}, "methods: 'SFT' is too like 'the start'"),
        ({"methods": {"A-B": {}, "a b": {}}}, "methods: 'a b' is too like 'A-B'"),
        ({"ablations": {"X": {}}}, "ablations: 'X' is no method; there are SFT continued"),
        ({"grids": {"GFlowGR-TB": {"sft.max_steps": [1]}}}, "grids: GFlowGR-TB: unknown section"),
        ({"grids": {"GFlowGR-TB": {"flow.beta": 1.0}}}, "flow.beta must be a list; got 1.0"),
        ({"grids": {"GFlowGR-TB": {"flow.bta": [1.0]}}}, "unknown key 'bta'; did you mean 'beta'"),
        ({"name": 3}, "name must be str; got 3"),
        ({"methods": {"..": {}}}, "methods: a name must have a letter or a digit; got '..', which"),
        ({"methods": {"?!": {}}}, r"methods: a name must have a letter or a digit; got '\?!'"),
        ({"methods": {"x" * 65: {}}}, "methods: a name must make a folder of at most 64 bytes"),
        ({"methods": {"digests.json": {}}}, "'digests.json' is too like .*the variant's own"),
        ({"methods": {"É": {}, "E\u0301": {}}}, "is too like 'É': both would have the folder 'é'"),
        ({"datasets": {"figures": {}}}, "'figures' is too like .*the experiment's own figures"),
        ({"datasets": {"A": {}, "a": {}}}, "datasets: 'a' is too like 'A'"),
        (
            {"datasets": {"a": {"identifiers": ["/x/index.k.json.gz", "/y/index.k.json.gz"]}}},
            "a: identifiers: '/y/index.k.json.gz' is too like '/x/index.k.json.gz'",
        ),
        ({"datasets": {"a": {"identifiers": ["..."]}}}, "a: identifiers: a name must have a lett"),
        ({"datasets": {"a": {"identifiers": ["collaborative"]}}}, "too like 'the collaborative mo"),
        (
            {"datasets": {"a": {"identifiers": [None, "Default"]}}},
            "'Default' is too like 'default'",
        ),
        ({"datasets": {"a": {"identifiers": [["x"]]}}}, "a: identifiers must be a list of differ"),
        ({"seeds": [-1]}, "seed must be in 0 .. 2.*32 - 1; got -1"),
    ],
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any], message: str) -> None:
    values = copy.deepcopy(tiny_experiment()) | change
    if "methods" in change or "datasets" in change:
        values.pop("baseline")
    with pytest.raises(ConfigError, match=message):
        ExperimentSpec.from_dict(values)


def test_overrides_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_experiment() | {"title": "${SHOP} twice"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="needs the environment variable SHOP"):
        ExperimentSpec.load(tmp_path / "spec.yaml")
    monkeypatch.setenv("SHOP", "Both")
    spec = ExperimentSpec.load(tmp_path / "spec.yaml", ["base.sft.max_steps=7", "seeds=[9]"])
    assert (spec.title, spec.seeds) == ("Both twice", [9])
    assert spec.config(spec.variants[0]).sft["max_steps"] == 7


@pytest.mark.parametrize("name", shipped_specs())
def test_shipped_experiments_can_be_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFLOWGR_DATA", "/data")
    spec = ExperimentSpec.load(name)
    assert spec.name == name
    # A result needs several seeds; the quickstart shows how one is made, and its caveats say so.
    assert len(spec.seeds) == (1 if name == "quickstart" else 3)
    control = next(method for method in spec.methods if method.name == spec.baseline)
    assert control.settings["flow"] == {"objective": "sft"}


def begin(cells: list[Cell], out: Path) -> None:
    """Record in every folder of the cells what it is made from."""
    for folder, values in folders_of(cells).items():
        record_inputs(out / folder, values)


def test_a_folder_of_other_values_is_refused(tmp_path: Path) -> None:
    cells = cells_of(spec_of())
    begin(cells[1:2], tmp_path)
    check_same_inputs(tmp_path, folders_of(cells))
    longer = cells_of(ExperimentSpec.from_dict(tiny_experiment(sft={"max_steps": 50})))
    wanted = r"sft.max_steps: 12 there, 50 here.*delete these in it: shop/seed_1/default/sft$"
    with pytest.raises(ConfigError, match=wanted):
        check_same_inputs(tmp_path, folders_of(longer))


@pytest.mark.parametrize(
    ("section", "change", "stale"),
    [
        ("collaborative", {"dropout": 0.5}, {"collaborative", "sft", "method"}),
        ("data", {"users": 201}, {"collaborative", "sft", "method"}),
        ("evaluation", {"num_beams": 11}, {"collaborative", "sft", "method"}),
        ("model", {"d_ff": 64}, {"sft", "method"}),
        ("sft", {"learning_rate": 1e-3}, {"sft", "method"}),
        ("flow", {"normalize": "children"}, {"sft", "method"}),
        ("flow", {"beta": 2.0}, {"method"}),
        ("finetune", {"num_trajectories": 5}, {"method"}),
    ],
)
def test_a_cell_is_made_from_what_its_stage_reads(
    section: str, change: dict[str, Any], stale: set[str], tmp_path: Path
) -> None:
    other = ExperimentSpec.from_dict(tiny_experiment(**{section: change}))
    begin(cells_of(spec_of()), tmp_path)
    found = set()
    for cell in cells_of(other):
        trained = cell.collaborative_folder if cell.stage == "collaborative" else cell.id
        made_from = cell.made_from()
        own = {name: made_from[name] for name in (trained, *cell.evaluations.values())}
        try:
            check_same_inputs(tmp_path, own)
        except ConfigError:
            found.add(cell.stage)
    assert found == stale


def test_another_evaluation_leaves_the_trainings_valid(tmp_path: Path) -> None:
    begin(cells_of(spec_of()), tmp_path)
    other = cells_of(ExperimentSpec.from_dict(tiny_experiment(evaluation={"num_beams": 11})))
    with pytest.raises(ConfigError) as error:
        check_same_inputs(tmp_path, folders_of(other))
    stale = str(error.value).split("delete these in it: ")[1].split(", ")
    assert len(stale) == 5
    assert all("evaluation" in Path(folder).parts for folder in stale)


def test_names_of_any_script_have_folders_of_their_own() -> None:
    methods = {"SFT continued": {"flow": {"objective": "sft"}}, "方法": {}, "مؤشر": {}, "Émile": {}}
    spec = spec_of(methods=methods, datasets={"数据": {}, "données": {}})
    ids = [cell.id for cell in cells_of(spec)]
    assert len(set(ids)) == len(ids) == 2 * (2 + 4)
    assert "数据/seed_1/default/方法" in ids
    assert all(".." not in Path(id_).parts and Path(id_).name for id_ in ids)


def test_where_the_data_lie_is_not_what_results_are_made_from() -> None:
    here, there = (
        ExperimentSpec.from_dict(tiny_experiment(data={"path": f"{place}/Beauty"}))
        for place in ("/here", "/there")
    )
    for one, other in zip(cells_of(here), cells_of(there), strict=True):
        assert one.made_from() == other.made_from()
        assert "/here" not in json.dumps(one.made_from())
