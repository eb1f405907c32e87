"""Vectors of item texts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_encoder import write_encoder
from transformers import BertModel

from gflowgr.identifiers import encode_texts, item_texts

TEXTS = ["red nail polish", "pan", "", "steel frying pan unknownword"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def test_vectors_are_means_of_the_last_states_whatever_the_batch(encoder: Path) -> None:
    got = encode_texts(TEXTS, str(encoder), batch_size=3)
    assert got.shape == (4, 8)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [1, 1, 0, 1], rtol=1e-5)
    model = BertModel.from_pretrained(encoder).eval()
    for row, tokens in ((0, [2, 3, 4]), (1, [7]), (3, [5, 6, 7, 1])):
        with torch.inference_mode():
            mean = model(torch.tensor([tokens])).last_hidden_state[0].mean(dim=0)
        np.testing.assert_allclose(got[row], mean / mean.norm(), atol=1e-5)


def test_no_more_than_max_length_tokens_are_read(encoder: Path) -> None:
    one = encode_texts(["pan steel", "pan"], str(encoder), max_length=1)
    np.testing.assert_allclose(one[0], one[1], atol=1e-6)


def test_a_sentence_transformers_folder_is_run_by_that_package(
    encoder: Path, tmp_path: Path
) -> None:
    package = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed (extra: text)"
    )
    package.SentenceTransformer(str(encoder), local_files_only=True).save(str(tmp_path / "st"))
    got = encode_texts(TEXTS[:2], str(tmp_path / "st"))
    np.testing.assert_allclose(got, encode_texts(TEXTS[:2], str(encoder)), atol=1e-5)


def test_a_sentence_transformers_folder_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules.json").write_text("[]")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"sentence-transformers model: pip install .*text"):
        encode_texts(["x"], str(tmp_path))


def test_nothing_is_downloaded_unasked() -> None:
    with pytest.raises(ValueError, match="encoder 'no-such/encoder' cannot be loaded") as caught:
        encode_texts(["x"], "no-such/encoder")
    assert "--allow-download" in str(caught.value)
    without = importlib.util.find_spec("sentence_transformers") is None
    assert ("gflowgr[text]" in str(caught.value)) == without


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder '/.*/missing': no such folder"):
        encode_texts(["x"], str(tmp_path / "missing"))


def test_no_texts() -> None:
    with pytest.raises(ValueError, match="texts must not be empty"):
        encode_texts([], "any")


def test_fields_of_items_are_joined_in_the_order_asked_for() -> None:
    items = [{"title": "red", "brand": "acme"}, {"title": "blue"}, {}]
    assert item_texts(items) == ["red acme", "blue", ""]
    assert item_texts(items, ["brand", "title"]) == ["acme red", "blue", ""]
    with pytest.raises(ValueError, match="no item has 'colour'; there are brand, title"):
        item_texts(items, ["colour"])
