"""A configuration is checked as a whole before any work is done."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_run import tiny_run, write_config

from gflowgr.files import write_json
from gflowgr.runs import ConfigError, RunConfig
from gflowgr.runs.cells import cells_of_run
from gflowgr.runs.config import training_arguments

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


def test_sections_become_their_types() -> None:
    config = RunConfig.from_dict(tiny_run("out"))
    assert config.model.d_model == 16
    assert config.data.users == 200
    assert config.flow.objective == "tb"
    assert config.flow.max_history == 8  # follows the data's
    assert config.sft["max_steps"] == 12
    again = RunConfig.from_dict({**config.to_dict()})
    assert again == config


def test_training_stages_have_the_runs_defaults() -> None:
    args = training_arguments({"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5}, "x", 7)
    assert args.seed == 7
    assert args.save_strategy == "steps"
    assert args.load_best_model_at_end
    assert args.metric_for_best_model == "N@10"
    assert args.greater_is_better


def test_samplers_are_named_mixed_and_tuned(tmp_path: Path) -> None:
    text = (
        "output_dir: out\nfinetune:\n  sampler: {curriculum: 0.5, on_policy: 0.5}\n"
        "  pool_size: 1024\n  sampler_options: {schedule: cosine, refresh_steps: 20}\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = RunConfig.load(path, ["finetune.sampler_options.replay_share=0.1"])
    settings = training_arguments(config.finetune, "x", 7).sampler_settings
    assert settings.weights == {"curriculum": 0.5, "on_policy": 0.5}
    assert (settings.pool_size, settings.schedule, settings.refresh_steps) == (1024, "cosine", 20)
    assert settings.replay_share == 0.1
    assert RunConfig.load(path, ["finetune.sampler=logs"]).finetune["sampler"] == "logs"
    without_model = ["collaborative.kind=none"]
    with pytest.raises(ConfigError, match=r"needs a collaborative model.*sampler: random"):
        RunConfig.load(path, without_model)
    RunConfig.load(path, [*without_model, "finetune.sampler=on_policy"])
    with pytest.raises(ConfigError, match="finetune: refresh_steps must be >= 1; got 0"):
        RunConfig.load(path, ["finetune.sampler_options.refresh_steps=0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "unknown key 'modle'; did you mean 'model'?"),
        ({"xyz": 1}, "unknown key 'xyz'; known: output_dir, seed, data"),
        ({"data": {"max_histroy": 3}}, "data: unknown key 'max_histroy'; did you mean 'max_hi"),
        ({"data": 5}, "data must be a section; got 5"),
        ({"model": {"d_model": "big"}}, "model: d_model must be int; got 'big'"),
        ({"model": {"d_model": True}}, "model: d_model must be int; got True"),
        ({"model": {"dropout": None}}, "model: dropout must be float; got None"),
        ({"continued_sft": 1}, "continued_sft must be bool; got 1"),
        ({"output_dir": 7}, "output_dir must be str; got 7"),
        ({"evaluation": {"max_users": "all"}}, "max_users must be int or nothing; got 'all'"),
        ({"evaluation": {"collision": "no"}}, "collision must be one of ['item', 'string']; got"),
        ({"flow": {"beta": -1.0}}, "beta must be finite and > 0; got -1.0"),
        ({"flow": {"signals": "r_a"}}, "flow: signals must be list; got 'r_a'"),
        ({"flow": {"signals": ["r_b"]}}, "signals: 'r_b' is neither one of"),
        (
            {"flow": {"partition": "vargrad"}, "finetune": {"num_trajectories": 1}},
            "finetune.num_trajectories is 1, over which the loss of flow.partition: vargrad is 0",
        ),
        ({"flow": {"forward_looking": True}}, "forward_looking needs objective 'db' or 'subtb'"),
        ({"collaborative": {"kind": "embeddings"}}, "goes with collaborative.kind: embeddings"),
        ({"collaborative": {"embeddings": "x.npy"}}, "goes with collaborative.kind: embeddings"),
        ({"collaborative": {"models": 2}}, "models is of kind 'average'; got 2 with kind 'sasrec'"),
        ({"collaborative": {"kind": "average", "models": 1}}, "models must be >= 2; got 1"),
        ({"collaborative": {"kind": "average", "folds": 2}}, "folds is of kind 'cross_fitted'"),
        ({"collaborative": {"kind": "cross_fitted", "folds": 5}}, "folds must be in 2..4; got 5"),
        ({"sft": {"seed": 3}}, "sft.seed is set by the run itself; leave it out"),
        ({"sft": {"learning_rat": 1.0}}, "sft: unknown training argument 'learning_rat'; did you"),
        ({"sft": {"learning_rate": "fast"}}, "sft.learning_rate must be float; got 'fast'"),
        ({"sft": {"max_steps": 1.5}}, "sft.max_steps must be int; got 1.5"),
        ({"sft": {"eval_max_users": "few"}}, "eval_max_users must be int or nothing; got 'few'"),
        ({"sft": {"lr_scheduler_type": "zigzag"}}, "sft: zigzag is not a valid SchedulerType"),
        ({"finetune": {"num_trajectories": 0}}, "finetune: num_trajectories must be >= 1; got 0"),
        (
            {"finetune": {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 6}},
            "finetune: --load_best_model_at_end requires the saving steps to be a round multiple",
        ),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"output_dir": "x", **change}, source="run.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_output_folder_is_required() -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: output_dir is missing"):
        RunConfig.from_dict({"seed": 1}, source="run.yaml")


# ---- files ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: [", "not valid YAML: while parsing"),
        ("seed: \x00", "not valid YAML: unacceptable character"),
        ("- a\n- b", "must have sections such as 'data:'; got list"),
        ("", "must have sections such as 'data:'; got NoneType"),
        ("output_dir: x\ndata: {path: '${NOT_SET_ANYWHERE}/Beauty'}", "variable NOT_SET_ANYWHERE"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory"):
        RunConfig.load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8 text, byte 3"):
        RunConfig.load(tmp_path / "binary.yaml")


def test_environment_variables_are_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_DATA", "/big/disk")
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: x\ndata: {path: '${SOME_DATA}/Beauty'}")
    assert RunConfig.load(path).data.path == "/big/disk/Beauty"


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1, which PyYAML follows, takes 5e-4 for a text."""
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: 5e4x\nsft: {learning_rate: 5e-4}\nmodel: {dropout: 1E-1}")
    config = RunConfig.load(path, ["finetune.learning_rate=2e-5"])
    assert config.sft["learning_rate"] == 5e-4
    assert config.model.dropout == 0.1
    assert config.finetune["learning_rate"] == 2e-5
    assert config.output_dir == "5e4x"


