"""The rules all importers share: duplicates, k-core, order, numbering, bad lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.data import Dataset, ImportReport
from gflowgr.data.importers.build import Events, build, k_core
from gflowgr.data.importers.lines import MAX_LINE, BadLines, as_paths, read_lines
from gflowgr.errors import DataError

Event = tuple[int, int, int]


def make(
    events: list[Event], *, core: int = 1, duplicates: str = "all"
) -> tuple[Dataset, ImportReport]:
    table, lines = Events(), BadLines()
    for user, item, time in events:
        table.add(f"u{user}", f"i{item}", time)
        lines.lines += 1
    return build(
        table,
        lines,
        source="made",
        name="made",
        core=core,
        duplicates=duplicates,
        max_bad_fraction=0.0,
        describe=lambda keys: [{"title": key} for key in keys],
    )


def naive(events: list[Event], core: int, duplicates: str) -> dict[int, list[int]]:
    """The rules again, with sorted lists and sets."""
    events = list(dict.fromkeys(events))  # exact duplicates: the first line stays
    events.sort(key=lambda e: e[2])  # stable
    if duplicates != "all":
        step = 1 if duplicates == "first" else -1
        chosen = {}
        for event in events[::step]:
            chosen.setdefault(event[:2], event)
        events = [e for e in events if e in set(chosen.values())]
    while True:
        users = Counter(e[0] for e in events)
        items = Counter(e[1] for e in events)
        left = [e for e in events if users[e[0]] >= core and items[e[1]] >= core]
        if len(left) == len(events):
            break
        events = left
    sequences: dict[int, list[int]] = {}
    for user, item, _ in events:
        sequences.setdefault(user, []).append(item)
    return sequences


small = st.integers(0, 4)
events_lists = st.lists(st.tuples(small, small, small), min_size=1, max_size=40)


@given(events_lists, st.integers(1, 4), st.sampled_from(["all", "first", "last"]))
def test_an_import_equals_the_rules(events: list[Event], core: int, duplicates: str) -> None:
    expected = naive(events, core, duplicates)
    if not expected:
        with pytest.raises(DataError, match=f"no users and items with at least {core} events"):
            make(events, core=core, duplicates=duplicates)
        return
    data, report = make(events, core=core, duplicates=duplicates)
    first_seen = list(dict.fromkeys(e[0] for e in events))
    users = [u for u in first_seen if u in expected]
    assert data.user_ids == [f"u{u}" for u in users]
    assert data.texts is not None
    titles = [[data.texts[i]["title"] for i in row] for row in data.sequences]
    assert titles == [[f"i{i}" for i in expected[u]] for u in users]
    # Items are numbered by first appearance, user by user.
    assert list(dict.fromkeys(data.sequences.values.tolist())) == list(range(data.num_items))
    kept = data.num_interactions
    assert report.kept_events == kept
    assert report.events == len(events)
    assert report.exact_duplicates == len(events) - len(set(events))


@given(events_lists, st.integers(1, 5))
def test_k_core_is_the_largest_set_that_satisfies_it(events: list[Event], k: int) -> None:
    user, item = np.array([e[0] for e in events]), np.array([e[1] for e in events])
    keep, rounds = k_core(user, item, k)
    assert rounds >= 1
    for side in (user, item):
        counts = np.bincount(side[keep], minlength=5)
        assert (counts[side[keep]] >= k).all()
    # Naively, one offending event at a time, in another order.
    left = list(range(len(events)))
    while True:
        users, items = Counter(user[left].tolist()), Counter(item[left].tolist())
        bad = [e for e in left if users[user[e]] < k or items[item[e]] < k]
        if not bad:
            break
        left.remove(bad[-1])
    assert np.flatnonzero(keep).tolist() == left


def test_ties_in_time_keep_the_order_of_the_file() -> None:
    data, _ = make([(0, 3, 7), (0, 1, 7), (1, 1, 1), (0, 2, 5)])
    assert data.texts is not None
    assert [data.texts[i]["title"] for i in data.sequences.row(0)] == ["i2", "i3", "i1"]
    assert data.times is not None
    assert data.times.tolist() == [5, 7, 7, 1]


def test_first_and_last_of_repeats() -> None:
    events = [(0, 1, 5), (0, 2, 6), (0, 1, 7), (0, 1, 7)]
    got = {}
    for rule in ("all", "first", "last"):
        data, report = make(events, duplicates=rule)
        assert data.texts is not None
        got[rule] = [data.texts[i]["title"] for i in data.sequences.row(0)]
        assert report.exact_duplicates == 1
        assert report.repeats == (0 if rule == "all" else 1)
    assert got == {"all": ["i1", "i2", "i1"], "first": ["i1", "i2"], "last": ["i2", "i1"]}


def test_the_report_reads_well() -> None:
    _, report = make([(0, 1, 1), (0, 2, 2), (0, 2, 2)])
    text = str(report)
    assert "made: 3 lines, 0 bad" in text
    assert "dropped: 1 exact duplicates, 0 repeats" in text
    assert "1-core after 1 rounds: 1 users, 2 items, 2 events" in text


# ---- lines ----


def zipped(*members: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for number, content in enumerate(members):
            archive.writestr(f"{number}.csv", content)
    return target.getvalue()


@pytest.mark.parametrize("zipped", [False, True])
def test_lines_are_numbered_and_blank_ones_skipped(tmp_path: Path, zipped: bool) -> None:
    content = b"\xef\xbb\xbfone\n\n\xff\xfe\nfour"
    path = tmp_path / "lines"  # gzip is told by the content, not by the name
    path.write_bytes(gzip.compress(content) if zipped else content)
    bad = BadLines()
    assert list(read_lines([path], bad, progress=False)) == [
        ("lines:1", "one\n"),
        ("lines:4", "four"),
    ]
    assert (bad.lines, bad.bad) == (3, 1)
    assert bad.examples == ["lines:3: not utf-8 text, byte 0"]


def test_a_truncated_gz_names_the_last_good_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = "\n".join(rng.bytes(30).hex() for _ in range(100_000)).encode()
    whole = gzip.compress(lines)
    path = tmp_path / "reviews.json.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"reviews\.json\.gz: the gzip .* truncated .after line \d"):
        list(read_lines([path], BadLines(), progress=False))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "lines"
    path.write_bytes("é\nb\n".encode(encoding))
    assert [line for _, line in read_lines([path], BadLines(), progress=False)] == ["é\n", "b\n"]


def test_a_line_without_end_is_bad_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"a\n" + b"x" * (MAX_LINE + 10) + b"\nb\n")
    bad = BadLines()
    assert [line for _, line in read_lines([path], bad, progress=False)] == ["a\n", "b\n"]
    assert bad.examples == [f"lines:2: longer than {MAX_LINE:,} bytes"]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gflowgr.data.importers.lines._FREE_GROWTH", 1 << 16)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(4 << 20)))
    with pytest.raises(DataError, match=r"bomb\.gz: the packed file grows beyond"):
        list(read_lines([path], BadLines(), progress=False))


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, zipped])
def test_other_packings_are_told_by_content(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "lines"
    path.write_bytes(pack(b"one\ntwo\n"))
    lines = [line for _, line in read_lines([path], BadLines(), progress=False)]
    assert lines == ["one\n", "two\n"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"lines: the \w+ file is (truncated|damaged)"):
        list(read_lines([path], BadLines(), progress=False))


def test_archives_of_several_files_and_unknown_packings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(zipped(b"one", b"two"))
    with pytest.raises(DataError, match=r"must hold exactly one file .* got 2 \(0\.csv, 1\.csv\)"):
        list(read_lines([path], BadLines(), progress=False))
    path.write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(DataError, match="packed with Zstandard; unpack it first"):
        list(read_lines([path], BadLines(), progress=False))


def test_too_many_bad_lines_stop_the_import_with_examples() -> None:
    bad = BadLines()
    bad.lines = 1000
    for number in range(10):
        bad.add(f"f:{number}", "no item", "{...}")
    bad.check("f", 0.01)
    bad.add("f:10", "no item")
    with pytest.raises(
        DataError, match=r"11 of 1,000 lines are bad, more than .* = 0.01"
    ) as caught:
        bad.check("f", 0.01)
    assert "f:0: no item: '{...}'" in str(caught.value)
    assert "f:5" not in str(caught.value)  # five examples are enough


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing\.json"):
        as_paths(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="no files given"):
        as_paths([])
