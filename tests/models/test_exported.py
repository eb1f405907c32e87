"""Exported programs, read back and run without the package's decoders, against those."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Capture, call
from support.tiny_shop import make_model, shop_catalogue
from torch import Tensor

from gflowgr.decoding.decoders import decoder_for
from gflowgr.models import DecoderConfig, FlowSettings, GFlowModel, build_decoder, prompt_tokens
from gflowgr.models.decoder import decoder_prompt
from gflowgr.models.exported import prompt_and_step

HISTORIES = torch.tensor([[5, 6, 7], [100, -1, -1], [1, 2, -1]])
NAMES = ("prompt", "step")
Program = Callable[..., Sequence[Tensor]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved TIGER and a saved decoder, of one layer."""
    root = tmp_path_factory.mktemp("models")
    make_model(objective="sft").save_pretrained(root / "tiger")
    shop = shop_catalogue()
    backbone = build_decoder(shop.vocabulary, DecoderConfig(16, 32, 2, 1), max_history=3, seed=0)
    GFlowModel(
        backbone,
        shop.tree,
        shop.vocabulary,
        FlowSettings(max_history=3),
        prompt=decoder_prompt(shop.vocabulary),
    ).save_pretrained(root / "decoder")
    return {name: root / name for name in ("tiger", "decoder")}


@torch.no_grad()
def check(model: GFlowModel, prompt: Program, step: Program, rows: list[int]) -> None:
    """The logits of every step along some identifiers, within 1e-5."""
    input_ids, mask = prompt_tokens(HISTORIES[rows], model.item_tokens(), model.prompt)
    tokens = model.item_tokens()[[3, 50, 199]][rows]
    backbone: Any = model.backbone
    decoder = decoder_for(backbone, input_ids, mask)
    logits, prompt_keys, prompt_values, *own = prompt(input_ids, mask)
    torch.testing.assert_close(logits, decoder.logits(decoder.first())[:, 0], rtol=0, atol=1e-5)
    parent = torch.zeros(len(rows), 1, dtype=torch.int64)
    for place in range(tokens.shape[1] - 1):
        token = tokens[:, place]
        logits, *own = step(token, torch.tensor(place), mask, prompt_keys, prompt_values, *own)
        wanted = decoder.logits(decoder.advance(token[:, None], parent))[:, 0]
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["tiger", "decoder"])
def test_the_programs_compute_what_the_model_does(kind: str, models: dict[str, Path]) -> None:
    model = GFlowModel.from_pretrained(models[kind], decode_only=True)
    backbone: Any = model.backbone
    prompt, step = prompt_and_step(backbone, model.vocabulary.length)
    check(model, prompt, step, [0, 1, 2])


@pytest.mark.parametrize("kind", ["tiger", pytest.param("decoder", marks=pytest.mark.slow)])
def test_what_torch_export_wrote_computes_what_the_model_does(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    """Of other batches and lengths than it was made with, also of one prompt."""
    out = tmp_path / "out"
    code, shown, error = call(capsys, "export", models[kind], "--torch-export", "--out", out)
    assert (code, shown) == (0, f"written to {out}\n"), error
    model = GFlowModel.from_pretrained(models[kind], decode_only=True)
    prompt, step = (torch.export.load(str(out / f"{name}.pt2")).module() for name in NAMES)
    check(model, prompt, step, [0, 1, 2])
    check(model, prompt, step, [1])
    about = json.loads((out / "export.json").read_text())
    assert (about["kind"], about["levels"]) == (kind, 4)
    assert about["outputs"]["step"] == ["logits", "own_keys", "own_values"]
    for name in NAMES:
        with zipfile.ZipFile(out / f"{name}.pt2") as archive:
            (empty,) = [each for each in archive.namelist() if "sample_inputs" in each]
            assert archive.getinfo(empty).file_size < 2000  # torch's record, without tensors
            others = [each for each in archive.namelist() if each != empty]
            assert not any(each.endswith((".pt", ".pkl")) for each in others)


@pytest.mark.slow
def test_what_onnx_holds_computes_what_the_model_does(
    models: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'gflowgr[onnx]')")
    from onnx.reference import ReferenceEvaluator

    def program(name: str) -> Program:
        evaluator = ReferenceEvaluator(str(tmp_path / f"{name}.onnx"))
        inputs = json.loads((tmp_path / "export.json").read_text())["inputs"][name]

        def run(*given: Tensor) -> list[Tensor]:
            feed = dict(zip(inputs, (each.numpy() for each in given), strict=True))
            return [torch.from_numpy(each) for each in evaluator.run(None, feed)]

        return run

    for kind in models:
        code, _, error = call(capsys, "export", models[kind], "--onnx", "--out", tmp_path)
        assert code == 0, error
        model = GFlowModel.from_pretrained(models[kind], decode_only=True)
        check(model, program("prompt"), program("step"), [0, 1, 2])
        check(model, program("prompt"), program("step"), [1])


def test_what_cannot_be_exported_is_refused(
    models: dict[str, Path], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no file."""
    out = tmp_path / "out"
    model = GFlowModel.from_pretrained(models["tiger"])
    backbone: Any = model.backbone
    backbone.config.scale_decoder_outputs = False  # a T5 of another kind, read by transformers
    backbone.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "other")
    code, _, error = call(capsys, "export", tmp_path / "other", "--torch-export", "--out", out)
    assert code == 2
    assert "must be a TIGER or a decoder to be exported; its backbone is a T5For" in error
    with pytest.raises(TypeError, match="backbone must be a BareT5 or a BareGPT2; got T5For"):
        prompt_and_step(backbone, 4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, error = call(capsys, "export", models["tiger"], "--onnx", "--out", out)
    assert code == 2
    assert "--onnx needs onnx and onnxscript: pip install 'gflowgr[onnx]'" in error
    monkeypatch.undo()

    def fail(_: Any, name: str, __: Any, folder: Path) -> None:
        if name == "step":
            raise RuntimeError("no such operator")
        (folder / "prompt.pt2").touch()

    monkeypatch.setattr("gflowgr.models.exported._write_torch", fail)
    with pytest.raises(RuntimeError, match="no such operator"):
        call(capsys, "export", models["tiger"], "--torch-export", "--out", out)
    assert not out.exists()
    assert [each.name for each in tmp_path.iterdir()] == ["other"]
