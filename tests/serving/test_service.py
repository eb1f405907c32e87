"""The served catalogue without a server: batches, changes, the journal, replicas, restarts."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.served_shop import free_identifiers, serve, write_folders
from support.tiny_encoder import write_encoder
from support.tiny_shop import make_model, make_scorer, shop

from gflowgr.collaborative import EmbeddingScorer
from gflowgr.errors import DataError
from gflowgr.evaluation.generative import GenerativeRecommender
from gflowgr.identifiers import Tokeniser, encode_texts, tokeniser_path, write_index
from gflowgr.models import GFlowModel
from gflowgr.rewards import CatalogueReward
from gflowgr.serving.beginnings import TargetPolicy
from gflowgr.serving.requests import (
    Add,
    AddVector,
    Change,
    Recommend,
    Remove,
    RequestError,
    SetAvailability,
    SwapModel,
)
from gflowgr.serving.service import Service
from gflowgr.tree import PrefixTree


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The dataset, and two models of it, of other weights."""
    return write_folders(tmp_path_factory.mktemp("served"))


@pytest.fixture
def service(folders: dict[str, str], tmp_path: Path) -> Service:
    return serve(folders, tmp_path / "state")


def answer(service: Service, **request: Any) -> dict[str, Any]:
    (found,) = service.answer([Recommend(**request)])
    assert isinstance(found, dict), found
    return found


def everything(service: Service) -> set[Any]:
    return set(answer(service, history=(), k=300)["items"])


# ---- answers ----


def test_a_batch_gives_each_request_what_the_offline_search_gives(service: Service) -> None:
    """With other k, exclusions, availability and a bad request among them."""
    requests = [
        Recommend(history=(3, 14, 15), k=5, with_scores=True, with_titles=True),
        Recommend(history=(3, 900)),
        Recommend(user="17", k=3),
        Recommend(history=(7,), k=20, exclude=(9, "10")),
        Recommend(history=(7,), k=4, available=(5, 6, 7), mask_seen=False),
        Recommend(),
    ]
    found = service.answer(requests)
    model = make_model(objective="sft").eval()
    offline = GenerativeRecommender(model, num_beams=8)
    history = [np.array([3, 14, 15])]
    items, scores = offline.recommend(history, 5, history)
    first = found[0]
    assert isinstance(first, dict)
    assert first["items"] == items[0].tolist()
    np.testing.assert_allclose(first["scores"], scores[0], atol=1e-5)
    assert first["titles"] == [shop().dataset.title(item) for item in items[0]]
    past = [shop().dataset.sequences.row(17).astype(np.int64)]
    assert found[2] == {"items": offline.recommend(past, 3, past)[0][0].tolist(), "version": 0}
    wide = offline.recommend([np.array([7])], 20, [np.array([7, 9, 10])])[0][0]
    assert isinstance(found[3], dict)
    assert found[3]["items"] == wide.tolist()
    assert isinstance(found[4], dict)
    assert sorted(found[4]["items"]) == [5, 6, 7]
    errors = [each for each in found if isinstance(each, RequestError)]
    assert [(error.field, str(error)) for error in errors] == [
        ("history", "history must name items of the catalogue, such as 0; got 900"),
        ("history", "history or user must be given; got neither"),
    ]


def test_a_large_batch_of_histories_of_any_length_is_answered_in_its_order(
    service: Service,
) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 8, 40)
    requests = [
        Recommend(history=tuple(draw.integers(0, 200, each).tolist()), k=3) for each in lengths
    ]
    assert service.answer(requests) == [service.answer([each])[0] for each in requests]


# ---- changes ----


