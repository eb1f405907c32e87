"""Splits against naive loops; planted leaks are found."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.data import (
    Dataset,
    LeaveOneOut,
    Ragged,
    Split,
    TemporalSplit,
    TrainingExamples,
    make_split,
)
from gflowgr.errors import DataError
from gflowgr.files import read_json, write_json

NUM_ITEMS = 7


def make(sequences: list[list[int]], **more: object) -> Dataset:
    return Dataset(
        name="test",
        user_ids=[str(u) for u in range(len(sequences))],
        sequences=Ragged.from_lists(sequences),
        num_items=NUM_ITEMS,
        **more,  # type: ignore[arg-type]
    )


item = st.integers(0, NUM_ITEMS - 1)
many_sequences = st.lists(st.lists(item, min_size=1, max_size=9), min_size=1, max_size=6)


@given(many_sequences, st.integers(1, 4), st.data())
def test_split_equals_the_definition(
    sequences: list[list[int]], max_history: int, draw: st.DataObject
) -> None:
    carts = [draw.draw(st.lists(item, max_size=4)) for _ in sequences]
    data = make(sequences, side={"cart": Ragged.from_lists(carts)})
    split = LeaveOneOut(data, max_history=max_history)

    train = [s[:-2] if len(s) >= 3 else s for s in sequences]
    evaluated = [u for u, s in enumerate(sequences) if len(s) >= 3]
    assert [row.tolist() for row in split.train_sequences] == train
    for which, back in (("valid", 2), ("test", 1)):
        assert split.eval_users(which).tolist() == evaluated
        assert split.targets(which).tolist() == [sequences[u][-back] for u in evaluated]
        histories = [sequences[u][:-back][-max_history:] for u in evaluated]
        assert [h.tolist() for h in split.histories(which)] == histories
        assert all(h.dtype == np.int64 for h in split.histories(which))

    expected = [
        {"user": u, "history": s[max(0, t - max_history) : t], "target": s[t], "behaviour": -1}
        for u, s in enumerate(train)
        for t in range(1, len(s))
    ]
    got = [split.train[i] for i in range(len(split.train))]
    assert [e.pop("example") for e in got] == list(range(len(expected)))
    assert [{**e, "history": e["history"].tolist()} for e in got] == expected
    assert split.train.lengths.tolist() == [len(e["history"]) for e in expected]
    assert split.train.targets.tolist() == [e["target"] for e in expected]
    assert split.train.users.tolist() == [e["user"] for e in expected]

    counts = Counter(i for s in train for i in s)
    assert split.item_counts.tolist() == [counts[i] for i in range(NUM_ITEMS)]
    for user, sequence in enumerate(sequences):
        held = set(sequence[-2:]) if len(sequence) >= 3 else set()
        cart = [i for i in carts[user] if i not in held]
        assert data.side["cart"].row(user).tolist() == cart
        assert split.known.row(user).tolist() == sorted({*sequence, *cart})


# ---- targets of one behaviour, and targets of a period ----


def check_by_hand(
    split: Split, sequences: list[list[int]], train_end: list[int], at: dict[str, dict[int, int]]
) -> None:
    """``at``: by part, user to the place of the target in the sequence."""
    assert [row.tolist() for row in split.train_sequences] == [
        s[:end] for s, end in zip(sequences, train_end, strict=True)
    ]
    assert [row.tolist() for row in split.held_out] == [
        s[end:] for s, end in zip(sequences, train_end, strict=True)
    ]
    for which, places in at.items():
        assert split.eval_users(which).tolist() == sorted(places)
        assert split.targets(which).tolist() == [sequences[u][places[u]] for u in sorted(places)]
        histories = [sequences[u][: places[u]][-2:] for u in sorted(places)]
        assert [h.tolist() for h in split.histories(which)] == histories
        assert split.past_lengths(which).tolist() == [places[u] for u in sorted(places)]


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Items, behaviour codes and times of some users."""
    sequences = draw(many_sequences)
    kinds = [draw(st.lists(st.integers(0, 1), min_size=len(s), max_size=len(s))) for s in sequences]
    times = [
        sorted(draw(st.lists(st.integers(0, 9), min_size=len(s), max_size=len(s))))
        for s in sequences
    ]
    return sequences, kinds, times


def make_log(sequences: list[list[int]], kinds: list[list[int]], times: list[list[int]]) -> Dataset:
    return make(
        sequences,
        behaviours=np.concatenate(kinds).astype(np.int8),
        behaviour_names=("buy", "view"),
        times=np.concatenate(times),
    )