def test_overrides_change_single_values(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run("x"))
    config = RunConfig.load(
        path, ["seed=9", "flow.beta=0.5", "sft.max_steps=3", "evaluation.max_users=null"]
    )
    assert (config.seed, config.flow.beta, config.sft["max_steps"]) == (9, 0.5, 3)
    assert config.evaluation.max_users is None
    assert config.sft["eval_steps"] == 4  # its neighbours stay


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set must be section.key=value; got 'seed'"),
        ("=3", "--set must be section.key=value; got '=3'"),
        ("seed.x=3", "--set 'seed.x=3': seed is not a section"),
        ("sft.max_steps=[", "--set 'sft.max_steps=[': not valid YAML"),
        ("seed=\x00", "not valid YAML: unacceptable character"),
        ("flow.betta=1", "flow: unknown key 'betta'; did you mean 'beta'?"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run("x"))
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path, [override])
    assert message in str(caught.value)


# ---- what the package ships ----


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFLOWGR_DATA", "/data")
    monkeypatch.setenv("GFLOWGR_MODEL", "/models/Qwen3-0.6B")
    config = RunConfig.load(path)
    built_in = path.stem.startswith("simulated")
    assert config.data.path == (None if built_in else "/data/Beauty")


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_the_configuration_that_a_run_leaves_can_be_run(tmp_path: Path) -> None:
    config = RunConfig.from_dict(tiny_run("x"))
    write_json(tmp_path / "config.json", config.to_dict())
    assert RunConfig.load(tmp_path / "config.json") == config


def test_both_simulated_runs_have_the_same_supervised_start() -> None:
    paper, proof = (
        RunConfig.load(next(path for path in EXAMPLES if path.stem == name))
        for name in ("simulated_paper", "simulated_proof")
    )
    assert (paper.flow.gfn_weight, paper.flow.beta) == (1.0, 1.0)
    own = {name: getattr(paper, name) for name in ("output_dir", "flow", "finetune", "caveats")}
    assert replace(proof, **own) == paper


# ---- hostile files ----

