#!/usr/bin/env python3
"""Where the time of a training step on a CPU goes: a table by type of layer, beside a large matrix product.

usage: python scripts/bench_layers.py WORKSPACE [--recipe cpu] [--precision bf16] [--output TABLE.md]
       ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python scripts/bench_layers.py WORKSPACE   (as on AVX2)

One thread computes one sample, as in training where each core has samples of its own; what is done for a whole batch is
divided by its samples. Times are the thread's CPU time, the least of some repetitions, forward and backward apart. The
matrix product (1024x1024 in the precision of the step) takes its turns in between. "compiled" is by torch.compile.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lite.data.dataset import dataset_from_json
from nnunet_lite.files import read_json
from nnunet_lite.networks.cpu import keep_freed_memory
from nnunet_lite.networks.precision import DTYPES
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.store import open_case
from nnunet_lite.settings import load_settings
from nnunet_lite.training.cache import load_cases
from nnunet_lite.training.dataloader import make_batch
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.learner import Learner, choose_format, make_learner, make_network
from nnunet_lite.training.loss import deep_supervision_loss
from nnunet_lite.training.optim import update_average
from nnunet_lite.workspace import planned_paths

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
NORMS = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.modules.batchnorm._BatchNorm)
SIDE, CASES = 1024, 20


def cpu_seconds(work: Callable[[], Any], repeats: int) -> float:
    """The least CPU time of this thread."""
    times = []
    for _ in range(repeats + 2):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times[2:])


def make_job(workspace: Path, recipe: str, configuration: str, precision: str) -> Job:
    paths = planned_paths(workspace)
    settings = load_settings(recipe, {"training.precision": precision})
    plan, device = configure_plan(Plan.read(paths.plans), configuration, settings), torch.device("cpu")
    ids = [case.id for case in dataset_from_json(read_json(paths.dataset)).cases][:CASES]
    cases = load_cases(ids, lambda i: open_case(paths.preprocessed, plan, configuration, i), "auto", device)
    return Job(plan, configuration, settings, 0, paths.root, device, cases, cases)


class Bench:
    """Rows of the table: (name, forward seconds, backward seconds, floating-point operations of the forward pass)."""

    def __init__(self, job: Job, learner: Learner, repeats: int) -> None:
        self.job, self.learner, self.repeats = job, learner, repeats
        self.rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        a = torch.randn(SIDE, SIDE).to(DTYPES[learner.compute.precision])
        self.products: list[float] = []
        self.multiply = lambda: a @ a

    def add(self, name: str, work: Callable[..., Any], inputs: list[Tensor], operations: float = 0.0) -> None:
        """Time work on copies of its inputs that need gradients, unless they are the image, and its backward pass."""
        self.products.append(cpu_seconds(self.multiply, 1))
        leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]

        def forward() -> list[Tensor]:
            with self.learner.compute.autocast(self.job.device):
                found = work(*leaves)
            return found if isinstance(found, list) else [found]

        sources = [x for x in (*leaves, *self.learner.parameters) if x.requires_grad]
        outputs = forward()
        grads = [self.job_format(torch.randn_like(y)) for y in outputs]
        seconds = cpu_seconds(forward, self.repeats)
        both = cpu_seconds(lambda: torch.autograd.grad(forward(), sources, grads, allow_unused=True), self.repeats)
        row = self.rows[name]
        for i, value in enumerate((seconds, both - seconds, operations)):
            row[i] += value

    def job_format(self, x: Tensor) -> Tensor:
        return self.learner.compute.arrange(x) if x.ndim > 3 else x

    def add_layers(self, images: Tensor) -> None:
        """The layers of the network, with the inputs that they have in a forward pass."""
        network, calls, outputs = self.learner.network, [], {}
        hooks = [
            layer.register_forward_hook(lambda layer, given, found: calls.append((layer, given[0], found.shape)))
            for layer in network.modules()
            if isinstance(layer, (*CONVOLUTIONS, *NORMS, nn.LeakyReLU, nn.ReLU))
        ]
        for stage in (*network.encoder, *network.decoder):
            hooks.append(stage.register_forward_hook(lambda stage, _, found: outputs.update({stage: found})))
        with self.learner.compute.autocast(self.job.device):
            network(images)
        for hook in hooks:
            hook.remove()
        for layer, x, shape in calls:
            if isinstance(layer, CONVOLUTIONS):
                size, stride = "x".join(map(str, layer.kernel_size)), max(layer.stride)
                kind = f"convolution {size}, {layer.in_channels} -> {layer.out_channels}" + f", stride {stride}" * (
                    stride > 1
                )
                operations = 2.0 * layer.weight.numel() * math.prod(shape[2:])
                self.add("heads" if layer in set(network.heads) else f"{kind}, at {shape[2]}", layer, [x], operations)
            elif isinstance(layer, NORMS):
                self.add("norm", layer, [x])
            else:  # in place: not on a leaf
                self.add("activation (with a copy)", lambda x, layer=layer: layer(x * 1), [x])
        skips = [outputs[stage] for stage in network.encoder]
        x = skips.pop()
        for up, decode in zip(network.upsample, network.decoder, strict=True):
            skip = skips.pop()
            name = "transposed convolution and concatenation"
            operations = 2.0 * up.in_channels * up.out_channels * math.prod(skip.shape[2:])
            self.add(name, lambda x, skip, up=up: network.join(up, x, skip), [x, skip], operations)
            x = outputs[decode]

    def add_rest(self) -> None:
        """What is done for a batch, per sample."""
        job, learner, size = self.job, self.learner, self.job.planned.batch_size
        batches = [cpu_seconds(lambda i=i: make_batch(job, job.training, 0, i, augment=True), 1) for i in range(40)]
        self.rows["loading and augmentation (mean)"][0] = sum(batches) / len(batches) / size
        images, classes, _ = make_batch(job, job.training, 0, 0, augment=True)
        with learner.compute.autocast(job.device), torch.no_grad():
            found = learner.network(learner.compute.arrange(images))
        outputs = [y.requires_grad_() for y in (found if isinstance(found, list) else [found])]

        def loss(*outputs: Tensor) -> Tensor:
            return deep_supervision_loss(list(outputs), classes, job.plan, job.configuration, job.settings.loss)

        self.add("loss", loss, outputs)
        self.rows["loss"] = [value / size for value in self.rows["loss"]]
        for weight in learner.parameters:
            weight.grad = torch.zeros_like(weight)
        steps = {
            "clipping": lambda: nn.utils.clip_grad_norm_(learner.parameters, 1.0),
            "optimizer": learner.optimizer.step,
        }
        if learner.average is not None:
            steps["average"] = lambda: update_average(learner.average, learner.network, 0.99, 1)
        for name, work in steps.items():
            self.rows[name][0] = cpu_seconds(work, self.repeats) / size

    def table(self, whole: dict[str, list[float]]) -> list[str]:
        product = 2 * SIDE**3 / min(self.products) / 1e9
        total = [sum(row[i] for row in self.rows.values()) for i in range(3)]
        step = sum(total[:2])
        lines = [
            "| what | forward, ms | backward, ms | share | GFLOP/s forward, backward |",
            "|---|---|---|---|---|",
        ]
        for name, (forward, backward, work) in [*self.rows.items(), ("sum", total), *whole.items()]:
            ahead = "image" in name or ", 1 -> " in name  # the gradient of the image is not computed
            rate = (
                f"{work / forward / 1e9:.0f}, {(1 if ahead else 2) * work / max(backward, 1e-9) / 1e9:.0f}"
                if work
                else ""
            )
            share = f"{100 * (forward + backward) / step:.1f} %"
            lines.append(f"| {name} | {1e3 * forward:.2f} | {1e3 * backward:.2f} | {share} | {rate} |")
        speed = 3 * total[2] / step / 1e9
        share = f"{100 * speed / product:.0f} %"
        work = f"A sample has {3 * total[2] / 1e9:.1f} GFLOP: {speed:.0f} GFLOP/s on a core"
        return [*lines, "", f"{work}, where the matrix product reaches {product:.0f} ({share})."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--recipe", default="cpu")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="time torch.compile's network too")
    parser.add_argument("--output", type=Path)
    o = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    job = make_job(o.workspace, o.recipe, o.configuration, o.precision)
    network = make_network(job)
    bench = Bench(job, make_learner(job, network, choose_format(job, network)), o.repeats)
    images = bench.job_format(torch.randn(1, job.plan.n_inputs(o.configuration), *job.planned.patch_size))
    bench.add_layers(images)
    bench.add_rest()
    parts = dict(bench.rows)
    bench.add("network as a whole", network, [images])
    if o.compile:
        bench.add("network, compiled", torch.compile(network, dynamic=False), [images])
    whole = {name: row for name, row in bench.rows.items() if name not in parts}
    bench.rows = parts  # type: ignore[assignment]
    lines = bench.table(whole)
    print(*lines, sep="\n")
    if o.output:
        o.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
