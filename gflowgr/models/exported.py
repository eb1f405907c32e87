"""A saved generator as two programs of tensors, for runtimes without this package.

``prompt`` reads histories' tokens, ``step`` one more token of each identifier; the cache goes in
and out as tensors, so that a caller may reorder, drop and repeat rows as a search needs. Both are
written by ``torch.export`` or as ONNX. They compute what :mod:`gflowgr.decoding.decoders` computes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .. import files
from ..errors import DataError
from ..folders import fresh_folder
from .bare import BareGPT2, BareModel, BareT5
from .gflow_model import GFlowModel

__all__ = ["ExportFormat", "export_model", "prompt_and_step"]

ExportFormat = Literal["torch-export", "onnx"]
_INPUTS = {
    "prompt": ("input_ids", "attention_mask"),
    "step": (
        *("tokens", "position", "attention_mask"),
        *("prompt_keys", "prompt_values", "own_keys", "own_values"),
    ),
}
_OUTPUTS = {
    "prompt": ("logits", "prompt_keys", "prompt_values", "own_keys", "own_values"),
    "step": ("logits", "own_keys", "own_values"),
}
_FILES = ("prompt.pt2", "step.pt2", "prompt.onnx", "step.onnx", "export.json")


def export_model(model_folder: Path, out: Path, form: ExportFormat) -> None:
    """Write the programs of a saved TIGER or ``decoder`` into a folder, whole or not at all.

    ``prompt.pt2`` and ``step.pt2``, or ``prompt.onnx`` and ``step.onnx``, and ``export.json``,
    which names inputs and outputs.

    Args:
        model_folder: a saved model.
        out: the folder; an earlier export in it is replaced, other files stay.
        form: which files.

    Raises:
        DataError: the model is of another kind, or damaged.
        ValueError: a package is missing for ONNX.
    """
    if form == "onnx" and any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript")):
        raise ValueError("--onnx needs onnx and onnxscript: pip install 'gflowgr[onnx]'")
    model = GFlowModel.from_pretrained(model_folder, decode_only=True)
    backbone: Any = model.backbone
    if not isinstance(backbone, BareModel):
        raise DataError(
            f"{model_folder} must be a TIGER or a decoder to be exported; its backbone is a "
            f"{type(backbone).__name__}"
        )
    prompt, step = prompt_and_step(backbone, model.vocabulary.length)
    inputs = _example(prompt, backbone.config.vocab_size)
    with fresh_folder(out, is_own=lambda name: name in _FILES) as folder:
        for name, program in (("prompt", prompt), ("step", step)):
            write = _write_onnx if form == "onnx" else _write_torch
            write(program, name, inputs[name], folder)
        files.write_json(
            folder / "export.json",
            {
                "format": 1,
                "kind": "tiger" if isinstance(backbone, BareT5) else "decoder",
                "levels": model.vocabulary.length,
                "vocab_size": backbone.config.vocab_size,
                "inputs": _INPUTS,
                "outputs": _OUTPUTS,
            },
        )


def prompt_and_step(backbone: BareModel, levels: int) -> tuple[nn.Module, nn.Module]:
    """The two programs, as modules that share the backbone's weights.

    B prompts of S tokens; N layers of H heads of D numbers; ``levels`` tokens of an identifier::

        logits, prompt_keys, prompt_values, own_keys, own_values = prompt(input_ids, attention_mask)
        logits, own_keys, own_values = step(
            tokens, position, attention_mask, prompt_keys, prompt_values, own_keys, own_values
        )

    ``input_ids`` and ``attention_mask`` [B, S] int64 as :func:`~gflowgr.models.prompt_tokens` makes
    them; ``logits`` [B, V] of the next token; ``tokens`` [B] int64, the ones chosen last;
    ``position`` [] int64, 0 for an identifier's first token; prompt keys and values
    [N, B, H, S, D]; own ones [N, B, H, ``levels``, D], of which the token at ``position`` is new.

    Args:
        backbone: of :func:`~gflowgr.models.bare.read_bare`.
        levels: tokens of the longest identifier.
    """
    if isinstance(backbone, BareT5):
        step = _T5Step(backbone, levels)
        return _T5Prompt(backbone, step), step
    if isinstance(backbone, BareGPT2):
        return _GPT2Prompt(backbone, levels), _GPT2Step(backbone, levels)
    raise TypeError(f"backbone must be a BareT5 or a BareGPT2; got {type(backbone).__name__}")


# ---- T5 ----


class _T5Step(nn.Module):
    def __init__(self, backbone: BareT5, levels: int) -> None:
        super().__init__()
        stack, config = backbone.get_decoder(), backbone.config
        self.stack, self.head, self.levels = stack, backbone.lm_head, levels
        self.heads, self.size = config.num_heads, config.d_kv
        self.scale = config.d_model**-0.5
        layers: list[Any] = [block.layer for block in stack.block]
        bias = layers[0][0].SelfAttention.compute_bias(levels, levels, torch.device("cpu"))
        self.register_buffer("bias", bias[0].detach().clone())  # [H, levels, levels]

    def at(
        self, tokens: Tensor, place: Tensor, mask: Tensor, prompt: list[Tensor], own: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token at a place of the cache, where the start token has place 0."""
        places = torch.arange(self.levels, device=tokens.device)
        newest = (places == place)[:, None]
        assert isinstance(self.bias, Tensor)
        bias = self.bias.index_select(1, place.reshape(1))
        bias = bias.masked_fill(places > place, -torch.inf)[None]  # [1, H, 1, levels]
        hidden = self.stack.embed_tokens(tokens[:, None])
        pads = (mask == 0)[:, None, None, :]
        cross = torch.zeros_like(pads, dtype=hidden.dtype)
        cross = cross.masked_fill(pads, torch.finfo(hidden.dtype).min)
        keys, values = [], []
        for number, block in enumerate(self.stack.block):
            layer: Any = block.layer
            attention, normed = layer[0].SelfAttention, layer[0].layer_norm(hidden)
            keys.append(torch.where(newest, self._split(attention.k(normed)), own[0][number]))
            values.append(torch.where(newest, self._split(attention.v(normed)), own[1][number]))
            mixed = scaled_dot_product_attention(
                self._split(attention.q(normed)), keys[-1], values[-1], attn_mask=bias, scale=1.0
            )
            hidden = hidden + attention.o(mixed.transpose(1, 2).flatten(2))
            attention, normed = layer[1].EncDecAttention, layer[1].layer_norm(hidden)
            mixed = scaled_dot_product_attention(
                self._split(attention.q(normed)),
                prompt[0][number],
                prompt[1][number],
                attn_mask=cross,
                scale=1.0,
            )
            hidden = hidden + attention.o(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer[2].DenseReluDense(layer[2].layer_norm(hidden))
        hidden = self.stack.final_layer_norm(hidden)[:, 0] * self.scale
        return self.head(hidden), torch.stack(keys), torch.stack(values)

    def _split(self, states: Tensor) -> Tensor:
        """[B, T, H * D] to [B, H, T, D]."""
        return states.unflatten(2, (self.heads, self.size)).transpose(1, 2)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        attention_mask: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        prompt, own = [prompt_keys, prompt_values], [own_keys, own_values]
        return self.at(tokens, position + 1, attention_mask, prompt, own)


class _T5Prompt(nn.Module):
    def __init__(self, backbone: BareT5, step: _T5Step) -> None:
        super().__init__()
        self.encoder, self.step = backbone.get_encoder(), step
        self.start = int(backbone.config.decoder_start_token_id)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        step = self.step
        encoded = self.encoder(input_ids, attention_mask).last_hidden_state
        parts: list[Any] = [block.layer[1].EncDecAttention for block in step.stack.block]  # type: ignore[union-attr,index]
        prompt = [
            torch.stack([step._split(part.k(encoded)) for part in parts]),
            torch.stack([step._split(part.v(encoded)) for part in parts]),
        ]
        empty = encoded.new_zeros(
            len(parts), input_ids.shape[0], step.heads, step.levels, step.size
        )
        start = torch.full_like(input_ids[:, 0], self.start)
        place = torch.zeros((), dtype=torch.int64, device=input_ids.device)
        logits, *own = step.at(start, place, attention_mask, prompt, [empty, empty])
        return logits, *prompt, *own


# ---- GPT-2 ----


class _GPT2(nn.Module):
    def __init__(self, backbone: BareGPT2, levels: int) -> None:
        super().__init__()
        self.stack, self.head, self.levels = backbone.base_model, backbone.lm_head, levels

    def _run(self, tokens: Tensor, positions: Tensor, attend: Any) -> tuple[Tensor, Tensor, Tensor]:
        """States [B, T, d], and what ``attend`` keeps of each layer, keys and values."""
        stack = self.stack
        hidden = stack.wte(tokens) + stack.wpe(positions)
        keys, values = [], []
        for number, each in enumerate(stack.h):
            block: Any = each
            size = block.attn.head_dim
            query, key, value = (
                part.unflatten(2, (-1, size)).transpose(1, 2)
                for part in block.attn.c_attn(block.ln_1(hidden)).chunk(3, dim=-1)
            )
            mixed, key, value = attend(number, query, key, value, block.attn.scaling)
            keys.append(key)
            values.append(value)
            hidden = hidden + block.attn.c_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return stack.ln_f(hidden), torch.stack(keys), torch.stack(values)


class _GPT2Prompt(_GPT2):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        real = attention_mask != 0
        # Each token sees itself, so that padding has states, which nothing looks at.
        itself = places[:, None] == places
        seen = ((places[:, None] >= places) & real[:, None, None, :]) | itself

        def attend(_: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
            return mixed, key, value

        positions = (real.long().cumsum(1) - 1).clamp_min(0)
        states, keys, values = self._run(input_ids, positions, attend)
        last = (real.long() * places).argmax(1)
        newest = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
        own = keys.new_zeros(*keys.shape[:3], self.levels, keys.shape[4])
        return self.head(newest), keys, values, own, own.clone()


class _GPT2Step(_GPT2):
    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        attention_mask: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        own_keys: Tensor,
        own_values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.arange(self.levels, device=tokens.device)
        newest = (places == position)[:, None]
        real = attention_mask != 0
        own = (places <= position).expand(tokens.shape[0], -1)
        seen = torch.cat([real, own], dim=1)[:, None, None, :]

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
            key = torch.where(newest, key, own_keys[number])
            value = torch.where(newest, value, own_values[number])
            mixed = scaled_dot_product_attention(
                query,
                torch.cat([prompt_keys[number], key], dim=2),
                torch.cat([prompt_values[number], value], dim=2),
                attn_mask=seen,
                scale=scale,
            )
            return mixed, key, value

        positions = (real.long().sum(1) + position)[:, None]
        states, keys, values = self._run(tokens[:, None], positions, attend)
        return self.head(states[:, 0]), keys, values


# ---- files ----


def _example(prompt: nn.Module, vocab_size: int) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of two prompts of three tokens, the second padded."""
    input_ids = torch.arange(6).remainder(vocab_size).view(2, 3)
    attention_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        _, *cache = prompt(input_ids, attention_mask)
    step = (input_ids[:, 0], torch.tensor(0), attention_mask, *cache)
    return {"prompt": (input_ids, attention_mask), "step": step}


def _dynamic(name: str) -> dict[str, dict[int, Any]]:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    of = {
        "input_ids": {0: batch, 1: length},
        "tokens": {0: batch},
        "position": {},
        "prompt_keys": {1: batch, 3: length},
        "own_keys": {1: batch},
    }
    alike = {
        "attention_mask": "input_ids",
        "prompt_values": "prompt_keys",
        "own_values": "own_keys",
    }
    return {each: of[alike.get(each, each)] for each in _INPUTS[name]}


def _write_torch(program: nn.Module, name: str, inputs: tuple[Tensor, ...], folder: Path) -> None:
    exported = torch.export.export(program, inputs, dynamic_shapes=_dynamic(name))
    exported.example_inputs = None  # they would be a pickle in the archive
    torch.export.save(exported, str(folder / f"{name}.pt2"))


def _write_onnx(program: nn.Module, name: str, inputs: tuple[Tensor, ...], folder: Path) -> None:
    made = torch.onnx.export(
        program,
        inputs,
        dynamo=True,
        dynamic_shapes=_dynamic(name),
        input_names=list(_INPUTS[name]),
        output_names=list(_OUTPUTS[name]),
        verbose=False,
    )
    assert made is not None  # with dynamo=True
    made.save(folder / f"{name}.onnx")
