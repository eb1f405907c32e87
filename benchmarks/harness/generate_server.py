"""The usual server of such a model: ``transformers.generate`` with a trie, a call for a request."""

import threading
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from torch import Tensor

from benchmarks.harness.constraints import DictTrie
from benchmarks.harness.shapes import LENGTH
from gflowgr.models import prompt_tokens

__all__ = ["make_app"]

_PAD = 0


class Body(BaseModel):
    """A history of items, oldest first."""

    history: list[int]
    k: int = 10
    mask_seen: bool = True


def make_app(
    backbone: Any,
    tokens: np.ndarray,
    trie: DictTrie,
    beams: int,
) -> FastAPI:
    """The application.

    Args:
        backbone: a model of ``transformers``.
        tokens: identifiers of the items [items, LENGTH].
        trie: the same as nested dicts.
        beams: beams, and sequences that are returned.
    """
    app, alone = FastAPI(), threading.Lock()
    item_tokens = torch.from_numpy(tokens.astype(np.int64))
    items = {tuple(row): item for item, row in enumerate(tokens.tolist())}

    def allowed(_: int, sequence: Tensor) -> list[int]:
        # It also asks about beams that it has given up; something must be allowed there.
        return trie.allowed(sequence[1:].tolist()) or [_PAD]

    @app.post("/recommend")
    def recommend(body: Body) -> dict[str, list[int]]:
        input_ids, mask = prompt_tokens(torch.tensor([body.history]), item_tokens)
        with alone, torch.no_grad():  # calls at once would only share the cores
            found = backbone.generate(
                input_ids=input_ids,
                attention_mask=mask,
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=LENGTH,
                min_new_tokens=LENGTH,
                do_sample=False,
                prefix_allowed_tokens_fn=allowed,
                length_penalty=0.0,
            )
        rows = [items[tuple(row)] for row in found[:, 1 : 1 + LENGTH].tolist()]
        seen = set(body.history) if body.mask_seen else set()
        return {"items": [item for item in rows if item not in seen][: body.k]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