@given(logs())
def test_targets_of_one_behaviour_equal_the_definition(
    log: tuple[list[list[int]], list[list[int]], list[list[int]]],
) -> None:
    sequences, kinds, _ = log
    at: dict[str, dict[int, int]] = {"valid": {}, "test": {}}
    for user, kind in enumerate(kinds):
        bought = [n for n, code in enumerate(kind) if code == 0]
        if len(bought) >= 2 and bought[-2] > 0:
            at["valid"][user], at["test"][user] = bought[-2:]
    ends = [at["valid"].get(user, len(s)) for user, s in enumerate(sequences)]
    split = LeaveOneOut(make_log(*log), max_history=2, target_behaviour="buy")
    check_by_hand(split, sequences, ends, at)
    assert "last item of behaviour 'buy'" in split.target_rule("test")


@given(logs(), st.sampled_from([None, "buy"]), st.sampled_from([0.1, 0.3]))
def test_a_temporal_split_equals_the_definition(
    log: tuple[list[list[int]], list[list[int]], list[list[int]]],
    behaviour: str | None,
    share: float,
) -> None:
    sequences, kinds, times = log
    ordered = sorted(t for row in times for t in row)
    first, second = (ordered[int((1 - parts * share) * len(ordered))] for parts in (2, 1))
    if not ordered[0] < first < second:
        with pytest.raises(DataError, match="needs events at three different times"):
            TemporalSplit(make_log(*log), held_out_share=share)
        return
    at: dict[str, dict[int, int]] = {"valid": {}, "test": {}}
    for user, row in enumerate(times):
        for place in range(len(row) - 1, 0, -1):  # the first one is written last
            if behaviour is None or kinds[user][place] == 0:
                if row[place] >= second:
                    at["test"][user] = place
                elif row[place] >= first:
                    at["valid"][user] = place
    split = TemporalSplit(
        make_log(*log), max_history=2, held_out_share=share, target_behaviour=behaviour
    )
    check_by_hand(split, sequences, [sum(t < first for t in row) for row in times], at)
    assert split.report()["users evaluated"] == len(at["test"])
    assert split.target_rule("test").endswith(f"from {second}")


def test_splits_that_the_data_do_not_allow_are_refused() -> None:
    events = {"behaviours": np.zeros(4, np.int8), "behaviour_names": ("view",)}
    with pytest.raises(ValueError, match=r"target_behaviour must be .* has 'view'; got 'buy'"):
        LeaveOneOut(make([[0, 1, 2, 3]], **events), target_behaviour="buy")
    with pytest.raises(ValueError, match=r"target_behaviour must be .* has none; got 'buy'"):
        LeaveOneOut(make([[0, 1, 2, 3]]), target_behaviour="buy")
    with pytest.raises(DataError, match="needs times; the data have none"):
        TemporalSplit(make([[0, 1, 2, 3]]))
    side = {"side": {"cart": Ragged.from_lists([[5]])}}
    with pytest.raises(DataError, match="side behaviours have no times"):
        TemporalSplit(make([[0, 1, 2, 3]], times=np.arange(4), **side))
    with pytest.raises(DataError, match="side behaviours have no times"):
        LeaveOneOut(make([[0, 1, 2, 3]], **events, **side), target_behaviour="view")
    with pytest.raises(ValueError, match=r"held_out_share must be in \(0, 0.5\); got 0.5"):
        TemporalSplit(make([[0, 1, 2, 3]], times=np.arange(4)), held_out_share=0.5)
    with pytest.raises(ValueError, match="split must be 'leave_one_out' or 'temporal'; got 'x'"):
        make_split(make([[0, 1, 2, 3]]), "x")


def test_unix_times_are_shown_as_dates() -> None:
    times = np.array([1_400_000_000, 1_400_000_001, 1_400_000_002, 1_400_086_400])
    split = TemporalSplit(make([[0, 1, 2, 3]], times=times), held_out_share=0.3)
    assert "2014-05-13 16:53:22 UTC" in split.target_rule("test")


def test_the_behaviour_of_an_example_is_that_of_its_target() -> None:
    kinds = np.array([0, 1, 0, 1, 1, 1, 0], dtype=np.int8)
    data = make([[0, 1, 2, 3, 4], [5, 6]], behaviours=kinds, behaviour_names=("buy", "view"))
    split = LeaveOneOut(data)
    assert [split.train[i]["behaviour"] for i in range(len(split.train))] == [1, 0, 0]


UNUSED = "ratings not used as behaviours (more than 127 distinct, or negative)"


