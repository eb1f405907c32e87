"""Turn a text model into a generator of identifiers: tokens, first embeddings, prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ..errors import DataError
from ..plain_settings import make_plain
from .backbone import output_head
from .families import why_unsupported_causal
from .hub import model_folder
from .lora import LoraSettings
from .prompts import PromptLayout
from .vocabulary import IdentifierVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CausalConfig",
    "add_identifier_tokens",
    "check_causal_lm",
    "initialise_identifier_rows",
    "load_causal_lm",
    "load_tokenizer",
    "prompt_layout",
]

_NOISE = 0.1
"""Noise on the new rows, in standard deviations of the old rows: it makes codes differ."""
_ITEMS = 4096
"""Items whose titles are read at a time."""


@dataclass(frozen=True)
class CausalConfig:
    """A decoder-only generator.

    Attributes:
        path: folder of a ``transformers`` checkpoint with its tokenizer, or its id on the Hugging
            Face hub (``"owner/name"``; for an unchanging model pass a ``revision``).
        template: the prompt's text; ``{history}`` stands for the identifiers of the history.
        separator: text between two items.
        rows: first embeddings of the identifier tokens: ``"text"``: of each code, the mean over its
            items of the mean embedding of their titles' tokens; ``"mean"``: of the old rows.
        lora: train adapters and the identifier tokens' rows; none: train every weight.
        from_config: random weights by the folder's ``config.json``, instead of those in the folder.
        dtype: of the weights; train bfloat16 weights with LoRA only.
        attention: ``attn_implementation`` of transformers: ``"sdpa"``, ``"eager"`` or, on a GPU,
            ``"flex_attention"``.
        max_prompt: most tokens of a prompt (none: what the model's positions allow); the oldest
            items that do not fit are dropped.
        revision: branch, tag or commit of a model on the hub.
        pad_to_multiple_of: rows of embedding and head are filled up to a multiple of this, which
            matrix products on a GPU like (64, say); the rows beyond the tokens are no item's.
        kind: tells the generators of a configuration apart.
    """

    path: str
    template: str = "The user has interacted with: {history}. Next item:"
    separator: str = ", "
    rows: Literal["text", "mean"] = "text"
    lora: LoraSettings | None = None
    from_config: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "eager", "flex_attention"] = "sdpa"
    max_prompt: int | None = None
    revision: str | None = None
    pad_to_multiple_of: int | None = None
    kind: Literal["causal"] = "causal"

    def __post_init__(self) -> None:
        make_plain(self)
        if self.max_prompt is not None and self.max_prompt < 1:
            raise ValueError(f"max_prompt must be >= 1; got {self.max_prompt}")
        if self.template.count("{history}") != 1:
            raise ValueError(f"template must have {{history}} once; got {self.template!r}")
        multiple: Any = self.pad_to_multiple_of
        if multiple is not None and (
            isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1
        ):
            raise ValueError(f"pad_to_multiple_of must be an integer >= 1; got {multiple!r}")
        if self.dtype == "bfloat16" and self.lora is None:
            raise ValueError(
                "dtype is 'bfloat16', in which small updates of the weights are lost: use lora, or "
                "float32 weights with bf16: true in sft and finetune"
            )

    def summary(self) -> str:
        """For reports, without the place of the checkpoint on this machine."""
        how = "random weights" if self.from_config else "its weights"
        trained = "all weights" if self.lora is None else f"LoRA of rank {self.lora.r}"
        return f"{Path(self.path).name} ({how}), {trained} trained"


def load_tokenizer(config: CausalConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model ``config.path``.

    Raises:
        DataError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    with _named(config):
        tokenizer = AutoTokenizer.from_pretrained(_folder(config), local_files_only=True)
    return cast("PreTrainedTokenizerBase", tokenizer)


def add_identifier_tokens(
    tokenizer: PreTrainedTokenizerBase, vocabulary: IdentifierVocabulary
) -> IdentifierVocabulary:
    """Add ``vocabulary``'s tokens to ``tokenizer``, in place.

    Returns:
        The vocabulary with the ids that its tokens have.

    Raises:
        ValueError: some of the tokens are there already, and not as a block of these; or
            identifiers differ in length and the tokenizer has no eos token to end them.
    """
    from transformers import AddedToken

    end = tokenizer.eos_token_id
    if vocabulary.ragged and end is None:
        raise ValueError("identifiers differ in length: the tokenizer needs an eos token")
    names = vocabulary.token_names()
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False) for name in names if name not in known]
    )
    first: Any = tokenizer.convert_tokens_to_ids(names[0])
    for place, name in enumerate(names):
        found = tokenizer.convert_tokens_to_ids(name)
        if found != first + place:
            raise ValueError(
                f"the tokenizer has {name!r} as token {found}, where {first + place} is expected: "
                "it holds identifier tokens of another catalogue"
            )
    eos: Any = end if vocabulary.ragged else _unused(end, first, len(names))
    return replace(vocabulary, offset=first, eos_token=eos)


def _unused(end: Any, first: int, count: int) -> int:
    """A token id that is no identifier token: the text's end, if it has one."""
    return int(end) if end is not None else (0 if first > 0 else count)


def check_causal_lm(config: CausalConfig) -> None:
    """Read the folder's ``config.json`` only, to see whether its model can be trained.

    Raises:
        DataError: there is none, it is damaged, or of another kind of model.
        TypeError: the model cannot run set-wise.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _named(config), torch.device("meta"):
        sizes = AutoConfig.from_pretrained(_folder(config), local_files_only=True)
        model = AutoModelForCausalLM.from_config(sizes)
    reason = why_unsupported_causal(model)
    if reason is not None:
        raise TypeError(f"model.path: {type(model).__name__} cannot be trained: {reason}")


def _folder(config: CausalConfig) -> Path:
    return model_folder(config.path, revision=config.revision)


@contextmanager
def _named(config: CausalConfig) -> Iterator[None]:
    """Turn what the libraries raise on a bad folder into a DataError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except DataError as error:
        raise DataError(f"model.path: {error}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"model.path: {config.path}: {reason}") from error


def load_causal_lm(
    config: CausalConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """The model in ``config.path``, with a row for every token of ``tokenizer``.

    Args:
        config: which model.
        tokenizer: with the identifier tokens.
        seed: seeds weights that the folder has not; the global generator is left as it was.

    Raises:
        DataError: the folder has no such model, or it is damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attention,
    }
    with _named(config), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        folder = _folder(config)
        if config.from_config:
            sizes = AutoConfig.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_config(sizes, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
        rows, multiple = model.get_input_embeddings().num_embeddings, config.pad_to_multiple_of
        wanted = max(rows, len(tokenizer))
        wanted += -wanted % (multiple or 1)
        if wanted > rows:
            model.resize_token_embeddings(wanted, mean_resizing=False)
    return cast("PreTrainedModel", model)


@torch.no_grad()
def initialise_identifier_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: IdentifierVocabulary,
    item_tokens: Tensor,
    texts: Sequence[str] | None,
    *,
    seed: int,
) -> None:
    """Give the identifier tokens' rows, in the embedding and an untied head, their first values.

    Args:
        model: has a row for every token.
        tokenizer: splits the texts into tokens.
        vocabulary: the identifier tokens.
        item_tokens: identifiers [items, L], right-padded with -1.
        texts: a title of each item; codes whose items have none, or all if None, get the mean of
            the old rows.
        seed: of the noise that tells codes apart.
    """
    tables = [cast(Any, model.get_input_embeddings()).weight]
    head = output_head(model)[0]
    if head is not tables[0]:
        tables.append(head)
    first, count = vocabulary.offset, vocabulary.size - vocabulary.offset
    generator = torch.Generator().manual_seed(seed)
    for table in tables:
        old = table[:first].float()
        noise = torch.randn(count, old.shape[1], generator=generator).to(old)
        rows = _text_rows(old, tokenizer, vocabulary, item_tokens, texts)
        table[first : vocabulary.size] = rows + _NOISE * old.std(0) * noise


def _text_rows(
    old: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: IdentifierVocabulary,
    item_tokens: Tensor,
    texts: Sequence[str] | None,
) -> Tensor:
    """Mean over each code's items of the mean of their texts' rows [codes, d]."""
    count = vocabulary.size - vocabulary.offset
    sums = old.new_zeros(count, old.shape[1])
    items = old.new_zeros(count)
    for begin in range(0, len(texts) if texts is not None else 0, _ITEMS):
        assert texts is not None
        part = list(texts[begin : begin + _ITEMS])
        ids = cast(Any, tokenizer(part, add_special_tokens=False))["input_ids"]
        words = [[token for token in row if token < vocabulary.offset] for row in ids]
        lengths = torch.tensor([len(row) for row in words], device=old.device)
        flat = torch.tensor([token for row in words for token in row], device=old.device)
        owner = torch.arange(len(part), device=old.device).repeat_interleave(lengths)
        mean = old.new_zeros(len(part), old.shape[1]).index_add_(0, owner, old[flat.long()])
        mean /= lengths.clamp_min(1).unsqueeze(1)
        codes = item_tokens[begin : begin + _ITEMS].to(old.device) - vocabulary.offset
        used = (codes >= 0) & (codes < count) & (lengths > 0).unsqueeze(1)
        item, level = used.nonzero(as_tuple=True)
        code = codes[item, level]
        sums.index_add_(0, code, mean[item])
        items.index_add_(0, code, torch.ones_like(code, dtype=old.dtype))
    means = sums / items.clamp_min(1).unsqueeze(1)
    return torch.where((items > 0).unsqueeze(1), means, old.mean(0))


def prompt_layout(
    config: CausalConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: IdentifierVocabulary,
    positions: int | None,
) -> PromptLayout:
    """The template's tokens: its text is tokenised here, once.

    Args:
        config: template, separator and longest prompt.
        tokenizer: with the identifier tokens.
        vocabulary: the identifier tokens.
        positions: tokens that the model can tell apart, or None.

    Raises:
        ValueError: not even one item fits.
    """

    def split(text: str) -> tuple[int, ...]:
        ids = cast(Any, tokenizer(text, add_special_tokens=False))["input_ids"]
        return tuple(int(token) for token in ids)

    before, after = config.template.split("{history}")
    bare, special = split("a"), tuple(cast(Any, tokenizer("a"))["input_ids"])
    start = tokenizer.bos_token_id
    begins = special[:1] == (start,) and bare[:1] != (start,)
    prefix = ((int(cast(int, start)),) if begins else ()) + split(before)
    separator, suffix = split(config.separator), split(after)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    limits = [config.max_prompt, None if positions is None else positions - vocabulary.length]
    longest = min((limit for limit in limits if limit is not None), default=None)
    max_items = None
    if longest is not None:
        room = longest - len(prefix) - len(suffix) + len(separator)
        max_items = room // (vocabulary.length + len(separator))
        if max_items < 1:
            raise ValueError(
                f"a prompt may have {longest} tokens, but the template takes "
                f"{len(prefix) + len(suffix)} and an item {vocabulary.length}"
            )
    return PromptLayout(
        prefix=prefix,
        separator=separator,
        suffix=suffix,
        pad_token=0 if pad is None else int(cast(int, pad)),
        end_token=vocabulary.eos_token if vocabulary.ragged else None,
        max_items=max_items,
    )
