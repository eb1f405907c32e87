"""Models by their hub id, pushed with a card; the hub is a folder here."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from support.tiny_causal import causal_folder, causal_model
from support.tiny_shop import make_model
from support.tiny_trainer import assert_equal_weights

from gflowgr.errors import DataError
from gflowgr.models import CausalConfig, GFlowModel, LoraSettings


class FolderHub:
    """What the package calls of ``huggingface_hub``, on repositories that are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[Any, ...]] = []

    def snapshot_download(
        self, repo_id: str, *, revision: Any, token: Any, allow_patterns: list[str]
    ) -> str:
        self.asked.append((repo_id, revision, token))
        if not (self.root / repo_id).is_dir():
            raise LocalEntryNotFoundError(f"no {repo_id}\nand more")
        copy = self.root / "cache" / repo_id
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        for path in (self.root / repo_id).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, copy)
        return str(copy)

    def create_repo(self, repo_id: str, *, private: Any, exist_ok: bool) -> Any:
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=full)

    def file_exists(self, repo_id: str, name: str) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> Any:
        for path in (self.root / repo_id).iterdir():
            if any(fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    made = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: made)
    return made


def test_a_pushed_model_is_loaded_by_its_id(hub: FolderHub) -> None:
    model = make_model()
    assert model.push_to_hub("shop") == "https://hub/me/shop/commit/1"
    loaded = GFlowModel.from_pretrained("me/shop", revision="v1", token="secret")
    assert hub.asked == [("me/shop", "v1", "secret")]
    assert_equal_weights(loaded.state_dict(), model.state_dict())


def test_a_push_leaves_nothing_of_an_earlier_model_and_keeps_a_card(hub: FolderHub) -> None:
    repository = hub.root / "me" / "shop"
    repository.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin"):
        (repository / name).write_text("{}")
    (repository / "README.md").write_text("mine")
    make_model().push_to_hub("me/shop")
    assert (repository / "README.md").read_text() == "mine"
    assert not list(repository.glob("adapter*")) + list(repository.glob("*.bin"))
    make_model().push_to_hub("me/shop", card="another")
    assert (repository / "README.md").read_text() == "another"


def test_the_card_says_what_the_model_is_and_no_local_path(hub: FolderHub, tmp_path: Path) -> None:
    base = causal_folder(tmp_path / "base")
    causal_model(CausalConfig(str(base))).push_to_hub("me/shop")
    card = (hub.root / "me" / "shop" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "gflowgr"
    assert "base_model" not in header
    for text in (
        "Qwen3ForCausalLM",
        "| items | 200, with",
        "GFlowGR-TB",
        'from_pretrained("me/shop")',
    ):
        assert text in card
    assert str(tmp_path) not in card
    model = make_model()
    model.backbone.config._name_or_path = "google/t5-small"
    model.push_to_hub("me/other")
    card = (hub.root / "me" / "other" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "google/t5-small"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("me/nothing", "me/nothing is not a folder, and the hub did not give .*: no me/nothing$"),
        ("/some/folder", "/some/folder is not a folder, nor the id of a model on the hub"),
        ("../folder", r"\.\./folder is not a folder, nor the id"),
        ("folder", "folder is not a folder, nor the id"),
    ],
)
def test_what_is_no_model_is_named(hub: FolderHub, place: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        GFlowModel.from_pretrained(place)
    assert len(hub.asked) == (place == "me/nothing")


def test_a_bad_id_is_refused_before_anything_is_written(hub: FolderHub) -> None:
    with pytest.raises(ValueError, match=r"repo_id must be .*got 'a b'"):
        make_model().push_to_hub("a b")
    assert not hub.root.exists()


def test_a_text_model_is_found_by_its_id(hub: FolderHub) -> None:
    causal_folder(hub.root / "some" / "qwen")
    model = causal_model(CausalConfig("some/qwen", revision="main"))
    assert type(model.backbone).__name__ == "Qwen3ForCausalLM"
    assert ("some/qwen", "main", None) in hub.asked
    with pytest.raises(DataError, match=r"model\.path: some/llama is not a folder, and the hub"):
        causal_model(CausalConfig("some/llama"))


def test_a_saved_model_holds_no_pickle_and_no_local_path(tmp_path: Path) -> None:
    base = causal_folder(tmp_path / "base")
    for config in ("config.json", "tokenizer_config.json", "generation_config.json"):
        values = json.loads((base / config).read_text())
        places = {"data_place": str(tmp_path / "data"), "inner": {"list": [f"{tmp_path}/x", "a/b"]}}
        (base / config).write_text(json.dumps({**values, **places, "_name_or_path": str(base)}))
    model = causal_model(CausalConfig(str(base), lora=LoraSettings(r=2)))
    model.backbone.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "model")
    model.save_checkpoint(tmp_path / "adapters")
    written = [*(tmp_path / "model").iterdir(), *(tmp_path / "adapters").iterdir()]
    assert {path.suffix for path in written} == {".json", ".safetensors"}
    for path in written:
        assert str(tmp_path).encode() not in path.read_bytes(), path
    kept = json.loads((tmp_path / "model" / "config.json").read_text())
    assert kept["data_place"] is None
    assert kept["inner"] == {"list": ["a/b"]}
    loaded = GFlowModel.from_pretrained(tmp_path / "model")
    assert loaded.tokenizer.eos_token == "</s>"  # has a slash, and is no path


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_filled_up_to_a_multiple(tied: bool, tmp_path: Path) -> None:
    base = str(causal_folder(tmp_path / "base", tie_word_embeddings=tied))
    plain = causal_model(CausalConfig(base))
    padded = causal_model(CausalConfig(base, pad_to_multiple_of=64))
    tokens = len(padded.tokenizer)
    backbone = padded.backbone
    for table in (backbone.get_input_embeddings().weight, backbone.get_output_embeddings().weight):
        assert len(table) % 64 == 0
        assert tokens <= len(table) < tokens + 64
    assert backbone.config.vocab_size == len(table)
    assert len(plain.backbone.get_input_embeddings().weight) == tokens
    same = (m.backbone.get_input_embeddings().weight[:tokens] for m in (plain, padded))
    assert torch.equal(*same)
    padded.save_pretrained(tmp_path / "model")
    loaded = GFlowModel.from_pretrained(tmp_path / "model")
    assert_equal_weights(loaded.state_dict(), padded.state_dict())


@pytest.mark.parametrize("value", [0, -8, 1.5, True])
def test_a_bad_multiple_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"pad_to_multiple_of must be an integer .*; got {value}"):
        CausalConfig("x", pad_to_multiple_of=value)
