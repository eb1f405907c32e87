"""The code blocks of README, CONTRIBUTING, docs and benchmarks; names that their Python uses."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
_MARKER = re.compile(r"<!-- (run|not run: .+|needs: \w+) -->\s*")


@dataclass(frozen=True)
class Block:
    """A fenced block: page and line, language, text, and what the comment before it says."""

    page: str
    line: int
    language: str
    text: str
    marker: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str | None = None) -> list[Block]:
    """All blocks of a language, page by page."""
    found = [block for path in PAGES for block in _of_page(path)]
    return [block for block in found if language in (None, block.language)]


def _of_page(path: Path) -> Iterator[Block]:
    marker, language, begin, text = "", None, 0, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if language is None and line.startswith("```"):
            language, begin, text = line[3:].strip(), number, ""
        elif line.startswith("```"):
            yield Block(str(path.relative_to(ROOT)), begin, language or "", text, marker)
            marker, language = "", None
        elif language is not None:
            text += line + "\n"
        elif (found := _MARKER.fullmatch(line)) is not None:
            marker = found.group(1)
        elif line.strip():
            marker = ""
    assert language is None, f"{path}: the block of line {begin} has no end"


def write_inputs(page: str, folder: Path) -> None:
    """The files that the commands of a page read, as the page describes them."""
    if page == "docs/identifiers.md":
        _write_two_years(folder)
    if page != "docs/your-data.md":
        return
    titles = {f"B00{letter}{digit}": f"{letter}{digit}" for letter in "KTX" for digit in range(10)}
    items = list(titles)
    kinds = ("view", "view", "purchase")
    events = [
        f"{user},{items[(7 * place + 3 * number) % 30]},2024-03-{place + 1:02} 18:22:10,"
        f"{kinds[(place + number) % 3]}"
        for number, user in enumerate(["ann", *(f"user {n}" for n in range(40))])
        for place in range(9)
    ]
    texts = {
        "events.csv": ["user,item,time,event", *events],
        "items.csv": ["item,title,brand", *(f"{i},{title},Brunn" for i, title in titles.items())],
        "requests.jsonl": ['{"user": "ann"}', '{"history": ["B00K4", "B00T7"]}'],
        "in_stock.txt": ["B00K4", "B00X1"],
    }
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_two_years(folder: Path) -> None:
    """The events of a year, those of the next one with 3 new items, and the items' vectors."""
    first = [
        f"user {n},item {(7 * place + 3 * n) % 30},{100 * place + n}"
        for n in range(40)
        for place in range(8)
    ]
    second = [f"user {n},new {n % 3},{900 + n}" for n in range(0, 40, 4)]
    for name, rows in (("2023", first), ("2024", [*first, *second])):
        (folder / f"{name}.csv").write_text("\n".join(["user,item,time", *rows]) + "\n")
    rng = np.random.default_rng(0)
    for name, count in (("2023", 30), ("new", 3)):
        np.save(folder / f"{name}.npy", rng.normal(size=(count, 8)).astype(np.float32))


def write_modules(page: str, folder: Path) -> None:
    """The module that a page of parts of one's own shows, beside its YAML file."""
    if page == "docs/extending.md":
        (block,) = (each for each in blocks("python") if each.page == page)
        (folder / "my_parts.py").write_text(block.text, encoding="utf-8")


def commands(text: str) -> list[str]:
    """The commands of a shell block, continuation lines joined, without comments."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.split("#")[0].strip()]


@functools.cache
def _recommender() -> dict[str, Any]:
    """A split, a scorer, a model of a tiny shop, and a batch of its prompts."""
    from support.tiny_shop import make_inputs, make_model, make_scorer, shop

    model = make_model(objective="sft").eval()
    inputs = make_inputs(model)
    return {
        "model": model,
        "backbone": model.backbone,
        "tree": model.tree,
        "split": shop(),
        "sasrec": make_scorer(),
        **{name: inputs[name] for name in ("input_ids", "attention_mask", "tokens", "mask")},
    }


def _causal() -> dict[str, Any]:
    """A decoder-only model over a few words and identifier tokens, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "one", "two", "<a_1>", "<a_2>", "<b_1>", "<b_2>"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return {
        "causal": GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **sizes, **ends)),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>"
        ),
        "item_tokens": torch.tensor([[4, 6], [4, 7], [5, 6]]),
    }


def names_of_pages(page: str) -> dict[str, Any]:
    """What the blocks of a page may use; each page gets its own, its blocks share them.

    Tensors are those of a prompt batch as every page describes it: hidden [B, N, L, d], tokens and
    mask [B, N, L], log_pf [B, N, L], log_reward [B, N], log_z [B].
    """
    import gflowgr

    names = {"gflowgr": gflowgr, "torch": torch, **_recommender()}
    torch.manual_seed(0)
    batch, count, length = names["tokens"].shape
    names["item_tokens"] = names["model"].item_tokens()
    names["lm_head"] = torch.nn.Linear(16, names["tree"].vocab_size, bias=False)
    names["hidden"] = torch.randn(batch, count, length, 16, requires_grad=True)
    names["log_pf"] = torch.randn(batch, count, length).log_softmax(-1)
    names["log_reward"] = torch.randn(batch, count)
    names["log_reward_of_every_item"] = torch.randn(batch, names["tree"].num_items)
    names["log_z"] = torch.zeros(batch)
    if page == "docs/recipes.md":
        names |= _causal()
    if page not in ("docs/decoding.md", "docs/recipes.md", "docs/training.md"):
        names["tree"] = None  # a page that uses one makes it
        names["mask"] = torch.ones_like(names["mask"])
    return names
