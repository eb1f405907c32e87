"""What training needs is prepared from data and configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gflowgr.data import Dataset, Ragged, save_dataset
from gflowgr.identifiers import from_codes, write_index
from gflowgr.runs import ConfigError, RunConfig
from gflowgr.runs.prepare import load_data, make_identifiers, published_identifiers, split_data
from gflowgr.runs.sections import CollaborativeConfig, DataConfig

NUM_ITEMS = 40
SASREC = CollaborativeConfig()
TABLE = CollaborativeConfig(kind="embeddings", embeddings="/some/where/cf_vectors.npy")
NONE = CollaborativeConfig(kind="none")
COLOURS = ("red", "blue", "green", "white")


def make(**more: object) -> Dataset:
    sequences = Ragged.from_lists([[0, 1, 2, 3], [4, 5, 6]])
    return Dataset("shop", ["a", "b"], sequences, NUM_ITEMS, **more)  # type: ignore[arg-type]


def titles() -> list[dict[str, str]]:
    return [{"title": f"{COLOURS[i % 4]} shoe", "brand": f"maker{i}"} for i in range(NUM_ITEMS)]


# ---- identifiers ----


@pytest.mark.parametrize(
    ("collaborative", "source"), [(SASREC, "SASRec items"), (TABLE, "cf_vectors.npy")]
)
def test_made_identifiers_are_named_after_the_vectors(
    collaborative: CollaborativeConfig, source: str
) -> None:
    vectors = torch.randn(NUM_ITEMS, 8, generator=torch.Generator().manual_seed(0))
    # Texts do not matter where there are vectors.
    name, identifiers = make_identifiers(make(texts=titles()), vectors, 0, collaborative)
    assert name == f"residual k-means of {source} (3 x 4 + 1)"
    assert identifiers.num_unique() == NUM_ITEMS
    plain = make_identifiers(make(), vectors, 0, collaborative)[1]
    assert np.array_equal(plain.codes, identifiers.codes)


def test_without_vectors_identifiers_are_made_from_texts() -> None:
    data = make(texts=titles())
    name, identifiers = make_identifiers(data, None, 0, NONE)
    assert name == "residual k-means of item texts (3 x 4 + 1)"
    assert identifiers.num_unique() == NUM_ITEMS
    # Alike texts share the first code far more often than chance (a quarter) would have it.
    first, colour = identifiers.codes[:, 0], np.arange(NUM_ITEMS) % 4
    same_colour = colour[:, None] == colour[None]
    same_code = first[:, None] == first[None]
    assert same_code[same_colour].mean() > 0.9
    again = make_identifiers(data, None, 0, NONE)[1]
    assert np.array_equal(again.codes, identifiers.codes)


@pytest.mark.parametrize("texts", [None, [{"title": "-"}] * NUM_ITEMS], ids=["none", "no words"])
def test_with_nothing_to_make_identifiers_from_the_ways_out_are_named(
    texts: list[dict[str, str]] | None,
) -> None:
    with pytest.raises(ConfigError, match="shop has no identifiers") as caught:
        make_identifiers(make(texts=texts), None, 0, NONE)
    for way_out in ("index.NAME.json.gz", "item.json.gz", "collaborative.kind"):
        assert way_out in str(caught.value)


def test_identifiers_of_the_data_go_first() -> None:
    given = from_codes(np.arange(NUM_ITEMS)[:, None])
    one = make(indexes={"given": given}, texts=titles())
    assert published_identifiers(one, None) == ("given", given)
    two = make(indexes={"given": given, "other": given})
    assert (published_identifiers(two, "other") or ("",))[0] == "other"
    with pytest.raises(ConfigError, match="several sets, name one of: given, other"):
        published_identifiers(two, None)


def test_identifiers_of_a_file(tmp_path: Path) -> None:
    write_index(tmp_path / "index.mine.json.gz", np.arange(NUM_ITEMS)[:, None])
    found = published_identifiers(make(), str(tmp_path / "index.mine.json.gz"))
    assert found is not None
    assert found[0] == "index.mine.json.gz"
    assert found[1].num_items == NUM_ITEMS


def test_a_method_makes_identifiers_once(tmp_path: Path) -> None:
    data = make(texts=titles())
    assert published_identifiers(data, "kmeans") is None
    name, identifiers = make_identifiers(data, None, 0, NONE, "kmeans", tmp_path)
    assert name == "kmeans of item texts"
    assert identifiers.num_unique() == NUM_ITEMS
    # A run that goes on finds them, and learns nothing again: another seed changes nothing.
    again = make_identifiers(data, None, 1, NONE, "kmeans", tmp_path)[1]
    assert np.array_equal(again.codes, identifiers.codes)


def test_a_published_set_with_the_name_of_a_method_goes_first() -> None:
    given = from_codes(np.arange(NUM_ITEMS)[:, None])
    assert published_identifiers(make(indexes={"rqvae": given}), "rqvae") == ("rqvae", given)


def test_letter_needs_a_collaborative_model() -> None:
    with pytest.raises(ConfigError, match=r"letter needs .* collaborative.kind to sasrec"):
        make_identifiers(make(texts=titles()), None, 0, NONE, "letter")


# ---- ratings ----


def test_the_stored_examples_have_the_stars_as_behaviours(tmp_path: Path) -> None:
    stars = np.array([1, 2, 5, 4, 3, 2, 1], dtype=np.float32)
    save_dataset(make(ratings=stars), tmp_path / "shop")
    data = load_data(DataConfig(path=str(tmp_path / "shop")), tmp_path, 0)
    assert data.behaviours is None  # reading adds nothing
    split = split_data(data, DataConfig(max_history=5), tmp_path)
    assert split.dataset.behaviour_names == ("1", "2", "3", "4", "5")
    assert [split.train[i]["behaviour"] for i in range(len(split.train))] == [1]  # two stars


# ---- YAML ----


def test_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    """YAML 1.1, which PyYAML follows, takes no, off, yes and on for booleans, too."""
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: on\nsft: {eval_strategy: no, bf16: False}\ncontinued_sft: true")
    config = RunConfig.load(path, ["finetune.eval_strategy=no"])
    assert config.output_dir == "on"
    assert config.sft == {"eval_strategy": "no", "bf16": False}
    assert config.finetune["eval_strategy"] == "no"
    assert config.continued_sft is True
    with pytest.raises(ConfigError, match="continued_sft must be bool; got 'no'"):
        RunConfig.load(path, ["continued_sft=no"])
