"""The rules, shared by every importer, for keys, numbers and texts of raw files."""

from __future__ import annotations

import datetime
import decimal
import functools
import html
import math
import re
import unicodedata

# What surrounds a key without being part of it: white space, control characters, zero-width
# space, byte order mark.
_AROUND = "".join(chr(c) for c in range(33)) + "\x7f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_AROUND += "".join(chr(c) for c in range(0x2000, 0x200C)) + "\ufeff"
_MAX_KEY = 1000
# From here on float64 does not tell neighbouring integers apart.
_MAX_EXACT = 1 << 53
_MAX_FLOAT32 = 3.4028234663852886e38
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}(?:\.0*)?\Z")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?\Z")


def read_key(value: object) -> str:
    """A user's, item's or behaviour's key as every importer spells it.

    Texts lose surrounding white space and are brought to Unicode's composed form (NFC); whole
    numbers are written without a fraction (10.0, what pandas makes of 10 in a column with a gap, is
    "10"). Leading zeros of texts stay.

    Raises:
        ValueError: empty, NaN, a bool, a fraction, a float beyond 2**53 (its last digits are lost),
            longer than 1000 characters, broken text, or of another type; says which.
    """
    if isinstance(value, str):
        # The fast path for nearly all keys of a long file; the code below handles the others.
        if value.isalnum() and value.isascii() and len(value) <= _MAX_KEY:
            return value
        key = value.strip(_AROUND)
        if not key.isascii():
            key = _join_surrogates(key)
            if any("\ud800" <= c <= "\udfff" for c in key):
                raise ValueError("half a character (a lone surrogate)")
            key = unicodedata.normalize("NFC", key)
    elif value is None or (isinstance(value, float) and math.isnan(value)):
        key = ""
    elif isinstance(value, bool):
        raise ValueError(f"the bool {value}")
    elif isinstance(value, int):
        if abs(value) >= 1 << 128:  # str() refuses thousands of digits
            raise ValueError("an integer of more than 128 bits")
        key = str(value)
    elif isinstance(value, float | decimal.Decimal):
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"the fraction {value}")
        if isinstance(value, float) and abs(value) > _MAX_EXACT:
            raise ValueError(f"{value:.17g}, a float too large to have kept its last digits")
        key = str(int(value))
    else:
        raise ValueError(f"a {type(value).__name__}")
    if not key:
        raise ValueError("empty")
    if len(key) > _MAX_KEY:
        raise ValueError(f"longer than {_MAX_KEY:,} characters")
    return key


def named_key(value: object, name: str) -> str:
    """:func:`read_key`, whose complaint begins with the field's name."""
    try:
        return read_key(value)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None


def read_rating(value: object) -> float:
    """A number (or its text) that float32 can hold.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        number = _read_number(value) if len(value) < 100 else math.nan
    elif isinstance(value, bool) or not isinstance(value, int | float):
        number = math.nan
    else:
        # An integer of thousands of digits has no float.
        number = float(value) if abs(value) <= _MAX_FLOAT32 else math.inf
    if not abs(number) <= _MAX_FLOAT32:
        raise ValueError(f"{value!r:.40}, not a number" + ("" if number != number else " in range"))
    return number


@functools.lru_cache(maxsize=1024)  # ratings are few
def _read_number(text: str) -> float:
    text = text.strip(_AROUND)
    return float(text) if _NUMBER.match(text) else math.nan


def read_time(value: object) -> int:
    """A whole number (or its text) that 64 bits can hold; fractions of a unit are cut.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        if len(value) < 19 and value.isdecimal() and value.isascii():
            return int(value)
        text = value.strip(_AROUND)
        whole = text.split(".")[0]
        number: float = int(whole) if _INTEGER.match(text) else math.floor(read_rating(text))
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        number = math.floor(read_rating(value))
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("a time out of range")
    return int(number)


# ---- texts of items ----

