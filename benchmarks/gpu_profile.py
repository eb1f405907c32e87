"""Profile one call of the dense head and one search with torch.profiler, to a file.

python benchmarks/gpu_profile.py --out FILE [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import ours
from benchmarks.harness.constraints import random_catalogue
from benchmarks.harness.inputs import head_inputs
from benchmarks.harness.models import VOCAB, build_model, make_prompts
from benchmarks.harness.shapes import BEAUTY_ITEMS, NAMED, LossShape
from gflowgr.decoding import constrained_beam_search


def head_call(device: torch.device) -> Callable[[], object]:
    """The fused loss of the letter shape in bfloat16, forward and backward."""
    small = LossShape("small", 2, 2, 4, 16, 1100)
    shape = small if device.type == "cpu" else NAMED["letter-gpu"]
    inputs = head_inputs(shape, device, torch.bfloat16, trained=True, upstream=False)(0)
    return lambda: ours.fused_loss(inputs).backward()


def search_call(device: torch.device) -> Callable[[], object]:
    """A beam search of eight prompts with the decoder-only model."""
    prompts, source, items = (1, 8, 1000) if device.type == "cpu" else (8, 512, BEAUTY_ITEMS)
    model: Any = build_model("qwen3", device)
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    tree = random_catalogue(items, VOCAB, device).tree
    inputs = make_prompts(prompts, source, device, 0)
    return lambda: constrained_beam_search(
        model, inputs["input_ids"], inputs["mask"], tree, num_beams=20, normalize="vocab"
    )


def table(call: Callable[[], object], device: torch.device) -> str:
    """The profiler's table of the third call."""
    for _ in range(2):
        call()
    activities, order = [ProfilerActivity.CPU], "self_cpu_time_total"
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities, order = [*activities, ProfilerActivity.CUDA], "self_cuda_time_total"
    with profile(activities=activities) as found:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by=order, row_limit=25))


def main() -> int:
    """Write the tables, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    device, texts = torch.device(args.device), []
    for name, make in (("dense head", head_call), ("search", search_call)):
        texts.append(f"{name}\n{table(make(device), device)}\n")
        args.out.write_text("\n".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
