"""gflowgr's losses in a plain `transformers.Trainer`: override `compute_loss`, nothing else.

    python examples/hf_trainer.py

A small T5 learns to generate items in proportion to a reward. Each example has the observed item
and three random others. VarGrad needs no log Z, so the model has no parameters but its own.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

import gflowgr
from gflowgr.models import output_head, trajectory_hidden_states

ITEMS, LENGTH, CODES = 60, 2, 8
# Token ids: 0 pad and start, 1 end of a prompt, then 8 codes for each of the two places.
ITEM_TOKENS = 2 + torch.stack([torch.arange(ITEMS) // 8, CODES + torch.arange(ITEMS) % 8], dim=1)
TREE = gflowgr.PrefixTree.from_identifiers(ITEM_TOKENS)


class Clicks(Dataset[dict[str, Tensor]]):
    """A prompt is one earlier item; items near it are worth more."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        seen = torch.randint(ITEMS, (), generator=generator)
        others = torch.randperm(ITEMS, generator=generator)[:3]
        items = torch.cat([((seen + 1) % ITEMS).view(1), others])  # the observed item first
        return {
            "input_ids": torch.cat([ITEM_TOKENS[seen], torch.tensor([1])]),
            "attention_mask": torch.ones(LENGTH + 1, dtype=torch.long),
            "tokens": ITEM_TOKENS[items],  # [N, L]
            "log_reward": -(items - seen).abs() / 10.0,  # [N], nats
        }


class FlowTrainer(Trainer):
    """A Trainer whose loss is trajectory balance with VarGrad's estimate of log Z."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        tokens = inputs["tokens"]  # [B, N, L]
        states = trajectory_hidden_states(
            model, inputs["input_ids"], inputs["attention_mask"], tokens
        )
        weight, bias = output_head(model)
        loss = gflowgr.fused_vargrad_loss(
            states.hidden, weight, tokens, inputs["log_reward"], bias=bias, tree=TREE
        )
        return (loss, states) if return_outputs else loss


def main() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1}
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=2 + 2 * CODES, dropout_rate=0.0, **sizes, **start)
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=64,
            max_steps=60,
            learning_rate=3e-3,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,  # tokens and log_reward are no arguments of T5.forward
            dataloader_pin_memory=False,
            seed=0,
        )
        trainer = FlowTrainer(model, arguments, train_dataset=Clicks())
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", " ".join(f"{float(loss):.3f}" for loss in losses))


if __name__ == "__main__":
    main()