def test_an_added_item_is_recommended_removed_and_added_again(service: Service) -> None:
    one, other = free_identifiers()[:2]
    service.change(Add("new", one, "A new thing"), "me")
    assert everything(service) == {*range(200), "new"}
    assert answer(service, history=("new", 3))["items"]
    assert answer(service, history=(), available=("new",), with_titles=True) == {
        "items": ["new"],
        "version": 1,
        "titles": ["A new thing"],
    }
    service.change(Remove("new"), "me")
    service.change(Remove("5"), "me")
    assert everything(service) == set(range(200)) - {5}
    assert answer(service, history=("new", 5, 3))["items"]  # histories may still hold them
    service.change(Add("5", other), "me")
    service.change(Add("new", one), "me")
    assert everything(service) == {*range(200), "new"}
    catalogue = service.catalogue()
    tokens = torch.from_numpy(catalogue.model.vocabulary.encode(np.array([one, other])))
    assert catalogue.tree.identifiers(torch.tensor([200, 5])).tolist() == tokens.tolist()
    assert catalogue.titles[200] == "A new thing"
    assert catalogue.titles[5] == shop().dataset.title(5)


def test_an_item_that_is_not_available_is_there_but_not_recommended(service: Service) -> None:
    service.change(SetAvailability("7", False), "me")
    assert everything(service) == set(range(200)) - {7}
    assert answer(service, history=(3,), available=(7,), mask_seen=False)["items"] == []
    service.change(SetAvailability("7", True), "me")
    assert everything(service) == set(range(200))


def test_another_model_answers_with_the_changed_catalogue(
    service: Service, folders: dict[str, str]
) -> None:
    before = answer(service, history=(3, 4), k=8)["items"]
    service.change(Add("new", free_identifiers()[0]), "me")
    service.change(Remove("5"), "me")
    service.change(SwapModel(folders["model1"]), "me")
    offline = GenerativeRecommender(make_model(objective="sft", seed=1).eval(), num_beams=8)
    wanted = offline.recommend([np.array([3, 4])], 8, [np.array([3, 4, 5])])[0][0].tolist()
    assert answer(service, history=(3, 4), k=8, exclude=("new",))["items"] == wanted
    assert wanted != before
    assert everything(service) == {*range(200), "new"} - {5}


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        (Add("5", (0, 0, 0)), "id", "id must be new; item '5' is there already"),
        (Add(" x", (0, 0, 0)), "id", "without white space at its ends"),
        (Add("x\ny", (0, 0, 0)), "id", "control characters"),
        (Add("a/../b", (0, 0, 0)), "id", "parts between slashes that are . or ..; got 'a/../b'"),
        (SwapModel("a\0b"), "model", "model must be a folder; got 'a\\x00b'"),
        (Add("x", (0, 0)), "identifier", "identifier must have 4 codes, below"),
        (Add("x", (0, 0, 0, 10**6)), "identifier", "identifier must have 4 codes, below"),
        (Add("x", (0, 0, 0, -1)), "identifier", "identifier must have 4 codes, below"),
        (Remove("x"), "id", "id must name items of the catalogue, such as 0; got 'x'"),
        (SetAvailability("x", True), "id", "id must name items of the catalogue"),
        (SwapModel("nowhere"), "model", "nowhere"),
    ],
)
def test_a_change_that_cannot_be_made_changes_nothing(
    change: Change, field: str, message: str, service: Service
) -> None:
    with pytest.raises(RequestError) as caught:
        service.change(change, "me")
    assert caught.value.field == field
    assert message in str(caught.value)
    assert service.catalogue().version == 0
    assert everything(service) == set(range(200))


def test_a_taken_identifier_is_shared_only_when_asked_for(service: Service) -> None:
    model = make_model(objective="sft")
    tokens = model.item_tokens()[9].numpy()
    codes = tuple((tokens - np.array(model.vocabulary.level_offsets)).tolist())
    with pytest.raises(RequestError, match="identifier must be free, or share be true; item 9 has"):
        service.change(Add("twin", codes), "me")
    service.change(Add("twin", codes, share=True), "me")
    found = answer(service, history=(), available=(9, "twin"), with_scores=True)
    assert found["items"] == [9, "twin"]
    assert found["scores"][0] == found["scores"][1]


