"""Export a model as ONNX, for machines without torch: a graph for each fold, and what onnx_runner.py needs.

OUT/
  fold_0.onnx ...   image (batch, inputs, *patch) -> logits (batch, outputs, *patch), float32, a batch of any size
  plans.json        the plan: normalisation, spacing, patch, labels
  onnx.json         configuration, folds, step size, mirroring; the metadata of each graph contains it and the plan too
  previous/         of a cascade, the first stage in the same form
"""

from __future__ import annotations

import json
import logging
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.errors import UserError, how_to_install
from nnunet_lite.files import write_json, write_text
from nnunet_lite.inference.onnx_runner import ABOUT, FORMAT, INPUT, OUTPUT, PREVIOUS, start_session
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.models.folder import Checkpoint, new_model_folder

OPSET = 18
TOLERANCE = 1e-3  # of a logit; if the largest logit is above 1, a share of it
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: Path, out: Path, *, checkpoint: Checkpoint = "final", trust_code: bool = False, workspace: Path | None = None
) -> dict[str, float]:
    """Write the network of each trained fold as ONNX, without deep supervision, and compare what each graph computes.

    Parameters
    ----------
    model : Path
        A model folder or a zip.
    out : Path
        A new folder. It appears when it is complete.
    checkpoint, trust_code, workspace
        As for `load`.

    Returns
    -------
    dict of str to float
        For each file, such as "fold_0.onnx", the largest difference of a logit from torch's, for a random window.

    Raises
    ------
    UserError
        There is no model, `out` exists already, the extra `onnx` is not installed, or ONNX cannot express
        a network of the user.
    RuntimeError
        A graph computes something else than its network.
    """
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        raise UserError(f"ONNX needs {', '.join(missing)}", fix=how_to_install("onnx"))
    settings = {"inference.precision": "fp32", "inference.compile": False}
    with new_model_folder(out) as partial:
        predictor = load(model, None, "cpu", settings, checkpoint=checkpoint,
                         trust_code=trust_code, workspace=workspace)  # fmt: skip
        return _write(predictor, partial)


def _write(predictor: Predictor, out: Path) -> dict[str, float]:
    """Write all files of a model, and of its first stage."""
    swap = predictor.swap
    about = {
        "format": FORMAT,
        "made_by": f"nnunet_lite {nnunet_lite.__version__}",
        "configuration": predictor.configuration_name,
        "folds": predictor.folds,
        "step_size": predictor.settings.step_size,
        "mirror_axes": predictor.mirror_axes if predictor.settings.mirroring else (),
        "of_nnunet": predictor.of_nnunet,
        "skip_empty": predictor.skip_empty,
        "sides": swap and {"axis": swap.axis, "channels": swap.channels, "classes": swap.table},
    }
    write_text(out / "plans.json", predictor.plan.to_json())
    write_json(out / ABOUT, about)
    metadata = {"nnlite": json.dumps(about), "plan": predictor.plan.model_dump_json()}
    inputs = predictor.plan.n_inputs(predictor.configuration_name)
    window = torch.randn(2, inputs, *predictor.configuration.patch_size, generator=torch.Generator().manual_seed(0))
    window[..., : window.shape[-1] // 2] = -1  # like air around a body, where sums are the least exact
    differences = {}
    for fold, network in zip(predictor.folds, predictor.networks, strict=True):
        file = out / f"fold_{fold}.onnx"
        log.info(f"writing {predictor.configuration_name} fold {fold}")
        contiguous = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, unused-ignore]
        _write_graph(_with_stepwise_norms(contiguous), window, metadata, file)
        differences[file.name] = _difference(contiguous, window[:1], file)
    if predictor.first_stage is not None:
        first = _write(predictor.first_stage, out / PREVIOUS)
        differences |= {f"{PREVIOUS}/{name}": difference for name, difference in first.items()}
    return differences


class StepwiseNorm(nn.Module):
    """Instance normalisation that averages one axis after the other.

    onnxruntime's own adds all voxels of a channel in float32, one after the other. If most of them are equal, like air
    in CT, logits change by 0.03, and in a window of air by 0.2. This one is as exact as torch.
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
    """Copy a network, and replace its instance norms by stepwise ones with the same weights."""
    copy = deepcopy(network)
    for module in list(copy.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d) and child.weight is not None:
                setattr(module, name, StepwiseNorm(child))
    return copy


def _write_graph(network: nn.Module, window: Tensor, metadata: dict[str, str], file: Path) -> None:
    """Trace a network and write its graph; weights of more than 2 GB are written to a second file."""
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports packages that it does not need
        with warnings.catch_warnings(action="ignore"):
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
    assert program is not None  # as it is for the older exporter, which writes the file itself
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # source files, with the paths of this machine
    program.model.metadata_props.update(metadata)
    program.save(file)


def _difference(network: nn.Module, window: Tensor, file: Path) -> float:
    """Return the largest difference between the logits of a graph and of its network.

    Raises
    ------
    RuntimeError
        It is above the tolerance.
    """
    with torch.inference_mode():
        expected = network(window)
    (found,) = start_session(file).run([OUTPUT], {INPUT: window.numpy()})
    difference = float((torch.from_numpy(found) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"{file.name} differs from the network by {difference:.3g} in a logit")
    return difference
