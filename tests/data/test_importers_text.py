"""The one rule for keys, the one for numbers, and the one for texts, that all importers share."""

from __future__ import annotations

import decimal
import math
import time

import pytest

from gflowgr.data.importers.text import clean_text, read_key, read_rating, read_time, text_of


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (" 10 ", "10"),
        ("\ufeff007\u00a0", "007"),  # leading zeros belong to the key
        (10, "10"),
        (10.0, "10"),  # what pandas makes of 10 in a column with a gap
        (decimal.Decimal("10.00"), "10"),
        ("Cafe\u0301", "Café"),
        ("\ud83d\ude00", "😀"),  # two halves, as Python 2 wrote them
    ],
)
def test_keys_are_spelled_one_way(value: object, key: str) -> None:
    assert read_key(value) == key


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty"),
        ("  ", "empty"),
        (math.nan, "empty"),
        (True, "the bool True"),
        (1.5, "the fraction 1.5"),
        (math.inf, "the fraction inf"),
        (2.0**60, "too large to have kept its last digits"),
        (10**5000, "more than 128 bits"),
        ("9" * 5000, "longer than 1,000 characters"),
        ("a\ud83d", "lone surrogate"),
        ([1], "a list"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 50 else "value",
)
def test_what_is_no_key_says_why(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_key(value)


def test_a_value_that_is_no_rating_is_refused() -> None:
    for value in ("1_0", "9" * 5000, 10**400, 1e39, math.nan, True, "", "١", None):
        with pytest.raises(ValueError, match="not a number"):
            read_rating(value)


def test_times_are_whole_numbers_of_64_bits() -> None:
    assert read_time("1546387200123456789") == 1546387200123456789
    assert read_time(" 881250949.0 ") == 881250949
    assert read_time("8.8e8") == 880_000_000
    for value in ("1_0", "9" * 5000, 2**63, math.inf, True, "now"):
        with pytest.raises(ValueError, match=r"not a number|out of range"):
            read_time(value)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Red  &amp; blue\nkite", "Red & blue kite"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("H<sub>2</sub>O<br/>still", "H2O still"),
        ("<script>alert(1)</script>Toy", "Toy"),
        ("&lt;script&gt;alert(1)&lt;/script&gt;Toy", "Toy"),
        ("<scr<b>ipt>x</script>Toy", "x Toy"),
        ("kite <img src=x onerror=alert(1)> <x-y onclick=z>", "kite"),
        ("cut <a href='http", "cut"),
        ("a<!-- b --> c", "a c"),
        ("var aPageStart = (new Date()).getTime();", ""),
        # What only looks like a tag stays.
        ("I <3 U, <Parasite>, 1 < 2 > 0", "I <3 U, <Parasite>, 1 < 2 > 0"),
        ("a\x00b\u202ec\ufeff", "abc"),
        ("cut \ud83d", "cut \ufffd"),
        ("\ud83d\ude00", "😀"),
    ],
)
def test_texts_lose_entities_tags_and_broken_characters(raw: str, clean: str) -> None:
    assert clean_text(raw) == clean


def test_hostile_texts_take_no_longer_than_their_length() -> None:
    begin = time.process_time()
    for part in ("<script>", "<!--", "<a ", "&amp;", "<a b='", "<style "):
        clean_text(part * 20_000)
    assert time.process_time() - begin < 10  # a quadratic search would take minutes


def test_entries_of_any_type_become_text() -> None:
    assert text_of(["a &amp; b", None, "c"]) == "a & b | c"
    assert text_of({"size": 3, "none": None}) == "size: 3"
    assert [text_of(value) for value in (None, math.nan, 2.5, b"k", 10**5000)] == [
        "",
        "",
        "2.5",
        "k",
        "",
    ]