def test_the_beginnings_of_identifiers_have_the_probability_of_their_items(
    service: Service,
) -> None:
    """The sum of P(identifier) below each pair of codes, all of them scored exactly."""
    service.change(Remove("5"), "me")
    found = service.beginnings(Recommend(history=(3, 5)))
    assert [each["id"] for each in found["history"]] == [3, 5]
    model, tree = service.catalogue().model, service.catalogue().tree
    exact = GenerativeRecommender(model, num_beams=300, normalize="children", tree=tree)
    items, scores = exact.recommend([np.array([3, 5])], 199)
    codes = model.item_tokens().numpy() - np.array(model.vocabulary.level_offsets)
    wanted: dict[tuple[int, ...], float] = {}
    for leaf, score in dict(zip(tree.leaf_of(items[0]).tolist(), scores[0], strict=True)).items():
        pair = tuple(codes[int(tree.items(leaf)[0]), :2].tolist())
        wanted[pair] = wanted.get(pair, 0.0) + float(np.exp(score))
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-4)
    got = {tuple(each["codes"]): each["probability"] for each in found["beginnings"]}
    assert got.keys() == wanted.keys()
    for pair, probability in wanted.items():
        assert got[pair] == pytest.approx(probability, rel=1e-4)


def test_the_target_beside_a_beginning_is_the_reward_of_its_items(
    folders: dict[str, str], tmp_path: Path
) -> None:
    """Also of items that the collaborative model does not know, and of removed ones."""
    scorer = make_scorer()
    scorer.save(tmp_path / "scorer")
    make_model(objective="flow_kl", reward_temperature=0.5).save_pretrained(tmp_path / "model")
    service = Service(
        str(tmp_path / "model"),
        folders["data"],
        str(tmp_path / "state"),
        collaborative=str(tmp_path / "scorer"),
    )
    service.change(Add("new", free_identifiers()[0]), "me")
    service.change(Remove("5"), "me")
    found = service.beginnings(Recommend(history=(3, "new", 7)))
    reward = (scorer.score(torch.tensor([[3, 7]])).double() / 0.5).exp()[0]
    reward[[3, 5, 7]] = 0.0
    codes = make_model(objective="sft").item_tokens().numpy()
    codes = codes - np.array(make_model(objective="sft").vocabulary.level_offsets)
    wanted: dict[tuple[int, ...], float] = {}
    for item in range(200):
        pair = tuple(codes[item, :2].tolist())
        wanted[pair] = wanted.get(pair, 0.0) + float(reward[item] / reward.sum())
    got = {tuple(each["codes"]): each["target"] for each in found["beginnings"]}
    assert sum(got.values()) == pytest.approx(1, abs=1e-5)
    assert got == pytest.approx({pair: wanted[pair] for pair in got}, rel=1e-4, abs=1e-9)
    assert found["models"] == ["GFlowGR-FlowKL"]
    everyone = service.beginnings(Recommend(history=tuple(range(200))))
    assert "target" in everyone["beginnings"][0]  # the model reads the last 8 alone
    catalogue = service.catalogue()
    tokens = catalogue.beginnings.identifiers(catalogue.beginnings.item_ids)
    two = TargetPolicy(EmbeddingScorer(torch.ones(2, 2)), CatalogueReward())
    assert two.shares(catalogue, np.array([0]), tokens) is not None
    assert two.shares(catalogue, np.array([0, 1]), tokens) is None  # no reward is left


def test_a_model_beside_answers_from_the_same_catalogue(
    folders: dict[str, str], tmp_path: Path
) -> None:
    state = str(tmp_path / "state")
    service = Service(
        folders["model0"], folders["data"], state, num_beams=8, beside=folders["model1"]
    )
    service.change(Add("new", free_identifiers()[0]), "me")
    service.change(Remove("5"), "me")
    alone = Service(folders["model1"], folders["data"], state, num_beams=8)
    request = {"history": (3, "new"), "k": 6, "with_scores": True}
    first, second = service.answer([Recommend(**request), Recommend(**request, beside=True)])
    assert second == answer(alone, **request)
    assert first != second
    assert service.beginnings(Recommend(history=(3,), beside=True)) == {
        **alone.beginnings(Recommend(history=(3,))),
        "models": ["SFT (served)", "SFT (beside)"],
    }
    service.change(SwapModel(folders["model1"]), "me")
    first, second = service.answer([Recommend(**request), Recommend(**request, beside=True)])
    assert first == second
    (refused,) = alone.answer([Recommend(**request, beside=True)])
    assert isinstance(refused, RequestError)
    assert (refused.field, str(refused)) == (
        "beside",
        "beside: this server was started without --beside",
    )
    other = make_model(objective="sft")
    rows = other.item_tokens().flip(0)
    GFlowModel(
        other.backbone, PrefixTree.from_identifiers(rows), other.vocabulary, other.settings
    ).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"--beside .*other must have the identifiers of"):
        Service(folders["model0"], folders["data"], state, beside=str(tmp_path / "other"))


