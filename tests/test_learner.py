"""How a network is trained on this machine: which formats are tried, what is kept, and faults of the compiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_lite.errors import UserError
from nnunet_lite.networks import precision
from nnunet_lite.networks.precision import ComputeFormat
from nnunet_lite.training import learner
from nnunet_lite.training.job import Job
from nnunet_lite.training.learner import (
    choose_format,
    list_training_formats,
    make_learner,
    make_network,
    parallelize,
    train_step,
)

AUTO = {"training.seed": None, "training.channels_last": "auto", "training.precision": "auto"}
FP32 = AUTO | {"training.precision": "fp32", "training.patch_size": [8, 8, 8]}
MakeJob = Callable[..., Job]


def on_gpu(job: MakeJob, changes: dict[str, Any] | None = None) -> list[str]:
    """The formats in which a fold may be trained on a GPU."""
    run = replace(job(**AUTO | (changes or {})), device=torch.device("cuda"))
    return [str(one) for one in list_training_formats(run)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], bool]:
    """A GPU with bf16, for what asks for its abilities only; the shapes of convolutions that were compared."""
    compared: dict[tuple[int, ...], bool] = {}
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    monkeypatch.setattr(learner, "computes_bf16", lambda device, shape, kernel: compared.setdefault(shape, True))
    return compared


def test_formats_on_a_gpu(job: MakeJob, gpu: dict[tuple[int, ...], bool]) -> None:
    """Each memory format with and without the compiler, which comes last; plain norm where it may be faster."""
    assert on_gpu(job) == [
        "bf16 channels-last", "bf16", "bf16 channels-last plain norm",
        "bf16 channels-last compiled", "bf16 compiled", "bf16 channels-last compiled plain norm",
        "bf16 compiled plain norm",
    ]  # fmt: skip
    planned = job(**AUTO).planned
    assert gpu == {(planned.batch_size, planned.network.features[0], *planned.patch_size): True}
    few: dict[str, Any] = {"training.channels_last": False, "network.norm": "batch"}
    assert on_gpu(job, few) == ["bf16", "bf16 compiled"]
    assert on_gpu(job, few | {"training.compile": True}) == ["bf16 compiled"]
    assert on_gpu(job, few | {"training.time_limit": "10m"}) == ["bf16"]
    assert list_training_formats(job(**FP32 | few)) == [ComputeFormat()]


def test_fp16_replaces_a_wrong_bf16(job: MakeJob, gpu: dict[Any, bool], capfd: pytest.CaptureFixture[str]) -> None:
    planned = job(**AUTO).planned
    gpu[planned.batch_size, planned.network.features[0], *planned.patch_size] = False
    few = {"training.channels_last": False, "training.compile": False}
    assert on_gpu(job, few) == ["fp16"]
    assert "(pytorch#163539); fp16 is used instead" in capfd.readouterr().err
    assert on_gpu(job, few | {"training.precision": "bf16"}) == ["bf16"]
    assert "it was set, and is used" in capfd.readouterr().err


def test_the_choice_of_a_format_is_kept(job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, network = tmp_path / "formats.json", make_network(job(**FP32))
    run = replace(job(**FP32), formats=file, device=torch.device("meta"))  # stands for one on which formats are timed
    monkeypatch.setattr(learner, "pick_fastest", lambda formats, *_: replace(formats[-1], reason="fast"))
    chosen = choose_format(run, network)
    (key,) = json.loads(file.read_text())
    assert key.startswith(f"meta, torch {torch.__version__}, 3d_fullres ")
    choose_format(replace(run, plan=job(**FP32 | {"training.batch_size": 3}).plan), network)
    assert len(json.loads(file.read_text())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(learner, "pick_fastest", None)  # nothing is timed again
        again = choose_format(replace(run, seed=6), network)
        assert (again, again.reason) == (chosen, chosen.reason)
    for damaged in ('{"meta', "[]", '{"meta": {"precision": 1, "unknown": 2}}'):
        file.write_text(damaged)
        choose_format(run, network)
        assert list(json.loads(file.read_text())) == [key]


def test_on_a_cpu_nothing_is_timed_and_a_seed_means_fp32(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """So all folds of a model, and a run that is resumed, compute alike, however busy the machine is."""
    monkeypatch.setattr(learner, "pick_fastest", None)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(precision, "has_bf16", lambda _: True)
    monkeypatch.setattr(precision, "has_amx", lambda: False)
    for seed, expected in ((None, "bf16"), (3, "fp32")):
        run = job(**AUTO | {"training.seed": seed, "training.patch_size": [8, 8, 8]})
        assert choose_format(run, make_network(run)) == ComputeFormat(expected, channels_last=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_network_makes_the_same_step(job: MakeJob, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """With aot_eager the network and its gradients are traced. Only inductor generates code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(learner, "speed_up_on_cpu", lambda network: None)  # its kernels are not for the compiler
    losses = []
    for compute in (ComputeFormat(), ComputeFormat(channels_last=True, compiled=True, plain_norm=True)):
        run = job(**FP32)
        made = parallelize(run, make_learner(run, make_network(run), compute))
        assert (made.forward is made.network) != compute.compiled
        batch = learner.make_batch(run, run.training, 0, 0, augment=False)
        losses.append([float(train_step(run, made, [batch], 0.01, number)[0]) for number in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0][2] < losses[0][0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_step_in_fp16_that_overflows_changes_only_the_scale_of_the_loss(job: MakeJob, optimizer: str) -> None:
    """As on a GPU without bf16: a scale that fits makes the step of fp32."""
    norm = {"network.norm": "batch", "optimizer.name": optimizer, "optimizer.lr": 0.01}
    run = job(**FP32 | norm | {"optimizer.weight_decay": 0})
    batch, results = learner.make_batch(run, run.training, 0, 0, augment=False), []
    for name, scale, fits in (("fp32", 1.0, True), ("fp16", 2.0**40, False), ("fp16", 2.0**8, True)):
        network = make_network(run)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        made = make_learner(run, network, ComputeFormat(name), scale)
        loss, good = train_step(run, made, [batch], 0.01, 0)
        after = network.state_dict()
        changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
        assert bool(good) and bool(changed) == fits
        assert made.scaler.get_scale() == (scale if fits else scale / 2)
        results.append((loss, after))
    (exact, wanted), _, (rounded, found) = results
    assert float(rounded) == pytest.approx(float(exact), abs=1e-2)
    weights = [key for key in before if "weight" in key]
    steps = [torch.cat([(own[key] - before[key]).flatten() for key in weights]) for own in (wanted, found)]
    assert torch.cosine_similarity(*steps, dim=0) > 0.9


def test_a_compiler_that_fails_is_left_out_or_named(
    job: MakeJob, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(network: torch.nn.Module, **_: Any) -> torch.nn.Module:
        return torch.nn.Sequential(network, torch.nn.Linear(1, 1))  # fails at its first call

    monkeypatch.setattr(torch, "compile", broken)
    run = job(**FP32)
    made = make_learner(run, make_network(run), ComputeFormat(compiled=True))
    plain = parallelize(run, made)
    assert plain.forward is made.network and not plain.compute.compiled, "which the checkpoint says too"
    assert "torch.compile failed and is left out: " in capfd.readouterr().err
    with pytest.raises(UserError, match=r"torch.compile failed: .*training\.compile=false"):
        parallelize(job(**FP32 | {"training.compile": True}), made)