_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
_MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_LAUGHS, "aliases (*) must stand for at most 100,000 values"),
        (_MERGES, "aliases (*) must stand for at most 100,000 values"),
        ("data: &a {path: *a}", "line 1: an alias (*) must not stand for what it stands in"),
        ("data: &a [[*a]]", "line 1: an alias (*) must not stand for what it stands in"),
        ("data: " + "[" * 60 + "]" * 60, "line 1: values must be nested at most 50 deep"),
        ("data: " + "[" * 3000, "values must be nested at most 50 deep"),
        ("data: " + "{a: " * 3000, "values must be nested at most 50 deep"),
        ("seed: " + "9" * 5000, "line 1: numbers must have at most 30 digits; got '9999"),
        ("seed: 0x" + "f" * 5000, "line 1: numbers must have at most 30 digits; got '0xff"),
        (
            "seed: 99999999999999999999",
            "seed must be a number of 64 bits; got 99999999999999999999",
        ),
        ("seed: -1", "seed must be in 0 .. 2**32 - 1; got -1"),
        ("seed: 1\nsft: {}\nseed: 2", "line 4: the key 'seed' is given twice"),
        ('data: {path: "\\uD800"}', "a lone surrogate, '\\ud800' at 'data'/'path'"),
        ('"\\uD800": 1', "a lone surrogate, '\\ud800'"),
        ("seed: !!python/name:os.system", "line 1: values must have no type of their own; got"),
        ("seed: !!int x", "line 1: values must have no type of their own; got 'x' as tag:yaml"),
        ("seed: !!bool x", "line 1: values must have no type of their own"),
        ("data: !!set {a}", "line 1: values must have no type of their own; got tag:yaml"),
        ("data: {path: 2020-01-01, users: 2020-01-01}", "users must be int; got '2020-01-01'"),
        ("model: {kind: [tiger]}", "one of ['tiger', 'decoder', 'causal']; got ['tiger']"),
        ("#" * (1 << 20) + "\n", "must be at most 1,048,576 bytes; got more"),
    ],
)
def test_a_file_that_would_not_end_or_fail_later_is_refused_at_once(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: x\n{text}" if text[0] != "#" else text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    message = message.replace("line 1:", "line 2:")
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or "seed must be in" in message
    assert len(str(caught.value)) < 400 + len(str(path))


def test_aliases_and_merges_of_ordinary_size_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "output_dir: x\nsft: &stage {max_steps: 3, learning_rate: 5e-4}\n"
        "finetune: {<<: *stage, max_steps: 4}\n"
    )
    config = RunConfig.load(path)
    assert config.sft == {"max_steps": 3, "learning_rate": 5e-4}
    assert config.finetune == {"max_steps": 4, "learning_rate": 5e-4}


def test_pipes_folders_and_text_that_is_not_utf8_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "pipe"), (tmp_path, "folder")):
        with pytest.raises(ConfigError, match=f"{path} must be a regular file; got a {kind}"):
            RunConfig.load(path)
    monkeypatch.setenv("PLACE", "caf\udce9")
    (tmp_path / "run.yaml").write_text("output_dir: ${PLACE}")
    with pytest.raises(ConfigError, match="must be valid Unicode; got a lone surrogate, 'caf"):
        RunConfig.load(tmp_path / "run.yaml")


def test_an_override_is_no_deeper_than_a_file(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", tiny_run("x"))
    with pytest.raises(ConfigError, match="at most 50 sections deep"):
        RunConfig.load(path, [".".join("a" * 3000) + "=1"])


def test_a_method_from_scratch_trains_by_both_sections() -> None:
    config = RunConfig.from_dict(
        {
            "output_dir": "x",
            "start": "scratch",
            "flow": {"objective": "flow_kl"},
            "sft": {"max_steps": 100, "learning_rate": 0.002},
            "finetune": {"max_steps": 70},
        }
    )
    assert config.method_arguments == {"max_steps": 70, "learning_rate": 0.002}
    needs = {cell.id: cell.needs for cell in cells_of_run(config)}
    assert needs == {"sasrec": (), "sft": ("sasrec",), "gflowgr": ("sasrec",)}


def test_exact_flows_need_a_collaborative_model() -> None:
    values = {
        "output_dir": "x",
        "flow": {"objective": "flow_kl"},
        "collaborative": {"kind": "none"},
    }
    with pytest.raises(ConfigError, match=r"collaborative\.kind must be .* got 'none'"):
        RunConfig.from_dict(values)
