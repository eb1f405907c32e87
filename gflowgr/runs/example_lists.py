"""Recommendations of a few users as titles: beside the figures, what people look at."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data import Split
from ..evaluation.evaluate import Evaluation
from ..report.document import Block, Bullets, Paragraph, Section
from ..report.tables import Table, TableCell

__all__ = ["Example", "example_recommendations", "examples_section"]


@dataclass(frozen=True)
class Example:
    """One user's recommendations, as ids and titles.

    Attributes:
        user: the user's id in the data.
        history: titles of the user's last items, oldest first.
        target: title of the held-out item.
        recommendations: method to titles, best first.
        found: method to the 0-based place of the held-out item in that method's list, -1 = not in
            it; different items may have the same title.
    """

    user: str
    history: list[str]
    target: str
    recommendations: dict[str, list[str]]
    found: dict[str, int]


def example_recommendations(
    split: Split,
    evaluations: Mapping[str, Evaluation],
    *,
    count: int = 5,
    history: int = 5,
    top: int = 5,
    seed: int = 0,
) -> list[Example]:
    """Recommendations of each method for the same users, as titles.

    Half of the users (rounded up) are drawn among those for whom some method found the target in
    its list, the rest among all others, so that both sides are seen; say so beside them.

    Args:
        split: the data.
        evaluations: method name to its evaluation; all of the same part and users.
        count: number of users.
        history: items of the history shown.
        top: items of each list shown.
        seed: of the choice.

    Raises:
        ValueError: no evaluations, or evaluations of different users or parts.
    """
    if not evaluations:
        raise ValueError("evaluations must not be empty")
    first = next(iter(evaluations.values()))
    for name, other in evaluations.items():
        if other.which != first.which or not np.array_equal(other.users, first.users):
            raise ValueError(f"evaluation {name!r} is of another part or other users")
    rng = np.random.default_rng(seed)
    found = np.any([evaluation.ranks >= 0 for evaluation in evaluations.values()], axis=0)
    hits, others = (rng.permutation(np.flatnonzero(part)) for part in (found, ~found))
    wanted_hits = max(-(-count // 2), count - len(others))
    chosen = np.concatenate([hits[:wanted_hits], others])[:count]
    row_of = {int(user): row for row, user in enumerate(split.eval_users(first.which))}
    histories, targets = split.histories(first.which), split.targets(first.which)
    title = split.dataset.label
    examples = []
    for place in chosen:
        user = int(first.users[place])
        row = row_of[user]
        lists = {
            name: [title(int(item)) for item in evaluation.items[place, :top] if item >= 0]
            for name, evaluation in evaluations.items()
        }
        past = [title(int(item)) for item in histories[row][-history:]]
        places = {name: int(evaluation.ranks[place]) for name, evaluation in evaluations.items()}
        examples.append(
            Example(split.dataset.user_ids[user], past, title(int(targets[row])), lists, places)
        )
    return examples


def examples_section(examples: Sequence[Example]) -> Section:
    """Each user's history, held-out item and lists, a table per user."""
    text = (
        "Users for whom some method found the held-out item come first and are over-represented. "
        "The held-out item is marked ✓."
    )
    sections = []
    for example in examples:
        names = list(example.recommendations)
        depth = max((len(titles) for titles in example.recommendations.values()), default=0)
        rows = []
        for place in range(depth):
            row = [TableCell(str(place + 1))]
            for name, titles in example.recommendations.items():
                title = _short(titles[place]) if place < len(titles) else ""
                row.append(TableCell(title + " ✓" * (example.found[name] == place)))
            rows.append(row)
        blocks: list[Block] = [
            Paragraph("Last items, oldest first:"),
            Bullets([("", _short(title)) for title in example.history]),
            Paragraph(_short(example.target), "Held-out item"),
            Table("", ["", *names], rows, align="r" + "l" * len(names)),
        ]
        sections.append(Section(f"User {example.user}", blocks))
    return Section("Example recommendations", [Paragraph(text)], sections)


def _short(title: str) -> str:
    return textwrap.shorten(title, 70, placeholder=" ...")