def test_stars_become_behaviours_named_after_their_value() -> None:
    stars = np.array([5, 3.5, 0.1, -0.0, 1, 5, 1_000_000], dtype=np.float32)
    data = make([[0, 1, 2, 3, 4], [5, 6]], ratings=stars)
    split = LeaveOneOut(data)
    names = split.dataset.behaviour_names
    assert names == ("0", "0.1", "1", "3.5", "5", "1000000")
    # The targets of the training part: items 1 and 2 of user 0, item 6 of user 1.
    behaviours = [split.train[i]["behaviour"] for i in range(len(split.train))]
    assert [names[code] for code in behaviours] == ["3.5", "0.1", "1000000"]
    assert split.report()[UNUSED] == 0
    assert data.behaviours is None  # the data set given stays as it is


def test_behaviours_go_before_stars() -> None:
    stars, kinds = np.array([1, 2, 3], dtype=np.float32), np.zeros(3, dtype=np.int8)
    data = make([[0, 1, 2]], ratings=stars, behaviours=kinds, behaviour_names=("buy",))
    split = LeaveOneOut(data)
    assert split.dataset is data
    assert split.report()[UNUSED] == 0


@pytest.mark.parametrize(
    ("ratings", "unused"),
    [(np.arange(127), 0), (np.arange(128), 128), (np.arange(4) - 1, 4)],
    ids=["127 stars", "128 distinct", "negative"],
)
def test_ratings_that_are_no_stars_are_left_out_and_counted(
    ratings: np.ndarray, unused: int
) -> None:
    sequence = [n % NUM_ITEMS for n in range(len(ratings))]
    split = LeaveOneOut(make([sequence], ratings=ratings.astype(np.float32)))
    assert split.report()[UNUSED] == unused
    assert (split.dataset.behaviours is None) == (unused > 0)
    assert (split.train[0]["behaviour"] == -1) == (unused > 0)


def test_repeats_are_reported_and_are_no_leak() -> None:
    # User 0's valid item 1 and test item 0 occur before; user 1's test repeats their valid item;
    # user 2 has nothing held out.
    report = LeaveOneOut(make([[0, 1, 2, 1, 0], [3, 4, 4], [5, 5]])).report()
    assert report["users whose valid item is also in their training part (repeat)"] == 1
    assert report["users whose test item is also in their history (repeat)"] == 2
    assert report["users that only train (fewer than 3 events)"] == 1
    assert report["users evaluated"] == 2
    assert report["training examples"] == 3
    assert report["items seen only as a target"] == 1  # item 4
    assert len(report["checks passed"]) == 4  # type: ignore[arg-type]


def test_a_store_made_from_whole_sequences_is_a_leak() -> None:
    data = make([[0, 1, 2, 3], [4, 5, 6]])
    split = LeaveOneOut(data)
    split.check_examples(split.train)
    leaky = TrainingExamples.build(data.sequences, 20)
    with pytest.raises(DataError, match="7 events, but the training part of test has 3"):
        split.check_examples(leaky)


def test_a_store_of_other_data_is_refused() -> None:
    split = LeaveOneOut(make([[0, 1, 2, 3], [4, 5, 6]]))
    other = LeaveOneOut(make([[0, 2, 1, 3], [4, 5, 6]]))
    with pytest.raises(DataError, match="event 1 is item 2, the training part of test has 1"):
        split.check_examples(other.train)


@pytest.mark.parametrize("bounds", [(0, 2, 0), (1, 2, 0), (2, 3, 0), (0, 1, 2), (1, 1, 0)])
def test_an_example_that_leaves_its_users_part_is_a_leak(bounds: tuple[int, int, int]) -> None:
    split = LeaveOneOut(make([[0, 1, 2, 3], [4, 5, 6, 0]]))
    broken = TrainingExamples(split.train.items, np.array([bounds], dtype=np.int32), 20)
    with pytest.raises(DataError, match="example 0 spans"):
        split.check_examples(broken)


def test_a_side_pair_of_a_held_out_item_is_a_leak() -> None:
    data = make([[0, 1, 2, 3]], side={"cart": Ragged.from_lists([[5]])})
    # The constructor cleans side lists, so a leak has to be smuggled in behind its back.
    data.side["cart"] = Ragged.from_lists([[5, 3]])
    with pytest.raises(DataError, match="side cart of user 0 holds their held-out item 3"):
        LeaveOneOut(data)


def test_times_that_go_back_are_refused() -> None:
    with pytest.raises(DataError, match="user '1': time 1 follows 2"):
        make([[0], [1, 2, 3]], times=np.array([9, 1, 2, 1]))


