"""Vectors of item texts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gflowgr.progress import progress_bar


def text_embeddings(texts: list[str], dim: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors of item texts: TF-IDF of words and word pairs, reduced by truncated SVD.

    Args:
        texts: one text per item, e.g. title and categories.
        dim: width of the vectors; fewer where texts or words are too few (then padded with zeros).
        seed: of the SVD.

    Returns:
        float32 [items, dim], each row of length 1 (or 0 for a text without known words).

    Raises:
        ValueError: no text has a word.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    width = min(dim, min(table.shape) - 1)
    vectors = np.zeros((len(texts), dim), dtype=np.float32)
    if width >= 1:
        vectors[:, :width] = TruncatedSVD(width, random_state=seed).fit_transform(table)
    return _unit_length(vectors)


def encode_texts(
    texts: Sequence[str],
    encoder: str,
    *,
    batch_size: int = 64,
    max_length: int = 256,
    allow_download: bool = False,
    device: str = "cpu",
    progress: bool = False,
) -> np.ndarray:
    """Vectors of item texts by a pretrained encoder.

    A folder or model of ``sentence-transformers`` is run by that package, with its own pooling and
    normalisation; any other one that ``transformers.AutoModel`` loads gives the mean of its last
    states over the tokens of a text.

    Args:
        texts: one text per item.
        encoder: a folder, or a model's name on the Hugging Face hub.
        batch_size: texts per forward pass.
        max_length: tokens of a text that are read.
        allow_download: fetch a hub model that is not in the local cache.
        device: where the encoder runs.
        progress: show a progress bar.

    Returns:
        float32 [items, width], each row of length 1 (by transformers, 0 for a blank text).

    Raises:
        ValueError: no texts, or the encoder is neither a folder nor in the local cache (the message
            says how to allow the download), or a package that it needs is missing.
    """
    if not texts:
        raise ValueError("texts must not be empty")
    local = not allow_download
    try:
        if _is_sentence_transformer(encoder, local):
            vectors = _with_sentence_transformers(
                texts, encoder, batch_size, max_length, local, device, progress
            )
        else:
            vectors = _with_transformers(
                texts, encoder, batch_size, max_length, local, device, progress
            )
    except OSError as error:  # what transformers and the hub raise for a model they cannot find
        way = (
            "give a folder, or allow the download of a hub model (--allow-download, "
            "allow_download=True)"
            if local
            else "is the name right, and the network there?"
        )
        if importlib.util.find_spec("sentence_transformers") is None:
            way += "; a model of sentence-transformers needs pip install 'gflowgr[text]', too"
        raise ValueError(
            f"encoder {encoder!r} cannot be loaded: {way} ({_first(error)})"
        ) from error
    return _unit_length(vectors.astype(np.float32))


def item_texts(texts: Sequence[dict[str, str]], fields: Sequence[str] | None = None) -> list[str]:
    """One text per item: its fields, joined.

    Args:
        texts: the fields of each item, as in ``Dataset.texts``.
        fields: which of them, in this order; None: all.

    Raises:
        ValueError: no item has a field of that name.
    """
    known = {name for entry in texts for name in entry}
    for name in fields or ():
        if name not in known:
            raise ValueError(f"fields: no item has {name!r}; there are {', '.join(sorted(known))}")
    return [
        " ".join(text for name in (fields or entry) if (text := entry.get(name))) for entry in texts
    ]


def _is_sentence_transformer(encoder: str, local: bool) -> bool:
    """Whether the model says so itself, by its ``modules.json``."""
    if Path(encoder).is_dir():
        found = (Path(encoder) / "modules.json").is_file()
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        try:
            hf_hub_download(encoder, "modules.json", local_files_only=local)
            found = True
        except EntryNotFoundError:
            found = False
        except HFValidationError as error:
            raise ValueError(
                f"encoder {encoder!r}: no such folder, nor a hub model's name"
            ) from error
    if found and importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(
            f"encoder {encoder!r} is a sentence-transformers model: pip install 'gflowgr[text]'"
        )
    return found


def _with_sentence_transformers(
    texts: Sequence[str],
    encoder: str,
    batch_size: int,
    max_length: int,
    local: bool,
    device: str,
    progress: bool,
) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(encoder, device=device, local_files_only=local)
    model.max_seq_length = min(max_length, model.max_seq_length or max_length)
    return model.encode(
        list(texts), batch_size=batch_size, show_progress_bar=progress, convert_to_numpy=True
    )


def _with_transformers(
    texts: Sequence[str],
    encoder: str,
    batch_size: int,
    max_length: int,
    local: bool,
    device: str,
    progress: bool,
) -> np.ndarray:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=local)
    if tokenizer.pad_token is None:  # decoder-only models often have none; the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModel.from_pretrained(encoder, local_files_only=local).to(device).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    # Texts of alike length together: little padding. Blank ones have no states to take a mean of.
    order = np.argsort([len(text) for text in texts], kind="stable")[::-1]
    order = np.array([item for item in order if texts[item].strip()], dtype=np.int64)
    with torch.inference_mode():
        for chosen in progress_bar(
            list(_chunks(order, batch_size)), desc="Texts", unit="batch", disable=not progress
        ):
            batch = tokenizer(
                [texts[item] for item in chosen],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(device)
            batch.pop("token_type_ids", None)
            states = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            vectors[chosen] = mean.cpu().numpy()
    return vectors


def _chunks(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _unit_length(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def _first(error: Exception) -> str:
    return str(error).strip().split(os.linesep)[0]
