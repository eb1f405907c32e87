"""T5 and GPT-2 without transformers: the modules of a saved model that decoding reads.

Importing transformers takes longer than a search. A generator that :func:`~.tiger.build_tiger` or
:func:`~.decoder.build_decoder` made is read here from ``config.json`` and ``model.safetensors``
alone, into modules named as those of transformers, so that
:mod:`gflowgr.decoding.decoders` runs either. They compute the same; they do not train.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from .. import files

__all__ = ["BareGPT2", "BareLinear", "BareModel", "BareT5", "position_buckets", "read_bare"]

_WEIGHTS = "model.safetensors"
_T5 = {
    "model_type": "t5",
    "feed_forward_proj": "relu",
    "scale_decoder_outputs": True,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
_GPT2 = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
_ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
}


def read_bare(folder: Path) -> BareModel | None:
    """The backbone in ``folder``, its weights mapped from the file; None where it is of another
    form than those of this module, or has a tokenizer.

    Args:
        folder: a saved model.

    Raises:
        RuntimeError: the file has other weights than the configuration says.
        safetensors.SafetensorError: the file is damaged.
    """
    from safetensors.torch import load_file

    config: dict[str, Any] = files.read_json(folder / "config.json", expect=dict)
    if (folder / "tokenizer_config.json").is_file() or not (folder / _WEIGHTS).is_file():
        return None
    kind: type[BareModel]
    if _T5.items() <= config.items():
        kind = BareT5
    elif _GPT2.items() <= config.items() and config["activation_function"] in _ACTIVATIONS:
        kind = BareGPT2
    else:
        return None
    with torch.device("meta"):
        model = kind(config)
    state = load_file(folder / _WEIGHTS)
    embedding = state.get(kind.TIED[0])
    if embedding is not None:
        state |= dict.fromkeys(kind.TIED, embedding)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


class BareModel(nn.Module):
    """Weights and configuration of a backbone; not to be called."""

    TIED: tuple[str, ...]
    """Names of the parameters that are one, of which the file has the first."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = _Config(**config)
        self.lm_head: nn.Linear

    def get_output_embeddings(self) -> nn.Linear:
        """The output head, as models of transformers give it."""
        return self.lm_head

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, as are training and :meth:`save_pretrained`."""
        raise TypeError(
            "model must be loaded by GFlowModel.from_pretrained(folder) to be trained, called or "
            f"saved; got a {type(self).__name__}, which was loaded with decode_only=True"
        )

    save_pretrained = forward


class _Config(SimpleNamespace):
    """A configuration by the names in the file, and by those that families share."""

    def get_text_config(self, decoder: bool = False) -> _Config:
        return self

    def __getattr__(self, name: str) -> Any:
        other = _SHARED.get(name, ())
        for each in other:
            if each in vars(self):
                return vars(self)[each]
        raise AttributeError(f"the configuration has no {name}")


_SHARED = {
    "hidden_size": ("d_model", "n_embd"),
    "num_attention_heads": ("num_heads", "n_head"),
    "num_hidden_layers": ("num_layers", "n_layer"),
}


class _Blank:
    """A module whose first weights are none: they come from a file."""

    def reset_parameters(self) -> None:
        return None


class BareLinear(_Blank, nn.Linear):
    """A linear layer, no more."""


class _Embedding(_Blank, nn.Embedding): ...


class _LayerNorm(_Blank, nn.LayerNorm): ...


# ---- T5 ----


class BareT5(BareModel):
    """What :func:`~gflowgr.models.tiger.build_tiger` makes."""

    TIED = (
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    )

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        rows, width = config["vocab_size"], config["d_model"]
        self.shared = _Embedding(rows, width)
        self.encoder = _T5Stack(config, config["num_layers"], decoder=False)
        self.decoder = _T5Stack(config, config["num_decoder_layers"], decoder=True)
        self.lm_head = BareLinear(width, rows, bias=False)

    def get_encoder(self) -> _T5Stack:
        """The encoder, which can be called."""
        return self.encoder

    def get_decoder(self) -> _T5Stack:
        """The decoder's modules."""
        return self.decoder


class _T5Stack(nn.Module):
    def __init__(self, config: dict[str, Any], layers: int, *, decoder: bool) -> None:
        super().__init__()
        self.embed_tokens = _Embedding(config["vocab_size"], config["d_model"])
        self.block = nn.ModuleList(
            _T5Block(config, first=number == 0, decoder=decoder) for number in range(layers)
        )
        self.final_layer_norm = _T5Norm(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """An encoder's states [B, S, d] of prompts [B, S]."""
        layers: list[Any] = [block.layer for block in self.block]
        length = input_ids.shape[1]
        bias = layers[0][0].SelfAttention.compute_bias(length, length, device=input_ids.device)
        pads = (attention_mask == 0)[:, None, None, :]
        bias = bias.masked_fill(pads, torch.finfo(bias.dtype).min)
        hidden = self.embed_tokens(input_ids)
        for own, feed in layers:
            hidden = hidden + own.SelfAttention(own.layer_norm(hidden), bias)
            hidden = hidden + feed.DenseReluDense(feed.layer_norm(hidden))
        return SimpleNamespace(last_hidden_state=self.final_layer_norm(hidden))


class _T5Block(nn.Module):
    def __init__(self, config: dict[str, Any], *, first: bool, decoder: bool) -> None:
        super().__init__()
        attention = _T5Attention(config, has_bias=first, is_decoder=decoder)
        parts: list[tuple[str, nn.Module]] = [("SelfAttention", attention)]
        if decoder:
            parts.append(("EncDecAttention", _T5Attention(config, False, is_decoder=True)))
        parts.append(("DenseReluDense", _T5FeedForward(config)))
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": _T5Norm(config)}) for name, part in parts
        )