def test_wrong_arguments() -> None:
    split = LeaveOneOut(make([[0, 1, 2]]))
    for call in (split.targets, split.histories, split.eval_users):
        with pytest.raises(ValueError, match="which must be 'valid' or 'test'; got 'train'"):
            call("train")
    with pytest.raises(ValueError, match="max_history must be at least 1; got 0"):
        LeaveOneOut(split.dataset, max_history=0)


# ---- stored examples ----


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    data = make(
        [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4]],
        behaviours=np.zeros(10, dtype=np.int8),
        behaviour_names=("buy",),
    )
    LeaveOneOut(data, max_history=2).train.save(tmp_path / "examples")
    return tmp_path / "examples"


def test_saved_examples_are_mapped_not_read(stored: Path) -> None:
    examples = TrainingExamples.load(stored)
    assert isinstance(examples.items, np.memmap)
    assert isinstance(examples.bounds, np.memmap)
    assert [examples[i]["target"] for i in range(len(examples))] == [1, 2, 3, 2]
    assert examples[2]["history"].tolist() == [1, 2]
    assert examples[-1]["user"] == 1
    assert examples[0]["behaviour"] == 0
    with pytest.raises(IndexError, match="example 4 of 4"):
        examples[4]


def test_a_worker_process_gets_the_folder_not_the_data(stored: Path) -> None:
    examples = TrainingExamples.load(stored)
    assert len(pickle.dumps(examples)) < 300 + len(str(stored))
    again = pickle.loads(pickle.dumps(examples))
    assert isinstance(again.items, np.memmap)
    assert again[3]["history"].tolist() == examples[3]["history"].tolist()


def test_examples_in_memory_can_be_pickled() -> None:
    examples = LeaveOneOut(make([[0, 1, 2, 3]])).train
    assert pickle.loads(pickle.dumps(examples))[0]["target"] == 1


def test_twelve_bytes_per_example() -> None:
    split = LeaveOneOut(make([[i % NUM_ITEMS for i in range(1000)]]))
    assert split.train.nbytes == 12 * len(split.train) + 4 * len(split.train_sequences.values)


def test_an_empty_store(tmp_path: Path) -> None:
    examples = LeaveOneOut(make([[0, 1, 2]])).train
    assert len(examples) == 0
    examples.save(tmp_path)
    assert len(TrainingExamples.load(tmp_path)) == 0


def test_a_truncated_store_is_named(stored: Path) -> None:
    whole = (stored / "bounds.npy").read_bytes()
    (stored / "bounds.npy").write_bytes(whole[:-4])
    with pytest.raises(DataError, match=r"bounds\.npy: not a readable \.npy file"):
        TrainingExamples.load(stored)


def test_a_store_of_another_size_is_named(stored: Path) -> None:
    np.save(stored / "items.npy", np.zeros(3, dtype=np.int32))
    with pytest.raises(DataError, match=r"items\.npy: holds <i4 \(3,\), .* says <i4 \(6,\)"):
        TrainingExamples.load(stored)


def test_a_store_with_a_missing_file_is_named(stored: Path) -> None:
    (stored / "behaviours.npy").unlink()
    with pytest.raises(DataError, match=r"behaviours\.npy: missing"):
        TrainingExamples.load(stored)


def test_a_store_with_bounds_outside_is_named(stored: Path) -> None:
    bounds = np.load(stored / "bounds.npy")
    bounds[1, 1] = 99
    np.save(stored / "bounds.npy", bounds)
    with pytest.raises(DataError, match=r"example 1 has .begin, end, user. = \(0, 99, 0\)"):
        TrainingExamples.load(stored)


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "other"}, {"arrays": {}}])
def test_a_store_of_another_format_is_named(stored: Path, change: dict[str, object]) -> None:
    meta = read_json(stored / "examples.json")
    write_json(stored / "examples.json", {**meta, **change})
    with pytest.raises(DataError, match=r"examples\.json"):
        TrainingExamples.load(stored)


def test_an_interrupted_save_does_not_load(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gflowgr.data.examples as module

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    examples = TrainingExamples.load(stored)
    in_memory = TrainingExamples(np.array(examples.items), np.array(examples.bounds), 2)
    monkeypatch.setattr(module, "save_npy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        in_memory.save(stored)
    with pytest.raises(FileNotFoundError, match=r"examples\.json"):
        TrainingExamples.load(stored)


def test_replace_keeps_the_count_of_dropped_side_pairs() -> None:
    data = make([[0, 1, 2, 3]], side={"cart": Ragged.from_lists([[5, 3, 2]])})
    assert data.side_dropped == {"cart": 2}
    assert replace(data, name="again").side_dropped == {"cart": 2}
    assert LeaveOneOut(data).report()["side pairs dropped as held out"] == {"cart": 2}
