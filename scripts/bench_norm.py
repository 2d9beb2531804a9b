#!/usr/bin/env python3
"""Time instance normalisation, forward and backward, on channels-last activations on the CPU: torch's and ours.

usage: taskset -c 0,1 python scripts/bench_norm.py
"""

from __future__ import annotations

import os
import time

import torch
import torch.nn.functional as F

from nnunet_lite.networks.cpu import FastInstanceNorm, keep_freed_memory


def best_ms(work: object, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[2:])


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    print("| activations | type | torch instance_norm | torch group_norm | ours |\n|---|---|---|---|---|")
    for channels, size in ((16, (40, 56, 40)), (32, (20, 28, 20)), (64, (10, 14, 10))):
        for kind in (torch.float32, torch.bfloat16):
            x = torch.randn(4, channels, *size).to(kind).to(memory_format=torch.channels_last_3d).requires_grad_()
            gradient, norm = torch.randn_like(x), FastInstanceNorm(channels, affine=True)
            w, b = (p.detach().to(kind) for p in (norm.weight, norm.bias))
            works = (
                lambda x=x, g=gradient, w=w, b=b: F.instance_norm(x, weight=w, bias=b).backward(g),
                lambda x=x, g=gradient, w=w, b=b: F.group_norm(x, len(w), w, b).backward(g),
                lambda x=x, g=gradient, norm=norm: norm(x).backward(g),
            )
            figures = " | ".join(f"{best_ms(work):.1f} ms" for work in works)
            print(f"| 4x{channels}x{'x'.join(map(str, size))} | {str(kind).removeprefix('torch.')} | {figures} |")


if __name__ == "__main__":
    main()