_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9:-]*)((?:[\s/][^<>]*)?)(?:>|\Z)|<!--|<![a-zA-Z][^<>]*>")
_INLINE = frozenset(
    re.findall(
        r"\w+",
        """
        a abbr b bdi bdo big cite code del dfn em font i ins kbd mark q s samp small span strike
        strong sub sup tt u var wbr
        """,
    )
)
_BLOCKS = frozenset(
    re.findall(
        r"\w+",
        """
        address article aside audio base blink blockquote body br button canvas caption center col
        colgroup dd details dir div dl dt embed fieldset figcaption figure footer form frame
        frameset h1 h2 h3 h4 h5 h6 head header hr html iframe img input label legend li link main
        map marquee menu meta nav noscript object ol optgroup option p param picture pre section
        select source summary svg math table tbody td template textarea tfoot th thead title tr
        track ul video
        """,
    )
)
_WITH_CONTENT = frozenset(("script", "style"))
# What Amazon's own pages left in titles where the crawler caught their script.
_PAGE_SCRIPT = re.compile(r"\bvar aPageStart\b|\bgetTime\(\)")
_INVISIBLE = dict.fromkeys(
    [c for c in range(32) if chr(c) not in "\t\n\v\f\r"]
    + list(range(0x7F, 0xA0))
    + list(range(0x202A, 0x202F))
    + list(range(0x2066, 0x206A))
    + [0x200B, 0xFEFF]
)


def clean_text(text: str) -> str:
    """One line of plain text for people and for text encoders.

    HTML entities become characters; HTML's own tags, comments, scripts and styles are removed
    (other text in angle brackets stays); so are control characters and those that turn the
    direction of writing. A lone surrogate becomes U+FFFD, white space single blanks.
    """
    if not text.isascii():
        text = _join_surrogates(text)
        text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    # Twice escaped text is common ("&amp;lt;b&amp;gt;"); what appears may be a tag again.
    for _ in range(4):
        before = text
        if "&" in text:
            text = html.unescape(text)
        if "<" in text:
            text = _without_tags(text)
        if text == before:
            break
    if _PAGE_SCRIPT.search(text):
        return ""
    if not (text.isascii() and text.isprintable()):
        text = text.translate(_INVISIBLE)
    return " ".join(text.split())


def text_of(value: object) -> str:
    """Any entry of a table as clean text: lists are joined by " | ", nothing and NaN are ""."""
    if isinstance(value, str):
        return clean_text(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple):
        return " | ".join(filter(None, (text_of(entry) for entry in value)))
    if isinstance(value, dict):
        named = ((key, text_of(entry)) for key, entry in value.items())
        return " | ".join(f"{clean_text(str(key))}: {text}" for key, text in named if text)
    if isinstance(value, bytes):
        return clean_text(value.decode("utf-8", "replace"))
    if isinstance(value, int):
        # str() refuses integers of thousands of digits.
        return str(value) if abs(value) < 1 << 128 else ""
    if isinstance(value, float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    return clean_text(str(value))


def _join_surrogates(text: str) -> str:
    """Pairs of surrogates, which Python 2 wrote for one character, become that character."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _without_tags(text: str) -> str:
    """``text`` without HTML's tags, comments, scripts and styles, in one pass."""
    kept, at = [], 0
    lower = text.lower() if len(text.lower()) == len(text) else text
    missing: set[str] = set()

    def after(mark: str) -> int:
        """Where what ``mark`` ends is over; without a mark only the opening itself goes."""
        found = -1 if mark in missing else lower.find(mark, at)
        if found < 0:
            missing.add(mark)  # so that many openings do not search to the end each
            return at
        return found + len(mark) if mark == "-->" else found

    for match in _TAG.finditer(text):
        if match.start() < at:  # within a script or a comment
            continue
        name = (match[2] or "").lower()
        attributes = "=" in (match[3] or "")
        if match[2] and not (
            name in _INLINE or name in _BLOCKS or name in _WITH_CONTENT or attributes
        ):
            continue
        # Half a tag at the end of a cut title; "<b" alone may be meant as it is.
        if match[2] and not match[0].endswith(">") and not (match[3] or name in _WITH_CONTENT):
            continue
        kept.append(text[at : match.start()])
        kept.append("" if name in _INLINE else " ")
        at = match.end()
        if match[0] == "<!--":
            at = after("-->")
        elif name in _WITH_CONTENT and not match[1]:
            at = after(f"</{name}")
    kept.append(text[at:])
    return "".join(kept)
