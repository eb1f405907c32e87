"""A decoder-only generator from the command line: trained, interrupted, evaluated, asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_causal import causal_folder
from support.tiny_run import results, tiny_run, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from gflowgr.cli import main
from gflowgr.files import read_json
from gflowgr.training import GFlowGRTrainer

pytestmark = pytest.mark.usefixtures("no_drawing")

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def causal_run(folder: Path, **model: Any) -> Path:
    """A configuration of 8 steps per stage and the model that it starts from, beside ``folder``."""
    base = folder.parent / "TinyQwen"
    if not base.exists():
        causal_folder(base)
    values = tiny_run(folder)
    values["model"] = {"kind": "causal", "path": str(base), **model}
    values["continued_sft"] = False
    for stage in ("sft", "finetune"):
        values[stage] = {**values[stage], "max_steps": 8}
    return write_config(folder.parent / f"{folder.name}.yaml", values)


def train(config: Path) -> int:
    return main(["train", "--config", str(config), "--no-progress"])


@pytest.mark.parametrize(
    "lora",
    [pytest.param(None, id="all weights", marks=pytest.mark.slow), pytest.param(LORA, id="lora")],
)
def test_interrupted_run_ends_with_the_same_results_and_serves(
    lora: dict[str, Any] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(causal_run(tmp_path / "whole", lora=lora)) == 0
    whole = results(tmp_path / "whole")
    assert list(whole) == ["SFT", "GFlowGR-TB", "SASRec", "Popularity"]

    config = causal_run(tmp_path / "cut", lora=lora)
    step = GFlowGRTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        flows = self.model.settings.objective != "sft"
        if self.state.global_step == (6 if flows else 5) and flows == flow_stage:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    for flow_stage in (False, True):  # noqa: B007  # read by `interrupted`
        with monkeypatch.context() as patch:
            patch.setattr(GFlowGRTrainer, "training_step", interrupted)
            assert train(config) == 130
    checkpoint = tmp_path / "cut" / "gflowgr" / "checkpoints" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").exists() == (lora is not None)
    assert (checkpoint / "model.safetensors").exists() == (lora is None)
    assert train(config) == 0
    assert results(tmp_path / "cut") == whole
    weights = "gflowgr/model/model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()

    # What is left is an ordinary checkpoint, and serves.
    model, data = tmp_path / "whole" / "gflowgr" / "model", tmp_path / "whole" / "data"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer("<a_0><d_1>")["input_ids"]) == 2
    assert AutoModelForCausalLM.from_pretrained(model).config.vocab_size == len(tokenizer)
    capsys.readouterr()
    options = ["--data", str(data), "--json", "-k", "3", "--history", "5,6,7"]
    assert main(["recommend", str(tmp_path / "whole"), *options]) == 0
    found = json.loads(capsys.readouterr().out)["items"]
    assert len(set(found)) == 3
    assert all(0 <= item < 200 for item in found)
    assert main(["evaluate", str(model), "--data", str(data), "--beams", "10"]) == 0
    assert "R@10" in capsys.readouterr().out


def test_checkpointed_activations_and_bfloat16_train_too(tmp_path: Path) -> None:
    config = causal_run(tmp_path / "run", lora=LORA, dtype="bfloat16")
    options = ["gradient_checkpointing=true", "bf16=true", "max_steps=2", "eval_strategy=no"]
    changes = [f"--set={stage}.{o}" for stage in ("sft", "finetune") for o in options]
    changes += [f"--set={stage}.load_best_model_at_end=false" for stage in ("sft", "finetune")]
    assert main(["train", "--config", str(config), "--no-progress", *changes]) == 0
    record = read_json(tmp_path / "run" / "results.json")
    assert record["config"]["model"]["path"] == "TinyQwen"
    assert record["methods"]["GFlowGR-TB"]["training"]["steps"] == 2
    report = (tmp_path / "run" / "report.md").read_text()
    assert "TinyQwen (its weights), LoRA of rank 4 trained" in report


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "bert"}, "model: kind must be one of ['tiger', 'decoder', 'causal']; got 'bert'"),
        ({"templat": "x"}, "model: unknown key 'templat'; did you mean 'template'?"),
        ({"template": "x"}, "template must have {history} once; got 'x'"),
        ({"lora": {"rank": 4}}, "model: lora: unknown key 'rank'"),
        ({"lora": {"r": 0}}, "model: lora: lora.r must be >= 1; got 0"),
        ({"lora": 3}, "model: lora must be LoraSettings or nothing; got 3"),
        ({"path": "/nowhere"}, "model.path: /nowhere is not a folder"),
    ],
)
def test_bad_model_sections_are_named_before_any_work(
    model: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(causal_run(tmp_path / "run", **model)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "sasrec").exists()
