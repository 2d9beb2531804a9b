"""A model as ONNX, for machines without torch: a graph for each fold, and beside it what onnx_runner.py needs.

OUT/
  fold_0.onnx ...   image (batch, inputs, *patch) -> logits (batch, outputs, *patch), float32, a batch of any size
  plans.json        the plan: normalisation, spacing, patch, labels
  onnx.json         configuration, folds, step size, mirroring; this and the plan are in each graph's metadata too
  previous/         of a cascade, its first stage, alike
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import must_fit, scratch, write_json, write_text
from nnunet_lite.inference.onnx_runner import ABOUT, FORMAT, INPUT, OUTPUT, PREVIOUS, start_session
from nnunet_lite.inference.predictor import Model, load

OPSET = 18
TOLERANCE = 1e-3  # of a logit; where the largest is above 1, of that
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    folder: Path,
    out: Path,
    folds: Sequence[str | int] | None = None,
    *,
    trust_code: bool = False,
    workspace: Path | None = None,
) -> dict[str, float]:
    """Write the network of each fold as ONNX, its finest head alone, and run each graph to compare it with torch.

    Parameters
    ----------
    out : a new folder; it appears when it is whole.
    folds : which; default: all that are trained.
    trust_code, workspace : whose code may be run, as for `predictor.load`.

    Returns
    -------
    For each file, e.g. "fold_0.onnx", the largest difference of a logit from torch's, for a random window.

    Raises
    ------
    UserError : no model folder, not that fold, `out` is there already, the extra `onnx` is not installed, or a network
        of the user's own does what ONNX cannot say.
    RuntimeError : a graph computes something else than its network.
    """
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        raise UserError(f"ONNX needs {', '.join(missing)}", fix='pip install "nnunet-lite[onnx]"')
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError("is there already", out, "Choose another --output, or delete it.")
    exact = {"inference.precision": "fp32"}
    model, out = load(folder, folds, "cpu", exact, trust_code=trust_code, workspace=workspace), out.absolute()
    with scratch(out.parent) as temporary:
        partial = temporary / out.name
        with must_fit(out, partial):
            differences = _write(model, partial)
        partial.replace(out)
    return differences


def _write(model: Model, out: Path) -> dict[str, float]:
    """All files of a model, and of its first stage."""
    about, differences = _about(model), {}
    metadata = {"nnlite": json.dumps(about), "plan": model.plan.model_dump_json()}
    write_text(out / "plans.json", model.plan.to_json())
    write_json(out / ABOUT, about)
    inputs = model.plan.n_inputs(model.configuration_name)
    window = torch.randn(2, inputs, *model.configuration.patch_size, generator=torch.Generator().manual_seed(0))
    window[..., : window.shape[-1] // 2] = -1  # as the air beside a body, which is hard on sums
    for fold, network in zip(model.folds, model.networks, strict=True):
        file = out / f"fold_{fold}.onnx"
        log.info(f"writing {model.configuration_name} fold {fold}")
        contiguous = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        _write_graph(_with_stepwise_norms(contiguous), window, metadata, file)
        differences[file.name] = _difference(contiguous, window[:1], file)
    if model.previous is not None:
        first = _write(model.previous, out / PREVIOUS)
        differences |= {f"{PREVIOUS}/{name}": difference for name, difference in first.items()}
    return differences


def _about(model: Model) -> dict[str, Any]:
    """What the runner needs beside the plan, and what a person looks for first."""
    return {
        "format": FORMAT,
        "made_by": f"nnunet_lite {nnunet_lite.__version__}",
        "opset": OPSET,
        "dataset": model.plan.dataset,
        "configuration": model.configuration_name,
        "channels": [channel.name for channel in model.plan.channels],
        "labels": model.plan.labels.to_json(),
        "spacing": model.configuration.spacing,
        "patch_size": model.configuration.patch_size,
        "folds": model.folds,
        "step_size": model.settings.step_size,
        "mirror_axes": model.mirror_axes if model.settings.mirroring else (),
        "sides": None if model.sides is None else asdict(model.sides),
    }


class StepwiseNorm(nn.Module):
    """Instance normalisation whose means are taken axis by axis.

    onnxruntime's own adds up all voxels of a channel in float32, one after the other: where most of them are equal, as
    air is in CT, logits change by 0.03, and in a window of nothing but air by 0.2. This one errs as little as torch.
    """

    def __init__(self, norm: nn.InstanceNorm2d | nn.InstanceNorm3d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        per_channel = (-1, *[1] * (x.ndim - 2))
        centred = x - _mean(x)
        scale = torch.rsqrt(_mean(centred * centred) + self.eps) * self.weight.view(per_channel)
        return centred * scale + self.bias.view(per_channel)


def _mean(x: Tensor) -> Tensor:
    for axis in range(x.ndim - 1, 1, -1):
        x = x.mean(axis, keepdim=True)
    return x


def _with_stepwise_norms(network: nn.Module) -> nn.Module:
    """A copy of a network with other instance norms of the same weights."""
    copy = deepcopy(network)
    for module in list(copy.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d) and child.weight is not None:
                setattr(module, name, StepwiseNorm(child))
    return copy


def _write_graph(network: nn.Module, window: Tensor, metadata: dict[str, str], file: Path) -> None:
    """Trace a network and write its graph; weights of more than 2 GB go to a file of their own beside it."""
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (window,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"the network cannot be written as ONNX ({str(error).splitlines()[0]})") from error
    assert program is not None  # it is for the older exporter alone, which writes the file itself
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in whose code it came from, with the paths of this machine
    program.model.metadata_props.update(metadata)
    program.save(file)


def _difference(network: nn.Module, window: Tensor, file: Path) -> float:
    """The largest difference of a logit that a graph and its network compute.

    Raises
    ------
    RuntimeError : it is above the tolerance.
    """
    with torch.inference_mode():
        expected = network(window)
    (found,) = start_session(file).run([OUTPUT], {INPUT: window.numpy()})
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"{file.name} differs from the network by {difference:.3g} in a logit")
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not installed and of its own methods."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