def test_an_item_with_a_vector_is_coded_by_the_frozen_tokeniser(
    folders: dict[str, str], tmp_path: Path
) -> None:
    """The codebooks are such that the nearest identifier is known; then it is taken."""
    index = tmp_path / "index.mine.json.gz"
    model = make_model(objective="sft")
    codes = model.item_tokens().numpy() - np.array(model.vocabulary.level_offsets)
    raw = 3 * codes + 1  # the tokeniser has codes that no item has, and counts them
    write_index(index, raw)
    codebooks = np.zeros((4, 40, 4), dtype=np.float32)
    for level in range(4):
        codebooks[level, :, level] = np.arange(40)
    Tokeniser(codebooks, "reassign").save(tokeniser_path(index))
    given = (folders["model0"], folders["data"], str(tmp_path / "state"))
    service = Service(*given, num_beams=8, index=str(index))
    first, second = free_identifiers()[:2]
    vector = tuple(3.0 * code + 1 for code in first)
    record = json.loads(service.change(AddVector("new", vector, "A new thing"), "me"))
    assert record["change"]["identifier"] == list(first)
    again = json.loads(service.change(AddVector("newer", vector), "me"))
    assert again["change"]["identifier"] == list(second)
    assert everything(service) == {*range(200), "new", "newer"}
    assert everything(Service(*given, num_beams=8)) == {*range(200), "new", "newer"}
    for wrong, message in (
        ((1.0,), r"vectors must be \[new items, 4\]"),
        ((1.0, np.nan, 1.0, 1.0), "finite numbers; got nan at place 1"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            service.change(AddVector("newest", wrong), "me")
        assert caught.value.field == "vector"
    with pytest.raises(RequestError, match="started without --index"):
        serve(folders, tmp_path / "other").change(AddVector("new", vector), "me")
    write_index(index, raw[::-1])
    with pytest.raises(DataError, match="must have the identifiers of the model"):
        Service(*given, index=str(index))


def test_an_item_with_a_text_is_coded_by_the_encoder_of_the_index(
    folders: dict[str, str], tmp_path: Path
) -> None:
    """The codebooks are such that the item gets the identifier of the text's own vector."""
    index, encoder = tmp_path / "index.mine.json.gz", write_encoder(tmp_path / "encoder")
    model = make_model(objective="sft")
    codes = model.item_tokens().numpy() - np.array(model.vocabulary.level_offsets)
    write_index(index, codes)
    wanted = free_identifiers()[0]
    (vector,) = encode_texts(["red nail polish"], str(encoder))
    codebooks = np.full((4, 40, 8), 9.0, dtype=np.float32)
    for level, code in enumerate(wanted):
        codebooks[level, code] = vector if level == 0 else 0.0
    Tokeniser(codebooks, "reassign").save(tokeniser_path(index))
    given = (folders["model0"], folders["data"], str(tmp_path / "state"))
    service = Service(*given, index=str(index), encoder=str(encoder))
    record = service.change(AddVector("new", service.vector("red nail polish")), "me")
    assert json.loads(record)["change"]["identifier"] == list(wanted)
    without = Service(*given, index=str(index))
    for refuses, text, message in (
        (service, "  ", "text must have a word"),
        (without, "pan", "started without --encoder"),
        (serve(folders, tmp_path / "other"), "pan", "started without --encoder"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            refuses.vector(text)
        assert caught.value.field == "text"
    with pytest.raises(ValueError, match="--encoder must come with --index"):
        Service(*given, encoder=str(encoder))
    other = write_encoder(tmp_path / "other_encoder", width=6)
    with pytest.raises(ValueError, match=r"must be that of .*vectors must be \[new items, 8\]"):
        Service(*given, index=str(index), encoder=str(other))


# ---- the journal ----


def test_replicas_and_a_restart_have_every_change(folders: dict[str, str], tmp_path: Path) -> None:
    one, other = serve(folders, tmp_path), serve(folders, tmp_path)
    first, second = free_identifiers()[:2]
    line = one.change(Add("new", first, "A new thing"), "10.0.0.1")
    assert everything(other) == {*range(200), "new"}
    other.change(Add("newer", second), "10.0.0.2")
    assert everything(one) == {*range(200), "new", "newer"}
    one.change(SwapModel(folders["model1"]), "10.0.0.1")
    again = serve(folders, tmp_path)
    for service in (other, again):
        assert answer(service, history=(3, 4)) == answer(one, history=(3, 4))
    record = json.loads(line)
    assert (record["version"], record["by"]) == (1, "10.0.0.1")
    assert record["change"]["identifier"] == list(first)
    assert (tmp_path / "changes.jsonl").read_text().splitlines()[0] == line


def test_a_line_cut_short_is_no_change_and_a_damaged_one_is_named(
    folders: dict[str, str], tmp_path: Path
) -> None:
    service = serve(folders, tmp_path)
    first, second = free_identifiers()[:2]
    service.change(Add("new", first), "me")
    path = tmp_path / "changes.jsonl"
    with path.open("ab") as handle:
        handle.write(b'{"version": 2, "chan')
    again = serve(folders, tmp_path)
    assert everything(again) == {*range(200), "new"}
    again.change(Add("newer", second), "me")
    assert everything(service) == {*range(200), "new", "newer"}
    lines = path.read_text().splitlines()
    path.write_text(lines[1] + "\n")
    with pytest.raises(DataError, match=r"line 1: the version must follow on the line before"):
        serve(folders, tmp_path)
    for old, new, message in (
        ('"add"', '"burn"', "line 1: kind must be one of add, remove"),
        (json.dumps(first), "5", "line 1: identifier: 5 is not what this field holds"),
        (json.dumps(first), '["0", 0, 0, 0]', "line 1: identifier must hold integers; got"),
        ('"new"', '"5"', "line 1 cannot be done: id must be new; item '5' is there already"),
    ):
        path.write_text(lines[0].replace(old, new) + "\n")
        with pytest.raises(DataError, match=message):
            serve(folders, tmp_path)


def test_a_line_that_one_replica_cannot_do_is_not_passed_over(
    folders: dict[str, str], tmp_path: Path
) -> None:
    service = serve(folders, tmp_path)
    first, second = free_identifiers()[:2]
    line = service.change(Add("new", first), "me")
    path = tmp_path / "changes.jsonl"
    foreign = line.replace('"version": 1', '"version": 2')  # the same item once more
    path.write_text(f"{line}\n{foreign}\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"changes.jsonl: line 2 cannot be done: id must be"):
            answer(service, history=(3,))
    with pytest.raises(DataError, match="line 2 cannot be done"):
        service.change(Add("newer", second), "me")
    path.write_text(f"{line}\n")  # mended by hand
    service.change(Add("newer", second), "me")
    assert everything(serve(folders, tmp_path)) == {*range(200), "new", "newer"}


def test_changes_and_requests_at_once_lose_nothing(folders: dict[str, str], tmp_path: Path) -> None:
    """Two replicas, each with a writer, while a reader never sees half a change."""
    services = [serve(folders, tmp_path), serve(folders, tmp_path)]
    codes = free_identifiers()[:8]
    seen: list[int] = []

    def write(which: int) -> None:
        for number in range(which, len(codes), 2):
            services[which].change(Add(f"n{number}", codes[number]), f"writer {which}")

    writers = [threading.Thread(target=write, args=(which,)) for which in (0, 1)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = answer(services[0], history=(), k=300)
        assert len(found["items"]) == 200 + found["version"]
        seen.append(found["version"])
    for writer in writers:
        writer.join()
    assert seen == sorted(seen)
    for service in services:
        assert everything(service) == {*range(200), *(f"n{number}" for number in range(8))}