class _T5Norm(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config["d_model"]))
        self.variance_epsilon = float(config["layer_norm_epsilon"])

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, list(self.weight.shape), self.weight, self.variance_epsilon)


class _T5Attention(nn.Module):
    def __init__(self, config: dict[str, Any], has_bias: bool, *, is_decoder: bool) -> None:
        super().__init__()
        self.heads, self.size, self.is_decoder = config["num_heads"], config["d_kv"], is_decoder
        self.relative_attention_num_buckets = config["relative_attention_num_buckets"]
        self.relative_attention_max_distance = config["relative_attention_max_distance"]
        width, inner = config["d_model"], self.heads * self.size
        self.q = BareLinear(width, inner, bias=False)
        self.k = BareLinear(width, inner, bias=False)
        self.v = BareLinear(width, inner, bias=False)
        self.o = BareLinear(inner, width, bias=False)
        if has_bias:
            self.relative_attention_bias = _Embedding(
                self.relative_attention_num_buckets, self.heads
            )

    def compute_bias(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Relative position bias [1, H, queries, keys]."""
        places = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        buckets = position_buckets(
            places,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        bias: Tensor = self.relative_attention_bias(buckets)
        return bias.permute(2, 0, 1).unsqueeze(0)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """Attention of all positions to each other, in the encoder."""
        shape = (*hidden.shape[:2], self.heads, self.size)
        query, key, value = (
            project(hidden).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        states: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return states


class _T5FeedForward(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.wi = BareLinear(config["d_model"], config["d_ff"], bias=False)
        self.wo = BareLinear(config["d_ff"], config["d_model"], bias=False)
        self.act = nn.ReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        states: Tensor = self.wo(self.act(self.wi(hidden)))
        return states


def position_buckets(
    places: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """T5's buckets of relative positions (Raffel et al., 2020, section 2.1): half of them hold one
    distance each, the others grow with the logarithm up to ``max_distance``.

    Args:
        places: of the key minus of the query, int64 [...].
        bidirectional: half of the buckets are for keys after the query; else those count as here.
        num_buckets: number of buckets.
        max_distance: the last bucket holds this distance and all beyond.

    Returns:
        int64 [...] in 0 .. num_buckets - 1.
    """
    first = torch.zeros_like(places)
    if bidirectional:
        num_buckets //= 2
        first = (places > 0).long() * num_buckets
        distance = places.abs()
    else:
        distance = (-places).clamp_min(0)
    exact = num_buckets // 2
    growth = (distance.float() / exact).log() / math.log(max_distance / exact)
    wide = (exact + (growth * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
    return first + torch.where(distance < exact, distance, wide)


# ---- GPT-2 ----


class BareGPT2(BareModel):
    """What :func:`~gflowgr.models.decoder.build_decoder` makes."""

    TIED = ("transformer.wte.weight", "lm_head.weight")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.transformer = _GPT2Stack(config)
        self.lm_head = BareLinear(config["n_embd"], config["vocab_size"], bias=False)

    @property
    def base_model(self) -> _GPT2Stack:
        """The model without its head."""
        return self.transformer


class _GPT2Stack(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, epsilon = config["n_embd"], config["layer_norm_epsilon"]
        self.wte = _Embedding(config["vocab_size"], width)
        self.wpe = _Embedding(config["n_positions"], width)
        self.h = nn.ModuleList(_GPT2Block(config) for _ in range(config["n_layer"]))
        self.ln_f = _LayerNorm(width, eps=epsilon)


class _GPT2Block(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, epsilon = config["n_embd"], config["layer_norm_epsilon"]
        self.ln_1 = _LayerNorm(width, eps=epsilon)
        self.attn = _GPT2Attention(config)
        self.ln_2 = _LayerNorm(width, eps=epsilon)
        self.mlp = _GPT2FeedForward(config)


class _GPT2Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["n_embd"]
        self.head_dim = width // config["n_head"]
        self.scaling = self.head_dim**-0.5
        self.c_attn = _Affine(width, 3 * width)
        self.c_proj = _Affine(width, width)


class _GPT2FeedForward(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
        self.c_fc = _Affine(width, inner)
        self.c_proj = _Affine(inner, width)
        self.act = _ACTIVATIONS[config["activation_function"]]()

    def forward(self, hidden: Tensor) -> Tensor:
        states: Tensor = self.c_proj(self.act(self.c_fc(hidden)))
        return states


class _Affine(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-2 keeps it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, out))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, hidden: Tensor) -> Tensor:
        product = torch.addmm(self.bias, hidden.flatten(0, -2), self.weight)
        return product.unflatten(0, hidden.shape[:-1])
