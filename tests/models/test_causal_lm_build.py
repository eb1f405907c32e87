"""A text model becomes a generator: identifier tokens, their first rows, prompts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import small_model
from support.tiny_causal import causal_folder, causal_model
from support.tiny_shop import shop
from transformers import AutoModelForCausalLM, AutoTokenizer

from gflowgr.errors import DataError
from gflowgr.models import CausalConfig, IdentifierVocabulary, prompt_tokens
from gflowgr.models import causal as build
from gflowgr.runs.generator import check_generator

TEMPLATE = "Had: {history}. Next:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_folder(tmp_path_factory.mktemp("qwen3"))


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def rows_of(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


# ---- tokens ----


def test_identifier_tokens_follow_the_tokenizers_own(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    before = len(tokenizer)
    vocabulary = build.add_identifier_tokens(tokenizer, IdentifierVocabulary((2, 3)))
    assert vocabulary.level_offsets == (before, before + 2)
    assert vocabulary.size == len(tokenizer) == before + 5
    assert tokenizer.convert_ids_to_tokens(vocabulary.encode([[1, 2]])[0]) == ["<a_1>", "<b_2>"]
    assert tokenizer("<a_0><b_1>", add_special_tokens=False)["input_ids"] == [before, before + 3]
    again = build.add_identifier_tokens(tokenizer, IdentifierVocabulary((2, 3)))
    assert again == vocabulary  # a tokenizer that has them already


def test_identifiers_of_varying_length_end_with_the_texts_end(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    vocabulary = build.add_identifier_tokens(tokenizer, IdentifierVocabulary((2, 3), ragged=True))
    first = vocabulary.offset
    assert vocabulary.encode([[1, -1]]).tolist() == [[first + 1, tokenizer.eos_token_id, -1]]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer needs an eos token"):
        build.add_identifier_tokens(tokenizer, IdentifierVocabulary((2, 3), ragged=True))


def test_tokens_of_another_catalogue_are_refused(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    build.add_identifier_tokens(tokenizer, IdentifierVocabulary((2, 3)))
    with pytest.raises(ValueError, match="'<a_2>' as token 405, where 402 is expected"):
        build.add_identifier_tokens(tokenizer, IdentifierVocabulary((3, 3)))


def test_embeddings_that_are_larger_than_the_tokenizer_are_not_cut(tmp_path: Path) -> None:
    """Published checkpoints round their vocabularies up."""
    config = CausalConfig(str(causal_folder(tmp_path, vocab_size=448)))
    model = causal_model(config)
    assert model.vocabulary.offset == 400
    assert rows_of(model.backbone).shape[0] == 448


# ---- first rows ----


@pytest.mark.parametrize("tied", [True, False])
def test_rows_from_text_are_means_of_means_and_old_rows_stay(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_NOISE", 0.0)
    config = CausalConfig(str(causal_folder(tmp_path, tie_word_embeddings=tied)))
    published = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = causal_model(config)
    first = model.vocabulary.offset
    tokenizer = tokenizer_of(tmp_path)
    identifiers = shop().dataset.identifiers("hierarchy").codes
    for old, new in (
        (rows_of(published), rows_of(model.backbone)),
        (published.lm_head.weight.detach(), model.backbone.lm_head.weight.detach()),
    ):
        assert torch.equal(new[:first], old)
        for level, code in ((0, 3), (3, 8)):
            titles = [
                shop().dataset.title(item)
                for item in range(shop().num_items)
                if identifiers[item, level] == code
            ]
            assert len(titles) >= (20 if level == 0 else 1)
            ids = [tokenizer(title, add_special_tokens=False)["input_ids"] for title in titles]
            expected = torch.stack([old[row].mean(0) for row in ids]).mean(0)
            place = model.vocabulary.level_offsets[level] + code
            torch.testing.assert_close(new[place], expected)
    assert torch.equal(new, rows_of(model.backbone)) == tied


def test_rows_from_the_mean_differ_only_by_the_noise(folder: Path) -> None:
    model = causal_model(CausalConfig(str(folder), rows="mean"))
    rows, first = rows_of(model.backbone), model.vocabulary.offset
    departure = (rows[first:] - rows[:first].mean(0)) / rows[:first].std(0)
    assert departure.std().item() == pytest.approx(0.1, rel=0.2)
    same = causal_model(CausalConfig(str(folder), rows="mean"))
    assert torch.equal(rows_of(same.backbone), rows)
    other = causal_model(CausalConfig(str(folder), rows="mean"), seed=1)
    assert not torch.equal(rows_of(other.backbone)[first:], rows[first:])


def test_random_weights_by_the_folders_configuration(folder: Path) -> None:
    models = [
        causal_model(CausalConfig(str(folder), from_config=from_config), seed=seed)
        for from_config, seed in ((False, 0), (False, 1), (True, 2), (True, 2), (True, 3))
    ]
    weights = [model.backbone.model.layers[0].mlp.up_proj.weight for model in models]
    equal = [torch.equal(one, two) for one, two in pairwise(weights)]
    assert equal == [True, False, True, False]


# ---- prompts ----


def test_prompt_is_the_templates_text(folder: Path) -> None:
    model = causal_model(CausalConfig(str(folder), template=TEMPLATE, separator="; "))
    histories = torch.tensor([[0, 7, 150], [9, -1, -1]])
    ids, mask = prompt_tokens(histories, model.item_tokens(), model.prompt)
    names = ["".join(model.tokenizer.convert_ids_to_tokens(row)) for row in model.item_tokens()]
    texts = [model.tokenizer.decode(row[real]) for row, real in zip(ids, mask.bool(), strict=True)]
    assert texts == [
        f"Had: {names[0]}; {names[7]}; {names[150]}. Next:",
        f"Had: {names[9]}. Next:",
    ]
    assert ids[mask == 0].unique().tolist() == [model.tokenizer.pad_token_id]


@pytest.mark.parametrize(("room", "kept"), [(0, 2), (5, 2), (6, 3)])
def test_what_does_not_fit_drops_the_oldest_items_whole(room: int, kept: int, folder: Path) -> None:
    plain = causal_model(CausalConfig(str(folder), template=TEMPLATE)).prompt
    around = len(plain.prefix) + len(plain.suffix)
    assert len(plain.separator) == 2
    two = around + 4 + 2 + 4  # an identifier is of four tokens
    model = causal_model(CausalConfig(str(folder), template=TEMPLATE, max_prompt=two + room))
    items = model.item_tokens()
    ids, mask = prompt_tokens(torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1]]), items, model.prompt)
    assert mask.sum(1).tolist() == [around + 6 * kept - 2, two]
    expected, _ = prompt_tokens(torch.tensor([[1, 2, 3, 4][-kept:]]), items, plain)
    assert ids[0].tolist() == expected[0].tolist()
    assert (
        ids[1, :two].tolist() == prompt_tokens(torch.tensor([[5, 6]]), items, plain)[0][0].tolist()
    )


def test_a_prompt_ends_before_the_models_positions_do(tmp_path: Path) -> None:
    model = causal_model(CausalConfig(str(causal_folder(tmp_path, max_position_embeddings=50))))
    ids, _ = prompt_tokens(torch.arange(20).view(1, 20), model.item_tokens(), model.prompt)
    assert 50 - 6 < ids.shape[1] + 4 <= 50


def test_the_texts_beginning_is_kept(tmp_path: Path) -> None:
    """Llama's tokenizer puts <s> before every text; prompts have it once, at their start."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of(causal_folder(tmp_path))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    prompt = causal_model(CausalConfig(str(tmp_path))).prompt
    assert prompt.prefix[0] == 1
    assert 1 not in (*prompt.prefix[1:], *prompt.separator, *prompt.suffix)


def test_a_template_without_room_for_an_item_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="a prompt may have 12 tokens, but the template takes"):
        causal_model(CausalConfig(str(folder), max_prompt=12))


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "Next item:"}, "template must have {history} once; got 'Next item:'"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', in which small updates"),
    ],
)
def test_bad_configurations_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalConfig("model", **values)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        check_generator(CausalConfig(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=f"model.path: {tmp_path}: "):
        check_generator(CausalConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"})[:-3])
    with pytest.raises(DataError, match=f"model.path: {tmp_path}: "):
        check_generator(CausalConfig(str(tmp_path)))


def test_a_model_that_cannot_run_set_wise_is_refused_before_any_work(tmp_path: Path) -> None:
    causal_folder(tmp_path)
    small_model("gemma2").config.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Gemma2ForCausalLM cannot be trained: model_type"):
        check_generator(CausalConfig(str(tmp_path)))
