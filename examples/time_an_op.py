"""For those who change a kernel: the right answer first, then the time, for each backend there is.

    python examples/time_an_op.py            # small
    python examples/time_an_op.py 256 33024  # prompts, vocabulary

The quick look while you work. What is quoted comes from `python -m benchmarks`, which draws new
data in each round, rotates the order, compares with other projects and counts memory.
"""

from __future__ import annotations

import sys
import time

import torch

import gflowgr


def main(prompts: int = 16, vocabulary: int = 1027) -> None:
    torch.manual_seed(0)
    count, length, width = 4, 4, 128
    hidden = torch.randn(prompts, count, length, width)
    weight = 0.05 * torch.randn(vocabulary, width)
    tokens = torch.randint(vocabulary, (prompts, count, length))
    log_reward, log_z = torch.randn(prompts, count), torch.zeros(prompts)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = gflowgr.fused_tb_loss(*inputs, tokens, log_reward.to(dtype), log_z.to(dtype))
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    with gflowgr.backend("torch"):
        wanted = gradients(torch.float64)  # the definition, in float64
    for name, reason in gflowgr.available_backends("cpu")["dense_flow_loss"].items():
        if reason is not None:
            print(f"{name:<8}left out: {reason}")
            continue
        with gflowgr.backend(name):
            found = gradients(torch.float32)
            error = max(
                float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)
            )
            if error > 1e-4:
                raise SystemExit(f"{name}: wrong, relative error {error:.1e}")
            seconds = []
            for _ in range(5):
                begin = time.perf_counter()
                gradients(torch.float32)
                seconds.append(time.perf_counter() - begin)
        print(f"{name:<8}{1e3 * sorted(seconds)[2]:9.2f} ms   relative error {error:.1e}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
